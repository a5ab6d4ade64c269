"""How a campaign stands, put together for a person: counts, driver, batch jobs, nodes."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orchestrator import chain, lock, progress
from orchestrator.campaign import Campaign
from orchestrator.progress import ProgressFile
from orchestrator.show import core_hours, counts_table, duration
from orchestrator.status import Standing, stand
from orchestrator.store import Store
from orchestrator.train_stage import said

if TYPE_CHECKING:
    from rich.console import RenderableType

_BLOCKS = 16
_ENDED = 3
_EVERY_S = 2.0
_ASK_EVERY_S = 60.0
_SOON_S = 10.0
_TAIL_BYTES, _TAIL_LINES = 8192, 4


@dataclass(slots=True)
class View:
    """What there is to say of a campaign at one moment.

    ``jobs``: driver jobs of `basin submit` that are pending or running, with that word.
    """

    campaign: str
    file: str
    store: str
    running: bool
    driver: dict[str, Any]
    jobs: dict[str, str]
    standing: Standing
    progress: ProgressFile | None
    training: str
    time_s: float
    last_words: str

    def as_json(self) -> dict[str, Any]:
        """Return it for machines: `Standing`'s fields, and the others beside them."""
        own = {
            "running": self.running,
            "driver": self.driver,
            "driver_jobs": self.jobs,
            "last_error": self.last_words,
        }
        run = asdict(self.progress) if self.progress else {}
        kept = ("site", "time_s", "blocks", "bad_nodes", "node_hours", "rate", "left_s", "notes")
        return {**own, **asdict(self.standing), "run": {k: run[k] for k in kept if k in run}}

    @property
    def waiting(self) -> int:
        """Tasks that are planned and not done."""
        return sum(c.waiting for c in self.standing.counts)

    @property
    def alive(self) -> list[dict[str, Any]]:
        """Blocks that had not ended when the driver last told."""
        return self.progress.alive if self.progress else []


def look(
    campaign: Campaign, store: Store, *, exact: bool = False, jobs: dict[str, str] | None = None
) -> View:
    """Look at a campaign from wherever its store can be read; nothing is changed.

    ``exact``: count the store itself, and believe no driver. ``jobs``: the driver jobs, where the
    scheduler is not to be asked for them again.
    """
    return View(
        campaign=campaign.name,
        file=str(campaign.path),
        store=str(store.path),
        running=lock.is_running(store.path),
        driver=lock.who(store.path),
        jobs=chain.living(store.path) if jobs is None else jobs,
        standing=stand(campaign, store, exact=exact),
        progress=progress.read(store.path),
        training=str(said(store.path).get("line", "")),
        time_s=time.time(),
        last_words=_last_words(store),
    )


def _last_words(store: Store) -> str:
    """Return the error that the last driver without a terminal ended with; empty for none."""
    logs = sorted(store.path.glob("logs/driver-*.log"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return ""
    with open(logs[-1], "rb") as file:
        file.seek(max(0, logs[-1].stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    errors = [line for line in lines[-_TAIL_LINES:] if line.startswith("basin: ")]
    return f"{errors[-1].removeprefix('basin: ')} (see {logs[-1]})" if errors else ""


def page(view: View) -> RenderableType:
    """Return what `basin status` shows."""
    from rich.console import Group
    from rich.text import Text

    found, last = view.standing, view.progress
    more = "" if found.plan_complete else " so far"
    parts: list[RenderableType] = [
        Text(
            f"{view.campaign}: {_state(view)}; {found.entries:,} entries read{more}, "
            f"{found.bad_entries:,} bad"
        ),
        counts_table(found.counts),
    ]
    if not found.current:
        ago = duration(view.time_s - found.as_of) if found.as_of else "some time"
        parts.append(Text(f"counted {ago} ago by a driver that is gone; --exact counts anew"))
    if found.failures:
        classes = ", ".join(f"{name}: {n:,}" for name, n in sorted(found.failures.items()))
        parts.append(Text(f"failures by class: {classes}"))
    if view.training:
        parts.append(Text(f"training: {view.training}"))
    if last is not None:
        parts += _run_lines(view, last)
    if view.waiting and not view.running and view.last_words:
        parts.append(Text(f"the last driver ended with: {view.last_words}", style="yellow"))
    if view.waiting and not view.running and not view.jobs:
        parts.append(Text(f"`basin run {view.file}` goes on with what waits"))
    return Group(*parts)


def _state(view: View) -> str:
    states = {state: job for job, state in view.jobs.items()}
    if view.running:
        job = f", job {view.driver['job']}" if view.driver.get("job") else ""
        drains = ", draining" if view.driver.get("drain") else ""
        return (
            f"running (process {view.driver.get('pid')} on {view.driver.get('host')}{job}){drains}"
        )
    if "running" in states:
        return f"starting (driver job {states['running']})"
    if "pending" in states:
        return f"waiting for its driver job {states['pending']} to start"
    return "not running"


def _run_lines(view: View, last: ProgressFile) -> list[RenderableType]:
    from rich.text import Text

    parts: list[RenderableType] = []
    if view.running:
        parts += _block_lines(view, last)
    elif view.alive:
        jobs = ", ".join(str(b["job_id"]) for b in view.alive[:_BLOCKS])
        ago = duration(view.time_s - last.time_s)
        parts.append(
            Text(
                f"the last driver died {ago} ago or less; its jobs {jobs} may be left: "
                f"`basin stop {view.store}` cancels them, and so does the next run"
            )
        )
    for node, why in sorted(last.bad_nodes.items()):
        parts.append(Text(f"bad node {node}: {why}", style="yellow"))
    numbers = [f"{core_hours(last.node_hours)} node-hours used"] if last.node_hours else []
    if view.running:
        numbers += [f"{last.rate:.1f} tasks/s", f"{duration(last.left_s)} left"]
        if (silent := view.time_s - last.time_s) > lock.STALE_S:
            numbers.append(f"nothing heard for {duration(silent)}")
    if numbers:
        parts.append(Text(", ".join(numbers)))
    if view.running:
        parts += [Text(note, style="yellow") for note in last.notes[-_ENDED:]]
    return parts


def _block_lines(view: View, last: ProgressFile) -> list[RenderableType]:
    """Return the blocks at work, those that wait by their reasons, and how the last ones ended."""
    from rich.table import Table
    from rich.text import Text

    jobs = [b for b in last.blocks if b.get("job_id")]
    running = [b for b in jobs if b["state"] == "running"]
    parts: list[RenderableType] = []
    if running:
        table = Table(box=None, pad_edge=False)
        for name in ("block", "pool", "node"):
            table.add_column(name)
        for name in ("ran", "time left"):
            table.add_column(name, justify="right")
        for b in running[:_BLOCKS]:
            nodes = b.get("nodes") or ["-"]
            more = f" +{len(nodes) - 1}" if len(nodes) > 1 else ""
            ran, left = _since(view.time_s, b.get("start_s")), _since(b.get("end_s"), view.time_s)
            table.add_row(
                str(b["job_id"]), b["pool"], f"{nodes[0]}{more}", duration(ran), duration(left)
            )
        parts.append(table)
        if len(running) > _BLOCKS:
            parts.append(Text(f"... and {len(running) - _BLOCKS:,} more blocks at work"))
    waits = Counter((b["pool"], b.get("words", "")) for b in jobs if b["state"] == "pending")
    for (pool, words), n in waits.items():
        blocks = "1 block waits" if n == 1 else f"{n:,} blocks wait"
        parts.append(Text(f"pool {pool}: {blocks} in the queue" + (f" ({words})" if words else "")))
    ended = [b for b in jobs if b["state"] == "ended" and b.get("reason") != "completed"]
    parts += [Text(str(b["words"])) for b in ended[-_ENDED:] if b.get("words")]
    return parts


def _since(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else max(0.0, later - earlier)


def watch(campaign: Campaign, store: Store) -> None:
    """Show how a campaign stands, again and again, until nothing works on it any more."""
    from rich.console import Console
    from rich.live import Live

    asked = 0.0
    jobs: dict[str, str] = {}
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        while True:
            if time.monotonic() - asked > _ASK_EVERY_S or not asked:
                asked, jobs = time.monotonic(), chain.living(store.path)
            view = look(campaign, store, jobs=jobs)
            if not view.running and jobs:
                # Between two drivers, or after the last one: only the scheduler knows.
                asked = min(asked, time.monotonic() - _ASK_EVERY_S + _SOON_S)
            live.update(page(view), refresh=True)
            if not view.running and not jobs:
                return
            time.sleep(_EVERY_S)
