"""A process in a batch job knows its node, its end, and its devices, whichever way it is told."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from orchestrator import block


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Leave no batch job around the test; return a folder of programs that come first."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "PBS", "BASIN_BLOCK")):
            monkeypatch.delenv(name)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return programs


def program(folder: Path, name: str, text: str) -> None:
    """Put a stand-in for a scheduler's command in place, which counts its calls."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho called >> {folder}/{name}.calls\n{text}\n")
    path.chmod(0o755)


def test_outside_of_a_batch_job_there_is_no_end() -> None:
    assert block.block_end() is None
    assert block.stop_time() is None
    assert block.driver_drain_time() is None


@pytest.mark.parametrize(
    ("left", "seconds"), [("1-02:03:04", 93784), ("1:30:00", 5400), ("2:05", 125)]
)
def test_slurm_is_asked_once(
    bare: Path, monkeypatch: pytest.MonkeyPatch, left: str, seconds: float
) -> None:
    program(bare, "squeue", f"echo {left}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    end = block.block_end()
    assert end == pytest.approx(time.time() + seconds, abs=5)
    assert (bare / "squeue.calls").read_text() == "called\n"


@pytest.mark.parametrize("answer", ["echo UNLIMITED", "echo", "exit 1", "echo nonsense"])
def test_without_an_answer_the_script_is_believed(
    bare: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    program(bare, "squeue", answer)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert block.block_end() is None
    monkeypatch.setenv(block.START, "1000")
    monkeypatch.setenv(block.WALLTIME, "600")
    assert block.block_end() == 1600.0


def test_the_other_nodes_of_a_block_ask_nobody(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare, "squeue", "echo 1:00")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_NODEID", "7")
    monkeypatch.setenv(block.START, "1000")
    monkeypatch.setenv(block.WALLTIME, "600")
    assert block.block_end() == 1600.0
    assert not (bare / "squeue.calls").exists()


def test_pbs_says_when_it_began_and_for_how_long(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"stime": "Fri Nov 20 12:55:33 2026", "Resource_List": {"walltime": "00:05:00"}}
    (bare / "answer").write_text(json.dumps({"pbs_server": "server", "Jobs": {"12.server": job}}))
    program(bare, "qstat", f"cat {bare}/answer")
    monkeypatch.setenv("PBS_JOBID", "12.server")
    began = time.mktime((2026, 11, 20, 12, 55, 33, 0, 0, -1))
    assert block.block_end() == began + 300


@pytest.mark.parametrize("walltime_s", [60.0, 600.0, 3600.0, 86400.0])
@pytest.mark.parametrize("bundle_time_s", [10.0, 300.0])
def test_a_block_drains_before_it_stops_before_it_ends(
    walltime_s: float, bundle_time_s: float
) -> None:
    drain = block.drain_margin(walltime_s, bundle_time_s)
    stop = block.stop_margin(walltime_s)
    assert 0.25 * walltime_s >= drain > stop >= min(7.0, 0.1 * walltime_s)


def test_devices_are_those_that_the_job_was_given() -> None:
    given = block.given_devices({"CUDA_VISIBLE_DEVICES": "2,5", "PATH": "/bin"})
    worker = {block.DEVICES: given, "CUDA_VISIBLE_DEVICES": "1", "ROCR_VISIBLE_DEVICES": "1"}
    assert block.own_devices(worker) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert block.own_devices({"CUDA_VISIBLE_DEVICES": "1"}) == {}


def test_an_amd_device_is_hidden_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = {"CUDA_VISIBLE_DEVICES": "6", "ROCR_VISIBLE_DEVICES": "6"}
    monkeypatch.setattr(block, "AMD_DRIVER", str(tmp_path / "absent"))
    assert block.own_devices(worker) == {}
    # ROCm's documentation of GPU isolation: the second counts among those that the first leaves.
    monkeypatch.setattr(block, "AMD_DRIVER", str(tmp_path))
    assert block.own_devices(worker) == {"CUDA_VISIBLE_DEVICES": "0"}
