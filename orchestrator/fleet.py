"""The blocks of a run: which are there, how each ended, what they cost, and giving them back."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from orchestrator.progress import ProgressFile

POLL_S: Final = 5.0
# How long the scheduler may take to notice what the heartbeat has told already (a node that is
# dead, say), before a lost worker pool is judged without its word.
VERDICT_S: Final = 120.0
# Ends of a block that no item has a part in.
KNOWN_ENDS: Final = frozenset(
    {"walltime", "cancelled", "node", "preempted", "avoided", "completed"}
)
LEFTOVER_LOOK_S: Final = 0.5
_ENDED_SHOWN: Final = 50
_MANAGERS_KEPT: Final = 20_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a worker pool was lost: in words, and whether no item is to blame.

    ``event`` is the same for all that was lost together.
    """

    blameless: bool
    words: str = ""
    event: str = ""
    walltime: bool = False


class Fleet:
    """The blocks of all pools, as Parsl's executors and their providers know them."""

    def __init__(
        self,
        executors: dict[str, Any],
        node_hours_before: float = 0.0,
        bad: dict[str, str] | None = None,
    ) -> None:
        self._executors = executors
        self._before = node_hours_before
        self._bad = bad if bad is not None else {}
        self._managers: dict[tuple[str, str], tuple[str, str]] = {}  # block and node of each
        self._tasks: Counter[tuple[str, str]] = Counter()
        self._done_hours: dict[str, float] = {}
        self._polled = 0.0
        self._looked = 0.0
        self._held: set[str] = set()
        self.given_back: set[str] = set()
        self.connected: Counter[str] = Counter()
        self.tasks = 0
        self.arrivals = 0

    def poll(self, every_s: float = POLL_S) -> bool:
        """See which worker pools are connected; tell whether that was done now."""
        now = time.monotonic()
        if now - self._polled < every_s:
            return False
        self._polled = now
        connected: Counter[str] = Counter()
        tasks: Counter[tuple[str, str]] = Counter()
        for pool, executor in self._executors.items():
            try:
                managers = executor.connected_managers()
            except Exception:
                # An interchange that does not answer is another's business to notice.
                return False
            for manager in managers:
                place = (pool, manager["manager"])
                if place not in self._managers:
                    self.arrivals += 1
                    self._managers[place] = manager["block_id"], ""
                tasks[pool, manager["block_id"]] += manager["tasks"]
                if manager["active"] and not manager["draining"]:
                    connected[pool] += manager["worker_count"]
        while len(self._managers) > _MANAGERS_KEPT:
            del self._managers[next(iter(self._managers))]
        self.connected, self._tasks = connected, tasks
        self.tasks = sum(tasks.values())
        self._return_bad_blocks()
        return True

    def seen(self, pool: str, manager: str, node: str) -> None:
        """Take in on which node a worker pool is, which Parsl's interchange does not tell."""
        if found := self._managers.get((pool, manager)):
            self._managers[pool, manager] = found[0], node

    # -- how blocks ended -------------------------------------------------------------------

    def verdict(self, pool: str, manager: str, host: str, waited_s: float) -> Verdict | None:
        """Return why a worker pool was lost; None where the scheduler may still find out."""
        executor = self._executors[pool]
        provider = executor.provider
        if not hasattr(provider, "record"):
            return Verdict(False)
        self._look()
        block, _ = self._managers.get((pool, manager), (None, ""))
        job = executor.blocks_to_job_id.get(block) if block is not None else None
        record = self._record(pool, job) if job is not None else self._on_host(pool, host)
        if record is None:
            return Verdict(False)
        label = f"block {block}: " if block is not None else ""
        event = f"{pool} {record.job_id}"
        if record.state == "ended":
            known = record.reason in KNOWN_ENDS
            over = record.reason == "walltime"
            return Verdict(known, f"{label}{record.words}", event, over)
        if record.end_s and time.time() >= record.end_s:
            # The scheduler is away, or late; the clock is not.
            words = f"{label}job {record.job_id} was to end by now"
            return Verdict(True, words, event, True)
        if waited_s < VERDICT_S:
            return None
        words = f"{label}job {record.job_id} lost its workers on {host} while it runs"
        return Verdict(False, words, event)

    def _look(self) -> None:
        if time.monotonic() - self._looked < POLL_S:
            return
        for executor in self._executors.values():
            if hasattr(executor.provider, "look"):
                # Pools of a site share their view of the scheduler; a second look costs nothing
                # that the first did not bring.
                executor.provider.look()
        self._looked = time.monotonic()

    def _record(self, pool: str, job: Any) -> Any:
        provider = self._executors[pool].provider
        if not hasattr(provider, "record"):
            return None
        try:
            return provider.record(job)
        except (KeyError, AttributeError):
            return None

    def _on_host(self, pool: str, host: str) -> Any:
        """Return the one block that can have been on a host; None where that is not certain."""
        short = host.partition(".")[0]
        jobs = list(self._executors[pool].blocks_to_job_id.values())
        records = [r for job in jobs if (r := self._record(pool, job)) is not None]
        here = [r for r in records if {host, short} & set(r.nodes)]
        ended = [r for r in here if r.state == "ended" and time.time() - (r.end_s or 0.0) < 300]
        return ended[0] if len(ended) == 1 else None

    # -- what they are, and cost ------------------------------------------------------------

    def blocks(self) -> list[dict[str, Any]]:
        """Return all living blocks and the last of the others, as they stand in progress.json."""
        alive: list[dict[str, Any]] = []
        ended: list[dict[str, Any]] = []
        for pool, executor in self._executors.items():
            for block, job in list(executor.blocks_to_job_id.items()):
                record = self._record(pool, job)
                if record is not None:
                    word = {**dataclasses.asdict(record), "nodes": list(record.nodes)}
                else:
                    word = _from_status(executor, block, job)
                word.update(pool=pool, block=block)
                (ended if word["state"] == "ended" else alive).append(word)
        ended.sort(key=lambda word: word["end_s"] or 0.0)
        return alive + ended[-_ENDED_SHOWN:]

    def node_hours(self) -> float:
        """Return the node-hours used so far, those of earlier runs included."""
        now = time.time()
        running = 0.0
        for pool, executor in self._executors.items():
            for job in list(executor.blocks_to_job_id.values()):
                if job in self._done_hours or (record := self._record(pool, job)) is None:
                    continue
                if not record.start_s:
                    if record.state == "ended":
                        self._done_hours[job] = 0.0
                    continue
                until = min(record.end_s or now, now)
                hours = max(0.0, until - record.start_s) * record.n_nodes / 3600
                if record.state == "ended":
                    self._done_hours[job] = hours
                else:
                    running += hours
        return self._before + sum(self._done_hours.values()) + running

    # -- giving back ------------------------------------------------------------------------

    def _return_bad_blocks(self) -> None:
        """Send nothing more to bad nodes; end blocks without others once nothing runs there."""
        if not self._bad:
            return
        for pool, executor in self._executors.items():
            if not hasattr(executor.provider, "exclude_nodes"):
                continue  # the next block would land there again, so what works there may go on
            useless = self._blocks_on_bad_nodes(pool)
            for (of_pool, manager), (block, node) in list(self._managers.items()):
                if of_pool != pool or manager in self._held:
                    continue
                if block in useless or node in self._bad:
                    self._held.add(manager)
                    with contextlib.suppress(Exception):
                        executor.command_client.run(["HOLD_MANAGER", manager])
                    # A task may have been sent before it was held: the next poll counts it.
                    self._tasks[pool, block] += 1
            for block, job in useless.items():
                if not self._tasks[pool, block]:
                    self.given_back.add(job)
                    executor.provider.cancel([job])

    def _blocks_on_bad_nodes(self, pool: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for block, job in list(self._executors[pool].blocks_to_job_id.items()):
            record = self._record(pool, job)
            if record is None or record.state != "running" or job in self.given_back:
                continue
            if record.nodes and set(record.nodes) <= self._bad.keys():
                found[block] = job
        return found

    def cancel_all(self, limit_s: float) -> None:
        """End every block that may be left, whatever state Parsl is in, and see them go."""
        for pool, executor in self._executors.items():
            left = []
            for block, job in list(executor.blocks_to_job_id.items()):
                record = self._record(pool, job)
                state = getattr(executor, "status_facade", {}).get(block)
                ended = record.state == "ended" if record else state is None or state.terminal
                if not ended:
                    left.append(job)
            if left:
                with contextlib.suppress(Exception):
                    executor.provider.cancel(left)
        until = time.monotonic() + limit_s
        for executor in self._executors.values():
            if hasattr(executor.provider, "wait_gone"):
                with contextlib.suppress(Exception):
                    executor.provider.wait_gone(max(0.0, until - time.monotonic()))


def _from_status(executor: Any, block: str, job: Any) -> dict[str, Any]:
    """Return what there is to say of a block whose provider keeps no records."""
    status = executor.status_facade.get(block)
    state = "pending"
    if status is not None and status.terminal:
        state = "ended"
    elif status is not None and status.state.name == "RUNNING":
        state = "running"
    return {
        "job_id": str(job),
        "state": state,
        "reason": "" if state != "ended" else "unknown",
        "words": "",
        "nodes": [],
        "start_s": None,
        "end_s": None,
        "n_nodes": int(executor.provider.nodes_per_block),
    }


def cancel_leftovers(
    executors: list[Any], blocks: list[dict[str, Any]], limit_s: float = 0.0
) -> list[str]:
    """End what an earlier driver left behind, by its progress file; return the jobs' ids.

    Waits for up to ``limit_s`` until they are gone: what their workers seal at the last moment
    would be computed again by a driver that has looked at the store before.
    """
    cancelled: list[str] = []
    until = time.monotonic() + limit_s
    for executor in executors:
        provider = executor.provider
        jobs = [
            str(word["job_id"])
            for word in blocks
            if word.get("pool") == executor.label and word.get("state") != "ended"
        ]
        if jobs and hasattr(provider, "cancel_by_id"):
            with contextlib.suppress(Exception):
                gone = provider.cancel_by_id(jobs)
                cancelled += gone
                while gone and time.monotonic() < until and _any_left(provider, gone):
                    time.sleep(LEFTOVER_LOOK_S)
    return cancelled


def _any_left(provider: Any, jobs: list[str]) -> bool:
    """Tell whether a job still has processes; one that its scheduler does not know has none."""
    return any(seen.state != "ended" for seen in provider.seen_by_id(jobs).values())


def hours_used(before: ProgressFile, executors: list[Any]) -> float:
    """Return the node-hours that all runs of a campaign have used, by what the last one wrote."""
    return before.node_hours + hours_meanwhile(before.blocks, before.time_s, executors)


def hours_meanwhile(blocks: list[dict[str, Any]], since_s: float, executors: list[Any]) -> float:
    """Return the node-hours that blocks without a driver have used since it last wrote.

    Of a block that the scheduler no longer knows those up to its latest end.
    """
    now = time.time()
    hours = 0.0
    for word, seen in _seen_now(blocks, executors):
        start, until = word.get("start_s"), word.get("end_s")
        if seen is not None:
            start, until = seen.start_s or start, seen.end_s or until
            if seen.state == "pending" or not start:
                continue
        elif word.get("state") != "running":
            continue
        lasted = min(now, float(until or now)) - max(since_s, float(start or since_s))
        hours += max(0.0, lasted) * int(word.get("n_nodes", 1)) / 3600
    return hours


def _seen_now(
    blocks: list[dict[str, Any]], executors: list[Any]
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Give the blocks that had not ended, each with what its scheduler says of it, or None."""
    left = [word for word in blocks if word.get("state") != "ended"]
    providers = {executor.label: executor.provider for executor in executors}
    for pool in dict.fromkeys(word.get("pool") for word in left):
        words = {str(word.get("job_id")): word for word in left if word.get("pool") == pool}
        seen: Mapping[str, Any] = {}
        if hasattr(providers.get(pool), "seen_by_id"):
            with contextlib.suppress(Exception):
                seen = providers[pool].seen_by_id(list(words))
        for job, word in words.items():
            yield word, seen.get(job)
