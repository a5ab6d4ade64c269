"""Batch jobs one after the other, for a campaign that outlasts its driver's walltime.

Each link submits the next one as it starts, to begin where this job ends in failure: so that the
campaign goes on even where the driver is killed or its node fails. A link that ends the campaign,
or that nobody wants to go on from, cancels the next one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import typer

from orchestrator import lock, progress
from orchestrator.errors import BasinError, SiteError
from orchestrator.scheduler import SCHEDULERS, surrounding
from orchestrator.shard import write_whole

# Exit statuses after which another try would end alike: done, a wrong file, an unusable store.
FINAL = (0, 2, 3)
_LOOK_S = 2.0


@dataclass(slots=True)
class ChainFile:
    """``control/chain.json``: the driver's jobs, and how far the campaign was at the last start.

    ``jobs`` are those that may still be there; ``mark`` is what `mark` returned, None before any
    link began.
    """

    scheduler: str
    script: str
    jobs: list[str] = field(default_factory=list)
    links: int = 0
    mark: list[float] | None = None


def read(store: Path) -> ChainFile | None:
    """Return what is known of a store's driver jobs; None where there were none."""
    try:
        return ChainFile(**json.loads((store / "control" / "chain.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write(store: Path, chain: ChainFile) -> None:
    """Put down what is known of a store's driver jobs."""
    write_whole(store / "control" / "chain.json", json.dumps(asdict(chain)).encode())


def forget(store: Path) -> None:
    """Begin anew: what earlier links achieved or not does not count any more."""
    (store / "control" / "chain.json").unlink(missing_ok=True)


def living(store: Path) -> dict[str, str]:
    """Return the driver jobs of a store that are pending or running, with that word."""
    chain = read(store)
    if chain is None or not SCHEDULERS[chain.scheduler].found():
        return {}
    states = {job: SCHEDULERS[chain.scheduler].state(job) for job in chain.jobs}
    return {job: state for job, state in states.items() if state}


def mark(store: Path) -> list[float]:
    """Return numbers that differ after anything was achieved: entries, tasks, saved states."""
    last = progress.read(store)
    done = sum(s.ok + s.failed + s.upstream for s in last.stages) if last else 0
    saved = 0.0
    for folder in (store / "checkpoints").glob("*"):
        with contextlib.suppress(OSError):
            saved = max([saved, *(entry.stat().st_mtime for entry in os.scandir(folder))])
    return [last.entries if last else 0, done, saved]


@contextlib.contextmanager
def chained(
    store: Path, script: Path, max_node_hours: float | None, say: Callable[[str], None]
) -> Iterator[bool]:
    """Drive a campaign inside as one link of a chain; gives whether it is the first one.

    ``script`` is what the next link is submitted from. A stop that the user asked for, and
    node-hours used up, end the chain. Raises SiteError outside of a batch job.
    """
    link = Link(store, script)
    say(link.begin())
    link.wait_for_store()
    status = BasinError.exit_code
    try:
        yield link.first
        status = 0
    except typer.Exit as exc:
        status = exc.exit_code
        raise
    except BasinError as exc:
        status = exc.exit_code
        raise
    finally:
        last = progress.read(store)
        asked = last is not None and bool(lock.stop_requested(store, last.run_id))
        spent = last is not None and last.node_hours >= (max_node_hours or math.inf)
        if words := link.end(status, final=asked or spent):
            say(words)


class Link:
    """One driver job of a chain, from its start to its end; ``first`` after `begin`."""

    def __init__(self, store: Path, script: Path) -> None:
        here = surrounding()
        if here is None:
            raise SiteError(
                "--chain is for a batch job's script, and this is no batch job: `basin submit` "
                "makes the script and submits it"
            )
        self._scheduler, self._job = here
        self._store = store
        self._script = script
        self._follow_up = ""
        self.first = True

    def begin(self) -> str:
        """Submit the follow-up; return in words what was done.

        None is submitted where the last link achieved nothing: this one is its second chance.
        """
        before = read(self._store)
        now = mark(self._store)
        again = before is not None and before.mark == now
        self.first = before is None or not before.links
        chain = ChainFile(
            scheduler=self._scheduler.name,
            script=str(self._script),
            jobs=[self._job],
            links=(before.links if before else 0) + 1,
            mark=now,
        )
        words = "the last job achieved nothing, so no other follows this one unless it does"
        if not again:
            try:
                self._follow_up = self._scheduler.submit(self._script, after=self._job)
            except SiteError as exc:
                words = f"no follow-up job: {exc}"
            else:
                chain.jobs.append(self._follow_up)
                words = f"job {self._follow_up} goes on where this one ends before all is done"
        self._chain = chain
        write(self._store, chain)
        return words

    def wait_for_store(self) -> None:
        """Wait while a driver that died with its node still counts as alive by its heartbeat."""
        end = time.monotonic() + lock.STALE_S + lock.BEAT_S
        while lock.is_running(self._store) and time.monotonic() < end:
            time.sleep(_LOOK_S)

    def end(self, status: int, *, final: bool) -> str:
        """Cancel the follow-up after an end that is ``final``, else see that there is one."""
        if final or status in FINAL:
            cancelled = self._scheduler.cancel([self._follow_up]) if self._follow_up else []
            self._chain.jobs = [self._job]
            write(self._store, self._chain)
            return f"job {cancelled[0]} was not needed and is cancelled" if cancelled else ""
        if not self._follow_up and mark(self._store) != self._chain.mark:
            try:
                self._follow_up = self._scheduler.submit(self._script, after=self._job)
            except SiteError as exc:
                return f"no follow-up job: {exc}"
            self._chain.jobs.append(self._follow_up)
            write(self._store, self._chain)
        if not self._follow_up:
            return "two jobs in a row achieved nothing, so none follows; see the log above"
        return f"job {self._follow_up} goes on from here"
