"""Confidence intervals of any statistic, by drawing molecules again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.intp]

_RESAMPLES: Final = 2000
_FEWEST_RESAMPLES: Final = 200
# Rows drawn in all: what a second or two allows for half a dozen medians.
_ROWS: Final = 10_000_000
# With fewer molecules than this an interval would only look like one.
_FEWEST: Final = 5


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic with its 95 % interval; ``low`` and ``high`` are NaN for too few molecules."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def estimate(
    owner: NDArray[np.integer[Any]],
    statistics: Mapping[str, Callable[[Indices], float]],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return each statistic with its percentile bootstrap interval.

    ``owner`` (R,) says which molecule a row belongs to: molecules are drawn, with all their rows,
    because conformers of one molecule are no independent samples. A statistic gets the drawn rows,
    with repetition; all statistics see the same draws, so that ratios are of paired values. The
    same seed gives the same interval. Efron and Tibshirani, An Introduction to the Bootstrap
    (1993), chapter 13.
    """
    rows = np.arange(len(owner))
    if not len(rows):
        return {name: Estimate(np.nan, np.nan, np.nan) for name in statistics}
    values = {name: float(statistic(rows)) for name, statistic in statistics.items()}
    sizes = np.unique(owner, return_counts=True)[1]
    if len(sizes) < _FEWEST:
        return {name: Estimate(value, np.nan, np.nan) for name, value in values.items()}
    order = np.argsort(owner, kind="stable")
    first = np.cumsum(sizes) - sizes
    resamples = int(np.clip(_ROWS // len(rows), _FEWEST_RESAMPLES, _RESAMPLES))
    rng = np.random.default_rng(seed)
    drawn = {name: np.empty(resamples) for name in statistics}
    for again in range(resamples):
        picked = rng.integers(0, len(sizes), len(sizes))
        sample = order[_runs(first[picked], sizes[picked])]
        for name, statistic in statistics.items():
            drawn[name][again] = statistic(sample)
    tail = 50 * (1 - confidence)
    found = {}
    for name, samples in drawn.items():
        # Without interpolation, which would make a NaN of an infinite ratio.
        low, high = np.percentile(samples, [tail, 100 - tail], method="inverted_cdf")
        found[name] = Estimate(values[name], float(low), float(high))
    return found


def _runs(first: Indices, length: Indices) -> Indices:
    """Return ``first[i], first[i] + 1, ...`` of each run i, end to end."""
    ends = np.cumsum(length)
    runs: Indices = np.arange(ends[-1]) + np.repeat(first - (ends - length), length)
    return runs
