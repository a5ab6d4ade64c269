"""A lost worker pool is explained from its block's record, and only known ends excuse its items."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.fleet import VERDICT_S, Fleet, cancel_leftovers, hours_meanwhile
from site_configs.support.records import BlockRecord
from site_configs.support.scheduler import Seen

RUNNING = BlockRecord("4711", "cpu", "running", nodes=("n1",), start_s=0.0, n_nodes=2)


class Provider:
    """Knows the records it is given, as a provider for a batch system does."""

    nodes_per_block = 2

    def __init__(self, records: dict[str, BlockRecord]) -> None:
        self.records = records
        self.looks = 0
        self.cancelled: list[str] = []
        self.seen: dict[str, Seen] = {}
        self.answers = True

    def record(self, job_id: str) -> BlockRecord:
        return self.records[job_id]

    def look(self) -> None:
        self.looks += 1

    def exclude_nodes(self, names: set[str]) -> None: ...

    def cancel(self, jobs: list[str]) -> list[bool]:
        self.cancelled += jobs
        return [True] * len(jobs)

    def seen_by_id(self, jobs: list[str]) -> dict[str, Seen]:
        if not self.answers:
            raise OSError
        return {job: self.seen[job] for job in jobs if job in self.seen}

    def cancel_by_id(self, jobs: list[str]) -> list[str]:
        self.cancelled += jobs
        return jobs


class Commands:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def run(self, message: Any) -> None:
        self.sent.append(message)


class Executor:
    """An executor with two blocks, each with one manager."""

    def __init__(self, records: dict[str, BlockRecord]) -> None:
        self.label = "cpu"
        self.provider = Provider(records)
        self.blocks_to_job_id = {"0": "4711", "1": "4712"}
        self.status_facade: dict[str, Any] = {}
        self.command_client = Commands()
        self.tasks = {"0": 2, "1": 2}

    def connected_managers(self) -> list[dict[str, Any]]:
        return [
            {
                "manager": f"m{block}",
                "block_id": block,
                "tasks": tasks,
                "worker_count": 4,
                "active": True,
                "draining": False,
            }
            for block, tasks in self.tasks.items()
        ]


def fleet_of(record: BlockRecord, bad: dict[str, str] | None = None) -> tuple[Fleet, Executor]:
    other = replace(RUNNING, job_id="4712", nodes=("n2",))
    executor = Executor({"4711": record, "4712": other})
    fleet = Fleet({"cpu": executor}, 1.0, bad)
    assert fleet.poll()
    return fleet, executor


@pytest.mark.parametrize(
    ("reason", "blameless"),
    [
        ("walltime", True),
        ("cancelled", True),
        ("node", True),
        ("preempted", True),
        ("completed", True),
        ("memory", False),
        ("failed", False),
        ("unknown", False),
    ],
)
def test_only_ends_that_no_item_has_a_part_in_excuse(reason: Any, blameless: bool) -> None:
    words = f"job 4711 ended: {reason}"
    ended = replace(RUNNING, state="ended", reason=reason, words=words, end_s=9.0)
    fleet, executor = fleet_of(ended)
    verdict = fleet.verdict("cpu", "m0", "n1.cluster", 0.0)
    assert verdict is not None
    assert verdict.blameless is blameless
    assert verdict.words == f"block 0: {words}"
    assert executor.provider.looks == 1


def test_a_verdict_waits_for_the_scheduler_but_not_for_ever() -> None:
    fleet, _ = fleet_of(replace(RUNNING, end_s=time.time() + 1000))
    assert fleet.verdict("cpu", "m0", "n1", 1.0) is None
    late = fleet.verdict("cpu", "m0", "n1", VERDICT_S + 1)
    assert late is not None
    assert not late.blameless
    assert "4711" in late.words


def test_a_silent_scheduler_does_not_hide_a_walltime_that_is_over() -> None:
    fleet, _ = fleet_of(replace(RUNNING, end_s=time.time() - 1))
    verdict = fleet.verdict("cpu", "m0", "n1", 0.0)
    assert verdict is not None
    assert (verdict.blameless, verdict.walltime) == (True, True)


def test_a_manager_that_nobody_saw_is_found_by_its_host() -> None:
    now = time.time()
    ended = replace(RUNNING, state="ended", reason="node", words="job 4711 was lost", end_s=now)
    fleet, _ = fleet_of(ended)
    found = fleet.verdict("cpu", "never seen", "n1.cluster", 0.0)
    assert found is not None
    assert found.blameless
    unknown = fleet.verdict("cpu", "never seen", "n9", 0.0)
    assert unknown is not None
    assert not unknown.blameless


def test_node_hours_are_those_of_all_blocks_and_runs() -> None:
    now = time.time()
    fleet, executor = fleet_of(
        replace(RUNNING, state="ended", reason="completed", start_s=now - 7200, end_s=now - 3600)
    )
    executor.provider.records["4712"] = replace(RUNNING, job_id="4712", start_s=now - 1800)
    assert fleet.node_hours() == pytest.approx(1.0 + 2.0 + 1.0, abs=0.01)
    assert fleet.node_hours() == pytest.approx(4.0, abs=0.01), "an ended block counts once"


def test_a_block_on_a_bad_node_gets_no_more_and_goes_when_it_has_nothing() -> None:
    fleet, executor = fleet_of(RUNNING, {"n1": "crashes"})
    assert executor.command_client.sent == [["HOLD_MANAGER", "m0"]]
    assert not executor.provider.cancelled
    executor.tasks["0"] = 0
    assert fleet.poll(0.0)
    assert executor.provider.cancelled == ["4711"]
    assert fleet.poll(0.0)
    assert executor.provider.cancelled == ["4711"]


def test_of_a_block_with_one_bad_node_only_that_one_gets_no_more() -> None:
    fleet, executor = fleet_of(replace(RUNNING, nodes=("n1", "n3")), {"n1": "crashes"})
    assert not executor.command_client.sent, "on which node it is, no receipt has told yet"
    fleet.seen("cpu", "m0", "n1")
    fleet.seen("cpu", "m1", "n2")
    executor.tasks["0"] = 0
    assert fleet.poll(0.0)
    assert executor.command_client.sent == [["HOLD_MANAGER", "m0"]]
    assert fleet.poll(0.0)
    assert not executor.provider.cancelled, "its other node works"


def test_what_an_earlier_driver_left_is_cancelled_and_its_hours_count() -> None:
    now = time.time()
    blocks = [
        {"pool": "cpu", "job_id": "1", "state": "running", "n_nodes": 2, "end_s": now + 9},
        {"pool": "cpu", "job_id": "2", "state": "pending", "n_nodes": 2, "end_s": None},
        {"pool": "cpu", "job_id": "3", "state": "ended", "n_nodes": 2, "end_s": now},
        {"pool": "gpu", "job_id": "4", "state": "running", "n_nodes": 1, "end_s": now - 1800},
    ]
    executor = Executor({})
    assert cancel_leftovers([executor], blocks) == ["1", "2"]
    assert hours_meanwhile(blocks, now - 3600, []) == pytest.approx(2.0 + 0.5, abs=0.01)
    assert hours_meanwhile(blocks, now - 3600, [executor]) == pytest.approx(2.5, abs=0.01)


def test_blocks_of_an_earlier_driver_are_gone_before_the_store_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = [{"pool": "cpu", "job_id": "1", "state": "running", "n_nodes": 1}]
    executor = Executor({})
    answers = [{"1": Seen("running")}, {"1": Seen("running")}, {"1": Seen("ended", "cancelled")}]
    left = list(answers)
    monkeypatch.setattr(executor.provider, "seen_by_id", lambda jobs: left.pop(0), raising=False)
    monkeypatch.setattr("orchestrator.fleet.LEFTOVER_LOOK_S", 0.0)
    assert cancel_leftovers([executor], blocks, 30.0) == ["1"]
    assert not left, "its last workers may still have been sealing"
    left = list(answers)
    assert cancel_leftovers([executor], blocks) == ["1"]
    assert left == answers, "without a limit there is no waiting"


@pytest.mark.parametrize(
    ("state", "seen", "hours"),
    [
        ("running", Seen("ended", "cancelled", start_s=-7200, end_s=-2700), 0.5),
        ("running", Seen("ended", "cancelled", end_s=-5000), 0.0),
        ("running", Seen("running", start_s=-7200, end_s=1800), 2.0),
        ("pending", Seen("running", start_s=-900, end_s=1800), 0.5),
        ("pending", Seen("ended", "walltime", start_s=-1800, end_s=-900), 0.5),
        ("pending", Seen("ended", "cancelled", end_s=-900), 0.0),
        ("pending", Seen("pending"), 0.0),
        ("pending", None, 0.0),
        ("running", None, 2.0),
    ],
)
def test_the_scheduler_knows_when_a_block_without_a_driver_ended(
    state: str, seen: Seen | None, hours: float
) -> None:
    now = time.time()
    running = {"start_s": now - 7200, "end_s": now + 1800} if state == "running" else {}
    block = {"pool": "cpu", "job_id": "1", "state": state, "n_nodes": 2, **running}
    executor = Executor({})
    if seen is not None:
        start, end = (t and t + now for t in (seen.start_s, seen.end_s))
        executor.provider.seen = {"1": replace(seen, start_s=start, end_s=end)}
    assert hours_meanwhile([block], now - 3600, [executor]) == pytest.approx(hours, abs=0.01)
    executor.provider.answers = False
    without = 2.0 if state == "running" else 0.0
    assert hours_meanwhile([block], now - 3600, [executor]) == pytest.approx(without, abs=0.01)
