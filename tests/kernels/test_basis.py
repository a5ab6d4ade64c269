"""QM9's basis set: its functions, and that its energies are QM9's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyscf import gto
from pyscf.data import elements

from kernels import basis
from kernels.calculators import DFT, DFT_DEF2, make_calculator
from kernels.errors import InputError
from kernels.units import HARTREE_TO_EV


def test_functions_are_counted_with_six_d_and_seven_f() -> None:
    assert basis.n_functions([1]) == 2 + 3
    assert basis.n_functions([6]) == 3 + 2 * 3 + 2 * 6 + 7
    assert basis.n_functions([6, 6, 8] + 6 * [1]) == 3 * 28 + 6 * 5


@pytest.mark.parametrize("number", [2, 14, 16, 17, 53])
def test_another_element_is_named_with_a_level_that_has_it(number: int) -> None:
    with pytest.raises(InputError, match=f"atomic number {number}; use level {DFT_DEF2} for"):
        basis.n_functions([6, number])
    assert basis.n_functions([6, number], "def2-SVP") > basis.n_functions([6], "def2-SVP")


@pytest.mark.parametrize("number", [58, 71, 87])
def test_an_element_that_no_level_has_is_left_out(number: int) -> None:
    with pytest.raises(InputError, match="use another level, GFN2-xTB, for"):
        basis.check([number])
    with pytest.raises(InputError, match=f"atomic number {number}; leave this molecule out"):
        basis.check([number], "def2-SVP")


def test_functions_of_def2_svp_are_counted_as_pyscf_has_them() -> None:
    for number in (*range(1, 58), *range(72, 87)):
        symbol = elements.ELEMENTS[number]
        shells = gto.basis.load("def2-svp", symbol)
        counted = sum((2 * shell[0] + 1) * (len(shell[1]) - 1) for shell in shells)
        assert basis.n_functions([number], "def2-SVP") == counted, symbol


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fluorine", "settings", "tolerance"),
    [
        (False, {"density_fitting": False}, 5e-5),
        # Of 211 functions: density fitting and a coarse grid save a minute. One of fluorine's outer
        # d functions of exponent 0.35 instead of 0.4 would move the energy by 3e-4.
        (True, {"grid": "coarse"}, 1e-4),
    ],
)
def test_energies_are_those_of_qm9(
    shared_data: Path, fluorine: bool, settings: dict[str, Any], tolerance: float
) -> None:
    """The smallest molecule, and the smallest with F; `benchmarks.dft_energies` has the others."""
    with np.load(shared_data / "qm9" / "qm9_b3lyp_geometries.npz") as qm9:
        numbers, positions = qm9["numbers"], qm9["positions"]
        reference = qm9["U0"] - qm9["zpve"]
    some = np.nonzero((numbers == 9).any(1) == fluorine)[0]
    at = min(some, key=lambda at: basis.n_functions(numbers[at][numbers[at] > 0]))
    z = numbers[at][numbers[at] > 0].astype(np.uint8)
    calculator: Any = make_calculator(DFT, **settings)
    energy = calculator.energy(z, positions[at][: len(z)].astype(float))
    assert energy / HARTREE_TO_EV == pytest.approx(reference[at], abs=tolerance)
