"""What the report says about diffusion: findings, a table of arms, and the study's figures.

Each figure has the published value drawn into it where there is one, and says so below.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from orchestrator import alignment, generations, paths
from orchestrator.alignment import AHEAD, Alignment
from orchestrator.bootstrap import Estimate
from orchestrator.drawing import (
    COLOURS,
    DASHED,
    FAINT,
    INK,
    Picture,
    count,
    middle,
    new_figure,
    new_panels,
    number,
    plural,
    seconds,
    svg,
)
from orchestrator.errors import StoreError
from orchestrator.generations import Generation
from orchestrator.paths import EnergyCurve
from orchestrator.published import ELEMENTS_FINAL, QM9, Published
from orchestrator.speedup import SAME_BASIN, Arm, Comparison, Series, compare
from orchestrator.store import Store

Floats = NDArray[np.float64]

_PANELS: Final = 3
_FIGURES: Final = 4
_DRAWN: Final = 1500
_FEW: Final = 300
_MANY_ARROWS: Final = 60
_FAR_APART: Final = 60.0
_LONGEST_ARROW: Final = 0.45  # inches
_DEEPER, _HIGHER = "#3c8d5a", "#c8553d"
_TARGETS: Final = {"minimum": COLOURS[0], "force": COLOURS[1]}
_AREA: Final = 1.6


@dataclass(frozen=True, slots=True)
class Diffusion:
    """All that a store says about diffusion; parts that it does not have are empty."""

    comparison: Comparison | None
    energies: list[EnergyCurve]
    alignments: list[Alignment]
    generations: list[Generation]

    @property
    def published(self) -> Published:
        """The published set nearest to the campaign."""
        return self.comparison.published if self.comparison else QM9


def gather(store: Store, order: Sequence[str] = ()) -> Diffusion:
    """Read a store; ``order`` gives the campaign's stages where they are known."""
    comparison: Comparison | None
    try:
        comparison = compare(store, order=order)
    except StoreError:
        comparison = None
    place = {name: at for at, name in enumerate(order)}
    found = sorted(
        paths.walks(store), key=lambda walk: (place.get(walk.stage, -1), walk.model, walk.n)
    )
    return Diffusion(
        comparison if comparison is not None and comparison.arms else None,
        paths.energy_curves(found),
        alignment.align(found),
        generations.generations(store),
    )


# --- in words ---------------------------------------------------------------------------------


def _percent(value: float) -> str:
    return f"{number(100 * value, 0)} %" if np.isfinite(value) else ""


def _between(found: Estimate, form: Callable[[float], str]) -> str:
    return f"{form(found.low)} to {form(found.high)}" if found.known else ""


def sentences(found: Diffusion) -> list[str]:
    """Return what to say at the top of the report about diffusion, at most two sentences."""
    said = []
    arm = found.comparison.best() if found.comparison else None
    if found.comparison and arm:
        said.append(_arm_sentence(found.comparison, arm))
    elif found.energies:
        curve = max(found.energies, key=lambda c: c.molecules)
        said.append(
            f"Diffusion from n = {curve.n} takes {plural(curve.molecules, 'molecule')} from "
            f"{number(curve.mean[0])} to {number(curve.mean[-1])} kcal/mol above the relaxed "
            f"minimum in the mean (published: {number(found.published.mmff, 0)} to "
            f"{number(found.published.diffused, 0)})."
        )
    if found.generations:
        one = max(found.generations, key=lambda g: g.molecules)
        valid = 100 * float(one.mean["valid_bonds"][-1])
        said.append(
            f"Of {plural(one.molecules, 'molecule')} made from noise half have all their elements "
            f"from diffusion step {number(float(np.median(one.settled)), 0)} on (published: "
            f"{ELEMENTS_FINAL}); {number(valid, 0)} % of their atoms end with a usual number of "
            "bonds."
        )
    return said


def _arm_sentence(comparison: Comparison, arm: Arm) -> str:
    one = arm.all
    within = _between(one.reduction, lambda v: number(100 * v, 0))
    known = comparison.published_reduction(arm)
    details = ", ".join(
        filter(
            None,
            [
                f"95 % CI {within}" if within else "",
                plural(one.molecules, "molecule"),
                f"published {_percent(known)}" if known is not None else "",
            ],
        )
    )
    said = (
        f"Diffusion {_saved(one.reduction.value)} relaxation steps in the median "
        f"({arm.stage}: {details})"
    )
    lower = one.ratio.value
    if np.isfinite(lower) and lower > 0:
        times, way = (lower, "less") if lower >= 1 else (1 / lower, "more")
        said += (
            f"; it starts with {number(times)} times {way} energy above the minimum than "
            f"{comparison.baseline}"
        )
    if np.isfinite(one.cpu_saved_share):
        said += f", and with its own time counted it {_saved(one.cpu_saved_share)} CPU time"
    other = comparison.best_otherwise()
    if other is not None and other.all.reduction.value > one.reduction.value:
        said += (
            f". {'With ' if other.diffused else 'Without diffusion, with '}{other.optimizer} "
            f"({other.stage}) it is {_percent(other.all.reduction.value)} of the steps and "
            f"{_percent(other.all.cpu_saved_share)} of the CPU time"
        )
    return f"{said}."


def _saved(share: float) -> str:
    """Return `saves 5 % of the`, or `costs 5 % more`, to go before what is saved."""
    if round(100 * share) >= 0:
        return f"saves {_percent(share)} of the"
    return f"costs {_percent(-share)} more"


def _energy(value: float) -> str:
    """Return an energy with three digits or so that count."""
    return number(value, 2 if abs(value) < 10 else 1)


def _times(value: float) -> str:
    return f"{number(value, 1 if value >= 1 else 2)}×" if np.isfinite(value) else ""


def _with_interval(found: Estimate, form: Callable[[float], str], unit: str = "") -> str:
    if not np.isfinite(found.value):
        return ""
    within = f" ({form(found.low)} to {form(found.high)})" if found.known else ""
    return f"{form(found.value)}{unit}{within}"


STEP_COLUMNS: Final = (
    "arm", "starts from", "molecules", "median steps",
    "steps saved, median (95\u00a0%\u00a0CI)", "in the same basin", "published",
)  # fmt: skip
ENERGY_COLUMNS: Final = (
    "arm", "start above minimum, kcal/mol (95\u00a0%\u00a0CI)", "baseline / arm",
    "ends in the same basin", "deeper", "CPU time saved, median", "in all",
)  # fmt: skip
_WORDS: Final = ("arm", "starts from")


def _step_row(comparison: Comparison, arm: Arm) -> list[str]:
    one, same = arm.all, arm.same
    start = "the same geometry"
    if arm.diffused:
        start = f"{arm.model}, n = {arm.n}"
        start += "" if arm.protocol == "deterministic" else f", {arm.protocol}"
    if arm.optimizer != comparison.optimizer:
        start += f"\n{arm.optimizer}"
    known = comparison.published_reduction(arm)

    def share(value: float) -> str:
        return number(100 * value, 0)

    return [
        arm.stage,
        start,
        count(one.molecules)
        + (f" ({plural(one.pairs, 'pair')})" if one.pairs > one.molecules else ""),
        f"{middle(one.baseline_steps)} → {middle(one.steps)}" if one.pairs else "",
        _with_interval(one.reduction, share, " %"),
        _with_interval(same.reduction, share, " %"),
        _percent(known) if known is not None else "",
    ]


def _energy_row(arm: Arm) -> list[str]:
    one = arm.all
    return [
        arm.stage,
        _with_interval(one.own.mean, _energy),
        _times(one.ratio.value),
        _percent(one.same_basin),
        _percent(one.deeper),
        seconds(one.cpu_saved.value) if one.pairs else "",
        _percent(one.cpu_saved_share),
    ]


# --- figures ----------------------------------------------------------------------------------


def _count_down(axes: Any, levels: NDArray[np.int64]) -> None:
    """Let the diffusion step run down to 0 from left to right, as diffusion does."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(float(levels.max()) * 1.01, 0.0)
    axes.set_xlabel("diffusion step n")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _reference(axes: Any, value: float, words: str, colour: str = FAINT) -> None:
    """Draw a published value as a dashed line with words on it."""
    axes.axhline(value, color=colour, linewidth=1.0, linestyle=DASHED, zorder=1)
    axes.annotate(
        words, (0.01, value), xycoords=("axes fraction", "data"), xytext=(0, 2),
        textcoords="offset points", fontsize=8, color=colour, va="bottom", zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
    )  # fmt: skip


def _spread(values: Sequence[float], apart: float) -> list[float]:
    """Return values moved up just enough to be ``apart``, for labels beside line ends."""
    order = np.argsort(values, kind="stable")
    placed = list(values)
    for before, at in itertools.pairwise(order.tolist()):
        placed[at] = max(placed[at], placed[before] + apart)
    return placed


def energy_figure(found: Diffusion) -> Picture | None:
    """Draw the energy above the relaxed minimum along the diffusion path."""
    curves, study = found.energies, found.published
    if not curves:
        return None
    figure, axes = new_figure(9.4, 3.3)
    top = max(float(max(c.mean.max(), c.high.max())) for c in curves)
    top = 1.14 * max(top, study.mmff)
    for colour, curve in zip(COLOURS * 9, curves, strict=False):
        axes.fill_between(curve.levels, curve.low, curve.high, color=colour, alpha=0.13, lw=0)
        axes.plot(curve.levels, curve.mean, color=colour, linewidth=1.9, label=curve.stage)
        axes.plot(curve.levels, curve.median, color=colour, linewidth=1.0, linestyle=":")
    bottom = min(float(min(c.mean.min(), c.low.min())) for c in curves)
    if bottom > 0 and top > _FAR_APART * bottom:
        bottom = 0.7 * min(bottom, study.diffused)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        ends = [
            np.exp(y)
            for y in _spread(
                [float(np.log(c.mean[-1])) for c in curves], 0.065 * float(np.log(top / bottom))
            )
        ]
    else:
        bottom = min(0.0, 1.1 * bottom)
        ends = _spread([float(c.mean[-1]) for c in curves], 0.065 * (top - bottom))
    for colour, curve, y in zip(COLOURS * 9, curves, ends, strict=False):
        axes.annotate(
            _energy(float(curve.mean[-1])), (0.0, y), xytext=(5, 0), color=colour,
            textcoords="offset points", va="center", fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
    _reference(axes, study.mmff, f"published MMFF, {number(study.mmff, 1)}")
    _reference(axes, study.diffused, f"published end, {number(study.diffused, 1)}")
    _count_down(axes, np.concatenate([c.levels for c in curves]))
    axes.set_ylim(bottom, top)
    axes.set_ylabel("energy above minimum (kcal/mol)")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", frameon=False, fontsize=8.5, ncols=6)
    n = max(c.molecules for c in curves)
    left_out = max(c.left_out for c in curves)
    theory = " and ".join(dict.fromkeys(c.level_of_theory for c in curves))
    caption = (
        f"Energies along the diffusion path at {theory}, above the geometry relaxed from its end: "
        f"mean (line), median (dots) and middle half (shade) of {plural(n, 'molecule')}. Published "
        f"({study.where}): from {number(study.mmff, 1)} to {number(study.diffused, 1)} kcal/mol"
        + (" for n = 20, 30 and 50; 50 climbs first." if study is QM9 else ".")
    )
    if left_out:
        caption += f" Left out: {plural(left_out, 'path')} with changed bonds or without a minimum."
    return Picture(svg(figure), caption, "Energy along the diffusion path")


def alignment_figure(one: Alignment) -> Picture | None:
    """Draw the cosines of moves, forces and the way to the minimum against the diffusion step."""
    ahead = [k for k in AHEAD if all(f"move {k}, {t}" in one.mean for t in _TARGETS)]
    if not ahead or "force, minimum" not in one.mean:
        return None
    figure, panels = new_panels(9.4, 2.9, max(len(ahead), 2))
    floor = 0.0
    for empty in panels[len(ahead) :]:
        empty.set_visible(False)
    for axes, k in zip(panels, ahead, strict=False):
        names = [("force, minimum", FAINT)]
        names += [(f"move {k}, {target}", colour) for target, colour in _TARGETS.items()]
        for name, colour in names:
            mean, deviation = one.mean[name], one.deviation[name]
            there = np.isfinite(mean)
            x = one.levels[there]
            low, high = (mean - deviation)[there], (mean + deviation)[there]
            axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            axes.plot(x, mean[there], color=colour, linewidth=1.8)
            floor = min(floor, float(low.min()))
        axes.axhline(0.0, color=INK, linewidth=0.7)
        axes.set_title(f"next {plural(k, 'move')}", fontsize=9.5, loc="left")
        _count_down(axes, one.levels)
    words = ("force · minimum", "move · minimum", "move · force")
    for line, text in zip(panels[0].lines[:3], words, strict=True):
        line.set_label(text)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", frameon=False,
        fontsize=8.5, ncols=3,
    )  # fmt: skip
    panels[0].set_ylabel("cosine")
    panels[0].set_ylim(max(-1.0, floor - 0.05), 1.0)
    at = [k for k in ahead if np.isfinite(one.mean[f"move {k}, minimum"]).any()]
    k = at[min(1, len(at) - 1)]
    to, along = (float(np.nanmean(one.mean[f"move {k}, {t}"])) for t in _TARGETS)
    caption = (
        f"Alignment along the path of {one.stage} ({one.model}, n = {one.n}), "
        f"{one.level_of_theory}, {plural(one.molecules, 'molecule')}: cosine between an atom's "
        f"moves, the force on it and its way to the relaxed minimum; mean and one standard "
        f"deviation over all atoms. The next {plural(k, 'move')} here: {number(to, 2)} with the "
        f"way to the minimum, {number(along, 2)} with the forces in the mean. Published: the fully "
        "trained QM9 model follows the way to the minimum more than the forces; one of 50 epochs, "
        "and the one of DRUGS, the forces more."
    )
    return Picture(svg(figure), caption, f"Alignment against the diffusion step, {one.stage}")


def _round(value: float) -> float:
    """Return 1, 2 or 5 times a power of ten, near a value."""
    power = 10.0 ** np.floor(np.log10(value))
    return float(power * min((1, 2, 5, 10), key=lambda digit: abs(digit - value / power)))


def scatter_figure(comparison: Comparison, arms: Sequence[Arm]) -> Picture | None:
    """Draw steps against steps, a panel an arm, with arrows of the energy difference."""
    arms = [arm for arm in arms if arm.all.pairs]
    if not arms:
        return None
    rows, study = comparison.relaxations, comparison.published
    figure, panels = new_panels(9.4, 3.7, max(len(arms), 2))
    rng = np.random.default_rng(0)
    top, drawn, total, beyond, arrows = 1.0, 0, 0, 0, False
    shown = []
    for arm in arms:
        rows_of = np.flatnonzero(~arm.changed)
        total += len(rows_of)
        if len(rows_of) > _DRAWN:
            rows_of = rng.choice(rows_of, _DRAWN, replace=False)
        drawn += len(rows_of)
        shown.append(rows_of)
        for column in (arm.theirs, arm.mine):
            steps = rows["n_steps"][column[rows_of]]
            top = max(top, float(np.percentile(steps, 100 if len(steps) < _FEW else 99)))
    deltas = [np.abs(arm.delta(rows)[at]) for arm, at in zip(arms, shown, strict=True)]
    every = np.concatenate(deltas)
    far = every[np.isfinite(every) & (every > SAME_BASIN)]
    per_inch = float(np.percentile(far, 90)) / _LONGEST_ARROW if len(far) else 1.0
    for axes, arm, at, colour in zip(panels, arms, shown, COLOURS * 9, strict=False):
        x = rows["n_steps"][arm.theirs[at]].astype(float)
        y = rows["n_steps"][arm.mine[at]].astype(float)
        delta = arm.delta(rows)[at]
        beyond += int((np.maximum(x, y) > 1.06 * top).sum())
        axes.plot([0, 2 * top], [0, 2 * top], color=FAINT, linewidth=1.0, zorder=1)
        axes.scatter(
            x, y, s=_AREA * rows["n_atoms"][arm.mine[at]], color=colour, linewidths=0,
            alpha=0.5 if len(x) < 400 else 0.2, rasterized=len(x) > 400, zorder=2,
        )  # fmt: skip
        saved = arm.all.reduction.value
        axes.plot([0, 2 * top], [0, 2 * top * (1 - saved)], color=colour, linewidth=1.5, zorder=3)
        known = comparison.published_reduction(arm)
        if known is not None:
            axes.plot(
                [0, 2 * top], [0, 2 * top * (1 - known)], color=INK, linewidth=1.1,
                linestyle=DASHED, zorder=3,
            )  # fmt: skip
        other = np.flatnonzero(np.abs(delta) > SAME_BASIN)
        if len(other):
            limit = 1.3 * _LONGEST_ARROW * per_inch
            quiver = axes.quiver(
                x[other], y[other], np.zeros(len(other)), -np.clip(delta[other], -limit, limit),
                color=np.where(delta[other] > 0, _DEEPER, _HIGHER), units="inches",
                width=0.013 if len(other) < _MANY_ARROWS else 0.007,
                alpha=1.0 if len(other) < _MANY_ARROWS else 0.6, scale=per_inch,
                scale_units="inches", headwidth=4, headlength=5, headaxislength=4.5, zorder=4,
                clip_on=False,
            )  # fmt: skip
            # Arrows may leave the axes, and must not make them shrink.
            quiver.set_in_layout(False)
            if not arrows:
                length = _round(0.35 * per_inch)
                scale = axes.quiverkey(
                    quiver, 0.05, 0.93, length, f"{number(length, int(length < 1))} kcal/mol",
                    angle=90, labelpos="E", fontproperties={"size": 8}, color=INK,
                )  # fmt: skip
                scale.set_in_layout(False)
            arrows = True
        axes.set_title(f"{arm.stage}\n{_percent(saved)} saved", fontsize=9.5, loc="left")
        axes.set_xlim(0, 1.06 * top)
        axes.set_ylim(0, 1.06 * top)
        axes.set_xlabel(f"steps of {comparison.baseline}")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    panels[0].set_ylabel("steps of the arm")
    panels[0].yaxis.get_major_locator().set_params(integer=True, nbins=6)
    for empty in panels[len(arms) :]:
        empty.set_visible(False)
    caption = (
        "Relaxation steps against those of the same molecule from the MMFF geometry; area by "
        "number of atoms. Grey: as many steps; coloured line: the median saving"
    )
    published = [(arm.n, comparison.published_reduction(arm)) for arm in arms]
    listed = ", ".join(
        dict.fromkeys(f"{_percent(v)} for n = {n}" for n, v in published if v is not None)
    )
    caption += f"; dashed: the published one ({listed}; {study.where})." if listed else "."
    if arrows:
        caption += (
            f" Arrows where the two end more than {SAME_BASIN} kcal/mol apart: green, down: the "
            "arm ends deeper; red, up: higher."
        )
    if drawn < total:
        caption += f" {count(drawn)} dots drawn at random of {count(total)}."
    if beyond:
        caption += f" {count(beyond)} beyond the axes."
    return Picture(svg(figure), caption, "Relaxation steps against relaxation steps")


def _points(series: Series, pick: Callable[[Arm], Estimate]) -> tuple[Floats, Floats, Floats]:
    """Return the numbers, values (P,) and error bars (2, P) of a series."""
    found = [pick(point.arm) for point in series.points]
    x = np.array([point.number for point in series.points], float)
    y = np.array([one.value for one in found])
    bars = np.array([[one.value - one.low, one.high - one.value] for one in found]).T
    return x, y, np.nan_to_num(np.maximum(bars, 0.0))


def training_figures(comparison: Comparison) -> list[Picture]:
    """Draw what checkpoints along training save, and how far above the minimum they end."""
    every, study = comparison.series, comparison.published
    if not every:
        return []
    from matplotlib.ticker import MaxNLocator

    unit = " or ".join(dict.fromkeys(series.unit for series in every))
    where = f"training {unit}"
    pictures = []
    figure, axes = new_figure(4.6, 3.0)
    for colour, series in zip(COLOURS * 9, every, strict=False):
        x, y, bars = _points(series, lambda arm: arm.all.reduction)
        name = f"{series.family}, n = {series.n}"
        axes.errorbar(
            x, 100 * y, 100 * bars, color=colour, marker="o", markersize=4, linewidth=1.6,
            elinewidth=1.0, capsize=2, label=name,
        )  # fmt: skip
        known = study.reduction(series.n)
        if known is not None:
            _reference(axes, 100 * known, f"published, n = {series.n}, fully trained", colour)
        if series.unit == "epoch" and study.training:
            axes.plot(
                list(study.training), [100 * v for v in study.training.values()], "x", color=INK,
                markersize=6,
            )  # fmt: skip
    axes.axhline(0.0, color=INK, linewidth=0.7)
    axes.set_xlabel(where)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.xaxis.set_major_formatter(lambda value, _: count(round(value)))
    axes.set_ylabel("steps saved, median (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(top=max(axes.get_ylim()[1], 70.0 if study is QM9 else 0.0))
    axes.legend(frameon=False, fontsize=8, loc="best")
    early = ", ".join(f"{_percent(v)} after {k}" for k, v in sorted(study.training.items()))
    caption = "Relaxation steps saved by checkpoints along training, with 95 % intervals."
    if early:
        caption += f" Published ({study.where}): {early} epochs, dashed when fully trained."
    pictures.append(Picture(svg(figure), caption, "Steps saved along training"))
    figure, axes = new_figure(4.6, 3.0)
    for colour, series in zip(COLOURS * 9, every, strict=False):
        x, y, bars = _points(series, lambda arm: arm.all.own.mean)
        axes.errorbar(
            x, y, bars, color=colour, marker="o", markersize=4, linewidth=1.6, elinewidth=1.0,
            capsize=2, label=f"{series.family}, n = {series.n}",
        )  # fmt: skip
    mmff = comparison.own.mean.value
    _reference(axes, mmff, f"{comparison.baseline}, {number(mmff, 1)}", INK)
    _reference(axes, mmff / study.ratio, f"published: {number(study.ratio, 1)}× lower")
    axes.set_xlabel(where)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.xaxis.set_major_formatter(lambda value, _: count(round(value)))
    axes.set_ylabel("start above minimum (kcal/mol)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    caption = (
        "Mean energy at which the relaxations start above their own minimum. Published "
        f"({study.where}): {number(study.ratio, 1)} times lower than MMFF when fully trained"
    )
    caption += ", 2 times after 50 epochs, 3 times after 100." if study is QM9 else "."
    pictures.append(Picture(svg(figure), caption, "Energy of the start along training"))
    return pictures


def _late_scale(axes: Any, levels: NDArray[np.int64]) -> None:
    """Let n run down to 0 with more room for the late steps, where most of it happens."""
    top = float(levels.max())
    axes.set_xscale(
        "function", functions=(lambda n: np.sqrt(np.maximum(n, 0.0)), lambda root: root**2)
    )
    axes.set_xlim(top, 0.0)
    axes.set_xticks([n for n in (1000, 500, 250, 100, 50, 10, 0) if n <= top])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("diffusion step n")


def generation_figure(one: Generation) -> Picture:
    """Draw how generated molecules settle, and their energy once the elements are final."""
    energetic = bool(np.isfinite(one.energy).any())
    figure, panels = new_panels(9.4, 3.2, 3 if energetic else 2, share=False)
    lengths, shares = panels[:2]
    for name, words, colour in (
        ("step_length_A", "step length", COLOURS[0]),
        ("bond_deviation_A", "bond length − final", COLOURS[1]),
    ):
        values = one.mean[name]
        there = np.isfinite(values) & (values > 0)
        lengths.plot(one.levels[there], values[there], color=colour, linewidth=1.7, label=words)
    lengths.set_yscale("log")
    lengths.set_ylabel("mean (Å)")
    for name, words, colour, line in (
        ("elements_final", "elements final, atoms", COLOURS[0], "-"),
        ("all_elements_final", "elements final, molecules", COLOURS[0], ":"),
        ("bonds_final", "bonds final, atoms", COLOURS[1], "-"),
        ("all_bonds_final", "bonds final, molecules", COLOURS[1], ":"),
        ("valid_bonds", "usual number of bonds", COLOURS[2], "-"),
    ):
        shares.plot(
            one.levels, 100 * one.mean[name], color=colour, linewidth=1.7, linestyle=line,
            label=words,
        )  # fmt: skip
    shares.set_ylim(0, 103)
    shares.set_ylabel("share (%)")
    for axes in panels[:2]:
        _late_scale(axes, one.levels)
        axes.axvline(ELEMENTS_FINAL, color=FAINT, linewidth=1.0, linestyle=DASHED)
    lengths.legend(frameon=False, fontsize=8, loc="lower left")
    lengths.annotate(
        f"published:\nelements final\nfrom n ≈ {ELEMENTS_FINAL}", (ELEMENTS_FINAL, 1.0),
        xycoords=("data", "axes fraction"), xytext=(-4, -2), textcoords="offset points",
        fontsize=8, color=FAINT, ha="right", va="top",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
    )  # fmt: skip
    figure.legend(
        *shares.get_legend_handles_labels(), loc="outside lower center", frameon=False,
        fontsize=8, ncols=5,
    )  # fmt: skip
    caption = (
        f"{plural(one.molecules, 'molecule')} made from noise ({one.stage}, {one.model}), by "
        "diffusion step (the late ones drawn wider): mean step length, and bond lengths of the "
        "final bonds against their final values; share of atoms and of molecules that have their "
        f"final elements and numbers of bonds. Published: all elements final from n ≈ "
        f"{ELEMENTS_FINAL} (dashed)."
    )
    if energetic:
        axes = panels[2]
        there = np.isfinite(one.energy)
        axes.plot(
            one.levels[there], one.energy[there], color=COLOURS[0], linewidth=1.7, label="diffusion"
        )
        straight = np.isfinite(one.line)
        if straight.any():
            axes.plot(
                one.levels[straight], one.line[straight], color=COLOURS[1], linewidth=1.7,
                linestyle=":", label="straight line",
            )  # fmt: skip
        axes.legend(frameon=False, fontsize=8)
        _count_down(axes, one.levels[there])
        axes.set_ylabel("energy above last frame (kcal/mol)")
        caption += (
            f" Right: mean energy ({one.level_of_theory}) of the frames with final elements above "
            f"the last one's, {plural(one.with_energy, 'molecule')}; published: it falls fairly "
            "steadily."
        )
    return Picture(svg(figure), caption, f"Convergence of generation, {one.stage}")


def section(found: Diffusion) -> dict[str, Any]:
    """Return what the page's section on diffusion shows; everything empty where there is none."""
    comparison = found.comparison
    wide = [energy_figure(found)]
    pairs: list[Picture] = []
    tables: list[tuple[Sequence[str], list[list[str]]]] = []
    note = ""
    if comparison:
        study, arms = comparison.published, comparison.arms
        wide.insert(0, scatter_figure(comparison, _telling(comparison)))
        pairs = training_figures(comparison)
        tables = [
            (
                STEP_COLUMNS,
                [_step_row(comparison, arm) for arm in arms],
            ),
            (ENERGY_COLUMNS, [_energy_row(arm) for arm in arms]),
        ]
        changed = sum(int(arm.changed.sum()) for arm in arms)
        note = (
            f"Relaxations at {comparison.level} against those of stage {comparison.baseline}, pair "
            "by pair from the same MMFF geometry. Those start "
            f"{_energy(comparison.own.mean.value)} kcal/mol above their minimum in the mean; "
            f"published ({study.where}): {number(study.mmff, 1)} for MMFF and "
            f"{number(study.diffused, 1)} after diffusion. Same basin: relaxed energies within "
            f"{SAME_BASIN} kcal/mol. CPU time counts the diffusion's own."
        )
        if changed:
            note += f" Left out: {plural(changed, 'pair')} with changed bonds."
    wide += [alignment_figure(one) for one in found.alignments[:_FIGURES]]
    wide += [generation_figure(one) for one in found.generations[:_FIGURES]]
    title = ""
    if tables or any(wide):
        diffused = comparison is None or comparison.best() is not None
        if not (tables or found.energies or found.alignments):
            title = "Molecules from noise"
        else:
            title = "What diffusion saves" if diffused else "What another start or optimiser saves"
    return {
        "wide": [picture for picture in wide if picture],
        "pairs": pairs,
        "tables": tables,
        "details": [],
        "words": _WORDS,
        "note": note,
        "title": title,
    }


def _telling(comparison: Comparison) -> list[Arm]:
    """Return the few arms to draw: the best ones, each kind first, in the campaign's order."""
    early = [point.arm for series in comparison.series for point in series.points[:-1]]
    left = [arm for arm in comparison.arms if arm.all.pairs and arm not in early]
    left.sort(key=lambda arm: (not arm.diffused, -arm.all.reduction.value))
    firsts: list[Arm] = []
    kinds = set()
    for arm in left:
        kind = (arm.model, arm.protocol, arm.optimizer)
        if kind not in kinds:
            kinds.add(kind)
            firsts.append(arm)
    chosen = [*firsts, *(arm for arm in left if arm not in firsts)][:_PANELS]
    return [arm for arm in comparison.arms if arm in chosen]
