"""PySCF at QM9's level: forces, restarts, spins, errors, and that nothing is left behind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.calculators import DFT, DFT_DEF2, Rung, ladder, make_calculator
from kernels.errors import InputError, ResourceError, ScfError
from kernels.relaxation import RelaxSettings, RelaxState, relax, relax_with_ladder
from kernels.single_points import single_points
from kernels.units import HARTREE_TO_EV

WATER = np.array([8, 1, 1], dtype=np.uint8)
BENT = np.array([[0.0, 0.1, 0.12], [0.05, 0.76, -0.47], [0.1, -0.8, -0.4]])
HYDROXYL = np.array([8, 1], dtype=np.uint8)


HYDROGEN_IODIDE = np.array([53, 1], dtype=np.uint8)
LONG_BOND = np.array([[0.0, 0.0, 0.1], [0.3, 0.2, 1.65]])
HYDROGEN_SULFIDE = np.array([16, 1, 1], dtype=np.uint8)
WIDE = np.array([[0.0, 0.0, 0.1], [0.0, 0.97, 1.0], [0.05, -0.97, 1.0]])


def engine(level: str = DFT, **settings: Any) -> Any:
    return make_calculator(level, program="pyscf", **settings)


@pytest.mark.parametrize(
    ("numbers", "positions", "settings"),
    [
        (WATER, BENT, {}),
        (WATER, BENT, {"grid": "coarse", "density_fitting": False}),
        (HYDROXYL, BENT[:2], {"multiplicity": 2}),
        (HYDROGEN_SULFIDE, WIDE, {"level": DFT_DEF2}),
        (HYDROGEN_IODIDE, LONG_BOND, {"level": DFT_DEF2, "density_fitting": False}),
    ],
)
def test_forces_are_the_slope_of_the_energy(
    numbers: NDArray[np.uint8], positions: NDArray[np.float64], settings: dict[str, Any]
) -> None:
    calculator = engine(**settings)
    _, forces = calculator.evaluate(numbers, positions)
    assert np.abs(forces.sum(axis=0)).max() < 1e-6
    h = 0.001
    for atom, axis in ((0, 2), (1, 1)):
        energies = []
        for sign in (1, -1):
            moved = positions.copy()
            moved[atom, axis] += sign * h
            energies.append(calculator.energy(numbers, moved))
        slope = (energies[0] - energies[1]) / (2 * h)
        assert forces[atom, axis] == pytest.approx(-slope, abs=1e-4)


def test_a_start_from_the_last_orbitals_takes_fewer_iterations_to_the_same_energy() -> None:
    warm, cold = engine(), engine()
    warm.evaluate(WATER, BENT)
    moved = BENT + 0.01 * np.arange(9).reshape(3, 3) % 0.02
    energy, forces = warm.evaluate(WATER, moved)
    afresh, same = cold.evaluate(WATER, moved)
    assert energy == pytest.approx(afresh, abs=1e-7)
    np.testing.assert_allclose(forces, same, atol=1e-4)
    assert warm.iterations < cold.iterations


def test_saved_orbitals_give_the_very_same_next_energy() -> None:
    going_on, other = engine(), engine()
    going_on.evaluate(WATER, BENT)
    from_nothing = going_on.iterations
    other.load_scf({name: array.copy() for name, array in going_on.save_scf().items()})
    moved = BENT * 1.01
    energy, forces = going_on.evaluate(WATER, moved)
    again, same = other.evaluate(WATER, moved)
    assert again == pytest.approx(energy, abs=1e-10)
    np.testing.assert_allclose(same, forces, atol=1e-8)
    assert going_on.iterations == other.iterations < from_nothing


def test_another_molecule_does_not_start_from_the_last_ones_orbitals() -> None:
    calculator = engine()
    first, _ = calculator.evaluate(WATER, BENT)
    calculator.evaluate(np.array([1, 1], dtype=np.uint8), np.array([[0, 0, 0], [0, 0, 0.74]]))
    assert calculator.evaluate(WATER, BENT)[0] == pytest.approx(first, abs=1e-9)


def test_a_relaxation_taken_up_again_is_the_uninterrupted_one() -> None:
    settings = RelaxSettings(fmax=0.03)
    whole = relax(WATER, BENT, engine(grid="coarse"), settings)
    part = relax(
        WATER, BENT, engine(grid="coarse"), settings, on_step=lambda state: state.steps < 2
    )
    saved = RelaxState.from_arrays(part.to_arrays())
    rest = relax(WATER, BENT, engine(grid="coarse"), settings, state=saved)
    assert rest.steps == whole.steps
    np.testing.assert_allclose(rest.energies, whole.energies, atol=1e-8)
    np.testing.assert_allclose(rest.positions, whole.positions, atol=1e-6)


def test_every_rung_gives_the_energy_of_the_plain_calculation() -> None:
    changes: dict[str, Any] = {"grid": "coarse"}
    fluoride = np.array([9, 1], dtype=np.uint8)
    plain = engine(**changes).energy(fluoride, BENT[:2])
    for rung in ladder(DFT):
        if rung.against != "ScfError":
            continue
        changes.update(rung.calculator)
        # The last rung's grid is finer, and its energy better by so much.
        tolerance = 5e-3 if "grid" in rung.calculator else 1e-6
        energy = engine(**changes).energy(fluoride, BENT[:2])
        assert energy == pytest.approx(plain, abs=tolerance)


def test_an_scf_that_does_not_converge_climbs_the_ladder() -> None:
    def make(**changes: Any) -> Any:
        return engine(**{"max_scf_iterations": 1, "grid": "coarse", **changes})

    done, tried = relax_with_ladder(WATER, BENT, make, RelaxSettings(fmax=0.1), ladder(DFT))
    assert tried == tuple(rung.name for rung in ladder(DFT)[:2])
    assert done.fmax[-1] < 0.1


def test_ions_far_apart_need_the_second_order_which_ends_in_a_stable_state() -> None:
    fluoride = np.array([3, 9], dtype=np.uint8)
    apart = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 8.0]])
    common: dict[str, Any] = {"level": DFT_DEF2, "grid": "coarse", "max_scf_iterations": 60}
    with pytest.raises(ScfError, match="not converged in 60 iterations"):
        engine(**common).energy(fluoride, apart)
    found = single_points(
        fluoride,
        apart[None],
        lambda **changes: engine(**{**common, **changes}),
        ladder(DFT_DEF2),
    )
    assert found.ladder == ("second-order SCF",)
    # Without being followed down it is 0.08 Ha above in a saddle point, and from Hückel orbitals
    # 12 Ha, with a hole in a core.
    energy = engine(**common, second_order=True, scf_guess="huckel").energy(fluoride, apart)
    assert energy == pytest.approx(found.energies[0], abs=1e-4)
    assert energy / HARTREE_TO_EV == pytest.approx(-107.1159, abs=1e-3)


def test_a_failure_on_every_rung_carries_their_history() -> None:
    rungs = (Rung("SCF from Hückel orbitals", "ScfError", calculator={"scf_guess": "huckel"}),)
    with pytest.raises(ScfError, match="not converged in 2 iterations") as caught:
        relax_with_ladder(
            WATER,
            BENT,
            lambda **changes: engine(**{"max_scf_iterations": 2, **changes}),
            RelaxSettings(),
            rungs,
        )
    assert caught.value.history == ("SCF from Hückel orbitals",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grid": "finest"}, "grid 'finest' is unknown; choose from fine"),
        ({"scf_guess": "none"}, "scf_guess 'none' is unknown"),
        ({"scf_damping": 1.0}, "give 0 <= damping < 1"),
        ({"max_scf_iterations": 0}, "give at least 1"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        engine(**settings)


def test_impossible_molecules_are_inputs_not_crashes() -> None:
    with pytest.raises(InputError, match=r"atomic number 17; use level B3LYP/def2-SVP"):
        engine().evaluate(np.array([17, 1], dtype=np.uint8), BENT[:2])
    with pytest.raises(InputError, match="atomic number 92"):
        engine(DFT_DEF2).evaluate(np.array([92, 1], dtype=np.uint8), BENT[:2])
    with pytest.raises(InputError, match="multiplicity"):
        engine(multiplicity=2).evaluate(WATER, BENT)


def test_too_little_memory_is_said_before_anything_is_computed() -> None:
    hexane = np.array([6] * 6 + [1] * 14, dtype=np.uint8)
    positions = np.arange(60.0).reshape(20, 3)
    with pytest.raises(ResourceError, match=r"density fitting .* needs .* MB"):
        engine(memory=100_000_000).evaluate(hexane, positions)


def test_no_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyscf import lib

    monkeypatch.setattr(lib.param, "TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine().evaluate(WATER, BENT)
    assert not list(tmp_path.iterdir())
