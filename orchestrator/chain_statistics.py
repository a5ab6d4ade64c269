"""What a correlated series of samples is worth: means with errors, effective samples, R-hat.

Effective sample sizes and R-hat are those of Vehtari, Gelman, Simpson, Carpenter and Bürkner,
Bayesian Analysis 2021, 16, 667, from arviz-stats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# R-hat above which chains still drift or disagree; for precise numbers it should be below 1.01.
UNSETTLED: Final = 1.1

_NAN: Final = float("nan")
# Fewer draws of a chain have no autocorrelation to speak of.
_FEWEST: Final = 4
# A spread that is nothing but rounding: the chain never moved.
_STILL: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and spread of chains that sample one distribution, with their standard errors.

    ``time`` is the integrated autocorrelation time in samples, ``effective`` the number of
    independent samples that would tell the mean as well; ``error`` is the standard error of the
    mean, ``variance_error`` that of the variance.
    """

    samples: int
    mean: float
    deviation: float
    error: float
    variance: float
    variance_error: float
    effective: float

    @property
    def time(self) -> float:
        """Integrated autocorrelation time, in samples."""
        return self.samples / self.effective if self.effective > 0 else _NAN


def effective_samples(chains: Floats) -> float:
    """Return how many independent samples chains (C, S) are worth, as to their mean.

    NaN for chains that never move or are shorter than four samples. Chains of one distribution
    that disagree, or drift, are worth less than each by itself.
    """
    if chains.shape[-1] < _FEWEST or _still(chains):
        return _NAN
    return float(_arviz().ess(chains, chain_axis=0, draw_axis=1, method="mean"))


def r_hat(chains: Floats) -> float:
    """Return the rank-normalised split R-hat of chains (C, S), of one chain that of its halves.

    1 where they agree; above `UNSETTLED` they have not sampled the same distribution. NaN for
    chains that never move or are shorter than eight samples.
    """
    if chains.shape[-1] < 2 * _FEWEST or _still(chains):
        return _NAN
    if len(chains) == 1:
        half = chains.shape[-1] // 2
        chains = np.stack([chains[0, :half], chains[0, -half:]])
    return float(_arviz().rhat(chains, chain_axis=0, draw_axis=1, method="rank"))


def moments(chains: Floats) -> Moments:
    """Return mean, spread and errors of chains (C, S) that sample one distribution."""
    n = chains.size
    if not n:
        return Moments(0, _NAN, _NAN, _NAN, _NAN, _NAN, _NAN)
    mean = float(chains.mean())
    squares = (chains - mean) ** 2
    variance = float(squares.sum() / (n - 1)) if n > 1 else _NAN
    effective = effective_samples(chains)
    effective_squares = effective_samples(squares)
    return Moments(
        samples=n,
        mean=mean,
        deviation=float(np.sqrt(variance)),
        error=float(np.sqrt(variance / effective)),
        variance=variance,
        variance_error=float(squares.std() / np.sqrt(effective_squares)),
        effective=effective,
    )


def _arviz() -> Any:
    # It takes a second to import.
    from arviz_stats.base import array

    return array.array_stats


def _still(chains: Floats) -> bool:
    size = float(np.abs(chains).max())
    return float(np.ptp(chains)) <= _STILL * max(size, 1.0)


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line through points: least squares without weights.

    ``slope_error`` follows from the errors of the points; ``r_squared`` is the share of the points'
    variance that the line explains.
    """

    intercept: float
    slope: float
    slope_error: float
    intercept_error: float
    r_squared: float

    def at(self, x: Floats) -> Floats:
        """Return the line at some x."""
        return self.intercept + self.slope * x


def line(x: Floats, y: Floats, error: Floats) -> Line | None:
    """Fit a line to points (P,) with standard errors; None for less than two different x."""
    there = np.isfinite(x) & np.isfinite(y)
    x, y, error = x[there], y[there], error[there]
    if len(np.unique(x)) < 2:
        return None
    dx = x - x.mean()
    weights = dx / (dx**2).sum()
    slope = float(weights @ y)
    at_zero = 1.0 / len(x) - x.mean() * weights
    intercept = float(at_zero @ y)
    left = float(((y - intercept - slope * x) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    return Line(
        intercept=intercept,
        slope=slope,
        slope_error=float(np.sqrt(((weights * error) ** 2).sum())),
        intercept_error=float(np.sqrt(((at_zero * error) ** 2).sum())),
        r_squared=1.0 - left / spread if spread > 0 and len(x) > 2 else _NAN,
    )
