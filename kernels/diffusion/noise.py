"""Normal random numbers that depend on an item's seed and the step, and on nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError


def normal(seed: int, step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return standard normal numbers of `shape`, the same alone or in any batch.

    The counter-based Philox generator (Salmon et al., SC 2011) is keyed by `seed` (0 to 2^128 - 1)
    and its counter starts at `step` in the highest of four words: no two steps overlap.
    """
    if not 0 <= seed < 2**128:
        raise InputError(f"seed {seed} is not between 0 and 2^128 - 1")
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, step])
    return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)


def centred_normal(seed: int, step: int, n_atoms: int, n_features: int) -> NDArray[np.float32]:
    """Return noise (n_atoms, 3 + n_features) for one molecule; positions come first.

    The mean of the positions' part over the atoms is zero, as the diffusion of molecules wants it.
    """
    drawn = normal(seed, step, (n_atoms, 3 + n_features))
    drawn[:, :3] -= drawn[:, :3].mean(axis=0)
    return drawn
