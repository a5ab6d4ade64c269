"""What chains sampled as tables for a terminal, as plain values, and as a line per chain."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kernels.units import EV_TO_KCAL
from orchestrator.boltzmann import (
    HARMONIC_BELOW,
    Boltzmann,
    Level,
    Map,
    Match,
    Swaps,
    Trips,
    capacity,
    deviations,
    exchange_of,
    levels,
    matched,
    torsion_overlap,
)
from orchestrator.bootstrap import Estimate
from orchestrator.chain_statistics import UNSETTLED
from orchestrator.csv_file import write_csv
from orchestrator.ladders import (
    GAUSSIAN,
    Chain,
    LadderName,
    Rung,
    Subject,
    angles_of,
    rung_of,
    single_rung,
)
from orchestrator.published import MATCHED, MU
from orchestrator.torsions import circular_deviation

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_NAME: Final = 28
_TORSIONS: Final = 24


def number(value: float, digits: int = 1) -> str:
    """Return a number; `-` where there is none."""
    return f"{value:,.{digits}f}" if np.isfinite(value) else "-"


def interval(found: Estimate, digits: int) -> str:
    """Return the 95 % interval as `a to b`; `-` where there were too few molecules."""
    if not found.known:
        return "-"
    return f"{number(found.low, digits)} to {number(found.high, digits)}"


def with_interval(found: Estimate, digits: int) -> str:
    """Return an estimate and, where it has one, its interval in brackets."""
    within = f" ({interval(found, digits)})" if found.known else ""
    return f"{number(found.value, digits)}{within}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if np.isfinite(value) else "-"


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _table(*columns: str, words: int = 1) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for at, name in enumerate(columns):
        table.add_column(name, justify="right" if at >= words else "left", no_wrap=True)
    return table


def title(name: LadderName) -> str:
    """Return what a ladder is, in words."""
    parts = [
        name.kind,
        *([name.model] if name.model else []),
        *([name.level] if name.level else []),
    ]
    return f"{name.stage}: {', '.join(parts)}"


# --- tables -----------------------------------------------------------------------------------


def _thermal_table(rows: list[Level]) -> RenderableType:
    swaps = any(np.isfinite(row.swap_acceptance) for row in rows)
    columns = [
        "T (K)", "molecules", "mean", "sd", "E / harmonic", "95 % CI", "in 3 SE", "C / harmonic",
        "acf time", "ESS", "accepted",
    ]  # fmt: skip
    columns += ["swaps"] if swaps else []
    table = _table(*columns, "R-hat", words=0)
    for row in rows:
        cells = [
            f"{row.value:g}",
            f"{row.molecules}",
            number(row.above, 3),
            number(row.deviation, 3),
            number(row.ratio.value, 3),
            interval(row.ratio, 3),
            _percent(row.within),
            number(row.capacity.value, 2),
            number(row.time, 0),
            number(row.effective, 0),
            _percent(row.acceptance),
        ]
        cells += [_percent(row.swap_acceptance)] if swaps else []
        table.add_row(*cells, number(row.r_hat, 3))
    return table


def _swaps_table(rows: list[Swaps]) -> RenderableType:
    table = _table("T (K)", "next", "ladders", "tried", "accepted", "least", words=0)
    for row in rows:
        table.add_row(
            f"{row.temperature:g}", f"{row.next_temperature:g}", f"{row.ladders}",
            f"{row.tried:,}", _percent(row.accepted), _percent(row.least),
        )  # fmt: skip
    return table


def trips_line(trips: Trips) -> str:
    """Return in one line how walkers got about, and how much of the processes' time counted."""
    fewest, most = trips.processes
    processes = f"{most}" if fewest == most else f"{fewest} to {most}"
    share = f"{100 * trips.efficiency:.1f} %"
    where = f"{_count(trips.walkers, 'walker')} in {_count(trips.ladders, 'ladder')}"
    without = f" (none in {trips.none})" if trips.none else ""
    return (
        f"{_count(trips.round_trips, 'round trip')} from the lowest temperature to the highest and "
        f"back, of {where}{without}, {trips.steps:,} steps each; {processes} "
        f"process{'' if most == 1 else 'es'} a ladder, {share} of their time in energies"
    )


def _diffusion_table(rows: list[Level], found: Map | None) -> RenderableType:
    columns = ["n", "molecules", "mean", "sd", "T (K)", "95 % CI", "mu n² (K)", "acf time", "ESS"]
    table = _table(*columns, "R-hat", "diverged", words=0)
    temperatures = dict(zip(found.ns, found.temperatures, strict=True)) if found else {}
    nowhere = Estimate(np.nan, np.nan, np.nan)
    for row in rows:
        temperature = temperatures.get(int(row.value), nowhere)
        cells = [
            f"{row.value:g}",
            f"{row.molecules}",
            number(row.mean.value, 3),
            number(row.deviation, 3),
            number(temperature.value),
            interval(temperature, 1),
            number(found.temperature(row.value).value if found else np.nan),
            number(row.time, 0),
            number(row.effective, 0),
        ]
        cells.append(number(row.r_hat, 3))
        table.add_row(*cells, f"{row.diverged} of {row.chains}" if row.diverged else "")
    return table


def _fit_cells(subject: Subject, thermal: LadderName | None) -> list[str]:
    """Return the heat capacity from the slope, over the harmonic one, and the line's R²."""
    fit = subject.ladders[thermal].fit if thermal in subject.ladders else None
    if fit is None:
        return ["-", "-", "-"]
    ratio, error = fit.slope / subject.harmonic, fit.slope_error / subject.harmonic
    return [
        number(1000 * fit.slope, 1), f"{number(ratio, 3)} ± {number(error, 3)}",
        number(fit.r_squared, 4),
    ]  # fmt: skip


def _molecules_table(found: Boltzmann, one: Map | None) -> RenderableType:
    columns = ["molecule", "atoms", "C (cal/mol/K)", "C / harmonic", "R² in T"]
    if one:
        columns += ["R² in n²", "in n", "mu (K)", "rest", "RMSD (Å)"]
    table = _table(*columns)
    matches = {match.subject: match for match in one.matches} if one else {}
    for subject in found.subjects:
        cells = [_short(subject.name), f"{subject.n_atoms}", *_fit_cells(subject, found.thermal)]
        match = matches.get(subject)
        if match and one:
            ladder = subject.ladders[one.diffusion]
            cells += [
                number(ladder.fit.r_squared if ladder.fit else np.nan, 4),
                number(ladder.linear.r_squared if ladder.linear else np.nan, 4),
                "discarded" if match.discarded
                else f"{number(match.mu, 3)} ± {number(match.mu_error, 3)}",
                number(match.rest, 2),
                number(match.rmsd, 2),
            ]  # fmt: skip
        table.add_row(*cells)
    return table


def _matched_table(found: Boltzmann, one: Map) -> RenderableType:
    table = _table("T (K)", "n", "molecules", "at T", "at n", "sd ratio", "dihedrals", words=0)
    for pair in matched_pairs(found, one.thermal, one.diffusion):
        rungs = _both(one, pair)
        means = np.array([[r.found.mean for r in both] for both in rungs]).reshape(-1, 2)
        deviations = np.array([[r.found.deviation for r in both] for both in rungs]).reshape(-1, 2)
        alike = overlaps(one, pair)
        table.add_row(
            f"{pair[0]:g}",
            f"{pair[1]:g}",
            f"{len(rungs)}",
            number(float(means[:, 0].mean()) if len(rungs) else np.nan, 3),
            number(float(means[:, 1].mean()) if len(rungs) else np.nan, 3),
            number(
                float((deviations[:, 1] / deviations[:, 0]).mean()) if len(rungs) else np.nan, 2
            ),
            _percent(float(np.mean(alike)) if len(alike) else np.nan),
        )
    return table


def matched_pairs(
    found: Boltzmann, thermal: LadderName | None, diffusion: LadderName | None
) -> list[tuple[float, float]]:
    """Return the pairs (T, n) of two ladders that are to be compared."""
    rungs = [
        [r.value for _, ladder in found.of(name) for r in ladder.rungs if r.found.samples]
        if name
        else []
        for name in (thermal, diffusion)
    ]
    return matched(*rungs)


def _both(one: Map, pair: tuple[float, float]) -> list[tuple[Rung, Rung]]:
    """Return the rungs at T and at n of the molecules that count and have both."""
    found = []
    for match in one.kept:
        ladders = match.subject.ladders
        rungs = rung_of(ladders[one.thermal], pair[0]), rung_of(ladders[one.diffusion], pair[1])
        if rungs[0] and rungs[1] and rungs[0].found.samples and rungs[1].found.samples:
            found.append((rungs[0], rungs[1]))
    return found


def overlaps(one: Map, pair: tuple[float, float]) -> list[float]:
    """Return the common share of the distributions at T and n of every dihedral that counts."""
    shares = [
        torsion_overlap(match.subject, one.thermal, one.diffusion, pair) for match in one.kept
    ]
    every = np.concatenate(shares) if shares else np.zeros(0)
    return [float(value) for value in every[np.isfinite(every)]]


def _pace_table(found: Boltzmann) -> RenderableType:
    table = _table("ladder", "molecules", "energy", "slowest dihedral", words=1)
    for pace in found.paces:
        table.add_row(
            title(pace.name),
            f"{pace.molecules}",
            f"{with_interval(pace.energy, 2)}",
            f"{with_interval(pace.torsion, 2)}" if np.isfinite(pace.torsion.value) else "-",
        )
    return table


def _torsion_table(found: Boltzmann) -> tuple[str, RenderableType] | None:
    """Return which dihedrals are shown, and how far they turn; None where there are none."""
    names = [name for name in (found.thermal, found.diffusion) if name]
    pairs = matched_pairs(found, found.thermal, found.diffusion)
    if not pairs or not any(s.torsions for s in found.subjects):
        return None
    columns = []
    for temperature, n in pairs:
        columns += [f"{temperature:g} K"] if np.isfinite(temperature) else []
        columns += [f"n = {n:g}"] if np.isfinite(n) else []
    rows: list[tuple[str, str, list[float]]] = []
    for subject in found.subjects:
        for at, torsion in enumerate(subject.torsions):
            turned = [
                torsion_deviation(subject, name, value, at)
                for pair in pairs
                for name in names
                if np.isfinite(value := pair[0] if name.thermal else pair[1])
            ]
            rows.append((_short(subject.name), torsion.name, turned))
    said = "dihedrals: circular standard deviation in degrees"
    if len(rows) > _TORSIONS:
        said += f"; of {len(rows)} the {_TORSIONS} that turn most"
        widest = sorted(
            rows, key=lambda row: -max((v for v in row[2] if np.isfinite(v)), default=0)
        )
        shown = {row[:2] for row in widest[:_TORSIONS]}
        rows = [row for row in rows if row[:2] in shown]
    table = _table("molecule", "dihedral", *columns, words=2)
    for molecule, torsion_name, turned in rows:
        table.add_row(molecule, torsion_name, *(number(value, 0) for value in turned))
    return said, table


def torsion_deviation(subject: Subject, name: LadderName, value: float, at: int) -> float:
    """Return a dihedral's circular standard deviation in degrees at a rung; NaN for no frames."""
    rung = rung_of(subject.ladders[name], value) if name in subject.ladders else None
    return circular_deviation(angles_of(rung, len(subject.torsions))[at]) if rung else float("nan")


def _gaussian_table(found: Boltzmann) -> RenderableType:
    table = _table("molecule", "steps", "energy at the end", "ended", words=1)
    for subject in found.subjects:
        for chain in subject.gaussian:
            table.add_row(
                _short(subject.name), f"{chain.n_steps:,}", number(rise(chain), 1),
                chain.divergence if chain.diverged else "not diverged",
            )  # fmt: skip
    return table


def rise(chain: Chain) -> float:
    """Return the energy of a chain's end above its start, kcal/mol; NaN without energies."""
    if not len(chain.trace):
        return float("nan")
    return float(chain.trace[-1] - chain.trace[0]) * EV_TO_KCAL


def tables(found: Boltzmann) -> list[RenderableType]:
    """Return the analysis as headings and tables, to be printed one after the other."""
    parts: list[RenderableType] = [f"{found.store.name}: chains of {_count(len(found.subjects))}"]
    for name in found.ladders:
        rows = levels(found, name)
        if name.thermal:
            parts += [
                "",
                title(name),
                "energies above the minimum in kcal/mol; harmonic: (3N-6)/2 kB T; times in steps",
                _thermal_table(rows),
            ]
            if swapped := exchange_of(found, name):
                parts += ["", "swaps of neighbours after the burn-in; least: of one molecule"]
                parts += [_swaps_table(swapped[0]), trips_line(swapped[1])]
        else:
            one = next((m for m in found.maps if m.diffusion == name), None)
            energies = "energies above the lowest at the lowest n in kcal/mol"
            if not name.level:
                energies = "no energies yet: they take a single_points stage from it"
            parts += ["", title(name), energies, _diffusion_table(rows, one)]
    for one in found.maps or (None,):
        if found.thermal or one:
            parts += ["", "every molecule: line in T" + (", line in n²" if one else "")]
            if one:
                parts.append(
                    f"mu: T = mu n² ({one.diffusion.stage}); rest: mean energy at the lowest n "
                    "above the minimum, kcal/mol"
                )
            parts.append(_molecules_table(found, one))
        if not one:
            continue
        for match in one.matches:
            if match.discarded:
                parts.append(f"discarded: {match.subject.name}: {match.discarded}")
        pairs = matched_pairs(found, one.thermal, one.diffusion)
        if one.kept and pairs:
            parts += [
                "",
                "matched pairs: mean energies above the shared minimum, kcal/mol; ratio of sd;",
                "dihedrals: common share of their distributions",
                _matched_table(found, one),
            ]
    torsions = _torsion_table(found)
    if torsions is not None:
        parts += ["", *torsions]
    if found.paces:
        parts += [
            "",
            "effective samples per energy evaluation over those of plain Metropolis, "
            "where both have settled",
            _pace_table(found),
        ]
    if any(subject.gaussian for subject in found.subjects):
        parts += ["", "Gaussian moves that are all accepted; kcal/mol", _gaussian_table(found)]
    lines = [map_line(one) for one in found.maps]
    lines.append(check_line(found))
    lines += [settled_line(found, name) for name in found.ladders]
    return [*parts, "", *filter(None, lines)]


def _count(many: int, one: str = "molecule") -> str:
    return f"{many:,} {one}{'' if many == 1 else 's'}"


def map_line(one: Map) -> str:
    """Return in one line which temperature a diffusion step stands for."""
    kept = one.kept
    if not kept or not np.isfinite(one.mu.value):
        return f"{one.diffusion.stage}: no map from n to a temperature, no molecule counts for it"
    within = f"95 % CI {interval(one.mu, 3)}" if one.mu.known else "too few for an interval"
    left = len(one.matches) - len(kept)
    out = f", {left} discarded" if left else ""
    return (
        f"diffusion step n of {one.diffusion.model} samples at T = {number(one.mu.value, 3)} n² K "
        f"({within}; {_count(len(kept))}{out}; published pairs: {number(MU, 2)})"
    )


def check_line(found: Boltzmann) -> str:
    """Return in one line how far cold chains are from (3N - 6)/2 k_B T; empty without any."""
    name = found.thermal
    cold = [] if name is None else [r for r in levels(found, name) if r.value < HARMONIC_BELOW]
    cold = [row for row in cold if row.molecules]
    if name is None or not cold:
        return ""
    chains = sum(row.molecules for row in cold)
    within = round(sum(row.within * row.molecules for row in cold if np.isfinite(row.within)))
    off = 100 * (float(np.mean([row.ratio.value for row in cold])) - 1.0)
    return (
        f"below {HARMONIC_BELOW:g} K: mean energy within 3 standard errors of (3N-6)/2 kB T in "
        f"{within} of {chains} cases, {off:+.1f} % on average ({name.stage})"
    )


def settled_line(found: Boltzmann, name: LadderName) -> str:
    """Return in one line that chains of a ladder drift or disagree; empty where they do not."""
    rows = levels(found, name)
    unsettled = sum(row.unsettled for row in rows)
    if not unsettled:
        return ""
    return (
        f"{name.stage}: {unsettled} of {sum(row.molecules for row in rows)} cases have not settled "
        f"(R-hat above {UNSETTLED:g})"
    )


# --- for programs -----------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: no NaN, no numpy."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def values(found: Boltzmann) -> dict[str, Any]:
    """Return the analysis as plain values, for JSON: kcal/mol, K and Å; None where unknown."""
    plain: dict[str, Any] = _plain(
        {
            "store": str(found.store.path),
            "limits": {"rmsd_A": found.max_rmsd, "rest_kcal_per_mol": found.max_rest},
            "ladders": [
                {
                    **asdict(name),
                    "rungs": [asdict(row) for row in levels(found, name)],
                    **_exchange_values(found, name),
                }
                for name in found.ladders
            ],
            "molecules": [_molecule_values(subject) for subject in found.subjects],
            "maps": [_map_values(found, one) for one in found.maps],
            "effective_samples_per_evaluation": [
                {**asdict(pace), "against": "metropolis"} for pace in found.paces
            ],
            "published": {
                "mu": MU,
                "matched": [{"temperature_K": t, "n": n} for t, n in MATCHED],
            },
            "lines": [
                line
                for line in (
                    *map(map_line, found.maps),
                    check_line(found),
                    *(settled_line(found, name) for name in found.ladders),
                )
                if line
            ],
        }
    )
    return plain


def _exchange_values(found: Boltzmann, name: LadderName) -> dict[str, Any]:
    swapped = exchange_of(found, name)
    if swapped is None:
        return {}
    return {"swaps": [asdict(row) for row in swapped[0]], "trips": asdict(swapped[1])}


def _molecule_values(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "smiles": subject.smiles,
        "n_atoms": subject.n_atoms,
        "harmonic_kcal_per_mol_K": subject.harmonic,
        "ladders": [
            {
                "stage": name.stage,
                "level": name.level,
                "zero_eV": ladder.zero_eV,
                "fit": asdict(ladder.fit) if ladder.fit else None,
                "linear_in_n": asdict(ladder.linear) if ladder.linear else None,
                "heat_capacity_over_harmonic": ladder.fit.slope / subject.harmonic
                if ladder.fit and name.thermal
                else None,
            }
            for name, ladder in subject.ladders.items()
        ],
        "dihedrals": [torsion.name for torsion in subject.torsions],
    }


def _match_values(match: Match) -> dict[str, Any]:
    return {
        "molecule": match.subject.name,
        "discarded": match.discarded,
        "rmsd_A": match.rmsd,
        "rest_kcal_per_mol": match.rest,
        "mu": match.mu,
        "mu_error": match.mu_error,
        "n": match.ns.tolist(),
        "temperature_K": match.temperatures.tolist(),
        "temperature_K_shared_zero": match.shared.tolist(),
    }


def _map_values(found: Boltzmann, one: Map) -> dict[str, Any]:
    pairs = matched_pairs(found, one.thermal, one.diffusion)
    return {
        "thermal": asdict(one.thermal),
        "diffusion": asdict(one.diffusion),
        "mu": asdict(one.mu),
        "mu_shared_zero": asdict(one.mu_shared),
        "temperatures": [
            {"n": n, **asdict(t), "fitted": asdict(one.temperature(n))}
            for n, t in zip(one.ns, one.temperatures, strict=True)
        ],
        "molecules": [_match_values(match) for match in one.matches],
        "matched": [
            {"temperature_K": t, "n": n, "dihedral_overlap": overlaps(one, (t, n))}
            for t, n in pairs
        ],
    }


_COLUMNS: Final = (
    "molecule", "smiles", "n_atoms", "conformer", "stage", "kind", "level", "program", "model",
    "temperature_K", "n", "repeat", "n_steps", "burn_in", "step_size_A", "acceptance",
    "swap_acceptance", "n_evaluations", "diverged", "divergence", "samples",
    "mean_above_minimum_kcal_per_mol", "standard_error_kcal_per_mol", "deviation_kcal_per_mol",
    "mean_over_harmonic", "heat_capacity_over_harmonic", "autocorrelation_time_steps",
    "effective_samples", "effective_samples_per_evaluation", "cpu_s", "key",
)  # fmt: skip


def per_chain(found: Boltzmann) -> list[dict[str, Any]]:
    """Return one mapping per chain and level of theory, diverged ones included and marked."""
    lines: list[dict[str, Any]] = []

    def add(subject: Subject, name: LadderName, chain: Chain, alone: Rung) -> None:
        harmonic = name.thermal and alone.found.samples > 0
        cells = (
            subject.name, subject.smiles, subject.n_atoms, subject.conformer, name.stage,
            name.kind, name.level, name.program, name.model, chain.temperature, chain.n,
            chain.repeat, chain.n_steps, chain.burn_in, chain.step_size, chain.acceptance,
            chain.swap_acceptance, chain.evaluations, int(chain.diverged), chain.divergence,
            alone.found.samples, alone.found.mean + alone.above, alone.found.error,
            alone.found.deviation, deviations(subject, alone)[0] if harmonic else np.nan,
            capacity(subject, alone) if harmonic else np.nan, alone.time, alone.found.effective,
            alone.effective_per_evaluation, chain.cpu_s, chain.key.hex(),
        )  # fmt: skip
        lines.append(
            {
                column: "" if isinstance(cell, float) and not np.isfinite(cell) else cell
                for column, cell in zip(_COLUMNS, cells, strict=True)
            }
        )

    for subject in found.subjects:
        for name, ladder in subject.ladders.items():
            for rung in ladder.rungs:
                for chain in rung.chains:
                    add(subject, name, chain, single_rung(chain, ladder))
        for chain in subject.gaussian:
            add(subject, LadderName(GAUSSIAN, "", "", "", GAUSSIAN), chain, single_rung(chain))
    return lines


def write_per_chain(found: Boltzmann, target: Path) -> int:
    """Write `per_chain` as comma-separated values; return how many lines.

    Raises StoreError when the file cannot be written.
    """
    lines = per_chain(found)
    write_csv(target, _COLUMNS, lines)
    return len(lines)
