"""Confidence intervals of any statistic, by drawing molecules again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.intp]
Floats = NDArray[np.float64]

_RESAMPLES: Final = 2000
_FEWEST_RESAMPLES: Final = 200
# Rows drawn in all: what a second or two allows for half a dozen medians.
_ROWS: Final = 10_000_000
# Rows of draws made in one go.
_AT_ONCE: Final = 500_000
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


@dataclass(frozen=True, slots=True)
class Statistic:
    """A function of some columns (R,) of rows; it reduces the last axis of each, as in numpy."""

    function: Callable[..., Any]
    columns: tuple[Floats, ...]


def mean(values: Floats) -> Statistic:
    """Return the mean of a column (R,)."""
    return Statistic(np.mean, (values,))


def median(values: Floats) -> Statistic:
    """Return the median of a column (R,)."""
    return Statistic(np.median, (values,))


def estimate(
    owner: NDArray[np.integer[Any]],
    statistics: Mapping[str, Statistic],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return each statistic with its percentile bootstrap interval.

    ``owner`` (R,) says which molecule a row belongs to: molecules are drawn, with all their rows,
    because conformers of one molecule are no independent samples. All statistics see the same
    draws, so that ratios are of paired values. The same seed gives the same interval. Efron and
    Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if not len(owner):
        return {name: Estimate(np.nan, np.nan, np.nan) for name in statistics}
    values = {name: float(s.function(*s.columns, axis=-1)) for name, s in statistics.items()}
    sizes = np.unique(owner, return_counts=True)[1]
    if len(sizes) < _FEWEST:
        return {name: Estimate(value, np.nan, np.nan) for name, value in values.items()}
    columns = {id(column): column for s in statistics.values() for column in s.columns}
    resamples = int(np.clip(_ROWS // len(owner), _FEWEST_RESAMPLES, _RESAMPLES))
    parts: dict[str, list[Floats]] = {name: [] for name in statistics}
    for rows in _draws(owner, sizes, resamples, np.random.default_rng(seed)):
        drawn = {key: column[rows] for key, column in columns.items()}
        for name, s in statistics.items():
            parts[name].append(s.function(*(drawn[id(c)] for c in s.columns), axis=-1))
    tail = 50 * (1 - confidence)
    found = {}
    for name, samples in parts.items():
        every = np.concatenate([np.atleast_1d(part) for part in samples])
        # Without interpolation, which would make a NaN of an infinite ratio.
        low, high = np.percentile(every, [tail, 100 - tail], method="inverted_cdf")
        found[name] = Estimate(values[name], float(low), float(high))
    return found


def _draws(
    owner: NDArray[np.integer[Any]],
    sizes: NDArray[np.intp],
    resamples: int,
    rng: np.random.Generator,
) -> Iterator[Indices]:
    """Yield rows of draws, (R',) of one or (B, R) of several of equal length."""
    count = len(sizes)
    if count == len(owner):
        at_once = max(1, _AT_ONCE // count)
        for first in range(0, resamples, at_once):
            yield rng.integers(0, count, (min(at_once, resamples - first), count))
        return
    order = np.argsort(owner, kind="stable")
    first_of = np.cumsum(sizes) - sizes
    for _ in range(resamples):
        picked = rng.integers(0, count, count)
        yield order[_runs(first_of[picked], sizes[picked])]


def _runs(first: Indices, length: Indices) -> Indices:
    """Return ``first[i], first[i] + 1, ...`` of each run i, end to end."""
    ends = np.cumsum(length)
    runs: Indices = np.arange(ends[-1]) + np.repeat(first - (ends - length), length)
    return runs
