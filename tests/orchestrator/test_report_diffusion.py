"""The report on diffusion: what it says, what it draws, and when it says nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.report import findings, write_report
from orchestrator.store import Store
from tests.orchestrator.diffusion_stores import Study, little_study
from tests.orchestrator.store_fixtures import little_records, new_store
from tests.orchestrator.test_report import Page

SCATTER = "Relaxation steps against relaxation steps"
ENERGY = "Energy along the diffusion path"


def page_of(store: Store, folder: Path) -> Page:
    return Page(write_report(store, folder / "report.html"))


def with_points(study: Study, *, forces: bool) -> Study:
    """Add single points to every path of a study: from 10 down to 2 kcal/mol."""
    rng = np.random.default_rng(0)
    for path in list(study.records.tables["paths"]):
        relaxed = next(
            row for row in study.records.tables["relaxations"] if row["parent_key"] == path["key"]
        )
        n_frames = len(path["level"])
        study.points(
            path["key"],
            np.linspace(10.0, 2.0, n_frames),
            minimum=relaxed["key"],
            forces=rng.normal(size=(n_frames, len(path["numbers"]), 3)) if forces else None,
        )
    return study


def test_the_finding_gives_the_saving_its_interval_and_the_published_value(tmp_path: Path) -> None:
    store = little_study().store(tmp_path / "store")
    *_, sentence = findings(store)
    assert sentence == (
        "Diffusion saves 75 % of the relaxation steps in the median (relaxed-50: 95 % CI 75 to "
        "75, 12 molecules, published 57 %); it starts with 10.0 times less energy above the "
        "minimum than gfn2, and with its own time counted it saves 25 % of the CPU time."
    )
    # The other findings are about the baseline, not about the last arm.
    assert "A relaxation takes 30 optimiser steps and 2.00 s" in findings(store)[2]


def test_what_diffusion_costs_is_said_too(tmp_path: Path) -> None:
    study = Study()
    for at in range(6):
        baseline = study.molecule(f"m{at}", 20)
        study.relax(study.diffuse(baseline, cpu_s=4.0), baseline, 22, start=20.0)
    sentence = findings(study.store(tmp_path / "store"))[-1]
    assert sentence.startswith("Diffusion costs 10 % more relaxation steps in the median")
    assert "it starts with 2.0 times more energy above the minimum than gfn2" in sentence
    assert "it costs 150 % more CPU time" in sentence


def test_the_page_has_the_arms_and_the_scatter(tmp_path: Path) -> None:
    study = little_study()
    study.arm(study.molecule("other basin"), 4, delta=3.0)
    study.arm(study.molecule("broken"), 4, changed=True)
    page = page_of(study.store(tmp_path / "store"), tmp_path)
    assert "What diffusion saves" in page.headings
    row = next(r for r in page.rows if r[:2] == ["relaxed-20", "qm9-gfn2, n = 20"])
    assert row[2:4] == ["13", "20 → 10"]
    assert row[6] == "40 %"
    assert row[4].startswith("50 % (")
    pictures = page.pictures()
    assert "50 % saved" in pictures[SCATTER]
    assert "75 % saved" in pictures[SCATTER]
    assert "kcal/mol" in pictures[SCATTER]
    assert "dashed: the published one (40 % for n = 20, 57 % for n = 50; QM9, DFT)" in page.text
    assert "1 pair with changed bonds" in page.text
    assert ENERGY not in pictures


def test_another_optimiser_is_told_apart_from_diffusion(tmp_path: Path) -> None:
    study = little_study()
    for row in list(study.records.tables["relaxations"]):
        if row["stage"] == "relaxed-20":
            better = study.relax(row["parent_key"], row["key"], 2, stage="quick-20")
            study.row("relaxations", better)["optimizer"] = "BFGS, another Hessian"
    store = study.store(tmp_path / "store")
    sentence = findings(store)[-1]
    assert sentence.startswith("Diffusion saves 75 % of the relaxation steps")
    assert "With BFGS, another Hessian (quick-20) it is 92 % of the steps" in sentence
    page = page_of(store, tmp_path)
    # The published saving is that of plain BFGS.
    start = "qm9-gfn2, n = 20\nBFGS, another Hessian"
    row = next(row for row in page.rows if row[:2] == ["quick-20", start])
    assert row[6] == ""
    assert all(name in page.pictures()[SCATTER] for name in ("relaxed-50", "quick-20"))


def test_energies_and_alignment_are_drawn_where_they_were_computed(tmp_path: Path) -> None:
    store = with_points(little_study(3), forces=True).store(tmp_path / "store")
    page = page_of(store, tmp_path)
    pictures = page.pictures()
    assert "published MMFF, 10.0" in pictures[ENERGY]
    assert "energy above minimum (kcal/mol)" in pictures[ENERGY]
    shown = {name for name in pictures if name.startswith("Alignment against")}
    assert shown == {
        "Alignment against the diffusion step, diffused-20",
        "Alignment against the diffusion step, diffused-50",
    }
    three = pictures["Alignment against the diffusion step, diffused-50"]
    assert all(words in three for words in ("next 1 move", "next 10 moves", "next 30 moves"))
    assert "next 30 moves" not in pictures["Alignment against the diffusion step, diffused-20"]
    plain = page_of(with_points(little_study(3), forces=False).store(tmp_path / "b"), tmp_path)
    assert ENERGY in plain.pictures()
    assert not any(name.startswith("Alignment") for name in plain.pictures())


def test_energies_without_relaxations_from_the_end_are_a_finding(tmp_path: Path) -> None:
    study = Study()
    for at in range(3):
        baseline = study.molecule(f"m{at}")
        study.points(study.diffuse(baseline), np.linspace(10, 2, 21), minimum=baseline)
    assert findings(study.store(tmp_path / "store"))[-1] == (
        "Diffusion from n = 20 takes 3 molecules from 10.0 to 2.0 kcal/mol above the relaxed "
        "minimum in the mean (published: 10 to 1)."
    )


def test_checkpoints_along_training_are_drawn_with_the_published_ones(tmp_path: Path) -> None:
    study = Study()
    for at in range(6):
        baseline = study.molecule(f"m{at}", 20)
        for epoch, steps in ((50, 20), (100, 15), (1000, 8)):
            name = f"qm9-epoch{epoch:04d}"
            path = study.diffuse(baseline, model=name, stage=f"diffused-{name}")
            study.relax(path, baseline, steps, stage=f"relaxed-{name}", start=steps / 4)
    page = page_of(study.store(tmp_path / "store"), tmp_path)
    pictures = page.pictures()
    assert "published, n = 20, fully trained" in pictures["Steps saved along training"]
    assert "training epoch" in pictures["Steps saved along training"]
    assert "gfn2, 10.0" in pictures["Energy of the start along training"]
    assert "0 % after 50, 4 % after 100 epochs" in page.text
    # Of a series only the last checkpoint has a panel of its own.
    assert "relaxed-qm9-epoch0100" not in pictures[SCATTER]
    assert "relaxed-qm9-epoch1000" in pictures[SCATTER]


def test_generation_is_drawn_and_found(tmp_path: Path) -> None:
    study = Study()
    for at, settled in enumerate((40, 50, 60)):
        energies = np.linspace(30.0, 0.0, settled + 1)
        study.generation(f"m{at}", settled=settled, energies=energies, line=2.0 * energies)
    store = study.store(tmp_path / "store")
    page = page_of(store, tmp_path)
    assert page.items[-1] == (
        "Of 3 molecules made from noise half have all their elements from diffusion step 50 on "
        "(published: 50); 100 % of their atoms end with a usual number of bonds."
    )
    picture = page.pictures()["Convergence of generation, generated"]
    for words in ("mean (Å)", "share (%)", "energy above last frame (kcal/mol)", "straight line"):
        assert words in picture
    assert "Molecules from noise" in page.headings


def test_a_campaign_without_diffusion_says_nothing_of_it(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    page = page_of(store, tmp_path)
    assert "iffusion" not in page.text
    assert not any("saves" in heading for heading in page.headings)


@pytest.mark.parametrize("odd", ["all changed", "no energy", "at rest"])
def test_odd_stores_still_have_a_report(tmp_path: Path, odd: str) -> None:
    study = Study()
    steps = 0 if odd == "at rest" else 20
    baseline = study.molecule("one", steps, start=0.0 if odd == "at rest" else 5.0)
    path = study.diffuse(baseline)
    study.relax(
        path, baseline, steps, start=0.0, changed=odd == "all changed",
        delta=np.nan if odd == "no energy" else 0.0,
    )  # fmt: skip
    study.points(
        path, np.full(21, np.nan if odd == "no energy" else 0.0), minimum=baseline,
        forces=np.zeros((21, 9, 3)),
    )  # fmt: skip
    page = page_of(study.store(tmp_path / "store"), tmp_path)
    assert "nan" not in page.text
