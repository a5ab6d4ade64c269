"""Which blocks are given back, and which count as failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from parsl.jobs.states import JobState, JobStatus
from parsl.providers import LocalProvider

from site_configs.support import executors
from site_configs.support.executors import WorkerPool
from site_configs.support.records import BlockRecord, Reason


class Provider(LocalProvider):  # type: ignore[misc]
    """Blocks without a batch system, which end as a test says."""

    def __init__(self) -> None:
        super().__init__(init_blocks=0, max_blocks=9)
        self.states: dict[str, JobState] = {}
        self.reasons: dict[str, Reason] = {}
        self.cancelled: list[str] = []

    def status(self, job_ids: Sequence[Any]) -> list[JobStatus]:
        return [JobStatus(self.states[job_id]) for job_id in job_ids]

    def cancel(self, job_ids: Sequence[Any]) -> list[bool]:
        self.cancelled += job_ids
        return [True for _ in job_ids]

    def record(self, job_id: str) -> BlockRecord:
        return BlockRecord(job_id, "cpu", reason=self.reasons.get(job_id, ""))


class Pool(WorkerPool):
    """A pool whose interchange says what a test says."""

    def __init__(self, provider: Provider) -> None:
        super().__init__(label="cpu", address="127.0.0.1", provider=provider)
        self.managers: list[dict[str, Any]] = []

    def connected_managers(self) -> list[dict[str, Any]]:
        return self.managers

    def connected_blocks(self) -> list[str]:
        return [manager["block_id"] for manager in self.managers]

    def _hold_block(self, block_id: str) -> None:
        pass

    def block(self, block_id: str, state: JobState, **manager: Any) -> None:
        self.blocks_to_job_id[block_id] = f"job{block_id}"
        self.job_ids_to_block[f"job{block_id}"] = block_id
        self._status[block_id] = JobStatus(state)
        assert isinstance(self.provider, Provider)
        self.provider.states[f"job{block_id}"] = state
        if manager:
            self.managers.append({"block_id": block_id, "active": True, **manager})


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(executors.time, "monotonic", lambda: clock[0])
    return clock


@pytest.fixture
def pool(now: list[float]) -> Pool:
    made = Pool(Provider())
    made.block("0", JobState.RUNNING, tasks=3, idle_duration=0.0)
    made.block("1", JobState.RUNNING, tasks=0, idle_duration=12.0)
    made.block("2", JobState.RUNNING, tasks=0, idle_duration=50.0)
    made.block("3", JobState.RUNNING)  # its workers start
    made.block("4", JobState.PENDING)
    return made


def test_asked_for_none_it_gives_none(pool: Pool) -> None:
    assert pool.scale_in(0, max_idletime=30.0) == []
    assert pool.provider.cancelled == []


def test_only_the_idle_are_given_back_at_once(pool: Pool) -> None:
    assert pool.scale_in(4, max_idletime=30.0) == ["2"]


def test_what_waits_for_nothing_is_given_back_later(pool: Pool, now: list[float]) -> None:
    pool.scale_in(1, max_idletime=30.0)
    pool.managers = pool.managers[:2]
    for _ in range(32):
        now[0] += 1.0
        given = pool.scale_in(4, max_idletime=30.0)
    assert given == ["4"], "the one in the queue, but never one whose workers start"


def test_a_short_surplus_leaves_the_queue_alone(pool: Pool, now: list[float]) -> None:
    pool.managers = pool.managers[:1]
    for _ in range(4):
        for _ in range(20):
            now[0] += 1.0
            assert pool.scale_in(1, max_idletime=30.0) == []
        now[0] += 60.0  # meanwhile there was work for all


def test_at_the_end_all_go(pool: Pool) -> None:
    assert len(pool.scale_in(5)) == 5


@pytest.mark.parametrize(
    ("ended", "reason", "state"),
    [
        (JobState.COMPLETED, "completed", JobState.MISSING),
        (JobState.TIMEOUT, "walltime", JobState.MISSING),
        (JobState.FAILED, "failed", JobState.MISSING),
        (JobState.CANCELLED, "cancelled", JobState.CANCELLED),
        (JobState.TIMEOUT, "preempted", JobState.TIMEOUT),
    ],
)
def test_a_block_that_ended_before_its_workers_came(
    pool: Pool, ended: JobState, reason: Reason, state: JobState
) -> None:
    pool.block("5", ended)
    assert isinstance(pool.provider, Provider)
    pool.provider.reasons["job5"] = reason
    assert pool.status()["5"].state is state
    pool.managers.append({"block_id": "5", "active": False, "tasks": 0, "idle_duration": 0.0})
    assert pool.status()["5"].state is ended
