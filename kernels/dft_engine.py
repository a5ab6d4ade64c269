"""What the DFT engines share: whose orbitals the next SCF starts from, and when it may."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from kernels import basis
from kernels.calculators import DftSettings
from kernels.engines import Engine
from kernels.graph import check_spin

# Occupied orbitals (functions, occupied) of each spin; none: an SCF starts from its guess.
Orbitals = tuple[NDArray[np.float64], ...]


class DftEngine(Engine):
    """B3LYP, each SCF started from the orbitals of the last geometry of the same molecule."""

    def __init__(self, settings: DftSettings) -> None:
        super().__init__()
        self.settings = settings
        # SCF iterations of the last geometry.
        self.iterations = 0
        self._numbers = b""
        self._orbitals: Orbitals = ()

    @abstractmethod
    def energy(self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]) -> float:
        """Return the energy in eV at positions (N, 3) in Å, without forces."""

    def save_scf(self) -> dict[str, NDArray[np.float64]]:
        """Return the occupied orbitals (functions, occupied) of each spin."""
        return {f"occupied_{spin}": orbitals for spin, orbitals in enumerate(self._orbitals)}

    def load_scf(self, arrays: dict[str, NDArray[np.float64]]) -> None:
        self._orbitals = tuple(arrays[name] for name in sorted(arrays))
        self._numbers = b""

    def reset_scf(self) -> None:
        self._orbitals = ()

    def _begin(self, numbers: NDArray[np.uint8]) -> Orbitals:
        """Count a calculation, and return what it starts from.

        Nothing is kept until it has ended well: what has half converged must not reach the next
        geometry. Raises InputError for elements without basis and for an impossible spin.
        """
        key = numbers.tobytes()
        if key != self._numbers:
            basis.check(numbers, self.settings.basis)
            check_spin(numbers, self.settings.charge, self.settings.multiplicity)
            if self._numbers:
                # Another molecule: its orbitals cannot start this one. (With none before it they
                # came from `load_scf` and are meant for the molecule at hand.)
                self._orbitals = ()
            self._numbers = key
        self.n_evaluations += 1
        start, self._orbitals = self._orbitals, ()
        return start
