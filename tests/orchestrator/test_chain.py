"""Driver jobs one after the other: who follows whom, and when nobody does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import typer

from orchestrator import chain, lock, progress
from orchestrator.chain import chained
from orchestrator.counts import StageCounts
from orchestrator.errors import CampaignError, SiteError
from orchestrator.progress import ProgressFile
from orchestrator.store import Store


class Queue:
    """A scheduler's queue in a folder: one file a job, made and removed by its commands."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        programs = {
            "qsub": 'n=$(ls | wc -l); n=$((n + 1)); echo "$*" > $n.pbs; echo $n.pbs',
            "qstat": 'test -s $4 || { echo "qstat: Unknown Job Id $4" >&2; exit 153; }\n'
            'echo "{\\"pbs_server\\": \\"pbs\\", '
            '\\"Jobs\\": {\\"$4\\": {\\"job_state\\": \\"H\\"}}}"',
            "qdel": "test -s $1 && : > $1",
        }
        for name, text in programs.items():
            path = folder.parent / name
            path.write_text(f"#!/bin/sh\ncd {folder}\n{text}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder.parent}:/usr/bin:/bin")
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        self._patch = monkeypatch

    def enter(self, job: str) -> None:
        """Be inside of a job from now on."""
        self._patch.setenv("PBS_JOBID", job)

    def waiting(self) -> dict[str, str]:
        """Return the jobs that are there and how they were submitted."""
        texts = {path.name: path.read_text().strip() for path in self.folder.iterdir()}
        return {job: text for job, text in sorted(texts.items()) if text}


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    (tmp_path / "pbs").mkdir()
    return Queue(tmp_path / "pbs" / "queue", monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Store.create(tmp_path / "store", "chains").path


def done(store: Path, n: int, *, node_hours: float = 0.0, run_id: str = "r") -> None:
    """Have a driver tell that n tasks are done."""
    counts = StageCounts("gfn2", 9, n, 0, 0, 9 - n)
    progress.write(
        store,
        ProgressFile(run_id=run_id, entries=9, stages=[counts], node_hours=node_hours),
    )


def link(
    store: Path,
    queue: Queue,
    job: str,
    status: int,
    *,
    tasks: int | None = None,
    max_node_hours: float | None = None,
) -> tuple[bool, list[str]]:
    """Go through one driver job; return whether it was the first, and what it said."""
    queue.enter(job)
    words: list[str] = []
    first = False
    try:
        with chained(store, store / "control" / "driver.sh", max_node_hours, words.append) as found:
            first = found
            if tasks is not None:
                done(store, tasks, node_hours=float(tasks))
            if status == 2:
                raise CampaignError("a file that is wrong")
            if status:
                raise typer.Exit(status)
    except (typer.Exit, CampaignError):
        pass
    return first, words


def test_a_job_that_ends_unfinished_is_followed(store: Path, queue: Queue) -> None:
    script = store / "control" / "driver.sh"
    assert link(store, queue, "0.pbs", 5, tasks=3)[0]
    assert queue.waiting() == {"1.pbs": f"-W depend=afternotok:0.pbs {script}"}
    assert chain.living(store) == {"1.pbs": "pending"}
    first, words = link(store, queue, "1.pbs", 5, tasks=6)
    assert not first
    assert words[-1] == "job 2.pbs goes on from here"
    assert queue.waiting()["2.pbs"] == f"-W depend=afternotok:1.pbs {script}"


def test_the_follow_up_is_there_before_the_work_begins(store: Path, queue: Queue) -> None:
    queue.enter("0.pbs")
    with chained(store, store / "control" / "driver.sh", None, print):
        # Whatever kills the driver or its node now, this job starts afterwards.
        assert list(queue.waiting()) == ["1.pbs"]


@pytest.mark.parametrize("status", [0, 2])
def test_nobody_follows_where_nothing_would_change(store: Path, queue: Queue, status: int) -> None:
    _, words = link(store, queue, "0.pbs", status, tasks=3)
    assert queue.waiting() == {}
    assert words == [
        "job 1.pbs goes on where this one ends before all is done",
        "job 1.pbs was not needed and is cancelled",
    ]
    assert chain.living(store) == {}


def test_a_stop_ends_the_chain(store: Path, queue: Queue) -> None:
    held = lock.DriverLock(store, "r")
    lock.request_stop(store, now=False)
    held.release()
    link(store, queue, "0.pbs", 5, tasks=3)
    assert queue.waiting() == {}


def test_node_hours_used_up_end_the_chain(store: Path, queue: Queue) -> None:
    link(store, queue, "0.pbs", 5, tasks=3, max_node_hours=4.0)
    assert list(queue.waiting()) == ["1.pbs"]
    link(store, queue, "1.pbs", 5, tasks=4, max_node_hours=4.0)
    assert "2.pbs" not in queue.waiting()


def test_no_progress_has_one_second_chance(store: Path, queue: Queue) -> None:
    done(store, 3)
    link(store, queue, "0.pbs", 4, tasks=3)
    assert list(queue.waiting()) == ["1.pbs"], "an empty link is followed once"
    _, words = link(store, queue, "1.pbs", 4, tasks=3)
    assert list(queue.waiting()) == ["1.pbs"], "and not twice"
    assert words[0].startswith("the last job achieved nothing")
    assert words[-1].startswith("two jobs in a row achieved nothing")


def test_a_second_chance_that_is_used_goes_on(store: Path, queue: Queue) -> None:
    done(store, 3)
    link(store, queue, "0.pbs", 4, tasks=3)
    _, words = link(store, queue, "1.pbs", 5, tasks=4)
    assert words[-1] == "job 2.pbs goes on from here"
    assert list(queue.waiting()) == ["1.pbs", "2.pbs"]


def test_a_saved_state_is_progress(store: Path) -> None:
    done(store, 3)
    before = chain.mark(store)
    assert chain.mark(store) == before
    (store / "checkpoints" / "ab").mkdir()
    saved = store / "checkpoints" / "ab" / "abcd.npz"
    saved.touch()
    after = chain.mark(store)
    assert after != before
    os.utime(saved, (time.time() + 60,) * 2)
    assert chain.mark(store) != after


def test_outside_of_a_job_there_is_no_chain(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "PBS_JOBID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SiteError, match="`basin submit` makes the script"):
        link_here(store)


def link_here(store: Path) -> None:
    with chained(store, store / "control" / "driver.sh", None, print):
        pass
