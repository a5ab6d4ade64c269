"""Chains in a whole campaign: killed and resumed, asked for in SQL, and written to files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest

from orchestrator.compact import compact
from orchestrator.errors import StoreError
from orchestrator.export import export
from orchestrator.store import Store
from orchestrator.tables import query, trajectory
from tests.orchestrator.run_fixtures import (
    CIRCUMSTANCES,
    by_key,
    complete,
    kill,
    running,
    standing_of,
    store_of,
    until,
    write_campaign,
)
from tests.orchestrator.store_fixtures import Records, new_store
from tests.orchestrator.tiny_models import write_model

SMILES = ["CO", "CCO"]
STAGES = """
[[stages]]
kernel = "embed"
[[stages]]
kernel = "metropolis"
temperatures = [50, 300]
steps = 500
save_every = 5
[[stages]]
kernel = "gaussian_chain"
from = "embed"
step_size = 0.05
[[stages]]
kernel = "diffusion_chain"
from = "embed"
model = "little.safetensors"
n = [3, 9]
steps = 40
save_every = 2
[[stages]]
name = "energies"
kernel = "single_points"
every = 5
"""


def campaign(folder: Path, run: str = "") -> Path:
    path = write_campaign(folder, SMILES, stages=STAGES, run=run)
    write_model(folder / "little.safetensors")
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the campaign of a run that nobody disturbed."""
    path = campaign(tmp_path_factory.mktemp("chains"))
    complete(path, workers=1)
    assert [c.ok for c in standing_of(path).counts] == [2] * 8
    return path


@pytest.fixture
def store(undisturbed: Path) -> Store:
    return store_of(undisturbed)


def saved_metropolis(path: Path) -> bool:
    """Tell whether a Metropolis chain is well under way."""
    for file in (path.parent / "store" / "checkpoints").rglob("*.npz"):
        if not file.name.startswith("."):
            # One that is sealed meanwhile is gone.
            with contextlib.suppress(FileNotFoundError), np.load(file) as saved:
                if "moved" in saved and int(saved["step"]) > 50:
                    return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["everything", "child"])
def test_killed_chains_end_as_undisturbed_ones_do(
    tmp_path: Path, store: Store, require_engine: Callable[[str], None], kind: str
) -> None:
    require_engine("tblite")
    path = campaign(tmp_path, run='checkpoint_every = "1 ms"')
    with running(path, workers=1) as run:
        until(lambda: saved_metropolis(path), 60, run.output, every=0.005)
        for victim in run.children() if kind == "child" else run.processes():
            kill(victim)
        if kind == "everything":
            run.wait()
        else:
            assert run.wait() == 0, run.output()
        run.assert_gone()
    if kind == "everything":
        complete(path, workers=1)
    mine = store_of(path)
    for table in ("chains", "single_points"):
        one, other = (by_key(s, table, sorted(CIRCUMSTANCES)) for s in (mine, store))
        assert one == other, table
    assert not [f for f in (mine.path / "checkpoints").rglob("*.*") if f.is_file()]


def answer(store: Store, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = query(store, sql).to_pylist()
    return found


def test_sql_has_a_row_per_chain_and_a_row_per_energy(store: Store) -> None:
    chains = answer(store, "SELECT * FROM chains ORDER BY stage")
    assert [c["kind"] for c in chains] == ["diffusion"] * 4 + ["gaussian"] * 2 + ["metropolis"] * 4
    assert {c["temperature_K"] for c in chains} == {None, 50.0, 300.0}
    assert {c["diverged"] for c in chains if c["kind"] == "gaussian"} == {True}
    assert "positions" not in chains[0]
    (lists,) = answer(
        store, "SELECT numbers, positions, energy_eV FROM chains WHERE kind = 'metropolis' LIMIT 1"
    )
    assert len(lists["positions"]) == 101 * len(lists["numbers"])
    assert len(lists["energy_eV"]) == 501
    energies = answer(
        store,
        "SELECT c.key, min(s.step) AS first, max(s.step) AS last, avg(s.energy_eV) AS mean, "
        "any_value(c.energy_eV) AS own FROM chains c JOIN chain_steps s ON s.key = c.key "
        "WHERE c.kind = 'metropolis' AND numbers IS NOT NULL GROUP BY c.key",
    )
    assert [(e["first"], e["last"]) for e in energies] == [(0, 500)] * 4
    for one in energies:
        assert one["mean"] == pytest.approx(np.mean(one["own"]), abs=1e-9)
    frames = answer(
        store,
        "SELECT c.n, count(*) AS frames, count(p.energy_eV) AS known FROM chains c "
        "JOIN single_points p ON p.parent_key = c.key GROUP BY c.key, c.n",
    )
    assert sorted((f["n"], f["frames"], f["known"]) for f in frames) == [
        *[(3, 21, 5)] * 2,
        *[(9, 21, 5)] * 2,
    ]
    with pytest.raises(StoreError, match="chain_steps"):
        query(store, "SELECT * FROM chainz")


def test_frames_of_chains_come_with_their_steps_and_energies(store: Store, tmp_path: Path) -> None:
    (hot,) = answer(
        store,
        "SELECT key, energy_eV, numbers FROM chains WHERE stage = 'metropolis-300K' "
        "ORDER BY n_atoms LIMIT 1",
    )
    path = trajectory(store, hot["key"])
    assert [atoms.info["step"] for atoms in path] == list(range(0, 501, 5))
    assert [a.get_potential_energy() for a in path] == hot["energy_eV"][::5]
    assert path[0].info["temperature_K"] == 300.0
    (cold,) = answer(store, "SELECT key FROM chains WHERE n = 3 ORDER BY n_atoms LIMIT 1")
    walk = trajectory(store, cold["key"])
    assert [atoms.info["step"] for atoms in walk] == list(range(0, 41, 2))
    assert [atoms.calc is not None for atoms in walk[:6]] == [True] + [False] * 4 + [True]
    written = export(store, "extxyz", tmp_path / "hot.xyz", stage="metropolis-300K", frames=True)
    frames = ase.io.read(written, ":")
    assert len(frames) == 202
    assert frames[1].info["step"] == 5
    assert frames[1].positions == pytest.approx(
        (path if len(frames[0]) == len(path[0]) else frames)[1].positions, abs=1e-6
    )
    with pytest.raises(StoreError, match="add --frames"):
        export(store, "extxyz", tmp_path / "one.xyz", stage="metropolis-300K")


def test_a_store_from_before_there_were_chains_has_none(tmp_path: Path) -> None:
    old = new_store(tmp_path / "old")
    records = Records()
    records.relaxed("ethanol", "CCO")
    assert "chains" not in records.tables
    records.seal(old)
    for _ in range(2):
        for table in ("chains", "chain_steps"):
            assert answer(old, f"SELECT * FROM {table}") == []
        assert len(answer(old, "SELECT * FROM relaxations")) == 1
        assert len(trajectory(old, answer(old, "SELECT key FROM relaxations")[0]["key"])) == 5
        # The same once more, with its rows in segments.
        compact(old)
