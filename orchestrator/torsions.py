"""Bonds that turn, their dihedral angles along a chain, and how alike two distributions are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kernels.connectivity import bonds
from kernels.graph import bond_orders

Floats = NDArray[np.float64]

_HYDROGEN: Final = 1
_SINGLE, _TRIPLE = 1, 3
_BINS: Final = 36


@dataclass(frozen=True, slots=True)
class Torsion:
    """A bond that turns, as the dihedral of four atoms; the middle two are the bond's."""

    atoms: tuple[int, int, int, int]
    name: str


def rotatable(numbers: NDArray[np.uint8], positions: Floats, smiles: str = "") -> list[Torsion]:
    """Return the rotatable bonds of a molecule, numbers (N,) at positions (N, 3) in Å.

    Those are single bonds outside of rings with a neighbour on either side; the turning of a group
    like CH3 or NH2, whose other neighbours are all hydrogen, two of them or more, is left out, that
    of OH is in. Bond orders come from the SMILES; without one all bonds count as single.
    """
    n_atoms = len(numbers)
    orders = bond_orders(smiles) if smiles else np.zeros((0, 0), np.int64)
    if len(orders) != n_atoms:
        orders = np.zeros((n_atoms, n_atoms), np.int64)
        pairs = bonds(numbers, positions)
        orders[pairs[:, 0], pairs[:, 1]] = orders[pairs[:, 1], pairs[:, 0]] = _SINGLE
    found = []
    for i, j in zip(*np.nonzero(np.triu(orders == _SINGLE)), strict=True):
        ends = (
            _reference(numbers, orders, int(i), int(j)),
            _reference(numbers, orders, int(j), int(i)),
        )
        if min(ends) < 0 or _in_ring(orders, int(i), int(j)):
            continue
        atoms = (ends[0], int(i), int(j), ends[1])
        found.append(Torsion(atoms, "–".join(_label(numbers, at) for at in atoms)))
    return found


def _reference(numbers: NDArray[np.uint8], orders: NDArray[np.int64], end: int, other: int) -> int:
    """Return the neighbour of a bond's end that the dihedral is measured from; -1: none is."""
    if (orders[end] == _TRIPLE).any():
        return -1
    near = [int(at) for at in np.flatnonzero(orders[end]) if at != other]
    heavy = [at for at in near if numbers[at] != _HYDROGEN]
    if heavy:
        return heavy[0]
    return near[0] if len(near) == 1 else -1


def _in_ring(orders: NDArray[np.int64], i: int, j: int) -> bool:
    reached, open_ = {i}, [i]
    while open_:
        at = open_.pop()
        for near in np.flatnonzero(orders[at]).tolist():
            if {at, near} == {i, j} or near in reached:
                continue
            if near == j:
                return True
            reached.add(near)
            open_.append(near)
    return False


def _label(numbers: NDArray[np.uint8], atom: int) -> str:
    from ase.data import chemical_symbols

    return f"{chemical_symbols[int(numbers[atom])]}{atom + 1}"


def dihedrals(frames: Floats, torsions: list[Torsion]) -> Floats:
    """Return the angles (T, F) in degrees, -180 to 180, of frames (F, N, 3)."""
    angles = np.zeros((len(torsions), len(frames)))
    for row, torsion in enumerate(torsions):
        a, b, c, d = (frames[:, at].astype(np.float64) for at in torsion.atoms)
        axis = c - b
        before, after = np.cross(b - a, axis), np.cross(axis, d - c)
        sine = np.einsum("fi,fi->f", np.cross(before, after), axis)
        length = np.linalg.norm(axis, axis=1)
        cosine = np.einsum("fi,fi->f", before, after)
        angles[row] = np.degrees(np.arctan2(sine / np.where(length > 0, length, 1.0), cosine))
    return angles


def circular_deviation(angles: Floats) -> float:
    """Return the circular standard deviation of angles (F,), in degrees; NaN for none.

    Mardia and Jupp, Directional Statistics (2000), equation 2.3.14.
    """
    if not len(angles):
        return float("nan")
    length = float(np.abs(np.exp(1j * np.radians(angles)).mean()))
    return float(np.degrees(np.sqrt(max(0.0, -2.0 * np.log(max(length, 1e-300))))))


def overlap(one: Floats, other: Floats) -> float:
    """Return which share of two distributions of angles (F,) is common, in bins of 10 degrees."""
    if not len(one) or not len(other):
        return float("nan")
    edges = np.linspace(-180.0, 180.0, _BINS + 1)
    shares = [np.histogram(angles, edges)[0] / len(angles) for angles in (one, other)]
    return float(np.minimum(*shares).sum())
