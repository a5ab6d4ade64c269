"""Numbers of atoms: drawn for molecules to come, and shared out to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from kernels.errors import InputError

# Numbers of atoms in the QM9 training split of the EDM code, and how often each occurs.
QM9_SIZES: Final[Mapping[int, int]] = {
    3: 1, 4: 4, 5: 5, 6: 9, 7: 16, 8: 49, 9: 124, 10: 362, 11: 807, 12: 1689, 13: 3060, 14: 5136,
    15: 7796, 16: 10644, 17: 13025, 18: 13364, 19: 13832, 20: 9482, 21: 9970, 22: 3393, 23: 4848,
    24: 539, 25: 1506, 26: 48, 27: 266, 29: 25,
}  # fmt: skip

# A word of the counter that no noise uses: `noise.normal` counts steps in the highest.
_STREAM: Final = (0, 0, 1, 0)


def draw_size(histogram: Mapping[int, int], seed: int) -> int:
    """Return a number of atoms drawn with the weights of ``histogram``; QM9's where it is empty.

    Depends on `seed` (0 to 2^128 - 1) alone, and not on the random numbers of `noise.normal`.
    Raises InputError for an impossible histogram.
    """
    known = dict(histogram) or dict(QM9_SIZES)
    sizes = np.array(sorted(known))
    weights = np.array([known[size] for size in sizes.tolist()], dtype=np.float64)
    if sizes.min() < 1 or weights.min() < 0 or not weights.sum() > 0:
        raise InputError(f"the model's numbers of atoms {known} are no histogram")
    generator = np.random.Generator(np.random.Philox(key=seed, counter=list(_STREAM)))
    return int(generator.choice(sizes, p=weights / weights.sum()))


def packed(sizes: Sequence[int], most_pairs: int, *, mixed: bool) -> list[list[int]]:
    """Share molecules of ``sizes`` atoms out to batches; return their places, the smallest first.

    A batch holds ``most_pairs`` pairs of atoms at most, or one molecule, and molecules of equal
    size unless ``mixed``; of like size it holds them in any case. Mixed ones share out alike.
    """
    made: list[list[int]] = []
    pairs = 0
    if mixed:
        total = sum(size**2 for size in sizes)
        # No last batch of a few, which would cost as many calls as the others.
        largest = max(sizes, default=0) ** 2
        most_pairs = min(most_pairs, total // max(1, -(-total // most_pairs)) + largest)
    for place in sorted(range(len(sizes)), key=lambda place: sizes[place]):
        mine = sizes[place] ** 2
        fits = bool(made) and (mixed or sizes[made[-1][0]] == sizes[place])
        if fits and pairs + mine <= most_pairs:
            made[-1].append(place)
            pairs += mine
        else:
            made.append([place])
            pairs = mine
    return made
