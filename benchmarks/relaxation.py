"""One GFN2-xTB relaxation: Basin's kernel, the stock calculator with ASE's BFGS, a bare loop.

The bare loop evaluates Basin's own frames with tblite, restarting each SCF from the last: what the
physics alone costs. CPU time, minimum of the repeats.

    python -m benchmarks.relaxation [--repeats 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import table
from kernels.calculators import make_calculator
from kernels.embedding import embed
from kernels.forcefield import minimise
from kernels.relaxation import RelaxSettings, relax
from kernels.units import BOHR_TO_ANGSTROM

MOLECULES = {
    "toluene": "Cc1ccccc1",
    "paracetamol": "CC(=O)Nc1ccc(O)cc1",
    "caffeine": "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    "ibuprofen": "CC(C)Cc1ccc(C(C)C(=O)O)cc1",
    "lidocaine": "CCN(CC)CC(=O)Nc1c(C)cccc1C",
}


def cpu_ms(work: Callable[[], Any], repeats: int) -> float:
    """Return the smallest CPU time of some repeats, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def main() -> None:
    """Print the table."""
    from ase import Atoms
    from ase.optimize import BFGS
    from tblite.ase import TBLite
    from tblite.interface import Calculator

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    settings = RelaxSettings()
    rows = []
    for name, smiles in MOLECULES.items():
        made = embed(smiles, seed=1, max_attempts=50)
        numbers = made.numbers
        start = minimise(smiles, made.positions, max_steps=2000).positions
        done = relax(numbers, start, make_calculator("GFN2-xTB"), settings)
        frames = done.frames / BOHR_TO_ANGSTROM

        def ours(numbers: Any = numbers, start: Any = start) -> None:
            relax(numbers, start, make_calculator("GFN2-xTB"), settings)

        def bare(numbers: Any = numbers, frames: Any = frames) -> None:
            calculator = Calculator("GFN2-xTB", numbers.astype(int), frames[0])
            calculator.set("verbosity", 0)
            last = None
            for frame in frames:
                calculator.update(np.ascontiguousarray(frame))
                last = calculator.singlepoint(last)

        def stock(numbers: Any = numbers, start: Any = start) -> int:
            atoms = Atoms(numbers, start)
            atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
            optimizer = BFGS(atoms, logfile=None)
            optimizer.run(fmax=settings.fmax, steps=settings.max_steps)
            return int(optimizer.nsteps)

        times = [cpu_ms(work, repeats) for work in (bare, ours, stock)]
        rows.append(
            [name, len(numbers), done.steps, stock(), *(f"{ms:.1f}" for ms in times),
             f"{times[1] / times[0]:.2f}", f"{times[2] / times[1]:.2f}"]
        )  # fmt: skip
    table(
        "One GFN2-xTB relaxation, CPU ms",
        ["molecule", "atoms", "steps", "steps, ASE", "bare loop", "Basin", "tblite.ase + ASE BFGS",
         "Basin / bare", "ASE / Basin"],
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
