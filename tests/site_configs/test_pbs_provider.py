"""PBS blocks: what is made of each answer of the server, a lying one's included."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from parsl.jobs.states import JobState
from parsl.providers.errors import SubmitException

from site_configs.support import resilient
from site_configs.support import scheduler as scheduler_module
from site_configs.support.pbs_jobs import end_s, parse_jobs, start_s
from site_configs.support.pbs_provider import PBS, ResilientPBSProvider
from tests.site_configs import fake_pbs
from tests.site_configs.provider_fixtures import common, ended, running, wait_for


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A PBS server; its jobs are ended with the test."""
    folder = tmp_path / "pbs"
    binaries = fake_pbs.install(folder, late_s=0.5, nodes=8)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(scheduler_module, "LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(scheduler_module, "MISSING_GRACE_S", 0.5)
    monkeypatch.chdir(tmp_path)
    yield folder
    fake_pbs.configure(folder, down=False, history=True)
    ids = [path.stem for path in (folder / "jobs").glob("*.json")]
    if ids:
        subprocess.run([binaries / "qdel", *ids], capture_output=True, check=False)


def make(tmp_path: Path, pbs: PBS | None = None, walltime_s: float = 60.0) -> ResilientPBSProvider:
    pbs = pbs or PBS(poll_every_s=1.0, timeout_s=10.0)
    arguments = common(tmp_path / "scripts", pbs, walltime_s)
    provider = ResilientPBSProvider(memory="100mb", **arguments)
    provider.script_dir = str(tmp_path / "scripts")
    return provider


def state(provider: ResilientPBSProvider, job_id: str) -> JobState:
    (status,) = provider.status([job_id])
    found: JobState = status.state
    return found


# --- the fake against the real server ---------------------------------------------------------

HOLD = "#PBS -l select=1:ncpus=1\n#PBS -l place=free\n#PBS -l walltime=00:05:00\n"


def transcript(shared_data: Path, name: str) -> tuple[str, str, int]:
    folder = shared_data / "pbs_transcripts"
    if not folder.is_dir():
        pytest.skip(f"no transcripts at {folder}")
    text = (folder / f"{name}.txt").read_text()
    out, _, rest = text.partition("\n")[2].rpartition("--- stderr\n")
    error, _, status = rest.rpartition("--- exit ")
    return out, error, int(status)


def shape(out: str) -> Any:
    """The parts of an answer that do not depend on ids, times or folders."""

    def keys(value: Any) -> Any:
        if isinstance(value, dict):
            return [(re.sub(r"^\d+\.", "N.", key), keys(part)) for key, part in value.items()]
        return type(value).__name__

    return keys(json.loads(out)) if out.startswith("{") else re.sub(r"\d+", "N", out)


def ask(*words: str) -> tuple[str, str, int]:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout, done.stderr, done.returncode


def submit(folder: Path, name: str, script: str) -> str:
    (folder / name).write_text(script)
    return subprocess.run(
        ["qsub", name], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def until_state(job_id: str, wanted: str) -> None:
    for _ in range(200):
        if f'"job_state":"{wanted}"' in ask("qstat", "-x", "-f", "-F", "json", job_id)[0]:
            return
        time.sleep(0.1)
    raise AssertionError(f"{job_id} is not {wanted}")


def test_the_fake_answers_as_the_real_server_did(
    server: Path, tmp_path: Path, shared_data: Path
) -> None:
    sleeper = submit(tmp_path, "sleeper.sh", HOLD + "sleep 60\n")
    wall = submit(
        tmp_path,
        "wall.sh",
        "#PBS -l select=1:ncpus=1:mem=100mb\n#PBS -l place=free\n#PBS -l walltime=00:00:01\n"
        "sleep 60\n",
    )
    fine = submit(tmp_path, "ok.sh", HOLD + "exit 0\n")
    bad = submit(tmp_path, "bad.sh", "#PBS -l select=1:ncpus=1\n#PBS -l place=pack\nexit 3\n")
    big = submit(tmp_path, "big.sh", "#PBS -l select=1:ncpus=64\n#PBS -l place=free\n")
    for job_id, wanted in ((sleeper, "R"), (wall, "F"), (fine, "F"), (bad, "F"), (big, "Q")):
        until_state(job_id, wanted)

    def same(name: str, *words: str, only_status: bool = False) -> None:
        real, answer = transcript(shared_data, name), ask(*words)
        numbers = [re.sub(r"\d+(?=\.pbs01)", "N", text[1]) for text in (real, answer)]
        assert answer[2] == real[2], name
        assert numbers[1] == numbers[0], name
        if not only_status:
            one, other = shape(real[0]), shape(answer[0])
            # A job that ended at once has no session on the real server.
            gone = ("session_id", "int")
            assert [str(other).replace(f"{gone}, ", "")] == [str(one).replace(f"{gone}, ", "")]
            assert answer[0].endswith("\n") == real[0].endswith("\n"), name

    get = ("qstat", "-x", "-f", "-F", "json")
    same("qstat_running_and_queued", *get, sleeper, big)
    same("qstat_finished_ok_and_failed", *get, fine, bad)
    same("qstat_walltime_killed", *get, wall)
    same("qstat_unknown_id", *get, sleeper, "999999.pbs01")
    same("qstat_no_history_flag", "qstat", "-f", "-F", "json", fine)
    same("pbsnodes", "pbsnodes", "-a", "-F", "json")
    same("qdel_finished", "qdel", fine)
    same("qdel_unknown", "qdel", "999999.pbs01")
    same("qsub_bad_queue", "qsub", "-q", "nosuch", str(tmp_path / "ok.sh"))
    same("qsub_bad_resource", "qsub", "-l", "select=1:ncpus=x", str(tmp_path / "ok.sh"))
    same("qdel_ok", "qdel", sleeper)
    until_state(sleeper, "F")
    same("qstat_deleted", *get, sleeper)
    same("qsub_ok", "qsub", str(tmp_path / "ok.sh"))
    fake_pbs.configure(server, history=False)
    another = submit(tmp_path, "sleeper.sh", HOLD + "sleep 60\n")
    time.sleep(0.5)
    same("qstat_history_off_running", *get, another)
    same("qstat_history_off_running_no_x", "qstat", "-f", "-F", "json", another)
    for name, reason in (("qstat_walltime_killed", "walltime"), ("qstat_deleted", "cancelled")):
        (job,) = (parse_jobs(transcript(shared_data, name)[0]) or {}).values()
        assert fake_pbs_reason(job) == reason


def fake_pbs_reason(job: dict[str, Any]) -> str:
    from site_configs.support.pbs_provider import _seen

    return _seen(job).reason


@pytest.fixture
def autumn(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """The last hour of summer time comes twice; return the first moment of its second coming."""
    with monkeypatch.context() as there:
        there.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield datetime(2026, 10, 25, 1, tzinfo=UTC).timestamp()
    time.tzset()


@pytest.mark.parametrize(
    ("said_min", "used", "start_min"),
    [
        (-29, None, -30),  # in the first such hour it cannot have begun in the second
        (31, None, 30),
        (35, "01:04:50", -30),
        (125, "01:30:10", 30),
    ],
)
def test_a_job_did_not_begin_after_it_was_seen(
    autumn: float, said_min: float, used: str | None, start_min: float
) -> None:
    job: dict[str, Any] = {"stime": "Sun Oct 25 02:30:00 2026"}
    if used is not None:
        job["resources_used"] = {"walltime": used}
    assert start_s(job, autumn + 60 * said_min) == autumn + 60 * start_min


def test_an_ended_job_began_as_long_before_as_it_ran(autumn: float) -> None:
    job = {
        "stime": "Sun Oct 25 02:30:00 2026",
        "obittime": "Sun Oct 25 03:10:00 2026",
        "resources_used": {"walltime": "01:40:00"},
    }
    assert end_s(job, autumn + 86400) == autumn + 4200
    assert start_s(job, autumn + 86400) == autumn - 1800


# --- the provider -----------------------------------------------------------------------------


@pytest.mark.parametrize("history", [True, False])
def test_how_blocks_end(server: Path, tmp_path: Path, history: bool) -> None:
    fake_pbs.configure(server, history=history)
    provider = make(tmp_path)
    short = make(tmp_path, provider.scheduler, walltime_s=1.0)
    fine = provider.submit("exit 0", 1, "parsl.cpu.block-0")
    bad = provider.submit("exit 3", 1, "parsl.cpu.block-1")
    long = short.submit("sleep 60", 1, "parsl.cpu.block-2")
    alive = provider.submit("sleep 60", 1, "parsl.cpu.block-3")
    record = wait_for(provider, alive, running)
    assert record.nodes == ("pbs01",)
    assert record.start_s is not None
    assert record.end_s is not None
    assert abs(record.end_s - record.start_s - 60.0) < 2.0
    reasons = {i: wait_for(provider, i, ended).reason for i in (fine, bad)}
    reasons[long] = wait_for(short, long, ended).reason
    assert reasons[long] == "walltime"
    assert state(short, long) is JobState.TIMEOUT
    assert "reached its walltime of 1 s" in short.record(long).words
    if history:
        assert reasons[fine] == "completed"
        assert reasons[bad] == "failed"
        assert "exit status 3" in provider.record(bad).words
        assert state(provider, bad) is JobState.FAILED
    else:
        # Nobody can tell any more, and nothing is made up.
        assert reasons[fine] == reasons[bad] == "unknown"
    assert state(provider, alive) is JobState.RUNNING
    assert provider.cancel([alive, fine]) == [True, True]
    assert provider.wait_gone(20.0) == []
    assert provider.record(alive).reason == "cancelled"
    assert ask("qstat", "-f", "-F", "json", alive)[0].count("job_state") == 0


def test_a_deleted_block_is_cancelled(server: Path, tmp_path: Path) -> None:
    provider = make(tmp_path)
    job_id = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    wait_for(provider, job_id, running)
    subprocess.run(["qdel", job_id], check=True)
    record = wait_for(provider, job_id, ended)
    assert record.reason == "cancelled"
    assert record.words == f"job {job_id} was cancelled on pbs01"
    seen = make(tmp_path).seen_by_id([job_id, "999999.pbs01", "waiting-cpu-0"])
    assert list(seen) == [job_id], "a later driver learns of it, too"
    assert (seen[job_id].state, seen[job_id].end_s) == ("ended", record.end_s)
    assert state(provider, job_id) is JobState.CANCELLED


def test_one_forgotten_block_does_not_hide_the_others(server: Path, tmp_path: Path) -> None:
    provider = make(tmp_path)
    gone = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    stays = provider.submit("sleep 60", 1, "parsl.cpu.block-1")
    wait_for(provider, gone, running)
    wait_for(provider, stays, running)
    job = server / "jobs" / f"{gone.split('.')[0]}.json"
    job.rename(job.with_suffix(".kept"))
    provider.look()
    assert provider.record(gone).state == "running", "one answer without it is no proof"
    assert wait_for(provider, gone, ended).reason == "unknown"
    assert provider.record(stays).state == "running"
    job.with_suffix(".kept").rename(job)


def test_a_server_away_changes_nothing(server: Path, tmp_path: Path) -> None:
    provider = make(tmp_path)
    job_id = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    wait_for(provider, job_id, running)
    fake_pbs.configure(server, down=True)
    for _ in range(scheduler_module.MISSING_LOOKS + 2):
        provider.look()
        time.sleep(0.2)
    assert provider.record(job_id).state == "running"
    assert provider.cancel([job_id]) == [False], "not said to be ended before it is"
    late = provider.submit("sleep 60", 1, "parsl.cpu.block-1")
    record = provider.record(late)
    assert record.state == "pending"
    assert "cannot connect to server" in record.words
    assert state(provider, late) is JobState.PENDING
    assert provider.submitted == 2
    fake_pbs.configure(server, down=False)
    record = wait_for(provider, late, running)
    assert record.job_id.endswith(".pbs01")
    # What was given back meanwhile is cancelled now.
    assert wait_for(provider, job_id, ended).reason == "cancelled"
    assert provider.cancel([late]) == [True]
    assert provider.wait_gone(20.0) == []


def test_a_submission_that_never_came_can_be_taken_back(server: Path, tmp_path: Path) -> None:
    fake_pbs.configure(server, down=True)
    provider = make(tmp_path)
    job_id = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    assert provider.cancel([job_id]) == [True]
    fake_pbs.configure(server, down=False)
    provider.look()
    assert not list((server / "jobs").glob("*.json"))


def test_another_users_job_of_the_same_name_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "qselect"
    program.write_text('#!/bin/sh\ncase "$*" in *"-u "*) ;; *) echo 4711.pbs;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert PBS(poll_every_s=1.0, timeout_s=10.0).find("basin.cpu.block-0") == ""


def test_a_refused_submission_is_an_error(server: Path, tmp_path: Path) -> None:
    provider = make(tmp_path)
    provider.queue = "nosuch"
    with pytest.raises(SubmitException) as caught:
        provider.submit("exit 0", 1, "parsl.cpu.block-0")
    assert str(caught.value) == "the scheduler refused basin.cpu.block-0: qsub: Unknown queue"
    assert provider.submitted == 0


@pytest.mark.parametrize(
    ("said", "later"),
    [
        ("qsub: would exceed queue workq's per-user limit of jobs in 'Q' state", True),
        ("qsub: Job exceeds queue and/or server resource limits", False),
        ("qsub: Unauthorized Request", False),
        ("Connection refused\nqsub: cannot connect to server pbs01 (errno=15010)", True),
    ],
)
def test_what_may_be_taken_later(said: str, later: bool) -> None:
    assert PBS(poll_every_s=1.0, timeout_s=1.0).may_come_later(said) is later


def test_one_query_for_all_pools(server: Path, tmp_path: Path) -> None:
    pbs = PBS(poll_every_s=30.0, timeout_s=10.0)
    pools = [make(tmp_path, pbs) for _ in range(3)]
    ids = [pool.submit("sleep 60", 1, f"parsl.p.block-{i}") for i, pool in enumerate(pools)]
    for pool, job_id in zip(pools, ids, strict=True):
        pool.status([job_id])
    log = (server / "log").read_text().splitlines()
    assert sum(line.startswith("qstat") for line in log) == 1
    assert pools[0].status_polling_interval == 30
    pbs.cancel(ids)


def test_leftovers_are_cancelled_and_others_jobs_are_not(server: Path, tmp_path: Path) -> None:
    provider = make(tmp_path)
    ours = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    theirs = submit(tmp_path, "thesis.sh", HOLD + "sleep 60\n")
    until_state(theirs, "R")
    later = make(tmp_path)
    done = later.cancel_by_id([ours, theirs, "999999.pbs01", "waiting-cpu-0"])
    assert set(done) == {ours, "999999.pbs01"}
    until_state(ours, "F")
    assert '"job_state":"R"' in ask("qstat", "-f", "-F", "json", theirs)[0]


def test_json_that_is_none(server: Path, tmp_path: Path) -> None:
    fake_pbs.configure(server, json_broken=True)
    provider = make(tmp_path)
    alive = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    bad = provider.submit("exit 3", 1, "parsl.cpu.block-1")
    with pytest.raises(json.JSONDecodeError):
        json.loads(ask("qstat", "-f", "-F", "json", alive)[0])
    record = wait_for(provider, alive, running)
    assert record.start_s is not None
    assert record.end_s == record.start_s + 60.0
    assert wait_for(provider, bad, ended).reason == "failed"
    provider.cancel([alive])


def test_the_script_asks_for_what_it_needs(server: Path, tmp_path: Path) -> None:
    provider = make(tmp_path)
    provider.exclude_nodes({"bad-01"})
    job_id = provider.submit("env", 1, "parsl.cpu.block-0")
    wait_for(provider, job_id, ended)
    (script,) = (p for p in (tmp_path / "scripts").iterdir() if p.suffix[1:].isdecimal())
    text = script.read_text()
    assert "#PBS -r n" in text
    assert "#PBS -l select=1:ncpus=1:mem=100mb" in text
    assert script.name.startswith("basin.cpu.block-0.")
    assert not script.with_name(f"{script.name}.stderr").read_text(), "grep has nothing to say"
    printed = script.with_name(f"{script.name}.stdout").read_text()
    start = re.search(r"BASIN_BLOCK_START=(\d+)", printed)
    assert start is not None
    assert abs(int(start[1]) - time.time()) < 60
    assert "BASIN_BLOCK_WALLTIME_S=60" in printed
    assert "OMP_NUM_THREADS=1" in printed


def test_a_block_on_a_node_set_aside_ends_at_once(server: Path, tmp_path: Path) -> None:
    provider = make(tmp_path)
    provider.exclude_nodes({"pbs01"})
    job_id = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    record = wait_for(provider, job_id, ended)
    assert record.reason == "avoided"
    assert record.words == f"job {job_id} ended at once, since a node of it is set aside on pbs01"
    assert state(provider, job_id) == JobState.CANCELLED


@pytest.mark.parametrize("history", [True, False])
def test_a_queue_is_not_flooded_where_the_one_free_node_is_set_aside(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: bool
) -> None:
    fake_pbs.configure(server, history=history)
    provider = make(tmp_path)
    provider.exclude_nodes({"pbs01"})
    first = provider.submit("sleep 60", 1, "parsl.cpu.block-0")
    assert wait_for(provider, first, ended).reason == "avoided"

    second = provider.submit("sleep 60", 1, "parsl.cpu.block-1")
    provider.look()
    waits = provider.record(second)
    assert waits.state == "pending"
    assert waits.words == "not submitted yet: later, since the free node is one that is set aside"
    submitted = [line for line in (server / "log").read_text().splitlines() if "qsub" in line]
    assert len(submitted) == 1

    later = time.monotonic() + resilient.LONGEST_AVOIDED_PAUSE_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    provider.look()
    monkeypatch.undo()
    assert provider.record(second).job_id != second, "submitted now"
