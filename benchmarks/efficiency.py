"""Orchestration efficiency: QM9 relaxations by Basin, by a bare pool, by GNU parallel and xtb.

Efficiency = CPU seconds of the kernel over (wall seconds x cores), from the first item's start
to the last result's being safe (for Basin: shards sealed, compacted and published).

    python -m benchmarks.efficiency [--molecules 2000]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import cores, data_folder, table
from kernels.embedding import embed
from kernels.errors import KernelError
from kernels.forcefield import minimise
from kernels.graph import parse_smiles
from orchestrator.kernel_calls import Call, Payload, call

SETTINGS = {
    "level": "GFN2-xTB",
    "program": "tblite",
    "optimizer": "BFGS",
    "fmax": 0.03,
    "max_steps": 500,
    "max_step_length": 0.2,
    "save_forces": False,
    "electronic_temperature": 300.0,
}


def _start(smiles: str) -> tuple[str, Any, Any] | None:
    try:
        molecule = parse_smiles(smiles)
        if molecule.charge or molecule.multiplicity != 1:
            return None
        made = embed(smiles, seed=1, max_attempts=20)
        return smiles, made.numbers, minimise(smiles, made.positions, max_steps=2000).positions
    except KernelError:
        return None


def starting_geometries(count: int) -> list[tuple[str, Any, Any]]:
    """Return (SMILES, numbers, MMFF positions) of `count` neutral molecules, all over QM9."""
    lines = (data_folder() / "qm9" / "qm9_smiles.csv").read_text().split()[1:]
    picked = [lines[i] for i in np.linspace(0, len(lines) - 1, count + count // 4).astype(int)]
    with multiprocessing.Pool(cores()) as pool:
        made = [start for start in pool.imap(_start, picked, 20) if start is not None]
    return made[:count]


def _relax(start: tuple[str, Any, Any]) -> tuple[float, float, bool]:
    smiles, numbers, positions = start
    began, cpu = time.time(), time.process_time()
    payload = Payload(smiles, 0, 1, 0, 0, numbers, positions, "/nonexistent")
    try:
        (outcome,) = call(Call("relax", SETTINGS, 1e9), [payload], lambda: False)
        ok = outcome["status"] == "ok"
    except KernelError:
        ok = False
    return began, time.process_time() - cpu, ok


def by_pool(starts: list[tuple[str, Any, Any]]) -> tuple[float, float, int]:
    """Return wall seconds, kernel CPU seconds and the number relaxed of a bare pool."""
    with multiprocessing.Pool(cores()) as pool:
        done = list(pool.imap_unordered(_relax, starts))
        end = time.time()
    return end - min(d[0] for d in done), sum(d[1] for d in done), sum(d[2] for d in done)


def by_basin(starts: list[tuple[str, Any, Any]], folder: Path) -> tuple[float, float, int]:
    """Return the same of a Basin run, compaction included."""
    from ase import Atoms
    from ase.io import write

    write(folder / "start.xyz", [Atoms(n, p) for _, n, p in starts], format="extxyz")
    (folder / "bench.toml").write_text(
        'name = "bench"\nstore = "store"\n[molecules]\nfiles = ["start.xyz"]\n'
        '[[stages]]\nkernel = "relax"\n'
    )
    subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "run", folder / "bench.toml"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = max(p.stat().st_mtime for p in (folder / "store" / "manifest").iterdir())
    from orchestrator import open_store

    tasks = open_store(folder / "store").read("tasks", ["status", "stage", "started_s", "cpu_s"])
    mine = tasks["stage"].equals("relax")
    ok = tasks["status"].equals("ok") & mine
    return (
        end - float(tasks["started_s"][mine].min()),
        float(tasks["cpu_s"][mine].sum()),
        int(ok.sum()),
    )


def by_parallel(starts: list[tuple[str, Any, Any]], folder: Path) -> tuple[float, float, int]:
    """Return the same of GNU parallel over xtb's own optimiser (CPU of all xtb processes)."""
    from ase import Atoms
    from ase.io import write

    work = folder / "parallel"
    work.mkdir()
    for i, (_, numbers, positions) in enumerate(starts):
        (work / f"{i}").mkdir()
        write(work / f"{i}" / "m.xyz", Atoms(numbers, positions), format="xyz")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    subprocess.run(
        [
            "parallel",
            "-j",
            str(cores()),
            "cd {} && xtb m.xyz --gfn 2 --opt >log 2>&1 || true",
            ":::",
            *(str(work / f"{i}") for i in range(len(starts))),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall = time.time() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = sum((work / f"{i}" / "xtbopt.xyz").exists() for i in range(len(starts)))
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--molecules", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1, help="repeats of pool and Basin")
    arguments = parser.parse_args()
    starts = starting_geometries(arguments.molecules)
    rows = []
    ratios = []
    for _ in range(arguments.rounds):
        found = {"bare multiprocessing.Pool": by_pool(starts)}
        with tempfile.TemporaryDirectory() as name:
            found["Basin"] = by_basin(starts, Path(name))
        base = found["bare multiprocessing.Pool"]
        for what, (wall, cpu, ok) in found.items():
            efficiency = cpu / (wall * cores())
            reference = base[1] / (base[0] * cores())
            rows.append(
                [
                    what,
                    ok,
                    f"{wall:.1f}",
                    f"{cpu:.1f}",
                    f"{efficiency:.3f}",
                    f"{efficiency / reference:.3f}",
                    f"{len(starts) / wall:.1f}",
                ]
            )
            if what == "Basin":
                ratios.append(efficiency / reference)
    if shutil.which("parallel") and shutil.which("xtb"):
        with tempfile.TemporaryDirectory() as name:
            wall, cpu, ok = by_parallel(starts, Path(name))
        rows.append(
            [
                "GNU parallel + xtb --opt",
                ok,
                f"{wall:.1f}",
                f"{cpu:.1f} (processes)",
                "-",
                "-",
                f"{len(starts) / wall:.1f}",
            ]
        )
    table(
        f"{len(starts)} GFN2-xTB relaxations of QM9 molecules from MMFF94 geometries",
        [
            "what",
            "relaxed",
            "wall s",
            "kernel CPU s",
            "efficiency",
            "against the pool",
            "relaxations/s",
        ],
        rows,
    )
    print(json.dumps({"ratio_to_pool": ratios}))


if __name__ == "__main__":
    main()
