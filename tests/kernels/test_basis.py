"""QM9's basis set: its functions, and that its energies are QM9's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernels import basis
from kernels.calculators import DFT, make_calculator
from kernels.errors import InputError
from kernels.units import HARTREE_TO_EV


def test_functions_are_counted_with_six_d_and_seven_f() -> None:
    assert basis.n_functions([1]) == 2 + 3
    assert basis.n_functions([6]) == 3 + 2 * 3 + 2 * 6 + 7
    assert basis.n_functions([6, 6, 8] + 6 * [1]) == 3 * 28 + 6 * 5


@pytest.mark.parametrize("number", [2, 14, 16, 17])
def test_another_element_is_named_with_a_way_out(number: int) -> None:
    with pytest.raises(InputError, match=f"atomic number {number}; use another level"):
        basis.n_functions([6, number])


@pytest.mark.slow
@pytest.mark.parametrize("n_heavy", [3, 5])
def test_energies_are_those_of_qm9(shared_data: Path, n_heavy: int) -> None:
    with np.load(shared_data / "qm9" / "qm9_b3lyp_geometries.npz") as qm9:
        numbers, positions = qm9["numbers"], qm9["positions"]
        reference = qm9["U0"] - qm9["zpve"]
    heavy = (numbers > 1).sum(1)
    fluorine = (numbers == 9).any(1)
    some = np.nonzero((heavy <= n_heavy) & ~fluorine)[0][:1].tolist()
    if n_heavy > 3:
        # None of the smaller ones has fluorine.
        some = np.nonzero(fluorine)[0][np.argsort(heavy[fluorine])][:1].tolist()
    for at in some:
        z = numbers[at][numbers[at] > 0].astype(np.uint8)
        calculator = make_calculator(DFT, density_fitting=False)
        energy = calculator.energy(z, positions[at][: len(z)].astype(float))  # type: ignore[attr-defined]
        assert energy / HARTREE_TO_EV == pytest.approx(reference[at], abs=5e-5), at
