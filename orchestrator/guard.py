"""A guard around kernels: they run in a child process that may hang, crash or eat memory.

A Python time-out cannot reach into C, so the guard watches from outside: a time limit and a
memory limit per item, and a new child after a crash. pebble's process pool does this for single
calls; here items come in hundreds that take microseconds to hours each, so results stream over
one pipe and only a few bytes of shared memory tell which item is running.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from orchestrator.block import node_name, own_devices
from orchestrator.child import SHARED_BYTES, Shared, family
from orchestrator.errors import CampaignError, RunError

POLL_S = 0.1
RECYCLE_AFTER = 20_000
KILL_LIMIT = 4
STILLBORN_LIMIT = 5
_PAGE = os.sysconf("SC_PAGE_SIZE")
# Environment of a pool whose workers have more than one core each.
THREADS = "BASIN_THREADS"
# Outcome of an item that its block's end broke off.
CUT = "cut"


class StillbornError(RunError):
    """Kernel processes on this node end before they run anything."""


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a kernel process finds: its threads, its devices, and the worker's own rest."""
    threads = environment.get(THREADS, "")
    count = threads if threads.isdecimal() and int(threads) else "1"
    return {
        **environment,
        **own_devices(environment),
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), count),
        "OMP_STACKSIZE": "512M",
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "PYTHONUNBUFFERED": "1",
    }


class _Child:
    """One child process with its pipe, its shared memory and what it wrote to stderr."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        memory = os.memfd_create("basin-guard")
        os.truncate(memory, SHARED_BYTES)
        self._stderr = os.memfd_create("basin-stderr")
        self.shared = Shared(memory)
        self.shared.set_current(-1)
        self.items = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.child", str(theirs.fileno()), str(memory)],
            pass_fds=(theirs.fileno(), memory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env=child_environment(os.environ),
        )
        theirs.close()
        os.close(memory)
        self.connection = Connection(ours.detach())

    def resident(self, *, alone: bool = False) -> int:
        """Return the resident memory in bytes of the child and, unless ``alone``, its descendants.

        Programs such as Psi4 run in processes of their own.
        """
        pid = self.process.pid
        return sum(map(_resident, [pid] if alone else family(pid)))

    def last_words(self, line: int = 0) -> str:
        """Return a line of what the child wrote to stderr; the first tells of a crash in C."""
        text = os.pread(self._stderr, 1 << 16, 0).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[line][:200] if lines else ""

    def close(self) -> None:
        """Kill the process and free what belongs to it."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.shared.close()
        os.close(self._stderr)


class Guard:
    """Runs items in a child process; whatever happens to it, every item gets an outcome."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._under_way = False
        self._stillborn = 0
        self.restarts = 0

    def close(self) -> None:
        """End the child process."""
        if self._child is not None:
            self._child.close()
            self._child = None
        self._under_way = False

    def run(
        self,
        stage: Any,
        payloads: list[Any],
        *,
        time_limit: float,
        memory_limit: int,
        batches: Sequence[Sequence[int]] | None = None,
        crash_limit: int = 2,
        needs: Sequence[float] | None = None,
        stop_at: float = math.inf,
        cut_at: float = math.inf,
        should_stop: Callable[[], bool] = lambda: False,
        on_wait: Callable[[Sequence[int], float], None] = lambda running, seconds: None,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (index, outcome) for each payload, in order unless a crash intervenes.

        ``batches`` says which items run together (default: each alone). A batch that crashes, or
        breaks a limit, is run again item by item, and so costs only the guilty one.
        An item whose crash repeats ``crash_limit`` times is given up. ``time_limit`` (s) holds for
        each item, and for a batch as often as it has items; ``memory_limit`` (bytes, resident) for
        whatever runs. After ``should_stop`` turns true the running item may save its state and
        end with status `open`, and items that were not started have no outcome at all.
        ``on_wait`` is called several times a second while nothing comes in, with the items that
        run and for how long (s) they have.
        The block around it is left at ``stop_at`` (epoch, s): an item that ``needs`` more seconds
        than are left ends as `unfit`, one that runs then is asked to stop, and what still runs at
        ``cut_at`` ends as `cut`.
        Raises StillbornError where child processes end before they run anything, CampaignError
        where what all items need is not there.
        """
        pending = dict(enumerate(payloads))
        attempts = dict.fromkeys(pending, 0)
        limits = dict.fromkeys(pending, memory_limit)
        planned = [list(batch) for batch in batches or [[i] for i in pending]]
        # The ranks of an MPI program are spread over nodes, and not one item's memory on this one.
        ranks = bool(getattr(stage, "mpi_prefix", ""))
        wanted = list(needs) if needs is not None else [0.0] * len(payloads)

        def ends() -> bool:
            return should_stop() or time.time() >= stop_at

        if self._under_way:
            # Whoever asked for the last batch left before its end (a full disk, say); the child
            # still works on it, and what it sends must not be taken for results of this one.
            self.close()
        while pending:
            if self._child is None or self._child.process.poll() is not None:
                self.close()
                self._child = _Child()
            child = self._child
            child.shared.set_stop(False)
            self._under_way = True
            done = False
            planned = [left for b in planned if (left := [i for i in b if i in pending])]
            batch_of = {batch[0]: batch for batch in planned}
            try:
                work = [[(i, pending[i]) for i in batch] for batch in planned]
                needed = [sum(wanted[i] for i in batch) for batch in planned]
                child.connection.send((stage, work, needed, stop_at))
            except OSError:
                child.process.wait()
                if not child.items:
                    self._count_stillborn(child)
                self._replace()
                continue
            checked = time.monotonic()
            while not done:
                verdict: dict[str, Any] | None = None
                current = -1
                for index, outcome in self._receive(child):
                    if index < 0:
                        done = True
                        self._under_way = False
                        continue
                    pending.pop(index)
                    outcome["attempts"] = attempts[index] + 1
                    child.items += 1
                    self._stillborn = 0
                    yield index, outcome
                now = time.monotonic()
                if done or now - checked < POLL_S:
                    continue
                checked = now
                current, since = child.shared.current()
                on_wait(batch_of.get(current, ()), now - since)
                if ends():
                    child.shared.set_stop(True)
                together = len(batch_of.get(current, ()))
                if time.time() >= cut_at:
                    yield from self._cut(child, pending, batch_of.get(current, []), now - since)
                    return
                if child.process.poll() is not None:
                    # What it sent before it died is still in the pipe.
                    for index, outcome in self._receive(child, 0.0):
                        if index >= 0:
                            pending.pop(index)
                            outcome["attempts"] = attempts[index] + 1
                            child.items += 1
                            yield index, outcome
                    if current < 0 and not child.items:
                        self._count_stillborn(child)
                    if together > 1:
                        planned = _alone(planned, current)
                        self._replace()
                        break
                    verdict = self._autopsy(
                        child, attempts, current if current in pending else -1, crash_limit
                    )
                elif current in pending and now - since > together * time_limit:
                    if together > 1:
                        planned = _alone(planned, current)
                        self._replace()
                        break
                    verdict = _outcome(
                        "timeout",
                        f"not finished after its time limit of {time_limit:g} s "
                        "(`time_limit` of the stage)",
                    )
                elif current in pending and child.resident(alone=ranks) > limits[current]:
                    if together > 1:
                        planned = _alone(planned, current)
                        self._replace()
                        break
                    attempts[current] += 1
                    if attempts[current] < 2:
                        limits[current] *= 2
                        self._replace()
                        break
                    attempts[current] -= 1
                    verdict = _outcome(
                        "resource",
                        f"needed more than {limits[current] / 1e9:.1f} GB, twice the stage's "
                        "`memory_limit`; raise the limit to run it",
                    )
                    verdict["ladder"] = ("memory limit doubled",)
                else:
                    continue
                self._replace()
                if verdict is not None and current in pending:
                    pending.pop(current)
                    verdict.update(
                        attempts=attempts[current] + 1,
                        started_s=time.time() - (now - since),
                        wall_s=now - since,
                        cpu_s=0.0,
                    )
                    yield current, verdict
                break
            if done:
                if child.shared.stop() or ends():
                    return
                if child.items >= RECYCLE_AFTER:
                    self.close()
            elif ends():
                return

    def _cut(
        self, child: _Child, pending: dict[int, Any], running: list[int], wall_s: float
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Break off what runs; what had been finished before is still in the pipe."""
        finished = [result for result in self._receive(child, 0.0) if result[0] >= 0]
        self._replace()
        for index, outcome in finished:
            pending.pop(index)
            outcome["attempts"] = 1
            yield index, outcome
        for index in running:
            if index in pending:
                outcome = _outcome(CUT, "")
                outcome.update(started_s=time.time() - wall_s, wall_s=wall_s, cpu_s=0.0)
                yield index, outcome

    def _count_stillborn(self, child: _Child) -> None:
        self._stillborn += 1
        if self._stillborn >= STILLBORN_LIMIT:
            raise StillbornError(
                f"kernel processes on {node_name()} end before they run anything (exit "
                f"status {child.process.returncode}: {child.last_words(-1) or 'no message'}); "
                "`basin doctor` there says what is broken"
            )

    def _replace(self) -> None:
        self.restarts += 1
        self.close()

    @staticmethod
    def _receive(child: _Child, timeout: float = POLL_S) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield what the child sent; index -1 marks the end of the batch."""
        try:
            if not child.connection.poll(timeout):
                return
            while True:
                kind, results = child.connection.recv()
                if kind == "refused":
                    raise CampaignError(results)
                yield from results
                if kind == "done":
                    yield -1, {}
                    return
                if not child.connection.poll(0):
                    return
        except (EOFError, OSError):
            # A dead child; the loop sees that in its exit status.
            time.sleep(POLL_S)

    @staticmethod
    def _autopsy(
        child: _Child, attempts: dict[int, int], current: int, crash_limit: int
    ) -> dict[str, Any] | None:
        """Return why the running item is given up, or None if it gets another try."""
        if current < 0:
            return None
        code = child.process.returncode
        attempts[current] += 1
        killed = code == -signal.SIGKILL
        if attempts[current] < (KILL_LIMIT if killed else crash_limit):
            return None
        if killed:
            status = "resource"
            how = "killed by signal 9 each time, as the system does when memory runs out"
        elif code < 0:
            status = "crash"
            how = f"died of {signal.Signals(-code).name}"
        else:
            status = "crash"
            how = f"ended the process with exit status {code}"
        words = child.last_words()
        attempts[current] -= 1
        tries = attempts[current] + 1
        return _outcome(status, f"{how}, {tries} times{f': {words}' if words else ''}")


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _alone(batches: list[list[int]], first: int) -> list[list[int]]:
    """Return batches with the one that begins with ``first`` taken apart."""
    made: list[list[int]] = []
    for batch in batches:
        made += [[i] for i in batch] if batch[0] == first else [batch]
    return made


def _outcome(status: str, message: str) -> dict[str, Any]:
    return {"status": status, "message": message, "ladder": ()}
