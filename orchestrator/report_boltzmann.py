"""What the report says about chains: findings, tables, and figures of energies and dihedrals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from kernels.units import EV_TO_KCAL
from orchestrator.boltzmann import (
    HARMONIC_BELOW,
    Boltzmann,
    Level,
    Map,
    Match,
    analyse,
    capacity,
    deviations,
    exchange_of,
    levels,
)
from orchestrator.boltzmann_tables import (
    matched_pairs,
    overlaps,
    settled_line,
    torsion_deviation,
    trips_line,
)
from orchestrator.bootstrap import Estimate
from orchestrator.drawing import (
    COLOURS,
    DASHED,
    FAINT,
    INK,
    Picture,
    count,
    new_figure,
    new_panels,
    number,
    plain_axes,
    plural,
    svg,
)
from orchestrator.errors import StoreError
from orchestrator.ladders import (
    EXCHANGE,
    GUIDED,
    Chain,
    Ladder,
    LadderName,
    Rung,
    Subject,
    angles_of,
    rung_of,
)
from orchestrator.published import MATCHED, MU
from orchestrator.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

_PANELS: Final = 10
_ACROSS: Final = 5
_LINES: Final = 4
_DIHEDRALS: Final = 6
_SAMPLES: Final = 1500
_POINTS: Final = 800
# Panels share an axis of energies where the highest are within this factor.
_ALIKE: Final = 3.0
_AT_T, _AT_N = COLOURS[0], COLOURS[1]
_ANGLES: Final = np.linspace(-180.0, 180.0, 73)


def gather(store: Store, order: Sequence[str] = ()) -> Boltzmann | None:
    """Analyse the chains of a store; None where it has none."""
    try:
        return analyse(store, order=order)
    except StoreError:
        return None


# --- in words ---------------------------------------------------------------------------------


def _within(found: Estimate, digits: int) -> str:
    if not found.known:
        return ""
    return f"95 % CI {number(found.low, digits)} to {number(found.high, digits)}"


def sentences(found: Boltzmann | None) -> list[str]:
    """Return what to say at the top of the report about chains, five sentences at most."""
    if found is None:
        return []
    said = [_map_sentence(one) for one in found.maps[:1]]
    said += [_check_sentence(found), *_pace_sentences(found), _unsettled_sentence(found)]
    if not any(said):
        ladders = [ladder for subject in found.subjects for ladder in subject.ladders.values()]
        chains = sum(len(rung.chains) for ladder in ladders for rung in ladder.rungs)
        chains += sum(len(subject.gaussian) for subject in found.subjects)
        said = [
            f"The store has {plural(chains, 'chain')} of {plural(len(found.subjects), 'molecule')}."
        ]
    return [sentence for sentence in said if sentence]


def _map_sentence(one: Map) -> str:
    if not one.kept or not np.isfinite(one.mu.value):
        out = [f"{m.subject.name}: {m.discarded}" for m in one.matches if m.discarded]
        example = f", as {out[0]}" if out else ""
        return (
            f"No diffusion step of {one.diffusion.model} can be given a temperature: "
            f"{plural(len(out), 'molecule')} of {count(len(one.matches))} discarded{example}."
        )
    left = len(one.matches) - len(one.kept)
    details = ", ".join(
        filter(
            None,
            [
                _within(one.mu, 3),
                plural(len(one.kept), "molecule"),
                f"{count(left)} discarded" if left else "",
                f"the published pairs give {number(MU, 2)}",
            ],
        )
    )
    fits = _explained(one)
    return (
        f"Repeating diffusion step n of {one.diffusion.model} samples energies like T = "
        f"{number(one.mu.value, 3)} n² K ({details}); {fits}."
    )


def _explained(one: Map) -> str:
    """Return how well lines in T and in n² go through the mean energies."""
    thermal = [m.subject.ladders[one.thermal].fit for m in one.kept]
    steps = [m.subject.ladders[one.diffusion].fit for m in one.kept]
    in_t = [fit.r_squared for fit in thermal if fit and np.isfinite(fit.r_squared)]
    in_n = [fit.r_squared for fit in steps if fit and np.isfinite(fit.r_squared)]
    if not in_t or not in_n:
        return "there are too few rungs to tell how straight the lines in T and n² are"
    return (
        f"mean energies are linear in T (R² {number(float(np.median(in_t)), 3)} in the median) and "
        f"quadratic in n ({number(float(np.median(in_n)), 3)})"
    )


def _check_sentence(found: Boltzmann) -> str:
    name = found.thermal
    cold = (
        [r for r in levels(found, name) if r.molecules and r.value < HARMONIC_BELOW] if name else []
    )
    if name is None or not cold:
        return ""
    cases = sum(row.molecules for row in cold)
    near = round(sum(row.within * row.molecules for row in cold if np.isfinite(row.within)))
    off = 100 * (float(np.mean([row.ratio.value for row in cold])) - 1.0)
    where = f"{number(abs(off))} % {'above' if off > 0 else 'below'} it on average"
    ladders = [(s, ladder.fit) for s, ladder in found.of(name) if ladder.fit]
    said = (
        f"Below {HARMONIC_BELOW:g} K the mean energy of {count(near)} of {plural(cases, 'chain')} "
        f"is within three standard errors of (3N − 6)/2 k_B T, {where}"
    )
    if ladders:
        slope = np.median([fit.slope / s.harmonic for s, fit in ladders])
        said += (
            f"; over all temperatures the heat capacity is {number(float(slope), 2)} times that of "
            "harmonic vibrations in the median"
        )
    return f"{said}."


def _unsettled_sentence(found: Boltzmann) -> str:
    """Return a warning where most chains of the ladders to speak of have not settled."""
    lines = []
    for name in (found.thermal, found.diffusion):
        rows = levels(found, name) if name else []
        if 2 * sum(row.unsettled for row in rows) > sum(row.molecules for row in rows):
            lines += [settled_line(found, name)] if name else []
    if not lines:
        return ""
    words = "; ".join(lines).replace("R-hat", "R‑hat")
    return f"The chains are too short for these numbers: {words}."


def _pace_sentences(found: Boltzmann) -> list[str]:
    words = {GUIDED: "Diffusion moves inside Metropolis give", EXCHANGE: "Replica exchange gives"}
    said = []
    for kind, begin in words.items():
        pace = next((p for p in found.paces if p.name.kind == kind), None)
        if pace is None:
            continue
        molecules = plural(pace.molecules, "molecule")
        details = ", ".join(filter(None, [_within(pace.energy, 2), molecules]))
        torsion = ""
        if np.isfinite(pace.torsion.value):
            torsion = f", and {number(pace.torsion.value, 2)} times for the slowest dihedral"
        said.append(
            f"{begin} {number(pace.energy.value, 2)} times the effective samples per energy "
            f"evaluation of plain Metropolis for the energy ({details}){torsion}."
        )
    return said


# --- figures ----------------------------------------------------------------------------------


def _shown(found: Boltzmann) -> list[Subject]:
    """Return the molecules in the order to draw them: those that count first."""
    out = _discarded(found)
    return [s for s in found.subjects if s not in out] + [s for s in found.subjects if s in out]


def _discarded(found: Boltzmann) -> set[Subject]:
    return {m.subject for one in found.maps[:1] for m in one.matches if m.discarded}


def _short(name: str, length: int = 22) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _grid(width: float, panel: float, many: int, across: int) -> tuple[Figure, list[Any]]:
    """Return a figure and its first ``many`` axes, ``across`` in a row, each row ``panel`` high."""
    from matplotlib.figure import Figure

    across = min(across, many)
    rows = -(-many // across)
    figure = Figure(figsize=(width, panel * rows + 0.25), layout="constrained")
    panels = list(figure.subplots(rows, across, squeeze=False).flat)
    for axes in panels[:many]:
        plain_axes(axes)
    for axes in panels[many:]:
        axes.set_visible(False)
    return figure, panels[:many]


def _violin(axes: Any, samples: Floats, at: float, colour: str, side: str) -> None:
    few = samples[:: max(1, -(-len(samples) // _SAMPLES))]
    if np.ptp(few) > 1e-9:
        drawn = axes.violinplot(few, [at], widths=0.86, side=side, showextrema=False, points=80)
        for body in drawn["bodies"]:
            body.set(facecolor=colour, edgecolor=colour, alpha=0.55, linewidth=0.8)
    reach = {"low": (-0.3, 0.0), "high": (0.0, 0.3), "both": (-0.3, 0.3)}[side]
    mean = float(samples.mean())
    axes.plot([at + reach[0], at + reach[1]], [mean, mean], color=colour, linewidth=1.6)


def violin_figure(found: Boltzmann) -> Picture | None:
    """Draw the distributions of the energy at matched temperatures and diffusion steps."""
    names = found.thermal, found.diffusion
    pairs = matched_pairs(found, *names)
    subjects = []
    for subject in _shown(found):
        rungs = [
            rung_of(subject.ladders[name], value)
            for pair in pairs
            for name, value in zip(names, pair, strict=True)
            if name in subject.ladders and np.isfinite(value)
        ]
        if any(rung and len(rung.samples) for rung in rungs):
            subjects.append(subject)
    if not subjects:
        return None
    drawn = subjects[:_PANELS]
    figure, panels = _grid(9.4, 2.35 if len(drawn) > 2 else 2.9, len(drawn), _ACROSS)
    out = _discarded(found)
    both = all(np.isfinite(pair).all() for pair in pairs)
    for place, (axes, subject) in enumerate(zip(panels, drawn, strict=True)):
        for at, pair in enumerate(pairs):
            for name, value, colour, side in zip(
                names, pair, (_AT_T, _AT_N), ("low", "high"), strict=True
            ):
                ladder = subject.ladders.get(name) if name else None
                rung = rung_of(ladder, value) if ladder else None
                if rung and len(rung.samples):
                    _violin(axes, rung.samples, at, colour, side if both else "both")
        axes.set_xticks(range(len(pairs)), [_pair_label(pair) for pair in pairs], fontsize=8)
        axes.set_xlim(-0.6, len(pairs) - 0.4)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        left_out = "\n(discarded)" if subject in out else ""
        axes.set_title(f"{_short(subject.name)}{left_out}", fontsize=8.5, color=INK)
        if place % _ACROSS == 0:
            axes.set_ylabel("energy (kcal/mol)")
        axes.set_xlabel(_pair_words(pairs[0]), fontsize=8)
    if both:
        from matplotlib.patches import Patch

        handles = [
            Patch(color=_AT_T, alpha=0.55, label=f"at T ({names[0].kind})" if names[0] else ""),
            Patch(color=_AT_N, alpha=0.55, label=f"at n ({names[1].model})" if names[1] else ""),
        ]
        figure.legend(
            handles=handles, loc="outside upper right", frameon=False, fontsize=8.5, ncols=2
        )
    caption = (
        "Energies visited, above the lowest that the coldest chain (or that of the lowest n) "
        "visited; lines are means."
    )
    if both:
        near = all(pair in [(t, float(n)) for t, n in MATCHED] for pair in pairs)
        caption += " The pairs of T and n are " + (
            "those published." if near else "the rungs nearest to the published pairs."
        )
    if len(subjects) > len(drawn):
        caption += f" {count(len(drawn))} of {plural(len(subjects), 'molecule')} drawn."
    return Picture(svg(figure), caption, "Energy distributions at matched pairs")


def _pair_label(pair: tuple[float, float]) -> str:
    return "\n".join(f"{value:g}" for value in pair if np.isfinite(value))


def _pair_words(pair: tuple[float, float]) -> str:
    """Return what the lines of a pair's label are."""
    words = [word for word, value in zip(("T (K)", "n"), pair, strict=True) if np.isfinite(value)]
    return ", ".join(words)


def ladder_figure(found: Boltzmann) -> Picture | None:
    """Draw mean energy and its spread against temperature and against the diffusion step."""
    wanted = [
        (name, label)
        for name, label in (
            (found.thermal, "temperature (K)"),
            (found.diffusion, "diffusion step n"),
        )
        if name and any(r.found.samples for _, ladder in found.of(name) for r in ladder.rungs)
    ]
    if not wanted:
        return None
    tops = [
        max(r.found.mean for _, x in found.of(name) for r in x.rungs if r.found.samples)
        for name, _ in wanted
    ]
    share = max(tops) < _ALIKE * min(tops)
    figure, panels = new_panels(9.4, 3.2, max(len(wanted), 2), share=share)
    for axes in panels[len(wanted) :]:
        axes.set_visible(False)
    out = _discarded(found)
    most = 0
    for axes, (name, label) in zip(panels, wanted, strict=False):
        rows = [(s, x) for s, x in found.of(name) if s not in out] or found.of(name)
        most = max(most, len(rows))
        few = len(rows) <= _LINES
        for colour, (subject, ladder) in zip(COLOURS * 9, rows, strict=False):
            x, y, sd = (ladder.column(c) for c in ("value", "mean", "deviation"))
            if few:
                axes.fill_between(x, y - sd, y + sd, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                x, y, color=colour if few else FAINT, linewidth=1.5 if few else 0.7,
                marker="o" if few else "", markersize=3, alpha=1.0 if few else 0.7,
                label=_short(subject.name, 26) if few else None,
            )  # fmt: skip
            if few:
                _draw_fit(axes, [ladder], x, name.thermal, colour)
        if not few:
            x, mean, sd = _average([ladder for _, ladder in rows])
            axes.fill_between(x, mean - sd, mean + sd, color=COLOURS[0], alpha=0.15, linewidth=0)
            axes.plot(
                x, mean, color=COLOURS[0], linewidth=1.9, marker="o", markersize=3.5,
                label="mean over molecules",
            )  # fmt: skip
            _draw_fit(axes, [ladder for _, ladder in rows], x, name.thermal, INK)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    for axes in panels[: 1 if share else None]:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_ylabel("energy (kcal/mol)")
    panels[0].legend(frameon=False, fontsize=8.5, loc="upper left")
    caption = (
        f"Mean energy above the shared minimum (line) and one standard deviation (shade) of "
        f"{plural(most, 'molecule')}; dashed: the fit, "
        + " and ".join("linear in T" if name.thermal else "linear in n²" for name, _ in wanted)
        + "."
    )
    if most > _LINES:
        caption += " Thin lines are the molecules."
    return Picture(svg(figure), caption, "Energy against temperature and diffusion step")


def _draw_fit(axes: Any, ladders: Sequence[Ladder], x: Floats, thermal: bool, colour: str) -> None:
    fits = [ladder.fit for ladder in ladders if ladder.fit]
    if fits and len(x):
        fine = np.linspace(0.0, float(x.max()), 80)
        lines = [fit.at(fine if thermal else fine**2) for fit in fits]
        axes.plot(fine, np.mean(lines, axis=0), color=colour, linewidth=1.0, linestyle=DASHED)


def _average(ladders: Sequence[Ladder]) -> tuple[Floats, Floats, Floats]:
    """Return the rungs (R,) that most molecules have, the mean energy and the mean spread."""
    rows: dict[float, list[Rung]] = {}
    for ladder in ladders:
        for rung in ladder.rungs:
            if rung.found.samples:
                rows.setdefault(rung.value, []).append(rung)
    full = max((len(some) for some in rows.values()), default=0)
    kept = sorted(value for value, some in rows.items() if len(some) == full)
    return (
        np.array(kept),
        np.array([np.mean([r.found.mean for r in rows[v]]) for v in kept]),
        np.array([np.mean([r.found.deviation for r in rows[v]]) for v in kept]),
    )


def map_figure(one: Map) -> Picture | None:
    """Draw the temperature of each diffusion step, on an axis where T = mu n² is straight."""
    if not one.kept or not np.isfinite(one.mu.value) or one.mu.value <= 0:
        return None
    figure, axes = new_figure(4.6, 3.3)
    rng = np.random.default_rng(0)
    width = 0.006 * max(one.ns)
    for match in one.kept:
        axes.plot(
            match.ns + width * rng.standard_normal(len(match.ns)), match.temperatures, ".",
            color=FAINT, markersize=4, alpha=0.6, zorder=2,
        )  # fmt: skip
    ns = np.array(one.ns, float)
    value = np.array([t.value for t in one.temperatures])
    bars = np.nan_to_num([[t.value - t.low, t.high - t.value] for t in one.temperatures], nan=0.0).T
    fine = np.linspace(0.0, 1.04 * float(ns.max()), 60)
    if one.mu.known:
        axes.fill_between(
            fine, one.mu.low * fine**2, one.mu.high * fine**2, color=COLOURS[0], alpha=0.2, lw=0
        )
    axes.plot(
        fine, one.mu.value * fine**2, color=COLOURS[0], linewidth=1.6,
        label=f"T = {number(one.mu.value, 3)} n² K",
    )  # fmt: skip
    axes.errorbar(
        ns, value, np.maximum(bars, 0.0), fmt="o", color=COLOURS[0], markersize=4, elinewidth=1.0,
        capsize=2, label="mean over molecules", zorder=3,
    )  # fmt: skip
    near = [(t, n) for t, n in MATCHED if n <= fine.max()]
    if near:
        axes.plot(
            [n for _, n in near], [t for t, _ in near], "x", color=COLOURS[4], markersize=7,
            markeredgewidth=1.6, label="published pairs", zorder=4,
        )  # fmt: skip
    top = 1.12 * max(float(np.nanmax(value)), one.mu.value * float(ns.max()) ** 2)
    axes.set_yscale(
        "function", functions=(lambda t: np.sqrt(np.maximum(t, 0.0)), lambda root: root**2)
    )
    axes.set_ylim(0.0, top)
    ticks = [t for t in (0, 10, 50, 100, 200, 300, 500, 750, 1000, 1500, 2000, 3000) if t <= top]
    axes.set_yticks(ticks if len(ticks) > 2 else np.linspace(0, top, 4).round(1).tolist())
    axes.set_xlim(0.0, float(fine.max()))
    axes.set_xlabel("diffusion step n")
    axes.set_ylabel("temperature (K), square-root scale")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    caption = (
        "The temperature whose mean energy a diffusion step has, intercepts of both fits taken "
        f"off: {plural(len(one.kept), 'molecule')} (grey) and their mean"
        + (" with 95 % intervals" if one.mu.known else "")
        + "; line: one factor for all molecules"
        + (", shaded its 95 % interval." if one.mu.known else ".")
    )
    return Picture(svg(figure), caption, "Temperature of a diffusion step")


def _against_temperature(axes: Any, rows: Sequence[Level]) -> None:
    axes.set_xscale("log")
    values = [row.value for row in rows]
    ticks = [t for t in (5, 10, 20, 50, 100, 200, 400, 800) if min(values) <= t <= max(values)]
    axes.set_xticks(ticks or values, [f"{t:g}" for t in ticks or values])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("temperature (K)")


def _over_molecules(
    axes: Any,
    found: Boltzmann,
    name: LadderName,
    rows: Sequence[Level],
    pick: Callable[[Subject, Rung], tuple[float, float]],
    pooled: Callable[[Level], Estimate],
) -> None:
    """Draw every molecule's number and standard error, and the mean with its interval as a line."""
    ladders = found.of(name)
    for at, (subject, ladder) in enumerate(ladders):
        some = [r for r in ladder.rungs if r.found.samples]
        # Beside each other, so that error bars can be told apart.
        aside = 1.0 + 0.06 * ((at + 0.5) / len(ladders) - 0.5)
        values = np.array([pick(subject, r) for r in some]).reshape(-1, 2)
        axes.errorbar(
            [aside * r.value for r in some], values[:, 0], np.nan_to_num(values[:, 1]), fmt=".",
            color=FAINT, markersize=4, alpha=0.6, elinewidth=0.8,
        )  # fmt: skip
    x = np.array([row.value for row in rows])
    means = [pooled(row) for row in rows]
    if all(one.known for one in means):
        axes.fill_between(
            x, [one.low for one in means], [one.high for one in means], color=COLOURS[0],
            alpha=0.2, linewidth=0,
        )  # fmt: skip
    axes.plot(x, [one.value for one in means], color=COLOURS[0], linewidth=1.7, marker="o", ms=3.5)
    axes.axhline(1.0, color=INK, linewidth=0.9, linestyle=DASHED)
    _against_temperature(axes, rows)
    low, high = axes.get_ylim()
    axes.set_ylim(max(min(low, 0.9), -1.0), min(max(high, 1.1), 4.0))


def _capacity(subject: Subject, rung: Rung) -> tuple[float, float]:
    """Return the heat capacity over the harmonic one, and its standard error."""
    value = capacity(subject, rung)
    known = rung.found.variance > 0
    return value, value * rung.found.variance_error / rung.found.variance if known else np.nan


def harmonic_figures(found: Boltzmann) -> list[Picture]:
    """Draw energy and heat capacity over those of harmonic vibrations, against temperature."""
    name = found.thermal
    rows = [row for row in levels(found, name) if row.molecules] if name else []
    if name is None or not rows:
        return []
    figure, axes = new_figure(4.6, 3.0)
    _over_molecules(axes, found, name, rows, deviations, lambda row: row.ratio)
    axes.set_ylabel("mean energy / ((3N − 6)/2 k$_B$T)")
    known = " with its 95 % interval" if rows[0].ratio.known else ""
    energy = Picture(
        svg(figure),
        f"Mean energy above the minimum that chains started from ({name.stage}) over that of "
        f"harmonic vibrations: molecules (grey, with standard errors) and their mean{known}. Near "
        "a minimum it is 1.",
        "Mean energy over that of harmonic vibrations",
    )
    figure, axes = new_figure(4.6, 3.0)
    _over_molecules(axes, found, name, rows, _capacity, lambda row: row.capacity)
    slopes = [ladder.fit.slope / s.harmonic for s, ladder in found.of(name) if ladder.fit]
    caption = (
        "Heat capacity from the variance of the energy, over (3N − 6)/2 k_B: molecules (grey, "
        "with standard errors) and their mean."
    )
    if slopes:
        slope = float(np.mean(slopes))
        axes.axhline(slope, color=COLOURS[1], linewidth=1.4, label=f"from the slope, {slope:.2f}")
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
        caption += " Orange: the mean slope of energy against temperature."
    axes.set_ylabel("heat capacity / ((3N − 6)/2 k$_B$)")
    return [energy, Picture(svg(figure), caption, "Heat capacity over the harmonic one")]


def sampling_figures(found: Boltzmann) -> list[Picture]:
    """Draw how fast chains forget, what an energy evaluation buys, and what was accepted."""
    names = [n for n in found.ladders if n.thermal]
    rows = {n: [row for row in levels(found, n) if row.molecules] for n in names}
    names = [n for n in names if rows[n]]
    if not names:
        return []
    pictures = []
    figure, axes = new_figure(4.6, 3.0)
    for colour, name in zip(COLOURS * 9, names, strict=False):
        per = [_median_pace(found, name, row.value) for row in rows[name]]
        axes.plot(
            [row.value for row in rows[name]], per, color=colour, marker="o", markersize=3.5,
            linewidth=1.6, label=_stage_label(name, names),
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=8)
    _against_temperature(axes, [row for n in names for row in rows[n]])
    axes.set_ylabel("effective samples\nper 1,000 energy evaluations")
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8.5)
    pictures.append(
        Picture(
            svg(figure),
            "Effective samples of the energy that 1,000 energy evaluations after the burn-in buy, "
            "medians over molecules.",
            "Effective samples per energy evaluation",
        )
    )
    figure, axes = new_figure(4.6, 3.0)
    swaps = False
    for colour, name in zip(COLOURS * 9, names, strict=False):
        x = [row.value for row in rows[name]]
        axes.plot(
            x, [100 * row.acceptance for row in rows[name]], color=colour, marker="o",
            markersize=3.5, linewidth=1.6, label=_stage_label(name, names),
        )  # fmt: skip
        taken = np.array([100 * row.swap_acceptance for row in rows[name]])
        if np.isfinite(taken).any():
            swaps = True
            axes.plot(
                x, taken, color=colour, marker="s", markersize=3, linewidth=1.2, linestyle=":",
                label=f"swaps, {_stage_label(name, names)}",
            )  # fmt: skip
    axes.set_ylim(0, 104)
    _against_temperature(axes, [row for n in names for row in rows[n]])
    axes.set_ylabel("accepted (%)")
    if len(names) > 1 or swaps:
        axes.legend(frameon=False, fontsize=8.5)
    said = "Moves accepted after the burn-in, means over molecules"
    said += "; dotted: swaps with the next higher temperature." if swaps else "."
    pictures.append(Picture(svg(figure), said, "Acceptance"))
    return pictures


def _stage_label(name: LadderName, names: Sequence[LadderName]) -> str:
    """Return a ladder's stage, with its level where several ladders have the stage."""
    same = sum(other.stage == name.stage for other in names)
    return name.stage if same == 1 else f"{name.stage}, {name.level}"


def _median_pace(found: Boltzmann, name: LadderName, value: float) -> float:
    rungs = [rung_of(ladder, value) for _, ladder in found.of(name)]
    paces = [1000 * r.effective_per_evaluation for r in rungs if r]
    known = [pace for pace in paces if np.isfinite(pace) and pace > 0]
    return float(np.median(known)) if known else float("nan")


def dihedral_figure(found: Boltzmann) -> Picture | None:
    """Draw the distributions of the dihedrals that turn most, cold and hot, at T and at n."""
    names = found.thermal, found.diffusion
    pairs = matched_pairs(found, *names)
    if not pairs:
        return None
    chosen = [pairs[0], pairs[-1]] if len(pairs) > 1 else pairs
    lead = 0 if names[0] else 1
    name = names[lead]
    wide: list[tuple[float, Subject, int]] = []
    for subject in _shown(found):
        for at in range(len(subject.torsions)):
            spread = torsion_deviation(subject, name, chosen[-1][lead], at) if name else np.nan
            if np.isfinite(spread):
                wide.append((spread, subject, at))
    if not wide:
        return None
    # One of each molecule first, so that not a single one fills the figure.
    out = _discarded(found)
    wide.sort(key=lambda row: (row[1] in out, -row[0]))
    firsts = {row[1]: row for row in reversed(wide)}
    ranked = sorted(wide, key=lambda row: firsts[row[1]] is not row)
    drawn = ranked[:_DIHEDRALS]
    figure, panels = _grid(9.4, 2.1, len(drawn), 3)
    for place, (axes, (_, subject, at)) in enumerate(zip(panels, drawn, strict=True)):
        for shade, pair in enumerate(chosen):
            for which, ladder_name in enumerate(names):
                value = pair[which]
                if ladder_name not in subject.ladders or not np.isfinite(value):
                    continue
                rung = rung_of(subject.ladders[ladder_name], value)
                angles = angles_of(rung, len(subject.torsions))[at] if rung else np.zeros(0)
                if not len(angles):
                    continue
                share = 100 * np.histogram(angles, _ANGLES)[0] / len(angles)
                colour = COLOURS[0] if shade == 0 else COLOURS[4]
                label = f"{value:g} K" if which == 0 else f"n = {value:g}"
                if which == 0:
                    axes.stairs(share, _ANGLES, color=colour, alpha=0.3, fill=True, label=label)
                else:
                    axes.stairs(share, _ANGLES, color=colour, linewidth=1.3, label=label)
        axes.set_xlim(-180, 180)
        axes.set_xticks([-180, -90, 0, 90, 180])
        axes.set_ylim(bottom=0)
        axes.set_title(f"{_short(subject.name)}: {subject.torsions[at].name}", fontsize=8.5)
        if place % 3 == 0:
            axes.set_ylabel("frames (%)")
        if place >= len(drawn) - 3:
            axes.set_xlabel("dihedral angle (°)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper right", frameon=False, fontsize=8.5, ncols=len(labels)
    )
    caption = "Dihedral angles of the rotatable bonds that turn most, in bins of 5°"
    if names[0] and names[1]:
        caption += ": at a temperature (filled) and at the diffusion step paired with it (line)"
    if found.maps:
        shared = [value for pair in pairs for value in overlaps(found.maps[0], pair)]
        if shared:
            caption += (
                ". Over all pairs, molecules and dihedrals "
                f"{_percent(float(np.mean(shared)))} of the distributions is common"
            )
    return Picture(svg(figure), f"{caption}.", "Dihedral distributions")


def gaussian_figure(found: Boltzmann) -> Picture | None:
    """Draw the energy of chains without acceptance beside one at T and one at n."""
    subjects = [s for s in found.subjects if any(len(c.trace) > 1 for c in s.gaussian)]
    if not subjects:
        return None
    figure, axes = new_figure(4.6, 3.0)
    ended = total = 0
    for at, subject in enumerate(subjects):
        for chain in subject.gaussian:
            if len(chain.trace) < 2:
                continue
            total += 1
            ended += chain.diverged
            _trace(axes, chain, COLOURS[4], "accepting all" if at == 0 else None)
    beside = subjects[0]
    for name, colour in ((found.thermal, _AT_T), (found.diffusion, _AT_N)):
        rungs = beside.ladders[name].rungs if name in beside.ladders else ()
        chains = [c for rung in rungs for c in rung.good if len(c.trace) > 1]
        if chains and name:
            chain = chains[-1]
            label = f"{chain.temperature:g} K" if name.thermal else f"n = {chain.n}"
            _trace(axes, chain, colour, f"{name.kind}, {label}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(1e-2, axes.get_ylim()[0]))
    axes.xaxis.set_major_formatter(lambda value, _: count(round(value)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("energy above the start (kcal/mol)")
    axes.legend(frameon=False, fontsize=8.5)
    caption = (
        f"Gaussian moves that are all accepted (red) climb without end: {count(ended)} of "
        f"{plural(total, 'chain')} diverged and were stopped. Beside them chains of {beside.name}."
    )
    return Picture(svg(figure), caption, "Chains without acceptance")


def _trace(axes: Any, chain: Chain, colour: str, label: str | None) -> None:
    above = (chain.trace - chain.trace[0]) * EV_TO_KCAL
    steps = np.arange(len(above)) * chain.stride
    at = np.unique(np.geomspace(1, len(above) - 1, _POINTS).astype(int))
    axes.plot(steps[at], above[at], color=colour, linewidth=1.1, alpha=0.8, label=label)


# --- tables -----------------------------------------------------------------------------------


MOLECULE_COLUMNS: Final = (
    "molecule", "atoms", "heat capacity / harmonic", "R² in T", "R² in n²", "μ (K)",
    "rest, kcal/mol", "RMSD, Å", "counts",
)  # fmt: skip
STEP_COLUMNS: Final = (
    "n", "molecules", "mean energy, kcal/mol", "sd", "T, K (95\u00a0%\u00a0CI)", "μ n², K",
    "autocorrelation time, steps", "R‑hat", "diverged",
)  # fmt: skip
TEMPERATURE_COLUMNS: Final = (
    "T, K", "molecules", "mean energy, kcal/mol", "sd", "/ harmonic (95\u00a0%\u00a0CI)",
    "within 3 SE", "autocorrelation time, steps", "effective samples", "accepted", "R‑hat",
)  # fmt: skip
SWAP_COLUMNS: Final = ("T, K", "next, K", "ladders", "swaps tried", "accepted", "least")
WORDS: Final = ("molecule", "counts")


def _cell(value: float, digits: int) -> str:
    return number(value, digits) if np.isfinite(value) else ""


def _estimate(found: Estimate, digits: int) -> str:
    if not np.isfinite(found.value):
        return ""
    within = f" ({number(found.low, digits)} to {number(found.high, digits)})"
    return number(found.value, digits) + (within if found.known else "")


def _percent(value: float) -> str:
    return f"{number(100 * value, 0)} %" if np.isfinite(value) else ""


def _molecule_row(found: Boltzmann, subject: Subject, match: Match | None) -> list[str]:
    name = found.thermal
    ladder = subject.ladders.get(name) if name else None
    fit = ladder.fit if ladder else None
    steps = subject.ladders[found.maps[0].diffusion].fit if match else None
    slope = ""
    if fit:
        slope = (
            f"{number(fit.slope / subject.harmonic, 3)} ± "
            f"{number(fit.slope_error / subject.harmonic, 3)}"
        )
    return [
        _short(subject.name, 30),
        count(subject.n_atoms),
        slope,
        _cell(fit.r_squared, 3) if fit else "",
        _cell(steps.r_squared, 3) if steps else "",
        f"{number(match.mu, 3)} ± {number(match.mu_error, 3)}"
        if match and np.isfinite(match.mu)
        else "",
        _cell(match.rest, 2) if match else "",
        _cell(match.rmsd, 2) if match else "",
        ("yes" if not match.discarded else "no") if match else "",
    ]


def _step_row(row: Level, one: Map | None) -> list[str]:
    temperatures = dict(zip(one.ns, one.temperatures, strict=True)) if one else {}
    temperature = temperatures.get(int(row.value))
    return [
        f"{row.value:g}",
        count(row.molecules),
        _cell(row.mean.value, 2),
        _cell(row.deviation, 2),
        _estimate(temperature, 1) if temperature else "",
        _cell(one.temperature(row.value).value, 1) if one else "",
        _cell(row.time, 0),
        _cell(row.r_hat, 2),
        f"{count(row.diverged)} of {count(row.chains)}" if row.diverged else "",
    ]


def _temperature_row(row: Level) -> list[str]:
    return [
        f"{row.value:g}",
        count(row.molecules),
        _cell(row.above, 2),
        _cell(row.deviation, 2),
        _estimate(row.ratio, 3),
        _percent(row.within),
        _cell(row.time, 0),
        _cell(row.effective, 0),
        _percent(row.acceptance),
        _cell(row.r_hat, 2),
    ]


_Table = tuple[Sequence[str], list[list[str]]]


def _molecule_table(found: Boltzmann) -> list[_Table]:
    matches = {m.subject: m for one in found.maps[:1] for m in one.matches}
    if not found.thermal and not matches:
        return []
    rows = [_molecule_row(found, s, matches.get(s)) for s in found.subjects]
    return [_without_empty(MOLECULE_COLUMNS, rows)]


def _rung_tables(found: Boltzmann) -> list[_Table]:
    made: list[_Table] = []
    if found.thermal:
        rows = [_temperature_row(row) for row in levels(found, found.thermal)]
        made.append(_without_empty(TEMPERATURE_COLUMNS, rows))
    if found.diffusion:
        one = found.maps[0] if found.maps else None
        rows = [_step_row(row, one) for row in levels(found, found.diffusion)]
        made.append(_without_empty(STEP_COLUMNS, rows))
    for name in found.ladders:
        if swapped := exchange_of(found, name):
            made.append(
                _without_empty(
                    SWAP_COLUMNS,
                    [
                        [
                            f"{row.temperature:g}",
                            f"{row.next_temperature:g}",
                            count(row.ladders),
                            count(row.tried),
                            _percent(row.accepted),
                            _percent(row.least),
                        ]
                        for row in swapped[0]
                    ],
                )
            )
    return made


def _without_empty(columns: Sequence[str], rows: list[list[str]]) -> _Table:
    """Leave out the columns that say nothing about this campaign."""
    kept = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    return [columns[at] for at in kept], [[row[at] for at in kept] for row in rows]


def section(found: Boltzmann | None) -> dict[str, Any]:
    """Return what the page's section on chains shows; everything empty where there is none."""
    if found is None:
        return {
            "title": "", "note": "", "tables": [], "details": [], "words": (), "wide": [],
            "pairs": [],
        }  # fmt: skip
    maps = [map_figure(one) for one in found.maps[:1]]
    pairs = [*maps, *harmonic_figures(found), *sampling_figures(found), gaussian_figure(found)]
    wide = [violin_figure(found), ladder_figure(found), dihedral_figure(found)]
    return {
        "title": "What chains sampled",
        "note": _note(found),
        "tables": _molecule_table(found),
        "details": _rung_tables(found),
        "words": WORDS,
        "wide": [picture for picture in wide if picture],
        "pairs": [picture for picture in pairs if picture],
    }


def _note(found: Boltzmann) -> str:
    parts = []
    if found.thermal:
        name = found.thermal
        parts.append(
            f"Chains at temperatures: stage {name.stage} ({name.level}, {name.program}); energies "
            "over harmonic are means above the minimum that chains started from, over (3N − 6)/2 "
            "k_B T; standard errors are from autocorrelation times."
        )
    if found.diffusion:
        level = found.diffusion.level
        energies = f"energies at {level}" if level else "no energies yet"
        parts.append(
            f"Chains at diffusion steps: stage {found.diffusion.stage}, model "
            f"{found.diffusion.model}, {energies}."
        )
    for name in found.ladders:
        if swapped := exchange_of(found, name):
            parts.append(f"Stage {name.stage}: {trips_line(swapped[1])}.")
    for one in found.maps[:1]:
        parts.append(
            "Rest is how far the mean energy at the lowest n lies above the minimum, RMSD that of "
            "the mean geometries at the lowest n and the lowest T; a molecule counts where they "
            f"are at most {found.max_rest:g} kcal/mol and {found.max_rmsd:g} Å."
        )
        shared = one.mu_shared
        if np.isfinite(shared.value):
            within = _within(shared, 3)
            parts.append(
                "With the lowest energies of both ladders as their common zero and no other "
                f"constant, as published, μ is {number(shared.value, 3)} K"
                + (f" ({within})." if within else ".")
            )
        out = [f"{m.subject.name}: {m.discarded}" for m in one.matches if m.discarded]
        if out:
            parts.append(f"Discarded: {'; '.join(out)}.")
    unsettled = [line for line in (settled_line(found, n) for n in found.ladders) if line]
    if unsettled:
        parts.append(
            "R‑hat compares repeats, or the halves of a single chain: "
            f"{'; '.join(unsettled).replace('R-hat', 'R‑hat')}."
        )
    return " ".join(parts)
