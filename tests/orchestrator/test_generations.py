"""How generated molecules settle: what is averaged, and from where on something holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.generations import generations, settled_from
from tests.orchestrator.diffusion_stores import Study
from tests.orchestrator.store_fixtures import new_store


def test_settled_means_to_the_end() -> None:
    levels = np.arange(5, -1, -1)
    assert settled_from(levels, np.array([0, 0, 1, 1, 1, 1], bool)) == 3
    # What was right for a while and then changed again was not final.
    assert settled_from(levels, np.array([0, 1, 1, 0, 1, 1], bool)) == 1
    assert settled_from(levels, np.ones(6, bool)) == 5
    assert settled_from(levels, np.array([1, 1, 1, 1, 1, 0], bool)) == -1


def test_convergence_is_the_mean_over_molecules(tmp_path: Path) -> None:
    study = Study()
    for at, settled in enumerate((60, 50, 40, 20)):
        study.generation(f"m{at}", settled=settled)
    (found,) = generations(study.store(tmp_path / "store"))
    assert (found.stage, found.model, found.molecules) == ("generated", "qm9-gfn2", 4)
    assert sorted(found.settled.tolist()) == [20, 40, 50, 60]
    share = dict(zip(found.levels.tolist(), found.mean["all_elements_final"].tolist(), strict=True))
    assert [share[n] for n in (100, 60, 45, 20, 0)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert found.mean["bond_deviation_A"][0] == pytest.approx(1.0)
    assert found.with_energy == 0


def test_energies_are_above_the_last_frame_where_most_have_one(tmp_path: Path) -> None:
    study = Study()
    # One molecule settles at 40, two at 20; the line of each goes from there to the end, twice as
    # high.
    for name, settled in (("early", 40), ("late", 20), ("late too", 20)):
        falling = np.linspace(settled, 0.0, settled + 1)
        study.generation(name, settled=settled, energies=falling, line=2.0 * falling)
    (found,) = generations(study.store(tmp_path / "store"))
    assert (found.with_energy, found.level_of_theory) == (3, "GFN2-xTB")
    at = {n: row for row, n in enumerate(found.levels.tolist())}
    assert np.isnan(found.energy[: at[20]]).all()
    assert found.energy[at[20]] == pytest.approx(20.0)
    assert found.line[at[10]] == pytest.approx(20.0)
    assert found.energy[at[0]] == pytest.approx(0.0)


def test_a_store_without_generations_has_none(tmp_path: Path) -> None:
    assert generations(new_store(tmp_path / "store")) == []
