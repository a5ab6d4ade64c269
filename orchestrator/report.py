"""The campaign as one self-contained HTML page: findings, figures, failures, molecules."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.units import EV_TO_KCAL
from orchestrator import report_boltzmann, report_diffusion
from orchestrator.boltzmann import Boltzmann
from orchestrator.columns import Category, Rows, Varlen, key_bytes
from orchestrator.counts import StageCounts
from orchestrator.drawing import (
    COLOURS,
    DASHED,
    INK,
    Picture,
    count,
    data_uri,
    middle,
    new_figure,
    number,
    plural,
    seconds,
    style,
    svg,
)
from orchestrator.report_diffusion import Diffusion
from orchestrator.shard import write_whole
from orchestrator.store import Snapshot, Store
from orchestrator.tables import Lookup

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_READING = "molecules"
_SHOWN_FAILURES = 50
_CARDS = 4
_DRAWN = 4000
_PAUSE_S = 60.0
# Stages made of one by a list of temperatures or steps share a row where they are more than this.
_LADDER = 4
_RUNG = re.compile(r"-(\d+|[\d.]+K)(-r\d+)?$")
_BINS = 200

_TASKS = (
    "key", "mol_key", "stage", "kernel", "status", "message", "attempts", "source", "line",
    "host", "started_s", "wall_s", "cpu_s",
)  # fmt: skip
_RELAXATIONS = (
    "key", "mol_key", "stage", "level", "program", "optimizer", "n_atoms", "n_steps",
    "initial_energy_eV", "final_energy_eV", "connectivity_changed", "cpu_s",
)  # fmt: skip
_MOLECULES = ("key", "smiles", "name", "formula", "source", "line", "n_heavy")


# --- what the store says ----------------------------------------------------------------------


@dataclass(slots=True)
class _Facts:
    """The columns that the report is made of; ``gain`` (R,) is in kcal/mol."""

    store: Store
    diffusion: Diffusion
    boltzmann: Boltzmann | None
    tasks: Rows
    relaxations: Rows
    geometries: Rows
    molecules: Lookup
    problems: dict[str, str]
    gain: Floats = field(init=False)
    owner: Indices = field(init=False)

    def __post_init__(self) -> None:
        rows = self.relaxations
        self.gain = (rows["initial_energy_eV"] - rows["final_energy_eV"]) * EV_TO_KCAL
        self.owner = self.molecules.find(rows["mol_key"])

    def name(self, molecule: int) -> str:
        """Return what to call a molecule: its name, else its SMILES, else its formula."""
        if molecule < 0:
            return ""
        for column in ("name", "smiles", "formula"):
            text = _text(self.molecules.rows[column], molecule)
            if text:
                return _short(text, 48)
        return ""

    def relax_stages(self) -> list[str]:
        """Return the stages with relaxations, in the order in which they first started."""
        order = _stage_order(self.tasks)
        there = _occurring(self.relaxations["stage"])
        return [s for s in order if s in there] + [s for s in there if s not in order]

    def main_stage(self) -> str:
        """Return the relaxation to speak of: the last one, or what diffusion is measured by."""
        comparison = self.diffusion.comparison
        if comparison is not None and comparison.best() is not None:
            return comparison.baseline
        return self.relax_stages()[-1]


def _gather(store: Store, diffusion: Diffusion, order: Sequence[str] = ()) -> _Facts:
    boltzmann = report_boltzmann.gather(store, order)

    def read(snapshot: Snapshot) -> _Facts:
        return _Facts(
            store,
            diffusion,
            boltzmann,
            snapshot.read("tasks", _TASKS),
            snapshot.read("relaxations", _RELAXATIONS),
            snapshot.read("geometries", ["stage", "method", "n_steps"]),
            Lookup(snapshot.read("molecules", _MOLECULES)),
            snapshot.problems,
        )

    return store.consistent(read)


def _text(column: Varlen, row: int) -> str:
    return bytes(column[row]).decode()


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _occurring(column: Category) -> list[str]:
    return [column.names[code] for code in np.unique(column.codes).tolist()]


def _stage_order(tasks: Rows) -> list[str]:
    """Return the stages by when they first started; reading the molecules comes first."""
    stage = tasks["stage"]
    first = {
        name: float(tasks["started_s"][stage.equals(name)].min()) for name in _occurring(stage)
    }
    return sorted(first, key=lambda name: (name != _READING, first[name]))


def _derived_counts(facts: _Facts) -> list[StageCounts]:
    """Return what the tasks table tells: what finished, not what was planned."""
    tasks = facts.tasks
    counts = []
    for name in _stage_order(tasks):
        here = tasks["stage"].equals(name)
        ok = int((here & tasks["status"].equals("ok")).sum())
        failed = int(here.sum()) - ok
        if name == _READING:
            # A good entry leaves a molecule; only a repeated or a bad one leaves a task.
            ok += len(facts.molecules.rows)
        counts.append(StageCounts(name, ok + failed, ok, failed, 0, 0))
    return counts


def _families(stages: Sequence[str]) -> dict[str, str]:
    """Return what to call each stage in a table: stages of one long ladder go by one name."""
    bare = {name: _RUNG.sub("", name) for name in stages}
    many = Counter(bare.values())
    return {
        name: name if many[short] <= _LADDER else f"{short} ({many[short]} stages)"
        for name, short in bare.items()
    }


def _folded(counts: Sequence[StageCounts]) -> list[StageCounts]:
    """Return the counts with those of one ladder's stages added up."""
    names = _families([row.stage for row in counts])
    groups: dict[str, list[StageCounts]] = {}
    for row in counts:
        groups.setdefault(names[row.stage], []).append(row)
    return [
        StageCounts(
            name,
            sum(row.planned for row in rows),
            sum(row.ok for row in rows),
            sum(row.failed for row in rows),
            sum(row.upstream for row in rows),
            sum(row.waiting for row in rows),
        )
        for name, rows in groups.items()
    ]


def _failure_classes(facts: _Facts) -> list[tuple[str, str, int]]:
    """Return (stage, class, how many) of the failures, the most frequent first."""
    stage, status = facts.tasks["stage"], facts.tasks["status"]
    code = stage.codes.astype(np.int64) * 65536 + status.codes
    found = []
    for value, n in zip(*np.unique(code, return_counts=True), strict=True):
        name = status.names[int(value) % 65536]
        if name != "ok":
            found.append((stage.names[int(value) // 65536], name, int(n)))
    return sorted(found, key=lambda row: (-row[2], row))


def _failures_clause(facts: _Facts) -> str:
    classes: dict[str, int] = {}
    unread = 0
    for stage, status, n in _failure_classes(facts):
        if stage == _READING:
            unread += n
        else:
            classes[status] = classes.get(status, 0) + n
    parts = []
    if unread:
        entries = plural(unread, "entry", "entries")
        parts.append(f"{entries} of the molecule files could not be read")
    if classes:
        listed = ", ".join(f"{count(n)} {status}" for status, n in classes.items())
        parts.append(f"{plural(sum(classes.values()), 'task')} failed ({listed})")
    return " and ".join(parts) or "nothing failed"


def _findings(facts: _Facts) -> list[str]:
    return (
        _about_relaxations(facts)
        + report_diffusion.sentences(facts.diffusion)
        + report_boltzmann.sentences(facts.boltzmann)
    )


def _about_relaxations(facts: _Facts) -> list[str]:
    n_molecules = len(facts.molecules.rows)
    failures = _failures_clause(facts)
    stages = facts.relax_stages()
    if not stages:
        if not len(facts.tasks):
            return ["No task has finished yet."]
        made = plural(len(facts.geometries), "geometry", "geometries")
        return [
            f"No relaxation has finished yet: there are {plural(n_molecules, 'molecule')} and "
            f"{made}; {failures}."
        ]
    stage = facts.main_stage()
    mine = np.flatnonzero(facts.relaxations["stage"].equals(stage))
    rows = facts.relaxations.take(mine)
    level = " and ".join(_occurring(rows["level"]))
    relaxed = len(np.unique(rows["mol_key"], axis=0))
    sentences = [
        f"{count(relaxed)} of {plural(n_molecules, 'molecule')} "
        f"{'has' if relaxed == 1 else 'have'} a relaxed {level} geometry; {failures}."
    ]
    gain = facts.gain[mine]
    good = np.flatnonzero(np.isfinite(gain))
    if len(good):
        low, median, high = np.percentile(gain[good], [25, 50, 75])
        best = int(good[np.argmax(gain[good])])
        name = facts.name(int(facts.owner[mine[best]]))
        most = f"; most for {name} ({number(gain[best])})" if name else ""
        sentences.append(
            f"Relaxing lowers the energy by {number(median)} kcal/mol in the median "
            f"(middle half {number(low)} to {number(high)}){most}."
        )
    changed = int((rows["connectivity_changed"] != 0).sum())
    bonds = (
        f"bonds changed in {count(changed)} of {plural(len(rows), 'relaxation')}"
        if changed
        else "no bond changed"
    )
    steps = float(np.median(rows["n_steps"]))
    sentences.append(
        f"A relaxation takes {middle(steps)} optimiser step{'s' if steps != 1 else ''} and "
        f"{seconds(float(np.median(rows['cpu_s'])))} of CPU time "
        f"in the median; {bonds}."
    )
    return sentences


def findings(store: Store, diffusion: Diffusion | None = None) -> list[str]:
    """Return a few sentences about what the campaign found so far.

    ``diffusion`` saves reading that part again.
    """
    return _findings(_gather(store, diffusion or report_diffusion.gather(store)))


# --- time -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Activity:
    """How busy the cores were; ``busy`` (B,) are tasks at work between ``edges`` (B+1,) in s.

    Times have the pauses between runs taken out.
    """

    cpu: float
    span: float
    workers: int
    pauses: int
    edges: Floats
    busy: Floats

    @property
    def efficiency(self) -> float:
        """CPU seconds of the kernels over all core seconds there were."""
        return self.cpu / (self.span * self.workers) if self.span > 0 else 0.0


def activity(started: Floats, wall: Floats, cpu: Floats, pause: float = _PAUSE_S) -> Activity:
    """Return how busy the cores were over time, from each task's start, wall and CPU time (s)."""
    if not len(started) or float(wall.sum()) <= 0:
        return Activity(float(cpu.sum()), 0.0, 0, 0, np.zeros(1), np.zeros(0))
    order = np.argsort(started, kind="stable")
    start = started[order]
    end = start + wall[order]
    reached = np.maximum.accumulate(end)
    gaps = np.maximum(start[1:] - reached[:-1], 0.0)
    gaps[gaps <= pause] = 0.0
    shift = np.concatenate([[0.0], np.cumsum(gaps)]) + start[0]
    start, end = start - shift, end - shift
    span = float(end.max())
    # Tasks at work before t, integrated: every one adds the time since its start, less that
    # since its end.
    edges = np.linspace(0.0, span, _BINS + 1)
    worked = _elapsed(start, edges) - _elapsed(np.sort(end), edges)
    busy = np.diff(worked) / np.diff(edges)
    times = np.concatenate([start, end])
    change = np.concatenate([np.ones(len(start)), -np.ones(len(end))])
    sweep = np.lexsort((change, times))
    level = np.cumsum(change[sweep])[:-1]
    lasted = np.diff(times[sweep])
    by_level = np.argsort(level, kind="stable")
    share = np.cumsum(lasted[by_level]) / max(float(lasted.sum()), 1e-12)
    # Clocks overlap by moments, so the busiest hundredth of the time does not count.
    at = min(int(np.searchsorted(share, 0.99)), len(share) - 1)
    workers = max(1, round(float(level[by_level][at])))
    return Activity(float(cpu.sum()), span, workers, int((gaps > 0).sum()), edges, busy)


def _elapsed(moments: Floats, at: Floats) -> Floats:
    """Return the sum over moments of the time since then, for each time in ``at`` (sorted)."""
    before = np.searchsorted(moments, at)
    sums = np.concatenate([[0.0], np.cumsum(moments)])
    elapsed: Floats = before * at - sums[before]
    return elapsed


def _stage_times(facts: _Facts) -> list[dict[str, str]]:
    tasks = facts.tasks
    order = [name for name in _stage_order(tasks) if name != _READING]
    masks: dict[str, NDArray[np.bool_]] = {}
    for stage, name in _families(order).items():
        mine = tasks["stage"].equals(stage)
        masks[name] = masks[name] | mine if name in masks else mine
    lines = []
    for name, here in masks.items():
        cpu, wall = tasks["cpu_s"][here], tasks["wall_s"][here]
        started = tasks["started_s"][here]
        lines.append(
            {
                "stage": name,
                "tasks": count(int(here.sum())),
                "cpu": seconds(float(cpu.sum())),
                "median": seconds(float(np.median(cpu))),
                "p95": seconds(float(np.percentile(cpu, 95))),
                "share": f"{100 * cpu.sum() / wall.sum():.0f} %" if wall.sum() > 0 else "",
                "retried": count(int((tasks["attempts"][here] > 1).sum())),
                "first": _utc(float(started.min())),
                "last": _utc(float((started + wall).max())),
            }
        )
    return lines


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


# --- figures ----------------------------------------------------------------------------------


def _bins(values: Floats) -> tuple[Floats, int]:
    """Return bin edges for the bulk of the values, and how many lie outside of them."""
    middle, low, high = np.percentile(values, [50, 5, 95])
    # A far outlier would squeeze everything else into one bar.
    low = max(float(values.min()), middle - 6 * (middle - low))
    high = min(float(values.max()), middle + 6 * (high - middle))
    low = min(low, 0.0) if low < 0.15 * high else low
    if high - low <= 1e-9:
        low, high = low - 0.5, high + 0.5
    n = int(np.clip(2 * np.sqrt(len(values)), 8, 48))
    edges: Floats = np.linspace(low, high, n + 1)
    return edges, int(((values < low) | (values > high)).sum())


def _step_bins(values: Floats) -> tuple[Floats, int]:
    """Return bin edges a whole number of steps apart."""
    high = int(np.ceil(np.percentile(values, 99.5)))
    width = max(1, round(high / np.clip(2 * np.sqrt(len(values)), 8, 48)))
    edges: Floats = np.arange(0, high + 2 * width, width) - 0.5
    return edges, int((values > edges[-1]).sum())


def _histogram(
    series: dict[str, Floats], label: str, title: str, *, whole: bool = False
) -> Picture | None:
    every = [values for values in series.values() if len(values)]
    if not every:
        return None
    joined = np.concatenate(every)
    edges, outside = (_step_bins if whole else _bins)(joined)
    figure, axes = new_figure(4.6, 2.8)
    for colour, (name, values) in zip(COLOURS * 9, series.items(), strict=False):
        counts, _ = np.histogram(values, edges)
        if len(series) == 1:
            axes.bar(
                edges[:-1], counts, np.diff(edges), align="edge", color=colour, edgecolor="white",
                linewidth=0.6,
            )  # fmt: skip
            median = float(np.median(values))
            axes.axvline(median, color=INK, linewidth=1.0, linestyle=DASHED)
            axes.annotate(
                f"median {number(median, 0 if whole else 1 if median >= 1 else 2)}", (median, 1.0),
                xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points",
                va="top", fontsize=8.5,
            )  # fmt: skip
        else:
            axes.stairs(counts, edges, color=colour, linewidth=1.6, label=name)
            axes.stairs(counts, edges, color=colour, alpha=0.18, fill=True)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8.5)
    axes.set_xlabel(label)
    axes.set_ylabel("relaxations")
    axes.set_ylim(top=1.14 * axes.get_ylim()[1])
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: count(int(value)))
    caption = f"{title}, {plural(len(joined), 'relaxation')}."
    if outside:
        caption += f" {count(outside)} beyond the axis not drawn."
    return Picture(svg(figure), caption, title)


def _cost_figure(facts: _Facts, stages: Sequence[str]) -> Picture | None:
    rows = facts.relaxations
    atoms = rows["n_atoms"].astype(float)
    usable = np.isfinite(rows["cpu_s"]) & (rows["cpu_s"] > 0)
    if not usable.any():
        return None
    figure, axes = new_figure(4.6, 2.8)
    rng = np.random.default_rng(0)
    total = drawn = 0
    for colour, stage in zip(COLOURS * 9, stages, strict=False):
        mine = np.flatnonzero(rows["stage"].equals(stage) & usable)
        if not len(mine):
            continue
        total += len(mine)
        sample = mine
        if len(mine) > _DRAWN:
            sample = rng.choice(mine, _DRAWN, replace=False)
        drawn += len(sample)
        axes.scatter(
            atoms[sample], rows["cpu_s"][sample], s=9, color=colour, linewidths=0,
            alpha=0.55 if len(sample) < 500 else 0.2, rasterized=len(sample) > 300, label=stage,
        )  # fmt: skip
        sizes = np.unique(atoms[mine])
        if len(sizes) > 1:
            # Sizes are gathered until a point of the line stands for enough relaxations.
            order = mine[np.argsort(atoms[mine], kind="stable")]
            parts = np.array_split(order, int(np.clip(len(order) / 8, 1, min(25, len(sizes)))))
            if len(parts) > 2:
                axes.plot(
                    [np.median(atoms[p]) for p in parts],
                    [np.median(rows["cpu_s"][p]) for p in parts],
                    color=colour, linewidth=1.8,
                )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("atoms")
    axes.set_ylabel("CPU time of a relaxation (s)")
    if len(stages) > 1:
        legend = axes.legend(frameon=False, fontsize=8.5, markerscale=2)
        for handle in legend.legend_handles:
            handle.set_alpha(1.0)
    caption = "Cost against size: one dot a relaxation, the line is a running median."
    if drawn < total:
        caption += f" {count(drawn)} dots drawn at random of {count(total)}."
    return Picture(svg(figure), caption, "CPU time against number of atoms")


def _busy_figure(busy: Activity) -> Picture | None:
    if busy.span <= 0:
        return None
    unit, size = next(
        (
            (u, s)
            for u, s, limit in (("s", 1.0, 300.0), ("min", 60.0, 10800.0))
            if busy.span < limit
        ),
        ("h", 3600.0),
    )
    figure, axes = new_figure(9.4, 2.3)
    axes.stairs(busy.busy, busy.edges / size, fill=True, color=COLOURS[0], alpha=0.75)
    axes.axhline(busy.workers, color=INK, linewidth=1.0, linestyle=DASHED)
    axes.annotate(
        plural(busy.workers, "worker"), (1.0, busy.workers), xycoords=("axes fraction", "data"),
        xytext=(-2, 3), textcoords="offset points", ha="right", fontsize=8.5,
    )  # fmt: skip
    axes.set_ylim(0, 1.22 * max(float(busy.busy.max()), busy.workers))
    axes.set_xlim(0, busy.span / size)
    axes.set_xlabel(f"time since the first task ({unit})")
    axes.set_ylabel("tasks at work")
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    caption = "Tasks at work over time."
    if busy.pauses:
        caption += f" {plural(busy.pauses, 'pause')} of more than a minute cut out."
    return Picture(svg(figure), caption, "Tasks at work over time")


# --- molecules --------------------------------------------------------------------------------


def _drawing(smiles: str) -> str:
    """Return a 2D picture as a data URI; empty when RDKit cannot draw the molecule."""
    from rdkit import Chem, rdBase
    from rdkit.Chem.Draw import rdMolDraw2D

    if not smiles:
        return ""
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
        if mol is None:
            return ""
        canvas = rdMolDraw2D.MolDraw2DSVG(230, 160)
        options: Any = canvas.drawOptions()
        options.clearBackground = False
        options.bondLineWidth = 1.4
        options.fixedBondLength = 26
        options.padding = 0.06
        try:
            rdMolDraw2D.PrepareAndDrawMolecule(canvas, mol)
        except (RuntimeError, ValueError):
            return ""
    canvas.FinishDrawing()
    return data_uri(canvas.GetDrawingText().encode())


@dataclass(frozen=True, slots=True)
class _Card:
    name: str
    value: str
    detail: str
    picture: str
    smiles: str


def _card(facts: _Facts, molecule: int, value: str, detail: str) -> _Card:
    smiles = _text(facts.molecules.rows["smiles"], molecule)
    formula = _text(facts.molecules.rows["formula"], molecule)
    return _Card(
        facts.name(molecule), value, detail or formula, _drawing(smiles), _short(smiles, 300)
    )


def _distinct(rows: Iterable[int], owner: Indices) -> list[int]:
    """Return the first few rows that belong to different, known molecules."""
    seen: set[int] = set()
    chosen = []
    for row in rows:
        molecule = int(owner[row])
        if molecule >= 0 and molecule not in seen:
            seen.add(molecule)
            chosen.append(row)
            if len(chosen) == _CARDS:
                break
    return chosen


def _galleries(facts: _Facts) -> list[tuple[str, str, list[_Card]]]:
    """Return (title, explanation, cards) of the molecules worth looking at."""
    galleries: list[tuple[str, str, list[_Card]]] = []
    rows, gain = facts.relaxations, facts.gain
    stages = facts.relax_stages()
    if stages:
        main = facts.main_stage()
        mine = np.flatnonzero(rows["stage"].equals(main))
        finite = mine[np.isfinite(gain[mine])]
        falling = finite[np.argsort(-gain[finite], kind="stable")]
        longest = mine[np.argsort(-rows["n_steps"][mine], kind="stable")]
        changed = falling[rows["connectivity_changed"][falling] != 0]

        def card(row: int, steps_first: bool = False) -> _Card:
            energy = f"{number(gain[row])} kcal/mol" if np.isfinite(gain[row]) else ""
            steps = plural(int(rows["n_steps"][row]), "step")
            value, detail = (steps, energy) if steps_first else (energy, steps)
            return _card(facts, int(facts.owner[row]), value, detail)

        where = f"stage {main}"
        for title, about, order, steps_first in (
            ("Largest energy gain", f"Furthest downhill in {where}.", falling, False),
            ("Most steps", f"The slowest to settle in {where}.", longest, True),
            (
                "Bonds changed",
                f"{plural(len(changed), 'relaxation')} of {where} ended with other bonds than "
                "they began with; drawn is the molecule that was asked for.",
                changed,
                False,
            ),
        ):
            chosen = _distinct(order.tolist(), facts.owner)
            if chosen:
                galleries.append((title, about, [card(row, steps_first) for row in chosen]))
    tasks = facts.tasks
    failed = np.flatnonzero(~tasks["status"].equals("ok"))
    failed = failed[tasks["mol_key"][failed].any(axis=1)]
    owner = np.full(len(tasks), -1, np.intp)
    owner[failed] = facts.molecules.find(tasks["mol_key"][failed])
    chosen = _distinct(failed.tolist(), owner)
    if chosen:
        stage, status = tasks["stage"], tasks["status"]
        cards = [
            _card(
                facts, int(owner[row]), status.names[status.codes[row]],
                f"in stage {stage.names[stage.codes[row]]}",
            )
            for row in chosen
        ]  # fmt: skip
        about = f"{plural(len(np.unique(owner[failed])), 'molecule')} failed at some stage."
        galleries.append(("Failed", about, cards))
    return galleries


# --- tables -----------------------------------------------------------------------------------


def _failures(facts: _Facts) -> list[dict[str, str]]:
    """Return the first failures, earliest first."""
    tasks = facts.tasks
    failed = np.flatnonzero(~tasks["status"].equals("ok"))
    first = failed[np.argsort(tasks["started_s"][failed], kind="stable")][:_SHOWN_FAILURES]
    owners = facts.molecules.find(tasks["mol_key"][first]).tolist()
    known = facts.molecules.rows
    lines = []
    for row, owner in zip(first.tolist(), owners, strict=True):

        def word(column: str, row: int = row) -> str:
            values = tasks[column]
            return str(values.names[values.codes[row]])

        source, line = word("source"), int(tasks["line"][row])
        if not source and owner >= 0:
            source = known["source"].names[known["source"].codes[owner]]
            line = int(known["line"][owner])
        lines.append(
            {
                "stage": word("stage"),
                "status": word("status"),
                "molecule": facts.name(owner),
                "message": _short(_text(tasks["message"], row), 400),
                # The whole path is long, and the same on nearly every line.
                "where": f"{Path(source).name}:{line}" if source else "",
                "source": source,
                "attempts": str(int(tasks["attempts"][row])),
                "key": key_bytes(tasks["key"][row]).hex()[:12],
            }
        )
    return lines


def _groups(rows: Rows, names: Sequence[str]) -> list[tuple[list[str], Indices]]:
    """Return (values, rows) of each combination of category columns that occurs."""
    if not len(rows):
        return []
    codes = np.stack([rows[name].codes for name in names], axis=1)
    found, inverse = np.unique(codes, axis=0, return_inverse=True)
    order = np.argsort(inverse.reshape(-1), kind="stable")
    ends = np.cumsum(np.bincount(inverse.reshape(-1), minlength=len(found)))
    parts = np.split(order, ends[:-1])
    return [
        ([rows[n].names[c] for n, c in zip(names, combination, strict=True)], part)
        for combination, part in zip(found.tolist(), parts, strict=True)
    ]


def _levels(facts: _Facts) -> list[list[str]]:
    rows = facts.relaxations
    lines = []
    for words, part in _groups(rows, ("stage", "level", "program", "optimizer")):
        gain = facts.gain[part]
        gain = gain[np.isfinite(gain)]
        lines.append(
            [
                *words,
                count(len(part)),
                middle(float(np.median(rows["n_steps"][part]))),
                number(float(np.median(gain))) if len(gain) else "",
                seconds(float(np.median(rows["cpu_s"][part]))),
            ]
        )
    order = facts.relax_stages()
    return sorted(lines, key=lambda line: (order.index(line[0]), line))


def _methods(facts: _Facts) -> list[list[str]]:
    return [
        [*words, count(len(part)), middle(float(np.median(facts.geometries["n_steps"][part])))]
        for words, part in _groups(facts.geometries, ("stage", "method"))
    ]


def _kernels(facts: _Facts) -> list[list[str]]:
    order = _stage_order(facts.tasks)
    found = [words for words, _ in _groups(facts.tasks, ("stage", "kernel"))]
    found.sort(key=lambda words: order.index(words[0]))
    names = _families(order)
    folded = dict.fromkeys((names[stage], kernel) for stage, kernel in found)
    return [list(words) for words in folded]


# --- the page ---------------------------------------------------------------------------------


def _context(facts: _Facts, counts: Sequence[StageCounts] | None) -> dict[str, Any]:

    rows, gain = facts.relaxations, facts.gain
    stages = facts.relax_stages()
    heavy = np.zeros(len(rows))
    known = facts.owner >= 0
    heavy[known] = facts.molecules.rows["n_heavy"][facts.owner[known]]
    usable = np.isfinite(gain)
    masks = {stage: rows["stage"].equals(stage) for stage in stages}
    tasks = facts.tasks
    run = np.flatnonzero(~tasks["stage"].equals(_READING) & (tasks["wall_s"] > 0))
    busy = activity(tasks["started_s"][run], tasks["wall_s"][run], tasks["cpu_s"][run])
    with style():
        per_atom = usable & (heavy > 0)
        energy = [
            _histogram(
                {stage: gain[mask & usable] for stage, mask in masks.items()},
                "energy gained (kcal/mol)",
                "Energy gained per molecule",
            ),
            _histogram(
                {
                    stage: gain[mask & per_atom] / heavy[mask & per_atom]
                    for stage, mask in masks.items()
                },
                "energy gained per heavy atom (kcal/mol)",
                "Energy gained per heavy atom",
            ),
        ]
        effort = [
            _histogram(
                {stage: rows["n_steps"][mask].astype(float) for stage, mask in masks.items()},
                "optimiser steps",
                "Optimiser steps",
                whole=True,
            ),
            _cost_figure(facts, stages),
        ]
        timeline = _busy_figure(busy)
        sections = [
            report_diffusion.section(facts.diffusion),
            report_boltzmann.section(facts.boltzmann),
        ]
    failed = int((~tasks["status"].equals("ok")).sum())
    return {
        "name": facts.store.name,
        "about": facts.store.about,
        "path": str(facts.store.path),
        "written": _utc(time.time()),
        "findings": _findings(facts),
        "sections": sections,
        "planned_known": counts is not None,
        "counts": _folded(counts if counts is not None else _derived_counts(facts)),
        "energy": [picture for picture in energy if picture],
        "effort": [picture for picture in effort if picture],
        "timeline": timeline,
        "busy": busy,
        "busy_text": {
            "cpu": seconds(busy.cpu),
            "span": seconds(busy.span),
            "workers": plural(busy.workers, "worker"),
        },
        "stage_times": _stage_times(facts),
        "galleries": _galleries(facts),
        "classes": _failure_classes(facts),
        "failures": _failures(facts),
        "failed": failed,
        "levels": _levels(facts),
        "methods": _methods(facts),
        "kernels": _kernels(facts),
        "problems": facts.problems,
        "count": count,
    }


def write_report(
    store: Store,
    target: Path,
    *,
    counts: Sequence[StageCounts] | None = None,
    diffusion: Diffusion | None = None,
) -> Path:
    """Write the campaign's report as one HTML file that needs nothing else; return its path.

    ``counts`` gives what was planned; without it the report tells only what has finished.
    ``diffusion`` saves reading that part again.
    An earlier report is replaced. Raises StoreError when the file cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja")
    order = [row.stage for row in counts or ()]
    if diffusion is None:
        diffusion = report_diffusion.gather(store, order)
    html = page.render(_context(_gather(store, diffusion, order), counts))
    target = Path(target).absolute()
    write_whole(target, html.encode("utf-8", "replace"))
    return target
