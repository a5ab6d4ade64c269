"""The speed-up study as tables for a terminal, and as plain values for programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.bootstrap import Estimate
from orchestrator.speedup import SAME_BASIN, Arm, Comparison, Summary, saved_line

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def number(value: float, digits: int = 1) -> str:
    """Return a number; `-` where there is none."""
    return f"{value:z,.{digits}f}" if np.isfinite(value) else "-"


def percent(value: float) -> str:
    """Return a share in per cent, without decimals."""
    return f"{100 * value:z.0f} %" if np.isfinite(value) else "-"


def interval(found: Estimate, form: Callable[[float], str]) -> str:
    """Return the 95 % interval as `a to b`; `-` where there were too few molecules."""
    return f"{form(found.low)} to {form(found.high)}" if found.known else "-"


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for at, name in enumerate(columns):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    return table


def _molecules(found: Summary) -> str:
    """Return how many molecules, and how many pairs where conformers make them more."""
    pairs = f" ({found.pairs:,} pairs)" if found.pairs > found.molecules else ""
    return f"{found.molecules:,}{pairs}"


def _times(value: float) -> str:
    return f"{value:.{1 if value >= 1 else 2}f}x" if np.isfinite(value) else "-"


def _steps_table(comparison: Comparison, pick: Callable[[Arm], Summary]) -> RenderableType:
    study = comparison.published
    table = _table(
        "arm", "molecules", "steps", "baseline", "saved", "95 % CI", "middle half", "faster",
        "published",
    )  # fmt: skip
    for arm in comparison.arms:
        found = pick(arm)
        low, high = found.reduction_quartiles
        known = comparison.published_reduction(arm)
        table.add_row(
            arm.stage,
            _molecules(found),
            # Medians of whole numbers may lie between two of them.
            number(found.steps, int(found.steps % 1 != 0)),
            number(found.baseline_steps, int(found.baseline_steps % 1 != 0)),
            percent(found.reduction.value),
            interval(found.reduction, percent),
            f"{percent(low)} to {percent(high)}",
            f"{_times(found.factors[0])} to {_times(found.factors[1])}",
            f"{percent(known)} ({study.where})" if known is not None else "",
        )
    return table


def _energy_table(comparison: Comparison) -> RenderableType:
    study = comparison.published
    table = _table(
        "start of", "mean", "95 % CI", "median", "95 % CI", "baseline/arm", "95 % CI",
        "above lowest", "published mean",
    )  # fmt: skip

    def cells(mean: Estimate, median: Estimate) -> list[str]:
        return [
            number(mean.value, 2),
            interval(mean, lambda v: number(v, 2)),
            number(median.value, 2),
            interval(median, lambda v: number(v, 2)),
        ]

    own = comparison.own
    table.add_row(
        comparison.baseline, *cells(own.mean, own.median), "", "", "",
        f"{number(study.mmff, 1)} ({study.where})",
    )  # fmt: skip
    for arm in comparison.arms:
        found = arm.all
        known = f"{number(study.diffused, 1)} ({_times(study.ratio)})" if arm.diffused else ""
        table.add_row(
            arm.stage,
            *cells(found.own.mean, found.own.median),
            _times(found.ratio.value),
            interval(found.ratio, _times),
            number(found.lowest.mean.value, 2),
            known,
        )
    return table


def _ends_table(comparison: Comparison) -> RenderableType:
    table = _table(
        "arm", "same basin", "deeper", "higher", "mean dE", "median dE", "bonds changed", "unpaired"
    )
    for arm in comparison.arms:
        found = arm.all
        table.add_row(
            arm.stage,
            percent(found.same_basin),
            percent(found.deeper),
            percent(found.higher),
            number(found.delta_mean, 3),
            number(found.delta_median, 3),
            f"{int(arm.changed.sum()):,}",
            f"{arm.missing + arm.unpaired:,}",
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "-"


def _cpu_table(comparison: Comparison) -> RenderableType:
    table = _table(
        "arm", "baseline (s)", "relaxation (s)", "diffusion (s)", "saved (s)", "95 % CI",
        "saved in all",
    )  # fmt: skip
    for arm in comparison.arms:
        found = arm.all
        table.add_row(
            arm.stage,
            _seconds(found.baseline_cpu),
            _seconds(found.cpu),
            _seconds(found.cpu_before) if found.cpu_before else "",
            _seconds(found.cpu_saved.value),
            interval(found.cpu_saved, _seconds),
            percent(found.cpu_saved_share),
        )
    return table


def _series_table(comparison: Comparison) -> RenderableType:
    table = _table("checkpoints", "n", "trained", "molecules", "saved", "95 % CI", "mean start")
    for series in comparison.series:
        for point in series.points:
            found = point.arm.all
            table.add_row(
                series.family,
                f"{series.n}",
                f"{series.unit} {point.number:,}",
                f"{found.molecules:,}",
                percent(found.reduction.value),
                interval(found.reduction, percent),
                number(found.own.mean.value, 2),
            )
    return table


def tables(comparison: Comparison) -> list[RenderableType]:
    """Return the study as headings and tables, to be printed one after the other."""
    study = comparison.published
    arms = comparison.arms
    parts: list[RenderableType] = [
        f"{comparison.store.name}: {comparison.level} ({comparison.program}) relaxations against "
        f"stage {comparison.baseline}, {comparison.baseline_pairs:,} of them",
        "",
        "relaxation steps, medians; saved = 1 - steps/baseline steps of each molecule",
        _steps_table(comparison, lambda arm: arm.all),
    ]
    if study.factors and any(comparison.published_reduction(arm) for arm in arms):
        parts.append(f"published middle half: {study.factors} faster ({study.where})")
    parts += [
        "",
        f"the same, only where both end in one basin (|dE| <= {SAME_BASIN} kcal/mol)",
        _steps_table(comparison, lambda arm: arm.same),
        "",
        "how far above its own minimum a relaxation starts, kcal/mol",
        _energy_table(comparison),
        "",
        f"where arms end; dE = E(baseline) - E(arm) in kcal/mol, deeper: dE > {SAME_BASIN}",
        _ends_table(comparison),
        "",
        "CPU time of a molecule, medians; what led to the arm's start counts against it",
        _cpu_table(comparison),
    ]
    if comparison.series:
        parts += ["", "along training", _series_table(comparison)]
        if study.training:
            words = ", ".join(f"{percent(v)} after {k}" for k, v in sorted(study.training.items()))
            parts.append(f"published: {words} epochs ({study.where})")
    line = saved_line(comparison)
    return [*parts, "", line] if line else parts


def values(comparison: Comparison) -> dict[str, Any]:
    """Return the study as plain values, for JSON; shares are fractions, energies in kcal/mol."""
    study = comparison.published
    return {
        "store": str(comparison.store.path),
        "level": comparison.level,
        "program": comparison.program,
        "baseline": {
            "stage": comparison.baseline,
            "relaxations": comparison.baseline_pairs,
            "start_above_own_minimum": asdict(comparison.own),
        },
        "arms": [_arm_values(arm, comparison.published_reduction(arm)) for arm in comparison.arms],
        "series": [
            {
                "checkpoints": series.family,
                "unit": series.unit,
                "n": series.n,
                "protocol": series.protocol,
                "points": [
                    {
                        "number": point.number,
                        "model": point.arm.model,
                        "reduction": asdict(point.arm.all.reduction),
                        "start_above_own_minimum": asdict(point.arm.all.own),
                    }
                    for point in series.points
                ],
            }
            for series in comparison.series
        ],
        "published": {
            "where": study.where,
            "start_above_minimum_mmff": study.mmff,
            "start_above_minimum_diffused": study.diffused,
            "reduction": {str(n): share for n, share in study.step_reduction.items() if n},
            "reduction_after_epochs": {str(n): share for n, share in study.training.items()},
        },
        "line": saved_line(comparison),
    }


def _arm_values(arm: Arm, known: float | None) -> dict[str, Any]:
    return {
        "stage": arm.stage,
        "model": arm.model or None,
        "n": arm.n if arm.diffused else None,
        "protocol": arm.protocol or None,
        "optimizer": arm.optimizer,
        "connectivity_changed": int(arm.changed.sum()),
        "missing": arm.missing,
        "unpaired": arm.unpaired,
        "all": asdict(arm.all),
        "same_basin": asdict(arm.same),
        "published_reduction": known,
    }
