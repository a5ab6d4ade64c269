"""Relaxation from a cheaper surface's Hessian: the same minimum in fewer steps, and resumable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.calculators import ladder, make_calculator
from kernels.embedding import embed
from kernels.errors import HessianError, InputError
from kernels.forcefield import Surface, compliance, minimise
from kernels.graph import rdkit_molecule
from kernels.initial_hessian import gfn2
from kernels.relaxation import RelaxSettings, RelaxState, init, relax, relax_with_ladder, step

MOLECULES = ("CC(=O)OC", "C1CC1C=O", "NCCO", "c1ccoc1")


def _start(smiles: str) -> tuple[Any, Any, Any]:
    made = embed(smiles, seed=1, max_attempts=50)
    start = minimise(smiles, made.positions, max_steps=2000).positions
    calculator = make_calculator(
        "GFN2-xTB", program="tblite", charge=0, multiplicity=1, smiles=smiles
    )
    return made.numbers, start, calculator


@pytest.mark.parametrize("smiles", MOLECULES)
@pytest.mark.parametrize("hessian", ["force-field", "gfn2"])
def test_same_minimum_in_fewer_steps(smiles: str, hessian: Any) -> None:
    numbers, start, calculator = _start(smiles)
    plain = relax(numbers, start, calculator, RelaxSettings(fmax=0.005))
    settings = RelaxSettings(fmax=0.005, initial_hessian=hessian)
    guided = relax(numbers, start, calculator, settings, smiles=smiles)
    assert guided.steps < 0.7 * plain.steps
    assert guided.energy == pytest.approx(plain.energy, abs=2e-4)


@pytest.mark.parametrize("hessian", ["force-field", "gfn2"])
def test_resumed_relaxation_is_bit_equal(hessian: Any) -> None:
    smiles = "CC(=O)OC"
    numbers, start, calculator = _start(smiles)
    settings = RelaxSettings(initial_hessian=hessian)
    whole = relax(numbers, start, calculator, settings, smiles=smiles)
    for stop in range(2):
        state = init(numbers, start, calculator, settings, smiles=smiles)
        for _ in range(stop):
            step(state, calculator, settings)
        again = RelaxState.from_arrays(state.to_arrays())
        fresh = make_calculator(
            "GFN2-xTB", program="tblite", charge=0, multiplicity=1, smiles=smiles
        )
        done = relax(numbers, start, fresh, settings, state=again)
        np.testing.assert_array_equal(done.frames, whole.frames)


def test_other_optimizers_and_unknown_bonds_are_refused() -> None:
    with pytest.raises(InputError, match="needs optimizer BFGS or Sella, not FIRE"):
        RelaxSettings(optimizer="FIRE", initial_hessian="force-field")
    numbers, start, calculator = _start("NCCO")
    with pytest.raises(InputError, match="no SMILES is known"):
        init(numbers, start, calculator, RelaxSettings(initial_hessian="force-field"))


def test_gfn2_hessian_is_safe_to_step_with_anywhere() -> None:
    numbers, start, _ = _start("NCCO")
    torn = start + np.random.default_rng(0).normal(scale=0.1, size=start.shape)
    curvature = np.linalg.eigvalsh(gfn2(numbers, torn))
    assert curvature[0] >= 1 - 1e-9
    assert curvature[-1] <= 200 + 1e-9


def test_gfn2_hessian_is_that_of_the_ion() -> None:
    ion = np.array([7, 1, 1, 1, 1], dtype=np.uint8)
    tetrahedron = np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    positions = tetrahedron * 1.03 / np.sqrt(3)
    hessian = gfn2(ion, positions, charge=1)
    pull = np.zeros(15)
    pull[3:6] = tetrahedron[1] / np.sqrt(3)
    # NH4+: the stretch is some 6 mdyn/Å, 1 mdyn/Å being 6.24 eV/Å².
    assert 30 < pull @ hessian @ pull < 45
    with pytest.raises(HessianError, match=r"initial_hessian 'gfn2' fails .*choose unit"):
        gfn2(ion, positions, charge=0)


def test_without_a_hessian_to_start_from_the_ladder_takes_the_unit_one() -> None:
    # MMFF94 needs no spin: GFN2-xTB refuses what it can relax.
    numbers, start, _ = _start("C")
    settings = RelaxSettings(initial_hessian="gfn2", fmax=0.001)
    moved = start + np.random.default_rng(0).normal(scale=0.1, size=start.shape)

    def make(**changes: Any) -> Any:
        return make_calculator("MMFF94", smiles="C", **changes)

    done, tried = relax_with_ladder(
        numbers, moved, make, settings, ladder("MMFF94"), multiplicity=2
    )
    assert tried == ("unit initial Hessian",)
    plain = relax(numbers, moved, make(), RelaxSettings(fmax=0.001))
    np.testing.assert_array_equal(done.frames, plain.frames)


def test_hessian_is_that_of_the_energy() -> None:
    smiles = "NCCO"
    _, start, _ = _start(smiles)
    surface = Surface(smiles, start)
    hessian = surface.hessian(start)
    direction = np.random.default_rng(0).normal(size=start.shape)
    h = 1e-3
    change = surface.gradient(start + h * direction) - surface.gradient(start - h * direction)
    np.testing.assert_allclose(
        hessian @ direction.ravel(), change.ravel() / (2 * h), rtol=0, atol=0.05
    )
    # A minimum: no curvature is negative but for what the differences miss.
    assert np.linalg.eigvalsh(hessian)[0] > -0.05
    assert rdkit_molecule(smiles).GetNumAtoms() == len(start)


def test_compliance_answers_no_rigid_motion() -> None:
    smiles = "NCCO"
    _, start, _ = _start(smiles)
    answer = compliance(Surface(smiles, start).hessian(start), start, softest=0.3)
    shift = np.tile([1.0, 0.0, 0.0], len(start))
    turn = np.cross([0.0, 0.0, 1.0], start - start.mean(axis=0)).ravel()
    assert np.abs(answer @ shift).max() < 1e-10
    assert np.abs(answer @ turn).max() < 1e-8
    assert np.linalg.eigvalsh(answer)[-1] <= 1 / 0.3 + 1e-9
    water = np.array([[0.0, 0, 0], [0, 0, 1.0]])
    # Two atoms have five rigid motions and one spring.
    spring = np.zeros((6, 6))
    spring[np.ix_([2, 5], [2, 5])] = [[10.0, -10.0], [-10.0, 10.0]]
    pulled = compliance(spring, water, softest=0.3) @ np.array([0, 0, 1.0, 0, 0, -1.0])
    np.testing.assert_allclose(pulled, [0, 0, 0.05, 0, 0, -0.05], atol=1e-9)
