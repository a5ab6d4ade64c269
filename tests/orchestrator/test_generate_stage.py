"""The stage generate, and campaigns whose molecules come from nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kernels.diffusion import model_files, published
from kernels.diffusion.sizes import draw_size
from orchestrator.campaign import load_campaign
from orchestrator.errors import CampaignError
from orchestrator.forecast import forecast
from orchestrator.guard import Guard
from orchestrator.ingest import chunks, read_roots
from orchestrator.kernel_calls import Call, Payload, batches
from orchestrator.plan import Plan
from orchestrator.sites import load_site
from orchestrator.status import explain
from tests.orchestrator.run_fixtures import complete, ingested, standing_of, store_of
from tests.orchestrator.tiny_models import write_model

SAMPLES = 6
ENERGY_EV = 1e-4


def write(
    folder: Path, *, model: str, more: str = "", top: str = "", samples: int = SAMPLES
) -> Path:
    path = folder / "made.toml"
    path.write_text(
        f'{top}\nname = "made"\n[molecules]\nsamples = {samples}\n[[stages]]\nname = "generated"\n'
        f'kernel = "generate"\nmodel = "{model}"\n{more}'
    )
    return path


POINTS = '[[stages]]\nname = "energies"\nkernel = "single_points"\nline = true\n'
RELAX = '[[stages]]\nname = "relaxed"\nkernel = "relax"\nmax_steps = 200\n'


@pytest.fixture
def little(tmp_path: Path) -> Path:
    write_model(tmp_path / "little.safetensors", steps=12, size_histogram={5: 1, 7: 1})
    return tmp_path


# The campaign file


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("samples = 0", ["samples = 0", "at least 1"]),
        ('samples = 3\nfiles = ["a.smi"]', ["samples = 3", "leave files out"]),
        ("samples = 3\nlimit = 2", ["leave limit out"]),
        ('files = ["a.xyz"]', [':5: stage 1 (generate): kernel = "generate"', "samples = 100"]),
        ("", ["[molecules] files is missing", "samples = 100"]),
    ],
)
def test_molecules_come_from_files_or_from_noise(little: Path, text: str, parts: list[str]) -> None:
    path = little / "x.toml"
    path.write_text(
        f'name = "x"\n[molecules]\n{text}\n[[stages]]\nkernel = "generate"\n'
        'model = "little.safetensors"\n'
    )
    with pytest.raises(CampaignError) as caught:
        load_campaign(path)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        ('[[stages]]\nkernel = "embed"\n', ['kernel = "embed"', '"generate" first']),
        ('[[stages]]\nkernel = "relax"\n', ['kernel = "relax"', '"generate" first']),
        (
            '[[stages]]\nkernel = "generate"\nmodel = "little.safetensors"\nsave_every = 0\n',
            ["save_every = 0", "at least 1"],
        ),
        (
            '[[stages]]\nkernel = "generate"\nmodel = "little.safetensors"\n[[stages]]\n'
            'kernel = "generate"\nname = "again"\nmodel = "little.safetensors"\n'
            'from = "generate"\n',
            ["a generate stage starts from noise alone"],
        ),
        (
            '[[stages]]\nkernel = "generate"\nmodel = "own.safetensors"\n',
            ['"own.safetensors"', "architecture basin", "architecture edm"],
        ),
    ],
)
def test_a_campaign_from_noise_begins_with_a_model(
    little: Path, stages: str, parts: list[str]
) -> None:
    write_model(little / "own.safetensors", architecture="basin")
    path = little / "x.toml"
    path.write_text(f'name = "x"\n[molecules]\nsamples = 3\n{stages}')
    with pytest.raises(CampaignError) as caught:
        load_campaign(path)
    for part in parts:
        assert part in str(caught.value)


def test_a_model_without_noise_is_refused_where_noise_is_asked_for(little: Path) -> None:
    write_model(little / "own.safetensors", architecture="basin")
    path = little / "x.toml"
    path.write_text(
        'name = "x"\n[molecules]\nfiles = ["a.sdf"]\n[[stages]]\nkernel = "diffuse"\nn = 5\n'
        'model = "own.safetensors"\nprotocol = "published"\n'
    )
    with pytest.raises(CampaignError, match=r"predicts minima and no noise; leave protocol"):
        load_campaign(path)


def test_models_in_a_list_make_their_own_molecules(little: Path) -> None:
    write_model(little / "other.safetensors", seed=1, steps=12)
    path = write(little, model="little.safetensors", more=RELAX)
    text = path.read_text().replace(
        '"little.safetensors"', '["little.safetensors", "other.safetensors"]'
    )
    path.write_text(text)
    campaign = load_campaign(path)
    assert [(stage.name, stage.from_) for stage in campaign.stages] == [
        ("generated-little", None), ("generated-other", None),
        ("relaxed-little", "generated-little"), ("relaxed-other", "generated-other"),
    ]  # fmt: skip


# Molecules that are not known yet


def test_samples_are_read_like_molecules_and_resume_like_them(little: Path) -> None:
    campaign = load_campaign(write(little, model="little.safetensors", samples=300))
    store, folder = ingested(campaign)
    plan = Plan(campaign)
    roots = [root for chunk in chunks(folder) for root in read_roots(chunk, plan)]
    assert len({root.mol_key for root in roots}) == 300
    assert {(root.smiles, root.n_atoms, root.multiplicity) for root in roots} == {("", 0, 0)}
    names = store.query("SELECT name, formula FROM molecules ORDER BY line").to_pylist()
    assert [row["name"] for row in names] == [f"sample {i}" for i in range(300)]
    # More of them later are more of the same.
    more = load_campaign(write(little, model="little.safetensors", samples=310))
    _, other = ingested(more)
    again = [root for chunk in chunks(other) for root in read_roots(chunk, Plan(more))]
    assert {root.mol_key for root in roots} < {root.mol_key for root in again}


def test_a_forecast_of_molecules_that_are_not_known_yet(little: Path) -> None:
    campaign = load_campaign(write(little, model="little.safetensors", more=POINTS + RELAX))
    made = forecast(campaign, load_site("local", workers=2))
    assert (made.entries, made.molecules, made.bad) == (SAMPLES, SAMPLES, 0)
    assert [stage.tasks for stage in made.stages] == [SAMPLES] * 3
    assert all(stage.core_hours > 0 for stage in made.stages)
    assert made.stages[0].what == "little, from noise"


def test_the_seed_and_the_model_make_the_molecules(little: Path) -> None:
    def keys(**changes: str) -> list[bytes]:
        campaign = load_campaign(write(little, model="little.safetensors", **changes))
        _, folder = ingested(campaign)
        plan = Plan(campaign)
        roots = [root for chunk in chunks(folder) for root in read_roots(chunk, plan)]
        return [chain[0] for root in roots for _, chain in plan.chains(root)]

    first = keys()
    assert keys() == first
    assert not set(keys(top="seed = 1")) & set(first)
    assert not set(keys(more="save_every = 3\n")) & set(first)


def test_batches_hold_molecules_that_will_be_of_equal_size(little: Path) -> None:
    path = little / "little.safetensors"
    stage = Call("generate", {"model": model_files.digest(path), "save_every": 1}, 60.0, str(path))
    payloads = [Payload("", 0, 1, seed, 0, None, None, "") for seed in range(40)]
    for batch in batches(stage, payloads):
        assert len({draw_size({5: 1, 7: 1}, seed) for seed in batch}) == 1
    guard = Guard()
    try:
        found = dict(
            guard.run(
                stage,
                payloads[:6],
                batches=batches(stage, payloads[:6]),
                time_limit=60.0,
                memory_limit=4_000_000_000,
            )
        )
    finally:
        guard.close()
    for seed, outcome in found.items():
        numbers = outcome["rows"]["geometries"]["numbers"]
        assert len(numbers) == draw_size({5: 1, 7: 1}, seed)
        assert len(outcome["rows"]["paths"]["positions"]) == 13 * len(numbers)


# Whole runs


def test_untrained_weights_make_no_molecules_but_every_item_ends_as_a_row(
    little: Path, require_engine: Callable[[str], None]
) -> None:
    require_engine("tblite")
    path = write(little, model="little.safetensors", more=POINTS + RELAX)
    summary = complete(path)
    assert summary["complete"]
    made, *after = standing_of(path).counts
    assert (made.ok, made.failed) == (SAMPLES, 0)
    for counts in after:
        assert counts.ok + counts.failed == SAMPLES
    rows = store_of(path).query(
        "SELECT key, count(*) AS frames, max(step) AS last, min(level) AS level FROM generations "
        "GROUP BY key"
    )
    assert {(r["frames"], r["last"], r["level"]) for r in rows.to_pylist()} == {(13, 12, 0)}
    words = "\n".join(explain(load_campaign(path), store_of(path), "sample 2"))
    assert "sample 2: made from noise" in words
    assert "generated: ok" in words
    assert complete(path)["done_now"] == 0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four molecules of a model from early in its training, their energies and minima."""
    import os

    from kernels.diffusion.checkpoint import save

    pytest.importorskip("tblite", reason="tblite is not installed")
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    data = Path(os.environ.get("BASIN_DATA", default))
    if not data.is_dir():
        pytest.skip(f"no data at {data}; set BASIN_DATA")
    folder = tmp_path_factory.mktemp("real")
    config, weights, _ = published.read(next((data / "edm_checkpoint").glob("*_ema.npy")))
    save(folder / "early.safetensors", config, weights, {})
    path = write(folder, model="early.safetensors", more=POINTS + RELAX, samples=4)
    assert complete(path)["complete"]
    return path


def test_energies_begin_where_the_elements_are_final(real: Path) -> None:
    store = store_of(real)
    flags = store.read("generations", ["key", "all_elements_final"])
    points = store.read("single_points", ["parent_key", "energy_eV", "line_energy_eV"])
    assert len(points["parent_key"]) >= 3
    where = {tuple(k): i for i, k in enumerate(flags["key"].tolist())}
    for row, parent in enumerate(points["parent_key"].tolist()):
        final = flags["all_elements_final"][where[tuple(parent)]] == 1
        energies, line = points["energy_eV"][row], points["line_energy_eV"][row]
        first = len(final) - int(np.argmin(final[::-1]))
        assert final[first:].all()
        assert not final[first - 1]
        assert np.isnan(energies[:first]).all()
        assert np.isfinite(energies[first:]).all()
        assert len(line) == len(energies) - first
        assert line[[0, -1]] == pytest.approx(energies[[first, -1]], abs=ENERGY_EV)
        # The model goes downhill, as far as it has learnt to.
        assert energies[-1] < energies[first]


def test_generated_molecules_have_paths_minima_and_exports(real: Path, tmp_path: Path) -> None:
    import ase.io

    from orchestrator.export import export

    store = store_of(real)
    row = store.query(
        "SELECT p.key, r.key AS relaxation, r.n_atoms, r.initial_energy_eV AS e, p.protocol, p.n "
        "FROM paths p JOIN relaxations r ON r.parent_key = p.key LIMIT 1"
    ).to_pylist()[0]
    assert (row["protocol"], row["n"]) == ("generation", 200)
    path = store.trajectory(row["key"])
    assert len(path) == 201
    assert path[0].calc is None
    assert path[0].info["n"] == 200
    assert path[0].info["name"].startswith("sample ")
    assert path[-1].get_potential_energy() == pytest.approx(row["e"], abs=ENERGY_EV)
    assert len(path[-1]) == row["n_atoms"]
    relaxed = ase.io.read(export(store, "extxyz", tmp_path / "r.xyz", frames=True), ":")
    assert isinstance(relaxed, list)
    assert {len(atoms) for atoms in relaxed if atoms.info["key"] == row["relaxation"]} == {
        row["n_atoms"]
    }


def test_a_report_of_generated_molecules_is_written(real: Path, tmp_path: Path) -> None:
    from orchestrator.report import write_report

    page = write_report(store_of(real), tmp_path / "report.html")
    assert page.stat().st_size > 10_000
