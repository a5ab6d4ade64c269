"""Metropolis chains over GFN2-xTB: speed, what tuning the step size gives, ladders over processes.

Speed: Basin's chain; a bare loop of tblite calls over the same proposals, each SCF restarted from
the last; and the usual way: ASE Atoms with a new xtb-python calculator (without xtb-python: a new
tblite one) and an xyz frame written at every step. CPU time per step, minimum of repeats that take
turns. Sampling: effective samples of the
energy per 1000 energies. Ladder: 18 temperatures, by the
MPI program with 1, 2, ... processes (only where mpi4py and mpiexec are).

    python -m benchmarks.metropolis [--repeats 5] [--steps 300] [--sampling-steps 4000]
                                    [--ladder-steps 200] [--processes 1 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import table
from kernels.calculators import make_calculator
from kernels.embedding import embed
from kernels.forcefield import minimise
from kernels.relaxation import RelaxSettings, relax
from kernels.sampling.metropolis import (
    ChainSettings,
    ChainState,
    advance,
    init,
    published_step_size,
)
from kernels.sampling.replica_exchange import (
    ExchangeSettings,
    parallel_efficiency,
    request_arrays,
    write_npz,
)
from kernels.units import BOHR_TO_ANGSTROM, BOLTZMANN_EV_PER_K

MOLECULES = {"ethanol": "CCO", "3-ethoxypropanol": "CCOCCCO", "dibutyl ether": "CCCCOCCCC"}
TEMPERATURES = (50.0, 300.0)
LADDER = tuple(float(t) for t in np.geomspace(10.0, 400.0, 18))

Floats = NDArray[np.float64]


class Recorder:
    """Hands every geometry on to a calculator, and keeps it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: list[Floats] = []

    def evaluate(self, numbers: Any, positions: Floats) -> Any:
        self.seen.append(positions.copy())
        return self.inner.evaluate(numbers, positions)


def minimum(smiles: str) -> tuple[NDArray[np.uint8], Floats]:
    """Return numbers (N,) and positions (N, 3) in Å of a GFN2-xTB minimum."""
    made = embed(smiles, seed=1, max_attempts=50)
    start = minimise(smiles, made.positions, max_steps=2000).positions
    tight = RelaxSettings(fmax=0.002, max_steps=2000)
    done = relax(made.numbers, start, make_calculator("GFN2-xTB", program="tblite"), tight)
    return made.numbers, done.positions


def chain(numbers: Any, positions: Floats, calculator: Any, settings: ChainSettings) -> ChainState:
    """Run a whole chain."""
    state = init(numbers, positions, calculator, settings)
    advance(state, numbers, calculator, settings, 1, until=settings.steps)
    return state


def usual_calculator() -> tuple[str, Callable[[], Any]]:
    """Return the stock ASE calculator of xtb-python, or tblite's where that is absent."""
    if importlib.util.find_spec("xtb") is not None:
        from xtb.ase.calculator import XTB

        return "xtb-python", lambda: XTB(method="GFN2-xTB")
    from tblite.ase import TBLite

    return "tblite.ase", lambda: TBLite(method="GFN2-xTB", verbosity=0)


def speed(repeats: int, steps: int) -> None:
    """Print CPU time per step: bare loop, Basin, the usual way."""
    from ase import Atoms
    from ase.io import write
    from tblite.interface import Calculator

    name_of_usual, new = usual_calculator()
    rows = []
    for name, smiles in MOLECULES.items():
        numbers, positions = minimum(smiles)
        for temperature in TEMPERATURES:
            settings = ChainSettings(temperature, steps, 0)
            recorder = Recorder(make_calculator("GFN2-xTB", program="tblite"))
            chain(numbers, positions, recorder, settings)
            visited = [np.ascontiguousarray(xyz / BOHR_TO_ANGSTROM) for xyz in recorder.seen]

            def ours(
                numbers: Any = numbers, positions: Any = positions, settings: Any = settings
            ) -> None:
                calculator = make_calculator("GFN2-xTB", program="tblite")
                chain(numbers, positions, calculator, settings)

            def bare(numbers: Any = numbers, visited: Any = visited) -> None:
                calculator = Calculator("GFN2-xTB", numbers.astype(int), visited[0])
                calculator.set("verbosity", 0)
                last = None
                for bohr in visited:
                    calculator.update(bohr)
                    last = calculator.singlepoint(last)
                    last.get("energy")

            def usual(
                numbers: Any = numbers, positions: Any = positions, temperature: Any = temperature
            ) -> None:
                rng = np.random.default_rng(1)
                sigma = published_step_size(temperature)
                thermal = BOLTZMANN_EV_PER_K * temperature
                atoms = Atoms(numbers, positions)
                atoms.calc = new()
                energy = atoms.get_potential_energy()
                with tempfile.TemporaryDirectory() as scratch:
                    for _ in range(steps):
                        moved = atoms.copy()
                        moved.positions += rng.normal(scale=sigma, size=positions.shape)
                        moved.calc = new()
                        there = moved.get_potential_energy()
                        if rng.random() < math.exp(min(0.0, (energy - there) / thermal)):
                            atoms, energy = moved, there
                        write(f"{scratch}/chain.xyz", atoms, append=True)

            works = {"bare": bare, "ours": ours, "usual": usual}
            times: dict[str, list[float]] = {kind: [] for kind in works}
            for _ in range(repeats):
                for kind, work in works.items():
                    begun = time.process_time()
                    work()
                    times[kind].append(1000 * (time.process_time() - begun) / (steps + 1))
            best = {kind: min(values) for kind, values in times.items()}
            rows.append(
                [name, len(numbers), f"{temperature:g}",
                 *(f"{best[kind]:.2f}" for kind in works),
                 f"{best['bare'] / best['ours']:.3f}", f"{best['usual'] / best['ours']:.2f}"]
            )  # fmt: skip
    table(
        f"One Metropolis step over GFN2-xTB, CPU ms ({steps} steps)",
        ["molecule", "atoms", "T (K)", "bare loop", "Basin", f"ASE + new {name_of_usual}",
         "rate Basin / bare", "rate Basin / ASE"],
        rows,
    )  # fmt: skip


def sampling(steps: int) -> None:
    """Print acceptance and effective samples of the energy, by the published step size and tuned.

    Effective samples by arviz-stats (bulk); the mean is given in units of (3N-6)/2 k_B T, which is
    1 for a harmonic molecule.
    """
    from arviz_stats.base import array_stats

    rows = []
    for name, smiles in list(MOLECULES.items())[:2]:
        numbers, positions = minimum(smiles)
        for temperature in TEMPERATURES:
            for tune in (False, True):
                settings = ChainSettings(temperature, steps, steps // 4, tune=tune)
                calculator = make_calculator("GFN2-xTB", program="tblite")
                state = chain(numbers, positions, calculator, settings)
                kept = state.energies[settings.burn_in + 1 :]
                effective = float(array_stats.ess(kept, chain_axis=None, draw_axis=-1))
                harmonic = (3 * len(numbers) - 6) / 2 * BOLTZMANN_EV_PER_K * temperature
                error = kept.std() / math.sqrt(effective) / harmonic
                rows.append(
                    [name, f"{temperature:g}", "tuned" if tune else "published",
                     f"{state.step_size:.5f}", f"{state.acceptance:.3f}",
                     f"{1000 * effective / len(kept):.1f}",
                     f"{(kept.mean() - state.energies[0]) / harmonic:.3f} ± {error:.3f}"]
                )  # fmt: skip
    table(
        f"Sampling over GFN2-xTB, {steps} steps, a quarter of them burn-in",
        ["molecule", "T (K)", "step size", "Å", "acceptance", "effective samples / 1000 energies",
         "mean energy / harmonic"],
        rows,
    )  # fmt: skip


def ladder(steps: int, processes: list[int]) -> None:
    """Print time and efficiency of a ladder of 18 temperatures by the MPI program."""
    beside = str(Path(sys.executable).parent)
    mpiexec = shutil.which("mpiexec", path=beside + os.pathsep + os.environ.get("PATH", ""))
    if mpiexec is None or importlib.util.find_spec("mpi4py") is None:
        print("\nskipped: ladders over processes (pip install mpi4py mpich)")
        return
    numbers, positions = minimum(MOLECULES["3-ethoxypropanol"])
    settings = ExchangeSettings(LADDER, steps, steps // 4)
    calculator = {"level": "GFN2-xTB", "program": "tblite"}
    rows = []
    alone = math.nan
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        request = request_arrays(numbers, positions, settings, 1, calculator)
        write_npz(folder / "request.npz", request)
        energies = b""
        for number in processes:
            result = folder / f"{number}.npz"
            subprocess.run(
                [mpiexec, "-n", str(number), sys.executable, "-m",
                 "kernels.sampling.exchange_program", "--request", str(folder / "request.npz"),
                 "--result", str(result)],
                check=True,
            )  # fmt: skip
            with np.load(result) as file:
                arrays = dict(file)
            seconds = float(arrays["total_s"].max())
            alone = seconds if number == processes[0] else alone
            energies = energies or arrays["energies"].tobytes()
            rows.append(
                [number, f"{seconds:.1f}", f"{processes[0] * alone / seconds:.2f}",
                 f"{parallel_efficiency(arrays):.3f}",
                 f"{np.nanmean(arrays['swap_acceptance']):.2f}",
                 "yes" if arrays["energies"].tobytes() == energies else "no"]
            )  # fmt: skip
    table(
        f"Replica exchange, 18 temperatures, 3-ethoxypropanol, {steps} steps, swaps every 10",
        ["processes", "wall s", "speed-up", "time in energies / time of all", "swaps accepted",
         "numbers bit-equal"],
        rows,
    )  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sampling-steps", type=int, default=4000)
    parser.add_argument("--ladder-steps", type=int, default=200)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    if given.steps:
        speed(given.repeats, given.steps)
    if given.sampling_steps:
        sampling(given.sampling_steps)
    if given.ladder_steps:
        ladder(given.ladder_steps, given.processes)


if __name__ == "__main__":
    main()
