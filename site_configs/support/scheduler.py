"""One batch system as all pools of a site see it: one query answers for every block.

Batch systems forget ended jobs, do not list new ones at once, refuse a whole query over one
unknown id, and are away for minutes. So a block changes its state only when an answer says so;
it counts as gone after several answers without it; and no answer changes nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from site_configs.support.records import BlockRecord, Reason, State, in_words

log = logging.getLogger(__name__)

JOB_PREFIX: Final = "basin."
# What a block says that ends because it is on a node that was set aside.
AVOIDED: Final = "Basin: a node of this block is set aside"
# A block that the scheduler does not list is gone after so many answers and so long.
MISSING_LOOKS: Final = 3
MISSING_GRACE_S: Final = 20.0
# Between two queries that someone asks for by name, so that nobody can flood the scheduler.
LEAST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 120.0
_TAIL_BYTES: Final = 4096

# What a job within a job must not inherit, and what would change a query's form.
_STRIPPED: Final = (
    *("SLURM_", "SLURMD_", "SQUEUE_", "SACCT_", "SCANCEL_", "PBS_"),
    *("BASIN_BLOCK_", "BASIN_DRIVER_JOB"),
)
_KEPT: Final = frozenset(
    {"SLURM_CONF", "SLURM_CLUSTERS"} | {"PBS_CONF_FILE", "PBS_SERVER", "PBS_DEFAULT", "PBS_EXEC"}
)


@dataclass(frozen=True, slots=True)
class Seen:
    """One job as an answer of the scheduler describes it; None where it does not say."""

    state: State
    reason: Reason = ""
    detail: str = ""
    nodes: tuple[str, ...] = ()
    start_s: float | None = None
    end_s: float | None = None


@dataclass(slots=True)
class Block:
    """A block as it was submitted, and what is known of it since."""

    record: BlockRecord
    name: str
    walltime_s: float
    stderr: Path
    looks_without: int = 0
    missing_since_s: float = 0.0
    given_back: bool = False
    listed: bool = False
    # The command that is still to be run: the scheduler could not be reached, or took no more.
    waiting_command: str = ""
    not_before_s: float = 0.0  # on the monotonic clock


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what tells of the batch job that it belongs to.

    A job submitted from inside a job inherits it, and a foreign SLURM_MEM_PER_CPU or
    SLURM_CPUS_PER_TASK breaks `srun` there.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in _KEPT or not name.startswith(_STRIPPED)
    }


def run(
    command: str, timeout_s: float, more: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Run a command, with ``more`` in its environment; return exit status, output, error output.

    124 with the reason as error output where it did not end in time: then all of it is killed.
    """
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**without_job(os.environ), **(more or {})},
    )
    try:
        out, error = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return 124, "", f"{command.split()[0]} did not answer within {timeout_s:g} s"
    return process.returncode, out.decode(errors="replace"), error.decode(errors="replace")


class Scheduler(ABC):
    """The batch system of a site. Safe to use from several threads; never raises.

    ``poll_every_s`` is the time between two queries, ``timeout_s`` the longest wait for one.
    """

    #: What is told of a submission that the scheduler may take later.
    later: tuple[str, ...] = ()

    def __init__(self, *, poll_every_s: float, timeout_s: float) -> None:
        self.poll_every_s = poll_every_s
        self.timeout_s = timeout_s
        self.blocks: dict[str, Block] = {}
        self.queries = 0
        self.down_since_s: float | None = None
        self._asked_s = 0.0
        self._unanswered = 0
        self._lock = threading.RLock()

    # -- what each batch system does in its own way ------------------------------------------

    @abstractmethod
    def ask(self, job_ids: list[str]) -> Mapping[str, Seen] | None:
        """Ask for all these jobs at once; None where the scheduler gave no answer."""

    @abstractmethod
    def cancel_command(self, job_ids: list[str]) -> str:
        """The command that ends these jobs."""

    @abstractmethod
    def cancelled(self, job_ids: list[str], status: int, error: str) -> list[str]:
        """Those of the jobs that are ended or unknown after the command, from what it said."""

    @abstractmethod
    def job_id(self, output: str) -> str | None:
        """The job's id in what a submission printed."""

    @abstractmethod
    def names(self, job_ids: list[str]) -> dict[str, str] | None:
        """Names of those of the jobs that the scheduler lists; None where it does not answer."""

    @abstractmethod
    def find(self, name: str) -> str | None:
        """The id of our job of that name; "" where there is none, None where nobody answers."""

    def seen(self, job_ids: list[str]) -> Mapping[str, Seen]:
        """What the scheduler says of jobs that are no blocks of ours; nothing where it is away."""
        try:
            return (self.ask(job_ids) or {}) if job_ids else {}
        except (OSError, ValueError, LookupError) as exc:
            log.warning("the scheduler's answer cannot be read: %s: %s", type(exc).__name__, exc)
            return {}

    # -- blocks ------------------------------------------------------------------------------

    def track(self, block: Block) -> None:
        """Follow a block from now on."""
        with self._lock:
            self.blocks[block.record.job_id] = block

    def alive(self) -> list[str]:
        """Ids of the blocks that have not ended, as far as known."""
        with self._lock:
            return [i for i, b in self.blocks.items() if b.record.state != "ended"]

    def refresh(self) -> None:
        """Query, unless that was done not long ago; longer pauses while there is no answer."""
        pause = min(self.poll_every_s * 2.0**self._unanswered, LONGEST_PAUSE_S)
        # A little less, so that two pools that ask one after the other share one query.
        if time.monotonic() - self._asked_s >= 0.8 * pause:
            self.look()

    def look(self) -> None:
        """One query now for all live blocks; without an answer all stays as it was."""
        with self._lock:
            # Who waited here for another's query has its answer already; and a scheduler that is
            # away holds nobody up again and again.
            pause = self.poll_every_s if self._unanswered else LEAST_PAUSE_S
            if time.monotonic() - self._asked_s < pause or not self.alive():
                return
            answered = self._submit_waiting()
            ids = [i for i in self.alive() if not self.blocks[i].waiting_command]
            if ids or not answered:
                self._take(ids, self._ask(ids) if answered else None)
            self._asked_s = time.monotonic()
            again = [
                i
                for i in self.alive()
                if self.blocks[i].given_back and not self.blocks[i].waiting_command
            ]
            if again and self.down_since_s is None:
                self._cancel(again)

    def _ask(self, ids: list[str]) -> Mapping[str, Seen] | None:
        self.queries += 1
        try:
            # By the ids that the scheduler itself gave.
            return self.ask([self.blocks[i].record.job_id for i in ids])
        except (OSError, ValueError, LookupError) as exc:
            log.warning("the scheduler's answer cannot be read: %s: %s", type(exc).__name__, exc)
            return None

    def _take(self, ids: list[str], answer: Mapping[str, Seen] | None) -> None:
        if answer is None:
            self._unanswered = min(self._unanswered + 1, 10)
            self.down_since_s = self.down_since_s or time.time()
            return
        self._unanswered = 0
        self.down_since_s = None
        for own_id in ids:
            block = self.blocks[own_id]
            seen = answer.get(block.record.job_id)
            if seen is None:
                self._missing(block)
            else:
                block.looks_without = 0
                block.listed = True
                self._update(block, seen)

    def _update(self, block: Block, seen: Seen) -> None:
        old = block.record
        nodes = seen.nodes or old.nodes
        start = seen.start_s if seen.state != "pending" else None
        end = seen.end_s
        if seen.state == "running":
            start = start or old.start_s or time.time()
            end = end or start + block.walltime_s
            words = ""
        elif seen.state == "pending":
            # A job that is put back into the queue starts anew, maybe elsewhere.
            nodes, end, words = (), None, seen.detail
        else:
            start, end = start or old.start_s, end or time.time()
            if seen.reason == "failed" and self.last_words(block)[0] == "avoided":
                seen = replace(seen, reason="avoided", detail="")
            words = self._end_in_words(block, seen.reason, nodes, seen.detail)
        block.record = replace(
            old,
            state=seen.state,
            reason=seen.reason if seen.state == "ended" else "",
            words=words,
            nodes=nodes,
            start_s=start,
            end_s=end,
        )

    def _end_in_words(
        self, block: Block, reason: Reason, nodes: tuple[str, ...], detail: str
    ) -> str:
        if reason == "cancelled" and block.given_back:
            return f"job {block.record.job_id} was given back"
        return in_words(block.record.job_id, reason, nodes, block.walltime_s, detail)

    def _missing(self, block: Block) -> None:
        """A job that an answer does not list: not listed yet, or ended and forgotten."""
        now = time.time()
        if not block.looks_without:
            block.missing_since_s = now
        block.looks_without += 1
        certain = block.given_back and block.listed
        if not certain and self._may_come_back(block, now):
            return
        record = block.record
        reason, detail = self.last_words(block)
        if reason == "unknown":
            if block.given_back:
                reason = "cancelled"
            elif record.end_s is not None and self._at_its_end(block):
                reason = "walltime"
        self._update(block, Seen("ended", reason, detail, record.nodes, record.start_s))
        block.record = replace(block.record, end_s=block.missing_since_s)

    @staticmethod
    def _may_come_back(block: Block, now: float) -> bool:
        return block.looks_without < MISSING_LOOKS or now - block.missing_since_s < MISSING_GRACE_S

    @staticmethod
    def _at_its_end(block: Block) -> bool:
        margin = min(60.0, 0.1 * block.walltime_s)
        return block.missing_since_s >= (block.record.end_s or 0.0) - margin

    def last_words(self, block: Block) -> tuple[Reason, str]:
        """Why a job ended, from what the batch system wrote into the job's own error output."""
        try:
            with block.stderr.open("rb") as file:
                file.seek(max(0, block.stderr.stat().st_size - _TAIL_BYTES))
                tail = file.read().decode(errors="replace").lower()
        except OSError:
            return "unknown", ""
        # "*** JOB 7 ON n1 CANCELLED AT … DUE TO TIME LIMIT ***"; "=>> PBS: job killed: walltime …"
        for words, reason in _LAST_WORDS:
            if words in tail:
                return reason, ""
        return "unknown", ""

    # -- submissions that have to wait -------------------------------------------------------

    def may_come_later(self, error: str) -> bool:
        """Whether a submission was refused for now only."""
        return any(words in error for words in self.later)

    def _submit_waiting(self) -> bool:
        """Submit what could not be submitted before; False where the scheduler is away still."""
        for block in list(self.blocks.values()):
            if not block.waiting_command or block.record.state == "ended":
                continue
            if time.monotonic() < block.not_before_s and not block.given_back:
                continue
            # A submission that went unanswered may have come through all the same.
            job_id = self.find(block.name)
            if job_id is None:
                return False
            if not job_id and block.given_back:
                self._never(block, "cancelled", "was given back before it was submitted")
                continue
            if not job_id:
                status, out, error = run(block.waiting_command, self.timeout_s)
                job_id = self.job_id(out) if status == 0 else None
                if job_id is None and status and not self.may_come_later(error):
                    said = " ".join(error.split()) or f"exit status {status}"
                    self._never(block, "failed", f"was refused: {said}")
                    continue
                if job_id is None:
                    return True  # the others would fare no better now
            block.waiting_command = ""
            block.record = replace(block.record, job_id=job_id, words="")
        return True

    @staticmethod
    def _never(block: Block, reason: Reason, words: str) -> None:
        block.waiting_command = ""
        block.record = replace(
            block.record,
            state="ended",
            reason=reason,
            words=f"a block of pool {block.record.pool} {words}",
        )

    # -- ending ------------------------------------------------------------------------------

    def cancel(self, own_ids: Iterable[str]) -> dict[str, bool]:
        """End blocks; True for each that is ended, or will be. Asked again until they are gone."""
        with self._lock:
            ids = [i for i in own_ids if i in self.blocks]
            for i in ids:
                self.blocks[i].given_back = True
            live = [
                i
                for i in ids
                if self.blocks[i].record.state != "ended" and not self.blocks[i].waiting_command
            ]
            done = set(self._cancel(live)) if live else set()
            return {i: i in done or i not in live for i in ids}

    def _cancel(self, own_ids: list[str]) -> list[str]:
        real = {self.blocks[i].record.job_id: i for i in own_ids}
        return [real[job] for job in self.cancel_jobs(list(real))]

    def cancel_jobs(self, job_ids: list[str]) -> list[str]:
        """End jobs by the scheduler's ids; those that are ended or unknown now."""
        if not job_ids:
            return []
        status, _, error = run(self.cancel_command(job_ids), self.timeout_s)
        return self.cancelled(job_ids, status, error)

    def wait_gone(self, limit_s: float) -> list[str]:
        """Wait until all blocks that were given back have left their nodes; those that have not."""
        until = time.monotonic() + limit_s
        pause = 0.5
        while True:
            self.look()
            with self._lock:
                left = [i for i in self.alive() if self.blocks[i].given_back]
            if not left or time.monotonic() > until:
                return [self.blocks[i].record.job_id for i in left]
            time.sleep(pause)
            pause = min(1.5 * pause, self.poll_every_s, 10.0)


_LAST_WORDS: Final[tuple[tuple[str, Reason], ...]] = (
    (AVOIDED.lower(), "avoided"),
    ("due to time limit", "walltime"),
    ("pbs: job killed: walltime", "walltime"),
    ("due to preemption", "preempted"),
    ("due to node failure", "node"),
    ("due to job requeue", "node"),
    ("oom_kill", "memory"),
    ("oom-kill", "memory"),
    ("out of memory handler", "memory"),
    ("pbs: job killed: mem", "memory"),
    ("pbs: job killed: vmem", "memory"),
    ("cgroup mem", "memory"),
    ("*** job", "cancelled"),
)
