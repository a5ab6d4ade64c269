"""Speed-up of arms against their baseline: steps, energies, CPU time, and what does not count."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestrator.alignment import align
from orchestrator.bootstrap import estimate, mean
from orchestrator.errors import StoreError
from orchestrator.paths import energy_curves, walks
from orchestrator.speedup import compare, per_molecule, saved_line, write_per_molecule
from orchestrator.speedup_tables import tables, values
from orchestrator.store import Store
from tests.orchestrator.diffusion_stores import Study, little_study
from tests.orchestrator.run_fixtures import write_campaign
from tests.orchestrator.store_fixtures import little_records, new_store


def basin(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


# --- intervals --------------------------------------------------------------------------------


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(100):
        sample = rng.exponential(size=60)
        found = estimate(np.arange(60), {"mean": mean(sample)})["mean"]
        hits += found.low <= 1.0 <= found.high
    # 95 of 100 on average; 2.2 of standard deviation, and the percentile method's small bias.
    assert 86 <= hits <= 100


def test_an_interval_is_the_textbook_one_for_many_normal_values() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=2000)
    found = estimate(np.arange(2000), {"mean": mean(values)})["mean"]
    half = 1.96 * values.std() / np.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_conformers_do_not_count_as_molecules() -> None:
    values = np.repeat(np.random.default_rng(2).normal(size=50), 30)
    apart = estimate(np.arange(1500), {"mean": mean(values)})["mean"]
    together = estimate(np.repeat(np.arange(50), 30), {"mean": mean(values)})["mean"]
    # Thirty copies of each value say no more than one.
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(np.sqrt(30), rel=0.15)


def test_a_few_molecules_have_no_interval() -> None:
    found = estimate(np.array([0, 1, 1, 2]), {"mean": mean(np.arange(4.0))})["mean"]
    assert found.value == 1.5
    assert not found.known
    assert not estimate(np.zeros(0, int), {"mean": mean(np.zeros(0))})["mean"].known


# --- arms -------------------------------------------------------------------------------------


def test_steps_energies_and_seconds_of_two_arms(tmp_path: Path) -> None:
    found = compare(little_study().store(tmp_path / "store"))
    assert (found.baseline, found.level, found.baseline_pairs) == ("gfn2", "GFN2-xTB", 12)
    half, quarter = found.arms
    assert [arm.stage for arm in found.arms] == ["relaxed-20", "relaxed-50"]
    assert (half.n, half.model, half.protocol) == (20, "qm9-gfn2", "deterministic")
    assert (half.all.molecules, half.all.steps, half.all.baseline_steps) == (12, 15.0, 30.0)
    assert half.all.reduction.value == pytest.approx(0.5)
    assert (half.all.reduction.low, half.all.reduction.high) == (0.5, 0.5)
    assert quarter.all.reduction.value == pytest.approx(0.75)
    assert quarter.all.factors == pytest.approx((4.0, 4.0))
    # 10 kcal/mol above the minimum from MMFF, 2 from n = 20, 1 from n = 50.
    assert half.all.own.mean.value == pytest.approx(2.0)
    assert half.all.baseline_own.median.value == pytest.approx(10.0)
    assert half.all.ratio.value == pytest.approx(5.0)
    assert quarter.all.ratio.value == pytest.approx(10.0)
    # 2 s from MMFF; 0.5 s of diffusion and 1 s of relaxation in the arm.
    assert half.all.cpu_saved.value == pytest.approx(0.5)
    assert half.all.cpu_saved_share == pytest.approx(0.25)
    assert (half.all.cpu, half.all.cpu_before, half.all.baseline_cpu) == (1.0, 0.5, 2.0)
    assert (half.all.same_basin, half.missing, half.unpaired) == (1.0, 0, 0)
    assert found.best() is quarter


def test_quartiles_are_of_the_molecules(tmp_path: Path) -> None:
    study = Study()
    for at, steps in enumerate((4, 8, 10, 16, 24)):
        study.arm(study.molecule(f"m{at}", 20), steps)
    (arm,) = compare(study.store(tmp_path / "store")).arms
    # Savings of 80, 60, 50, 20 and -20 %.
    assert arm.all.reduction.value == pytest.approx(0.5)
    assert arm.all.reduction_quartiles == pytest.approx((0.2, 0.6))
    assert arm.all.factors == pytest.approx((1.25, 2.5))
    assert -0.2 <= arm.all.reduction.low <= 0.5 <= arm.all.reduction.high <= 0.8


def test_other_basins_are_told_apart_and_left_out_of_the_second_table(tmp_path: Path) -> None:
    study = Study()
    for at, (delta, steps) in enumerate(((0.0, 10), (0.19, 10), (1.5, 2), (-0.4, 18))):
        study.arm(study.molecule(f"m{at}", 20), steps, delta=delta, start=2.0)
    (arm,) = compare(study.store(tmp_path / "store")).arms
    assert (arm.all.same_basin, arm.all.deeper, arm.all.higher) == (0.5, 0.25, 0.25)
    assert arm.all.delta_mean == pytest.approx((0.19 + 1.5 - 0.4) / 4)
    assert arm.all.delta_median == pytest.approx(0.095)
    assert (arm.same.pairs, arm.same.reduction.value) == (2, 0.5)
    # Above the lowest minimum of the molecule: only the arm that ended higher moves up.
    assert arm.all.own.mean.value == pytest.approx(2.0)
    assert arm.all.lowest.mean.value == pytest.approx(2.0 + 0.4 / 4)
    assert arm.all.baseline_lowest.mean.value == pytest.approx(10.0 + (0.19 + 1.5) / 4)


@pytest.mark.parametrize("where", ["baseline", "diffusion", "arm"])
def test_changed_bonds_count_nowhere_but_are_counted(tmp_path: Path, where: str) -> None:
    study = little_study(4)
    baseline = study.molecule("broken", 100, changed=where == "baseline")
    path = study.diffuse(baseline, changed=where == "diffusion")
    study.relax(path, baseline, 1, delta=50.0, changed=where == "arm")
    found = compare(study.store(tmp_path / "store"))
    half, quarter = found.arms
    assert (half.all.pairs, int(half.changed.sum()), len(half.mine)) == (4, 1, 5)
    assert half.all.reduction.value == pytest.approx(0.5)
    assert half.all.delta_mean == pytest.approx(0.0)
    assert quarter.missing == 1
    # A molecule that fell apart is no minimum of the one that was asked for.
    assert half.lowest.max() < 0 or where == "baseline"
    assert found.own.mean.value == pytest.approx(10.0)


def test_what_has_no_partner_is_counted(tmp_path: Path) -> None:
    study = little_study(3)
    study.molecule("without an arm")
    lonely = study.molecule("without a baseline")
    study.arm(lonely, 5)
    rows = study.records.tables["relaxations"]
    rows[:] = [row for row in rows if row["key"] != lonely]
    half, _ = compare(study.store(tmp_path / "store")).arms
    assert (half.all.pairs, half.missing, half.unpaired) == (3, 1, 1)


def test_an_arm_may_differ_in_its_optimiser_only(tmp_path: Path) -> None:
    study = Study()
    for at in range(6):
        baseline = study.molecule(f"m{at}", 20)
        mmff = study.row("relaxations", baseline)["parent_key"]
        study.relax(mmff, baseline, 14, stage="hessian", start=10.0, cpu_s=1.5)
    store = study.store(tmp_path / "store")
    (arm,) = compare(store).arms
    assert (arm.stage, arm.diffused, arm.model) == ("hessian", False, "")
    assert arm.all.reduction.value == pytest.approx(0.3)
    assert (arm.all.cpu_before, arm.all.cpu_saved.value) == (0.0, 0.5)
    assert saved_line(compare(store)) == ""
    (other,) = compare(store, baseline="hessian").arms
    assert other.stage == "gfn2"
    assert other.all.reduction.value == pytest.approx(-6 / 14)
    # The campaign's own order decides which relaxation from MMFF is the first.
    assert compare(store, order=["embed", "mmff", "hessian", "gfn2"]).baseline == "hessian"


def test_any_stage_can_be_the_baseline(tmp_path: Path) -> None:
    found = compare(little_study().store(tmp_path / "store"), baseline="relaxed-50")
    arms = {arm.stage: arm for arm in found.arms}
    assert arms["relaxed-20"].all.reduction.value == pytest.approx(-1.0)
    # 2 s from MMFF, 1.5 s with each diffusion counted to the relaxation from it.
    assert arms["gfn2"].all.cpu_saved.value == pytest.approx(-0.5)
    assert arms["relaxed-20"].all.cpu_saved.value == pytest.approx(0.0)


def test_another_level_and_what_starts_from_a_relaxed_geometry_are_no_arms(tmp_path: Path) -> None:
    study = little_study(3)
    baseline = study.molecule("m", 20)
    study.relax(study.diffuse(baseline), baseline, 1, stage="dft", level="PBE/sto-3g")
    study.relax(baseline, baseline, 1, stage="tight")
    found = compare(study.store(tmp_path / "store"))
    assert [arm.stage for arm in found.arms] == ["relaxed-20", "relaxed-50"]


def test_of_one_stage_run_again_with_other_settings_the_latest_counts(tmp_path: Path) -> None:
    study = Study()
    for at in range(3):
        baseline = study.molecule(f"m{at}", 20)
        study.arm(baseline, 19)
        study.relax(study.diffuse(baseline, model="better"), baseline, 5)
    (arm,) = compare(study.store(tmp_path / "store")).arms
    assert (arm.model, arm.all.pairs, arm.all.steps) == ("better", 3, 5.0)


def test_shards_and_segments_give_the_same(tmp_path: Path) -> None:
    study = little_study(5)
    found = [
        compare(study.store(tmp_path / name, compacted=name == "segments")).arms
        for name in ("segments", "shards")
    ]
    assert [arm.all for arm in found[0]] == [arm.all for arm in found[1]]


def test_checkpoints_come_in_the_order_of_training(tmp_path: Path) -> None:
    study = Study()
    for at in range(6):
        baseline = study.molecule(f"m{at}", 20)
        for step, steps in ((500, 19), (2000, 10), (10000, 6)):
            name = f"qm9-step{step:05d}"
            path = study.diffuse(baseline, model=name, stage=f"diffused-{name}")
            study.relax(path, baseline, steps, stage=f"relaxed-{name}", start=20.0 / steps)
        final = study.diffuse(baseline, model="qm9", stage="diffused-qm9")
        study.relax(final, baseline, 4, stage="relaxed-qm9")
    (series,) = compare(study.store(tmp_path / "store")).series
    assert (series.family, series.unit, series.n) == ("qm9", "step", 20)
    assert [point.number for point in series.points] == [500, 2000, 10000]
    saved = [point.arm.all.reduction.value for point in series.points]
    assert saved == pytest.approx([0.05, 0.5, 0.7])


def test_odd_numbers_are_left_out(tmp_path: Path) -> None:
    study = little_study(3)
    study.arm(study.molecule("no energy"), 5, delta=np.nan)
    still = study.molecule("at rest", 0, start=0.0)
    study.arm(still, 0, start=0.0)
    half, _ = compare(study.store(tmp_path / "store")).arms
    # Nothing to save is nothing saved; a NaN is no energy.
    assert (half.all.pairs, half.all.reduction_quartiles) == (4, pytest.approx((0.375, 0.5)))


def test_a_store_without_relaxations_or_without_the_stage_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no relaxation has finished"):
        compare(new_store(tmp_path / "empty"))
    store = little_study(2).store(tmp_path / "store")
    with pytest.raises(StoreError, match=r"'gfn1'.*gfn2, relaxed-20, relaxed-50"):
        compare(store, baseline="gfn1")


def test_a_real_campaign_gives_pairs_energies_and_alignment(tmp_path: Path) -> None:
    import torch

    from kernels.diffusion.checkpoint import save
    from kernels.diffusion.egnn import ModelConfig, build

    torch.manual_seed(0)
    config = ModelConfig(hidden=16, layers=2, steps=1000)
    save(
        tmp_path / "untrained.safetensors",
        config,
        build(config).state_dict(),
        {"name": "untrained"},
    )
    campaign = write_campaign(
        tmp_path,
        ["CCO", "CC=O", "CC#N", "COC", "CNC", "OCC=O"],
        stages='[[stages]]\nkernel = "embed"\n[[stages]]\nkernel = "mmff"\n'
        '[[stages]]\nname = "gfn2"\nkernel = "relax"\n'
        '[[stages]]\nname = "diffused"\nkernel = "diffuse"\nfrom = "mmff"\n'
        'model = "untrained.safetensors"\nn = [2, 12]\n'
        '[[stages]]\nname = "relaxed"\nkernel = "relax"\n'
        '[[stages]]\nname = "points"\nkernel = "single_points"\nfrom = "diffused"\n'
        "save_forces = true\n",
    )
    done = basin("run", campaign, "--workers", 2, "--report")
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("diffusion saved ")]
    assert line.endswith("against gfn2)")
    store = Store(tmp_path / "store")
    found = compare(store)
    arms = {arm.stage: arm for arm in found.arms}
    assert set(arms) == {"relaxed-2", "relaxed-12"}
    # Two of a thousand steps of whatever model hardly move an atom: the same relaxation again.
    near = arms["relaxed-2"].all
    assert (near.pairs, near.same_basin) == (6, 1.0)
    assert near.own.mean.value == pytest.approx(near.baseline_own.mean.value, abs=0.5)
    assert near.cpu_before > 0
    curves = {curve.stage: curve for curve in energy_curves(walks(store))}
    for stage, arm in (("diffused-2", "relaxed-2"), ("diffused-12", "relaxed-12")):
        # The last frame is what the relaxation started from, the first what the baseline did.
        assert curves[stage].mean[-1] == pytest.approx(arms[arm].all.own.mean.value, abs=1e-3)
        assert curves[stage].own == 6
    angles = {one.stage: one for one in align(walks(store))}
    assert np.nanmean(angles["diffused-12"].mean["force, minimum"]) > 0.2
    assert "What diffusion saves" in (tmp_path / "store" / "report.html").read_text()


# --- what people and programs see -------------------------------------------------------------


def test_the_line_names_the_arm_and_its_interval(tmp_path: Path) -> None:
    line = saved_line(compare(little_study().store(tmp_path / "store")))
    assert line == (
        "diffusion saved 75 % of the relaxation steps (median, 95 % CI 75 to 75, 12 molecules; "
        "relaxed-50 against gfn2)"
    )
    worse = Study()
    for at in range(12):
        worse.arm(worse.molecule(f"molecule {at}", 20), 30)
    assert saved_line(compare(worse.store(tmp_path / "worse"))) == (
        "diffusion did harm: 50 % more relaxation steps (median, 95 % CI 50 to 50, 12 molecules; "
        "relaxed-20 against gfn2)"
    )
    few = saved_line(compare(little_study(1).store(tmp_path / "few")))
    assert "(median, too few for an interval, 1 molecule; " in few


def test_every_pair_is_a_line_of_the_csv(tmp_path: Path) -> None:
    study = little_study(3)
    study.arm(study.molecule("broken, odd"), 5, changed=True)
    found = compare(study.store(tmp_path / "store"))
    assert write_per_molecule(found, tmp_path / "pairs.csv") == 7
    with open(tmp_path / "pairs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["arm"] for line in lines].count("relaxed-20") == 4
    first = next(x for x in lines if x["name"] == "molecule 1" and x["arm"] == "relaxed-50")
    assert (first["baseline_steps"], first["steps"], first["n"]) == ("40", "10", "50")
    assert float(first["step_reduction"]) == 0.75
    assert float(first["start_above_own_minimum_kcal_per_mol"]) == pytest.approx(1.0, abs=1e-4)
    assert float(first["cpu_saved_s"]) == pytest.approx(0.5)
    assert bytes.fromhex(first["key"]) in {r["key"] for r in study.records.tables["relaxations"]}
    (broken,) = [x for x in lines if x["name"] == "broken, odd"]
    assert broken["connectivity_changed"] == "1"
    assert len(per_molecule(found)) == 7


def test_values_are_plain_and_carry_the_published_ones(tmp_path: Path) -> None:
    found = values(compare(little_study().store(tmp_path / "store")))
    found = json.loads(json.dumps(found, allow_nan=False))
    assert [arm["published_reduction"] for arm in found["arms"]] == [0.40, 0.57]
    assert found["baseline"]["start_above_own_minimum"]["mean"]["value"] == pytest.approx(10.0)
    assert found["published"]["start_above_minimum_mmff"] == 10.0


def test_drugs_are_compared_with_drugs(tmp_path: Path) -> None:
    study = little_study(2)
    for row in study.records.tables["molecules"]:
        row["source"] = "/data/geom_drugs/part.smi"
    found = values(compare(study.store(tmp_path / "store")))
    assert [arm["published_reduction"] for arm in found["arms"]] == [0.07, 0.07]
    assert found["published"]["where"] == "DRUGS, GFN2-xTB"


def _printed(store: Store, *words: str) -> str:
    done = basin("speedup", store.path, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_prints_tables_and_the_line(tmp_path: Path) -> None:
    store = little_study().store(tmp_path / "store")
    text = _printed(store, "--per-molecule", str(tmp_path / "pairs.csv"))
    rows = [line.split() for line in text.splitlines()]
    steps = next(row for row in rows if row[:1] == ["relaxed-20"])
    assert steps[:5] == ["relaxed-20", "12", "15", "30", "50"]
    assert " ".join(steps).endswith("40 % (QM9, DFT)")
    assert "57 % (QM9, DFT)" in text
    assert text.rstrip().splitlines()[-1].startswith("diffusion saved 75 % of the relaxation steps")
    assert max(map(len, text.splitlines())) <= 120
    assert (tmp_path / "pairs.csv").read_text().count("\n") == 25
    found = json.loads(_printed(store, "--json", "--baseline", "relaxed-50"))
    assert found["baseline"]["stage"] == "relaxed-50"
    assert [arm["stage"] for arm in found["arms"]] == ["gfn2", "relaxed-20"]


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    done = basin("speedup", store.path)
    assert done.returncode == 3
    assert "no other relaxation goes back to" in done.stderr
    assert "diffuse stage" in done.stderr


def test_tables_of_arms_without_a_single_usable_pair(tmp_path: Path) -> None:
    study = Study()
    study.arm(study.molecule("broken"), 5, changed=True)
    found = compare(study.store(tmp_path / "store"))
    assert found.arms[0].all.pairs == 0
    assert saved_line(found) == ""
    assert tables(found)
