"""Worker pools that are lost: who took them down is found, and nobody else pays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from parsl.executors.high_throughput.errors import ManagerLost
from parsl.jobs.error_handlers import simple_error_handler
from parsl.jobs.states import JobState, JobStatus

from orchestrator import run, under_way
from orchestrator.campaign import load_campaign
from orchestrator.errors import RunError
from orchestrator.fleet import Fleet, Verdict
from orchestrator.forecast import learned_estimates
from orchestrator.key_index import KeyIndex
from orchestrator.nodes import BROKEN_LIMIT
from orchestrator.run import Driver
from orchestrator.sites import load_site
from orchestrator.stream import Stream
from orchestrator.turn import Turn, lock_path
from orchestrator.under_way import Mark
from orchestrator.worker import Bundle, Receipt, checkpoint_path
from site_configs.support.records import BlockRecord
from tests.orchestrator.run_fixtures import by_key, ingested, until, write_campaign

WORKERS = 4
KILLED = Verdict(False, "job 4711 was killed for memory on n1", "cpu 4711")
WALLTIME = Verdict(True, "job 4711 reached its walltime", "cpu 4711", walltime=True)


class _Fleet:
    """One worker pool, which is lost for the reason that is given."""

    def __init__(self, verdict: Verdict) -> None:
        self.connected = Counter(cpu=WORKERS)
        self._verdict = verdict

    def verdict(self, *of_a_pool: object) -> Verdict:
        return self._verdict

    def seen(self, *where: str) -> None: ...


class Pool:
    """A driver, and the worker pool that all its bundles go to."""

    def __init__(self, folder: Path, molecules: int, verdict: Verdict) -> None:
        smiles = ["C" * n for n in range(1, molecules + 1)]
        path = write_campaign(folder, smiles, stages='[[stages]]\nkernel = "rehearse"\n')
        campaign = load_campaign(path)
        _, plan_folder = ingested(campaign)
        self.driver = Driver(campaign, load_site("local", workers=WORKERS))
        self.store = self.driver.store
        (self.store.path / "inbox" / self.driver.run_id).mkdir()
        under_way.clear(self.store.path)
        estimates = learned_estimates(self.store.snapshot(), self.driver.plan)
        self.driver.stream = Stream(self.driver.plan, plan_folder, KeyIndex(), estimates)
        self.driver.fleet = _Fleet(verdict)  # type: ignore[assignment]
        self.flying: list[tuple[Bundle, Future[Receipt]]] = []
        self.losses = 0

    def _app(self, bundle: Bundle) -> Future[Receipt]:
        future: Future[Receipt] = Future()
        self.flying.append((bundle, future))
        return future

    def fill(self) -> list[Bundle]:
        """Have bundles submitted; return those that run, which is one where it runs alone."""
        self.driver._refill()
        self.driver._submit("cpu", self._app, WORKERS)
        bundles = [bundle for bundle, _ in self.flying]
        alone = [bundle for bundle in bundles if bundle.alone]
        return alone[:1] or bundles[:WORKERS]

    def mark(self, bundle: Bundle) -> Mark:
        return Mark(self.store.path, bundle.run_id, bundle.id)

    def die(self, running: list[Bundle]) -> None:
        """Lose the pool, with what runs in it and what waits there."""
        self.losses += 1
        for bundle in running:
            if bundle.alone:
                self.mark(bundle).set([], 0.0, alone=True)
        for _, future in self.flying:
            future.set_exception(ManagerLost(f"m{self.losses}".encode(), "n1"))
        self.flying = []
        self._take_in()

    def finish(self, running: list[Bundle]) -> None:
        for bundle, future in self.flying:
            if bundle in running:
                n = len(bundle.items)
                receipt = Receipt(bundle.id, "n1", f"m{self.losses}", "0", "", ["shard"])
                receipt.status, receipt.shard = bytes(n), bytes(2 * n)
                receipt.cpu_s = receipt.wall_s = np.full(n, 0.01, np.float32).tobytes()
                future.set_result(receipt)
        self.flying = [(b, f) for b, f in self.flying if b not in running]
        self._take_in()

    def _take_in(self) -> None:
        self.driver._absorb()
        self.driver._explain_losses()

    def go_on(self, kills: Callable[[list[Bundle]], bool]) -> None:
        """Run to the end; the pool dies whenever ``kills`` says so of what runs in it."""
        for _ in range(500):
            running = self.fill()
            if not running:
                return
            if kills(running):
                self.die(running)
            else:
                self.finish(running)
        raise AssertionError(f"no end after {self.losses} losses: {self.driver.counts()}")

    def set_aside(self) -> dict[str, str]:
        """Return the status of what failed, by SMILES."""
        smiles = {k: row["smiles"].decode() for k, row in by_key(self.store, "molecules").items()}
        rows = by_key(self.store, "tasks").values()
        return {smiles[row["mol_key"]]: row["status"] for row in rows}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "TOGETHER_S", 0.0)


@pytest.mark.parametrize("culprits", [{"CCC"}, {"CC", "C" * 7, "C" * 20}])
def test_who_kills_worker_pools_is_set_aside_alone(tmp_path: Path, culprits: set[str]) -> None:
    pool = Pool(tmp_path, 40, KILLED)

    def kills(running: list[Bundle]) -> bool:
        return any(item.smiles in culprits for bundle in running for item in bundle.items)

    pool.go_on(kills)
    assert pool.set_aside() == dict.fromkeys(culprits, "lost")
    (counts,) = pool.driver.counts()
    assert (counts.ok, counts.failed) == (40 - len(culprits), len(culprits))


def test_a_pool_that_others_kill_again_and_again_costs_nobody_anything(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 12, KILLED)
    pool.go_on(lambda running: pool.losses < 6 and len(running) > 1)
    assert pool.losses >= 2
    assert pool.driver.counts()[0].ok == 12


def test_at_a_walltime_only_what_ran_is_charged(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 6, WALLTIME)
    (first, *_) = pool.fill()
    pool.die([])
    assert all(item.cuts == 0 for item in _left(pool)), "nothing is known to have begun"

    running = pool.fill()
    first = running[0]
    key = first.items[-1].key
    pool.mark(first).update([key], 1.0)
    pool.die([])
    assert all(item.cuts == 0 for item in _left(pool)), "it had hardly begun"

    running = pool.fill()
    first = next(b for b in running if key in {item.key for item in b.items})
    pool.mark(first).update([key], 60.0)
    pool.die([])
    assert {item.key: item.cuts for item in _left(pool) if item.cuts} == {key: 1}


def test_what_came_further_before_a_walltime_is_not_charged(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 2, WALLTIME)
    (first, *_) = pool.fill()
    item = first.items[0]
    state = checkpoint_path(pool.store.path, item.key)
    state.parent.mkdir(parents=True)
    state.touch()
    pool.mark(first).update([item.key], 60.0)
    pool.die([])
    assert len(_left(pool)) == 2
    assert all(item.cuts == 0 for item in _left(pool))


def _left(pool: Pool) -> list[Any]:
    stream = pool.driver.stream
    return [*stream.ready[0], *(item for _, items in stream.again for item in items)]


@pytest.mark.parametrize(("reason", "failed"), [("avoided", False), ("failed", True)])
def test_a_block_that_ends_since_its_node_is_set_aside_has_not_failed(
    tmp_path: Path, reason: Any, failed: bool
) -> None:
    record = BlockRecord("7.pbs", "cpu", "ended", reason, "words", ("n7",), 100.0, 101.0)
    status = JobStatus(JobState.CANCELLED if reason == "avoided" else JobState.MISSING)
    executor = SimpleNamespace(
        label="cpu",
        status_facade={"0": status},
        blocks_to_job_id={"0": "7.pbs"},
        provider=SimpleNamespace(record={"7.pbs": record}.__getitem__),
    )
    driver = Pool(tmp_path, 1, KILLED).driver
    driver.fleet = Fleet({})
    assert driver._has_failed(executor, "0") is failed


@pytest.mark.parametrize(
    ("reason", "worked", "blamed"),
    [
        ("failed", False, True),
        ("completed", False, True),
        ("cancelled", False, False),
        ("preempted", False, False),
        ("failed", True, False),
    ],
)
def test_a_node_is_blamed_for_blocks_that_did_nothing_by_themselves(
    tmp_path: Path, reason: Any, worked: bool, blamed: bool
) -> None:
    states = {"failed": JobState.FAILED, "completed": JobState.COMPLETED}
    status = JobStatus(states.get(reason, JobState.CANCELLED))
    jobs = {str(i): f"{i}.pbs" for i in range(BROKEN_LIMIT)}
    records = {
        job: BlockRecord(job, "cpu", "ended", reason, "words", ("n7",), 100.0, 101.0)
        for job in jobs.values()
    }
    executor = SimpleNamespace(
        label="cpu",
        block_error_handler=simple_error_handler,
        status_facade=dict.fromkeys(jobs, status),
        blocks_to_job_id=jobs,
        provider=SimpleNamespace(record=records.__getitem__),
    )
    driver = Pool(tmp_path, 1, KILLED).driver
    driver.fleet = Fleet({})
    driver.site = SimpleNamespace(config=SimpleNamespace(executors=[executor]))  # type: ignore[assignment]
    driver.nodes._passed["cpu"]["n1"] += 1  # never is the only node that works set aside
    driver._worked |= {("cpu", name) for name in jobs if worked}
    driver._tolerate_lost_blocks()
    executor.block_error_handler(executor, executor.status_facade)
    driver._judge_short_lived()
    assert set(driver.nodes.bad) == ({"n7"} if blamed else set())


def test_a_process_of_the_driver_may_say_much_before_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    driver = Pool(tmp_path, 1, KILLED).driver
    (tmp_path / "talkative.py").write_text(
        "import sys\nsys.stderr.write('word\\n' * 100_000 + 'the disk is gone\\n')\nsys.exit(1)\n"
    )
    process = driver._python("talkative")
    until(lambda: process.poll() is not None, 60)
    process.kill()
    with pytest.raises(RunError, match="compaction failed: the disk is gone"):
        driver._wait_process(process, "compaction")


# A worker, as its pool starts it: it asks for its turn, says so, and goes when it is told to.
WORKER = """
import sys
from orchestrator.turn import Turn
turn = Turn(alone=sys.argv[1] == "alone")
turn.wait(lambda: False)
print("runs", turn.is_alone, flush=True)
sys.stdin.readline()
turn.end()
print("ended", flush=True)
sys.stdin.readline()
"""


def test_a_bundle_that_runs_alone_waits_for_the_others_and_they_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PARSL_WORKER_RANK", "0")
    lock_path(os.getpid()).unlink(missing_ok=True)
    workers: list[subprocess.Popen[str]] = []

    def start(kind: str) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        workers.append(worker)
        return worker

    def said(worker: subprocess.Popen[str]) -> str:
        assert worker.stdout is not None
        return worker.stdout.readline().strip()

    def end(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert said(worker) == "ended"

    try:
        one, two = start("together"), start("together")
        assert said(one) == said(two) == "runs False"
        lonely = start("alone")
        monkeypatch.setattr("os.getppid", os.getpid)  # one more worker of the same pool: here

        def gate_is_shut() -> bool:
            turn = Turn(alone=False)
            came = turn.wait(lambda: True)
            turn.end()
            return not came

        until(gate_is_shut, 30, lambda: "others begin while a lonely one waits")
        end(one)
        assert gate_is_shut()
        end(two)
        assert said(lonely) == "runs True"
        assert gate_is_shut()
        end(lonely)
        assert not gate_is_shut()
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
        lock_path(os.getpid()).unlink(missing_ok=True)


def test_a_turn_outside_of_a_pool_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PARSL_WORKER_RANK", raising=False)
    turn = Turn(alone=True)
    assert turn.wait(lambda: True)
    assert not turn.is_alone


def test_a_driver_that_lost_its_store_leaves_the_others_progress_alone(tmp_path: Path) -> None:
    driver = Pool(tmp_path, 1, KILLED).driver
    driver.fleet = Fleet({})
    path = driver.store.path / "control"
    (path / "driver.json").write_text('{"run_id": "another"}')
    (path / "progress.json").write_text("of another")
    driver._last_word()
    assert (path / "progress.json").read_text() == "of another"
    (path / "driver.json").unlink()
    driver._last_word()
    assert driver.run_id in (path / "progress.json").read_text()
