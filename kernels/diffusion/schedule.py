"""How much of a geometry and how much noise there is at each step of the diffusion."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError

# Smallest ratio of alpha² between two neighbouring steps.
_SMALLEST_RATIO = 0.001


class ReverseStep(NamedTuple):
    """z_m = `keep`·z_n - `remove`·eps + `noise`·(a standard normal), for m = n - 1."""

    keep: float
    remove: float
    noise: float


@dataclass(frozen=True, eq=False)
class Schedule:
    """The polynomial schedule of power 2 (Hoogeboom et al., ICML 2022, appendix B).

    z_n = alpha_n z_0 + sigma_n eps for n = 0 ... `steps`; `alpha`, `sigma` and
    `gamma` = -log(alpha²/sigma²) are float64 (steps + 1,). `precision` is what alpha² keeps from 0
    and from 1. Raises InputError for impossible settings.
    """

    steps: int
    precision: float
    alpha: NDArray[np.float64] = field(init=False, repr=False)
    sigma: NDArray[np.float64] = field(init=False, repr=False)
    gamma: NDArray[np.float64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"a schedule of {self.steps} steps is impossible; give 1 or more")
        if not 0 < self.precision < 0.5:
            raise InputError(f"schedule precision {self.precision} is not between 0 and 0.5")
        fraction = np.arange(self.steps + 1) / self.steps
        squared = (1 - fraction**2) ** 2
        ratios = np.clip(squared[1:] / squared[:-1], _SMALLEST_RATIO, 1.0)
        squared = np.concatenate([[1.0], np.cumprod(ratios)])
        squared = (1 - 2 * self.precision) * squared + self.precision
        for name, values in (
            ("alpha", np.sqrt(squared)),
            ("sigma", np.sqrt(1 - squared)),
            ("gamma", np.log1p(-squared) - np.log(squared)),
        ):
            object.__setattr__(self, name, values)

    def reverse_step(self, n: int) -> ReverseStep:
        """Return the coefficients of the ancestral step from n to n - 1, n = 1 ... steps."""
        if not 1 <= n <= self.steps:
            raise InputError(f"there is no reverse step from n = {n}; give 1 to {self.steps}")
        shrink = float(self.alpha[n] / self.alpha[n - 1])
        added = float(self.sigma[n] ** 2 - shrink**2 * self.sigma[n - 1] ** 2)
        return ReverseStep(
            keep=1 / shrink,
            remove=added / (shrink * float(self.sigma[n])),
            noise=math.sqrt(added) * float(self.sigma[n - 1] / self.sigma[n]),
        )

    def decode_step(self) -> ReverseStep:
        """Return the coefficients of the last step, from z_0 to the data."""
        alpha, sigma = float(self.alpha[0]), float(self.sigma[0])
        return ReverseStep(keep=1 / alpha, remove=sigma / alpha, noise=sigma / alpha)
