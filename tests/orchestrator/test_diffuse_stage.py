"""The stages diffuse and single_points, from the call of one batch to a whole campaign."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.diffusion import model_files
from kernels.embedding import embed
from kernels.graph import parse_smiles
from orchestrator.campaign import load_campaign
from orchestrator.errors import CampaignError
from orchestrator.guard import Guard
from orchestrator.kernel_calls import Call, Payload, batches
from orchestrator.status import explain
from orchestrator.store import Store
from orchestrator.stream import Estimate
from tests.orchestrator.run_fixtures import complete, standing_of, store_of, write_campaign
from tests.orchestrator.tiny_models import write_model

SMILES = ["CCO", "COC", "CCCC", "CCS", "C1CC1", "OCC=O"]
# The same path alone and in a batch, over a few steps in float32.
SAME_PATH_A = 1e-5
# An SCF from other starting charges.
SAME_ENERGY_EV = 1e-5


@pytest.fixture
def guard() -> Iterator[Guard]:
    guard = Guard()
    yield guard
    guard.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "little.safetensors")


def payload(smiles: str, seed: int = 0) -> Payload:
    numbers = parse_smiles(smiles).numbers
    made = embed(smiles, seed=7, max_attempts=50)
    return Payload(smiles, 0, 1, seed, 0, numbers, made.positions, "")


def diffusion(model: Path, n: int = 3, protocol: str = "deterministic") -> Call:
    settings = {"model": model_files.digest(model), "n": n, "protocol": protocol}
    return Call("diffuse", settings, 60.0, str(model), memory_limit=4_000_000_000)


def run(guard: Guard, stage: Call, payloads: list[Payload], **limits: Any) -> list[dict[str, Any]]:
    limits = {"time_limit": 60.0, "memory_limit": 4_000_000_000, **limits}
    found = dict(guard.run(stage, payloads, batches=batches(stage, payloads), **limits))
    return [found[i] for i in range(len(payloads))]


def path_of(outcome: dict[str, Any]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = outcome["rows"]["paths"]["positions"]
    return found


def test_molecules_of_equal_size_share_batches_of_bounded_work(model: Path) -> None:
    payloads = [payload(s) for s in SMILES]
    sizes = [len(p.numbers) for p in payloads if p.numbers is not None]
    assert sizes == [9, 9, 14, 9, 9, 8]
    assert batches(diffusion(model), payloads) == [[5], [0, 1, 3, 4], [2]]
    many = [payloads[0]] * 150
    assert [len(b) for b in batches(diffusion(model), many)] == [101, 49]
    assert len(batches(replace(diffusion(model), gpu=True), many)) == 1
    assert batches(Call("relax", {}, 60.0), payloads) == [[i] for i in range(6)]


@pytest.mark.parametrize("protocol", ["deterministic", "published"])
def test_a_path_is_the_same_alone_and_in_company(guard: Guard, model: Path, protocol: str) -> None:
    payloads = [payload(s, seed) for seed, s in enumerate(SMILES) if s != "CCS"]
    together = run(guard, diffusion(model, 5, protocol), payloads)
    for one, other in zip(payloads, together, strict=True):
        (alone,) = run(guard, diffusion(model, 5, protocol), [one])
        assert np.abs(path_of(alone) - path_of(other)).max() < SAME_PATH_A
        assert len(path_of(alone)) == 6 * len(one.numbers if one.numbers is not None else ())
    moved = path_of(together[0]).reshape(6, -1, 3)
    assert payloads[0].positions is not None
    assert moved[0] == pytest.approx(payloads[0].positions, abs=1e-6)
    assert np.abs(moved[-1] - moved[0]).max() > 1e-4


def test_an_unknown_element_costs_its_molecule_alone(guard: Guard, model: Path) -> None:
    outcomes = run(guard, diffusion(model), [payload(s) for s in SMILES])
    assert [o["status"] for o in outcomes] == ["ok", "ok", "ok", "input", "ok", "ok"]
    assert "element S is unknown" in outcomes[3]["message"]
    assert "H, C, N, O, F" in outcomes[3]["message"]
    # It was refused before anything was computed; the others share the time out.
    assert outcomes[3]["cpu_s"] == 0.0
    assert outcomes[0]["cpu_s"] > 0.0


def test_nan_from_the_network_is_a_failure_and_no_geometry(guard: Guard, tmp_path: Path) -> None:
    broken = write_model(tmp_path / "broken.safetensors", broken=True)
    (outcome,) = run(guard, diffusion(broken), [payload("CCO")])
    assert outcome["status"] == "not_finite"
    assert "rows" not in outcome


def test_too_little_memory_ends_as_resource(guard: Guard, tmp_path: Path) -> None:
    # Long enough for the guard to look several times while it runs.
    wide = write_model(tmp_path / "wide.safetensors", hidden=256, layers=4)
    octanes = [payload("CCCCCCCC", seed) for seed in range(2)]
    outcomes = run(guard, diffusion(wide, n=100), octanes, memory_limit=100_000_000)
    assert [o["status"] for o in outcomes] == ["resource"] * 2
    assert [o["attempts"] for o in outcomes] == [2, 2]
    assert "memory_limit" in outcomes[0]["message"]


def test_a_model_that_changed_since_the_plan_is_refused(guard: Guard, model: Path) -> None:
    stage = diffusion(model)
    write_model(model, seed=1)
    with pytest.raises(CampaignError, match=r"little\.safetensors' has changed since the run"):
        run(guard, stage, [payload("CCO")])
    model.unlink()
    with pytest.raises(CampaignError, match="neither a file nor a shipped model"):
        run(guard, stage, [payload("CCO")])
    # The guard is as good as new.
    write_model(model)
    assert run(guard, diffusion(model), [payload("CCO")])[0]["status"] == "ok"


def test_a_line_of_energies_begins_and_ends_with_the_path_s(
    guard: Guard, tmp_path: Path, require_engine: Callable[[str], None]
) -> None:
    require_engine("tblite")
    start = payload("CCO")
    assert start.positions is not None
    swell = np.array([1.0, 1.01, 1.03, 1.04])[:, None, None]
    start = replace(
        start,
        frames=(swell * start.positions).astype(np.float32),
        checkpoint=str(tmp_path / "state.npz"),
    )
    settings = {
        "level": "GFN2-xTB", "program": "tblite", "electronic_temperature": 300.0,
        "save_forces": False, "line": True,
    }  # fmt: skip
    (outcome,) = run(guard, Call("single_points", settings, 60.0), [start])
    row = outcome["rows"]["single_points"]
    energies, line = row["energy_eV"], row["line_energy_eV"]
    assert len(energies) == len(line) == 4
    assert line[[0, -1]] == pytest.approx(energies[[0, -1]], abs=SAME_ENERGY_EV)
    # Its inner points are at 1.0133 and 1.0267.
    assert energies[1] < line[1] < line[2] < energies[2]
    assert len(row["forces"]) == 0


STAGES = """
[[stages]]
kernel = "embed"
[[stages]]
kernel = "mmff"
[[stages]]
name = "gfn2"
kernel = "relax"
[[stages]]
name = "diffused"
kernel = "diffuse"
from = "mmff"
model = "little.safetensors"
n = [2, 4]
[[stages]]
name = "relaxed"
kernel = "relax"
[[stages]]
name = "energies"
kernel = "single_points"
from = "diffused"
save_forces = true
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tblite", reason="tblite is not installed")
    folder = tmp_path_factory.mktemp("study")
    write_model(folder / "little.safetensors")
    campaign = write_campaign(folder, ["CCO", "CCS", "CC", "COC"], stages=STAGES)
    summary = complete(campaign)
    assert summary["complete"]
    return campaign


def test_a_campaign_with_diffusion_accounts_for_every_item(study: Path) -> None:
    counts = {c.stage: (c.ok, c.failed, c.upstream) for c in standing_of(study).counts}
    done, cut = (3, 1, 0), (3, 0, 1)
    assert counts == {
        "embed": (4, 0, 0), "mmff": (4, 0, 0), "gfn2": (4, 0, 0),
        "diffused-2": done, "diffused-4": done, "relaxed-2": cut, "relaxed-4": cut,
        "energies-2": cut, "energies-4": cut,
    }  # fmt: skip
    words = "\n".join(explain(load_campaign(study), store_of(study), "CCS"))
    assert "diffused-4: failed (input): element S is unknown to model 'little'" in words
    assert "energies-4: never started, since 'diffused-4' failed" in words


def test_energies_along_the_path_meet_those_of_the_relaxations(study: Path) -> None:
    found = (
        store_of(study)
        .query(
            "SELECT d.initial_energy_eV AS start, r.initial_energy_eV AS finish, p.n, "
            "min_by(s.energy_eV, s.step) AS first, max_by(s.energy_eV, s.step) AS last, count(*) "
            "AS frames FROM paths p JOIN single_points s ON s.parent_key = p.key "
            "JOIN relaxations r ON r.parent_key = p.key "
            "JOIN relaxations d ON d.parent_key = p.parent_key AND d.stage = 'gfn2' GROUP BY ALL"
        )
        .to_pylist()
    )
    assert len(found) == 6
    for row in found:
        assert row["frames"] == row["n"] + 1
        # The same geometries to the seventh digit, computed by different stages.
        assert row["first"] == pytest.approx(row["start"], abs=1e-4)
        assert row["last"] == pytest.approx(row["finish"], abs=1e-4)


def test_a_diffusion_s_trajectory_carries_its_energies(study: Path) -> None:
    store = store_of(study)
    row = store.query("SELECT key, parent_key FROM single_points LIMIT 1").to_pylist()[0]
    path, points = store.trajectory(row["parent_key"]), store.trajectory(row["key"])
    assert len(path) == len(points)
    assert [atoms.info["n"] for atoms in path] == list(range(len(path) - 1, -1, -1))
    assert path[0].info["level"] == "GFN2-xTB"
    for one, other in zip(path, points, strict=True):
        assert one.get_potential_energy() == other.get_potential_energy()
        assert np.array_equal(one.get_forces(), other.get_forces())
        assert np.array_equal(one.positions, other.positions)
    # Forces are the slope of the energy from frame to frame, to first order.
    a, b = path[0], path[1]
    work = -np.sum((a.get_forces() + b.get_forces()) / 2 * (b.positions - a.positions))
    assert b.get_potential_energy() - a.get_potential_energy() == pytest.approx(
        work, rel=0.1, abs=1e-4
    )


def test_a_diffusion_without_energies_is_a_trajectory_too(study: Path) -> None:
    store = store_of(study)
    snapshot = store.snapshot()
    assert not snapshot.shards
    key = store.query("SELECT key FROM paths WHERE n = 4 LIMIT 1").to_pylist()[0]["key"]
    assert len(store.trajectory(key)) == 5
    geometry = store.query(
        f"SELECT positions FROM geometries WHERE key = '{key}' AND positions IS NOT NULL"
    ).to_pylist()[0]["positions"]
    assert store.trajectory(key)[-1].positions == pytest.approx(np.array(geometry), abs=1e-6)


def test_going_on_computes_nothing_again(study: Path) -> None:
    summary = complete(study)
    assert summary["done_now"] == 0


def test_paths_come_out_as_extended_xyz(study: Path, tmp_path: Path) -> None:
    import ase.io

    from orchestrator.export import export

    path = export(store_of(study), "extxyz", tmp_path / "p.xyz", stage="diffused-2", frames=True)
    frames = ase.io.read(path, ":")
    assert isinstance(frames, list)
    assert [atoms.info["n"] for atoms in frames] == [2, 1, 0] * 3
    assert {atoms.info["model"] for atoms in frames} == {"little"}


def test_paths_and_energies_come_out_whole_in_other_formats(study: Path, tmp_path: Path) -> None:
    import duckdb

    from orchestrator import hdf5
    from orchestrator.export import export

    store = store_of(study)
    parquet = export(store, "parquet", tmp_path / "tables")
    whole = export(store, "hdf5", tmp_path / "all.h5")
    for table in ("paths", "single_points"):
        rows = store.read(table)
        assert len(rows) == 6
        ((count,),) = duckdb.sql(f"SELECT count(*) FROM '{parquet}/{table}.parquet'").fetchall()
        with hdf5.TableFile(whole, "all") as file:
            again = file.read(table)
        assert len(again) == count == 6
        frames = "positions" if table == "paths" else "forces"
        assert len(again[frames].values) == len(rows[frames].values) > 0


def test_the_model_and_its_settings_are_told(study: Path) -> None:
    row = store_of(study).query("SELECT DISTINCT model, model_digest, protocol FROM paths")
    (found,) = row.to_pylist()
    assert found == {
        "model": "little",
        "model_digest": model_files.digest(study.parent / "little.safetensors"),
        "protocol": "deterministic",
    }
    methods = store_of(study).query("SELECT DISTINCT method FROM geometries").to_pylist()
    assert {"method": "diffusion little n=4"} in methods


def test_a_store_without_diffusion_answers_as_before(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "old.basin", "old")
    for table in ("paths", "single_points", "generations"):
        assert not len(store.read(table))
        assert store.query(f"SELECT count(*) AS n FROM {table}").to_pylist() == [{"n": 0}]


def test_single_points_of_a_path_cost_as_many_frames() -> None:
    assert Estimate("single_points", 51).seconds(20) == pytest.approx(
        51 * Estimate("single_points").seconds(20)
    )
    assert Estimate("diffuse", 21).seconds(40) == pytest.approx(
        4 * Estimate("diffuse", 21).seconds(20)
    )
