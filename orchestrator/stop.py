"""Ending a run from any host: its driver, the jobs that would go on with it, what was left over."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import chain, lock, progress
from orchestrator.errors import SiteError
from orchestrator.scheduler import SCHEDULERS
from orchestrator.sites import load_site

_LOOK_S = 0.5
_SAY_S = 15.0


def stop(store: Path, *, now: bool, site: str, say: Callable[[str], None]) -> None:
    """Stop what works on a store, and wait for it; ``say`` is told in words what is done.

    A driver drains, or with ``now`` stops at once. Jobs of ``basin submit`` that wait are
    cancelled, and so are the blocks of a driver that died; ``site`` is theirs where the driver
    did not write it down. Raises StoreError where the store cannot be written.
    """
    running = lock.is_running(store)
    # Asked before it is told to stop: one that leaves at once takes its name along.
    holder = lock.named(lock.who(store))
    if running:
        lock.request_stop(store, now=now)
    stopped = _cancel_jobs(store, running, say)
    if running:
        say(f"asked {holder} to {'stop at once' if now else 'finish its running items'}")
        _wait(store, say)
        say("stopped; finished work is kept, and `basin run` goes on from there")
    left = _cancel_blocks(store, site, say)
    if not (running or stopped or left):
        say(f"nothing works on {store}")


def _cancel_jobs(store: Path, running: bool, say: Callable[[str], None]) -> bool:
    """Cancel the driver jobs that wait; one that runs, too, where its driver has not begun."""
    states = chain.living(store)
    own = lock.who(store).get("job") if running else None
    found = chain.read(store)
    assert found is not None or not states
    for job, state in states.items():
        if found is not None and job != own and SCHEDULERS[found.scheduler].cancel([job]):
            say(f"cancelled driver job {job}, which was {state}")
    return bool(states)


def _wait(store: Path, say: Callable[[str], None]) -> None:
    said = time.monotonic()
    run_id = lock.who(store).get("run_id")
    while lock.is_running(store) and lock.who(store).get("run_id") == run_id:
        time.sleep(_LOOK_S)
        if time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            last = progress.read(store)
            blocks = sum(b.get("state") == "running" for b in last.blocks) if last else 0
            say(f"waiting for the running items ({blocks} blocks at work); --now does not wait")


def left_over(store: Path) -> list[dict[str, Any]]:
    """Return the blocks that a driver which is gone had not seen end."""
    last = progress.read(store)
    if last is None or lock.is_running(store):
        return []
    return last.alive


def _cancel_blocks(store: Path, site: str, say: Callable[[str], None]) -> bool:
    blocks = left_over(store)
    if not blocks:
        return False
    last = progress.read(store)
    name = (last.site if last else "") or site
    try:
        executors: list[Any] = list(load_site(name).config.executors)
    except SiteError as exc:
        names = ", ".join(str(b["job_id"]) for b in blocks)
        say(f"jobs {names} of the last driver may be left; cancel them yourself: {exc}")
        return True
    providers = {e.label: e.provider for e in executors}
    touched = False
    ended: set[str] = set()
    for pool in dict.fromkeys(b["pool"] for b in blocks):
        jobs = [str(b["job_id"]) for b in blocks if b["pool"] == pool]
        cancel = getattr(providers.get(pool), "cancel_by_id", None)
        if cancel is None:
            continue  # its workers notice by themselves that their driver is gone
        gone = cancel(jobs)
        touched = True
        ended.update(gone)
        if gone:
            say(f"pool {pool}: {', '.join(gone)} of a driver that died: cancelled, or gone already")
        if rest := [job for job in jobs if job not in gone]:
            say(f"pool {pool}: {', '.join(rest)} could not be cancelled; do it yourself")
    if ended and last is not None:
        for block in last.blocks:
            if str(block.get("job_id")) in ended:
                block["state"] = "ended"
        progress.write(store, last)
    return touched
