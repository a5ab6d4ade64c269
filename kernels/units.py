"""Conversion factors to the units used everywhere here: eV, Å, eV/Å, K."""

from typing import Final

# CODATA 2014, the set behind `ase.units`, so that energies agree with ASE's to the last digit.
HARTREE_TO_EV: Final = 27.211386024367243
BOHR_TO_ANGSTROM: Final = 0.5291772105638411
BOLTZMANN_EV_PER_K: Final = 8.617330337217213e-05

EV_TO_KCAL: Final = 23.060548
KCAL_TO_EV: Final = 1.0 / EV_TO_KCAL

# Hartree per bohr in eV/Å.
HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM: Final = HARTREE_TO_EV / BOHR_TO_ANGSTROM
