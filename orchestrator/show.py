"""Showing a run while it goes on: a live table, plain lines, or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pyarrow
    from rich.console import Console, RenderableType

    from orchestrator.counts import StageCounts
    from orchestrator.forecast import PoolForecast
    from orchestrator.run import Progress
    from orchestrator.train import TrainProgress

_STAGES_IN_LINE = 8
_LIVE_EVERY_S = 0.5
_PLAIN_EVERY_S = 10.0
# A log that is written for days shall not be all progress.
_PLAIN_SHARE, _PLAIN_SELDOM_S = 0.02, 300.0


def duration(seconds: float | None) -> str:
    """Return seconds in the units a person would use; `-` for None."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return "less than 1 s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    if seconds < 100 * 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
    return f"{seconds / 86400:.1f} d"


def core_hours(hours: float) -> str:
    """Return core-hours with three digits that count, and never as a power of ten."""
    if 0 < hours < 0.001:
        return "less than 0.001"
    return f"{hours:.3g}" if hours < 1000 else f"{hours:,.0f}"


def console() -> Console:
    """Return where tables go: as wide as the terminal, or as they need where there is none."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 1_000_000
    return Console(highlight=False, soft_wrap=True, width=width)


def counts_table(counts: list[StageCounts]) -> RenderableType:
    """Return a table of stages: planned = ok + failed + not reached + waiting."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for name in ("planned", "ok", "failed", "not reached", "waiting"):
        table.add_column(name, justify="right")
    for c in counts:
        numbers = (c.planned, c.ok, c.failed, c.upstream, c.waiting)
        table.add_row(c.stage, *(f"{n:,}" for n in numbers))
    return table


def blocks_forecast(pools: list[PoolForecast]) -> RenderableType:
    """Return a table of what would be submitted: blocks of nodes, for how long, and node-hours."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("pool")
    for name in ("blocks", "nodes at once", "workers", "walltime", "node-hours", "takes"):
        table.add_column(name, justify="right")
    for p in pools:
        table.add_row(
            p.pool,
            f"{p.blocks:,}",
            f"{p.nodes:,}",
            f"{p.workers:,}",
            duration(p.walltime_s),
            core_hours(p.node_hours),
            duration(p.wall_s),
        )
    return table


_NUMBER_DIGITS = 6
_CELL_WIDTH = 60


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        # An energy of -4220 eV counts to the meV, a force of 0.02 eV/Å to its leading digits.
        return f"{value:.{_NUMBER_DIGITS}f}" if abs(value) >= 1 else f"{value:.{_NUMBER_DIGITS}g}"
    if isinstance(value, list):
        text = "[" + ", ".join(_cell(part) for part in value[:_CELL_WIDTH]) + "]"
        return text if len(text) <= _CELL_WIDTH else f"{text[: _CELL_WIDTH - 1]}…"
    return str(value)


def show_answer(table: pyarrow.Table, limit: int | None) -> None:
    """Print the answer to a query, at most ``limit`` rows of it (None: all).

    A table that is wider than the terminal is printed row by row, one value a line.
    """
    import pyarrow as pa

    names = table.column_names
    rows = table if limit is None else table.slice(0, limit)
    columns = [[_cell(value) for value in column.to_pylist()] for column in rows.columns]
    widths = [max(map(len, [name, *cells])) for name, cells in zip(names, columns, strict=True)]
    out = console()
    if not rows.num_rows:
        print("  ".join(names))
        print("no rows")
    elif sys.stdout.isatty() and sum(widths) + 2 * len(widths) > out.width:
        label = max(map(len, names))
        for row in range(rows.num_rows):
            print(f"-- row {row + 1}")
            for name, cells in zip(names, columns, strict=True):
                print(f"{name:<{label}}  {cells[row]}".rstrip())
    else:
        numbers = [pa.types.is_integer(t) or pa.types.is_floating(t) for t in table.schema.types]
        align = [">" if number else "<" for number in numbers]
        for cells in [names, *zip(*columns, strict=True)]:
            line = (f"{c:{a}{w}}" for c, a, w in zip(cells, align, widths, strict=True))
            print("  ".join(line).rstrip())
    if rows.num_rows < table.num_rows:
        print(f"... {table.num_rows:,} rows in all; --limit shows more, --csv all")


def answer_csv(table: pyarrow.Table, target: BinaryIO) -> None:
    """Write the answer to a query as comma-separated values; lists become JSON."""
    import pyarrow as pa
    import pyarrow.csv

    for at, field in enumerate(table.schema):
        if pa.types.is_nested(field.type) and not pa.types.is_dictionary(field.type):
            cells = [None if v is None else json.dumps(v) for v in table.column(at).to_pylist()]
            table = table.set_column(at, field.name, pa.array(cells, pa.string()))
    pyarrow.csv.write_csv(table, target)


class Shower:
    """Shows progress no oftener than is useful; use as a context manager.

    ``line`` and ``panel`` put it into words, by default those of a campaign's run.
    """

    def __init__(
        self,
        *,
        as_json: bool,
        quiet: bool = False,
        line: Callable[[Any], str] | None = None,
        panel: Callable[[Any], RenderableType] | None = None,
    ) -> None:
        self._line: Callable[[Any], str] = line or _line
        self._panel: Callable[[Any], RenderableType] = panel or _panel
        self._json = as_json
        self._quiet = quiet
        self._live: Any = None
        self._last = 0.0
        self._notes: list[str] = []
        if not as_json and not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        else:
            # At the very start a line would say nothing.
            self._last = time.monotonic()

    def __enter__(self) -> Shower:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress | TrainProgress) -> None:
        now = time.monotonic()
        every = _LIVE_EVERY_S if self._live is not None else _PLAIN_EVERY_S
        if self._live is None and not self._json:
            every = max(every, min(_PLAIN_SHARE * progress.elapsed_s, _PLAIN_SELDOM_S))
        if now - self._last < every:
            return
        self._last = now
        if self._quiet:
            return
        if self._json:
            print(json.dumps({"event": "progress", **asdict(progress)}), flush=True)
        elif self._live is not None:
            self._live.update(self._panel(progress), refresh=True)
        else:
            print(self._line(progress), file=sys.stderr, flush=True)


def _line(progress: Progress) -> str:
    shown = progress.stages
    if len(shown) > _STAGES_IN_LINE:
        # Of a whole ladder only what moves.
        shown = [c for c in shown if 0 < c.ok + c.failed + c.upstream < c.planned]
        done = sum(0 < c.planned == c.ok + c.failed + c.upstream for c in progress.stages)
        rest = f"{done} of {len(progress.stages)} stages done"
    stages = " | ".join(
        f"{c.stage} {c.ok}/{c.planned}" + (f" ({c.failed} failed)" if c.failed else "")
        for c in shown[:_STAGES_IN_LINE]
    )
    if len(progress.stages) > _STAGES_IN_LINE:
        more = " | ..." if len(shown) > _STAGES_IN_LINE else ""
        stages = f"{rest}{' | ' if stages else ''}{stages}{more}"
    more = "" if progress.complete_plan else "+"
    return (
        f"[{duration(progress.elapsed_s)}] {stages} of {progress.entries}{more} entries; "
        f"{progress.rate:.1f}/s, {duration(progress.left_s)} left, "
        f"{core_hours(progress.core_s / 3600)} core-hours"
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
    bundles = f"{progress.in_flight} bundle" + ("" if progress.in_flight == 1 else "s")
    tail = Text(
        f"{progress.rate:.1f} tasks/s, {duration(progress.left_s)} left, "
        f"{core_hours(progress.core_s / 3600)} core-hours, {bundles} under way"
    )
    notes = [Text(note, style="yellow") for note in progress.notes]
    return Group(head, counts_table(progress.stages), tail, *notes)


def training_line(progress: TrainProgress) -> str:
    """Return how a training stands, in one line."""
    epochs = f"/{progress.epochs}" if progress.epochs is not None else ""
    return (
        f"[{duration(progress.elapsed_s)}] {progress.name}: epoch {progress.epoch:.2f}{epochs}, "
        f"step {progress.step:,}; loss {progress.loss:.4g}, validation {progress.validation:.4g} "
        f"(best {progress.best:.4g}); {progress.molecules_per_s:,.0f} molecules/s, "
        f"{duration(progress.left_s)} left"
    )


def training_panel(progress: TrainProgress) -> RenderableType:
    """Return the same for a terminal, where brackets would else be taken for colours."""
    from rich.text import Text

    return Text(training_line(progress))
