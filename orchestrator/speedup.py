"""What a better start saves: relaxations of one molecule from different starts, side by side.

The baseline is the relaxation from the MMFF geometry; an arm is any other relaxation at the same
level of theory that goes back to the very same MMFF geometry, by way of diffusion or with other
settings of the optimiser. Arms go by the names of their stages. Only the store is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kernels.units import EV_TO_KCAL
from orchestrator import published
from orchestrator.bootstrap import Estimate, Statistic, estimate, mean, median
from orchestrator.columns import Category, Rows, key_bytes
from orchestrator.csv_file import write_csv
from orchestrator.errors import StoreError
from orchestrator.published import Published
from orchestrator.store import Snapshot, Store
from orchestrator.tables import Lookup

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]
Keys = NDArray[np.uint64]

# kcal/mol: relaxed energies that differ by more belong to different minima.
SAME_BASIN: Final = 0.2

_DEEPEST = 16
_FORCE_FIELDS = ("mmff",)
_NUMBERED = re.compile(r"[-_.]?(step|epoch)[-_]?(\d+)")

_RELAXATIONS = (
    "key", "mol_key", "parent_key", "stage", "level", "program", "optimizer", "conformer",
    "n_atoms", "n_steps", "n_evaluations", "initial_energy_eV", "final_energy_eV",
    "connectivity_changed", "cpu_s",
)  # fmt: skip
_PATHS = ("key", "model", "n", "protocol", "connectivity_changed")
_TASKS = ("key", "parent_key", "kernel", "started_s", "cpu_s")
_MOLECULES = ("key", "smiles", "name", "source")


# --- results ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """How far above a minimum relaxations start, in kcal/mol."""

    mean: Estimate
    median: Estimate


@dataclass(frozen=True, slots=True)
class Summary:
    """An arm against its baseline over some pairs of relaxations.

    ``reduction``: median of 1 - steps/baseline steps, ``reduction_quartiles`` its 25th and 75th
    percentile and ``factors`` the same as baseline steps/steps. Energies in kcal/mol: ``delta`` is
    E(baseline) - E(arm), positive where the arm found the deeper minimum. Starts are above the
    relaxation's ``own`` minimum, or above the ``lowest`` that any arm of the molecule found.
    ``ratio``: mean start of the baseline over that of the arm, above the own minima.
    CPU times in s; ``cpu_before`` is what led from the baseline's start to the arm's, that is, the
    diffusion; ``cpu_saved`` is the median per molecule, ``cpu_saved_share`` of all together.
    """

    pairs: int
    molecules: int
    steps: float
    baseline_steps: float
    reduction: Estimate
    reduction_quartiles: tuple[float, float]
    factors: tuple[float, float]
    evaluations_saved_share: float
    delta_mean: float
    delta_median: float
    same_basin: float
    deeper: float
    higher: float
    own: Start
    baseline_own: Start
    lowest: Start
    baseline_lowest: Start
    ratio: Estimate
    cpu: float
    cpu_before: float
    baseline_cpu: float
    cpu_saved: Estimate
    cpu_saved_share: float


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """The relaxations of one stage, pair by pair with those of the baseline.

    ``mine``, ``theirs`` (P,): rows of the relaxations; ``before`` and ``baseline_before`` (P,): CPU
    seconds from the geometry that both go back to up to their starts; ``changed`` (P,): bonds
    changed in one of the two or in the diffusion, which keeps the pair out of every number;
    ``lowest`` (P,): the lowest minimum any arm found, eV. ``unpaired``: relaxations of the arm
    without a finished baseline; ``missing``: baselines without a finished relaxation of the arm.
    ``model`` is empty, and ``n`` -1, where no diffusion lies between.
    """

    stage: str
    level: str
    program: str
    optimizer: str
    model: str
    n: int
    protocol: str
    mine: Indices
    theirs: Indices
    before: Floats
    baseline_before: Floats
    changed: Mask
    lowest: Floats
    unpaired: int
    missing: int
    all: Summary
    same: Summary

    def delta(self, relaxations: Rows) -> Floats:
        """Return E(baseline) - E(arm) of each pair, (P,), in kcal/mol."""
        energy = relaxations["final_energy_eV"]
        found: Floats = (energy[self.theirs] - energy[self.mine]) * EV_TO_KCAL
        return found

    @property
    def diffused(self) -> bool:
        """Whether the arm's start came out of a diffusion model."""
        return bool(self.model)


@dataclass(frozen=True, slots=True)
class Point:
    """One checkpoint of a training series: its step or epoch, and the arm that used it."""

    number: int
    arm: Arm


@dataclass(frozen=True, slots=True)
class Series:
    """Arms that differ in the checkpoint only, in the order of training; unit: step or epoch."""

    family: str
    unit: str
    n: int
    protocol: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All arms of a store against one baseline stage; ``own`` are the baseline's own starts."""

    store: Store
    baseline: str
    level: str
    program: str
    optimizer: str
    relaxations: Rows
    molecules: Rows
    owner: Indices
    own: Start
    baseline_pairs: int
    arms: tuple[Arm, ...]
    series: tuple[Series, ...]
    published: Published

    def published_reduction(self, arm: Arm) -> float | None:
        """Return the published saving of an arm like this one; the study had plain BFGS only."""
        if not arm.diffused or {arm.optimizer, self.optimizer} != {"BFGS"}:
            return None
        return self.published.reduction(arm.n)

    def best(self) -> Arm | None:
        """Return the arm by way of diffusion that saves most steps in the median.

        Only arms that relax as the baseline does, so that what is saved is saved by diffusion.
        """
        return self._best(lambda arm: arm.diffused and arm.optimizer == self.optimizer)

    def best_otherwise(self) -> Arm | None:
        """Return the arm, diffusion or not, that relaxes by other rules and saves most steps."""
        return self._best(lambda arm: arm.optimizer != self.optimizer)

    def _best(self, wanted: Callable[[Arm], bool]) -> Arm | None:
        arms = [arm for arm in self.arms if wanted(arm) and arm.all.pairs]
        return max(arms, key=lambda arm: arm.all.reduction.value, default=None)


# --- from the store ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Tables:
    relaxations: Rows
    tasks: Lookup
    paths: Lookup
    molecules: Lookup


def _gather(snapshot: Snapshot) -> _Tables:
    return _Tables(
        snapshot.read("relaxations", _RELAXATIONS),
        Lookup(snapshot.read("tasks", _TASKS)),
        Lookup(snapshot.read("paths", _PATHS)),
        Lookup(snapshot.read("molecules", _MOLECULES)),
    )


def _occurring(column: Category) -> list[str]:
    return [column.names[code] for code in np.unique(column.codes).tolist()]


def _started(tables: _Tables, keys: Keys) -> Floats:
    """Return when each task began, Unix time in s; infinity where the task is not known."""
    task = tables.tasks.find(keys)
    started = np.full(len(keys), np.inf)
    started[task >= 0] = tables.tasks.rows["started_s"][task[task >= 0]]
    return started


def _stages(tables: _Tables, order: Sequence[str]) -> list[str]:
    """Return the stages with relaxations: as in ``order``, those not in it by first start."""
    stage = tables.relaxations["stage"]
    started = _started(tables, tables.relaxations["key"])
    first = {name: float(started[stage.equals(name)].min()) for name in _occurring(stage)}
    place = {name: at for at, name in enumerate(order)}
    return sorted(first, key=lambda name: (place.get(name, len(place)), first[name], name))


def _kernels(tables: _Tables, keys: Keys) -> list[str]:
    """Return the kernel of each task; empty for what is no task, such as a file's geometry."""
    kernel = tables.tasks.rows["kernel"]
    return [
        kernel[row].split(" ")[0] if row >= 0 else "" for row in tables.tasks.find(keys).tolist()
    ]


def _default_baseline(tables: _Tables, stages: Sequence[str]) -> str:
    relaxations = tables.relaxations
    parents: dict[str, str] = {}
    for stage in stages:
        row = np.flatnonzero(relaxations["stage"].equals(stage))[:1]
        parents[stage] = _kernels(tables, relaxations["parent_key"][row])[0]
    for wanted in (_FORCE_FIELDS, ("", "embed")):
        for stage in stages:
            if parents[stage] in wanted:
                return stage
    return stages[0]


def _latest(tables: _Tables, rows: Indices) -> Indices:
    """Keep the last started relaxation of those that started from the same geometry.

    A store keeps what a stage of the same name gave with other settings before.
    """
    relaxations = tables.relaxations
    started = _started(tables, relaxations["key"][rows])
    parent = relaxations["parent_key"][rows]
    order = np.lexsort((-started, parent[:, 1], parent[:, 0]))
    ordered = parent[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return rows[np.sort(order[fresh])]


@dataclass(slots=True)
class _Lineage:
    """Where relaxations come from: ``theirs`` (R,) is the place among the baselines, or -1."""

    theirs: Indices
    before: Floats
    path: Indices


def _undiffused(tables: _Tables, rows: Indices) -> tuple[Keys, Floats]:
    """Return what relaxations started from, (R, 2), before diffusion; and its CPU seconds (R,)."""
    current = tables.relaxations["parent_key"][rows].copy()
    before = np.zeros(len(rows))
    for _ in range(_DEEPEST):
        task = tables.tasks.find(current)
        diffused = np.flatnonzero((tables.paths.find(current) >= 0) & (task >= 0))
        if not len(diffused):
            break
        before[diffused] += tables.tasks.rows["cpu_s"][task[diffused]]
        current[diffused] = tables.tasks.rows["parent_key"][task[diffused]]
    return current, before


def _trace(tables: _Tables, rows: Indices, baselines: Indices, starts: Keys) -> _Lineage:
    """Follow each relaxation back to the geometry from which a baseline started."""
    relaxations, tasks = tables.relaxations, tables.tasks
    origin = Lookup(Rows(relaxations.schema, {"key": starts}))
    ends = Lookup(Rows(relaxations.schema, {"key": relaxations["key"][baselines]}))
    found = _Lineage(
        np.full(len(rows), -1, np.intp), np.zeros(len(rows)), np.full(len(rows), -1, np.intp)
    )
    current = relaxations["parent_key"][rows].copy()
    open_ = np.arange(len(rows))
    for _ in range(_DEEPEST):
        at = origin.find(current[open_])
        found.theirs[open_[at >= 0]] = at[at >= 0]
        # What goes on from a baseline's end is no arm: it had the baseline's steps for nothing.
        open_ = open_[(at < 0) & (ends.find(current[open_]) < 0)]
        task = tasks.find(current[open_])
        open_, task = open_[task >= 0], task[task >= 0]
        if not len(open_):
            break
        path = tables.paths.find(current[open_])
        nearer = (path >= 0) & (found.path[open_] < 0)
        found.path[open_[nearer]] = path[nearer]
        found.before[open_] += tasks.rows["cpu_s"][task]
        current[open_] = tasks.rows["parent_key"][task]
    return found


@dataclass(slots=True)
class _Pairs:
    stage: str
    mine: Indices
    at: Indices
    before: Floats
    path: Indices
    unpaired: int


def compare(store: Store, *, baseline: str = "", order: Sequence[str] = ()) -> Comparison:
    """Compare every arm of a store with the baseline stage.

    ``baseline`` is the stage to compare with, by default the first relaxation from an MMFF
    geometry; ``order`` gives the campaign's stages, where they are known: else stages come by when
    they first started. Of relaxations of one stage from one geometry the latest counts.

    Raises StoreError where there is no relaxation, or none of the stage ``baseline``.
    """
    tables = store.consistent(_gather)
    relaxations = tables.relaxations
    if not len(relaxations):
        raise StoreError(f"{store.path}: no relaxation has finished yet, nothing can be compared")
    stages = _stages(tables, order)
    if baseline and baseline not in stages:
        raise StoreError(
            f"{store.path}: there is no relaxation of a stage {baseline!r}; "
            f"stages with relaxations: {', '.join(stages)}"
        )
    baseline = baseline or _default_baseline(tables, stages)
    stage = relaxations["stage"]
    theirs = _latest(tables, np.flatnonzero(stage.equals(baseline)))
    level = relaxations["level"][int(theirs[-1])]
    program = relaxations["program"][int(theirs[-1])]
    alike = relaxations["level"].equals(level) & relaxations["program"].equals(program)
    theirs = theirs[alike[theirs]]
    starts, before = _undiffused(tables, theirs)
    matched: list[_Pairs] = []
    for name in stages:
        rows = np.flatnonzero(stage.equals(name) & alike)
        if name == baseline or not len(rows):
            continue
        rows = _latest(tables, rows)
        lineage = _trace(tables, rows, theirs, starts)
        pairs = _one_each(tables, rows, lineage)
        if len(pairs):
            chosen = rows[pairs], lineage.theirs[pairs], lineage.before[pairs], lineage.path[pairs]
            unpaired = int((lineage.theirs < 0).sum())
            matched.append(_Pairs(name, *chosen, unpaired))
    lowest = relaxations["final_energy_eV"][theirs].copy()
    changed = relaxations["connectivity_changed"] != 0
    lowest[changed[theirs]] = np.inf
    for match in matched:
        energy = relaxations["final_energy_eV"][match.mine].copy()
        energy[changed[match.mine] | _bonds_changed(tables, match.path)] = np.inf
        lowest[match.at] = np.minimum(lowest[match.at], energy)
    owner = tables.molecules.find(relaxations["mol_key"])
    arms = tuple(_arm(tables, match, theirs, before, lowest) for match in matched)
    if not order:
        # When stages first started says little: later ones go first in a run.
        arms = tuple(sorted(arms, key=lambda arm: (arm.diffused, arm.model, arm.n)))
    kept = theirs[~changed[theirs]]
    molecules = tables.molecules.rows
    return Comparison(
        store=store,
        baseline=baseline,
        level=level,
        program=program,
        optimizer=relaxations["optimizer"][int(theirs[-1])],
        relaxations=relaxations,
        molecules=molecules,
        owner=owner,
        own=_start(_groups(relaxations, kept), _above(relaxations, kept)),
        baseline_pairs=len(theirs),
        arms=arms,
        series=_series(arms),
        published=published.nearest(_occurring(molecules["source"]), [a.model for a in arms]),
    )


def _one_each(tables: _Tables, rows: Indices, lineage: _Lineage) -> Indices:
    """Return which of the rows to pair: the last started of those with the same baseline."""
    paired = np.flatnonzero(lineage.theirs >= 0)
    started = _started(tables, tables.relaxations["key"][rows[paired]])
    order = paired[np.lexsort((-started, lineage.theirs[paired]))]
    first = np.unique(lineage.theirs[order], return_index=True)[1]
    chosen: Indices = order[first]
    return chosen


def _bonds_changed(tables: _Tables, path: Indices) -> Mask:
    """Return whether diffusion changed bonds, for rows of the paths table (-1: no diffusion)."""
    found = np.zeros(len(path), bool)
    found[path >= 0] = tables.paths.rows["connectivity_changed"][path[path >= 0]] != 0
    return found


def _above(relaxations: Rows, rows: Indices) -> Floats:
    """Return how far above their own minimum relaxations start, in kcal/mol."""
    start, end = relaxations["initial_energy_eV"][rows], relaxations["final_energy_eV"][rows]
    above: Floats = (start - end) * EV_TO_KCAL
    return above


def _groups(relaxations: Rows, rows: Indices) -> NDArray[np.integer[Any]]:
    """Return the molecule of each relaxation, as a number."""
    keys = relaxations["mol_key"][rows]
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)


def _arm(tables: _Tables, pairs: _Pairs, baselines: Indices, before: Floats, lowest: Floats) -> Arm:
    relaxations, paths = tables.relaxations, tables.paths.rows
    mine, theirs = pairs.mine, baselines[pairs.at]
    changed = relaxations["connectivity_changed"] != 0
    out = changed[mine] | changed[theirs] | _bonds_changed(tables, pairs.path)
    last = int(pairs.path[-1])
    times = pairs.before, before[pairs.at]
    measured = _Measured.of(relaxations, mine, theirs, times, lowest[pairs.at])
    usable = ~out & measured.finite()
    return Arm(
        stage=pairs.stage,
        level=relaxations["level"][int(mine[-1])],
        program=relaxations["program"][int(mine[-1])],
        optimizer=relaxations["optimizer"][int(mine[-1])],
        model=paths["model"][last] if last >= 0 else "",
        n=int(paths["n"][last]) if last >= 0 else -1,
        protocol=paths["protocol"][last] if last >= 0 else "",
        mine=mine,
        theirs=theirs,
        before=pairs.before,
        baseline_before=before[pairs.at],
        changed=out,
        lowest=lowest[pairs.at],
        unpaired=pairs.unpaired,
        missing=len(baselines) - len(mine),
        all=summarise(measured.take(usable)),
        same=summarise(measured.take(usable & (np.abs(measured.delta) <= SAME_BASIN))),
    )


# --- numbers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Measured:
    """Pairs of relaxations, (P,) each: steps, evaluations, CPU s, energies in kcal/mol."""

    molecule: NDArray[np.integer[Any]]
    steps: Floats
    baseline_steps: Floats
    evaluations: Floats
    baseline_evaluations: Floats
    delta: Floats
    own: Floats
    baseline_own: Floats
    lowest: Floats
    baseline_lowest: Floats
    cpu: Floats
    before: Floats
    baseline_cpu: Floats

    @classmethod
    def of(
        cls,
        rows: Rows,
        mine: Indices,
        theirs: Indices,
        before: tuple[Floats, Floats],
        lowest: Floats,
    ) -> _Measured:
        start, end = rows["initial_energy_eV"], rows["final_energy_eV"]
        return cls(
            molecule=_groups(rows, theirs),
            steps=rows["n_steps"][mine].astype(float),
            baseline_steps=rows["n_steps"][theirs].astype(float),
            evaluations=rows["n_evaluations"][mine].astype(float),
            baseline_evaluations=rows["n_evaluations"][theirs].astype(float),
            delta=(end[theirs] - end[mine]) * EV_TO_KCAL,
            own=_above(rows, mine),
            baseline_own=_above(rows, theirs),
            lowest=(start[mine] - lowest) * EV_TO_KCAL,
            baseline_lowest=(start[theirs] - lowest) * EV_TO_KCAL,
            cpu=rows["cpu_s"][mine],
            before=before[0],
            baseline_cpu=rows["cpu_s"][theirs] + before[1],
        )

    def finite(self) -> Mask:
        """Return the pairs whose energies are all numbers."""
        mask: Mask = np.isfinite(self.delta) & np.isfinite(self.own) & np.isfinite(self.lowest)
        mask &= np.isfinite(self.baseline_own)
        return mask

    def take(self, mask: Mask) -> _Measured:
        """Return the pairs of a mask."""
        return _Measured(*(getattr(self, name)[mask] for name in self.__slots__))

    @property
    def reduction(self) -> Floats:
        """Share of the baseline's steps saved, (P,); 0 where there were none to save."""
        before = np.maximum(self.baseline_steps, 1.0)
        return (self.baseline_steps - self.steps) / before


def _start(molecule: NDArray[np.integer[Any]], above: Floats) -> Start:
    found = estimate(molecule, {"mean": mean(above), "median": median(above)})
    return Start(found["mean"], found["median"])


def summarise(pairs: _Measured) -> Summary:
    """Return the numbers of a comparison; every estimate is NaN where there is no pair."""
    if not len(pairs.steps):
        return _nothing()
    reduction = pairs.reduction
    saved = pairs.baseline_cpu - pairs.cpu - pairs.before
    series = {
        "own": pairs.own,
        "baseline_own": pairs.baseline_own,
        "lowest": pairs.lowest,
        "baseline_lowest": pairs.baseline_lowest,
    }
    statistics = {
        "reduction": median(reduction),
        "cpu_saved": median(saved),
        "ratio": Statistic(_mean_ratio, (pairs.baseline_own, pairs.own)),
    }
    for name, column in series.items():
        statistics |= {f"{name} mean": mean(column), f"{name} median": median(column)}
    found = estimate(pairs.molecule, statistics)
    starts = {name: Start(found[f"{name} mean"], found[f"{name} median"]) for name in series}
    low, high = (float(q) for q in np.percentile(reduction, [25, 75]))
    return Summary(
        pairs=len(pairs.steps),
        molecules=len(np.unique(pairs.molecule)),
        steps=float(np.median(pairs.steps)),
        baseline_steps=float(np.median(pairs.baseline_steps)),
        reduction=found["reduction"],
        reduction_quartiles=(low, high),
        factors=(_ratio(1.0, 1.0 - low), _ratio(1.0, 1.0 - high)),
        evaluations_saved_share=1.0
        - _ratio(pairs.evaluations.sum(), pairs.baseline_evaluations.sum()),
        delta_mean=float(pairs.delta.mean()),
        delta_median=float(np.median(pairs.delta)),
        same_basin=float((np.abs(pairs.delta) <= SAME_BASIN).mean()),
        deeper=float((pairs.delta > SAME_BASIN).mean()),
        higher=float((pairs.delta < -SAME_BASIN).mean()),
        ratio=found["ratio"],
        cpu=float(np.median(pairs.cpu)),
        cpu_before=float(np.median(pairs.before)),
        baseline_cpu=float(np.median(pairs.baseline_cpu)),
        cpu_saved=found["cpu_saved"],
        cpu_saved_share=_ratio(saved.sum(), pairs.baseline_cpu.sum()),
        **starts,
    )


def _mean_ratio(above: Floats, below: Floats, axis: int) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Floats = above.mean(axis=axis) / below.mean(axis=axis)
    return ratio


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below > 0 else float("inf") if above > 0 else float("nan")


def _nothing() -> Summary:
    nan = float("nan")
    none = Estimate(nan, nan, nan)
    start = Start(none, none)
    return Summary(
        0, 0, nan, nan, none, (nan, nan), (nan, nan), nan, nan, nan, nan, nan, nan,
        start, start, start, start, none, nan, nan, nan, none, nan,
    )  # fmt: skip


def _series(arms: Sequence[Arm]) -> tuple[Series, ...]:
    """Group the arms that differ in a numbered checkpoint only; two make a series."""
    groups: dict[tuple[str, str, int, str, str], list[Point]] = {}
    for arm in arms:
        marks = list(_NUMBERED.finditer(arm.model))
        if not marks:
            continue
        numbered = marks[-1]
        family = arm.model[: numbered.start()] + arm.model[numbered.end() :]
        group = (family, numbered[1], arm.n, arm.protocol, arm.optimizer)
        groups.setdefault(group, []).append(Point(int(numbered[2]), arm))
    return tuple(
        Series(family, unit, n, protocol, tuple(sorted(points, key=lambda p: p.number)))
        for (family, unit, n, protocol, _), points in sorted(groups.items())
        if len(points) > 1
    )


# --- for people and programs ------------------------------------------------------------------


def saved_line(comparison: Comparison) -> str:
    """Return in one line how many relaxation steps diffusion saved; empty without diffusion.

    Of several arms the line is about the one that saved most, and says which it is. What another
    optimizer or another Hessian saved is said apart.
    """
    arm = comparison.best()
    if arm is None:
        return ""
    other = comparison.best_otherwise()
    besides = ""
    if other is not None and other.all.reduction.value > arm.all.reduction.value:
        way = f"{'diffusion and ' if other.diffused else ''}{other.optimizer}"
        besides = f"; {100 * other.all.reduction.value:.0f} % saved with {way} ({other.stage})"
    found, n = arm.all.reduction, arm.all.molecules
    # A model far from what it was trained on does harm, which a minus sign alone would hide.
    saved = found.value >= 0
    value, *bounds = (
        100 * x if saved else -100 * x
        for x in (found.value, *sorted((found.low, found.high), reverse=not saved))
    )
    interval = (
        f"95 % CI {bounds[0]:.0f} to {bounds[1]:.0f}, "
        if found.known
        else "too few for an interval, "
    )
    what = "saved {:.0f} % of the" if saved else "did harm: {:.0f} % more"
    return (
        f"diffusion {what.format(value)} relaxation steps (median, {interval}"
        f"{n:,} molecule{'s' if n != 1 else ''}; {arm.stage} against {comparison.baseline})"
        f"{besides}"
    )


_COLUMNS = (
    "molecule", "name", "smiles", "n_atoms", "conformer", "arm", "model", "n", "protocol",
    "baseline_steps", "steps", "step_reduction", "energy_delta_kcal_per_mol", "same_basin",
    "connectivity_changed", "baseline_start_above_own_minimum_kcal_per_mol",
    "start_above_own_minimum_kcal_per_mol", "baseline_start_above_lowest_minimum_kcal_per_mol",
    "start_above_lowest_minimum_kcal_per_mol", "baseline_cpu_s", "cpu_s", "cpu_before_s",
    "cpu_saved_s", "baseline_key", "key",
)  # fmt: skip


def per_molecule(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one mapping per arm and pair of relaxations, changed bonds included and marked."""
    rows, lines = comparison.relaxations, []
    names = comparison.molecules["name"].strings()
    smiles = comparison.molecules["smiles"].strings()
    for arm in comparison.arms:
        times = arm.before, arm.baseline_before
        pairs = _Measured.of(rows, arm.mine, arm.theirs, times, arm.lowest)
        reduction = pairs.reduction
        for at, (mine, theirs) in enumerate(
            zip(arm.mine.tolist(), arm.theirs.tolist(), strict=True)
        ):
            molecule = int(comparison.owner[mine])
            values = (
                key_bytes(rows["mol_key"][mine]).hex(),
                names[molecule] if molecule >= 0 else "",
                smiles[molecule] if molecule >= 0 else "",
                int(rows["n_atoms"][mine]),
                int(rows["conformer"][mine]),
                arm.stage,
                arm.model,
                arm.n if arm.diffused else "",
                arm.protocol,
                int(rows["n_steps"][theirs]),
                int(rows["n_steps"][mine]),
                round(float(reduction[at]), 6),
                round(float(pairs.delta[at]), 6),
                int(abs(pairs.delta[at]) <= SAME_BASIN),
                int(arm.changed[at]),
                round(float(pairs.baseline_own[at]), 6),
                round(float(pairs.own[at]), 6),
                round(float(pairs.baseline_lowest[at]), 6),
                round(float(pairs.lowest[at]), 6),
                float(pairs.baseline_cpu[at]),
                float(pairs.cpu[at]),
                float(pairs.before[at]),
                round(float(pairs.baseline_cpu[at] - pairs.cpu[at] - pairs.before[at]), 9),
                key_bytes(rows["key"][theirs]).hex(),
                key_bytes(rows["key"][mine]).hex(),
            )
            lines.append(dict(zip(_COLUMNS, values, strict=True)))
    return lines


def write_per_molecule(comparison: Comparison, target: Path) -> int:
    """Write `per_molecule` as comma-separated values; return how many lines.

    Raises StoreError when the file cannot be written.
    """
    lines = per_molecule(comparison)
    write_csv(target, _COLUMNS, lines)
    return len(lines)
