"""Measure a query over many relaxations against numpy and Parquet with DuckDB.

    python -m benchmarks.query [ROWS]

Makes a compacted store of ROWS (default 1 000 000) made-up relaxations in a temporary folder,
with the columns, filters and chunks of a real one. Every time is the best of five, in process.
"""

from __future__ import annotations

import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import table
from kernels.units import EV_TO_KCAL
from orchestrator import hdf5, manifest, shard
from orchestrator.columns import Category, Rows, Varlen
from orchestrator.schema import TABLES
from orchestrator.store import Store

ATOMS = 2
SEGMENT = 1_000_000
MEDIANS = "medians by stage, level, program"
QUERIES = {
    MEDIANS: (
        "SELECT stage, level, program, count(*), median(n_steps), median(final_energy_eV) "
        "FROM relaxations GROUP BY ALL"
    ),
    "90th percentile of time by size": (
        "SELECT n_atoms, count(*), quantile_cont(cpu_s, 0.9) "
        "FROM relaxations WHERE NOT connectivity_changed GROUP BY ALL"
    ),
    "ten largest gains, with keys": (
        "SELECT key, relaxation_kcal_per_mol FROM relaxations ORDER BY 2 DESC LIMIT 10"
    ),
    "molecules relaxed at both stages": (
        "SELECT count(*) FROM relaxations a JOIN relaxations b USING (mol_key) "
        "WHERE a.stage = 'gfn2' AND b.stage = 'tight' AND b.n_steps < a.n_steps"
    ),
}


def _category(rng: np.random.Generator, names: list[str], n: int) -> Category:
    return Category(rng.integers(0, len(names), n).astype(np.uint32), names)


def relaxations(n: int, rng: np.random.Generator) -> Rows:
    """Return n made-up relaxations; positions are short, since no query here reads them."""
    keys = rng.integers(0, 1 << 63, (n, 2), dtype=np.uint64)
    mol_keys = np.repeat(rng.integers(0, 1 << 63, (n // 2 + 1, 2), dtype=np.uint64), 2, axis=0)[:n]
    initial = rng.normal(-900.0, 300.0, n)
    ptr = np.arange(n + 1, dtype=np.int64) * ATOMS
    steps = rng.lognormal(3.0, 0.5, n).astype("<i4")
    columns: dict[str, Any] = {
        "key": keys,
        "mol_key": mol_keys,
        "parent_key": keys[::-1],
        "stage": _category(rng, ["gfn2", "tight"], n),
        "level": _category(rng, ["GFN2-xTB", "MMFF94"], n),
        "program": _category(rng, ["tblite 0.8.0", "xtb-python 22.1"], n),
        "optimizer": _category(rng, ["BFGS"], n),
        "conformer": np.zeros(n, "<u2"),
        "n_atoms": rng.integers(5, 80, n).astype("<u2"),
        "n_steps": steps,
        "n_evaluations": steps + 1,
        "initial_energy_eV": initial,
        "final_energy_eV": initial - rng.lognormal(-0.7, 0.6, n),
        "fmax_eV_per_A": rng.uniform(0.005, 0.03, n),
        "connectivity_changed": (rng.random(n) < 0.01).astype("u1"),
        "ladder": _category(rng, [""], n),
        "cpu_s": rng.lognormal(0.0, 0.8, n),
        "wall_s": rng.lognormal(0.0, 0.8, n),
        "numbers": Varlen(np.ones(n * ATOMS, "u1"), ptr),
        "positions": Varlen(np.zeros((n * ATOMS, 3)), ptr),
    }
    return Rows(TABLES["relaxations"], columns)


def make_store(path: Path, n: int) -> Store:
    """Write n relaxations as the segments that compaction would leave."""
    store = Store.create(path, "benchmark")
    rng = np.random.default_rng(0)
    segments = []
    for start in range(0, n, SEGMENT):
        rows = relaxations(min(SEGMENT, n - start), rng)
        order = np.lexsort((rows["mol_key"][:, 1], rows["mol_key"][:, 0]))
        data = hdf5.build(
            [rows.take(order)], kind="segment:relaxations", campaign="benchmark", packed=True
        )
        name = f"segments/relaxations-000001-{start:08d}.h5"
        shard.write_whole(path / name, data)
        segments.append(
            manifest.Segment(name, "relaxations", len(rows), len(data), zlib.crc32(data))
        )
    manifest.publish(path / "manifest", manifest.Manifest(1, tuple(segments)))
    return store


def best(call: Callable[[], Any], repeats: int = 5) -> float:
    """Return the shortest of some wall times, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def with_numpy(store: Store) -> dict[Any, tuple[int, float, float]]:
    """Answer the first query with numpy over the same columns."""
    names = ["stage", "level", "program", "n_steps", "final_energy_eV"]
    rows = store.read("relaxations", names)
    code = np.zeros(len(rows), np.int64)
    for name in names[:3]:
        code = code * len(rows[name].names) + rows[name].codes
    order = np.argsort(code, kind="stable")
    groups, starts = np.unique(code[order], return_index=True)
    answer = {}
    for group, part in zip(groups, np.split(order, starts[1:]), strict=True):
        steps, energies = rows["n_steps"][part], rows["final_energy_eV"][part]
        answer[group] = (len(part), float(np.median(steps)), float(np.median(energies)))
    return answer


def _parquet(connection: Any, sql: str) -> Any:
    return connection.sql(sql).to_arrow_table()


def main() -> None:
    """Print the table."""
    import duckdb

    from orchestrator.export import export

    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    lines: list[tuple[str, str, int, str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", n)
        target = export(store, "parquet", Path(folder) / "parquet", table="relaxations")
        connection = duckdb.connect()
        connection.execute(
            "CREATE VIEW relaxations AS SELECT *, (initial_energy_eV - final_energy_eV) * "
            f"{EV_TO_KCAL} AS relaxation_kcal_per_mol FROM '{target}/relaxations.parquet'"
        )
        for what, sql in QUERIES.items():
            ours = best(partial(store.query, sql))
            others = {"Parquet + DuckDB": best(partial(_parquet, connection, sql))}
            if what == MEDIANS:
                others["HDF5 + numpy"] = best(partial(with_numpy, store))
            lines.append((what, "basin query", n, f"{ours:.3f}", ""))
            for other, seconds in others.items():
                lines.append((what, other, n, f"{seconds:.3f}", f"{ours / seconds:.2f}"))
        connection.close()
    table(
        "Query over relaxations in the store (best of five, in process)",
        ("what", "with", "rows", "seconds", "basin query / this"),
        lines,
    )


if __name__ == "__main__":
    main()
