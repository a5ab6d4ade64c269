"""Stopping from anywhere: the driver, the jobs that would follow it, and what it left behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from orchestrator import chain, lock, progress
from orchestrator.chain import ChainFile
from orchestrator.progress import ProgressFile
from orchestrator.stop import left_over, stop
from orchestrator.store import Store
from tests.cluster.slurm_cluster import SlurmCluster
from tests.orchestrator.run_fixtures import standing_of, until, write_campaign
from tests.orchestrator.test_submit import CLUSTER, basin, site_file


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Store.create(tmp_path / "store", "stops").path


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM whose queue is a file with a line for each job, such as `12 PENDING`."""
    (tmp_path / "bin").mkdir()
    jobs = tmp_path / "jobs"
    answers = {
        "sbatch": "exit 1",
        "squeue": f"cat {jobs}",
        "scancel": f'for j in $*; do sed -i "/^$j /d" {jobs}; done',
    }
    for name, text in answers.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return jobs


def said(store: Path, *, now: bool = False, site: str = "local") -> list[str]:
    words: list[str] = []
    stop(store, now=now, site=site, say=words.append)
    return words


def test_a_driver_job_that_waits_is_cancelled(store: Path, queue: Path) -> None:
    queue.write_text("11 RUNNING\n12 PENDING\n13 PENDING\n")
    chain.write(store, ChainFile("slurm", "driver.sh", ["10", "12"]))
    assert said(store) == ["cancelled driver job 12, which was pending"]
    assert queue.read_text() == "11 RUNNING\n13 PENDING\n", "only our own"
    assert said(store) == [f"nothing works on {store}"]


@pytest.mark.parametrize("now", [False, True])
def test_the_driver_ends_by_itself_and_is_waited_for(
    store: Path, queue: Path, monkeypatch: pytest.MonkeyPatch, now: bool
) -> None:
    monkeypatch.setenv(lock.DRIVER_JOB, "11")
    queue.write_text("11 RUNNING\n12 PENDING\n")
    chain.write(store, ChainFile("slurm", "driver.sh", ["11", "12"]))
    held = lock.DriverLock(store, "r")
    heard: list[str] = []

    def drive() -> None:
        until(lambda: lock.stop_requested(store, "r"))
        heard.append(lock.stop_requested(store, "r"))
        until(lambda: queue.read_text() == "11 RUNNING\n")
        held.release()

    driver = threading.Thread(target=drive)
    driver.start()
    words = said(store, now=now)
    driver.join()
    assert heard == ["now" if now else "drain"]
    assert words[0] == "cancelled driver job 12, which was pending"
    assert words[1].startswith(f"asked process {os.getpid()} on ")
    assert words[1].endswith("to stop at once" if now else "to finish its running items")
    assert words[2].startswith("stopped; finished work is kept")
    assert queue.read_text() == "11 RUNNING\n", "the driver's own job ends with it"


def test_blocks_of_a_dead_driver_are_told_where_they_cannot_be_cancelled(store: Path) -> None:
    blocks = [{"job_id": "21", "pool": "cpu", "state": "running"},
              {"job_id": "20", "pool": "cpu", "state": "ended"},
              {"job_id": "waiting-cpu-1", "pool": "cpu", "state": "pending"}]  # fmt: skip
    progress.write(store, ProgressFile(run_id="r", site="gone.toml", blocks=blocks))
    assert [b["job_id"] for b in left_over(store)] == ["21"]
    (words,) = said(store)
    assert words.startswith("jobs 21 of the last driver may be left; cancel them yourself: ")
    assert "gone.toml" in words


def test_blocks_that_could_not_be_cancelled_are_tried_again(
    store: Path, queue: Path, tmp_path: Path
) -> None:
    blocks = [{"job_id": "21", "pool": "cpu", "state": "running"}]
    site = str(site_file(tmp_path, 'base = "slurm"\n[pools.cpu]\ncores_per_node = 2\n'))
    progress.write(store, ProgressFile(run_id="r", site=site, blocks=blocks))
    assert said(store) == ["pool cpu: 21 could not be cancelled; do it yourself"]
    queue.write_text("")
    assert said(store) == ["pool cpu: 21 of a driver that died: cancelled, or gone already"]
    assert said(store) == [f"nothing works on {store}"]


@pytest.mark.slow
def test_blocks_of_a_killed_driver_are_cancelled(
    tmp_path: Path, slurm_cluster: SlurmCluster
) -> None:
    campaign = write_campaign(
        tmp_path,
        ["C" * n + "O" for n in range(1, 40)],
        stages='[[stages]]\nkernel = "rehearse"\nseconds = "3 s"\n',
        run='bundle_time = "6 s"\nseal_every = "1 s"\n',
    )
    store = tmp_path / "store"
    done = basin("run", campaign, "--site", site_file(tmp_path, CLUSTER), "--detach")
    assert done.returncode == 0, done.stderr

    def at_work() -> bool:
        last = progress.read(store)
        return last is not None and any(b["state"] == "running" for b in last.blocks)

    until(at_work, 60, slurm_cluster.words, every=0.5)
    os.kill(int(lock.who(store)["pid"]), signal.SIGKILL)
    until(lambda: not lock.is_running(store))
    left = [str(b["job_id"]) for b in left_over(store)]
    shown = basin("status", store).stdout
    assert f"its jobs {', '.join(left)} may be left: `basin stop {store}`" in shown
    stopped = basin("stop", store)
    assert stopped.returncode == 0, stopped.stderr
    assert f"pool cpu: {', '.join(left)} of a driver that died" in stopped.stdout
    slurm_cluster.assert_empty()
    assert basin("stop", store).stdout == f"nothing works on {store}\n"
    (counts,) = standing_of(campaign).counts
    assert counts.planned == 39
    assert counts.failed == 0
