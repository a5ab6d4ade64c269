"""Energies along diffusion paths, relative to the minimum that relaxation finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.paths import energy_curves, walks
from tests.orchestrator.diffusion_stores import Study
from tests.orchestrator.store_fixtures import new_store


def test_energy_along_the_path_is_above_the_end_s_own_minimum(tmp_path: Path) -> None:
    study = Study()
    ends = (1.0, 2.0, 6.0)
    for at, end in enumerate(ends):
        baseline = study.molecule(f"m{at}")
        path = study.diffuse(baseline)
        # The path ends in a basin 3 kcal/mol deeper than the one MMFF leads to.
        relaxed = study.relax(path, baseline, 5, delta=3.0)
        study.points(path, np.linspace(10.0, end, 21), minimum=relaxed)
    (curve,) = energy_curves(walks(study.store(tmp_path / "store")))
    assert (curve.stage, curve.n, curve.molecules, curve.own) == ("diffused-20", 20, 3, 3)
    assert curve.levels.tolist() == list(range(20, -1, -1))
    assert curve.mean[0] == pytest.approx(10.0)
    assert (curve.mean[-1], curve.median[-1]) == (pytest.approx(3.0), pytest.approx(2.0))
    assert (curve.low[-1], curve.high[-1]) == (pytest.approx(1.5), pytest.approx(4.0))
    assert (np.diff(curve.mean) < 0).all()


def test_where_the_end_was_not_relaxed_the_start_s_minimum_counts(tmp_path: Path) -> None:
    study = Study()
    baseline = study.molecule("m")
    study.points(study.diffuse(baseline), np.full(21, 4.0), minimum=baseline)
    (curve,) = energy_curves(walks(study.store(tmp_path / "store")))
    assert (curve.molecules, curve.own) == (1, 0)
    np.testing.assert_allclose(curve.mean, 4.0)


def test_of_two_relaxations_from_one_end_the_lower_is_its_minimum(tmp_path: Path) -> None:
    study = Study()
    baseline = study.molecule("m")
    path = study.diffuse(baseline)
    upper = study.relax(path, baseline, 9, stage="relaxed")
    study.relax(path, baseline, 3, stage="relaxed from another Hessian", delta=0.5)
    study.points(path, np.full(21, 4.0), minimum=upper)
    (curve,) = energy_curves(walks(study.store(tmp_path / "store")))
    np.testing.assert_allclose(curve.mean, 4.5)


def test_stages_and_levels_of_theory_have_curves_of_their_own(tmp_path: Path) -> None:
    study = Study()
    for name in ("a", "b"):
        baseline = study.molecule(name)
        for n in (20, 50):
            study.points(study.diffuse(baseline, n=n), np.full(n + 1, float(n)), minimum=baseline)
        other = study.relax(study.diffuse(baseline, n=30), baseline, 9, level="GFN1-xTB")
        path = study.row("relaxations", other)["parent_key"]
        study.points(path, np.full(31, 1.0), minimum=other)
        # The same path at a level at which nothing was relaxed has no zero of energy.
        study.points(path, np.full(31, 1.0), minimum=baseline, stage="points at GFN2")
    curves = energy_curves(walks(study.store(tmp_path / "store")))
    found = {(c.stage, c.level_of_theory): (c.molecules, c.mean[-1]) for c in curves}
    assert found[("diffused-20", "GFN2-xTB")] == (2, pytest.approx(20.0))
    assert found[("diffused-50", "GFN2-xTB")] == (2, pytest.approx(50.0))
    assert found[("diffused-30", "GFN1-xTB")] == (2, pytest.approx(1.0))


def test_changed_bonds_and_what_is_missing_are_left_out_and_counted(tmp_path: Path) -> None:
    study = Study()
    for name in ("sound", "fell apart", "no energy in the middle", "never relaxed"):
        baseline = study.molecule(name)
        path = study.diffuse(baseline, changed=name == "fell apart")
        above = np.full(21, 2.0)
        if name == "no energy in the middle":
            above[10] = np.nan
        study.points(path, above, minimum=baseline)
    rows = study.records.tables["relaxations"]
    rows.pop()
    (curve,) = energy_curves(walks(study.store(tmp_path / "store")))
    assert (curve.molecules, curve.left_out) == (1, 3)


def test_frames_whose_energy_was_not_asked_for_are_no_gap(tmp_path: Path) -> None:
    study = Study()
    for name in ("a", "b", "a gap"):
        baseline = study.molecule(name)
        energies = np.where(np.arange(21) % 5 == 0, np.linspace(10.0, 2.0, 21), np.nan)
        if name == "a gap":
            energies[10] = np.nan
        study.points(study.diffuse(baseline), energies, minimum=baseline)
    (curve,) = energy_curves(walks(study.store(tmp_path / "store")))
    assert curve.levels.tolist() == [20, 15, 10, 5, 0]
    assert (curve.molecules, curve.left_out) == (2, 1)
    np.testing.assert_allclose(curve.mean, [10.0, 8.0, 6.0, 4.0, 2.0])


def test_forces_come_frame_by_frame(tmp_path: Path) -> None:
    study = Study()
    baseline = study.molecule("m")
    forces = np.random.default_rng(0).normal(size=(21, 9, 3))
    study.points(study.diffuse(baseline), np.full(21, 2.0), minimum=baseline, forces=forces)
    (walk,) = walks(study.store(tmp_path / "store", compacted=False))
    assert walk.forces is not None
    np.testing.assert_allclose(walk.forces, forces, atol=1e-6)
    assert walk.frames.shape == (21, 9, 3)


def test_a_store_without_paths_has_no_curves(tmp_path: Path) -> None:
    assert energy_curves(walks(new_store(tmp_path / "store"))) == []
