"""The MPI program: the same ladder from one process or several, stopped, killed, and by hand."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.sampling import exchange_program
from kernels.sampling.replica_exchange import (
    ExchangeSettings,
    SingleProcess,
    request_arrays,
    run_exchange,
    write_npz,
)
from tests.conftest import engine_missing

ROOT = Path(__file__).resolve().parents[3]
WATER = "3\n\nO 0.0 0.0 0.0\nH 0.96 0.0 0.0\nH -0.24 0.93 0.0\n"
NUMBERS = np.array([8, 1, 1], dtype=np.uint8)
POSITIONS = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
GFN2 = {"level": "GFN2-xTB", "program": "tblite"}


@pytest.fixture
def mpiexec() -> str:
    """Return the launcher of mpi4py's own MPI library."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("mpiexec", path=beside + os.pathsep + os.environ.get("PATH", ""))
    if importlib.util.find_spec("mpi4py") is None or found is None:
        engine_missing("mpi", "mpi4py or mpiexec is not installed (pip install mpi4py mpich)")
    assert found is not None
    return found


def request(folder: Path, steps: int) -> tuple[Path, Any]:
    """Write a request and return its file and the result of one process without MPI."""
    settings = ExchangeSettings((100.0, 180.0, 320.0, 550.0), steps, 8, save_every=4, swap_every=4)
    asked = request_arrays(NUMBERS, POSITIONS, settings, 5, GFN2)
    write_npz(folder / "request.npz", asked)
    whole = run_exchange(asked, SingleProcess(), saved=folder / "whole.npz")
    assert whole is not None
    assert len({tuple(row) for row in whole["walkers"].tolist()}) > 1
    return folder / "request.npz", whole


def command(mpiexec: str, processes: int, *arguments: str | Path) -> list[str]:
    program = [sys.executable, "-m", "kernels.sampling.exchange_program"]
    return [mpiexec, "-n", str(processes), *program, *map(str, arguments)]


def same(path: Path, whole: Any) -> bool:
    with np.load(path) as result:
        return set(result.files) == set(whole) and all(
            result[name].tobytes() == whole[name].tobytes()
            for name in whole
            if name not in ("compute_s", "total_s", "spent_s")
        )


def test_three_processes_give_the_numbers_of_one_also_when_stopped_between(
    mpiexec: str, tmp_path: Path
) -> None:
    asked, whole = request(tmp_path, 40)
    result, stop = tmp_path / "result.npz", tmp_path / "stop"
    files = ["--request", asked, "--result", result, "--stop-file", stop]
    stop.touch()
    done = subprocess.run(command(mpiexec, 2, *files), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == exchange_program.STOPPED, done.stderr
    assert not result.exists()
    stop.unlink()
    done = subprocess.run(command(mpiexec, 3, *files), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(result, whole)
    with np.load(result) as arrays:
        assert arrays["total_s"].shape == (3,)
    # The state was for going on; nothing is left of it.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["request.npz", "result.npz"]


@pytest.mark.slow
def test_a_killed_program_goes_on_from_its_last_saved_segment(mpiexec: str, tmp_path: Path) -> None:
    asked, whole = request(tmp_path, 2_000)
    result, saved = tmp_path / "result.npz", tmp_path / "state.npz"
    files = ["--request", asked, "--result", result, "--saved", saved, "--save-every-s", "0.2"]
    kills = 0
    for _ in range(3):
        program = subprocess.Popen(command(mpiexec, 2, *files), cwd=ROOT, start_new_session=True)
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        deadline = time.monotonic() + 60
        while program.poll() is None and time.monotonic() < deadline:
            if saved.exists() and saved.stat().st_mtime_ns != before:
                kills += 1
                break
            time.sleep(0.02)
        assert program.poll() is None
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
    assert kills >= 1
    assert not result.exists()
    done = subprocess.run(command(mpiexec, 3, *files), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(result, whole)


def test_by_hand_it_prints_a_table_and_writes_the_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ase.io import read

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exchange_program, "_communicator", SingleProcess)
    Path("water.xyz").write_text(WATER)
    short = ["--steps", "40", "--burn-in", "10", "--swap-every", "5", "--save-every", "20"]
    arguments = ["water.xyz", "--relax", "--temperatures", "50:200:3", *short]
    stopped = exchange_program.main([*arguments, "--max-seconds", "0"])
    assert stopped == exchange_program.STOPPED
    assert "goes on from water-exchange.state.npz" in capsys.readouterr().err
    assert exchange_program.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "   100.0" in printed
    assert "parallel efficiency" in printed
    frames: Any = read("water-exchange.extxyz", index=":")
    assert len(frames) == 3 * 3
    assert [frame.info["step"] for frame in frames[:3]] == [0, 20, 40]
    with np.load("water-exchange.npz") as arrays:
        assert arrays["temperatures"] == pytest.approx([50, 100, 200])
        assert frames[5].get_potential_energy() == pytest.approx(arrays["energies"][1, 40])
        assert np.abs(frames[5].positions - arrays["frames"][1, 2]).max() < 1e-5
    assert not Path("water-exchange.state.npz").exists()


def test_a_failure_is_in_the_result_with_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exchange_program, "_communicator", SingleProcess)
    settings = ExchangeSettings((100.0, 200.0), 10, 0)
    asked = request_arrays(NUMBERS, np.zeros((3, 3)), settings, 5, GFN2)
    write_npz(tmp_path / "request.npz", asked)
    result = tmp_path / "result.npz"
    arguments = ["--request", str(tmp_path / "request.npz"), "--result", str(result)]
    assert exchange_program.main(arguments) == 1
    with np.load(result) as arrays:
        assert arrays["error_class"].tobytes() == b"CollapsedError"
        assert b"collapsed" in arrays["error"].tobytes()
    assert "CollapsedError" in capsys.readouterr().err


def test_the_entry_of_jobs_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "jobs/replica_exchange.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "mpiexec -n 18 python jobs/replica_exchange.py" in done.stdout
