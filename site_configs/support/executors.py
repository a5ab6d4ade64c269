"""Parsl's executors for blocks of a batch system.

Only blocks that idle are given back, and the end of a run waits until its jobs are gone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from parsl.executors import HighThroughputExecutor, MPIExecutor
from parsl.executors.status_handling import BlockProviderExecutor
from parsl.jobs.states import JobState, JobStatus

if TYPE_CHECKING:
    _Base = HighThroughputExecutor
else:
    _Base = object

# How long the end of a run waits for its jobs to leave their nodes.
GONE_LIMIT_S: Final = 60.0
# Parsl asks about once a second whether there is too much; a longer silence means there was not.
_SILENCE_S: Final = 10.0
_NOBODYS_FAULT: Final = frozenset({"cancelled", "preempted", "avoided"})


class _Blocks(_Base):
    """Comes before an executor of Parsl's among a class's bases."""

    _surplus_since_s = 0.0
    _surplus_seen_s = 0.0

    def scale_in(self, blocks: int, max_idletime: float | None = None) -> list[str]:
        """Give blocks back, idle ones only where ``max_idletime`` (s) is given; return their ids.

        Parsl's own takes one that still starts or waits in the queue for idle, and asked for none
        it gives all of these back.
        """
        if blocks < 1:
            return []
        if max_idletime is None:
            return list(super().scale_in(blocks))
        return self._give_back(self._idle_blocks(max_idletime)[:blocks])

    def _idle_blocks(self, limit_s: float) -> list[str]:
        """Ids of the blocks to give back first: idle ones, then those waiting for no reason."""
        now = time.monotonic()
        if now - self._surplus_seen_s > _SILENCE_S:
            self._surplus_since_s = now
        self._surplus_seen_s = now
        idle: dict[str, float] = {}
        for manager in self.connected_managers():
            if manager["active"]:
                busy = manager["tasks"] > 0
                known = idle.get(manager["block_id"], float("inf"))
                idle[manager["block_id"]] = 0.0 if busy else min(known, manager["idle_duration"])
        resting = sorted((b for b, s in idle.items() if s > limit_s), key=lambda b: -idle[b])
        if now - self._surplus_since_s <= limit_s:
            return resting
        status = self.status_facade
        waiting = [b for b, s in status.items() if s.state == JobState.PENDING and b not in idle]
        return resting + sorted(waiting, key=int, reverse=True)

    def _give_back(self, block_ids: list[str]) -> list[str]:
        known = [b for b in block_ids if b in self.blocks_to_job_id]
        if not known:
            return []
        for block_id in known:
            self._hold_block(block_id)
        assert self.provider is not None
        done = self.provider.cancel([self.blocks_to_job_id[b] for b in known])
        return [b for b, ended in zip(known, done, strict=True) if ended]

    def status(self) -> dict[str, JobStatus]:
        """States of all blocks; one that ended before its workers came is MISSING, a failure.

        Parsl's own says so too of a block that was cancelled or made way for another job.
        """
        found: dict[str, JobStatus] = BlockProviderExecutor.status(self)
        silent = [b for b, s in found.items() if s.terminal and s.state != JobState.SCALED_IN]
        connected = set(self.connected_blocks()) if silent else set()
        for block_id in silent:
            if block_id not in connected and self._reason(block_id) not in _NOBODYS_FAULT:
                status = found[block_id]
                found[block_id] = JobStatus(
                    JobState.MISSING,
                    message=status.message or "the block ended before its workers came",
                    stdout_path=status.stdout_path,
                    stderr_path=status.stderr_path,
                )
        return found

    def _reason(self, block_id: str) -> str:
        try:
            record = getattr(self.provider, "record", None)
            return str(record(self.blocks_to_job_id[block_id]).reason) if record else ""
        except KeyError:
            return ""

    def shutdown(self, timeout: float = 10.0) -> None:
        """End the interchange, and return when the blocks have left their nodes."""
        super().shutdown(timeout)
        wait = getattr(self.provider, "wait_gone", None)
        if wait is not None:
            wait(GONE_LIMIT_S)


class WorkerPool(_Blocks, HighThroughputExecutor):
    """Workers of one pool."""


class MPIPool(_Blocks, MPIExecutor):
    """Workers that each start MPI programs over the nodes of their block."""

    resource_specification: dict[str, int | str]
