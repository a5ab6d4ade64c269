"""A coarse surface until near convergence: the fine one's minimum, whatever interrupts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kernels.calculators import DFT, Rung, make_calculator
from kernels.embedding import embed
from kernels.errors import InputError
from kernels.forcefield import minimise
from kernels.relaxation import (
    RelaxSettings,
    RelaxState,
    is_converged,
    relax,
    relax_with_ladder,
)

SETTINGS = RelaxSettings(initial_hessian="gfn2", coarse_until=0.2)


def _start(smiles: str) -> tuple[Any, Any]:
    made = embed(smiles, seed=1, max_attempts=50)
    return made.numbers, minimise(smiles, made.positions, max_steps=2000).positions


def _gfn2(grid: str = "fine", **changes: Any) -> Any:
    """A surface to stand for the fine grid, and another, 30 meV away, for the coarse one."""
    hot = {"coarse": 3000.0, "fine": 300.0}[grid]
    return make_calculator("GFN2-xTB", electronic_temperature=hot, **changes)


def _relaxed(settings: RelaxSettings, **more: Any) -> tuple[RelaxState, tuple[str, ...]]:
    return relax_with_ladder(*_start("OCC=O"), _gfn2, settings, (), **more)


def test_it_ends_in_the_fine_minimum_and_says_how_it_got_there() -> None:
    done, _ = _relaxed(SETTINGS)
    plain, _ = _relaxed(RelaxSettings(initial_hessian="gfn2"))
    assert done.fmax[-1] < 0.03
    assert done.energy == pytest.approx(plain.energy, abs=2e-3)
    assert 0 < done.n_coarse < len(done.energies)
    # Down to the limit on the coarse surface, and not a step farther.
    assert done.fmax[done.n_coarse - 1] < 0.2
    assert (done.fmax[: done.n_coarse - 1] >= 0.2).all()
    fresh = _gfn2()
    last = relax(done.numbers, done.positions, fresh, RelaxSettings(fmax=1.0))
    assert done.energy == pytest.approx(last.energy, abs=1e-6)


def test_interrupted_anywhere_it_goes_on_bit_by_bit() -> None:
    whole, _ = _relaxed(SETTINGS)
    for stop in range(whole.steps):
        part, _ = _relaxed(SETTINGS, on_step=lambda state, _, s=stop: state.steps < s)
        assert part.steps == stop
        again = RelaxState.from_arrays(part.to_arrays())
        assert again.n_coarse == part.n_coarse
        done, _ = _relaxed(SETTINGS, state=again)
        np.testing.assert_array_equal(done.frames, whole.frames)
        assert done.n_coarse == whole.n_coarse
        assert done.n_evaluations == whole.n_evaluations


def test_forces_of_the_coarse_surface_never_end_it() -> None:
    settings = RelaxSettings(fmax=0.5, coarse_until=0.5)
    seen = []
    done, _ = _relaxed(settings, on_step=lambda state, _: seen.append(state.is_coarse) or True)
    assert is_converged(done, settings)
    assert seen[0]
    assert not seen[-1]


def test_a_rung_that_changes_the_grid_has_no_coarse_one() -> None:
    rung = Rung("fine grid", "ScfError", calculator={"grid": "fine"})
    made = []

    def make(**changes: Any) -> Any:
        made.append(changes.get("grid"))
        few = {"max_scf_iterations": 3} if len(made) < 3 else {}
        return _gfn2(**{**changes, **few})

    done, tried = relax_with_ladder(*_start("OCC=O"), make, SETTINGS, (rung,))
    assert tried == (rung.name,)
    assert made == [None, "coarse", "fine"]
    assert done.n_coarse == 0


def test_impossible_limits_and_coordinates_are_named() -> None:
    with pytest.raises(InputError, match=r"coarse_until -0\.1"):
        RelaxSettings(coarse_until=-0.1)
    with pytest.raises(InputError, match="need optimizer Sella, not BFGS"):
        RelaxSettings(coordinates="internal")
    assert RelaxSettings().variant == ""
    assert SETTINGS.variant == ", GFN2-xTB's Hessian, coarse grid to 0.2 eV/Å"


def test_dft_of_water() -> None:
    numbers, start = _start("O")
    settings = RelaxSettings(initial_hessian="gfn2", coarse_until=0.3)

    def make(**changes: Any) -> Any:
        return make_calculator(DFT, **changes)

    part, _ = relax_with_ladder(
        numbers, start, make, settings, (), on_step=lambda state, _: state.steps < 1
    )
    again = RelaxState.from_arrays(part.to_arrays())
    done, _ = relax_with_ladder(numbers, start, make, settings, (), state=again)
    assert 0 < done.n_coarse < len(done.energies)
    calculator = make()
    energy, forces = calculator.evaluate(numbers, done.positions)
    assert done.energy == pytest.approx(energy, abs=1e-6)
    assert np.linalg.norm(forces, axis=1).max() < 0.03


@pytest.mark.slow
def test_internal_coordinates_start_from_a_hessian_and_resume(
    require_engine: Callable[[str], None],
) -> None:
    require_engine("sella")
    settings = RelaxSettings(
        optimizer="Sella", coordinates="internal", initial_hessian="gfn2", coarse_until=0.2
    )
    whole, _ = _relaxed(settings)
    plain, _ = _relaxed(RelaxSettings(optimizer="Sella", coordinates="internal"))
    assert whole.n_evaluations == whole.steps + 1
    assert whole.steps < plain.steps
    assert whole.energy == pytest.approx(plain.energy, abs=2e-3)
    for stop in (0, 2):
        part, _ = _relaxed(settings, on_step=lambda state, _, s=stop: state.steps < s)
        done, _ = _relaxed(settings, state=RelaxState.from_arrays(part.to_arrays()))
        assert done.energy == pytest.approx(whole.energy, abs=1e-4)
        assert abs(done.steps - whole.steps) <= 2
