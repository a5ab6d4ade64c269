"""DFT that is killed, stopped or cut off: it goes on from its last step, and leaves nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kernels.calculators import DFT, make_calculator
from kernels.embedding import embed
from kernels.relaxation import RelaxSettings, RelaxState, relax
from kernels.units import HARTREE_TO_EV
from orchestrator.guard import CUT, Guard
from orchestrator.kernel_calls import Call, Payload
from tests.orchestrator.run_fixtures import (
    by_key,
    complete,
    kill,
    running,
    store_of,
    until,
    write_campaign,
)

pytestmark = pytest.mark.slow

# Of water, whose step takes half a second: seven steps or so.
FMAX = 0.002
SAME_EV = 1e-8 * HARTREE_TO_EV
LIMIT_S = 100.0


def undisturbed(positions: np.ndarray[Any, Any], program: str) -> RelaxState:
    """Relax water in this process, and at one go."""
    calculator = make_calculator(DFT, program=program)
    return relax(np.array([8, 1, 1], np.uint8), positions, calculator, RelaxSettings(fmax=FMAX))


def saved(folder: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    """Return the state of the relaxation under way, once there is one."""
    for path in folder.rglob("*.npz"):
        if not path.name.startswith("."):
            with np.load(path) as arrays:
                return {**arrays, "path": np.array(str(path))}
    return None


def is_at(folder: Path, frames: int) -> Callable[[], dict[str, np.ndarray[Any, Any]] | None]:
    """Return what gives the saved state once it holds so many frames."""

    def look() -> dict[str, np.ndarray[Any, Any]] | None:
        state = saved(folder)
        return state if state is not None and len(state["energies"]) >= frames else None

    return look


def assert_clean(scratch: Path) -> None:
    """Fail unless programs that worked there end by themselves, and their folders go."""

    def left() -> list[str]:
        words = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
        return [w for w in words if str(scratch) in w] + [p.name for p in scratch.glob("basin-*")]

    until(lambda: not left(), 30.0, lambda: str(left()))


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder for temporary files; a short name, since Parsl has its sockets there."""
    with tempfile.TemporaryDirectory(prefix="basin-test-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.parametrize("program", ["pyscf", "psi4"])
def test_a_killed_dft_campaign_ends_as_an_undisturbed_one(
    tmp_path: Path, scratch: Path, program: str, require_engine: Callable[[str], None]
) -> None:
    require_engine(program)
    campaign = write_campaign(
        tmp_path,
        ["O"],
        stages='[[stages]]\nkernel = "embed"\n[[stages]]\nkernel = "relax"\n'
        # As long as can be.
        f'level = "{DFT}"\nprogram = "{program}"\nfmax = {FMAX}\ninitial_hessian = "unit"\n',
        run='checkpoint_every = "10 ms"',
    )
    states = tmp_path / "store" / "checkpoints"
    with running(campaign, workers=1) as run:
        until(is_at(states, 2), LIMIT_S, run.output)
        for child in run.children():
            kill(child)
        state = until(is_at(states, 4), LIMIT_S, run.output)
        for process in run.processes():
            kill(process)
        run.wait()
        run.assert_gone()
    assert_clean(scratch)
    state = saved(states) or state
    if program == "pyscf":
        assert state["scf/occupied_0"].shape[1] == 5, "no density was saved"
    assert state["memory/hessian"].shape == (9, 9)
    # A mark that only a relaxation that starts from this very state carries to its end.
    mark = {"n_evaluations": state["n_evaluations"] + 1000}
    np.savez(str(state["path"]), **{**state, **mark})
    complete(campaign, workers=1)
    assert_clean(scratch)
    store = store_of(campaign)
    (row,) = by_key(store, "relaxations").values()
    (frames,) = by_key(store, "frames").values()
    mine = np.frombuffer(frames["positions"], np.float32).reshape(-1, 3, 3)
    truth = undisturbed(np.array(state["frames"])[0], program)
    assert len(state["energies"]) < truth.steps, "it had ended before it was killed"
    assert np.frombuffer(row["n_steps"], "<i4")[0] == truth.steps
    assert np.frombuffer(row["n_evaluations"], "<i4")[0] == truth.n_evaluations + 1000
    energy = np.frombuffer(row["final_energy_eV"])[0]
    assert energy == pytest.approx(truth.energy, abs=SAME_EV)
    assert np.abs(mine - truth.frames).max() < 1e-4
    # All runs count, and a program that computes outside of its worker, too.
    assert np.frombuffer(row["cpu_s"])[0] > state["spent_cpu_s"] > 0.5


@pytest.mark.parametrize("program", ["pyscf", "psi4"])
def test_dft_at_the_end_of_its_block_is_stopped_or_cut_off_and_goes_on(
    tmp_path: Path,
    program: str,
    require_engine: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_engine(program)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    start = embed("O", seed=1, max_attempts=50)
    settings = {
        "level": DFT, "program": program, "density_fitting": True, "grid": "fine", "fmax": FMAX,
        "optimizer": "BFGS", "max_steps": 50, "max_step_length": 0.2, "save_forces": False,
    }  # fmt: skip
    call = Call("relax", settings, 0.01)
    path = tmp_path / "state.npz"
    payload = Payload("O", 0, 1, 1, 0, start.numbers, start.positions, str(path))

    def outcome(**ends: Any) -> dict[str, Any]:
        guard = Guard()
        limits = {"time_limit": LIMIT_S, "memory_limit": 4 * 10**9}
        try:
            ((_, found),) = guard.run(call, [payload], **limits, **ends)
        finally:
            guard.close()
        return found

    two = is_at(tmp_path, 3)
    assert outcome(should_stop=lambda: two() is not None)["status"] == "open"
    before = saved(tmp_path)
    assert before is not None
    # Changed in place, once the relaxation has been going on for a while.
    end = np.array(np.inf)

    def on_wait(items: Sequence[int], seconds: float) -> None:
        if items and seconds > 0.2:
            end[...] = 0.0

    assert outcome(cut_at=end, on_wait=on_wait)["status"] == CUT
    with np.load(path) as kept:
        assert len(kept["energies"]) >= len(before["energies"])
    ended = outcome()
    assert ended["status"] == "ok"
    truth = undisturbed(start.positions, program)
    row = ended["rows"]["relaxations"]
    assert (row["n_steps"], row["n_evaluations"]) == (truth.steps, truth.n_evaluations)
    assert row["final_energy_eV"] == pytest.approx(truth.energy, abs=SAME_EV)
    assert_clean(tmp_path)
