"""Which atoms are bonded, judged from distances alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Longest bond as a multiple of the sum of covalent radii: F2 is at 1.24 and H2 at 1.20, nearly all
# other bonds below 1.1; atoms with a common neighbour start at 1.15 in small cages, else at 1.3.
BOND_FACTOR = 1.25

# A bond counts as broken, and a pair as newly bonded, only across this gap: distances across small
# rings and the stretched bonds of anions drift over any single limit without a change of bonding.
APART_FACTOR = 1.35

# Closest contact as the same multiple; the shortest of bonds, in N2 and CO, are above 0.75.
COLLAPSE_FACTOR = 0.4


def bonds(
    numbers: ArrayLike, positions: ArrayLike, *, factor: float = BOND_FACTOR
) -> NDArray[np.int32]:
    """List bonded pairs (B, 2), i < j, sorted, of numbers (N,) at positions (N, 3) in Å.

    A pair is bonded when closer than `factor` times the sum of its covalent radii (Cordero et
    al., Dalton Trans. 2008, 2832).
    """
    z = np.asarray(numbers, dtype=np.uint8)
    squared = _squared_distances(np.asarray(positions, dtype=np.float64))
    limit = factor * _radius_sums(z.tobytes())
    return _pairs(squared < limit * limit)


def changes(
    numbers: ArrayLike, before: ArrayLike, after: ArrayLike
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the bonds broken (B, 2) and formed (B, 2) between two geometries (N, 3) in Å.

    A pair changes when it goes from closer than BOND_FACTOR to farther than APART_FACTOR times
    the sum of its covalent radii, or back.
    """
    z = np.asarray(numbers, dtype=np.uint8)
    sums = _radius_sums(z.tobytes())
    old = np.sqrt(_squared_distances(np.asarray(before, dtype=np.float64))) / sums
    new = np.sqrt(_squared_distances(np.asarray(after, dtype=np.float64))) / sums
    broken = (old < BOND_FACTOR) & (new > APART_FACTOR)
    formed = (old > APART_FACTOR) & (new < BOND_FACTOR)
    return _pairs(broken), _pairs(formed)


def closest_contact(
    numbers: NDArray[np.uint8], positions: NDArray[np.float64]
) -> tuple[int, int, float]:
    """Return the pair of atoms i, j closest for their size, and their distance in Å."""
    ratio = np.sqrt(_squared_distances(positions)) / _radius_sums(numbers.tobytes())
    np.fill_diagonal(ratio, np.inf)
    i, j = divmod(int(ratio.argmin()), len(numbers))
    return i, j, float(np.linalg.norm(positions[i] - positions[j]))


def collapsed(numbers: NDArray[np.uint8], positions: NDArray[np.float64]) -> bool:
    """Tell whether any two atoms are closer than COLLAPSE_FACTOR of their covalent radii."""
    return bool((_squared_distances(positions) < _collapse_limits(numbers.tobytes())).any())


def _squared_distances(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    # Differences, not the Gram matrix: the latter loses the digits of short distances far from
    # the origin.
    delta = positions[:, None, :] - positions[None, :, :]
    squared: NDArray[np.float64] = np.einsum("ijk,ijk->ij", delta, delta)
    return squared


@lru_cache(maxsize=32)
def _radius_sums(numbers: bytes) -> NDArray[np.float64]:
    from ase.data import covalent_radii

    radii = np.asarray(covalent_radii, dtype=np.float64)[np.frombuffer(numbers, dtype=np.uint8)]
    sums: NDArray[np.float64] = radii[:, None] + radii[None, :]
    sums.flags.writeable = False
    return sums


@lru_cache(maxsize=32)
def _collapse_limits(numbers: bytes) -> NDArray[np.float64]:
    limits = (COLLAPSE_FACTOR * _radius_sums(numbers)) ** 2
    np.fill_diagonal(limits, -1.0)
    limits.flags.writeable = False
    return limits


def _pairs(matrix: NDArray[np.bool_]) -> NDArray[np.int32]:
    first, second = np.nonzero(np.triu(matrix, k=1))
    return np.stack([first, second], axis=1).astype(np.int32)
