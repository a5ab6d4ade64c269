"""The forecast: what is counted, what is done already, and where its estimates come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernels.graph import parse_smiles
from orchestrator import ingest
from orchestrator.campaign import load_campaign
from orchestrator.errors import SiteError, StoreVersionError
from orchestrator.forecast import Forecast, forecast, learned_estimates
from orchestrator.plan import Item, Plan, standing
from orchestrator.sites import load_site
from orchestrator.store import Store
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
