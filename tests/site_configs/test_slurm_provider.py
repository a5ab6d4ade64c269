"""SLURM blocks on a real SLURM: each way to end, and a controller that is away."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from parsl.jobs.states import JobState
from parsl.providers.errors import SubmitException

from site_configs.support import scheduler as scheduler_module
from site_configs.support.records import in_words
from site_configs.support.slurm_provider import (
    ResilientSlurmProvider,
    Slurm,
    _seen,
    expand_nodes,
)
from tests.site_configs.provider_fixtures import common, ended, running, wait_for


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(scheduler_module, "MISSING_GRACE_S", 0.5)


def make(tmp_path: Path, slurm: Slurm | None = None, **more: Any) -> ResilientSlurmProvider:
    slurm = slurm or Slurm(poll_every_s=1.0, timeout_s=10.0)
    arguments = common(tmp_path / "scripts", slurm) | {
        "memory": "200M",
        "exclusive": False,
        "partition": "cpu",
    }
    provider = ResilientSlurmProvider(**(arguments | more))
    provider.script_dir = str(tmp_path / "scripts")
    return provider


def state(provider: ResilientSlurmProvider, job_id: str) -> JobState:
    (status,) = provider.status([job_id])
    found: JobState = status.state
    return found


def queue() -> list[str]:
    done = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True)
    return done.stdout.split()


# --- with a cluster ---------------------------------------------------------------------------


def test_how_blocks_end(slurm_cluster: object, tmp_path: Path) -> None:
    provider = make(tmp_path)
    fine = provider.submit("exit 0", 1, "parsl.cpu.block-0")
    bad = provider.submit("exit 3", 1, "parsl.cpu.block-1")
    alive = provider.submit("env; sleep 60", 1, "parsl.cpu.block-2")
    record = wait_for(provider, alive, running)
    assert record.nodes in (("n1",), ("n2",))
    assert record.start_s is not None
    assert record.end_s is not None
    assert record.end_s - record.start_s == 60.0
    assert wait_for(provider, fine, ended).reason == "completed"
    assert wait_for(provider, bad, ended).reason == "failed"
    assert state(provider, fine) is JobState.COMPLETED
    assert state(provider, bad) is JobState.FAILED
    subprocess.run(["scancel", alive], check=True)
    gone = wait_for(provider, alive, ended)
    assert gone.reason == "cancelled"
    assert gone.words == f"job {alive} was cancelled on {record.nodes[0]}"
    seen = make(tmp_path).seen_by_id([alive, "999999", "waiting-cpu-0"])
    assert list(seen) == [alive], "a later driver learns of it, too"
    assert (seen[alive].state, seen[alive].end_s) == ("ended", gone.end_s)
    assert state(provider, alive) is JobState.CANCELLED
    printed = provider.scheduler.blocks[alive].stderr.with_suffix(".stdout").read_text()
    assert "BASIN_BLOCK_WALLTIME_S=60" in printed
    (script,) = (p for p in (tmp_path / "scripts").glob("basin.cpu.block-2.*[0-9]"))
    text = script.read_text()
    assert "#SBATCH --no-requeue" in text
    assert "#SBATCH --mem=200M" in text


def test_a_folders_name_may_hold_what_slurm_would_replace(
    slurm_cluster: object, tmp_path: Path
) -> None:
    folder = tmp_path / "50%of%j"
    folder.mkdir()
    provider = make(folder)
    job_id = provider.submit("echo said; echo meant >&2", 1, "parsl.cpu.block-0")
    assert wait_for(provider, job_id, ended).reason == "completed"
    known = provider.resources[job_id]
    assert Path(known["job_stdout_path"]).read_text() == "said\n"
    assert Path(known["job_stderr_path"]).read_text() == "meant\n"


def test_a_controller_away_changes_nothing(
    slurm_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = make(tmp_path)
    job_id = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    wait_for(provider, job_id, running)
    there = Path(os.environ["SLURM_CONF"])
    # As if nobody listened at the controller's port: the daemons go on, and so do the jobs.
    away = tmp_path / "away.conf"
    lines = there.read_text().splitlines()
    lines = [f"SlurmctldPort={_free_port()}" if "SlurmctldPort" in n else n for n in lines]
    away.write_text("\n".join([*lines, "MessageTimeout=2", ""]))
    monkeypatch.setenv("SLURM_CONF", str(away))
    for _ in range(2):
        provider.look()
    assert provider.record(job_id).state == "running"
    late = provider.submit("sleep 60", 1, "parsl.cpu.block-1")
    assert provider.record(late).state == "pending"
    assert "not submitted yet" in provider.record(late).words
    assert state(provider, late) is JobState.PENDING
    monkeypatch.setenv("SLURM_CONF", str(there))
    record = wait_for(provider, late, running)
    assert record.job_id in queue()
    assert provider.cancel([job_id, late]) == [True, True]
    assert provider.wait_gone(30.0) == []
    assert {job_id, record.job_id}.isdisjoint(queue())


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_refused_excluded_leftover(slurm_cluster: object, tmp_path: Path) -> None:
    provider = make(tmp_path)
    wrong = make(tmp_path, provider.scheduler, partition="nosuch")
    with pytest.raises(SubmitException) as caught:
        wrong.submit("exit 0", 1, "parsl.cpu.block-0")
    assert str(caught.value).startswith(
        "the scheduler refused basin.cpu.block-0: sbatch: error: invalid partition"
    )
    provider.exclude_nodes({"n1"})
    ours = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    assert wait_for(provider, ours, running).nodes == ("n2",)
    theirs = subprocess.run(
        ["sbatch", "--parsable", "--mem=200M", "-J", "thesis", "--wrap", "sleep 60"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    later = make(tmp_path)
    done = later.cancel_by_id([ours, theirs, "999999", "waiting-cpu-0"])
    assert set(done) == {ours, "999999"}
    assert theirs in queue()
    assert wait_for(provider, ours, ended).reason == "cancelled"


@pytest.mark.slow
def test_a_walltime_kill_is_told_from_a_failure(slurm_cluster: object, tmp_path: Path) -> None:
    provider = make(tmp_path)
    job_id = provider.submit("sleep 300", 1, "parsl.cpu.block-0")
    until = time.monotonic() + 150.0
    while provider.record(job_id).state != "ended" and time.monotonic() < until:
        time.sleep(2.0)
        provider.look()
    record = provider.record(job_id)
    assert record.reason == "walltime"
    assert "reached its walltime of 1 min" in record.words
    assert state(provider, job_id) is JobState.TIMEOUT


# --- without one ------------------------------------------------------------------------------


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM whose every command prints, and exits with, what a file in this folder says."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for program in ("sbatch", "squeue", "sacct", "scancel"):
        script = folder / program
        script.write_text(
            f"#!/bin/sh\necho {program} >> '{folder}/log'\ncat '{folder}/{program}.out'\n"
            f"cat '{folder}/{program}.err' >&2\nexit $(cat '{folder}/{program}.rc')\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        say(folder, program)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    say(folder, "sbatch", "Submitted batch job 7\n")
    return folder


def say(folder: Path, program: str, out: str = "", error: str = "", status: int = 0) -> None:
    for ending, text in (("out", out), ("err", error), ("rc", str(status))):
        (folder / f"{program}.{ending}").write_text(text)


def asked(folder: Path, program: str) -> int:
    return (folder / "log").read_text().split().count(program)


def test_accounting_tells_what_the_queue_forgot(scripted: Path, tmp_path: Path) -> None:
    provider = make(tmp_path)
    job_id = provider.submit("x", 1, "parsl.cpu.block-0")
    provider.look()
    assert provider.record(job_id).state == "pending", "not listed yet, by neither"
    say(
        scripted,
        "sacct",
        "7|OUT_OF_MEMORY|0:125|n[03-04]|2026-11-20T12:00:00|2026-11-20T12:10:00\n",
    )
    provider.look()
    record = provider.record(job_id)
    assert record.reason == "memory"
    assert record.nodes == ("n03", "n04")
    assert record.words == "job 7 was killed for memory on n03 and 1 more"
    assert record.end_s is not None
    assert record.start_s is not None
    assert record.end_s - record.start_s == 600.0
    assert state(provider, job_id) is JobState.FAILED


def test_the_hour_that_comes_twice_in_autumn_is_no_other(
    scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = datetime(2026, 10, 25, 1, 30, tzinfo=UTC).timestamp()
    when = f"$(date -d @{start:.0f} +${{SLURM_TIME_FORMAT:-%FT%T}})"
    (scripted / "squeue").write_text(f'#!/bin/sh\necho "7|basin.cpu|RUNNING|None|n1|{when}|N/A"\n')
    provider = make(tmp_path)
    job_id = provider.submit("x", 1, "parsl.cpu.block-0")
    with monkeypatch.context() as there:
        there.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        provider.look()
    time.tzset()
    assert provider.record(job_id).start_s == start


def test_without_accounting_it_is_asked_once(scripted: Path, tmp_path: Path) -> None:
    say(scripted, "sacct", error="Slurm accounting storage is disabled\n", status=1)
    provider = make(tmp_path)
    job_id = provider.submit("x", 1, "parsl.cpu.block-0")
    for _ in range(4):
        provider.look()
        time.sleep(0.2)
    assert provider.record(job_id).reason == "unknown"
    assert asked(scripted, "sacct") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-20 DUE TO TIME LIMIT ***",
            "walltime",
        ),
        (
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-20 DUE TO PREEMPTION ***",
            "preempted",
        ),
        (
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-20 DUE TO NODE FAILURE ***",
            "node",
        ),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch.", "memory"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-20T12:00:00 ***", "cancelled"),
    ],
)
def test_a_forgotten_jobs_own_last_words(
    scripted: Path, tmp_path: Path, words: str, reason: str
) -> None:
    say(scripted, "sacct", error="Slurm accounting storage is disabled\n", status=1)
    provider = make(tmp_path)
    job_id = provider.submit("x", 1, "parsl.cpu.block-0")
    provider.scheduler.blocks[job_id].stderr.write_text(f"a worker's line\n{words}\n")
    assert wait_for(provider, job_id, ended).reason == reason


def test_a_submission_without_an_answer_is_not_made_twice(scripted: Path, tmp_path: Path) -> None:
    say(
        scripted, "sbatch", error="sbatch: error: Socket timed out on send/recv operation", status=1
    )
    provider = make(tmp_path)
    job_id = provider.submit("x", 1, "parsl.cpu.block-0")
    assert provider.record(job_id).words.startswith("not submitted yet: sbatch: error: Socket")
    name = provider.scheduler.blocks[job_id].name
    say(scripted, "squeue", f"9|{name}|RUNNING|None|n1|2026-11-20T12:00:00|2026-11-20T13:00:00\n")
    before = asked(scripted, "sbatch")
    provider.look()
    record = provider.record(job_id)
    assert record.job_id == "9"
    assert record.state == "running"
    assert asked(scripted, "sbatch") == before


POLICY = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit "
    "limit, user's size and/or time limits)"
)


def test_a_full_queue_is_waited_for_and_a_wrong_request_is_not(
    scripted: Path, tmp_path: Path
) -> None:
    full = f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{POLICY}\n"
    say(scripted, "sbatch", error=full, status=1)
    provider = make(tmp_path)
    job_id = provider.submit("x", 1, "parsl.cpu.block-0")
    provider.look()
    assert provider.record(job_id).state == "pending"
    say(scripted, "sbatch", error="sbatch: error: Invalid account\n", status=1)
    provider.look()
    record = provider.record(job_id)
    assert record.reason == "failed"
    assert record.words == "a block of pool cpu was refused: sbatch: error: Invalid account"
    too_long = f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{POLICY}\n"
    say(scripted, "sbatch", error=too_long, status=1)
    with pytest.raises(SubmitException) as caught:
        provider.submit("x", 1, "parsl.cpu.block-1")
    assert "QOSMaxWallDuration" in str(caught.value.stderr)


def test_a_silent_command_is_ended(scripted: Path, tmp_path: Path) -> None:
    provider = make(tmp_path, Slurm(poll_every_s=1.0, timeout_s=0.5))
    job_id = provider.submit("x", 1, "parsl.cpu.block-0")
    (scripted / "squeue").write_text("#!/bin/sh\nsleep 30\n")
    began = time.monotonic()
    provider.look()
    assert time.monotonic() - began < 10.0
    assert provider.record(job_id).state == "pending"
    assert provider.scheduler.down_since_s is not None


def test_pauses_grow_while_there_is_no_answer(
    scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: now[0])
    provider = make(tmp_path, Slurm(poll_every_s=20.0, timeout_s=5.0))
    job_id = provider.submit("x", 1, "parsl.cpu.block-0")
    say(scripted, "squeue", error="slurm_load_jobs error: Unable to contact\n", status=1)
    for _ in range(60):
        now[0] += 10.0
        provider.status([job_id])
    assert asked(scripted, "squeue") <= 9, "ten minutes away are not thirty questions"
    assert provider.record(job_id).state == "pending"
    say(scripted, "squeue", "7|basin.x|RUNNING|None|n1|2026-11-20T12:00:00|NONE\n")
    now[0] += 130.0
    assert state(provider, job_id) is JobState.RUNNING


@pytest.mark.parametrize(
    ("state", "where", "reason"),
    [
        ("PENDING", "pending", ""),
        ("CONFIGURING", "pending", ""),
        ("REQUEUE_HOLD", "pending", ""),
        ("RUNNING", "running", ""),
        ("COMPLETING", "running", ""),
        ("SUSPENDED", "running", ""),
        ("CANCELLED by 1000", "ended", "cancelled"),
        ("TIMEOUT", "ended", "walltime"),
        ("DEADLINE", "ended", "walltime"),
        ("NODE_FAIL", "ended", "node"),
        ("PREEMPTED", "ended", "preempted"),
        ("OUT_OF_MEMORY", "ended", "memory"),
    ],
)
def test_states(state: str, where: str, reason: str) -> None:
    seen = _seen(state, "None", "n1", "N/A", "N/A")
    assert (seen.state, seen.reason) == (where, reason)


def test_node_names() -> None:
    assert expand_nodes("n1") == ("n1",)
    assert expand_nodes("nid[000009-000011,000020],gpu1") == (
        "nid000009",
        "nid000010",
        "nid000011",
        "nid000020",
        "gpu1",
    )
    assert expand_nodes("r[1-2]n[09-10]-ib,x") == (
        "r1n09-ib",
        "r1n10-ib",
        "r2n09-ib",
        "r2n10-ib",
        "x",
    )
    assert in_words("7", "node", ("n1",), None) == "job 7 was lost with its node n1"


def test_successive_blocks_end_apart(scripted: Path, tmp_path: Path) -> None:
    provider = make(tmp_path, walltime_s=4 * 3600.0, stagger=0.1)
    limits = []
    for _ in range(6):
        limits.append(provider.next_walltime_s())
        provider.submit("x", 1, "parsl.cpu.block-0")
    assert limits[0] == 4 * 3600.0
    assert min(limits) >= 0.9 * 4 * 3600.0
    apart = sorted(limits)
    assert min(b - a for a, b in itertools.pairwise(apart)) >= 60.0
