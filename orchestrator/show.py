"""Showing a run while it goes on: a live table, plain lines, or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.counts import StageCounts
    from orchestrator.run import Progress

_LIVE_EVERY_S = 0.5
_PLAIN_EVERY_S = 10.0


def duration(seconds: float | None) -> str:
    """Return seconds in the units a person would use; `-` for None."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    if seconds < 100 * 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
    return f"{seconds / 86400:.1f} d"


def counts_table(counts: list[StageCounts], title: str = "") -> RenderableType:
    """Return a table of stages: planned = ok + failed + cut off + waiting."""
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    table.add_column("stage")
    for name in ("planned", "ok", "failed", "cut off", "waiting"):
        table.add_column(name, justify="right")
    for c in counts:
        numbers = (c.planned, c.ok, c.failed, c.upstream, c.waiting)
        table.add_row(c.stage, *(f"{n:,}" for n in numbers))
    return table


class Shower:
    """Shows progress no oftener than is useful; use as a context manager."""

    def __init__(self, *, as_json: bool, quiet: bool = False) -> None:
        self._json = as_json
        self._quiet = quiet
        self._live: Any = None
        self._last = 0.0
        self._notes: list[str] = []
        if not as_json and not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> Shower:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < (_LIVE_EVERY_S if self._live is not None else _PLAIN_EVERY_S):
            return
        self._last = now
        if self._quiet:
            return
        if self._json:
            print(json.dumps({"event": "progress", **asdict(progress)}), flush=True)
        elif self._live is not None:
            self._live.update(_panel(progress), refresh=True)
        else:
            print(_line(progress), file=sys.stderr, flush=True)


def _line(progress: Progress) -> str:
    stages = " | ".join(
        f"{c.stage} {c.ok}/{c.planned}" + (f" ({c.failed} failed)" if c.failed else "")
        for c in progress.stages
    )
    more = "" if progress.complete_plan else "+"
    return (
        f"[{duration(progress.elapsed_s)}] {stages} of {progress.entries}{more} entries; "
        f"{progress.rate:.1f}/s, {duration(progress.left_s)} left, "
        f"{progress.core_s / 3600:.3f} core-hours"
        + ("; draining" if progress.draining else "")
        + "".join(f"; {note}" for note in progress.notes[-1:])
    )


def _panel(progress: Progress) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    state = "draining: waiting for the running items" if progress.draining else "running"
    more = "" if progress.complete_plan else " so far"
    head = Text(
        f"{progress.campaign}: {state}, {duration(progress.elapsed_s)}; "
        f"{progress.entries:,} entries read{more}, {progress.bad_entries:,} of them bad"
    )
    tail = Text(
        f"{progress.rate:.1f} tasks/s, {duration(progress.left_s)} left, "
        f"{progress.core_s / 3600:.3f} core-hours, {progress.in_flight} bundles under way"
    )
    notes = [Text(note, style="yellow") for note in progress.notes]
    return Group(head, counts_table(progress.stages), tail, *notes)
