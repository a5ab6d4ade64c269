"""How molecules made from noise settle, diffusion step by diffusion step, and their energies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kernels.units import EV_TO_KCAL
from orchestrator.columns import Rows
from orchestrator.store import Snapshot, Store
from orchestrator.tables import Lookup

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]

_POINTS = ("parent_key", "level", "energy_eV", "line_energy_eV")

# Measures of the table that are averaged over molecules, frame by frame.
MEASURES: Final = (
    "step_length_A", "bond_deviation_A", "elements_final", "all_elements_final", "bonds_final",
    "all_bonds_final", "valid_bonds",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Generation:
    """Convergence of the molecules of one generation stage.

    ``levels`` (F,): diffusion step n of each frame, from noise down to 0. ``mean``: the mean over
    ``molecules`` of each of `MEASURES`, (F,). ``settled`` (M,): from which n on all elements of a
    molecule are final. ``energy`` (F,): mean energy above the last frame in kcal/mol, of the
    ``with_energy`` molecules that have one, NaN where less than half of them do; ``line`` (F,) the
    same on straight lines from each one's first such frame to its last.
    """

    stage: str
    model: str
    molecules: int
    levels: Levels
    mean: dict[str, Floats]
    settled: Levels
    level_of_theory: str = ""
    with_energy: int = 0
    energy: Floats = field(default_factory=lambda: np.zeros(0))
    line: Floats = field(default_factory=lambda: np.zeros(0))


def settled_from(levels: Levels, final: NDArray[np.bool_]) -> int:
    """Return the diffusion step from which on ``final`` (F,) holds to the end.

    -1 where not even the last frame is final.
    """
    last_change = np.flatnonzero(~final)
    first = int(last_change[-1]) + 1 if len(last_change) else 0
    return int(levels[first]) if first < len(levels) else -1


def generations(store: Store) -> list[Generation]:
    """Return the convergence of each generation stage of a store."""
    return store.consistent(_generations)


def _generations(snapshot: Snapshot) -> list[Generation]:
    rows = snapshot.read("generations")
    if not len(rows):
        return []
    points = snapshot.read("single_points", _POINTS)
    point_of = Lookup(Rows(points.schema, {"key": points["parent_key"]})).find(rows["key"])
    groups: dict[tuple[str, str, bytes], list[int]] = {}
    for row in range(len(rows)):
        name = (rows["stage"][row], rows["model"][row])
        groups.setdefault((*name, rows["level"][row].tobytes()), []).append(row)
    return [
        _one(rows, stage, model, mine, points, point_of)
        for (stage, model, _), mine in groups.items()
    ]


def _one(
    rows: Rows,
    stage: str,
    model: str,
    mine: list[int],
    points: Rows,
    point_of: NDArray[np.intp],
) -> Generation:
    levels: Levels = rows["level"][mine[0]].astype(np.int64)
    final = [rows["all_elements_final"][row] != 0 for row in mine]
    mean = {
        name: np.mean([rows[name][row].astype(float) for row in mine], axis=0) for name in MEASURES
    }
    settled = np.array([settled_from(levels, one) for one in final])
    energies, lines, theory = [], [], ""
    for row in mine:
        point = int(point_of[row])
        if point < 0 or len(points["energy_eV"][point]) != len(levels):
            continue
        found = _energies(points["energy_eV"][point], points["line_energy_eV"][point])
        if found is not None:
            theory = theory or points["level"][point]
            energies.append(found[0])
            lines.append(found[1])
    if not energies:
        return Generation(stage, model, len(mine), levels, mean, settled)
    return Generation(
        stage,
        model,
        len(mine),
        levels,
        mean,
        settled,
        theory,
        len(energies),
        _mean_of_most(np.array(energies)),
        _mean_of_most(np.array(lines)),
    )


def _energies(energy: Floats, line: Floats) -> tuple[Floats, Floats] | None:
    """Return energy above the last frame and the line's, in kcal/mol, at each frame (F,)."""
    there = np.flatnonzero(np.isfinite(energy))
    if not len(there) or there[-1] != len(energy) - 1:
        return None
    above = (energy - energy[-1]) * EV_TO_KCAL
    along = np.full(len(energy), np.nan)
    if 0 < len(line) <= len(energy):
        # As many points as frames, from the first with an energy to the last.
        along[-len(line) :] = (line - energy[-1]) * EV_TO_KCAL
    return above, along


def _mean_of_most(values: Floats) -> Floats:
    """Return the mean over molecules (M, F) of each frame that at least half of them have."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    found: Floats = np.where(2 * count >= len(values), total / np.maximum(count, 1), np.nan)
    return found
