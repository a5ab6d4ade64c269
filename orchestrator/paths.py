"""Diffusion paths with their single-point energies, against the minima that relaxation finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.units import EV_TO_KCAL
from orchestrator.columns import Rows, concat
from orchestrator.store import Snapshot, Store
from orchestrator.tables import Lookup, stream

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_STEP = 512
_FROM_NOISE = "generation"
_PATHS = (
    "key", "mol_key", "parent_key", "stage", "model", "n", "protocol", "connectivity_changed",
    "level", "numbers", "positions",
)  # fmt: skip
_MINIMA = (
    "key", "parent_key", "level", "program", "final_energy_eV", "connectivity_changed", "positions",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Walk:
    """One diffusion path with the energy of every frame, and the minimum it belongs to.

    ``levels`` (F,): diffusion step n of each frame, the start first; ``frames`` (F, N, 3) in Å;
    ``energies`` (F,) in eV, NaN where none was found; ``forces`` (F, N, 3) in eV/Å, None where not
    saved. ``minimum`` (N, 3) and ``minimum_eV``: the geometry relaxed at the same level from the
    path's end or, where that was not done, from its start (``own`` false); None and NaN where there
    is neither. ``changed``: bonds changed on the path or in that relaxation.
    """

    stage: str
    level_of_theory: str
    model: str
    n: int
    protocol: str
    levels: NDArray[np.int64]
    frames: Floats
    energies: Floats
    forces: Floats | None
    minimum: Floats | None
    minimum_eV: float
    own: bool
    changed: bool


def _row_ids(rows: Rows, mine: Indices) -> Indices:
    """Return a number for each row that rows with the same parent share."""
    parents = rows["parent_key"][mine]
    ids: Indices = np.unique(parents, axis=0, return_inverse=True)[1].reshape(-1)
    return ids


class _Minima:
    """Relaxed geometries by level of theory, program and where they began."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._by: dict[tuple[str, str], tuple[Indices, Lookup]] = {}
        levels, programs = rows["level"], rows["program"]
        for level in levels.names:
            for program in programs.names:
                mine = np.flatnonzero(levels.equals(level) & programs.equals(program))
                # Of several relaxations from one geometry the lowest is its minimum.
                mine = mine[np.argsort(rows["final_energy_eV"][mine], kind="stable")]
                mine = mine[np.sort(np.unique(_row_ids(rows, mine), return_index=True)[1])]
                keys = Rows(rows.schema, {"key": rows["parent_key"][mine]})
                self._by[level, program] = (mine, Lookup(keys))

    def find(self, level: str, program: str, parents: NDArray[np.uint64]) -> Indices:
        """Return the row of the minimum relaxed from each geometry (K, 2), -1 for none."""
        if (level, program) not in self._by:
            return np.full(len(parents), -1, np.intp)
        mine, lookup = self._by[level, program]
        at = lookup.find(parents)
        found = np.full(len(parents), -1, np.intp)
        found[at >= 0] = mine[at[at >= 0]]
        return found


def _some(snapshot: Snapshot, table: str, names: tuple[str, ...], key: str, wanted: Lookup) -> Rows:
    """Return the rows whose key, or parent's key, is one of those wanted."""
    parts = [
        rows.take(wanted.find(rows[key]) >= 0) for rows in stream(snapshot, table, names, _STEP)
    ]
    kept = [part for part in parts if len(part)]
    return concat(kept) if kept else snapshot.read(table, names).take(np.zeros(0, np.intp))


def _keys(rows: Rows, *names: str) -> Lookup:
    keys = np.unique(np.concatenate([rows[name] for name in names]), axis=0)
    return Lookup(Rows(rows.schema, {"key": keys}))


def walks(store: Store) -> list[Walk]:
    """Return every diffusion path that has single-point energies, NaN where none was computed."""
    return store.consistent(lambda snapshot: list(_walks(snapshot)))


def _walks(snapshot: Snapshot) -> Iterator[Walk]:
    points = snapshot.read("single_points")
    if not len(points):
        return
    paths = _some(snapshot, "paths", _PATHS, "key", _keys(points, "parent_key"))
    if not len(paths):
        return
    minima = _some(
        snapshot, "relaxations", _MINIMA, "parent_key", _keys(paths, "key", "parent_key")
    )
    relaxed = _Minima(minima)
    path_of = Lookup(paths).find(points["parent_key"])
    level, program = points["level"], points["program"]
    for point, path in enumerate(path_of.tolist()):
        if path < 0 or paths["protocol"][path] == _FROM_NOISE:
            continue
        levels = paths["level"][path].astype(np.int64)
        energies = points["energy_eV"][point].astype(float)
        n_atoms = len(paths["numbers"][path])
        if len(levels) != len(energies):
            continue
        shape = (len(levels), n_atoms, 3)
        forces = points["forces"][point]
        theory = level[point], program[point]
        starts = np.stack([paths["key"][path], paths["parent_key"][path]])
        own, other = relaxed.find(*theory, starts).tolist()
        row = own if own >= 0 else other
        yield Walk(
            stage=paths["stage"][path],
            level_of_theory=theory[0],
            model=paths["model"][path],
            n=int(paths["n"][path]),
            protocol=paths["protocol"][path],
            levels=levels,
            frames=paths["positions"][path].reshape(shape).astype(float),
            energies=energies,
            forces=forces.reshape(shape).astype(float) if len(forces) else None,
            minimum=minima["positions"][row].astype(float) if row >= 0 else None,
            minimum_eV=float(minima["final_energy_eV"][row]) if row >= 0 else float("nan"),
            own=own >= 0,
            changed=bool(paths["connectivity_changed"][path])
            or (row >= 0 and bool(minima["connectivity_changed"][row])),
        )


@dataclass(frozen=True, slots=True)
class EnergyCurve:
    """Energy above the relaxed minimum along the paths of a diffuse stage, in kcal/mol.

    ``levels`` (F,): diffusion step n of each frame that was computed; ``mean``, ``median`` and the
    quartiles ``low`` and ``high``, (F,) each, over ``molecules`` paths. ``own``: how many of them
    were measured from the minimum that their own end relaxes to. ``left_out``: paths whose bonds
    changed, with an energy missing, or without a relaxed minimum.
    """

    stage: str
    level_of_theory: str
    model: str
    n: int
    protocol: str
    molecules: int
    own: int
    left_out: int
    levels: NDArray[np.int64]
    mean: Floats
    median: Floats
    low: Floats
    high: Floats


def energy_curves(found: Iterable[Walk]) -> list[EnergyCurve]:
    """Return the energy along the path for each diffuse stage and level of theory."""
    groups: dict[tuple[str, str], list[Walk]] = {}
    for walk in found:
        groups.setdefault((walk.stage, walk.level_of_theory), []).append(walk)
    curves = []
    for walks_ in groups.values():
        by_levels: dict[bytes, list[Walk]] = {}
        for walk in walks_:
            if np.isfinite(walk.minimum_eV) and not walk.changed:
                by_levels.setdefault(walk.levels.tobytes(), []).append(walk)
        for candidates in by_levels.values():
            # Of some frames (`every` of the stage) no energy was asked for, on any path.
            asked = np.isfinite([walk.energies for walk in candidates]).any(axis=0)
            alike = [walk for walk in candidates if np.isfinite(walk.energies[asked]).all()]
            if not asked.any() or not alike:
                continue
            above = np.array([(w.energies[asked] - w.minimum_eV) * EV_TO_KCAL for w in alike])
            low, median, high = np.percentile(above, [25, 50, 75], axis=0)
            one = alike[0]
            curves.append(
                EnergyCurve(
                    stage=one.stage,
                    level_of_theory=one.level_of_theory,
                    model=one.model,
                    n=one.n,
                    protocol=one.protocol,
                    molecules=len(alike),
                    own=sum(w.own for w in alike),
                    left_out=len(walks_) - len(alike),
                    levels=one.levels[asked],
                    mean=above.mean(axis=0),
                    median=median,
                    low=low,
                    high=high,
                )
            )
    return curves
