"""The forecast: what is counted, what is done already, and where its estimates come from."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import million
from kernels.graph import parse_smiles
from orchestrator import forecast as forecast_module
from orchestrator import ingest
from orchestrator.campaign import load_campaign
from orchestrator.errors import SiteError, StoreVersionError
from orchestrator.forecast import Forecast, distinct, draw, forecast, learned_estimates
from orchestrator.molecules import Record
from orchestrator.plan import Item, Plan, standing
from orchestrator.sites import load_site
from orchestrator.store import Store
from tests.orchestrator.run_fixtures import ingested
from tests.orchestrator.store_fixtures import Records, new_store

LINES = ["CCO ethanol", "C(C broken", "OCC the same", "CO methanol", "c1ccccc1 benzene", "QQ what"]
STAGES = """
[[stages]]
kernel = "embed"
conformers = 3
[[stages]]
kernel = "mmff"
[[stages]]
name = "gfn2"
kernel = "relax"
level = "GFN2-xTB"
"""


def campaign_file(folder: Path, lines: list[str], stages: str = STAGES, more: str = "") -> Path:
    (folder / "some.smi").write_text("".join(f"{line}\n" for line in lines))
    path = folder / "c.toml"
    path.write_text(
        f'name = "c"\nstore = "store"\n[molecules]\nfiles = ["some.smi"]\n{more}\n{stages}'
    )
    return path


def found(path: Path) -> Forecast:
    return forecast(load_campaign(path), load_site("local", workers=2))


def finish(store: Store, items: list[Item], stage: int, plan: Plan, **changes: object) -> None:
    records = Records()
    for item in items:
        records.task(
            plan.stages[stage].name, item.key, mol_key=item.mol_key,
            kernel=plan.stages[stage].label, **changes,
        )  # fmt: skip
    records.seal(store, f"stage{stage}-{len(items)}-{len(changes)}")


def test_entries_are_counted_as_they_are_read(tmp_path: Path) -> None:
    answer = found(campaign_file(tmp_path, LINES))
    assert (answer.entries, answer.molecules, answer.duplicates, answer.bad) == (6, 3, 1, 2)
    assert [(s.stage, s.tasks, s.done) for s in answer.stages] == [
        ("embed", 9, 0),
        ("mmff", 9, 0),
        ("gfn2", 9, 0),
    ]
    assert len(answer.bad_examples) == 2
    assert answer.bad_examples[0].startswith(f"{tmp_path / 'some.smi'}, line 2: ")
    assert "C(C" in answer.bad_examples[0]
    assert answer.batch_scripts == {}
    assert answer.workers == {"cpu": 2}
    assert not (tmp_path / "store").exists(), "a plan makes nothing"


def test_it_says_how_many_more_bad_lines_there_are(tmp_path: Path) -> None:
    answer = found(campaign_file(tmp_path, ["CO", *["C(C"] * 9]))
    assert answer.bad == 9
    assert len(answer.bad_examples) == 6
    assert answer.bad_examples[-1] == "... and 4 more"


def test_the_limit_of_entries_counts(tmp_path: Path) -> None:
    answer = found(campaign_file(tmp_path, LINES, more="limit = 3"))
    assert (answer.entries, answer.molecules, answer.duplicates, answer.bad) == (3, 1, 1, 1)


def test_flat_records_are_bad_where_a_geometry_is_needed(tmp_path: Path) -> None:
    from rdkit import Chem
    from rdkit.Chem import AllChem

    solid = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    AllChem.EmbedMolecule(solid, randomSeed=1)
    flat = Chem.MolFromSmiles("CCN")
    AllChem.Compute2DCoords(flat)
    (tmp_path / "some.sdf").write_text(
        "".join(f"{Chem.MolToMolBlock(mol)}$$$$\n" for mol in (solid, flat, solid))
    )
    path = tmp_path / "c.toml"
    path.write_text('name = "c"\n[molecules]\nfiles = ["some.sdf"]\n[[stages]]\nkernel = "mmff"\n')
    answer = found(path)
    assert (answer.entries, answer.molecules, answer.duplicates, answer.bad) == (3, 1, 1, 1)
    assert "line 2" in answer.bad_examples[0]
    assert [s.tasks for s in answer.stages] == [1]


def test_finished_and_unreachable_tasks_are_subtracted(tmp_path: Path) -> None:
    path = campaign_file(tmp_path, LINES)
    before = found(path)
    campaign = load_campaign(path)
    plan = Plan(campaign)
    store = new_store(campaign.store)
    roots = []
    for smiles in ("CCO", "CO", "c1ccccc1"):
        molecule = parse_smiles(smiles)
        key = ingest.molecule_key(molecule)
        roots.append(ingest.Root(key, key, molecule.smiles, 0, 1, len(molecule.numbers)))
    ready = standing(plan, roots, store.snapshot().task_index()).ready[0]
    assert len(ready) == 9
    finish(store, ready[:4], 0, plan)
    finish(store, ready[4:6], 0, plan, status="embed", message="no geometry")
    after = found(path)
    # Two failed embeddings are done, and so is all that would have followed them.
    assert [(s.tasks, s.done) for s in after.stages] == [(9, 6), (9, 2), (9, 2)]
    assert after.stages[1].core_hours == pytest.approx(before.stages[1].core_hours * 7 / 9)
    assert after.core_hours < before.core_hours
    assert after.core_hours == pytest.approx(sum(s.core_hours for s in after.stages))
    assert after.wall_s == pytest.approx(after.core_hours * 3600 / 2)


def test_estimates_are_learned_from_the_store(tmp_path: Path) -> None:
    path = campaign_file(tmp_path, LINES)
    campaign = load_campaign(path)
    plan = Plan(campaign)
    assert found(path).estimates_from == "figures measured on another machine"
    store = new_store(campaign.store)
    records = Records()
    for line, smiles in enumerate(["CCO", "CCCO", "CCCCO", "CCCCCO", "CCCCCCO"] * 6):
        mol_key, mol = records.molecule(f"m{line}", smiles, line)
        n = mol.GetNumAtoms()
        # Cost grows with the square of the number of atoms: 3 s for ten of them.
        for stage, seconds in ((0, 1.0), (2, 3.0 * (n / 10) ** 2)):
            key = ingest.geometry_key(mol_key, np.array([float(line), stage]))
            label = plan.stages[stage].label
            records.task("x", key, mol_key=mol_key, kernel=label, wall_s=seconds)
    records.seal(store)
    estimates = learned_estimates(store.snapshot(), plan)
    assert estimates[2].measured
    assert estimates[2].seconds(10) == pytest.approx(3.0, rel=0.01)
    assert estimates[2].seconds(40) == pytest.approx(48.0, rel=0.01)
    assert not estimates[1].measured
    answer = found(path)
    assert answer.estimates_from == "finished tasks of this store"
    # Ethanol 9, methanol 6 and benzene 12 atoms, three conformers each.
    assert answer.stages[2].core_hours * 3600 == pytest.approx(
        3 * 3.0 * (0.9**2 + 0.6**2 + 1.2**2), rel=0.01
    )


def test_failed_tasks_teach_nothing(tmp_path: Path) -> None:
    path = campaign_file(tmp_path, LINES)
    plan = Plan(load_campaign(path))
    store = new_store(load_campaign(path).store)
    records = Records()
    mol_key, _ = records.molecule("ethanol", "CCO")
    for i in range(40):
        key = ingest.geometry_key(mol_key, np.array([float(i)]))
        records.task(
            "gfn2", key, mol_key=mol_key, kernel=plan.stages[2].label, wall_s=600.0,
            status="timeout",
        )  # fmt: skip
    records.seal(store)
    assert not learned_estimates(store.snapshot(), plan)[2].measured


def test_a_store_of_another_schema_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    path = campaign_file(tmp_path, LINES)
    store = new_store(tmp_path / "store")
    about = store.path / "campaign.json"
    about.write_text(about.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(StoreVersionError, match="schema 2"):
        found(path)


def test_a_pool_that_the_site_lacks_is_refused(tmp_path: Path) -> None:
    stages = STAGES.replace('kernel = "mmff"', 'kernel = "mmff"\npool = "gpu"')
    with pytest.raises(SiteError, match="no pool 'gpu'"):
        found(campaign_file(tmp_path, LINES, stages))


def test_bundles_follow_from_time_and_number(tmp_path: Path) -> None:
    lines = [f"{'C' * n}O" for n in range(1, 12)]
    path = campaign_file(tmp_path, lines)
    few = found(path).stages[2].bundles
    path.write_text(path.read_text() + '[run]\nbundle_time = "0.5 s"\n')
    many = found(path).stages[2]
    assert few < many.bundles
    assert many.bundles == int(np.ceil(many.core_hours * 3600 / 0.5))


def many(folder: Path, molecules: int = 1500) -> Path:
    """Write a list in which some molecules come twice or three times, and some lines are bad."""
    rng = random.Random(1)
    lines = list(itertools.islice(million.molecules(), molecules))
    lines += rng.sample(lines, 300) + rng.sample(lines, 100)
    lines += [f"C1CC{'C' * n}" for n in range(100)]
    rng.shuffle(lines)
    return campaign_file(folder, lines)


def test_of_very_many_entries_a_sample_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many(tmp_path)
    campaign, site = load_campaign(path), load_site("local", workers=2)
    truth = found(path)
    assert (truth.entries, truth.molecules, truth.bad, truth.sampled) == (2000, 1500, 100, 0)
    monkeypatch.setattr(forecast_module, "EXACT_ENTRIES", 1000)
    monkeypatch.setattr(forecast_module, "SAMPLE", 700)
    guess = forecast(campaign, site)
    assert (guess.entries, guess.sampled) == (2000, 700)
    assert guess.entries == guess.molecules + guess.duplicates + guess.bad
    for name in ("molecules", "duplicates", "bad", "core_hours"):
        assert 0 < guess.margins[name] < 0.6 * max(getattr(truth, name), 200)
        assert abs(getattr(guess, name) - getattr(truth, name)) <= guess.margins[name]
    assert guess.stages[0].tasks == pytest.approx(truth.stages[0].tasks, rel=0.1)
    assert "more" in guess.bad_examples[-1]
    exact = forecast(campaign, site, exact=True)
    assert exact == truth


def test_what_a_store_has_read_is_counted_from_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many(tmp_path)
    truth = found(path)
    ingested(load_campaign(path))
    monkeypatch.setattr(forecast_module, "EXACT_ENTRIES", 10)
    counted = found(path)
    assert counted.sampled == 0
    assert len(counted.bad_examples) == 6
    for name in ("entries", "molecules", "duplicates", "bad"):
        assert getattr(counted, name) == getattr(truth, name)
    assert [(s.tasks, s.bundles) for s in counted.stages] == [
        (s.tasks, s.bundles) for s in truth.stages
    ]
    assert counted.core_hours == pytest.approx(truth.core_hours)


def parse_nothing() -> Any:
    raise AssertionError("drawing records is not reading them")


def test_a_sample_is_drawn_from_everywhere() -> None:
    records = [Record("f.smi", n, "", "", partial(parse_nothing)) for n in range(10_000)]
    total, drawn = draw(iter(records), 1000)
    assert total == 10_000
    lines = [record.line for record in drawn]
    assert len(set(lines)) == 1000
    assert lines == sorted(lines)
    share = np.histogram(lines, bins=10, range=(0, 10_000))[0]
    # Five standard deviations of a draw that favours no part.
    assert (abs(share - 100) < 5 * np.sqrt(100 * 0.9)).all()
    assert draw(iter(records[:7]), 1000) == (7, records[:7])


@pytest.mark.parametrize(
    "population",
    [
        np.concatenate([np.arange(20_000), np.arange(5_000)]),
        np.repeat(np.arange(3_000), 8),
        np.arange(20_000),
    ],
    ids=["some twice", "all eight times", "none twice"],
)
def test_kinds_are_estimated_from_a_sample(population: np.ndarray[Any, Any]) -> None:
    rng = np.random.default_rng(0)
    truth = len(np.unique(population))
    answers = []
    inside = 0
    for _ in range(100):
        sample = rng.choice(population, 2500, replace=False)
        times = np.unique(sample, return_counts=True)[1]
        kinds, margin = distinct(len(population), 2500, Counter(times.tolist()))
        answers.append(kinds)
        inside += abs(kinds - truth) <= margin
    assert np.mean(answers) == pytest.approx(truth, rel=0.01)
    assert inside >= 88


SITE = """
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.launchers import SrunLauncher
from parsl.providers import SlurmProvider

config = Config(executors=[
    HighThroughputExecutor(
        label="cpu", address="127.0.0.1", max_workers_per_node=10,
        provider=SlurmProvider(
            partition="p", nodes_per_block=2, max_blocks=3, walltime="01:00:00",
            launcher=SrunLauncher())),
])
"""


def test_node_hours_count_whole_nodes_and_blocks(tmp_path: Path) -> None:
    (tmp_path / "site.py").write_text(SITE)
    stages = '[[stages]]\nkernel = "rehearse"\nconformers = {}\n'
    path = campaign_file(tmp_path, ["CO"], stages.format(10))
    site = load_site(str(tmp_path / "site.py"))
    small = forecast(load_campaign(path), site)
    # One bundle keeps one block busy, however many nodes the site has.
    (pool,) = small.pools
    assert (pool.pool, pool.nodes, pool.workers, pool.blocks) == ("cpu", 2, 20, 1)
    assert pool.walltime_s == 3600
    assert small.node_hours == pool.node_hours == pytest.approx(2 * 60 / 3600, rel=0.01)
    plan = Plan(load_campaign(path))
    store = new_store(tmp_path / "store")
    records = Records()
    mol_key, _ = records.molecule("ethanol", "CCO")
    for i in range(40):
        key = ingest.geometry_key(mol_key, np.array([float(i)]))
        label = plan.stages[0].label
        records.task("rehearse", key, mol_key=mol_key, kernel=label, wall_s=5400.0)
    records.seal(store)
    path = campaign_file(tmp_path, ["CO"], stages.format(80))
    large = forecast(load_campaign(path), load_site(str(tmp_path / "site.py")))
    (pool,) = large.pools
    # 120 core-hours on 60 workers: two hours, so that every block is followed by another.
    assert large.core_hours == pytest.approx(120.0, rel=0.01)
    assert (pool.nodes, pool.workers, pool.blocks) == (6, 60, 6)
    assert pool.wall_s == large.wall_s == pytest.approx(7200.0, rel=0.01)
    assert large.node_hours == pytest.approx(6 * 2 + 6 * 2 * 60 / 3600, rel=0.01)
