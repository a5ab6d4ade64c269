"""Chains as stages run them: stopped, killed and taken up again they are the same, bit by bit."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.diffusion import model_files
from kernels.embedding import embed
from kernels.errors import CollapsedError
from kernels.graph import parse_smiles
from orchestrator.frame_file import SavedFrames, frames_path
from orchestrator.kernel_calls import Call, Payload, batches, call
from tests.conftest import engine_missing
from tests.orchestrator.tiny_models import write_model

GFN2 = {"level": "GFN2-xTB", "program": "tblite", "electronic_temperature": 300.0}
STEPS = 60


def payload(folder: Path, smiles: str, seed: int = 1, n: int = 0) -> Payload:
    made = embed(smiles, seed=7, max_attempts=50)
    name = f"{smiles}-{seed}-{n}".encode().hex().ljust(32, "0")[:32]
    return Payload(
        smiles, 0, 1, seed, 0, parse_smiles(smiles).numbers, made.positions,
        str(folder / f"{name}.npz"), settings={"n": n} if n else None,
    )  # fmt: skip


def metropolis(**changes: Any) -> Call:
    settings = {
        **GFN2, "temperature": 300.0, "steps": STEPS, "burn_in": 20, "save_every": 5,
        "step_size": 0.0, "tune": True, "proposal": "gaussian", **changes,
    }  # fmt: skip
    return Call("metropolis", settings, checkpoint_every=0.0)


def diffusion(model: Path, steps: int = STEPS, **changes: Any) -> Call:
    settings = {
        "model": model_files.digest(model), "n": 1, "steps": steps, "burn_in": 5, "save_every": 4,
        **changes,
    }  # fmt: skip
    return Call("diffusion_chain", settings, 0.0, str(model), memory_limit=4_000_000_000)


def never() -> bool:
    return False


def stopping(looks: int) -> Callable[[], bool]:
    """Return what asks to stop from a look on, as a drain or the end of a block does."""
    count = itertools.count()
    return lambda: next(count) >= looks


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Fail where two rows differ in anything but the time they took."""
    for name in one.keys() - {"cpu_s", "wall_s"}:
        assert np.array_equal(one[name], other[name]), name


def rows(outcome: dict[str, Any]) -> dict[str, Any]:
    assert outcome["status"] == "ok", outcome
    row: dict[str, Any] = dict(outcome["rows"]["chains"])
    if isinstance(row["positions"], SavedFrames):
        row["positions"] = row["positions"].read()
    return {
        name: np.nan_to_num(value, nan=-7.0) if isinstance(value, float | np.ndarray) else value
        for name, value in row.items()
    }


def test_a_metropolis_chain_that_is_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, require_engine: Callable[[str], None]
) -> None:
    require_engine("tblite")
    (whole,) = call(metropolis(), [payload(tmp_path / "whole", "CO")], never)
    one = payload(tmp_path / "parts", "CO")
    times = 0
    while True:
        (part,) = call(metropolis(), [one], stopping(2))
        if part["status"] == "ok":
            break
        assert part["status"] == "open"
        with np.load(one.checkpoint) as saved:
            assert int(saved["step"]) > 0
        times += 1
    assert times > 1
    same(rows(whole), rows(part))
    row = rows(part)
    assert len(row["energy_eV"]) == STEPS + 1
    assert len(row["positions"]) == (STEPS // 5 + 1) * 6
    assert 0 < row["acceptance"] < 1
    assert row["cpu_s"] > 0
    assert part["checkpointed"]


def test_a_model_s_moves_are_remembered_across_a_stop(
    tmp_path: Path, require_engine: Callable[[str], None]
) -> None:
    require_engine("tblite")
    digest = model_files.digest(model_files.find("qm9-edm"))
    changes = {
        "proposal": "diffusion", "model": digest, "n": 20, "diffusion_share": 0.9,
        "diffusion_moves": "reverse step", "steps": 30,
    }  # fmt: skip
    stage = replace(metropolis(**changes), model="qm9-edm")
    (whole,) = call(stage, [payload(tmp_path / "whole", "CO")], never)
    one = payload(tmp_path / "parts", "CO")
    (part,) = call(stage, [one], stopping(2))
    assert part["status"] == "open"
    (part,) = call(stage, [one], never)
    same(rows(whole), rows(part))
    row = rows(part)
    assert (row["kind"], row["model"], row["n"]) == ("diffusion metropolis", "qm9-edm", 20)
    (plain,) = call(metropolis(steps=30), [payload(tmp_path / "plain", "CO")], never)
    assert not np.array_equal(rows(plain)["energy_eV"], row["energy_eV"])


def exchange(**changes: Any) -> Call:
    settings = {
        **GFN2, "temperatures": [50.0, 150.0, 400.0], "steps": 40, "burn_in": 10, "save_every": 4,
        "step_size": 0.0, "tune": False, "swap_every": 5,
    }  # fmt: skip
    return Call("replica_exchange", settings, 0.0, **changes)


def ladder(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        rows({"status": outcome["status"], "rows": {"chains": row}})
        for row in outcome["rows"]["chains"]
    ]


def test_replica_exchange_is_a_chain_for_each_temperature_however_it_runs(
    tmp_path: Path, require_engine: Callable[[str], None]
) -> None:
    require_engine("tblite")
    (whole,) = call(exchange(), [payload(tmp_path / "whole", "CO")], never)
    chains = ladder(whole)
    assert [row["temperature_K"] for row in chains] == [50.0, 150.0, 400.0]
    assert [len(row["energy_eV"]) for row in chains] == [41] * 3
    assert [len(row["positions"]) for row in chains] == [11 * 6] * 3
    assert all(0 <= row["swap_acceptance"] <= 1 for row in chains[:2])
    assert chains[2]["swap_acceptance"] == -7.0
    one = payload(tmp_path / "parts", "CO")
    (part,) = call(exchange(), [one], stopping(2))
    assert part["status"] == "open"
    with np.load(one.checkpoint) as saved:
        compute_s, _, wall_s = saved["spent_s"]
        assert 0 < compute_s <= wall_s
    (part,) = call(exchange(), [one], never)
    for row, other in zip(chains, ladder(part), strict=True):
        same(row, other)
        # What the first part took counts.
        assert other["wall_s"] > wall_s
        assert other["cpu_s"] > compute_s / 3
    swaps = whole["rows"]["exchanges"]
    assert [row["next_temperature_K"] for row in swaps[:2]] == [150.0, 400.0]
    # Five segments with swaps after the burn-in, of either pair in turn.
    assert [row["swaps_tried"] for row in swaps] == [3, 2, 0]
    for row, chain in zip(swaps[:2], chains, strict=False):
        assert row["swaps_accepted"] / row["swaps_tried"] == chain["swap_acceptance"]
    assert {row["n_processes"] for row in swaps} == {1}
    assert 0 < swaps[0]["efficiency"] <= 1
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
    if not (importlib.util.find_spec("mpi4py") and shutil.which(mpiexec)):
        engine_missing("mpi", "mpi4py or mpiexec is not installed (pip install mpi4py mpich)")
    over_two = exchange(mpi_prefix=f"{mpiexec} -n 2")
    one = payload(tmp_path / "mpi", "CO")
    (part,) = call(over_two, [one], stopping(1))
    assert part["status"] in ("open", "ok")
    (part,) = call(over_two, [one], never)
    for row, other in zip(chains, ladder(part), strict=True):
        same(row, other)
    assert {row["n_processes"] for row in part["rows"]["exchanges"]} == {2}
    # What is wrong in there is told as if it had been here.
    with pytest.raises(CollapsedError, match="collapsed"):
        call(over_two, [replace(one, positions=0.1 * one.positions)], never)


def test_a_gaussian_chain_ends_where_it_diverges_and_is_a_result(
    tmp_path: Path, require_engine: Callable[[str], None]
) -> None:
    require_engine("tblite")
    settings = {**GFN2, "steps": 5000, "save_every": 2, "step_size": 0.05, "max_energy": 1.0}
    stage = Call("gaussian_chain", settings, 60.0)
    (outcome,) = call(stage, [payload(tmp_path, "CO")], never)
    row = rows(outcome)
    assert row["diverged"]
    assert "above the start" in row["divergence"]
    assert row["n_steps"] + 1 == len(row["energy_eV"]) < 100
    assert len(row["positions"]) == (row["n_steps"] // 2 + 1) * 6
    assert row["energy_eV"][-1] - row["energy_eV"][0] > 1.0
    assert (row["energy_eV"][1:-1] - row["energy_eV"][0] < 1.0).all()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "little.safetensors")


def test_diffusion_chains_of_several_n_go_on_together(tmp_path: Path, model: Path) -> None:
    def some(where: str) -> list[Payload]:
        (tmp_path / where).mkdir()
        sizes = (("CO", 3), ("CO", 30), ("CCO", 3))
        return [payload(tmp_path / where, s, k, n) for k, (s, n) in enumerate(sizes)]

    stage = diffusion(model)
    assert batches(stage, some("count")) == [[0, 1, 2]]
    whole = call(stage, some("whole"), never)
    parts = some("parts")
    open_ = call(stage, parts, stopping(1))
    assert [o["status"] for o in open_] == ["open"] * 3
    steps = [_steps(p) for p in parts]
    assert steps[0] == steps[1] == steps[2]
    assert 0 < steps[0][-1] < STEPS
    made = call(stage, parts, never)
    for one, other in zip(whole, made, strict=True):
        same(rows(one), rows(other))
    assert [rows(o)["n"] for o in made] == [3, 30, 3]
    assert not np.array_equal(rows(made[0])["positions"], rows(made[1])["positions"])


def _steps(payload: Payload) -> list[int]:
    with np.load(payload.checkpoint) as saved:
        steps: list[int] = saved["step"].tolist()
    return steps


def test_a_kill_between_two_saves_leaves_chains_that_agree(tmp_path: Path, model: Path) -> None:
    stage = diffusion(model, steps=200)
    whole = call(stage, [payload(tmp_path / "whole", "CO", k, 5) for k in range(2)], never)
    parts = [payload(tmp_path / "parts", "CO", k, 5) for k in range(2)]
    call(stage, parts, stopping(1))
    # As if it had been killed when one chain was saved again, and the other was not yet.
    older = Path(parts[1].checkpoint).read_bytes(), frames_path(Path(parts[1].checkpoint))
    frames = older[1].read_bytes()
    call(stage, parts, stopping(1))
    Path(parts[1].checkpoint).write_bytes(older[0])
    older[1].write_bytes(frames + b"torn")
    assert _steps(parts[0])[-1] > _steps(parts[1])[-1]
    for one, other in zip(whole, call(stage, parts, never), strict=True):
        same(rows(one), rows(other))


def test_chains_that_did_not_begin_together_do_not_wait_for_each_other(
    tmp_path: Path, model: Path
) -> None:
    stage = diffusion(model)
    parts = [payload(tmp_path / "parts", "CO", k, 5) for k in range(2)]
    call(stage, parts[:1], stopping(1))
    made = call(stage, parts, never)
    assert [rows(o)["n_steps"] for o in made] == [STEPS, STEPS]
    (alone,) = call(stage, [payload(tmp_path / "alone", "CO", 0, 5)], never)
    same(rows(alone), rows(made[0]))


def test_an_unknown_element_costs_its_own_chain(tmp_path: Path, model: Path) -> None:
    stage = diffusion(model)
    made = call(stage, [payload(tmp_path, "CO", n=3), payload(tmp_path, "CS", n=3)], never)
    assert [o["status"] for o in made] == ["ok", "input"]
    assert "[16]" in made[1]["message"]


def test_energies_of_every_so_manieth_frame(
    tmp_path: Path, require_engine: Callable[[str], None]
) -> None:
    require_engine("tblite")
    start = payload(tmp_path, "CO")
    assert start.positions is not None
    frames = start.positions * np.linspace(1.0, 1.02, 8)[:, None, None]
    start = replace(start, frames=frames.astype(np.float32))
    wanted = {**GFN2, "line": False, "save_forces": False}

    def energies(**changes: Any) -> Any:
        (outcome,) = call(Call("single_points", {**wanted, **changes}, 60.0), [start], never)
        row = outcome["rows"]["single_points"]
        assert not len(row["forces"])
        return row["energy_eV"]

    every, third = energies(), energies(every=3)
    assert np.isfinite(every).all()
    assert np.isfinite(third).tolist() == [True, False, False] * 2 + [True, False]
    assert third[::3] == pytest.approx(every[::3], abs=1e-6)
