"""Potentials whose Boltzmann averages are known, as calculators, and errors of chain averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.errors import ScfError
from kernels.units import BOLTZMANN_EV_PER_K

Floats = NDArray[np.float64]


class Potential:
    """A calculator of energy(positions) in eV; forces are not needed here, and zero.

    `fails(positions)` makes it fail there as an SCF does.
    """

    def __init__(
        self,
        energy: Callable[[Floats], float],
        fails: Callable[[Floats], bool] = lambda positions: False,
    ) -> None:
        self.energy = energy
        self.fails = fails
        self.n_evaluations = 0

    def evaluate(self, numbers: NDArray[np.uint8], positions: Floats) -> tuple[float, Floats]:
        self.n_evaluations += 1
        if self.fails(positions):
            raise ScfError("no convergence in this corner")
        return self.energy(positions), np.zeros_like(positions)


def harmonic(n_atoms: int = 2, stiffness: float = 5.0, **more: Any) -> tuple[Floats, Any]:
    """Return sites (N, 3) 3 Å apart, and springs of eV/Å² that bind an atom to each, along x, y, z.

    The springs differ from coordinate to coordinate by up to four times.
    """
    sites = np.zeros((n_atoms, 3))
    sites[:, 0] = 3.0 * np.arange(n_atoms)
    springs = stiffness * np.linspace(1.0, 4.0, 3 * n_atoms).reshape(n_atoms, 3)
    return sites, Potential(lambda x: float(0.5 * (springs * (x - sites) ** 2).sum()), **more)


def double_well_energy(x: Any, barrier: float = 0.06, tilt: float = 0.02) -> Any:
    """Return the energy in eV of one coordinate in Å: unequal wells near -0.5 and 0.5."""
    return barrier * ((x / 0.5) ** 2 - 1) ** 2 + tilt * x / 0.5


def double_well(**more: Any) -> Any:
    """Return a calculator for one atom in a double well along x, bound along y and z."""
    return Potential(
        lambda p: float(double_well_energy(p[0, 0]) + 0.3 * (p[0, 1] ** 2 + p[0, 2] ** 2)), **more
    )


def double_well_probabilities(edges: Floats, temperature: float) -> Floats:
    """Return the exact share of time spent between neighbouring edges (B+1,) at a temperature."""
    fine = np.linspace(-1.5, 1.5, 30001)
    weights = np.exp(-double_well_energy(fine) / (BOLTZMANN_EV_PER_K * temperature))
    shares = np.histogram(fine, bins=edges, weights=weights)[0] / weights.sum()
    return np.asarray(shares, dtype=np.float64)


def mean_and_error(values: Floats, batches: int = 25) -> tuple[Floats, Floats]:
    """Return the mean of correlated values (S, ...) and its standard error by batch means."""
    usable = len(values) // batches * batches
    means = values[:usable].reshape(batches, -1, *values.shape[1:]).mean(axis=1)
    return values.mean(axis=0), means.std(axis=0, ddof=1) / np.sqrt(batches)
