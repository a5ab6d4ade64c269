"""QM9's energies, U0 - zpve, at its published geometries: PySCF's and Psi4's beside them.

Every calculation is the engines' own. Of one molecule a program computes the coarse grid first,
then the usual one and then, of smaller molecules, the same without density fitting, each from the
orbitals before it as along a relaxation, and of most larger ones the usual one alone; CPU seconds
are those from nothing to the energy in question. What is done stands in a file, one JSON object a
line: the same command goes on, and with `--minutes 0` it only prints. Needs the data and PySCF;
Psi4 where it is installed.

    python -m benchmarks.dft_energies [--minutes 60] [--file dft_energies.jsonl]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.machine import data_folder, table
from kernels.calculators import DFT, make_calculator, program_version
from kernels.errors import InputError
from kernels.units import HARTREE_TO_EV

# Each step starts from the orbitals of the one before.
STEPS: dict[str, dict[str, Any]] = {
    "coarse grid": {"density_fitting": True, "grid": "coarse"},
    "density fitting": {"density_fitting": True},
    "exact": {"density_fitting": False},
}
METHODS = [(program, step) for program in ("pyscf", "psi4") for step in STEPS]
SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
# Of heavy atoms: up to which number all molecules are taken, and up to which PySCF does without
# density fitting; Psi4 does so for the five smallest.
ALL_UP_TO = 6
EXACT_UP_TO = 6
# Molecules of more heavy atoms, drawn at random, and those with fluorine among them.
SOME_OF = {7: 136, 8: 4, 9: 4}
FLUORINE_OF = {7: 2, 8: 4}
MEMORY = 6_000_000_000


class Qm9:
    """Molecules of the data set: atomic numbers, positions in Å, U0 - zpve in hartree."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as data:
            self.padded, self.positions = data["numbers"], data["positions"]
            self.energies = data["U0"].astype(float) - data["zpve"].astype(float)
            self.ids = data["gdb9_id"].tolist()
        self.heavy = (self.padded > 1).sum(1)

    def molecule(self, at: int) -> tuple[Any, Any]:
        """Return atomic numbers (N,) and positions (N, 3) of a molecule."""
        numbers = self.padded[at][self.padded[at] > 0].astype(np.uint8)
        return numbers, self.positions[at][: len(numbers)].astype(float)

    def queue(self) -> Iterator[tuple[int, str, list[str]]]:
        """Yield molecule, program and steps to compute: what tells most for its price first."""
        rng = np.random.default_rng(6)
        small = rng.permutation(np.nonzero(self.heavy <= ALL_UP_TO)[0]).tolist()
        five = sorted((at for at in small if self.heavy[at] <= 5), key=lambda at: self.heavy[at])
        has_f = (self.padded == 9).any(1)
        fluorine, others = (
            {
                size: rng.permutation(np.nonzero((self.heavy == size) & (has_f == wanted))[0])[:n]
                for size, n in chosen.items()
            }
            for wanted, chosen in ((True, FLUORINE_OF), (False, SOME_OF))
        )
        few = [at for size in (8, 9) for at in (*fluorine.get(size, ()), *others[size])]
        # Fluorine's come early, as only they settle its exponents.
        first = dict.fromkeys(map(int, [*five[:5], *fluorine[7], *five[5:], *few[:4], *small]))
        for at in first:
            exact = self.heavy[at] < EXACT_UP_TO or at in fluorine[7]
            yield at, "pyscf", list(STEPS)[: 3 if exact else 2]
            yield at, "psi4", list(STEPS)[: 3 if at in five[:5] else 2]
        for at in dict.fromkeys(map(int, [*others[7], *few])):
            if at in first:
                continue
            if at in few or at in others[7][:4]:
                yield at, "pyscf", list(STEPS)[:2]
                yield at, "psi4", list(STEPS)[:2]
            else:
                # Half of them each: Psi4 takes less than half the time.
                half = at in others[7][: len(others[7]) // 2]
                yield at, "pyscf" if half else "psi4", ["density fitting"]
        for at in small:
            yield at, "pyscf", list(STEPS)


def cpu_s() -> float:
    """Return CPU seconds of this process and of those it has started and not yet ended."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(spent.user + spent.system for spent in times)


def compute(qm9: Qm9, file: Path, done: list[dict[str, Any]], minutes: float) -> None:
    """Work through the queue until it ends or `minutes` of CPU time are spent."""
    known = {(row["gdb9_id"], row["program"], row["step"]) for row in done}
    start = spent = 0.0
    with open(file, "a") as out:
        for at, program, steps in qm9.queue():
            if {(qm9.ids[at], program, step) for step in steps} <= known:
                continue
            if spent > 60 * minutes:
                return
            numbers, positions = qm9.molecule(at)
            orbitals: dict[str, Any] = {}
            seconds = 0.0
            for step in steps:
                try:
                    calculator: Any = make_calculator(
                        DFT, program=program, memory=MEMORY, **STEPS[step]
                    )
                except InputError as error:
                    if program == "pyscf":
                        raise
                    print(f"left out: {error}", flush=True)
                    break
                calculator.load_scf(orbitals)
                start = cpu_s()
                energy = calculator.energy(numbers, positions)
                seconds += max(0.0, cpu_s() - start)
                orbitals = calculator.save_scf()
                row = {
                    "gdb9_id": qm9.ids[at],
                    "program": program,
                    "version": program_version(program),
                    "step": step,
                    "energy_ha": energy / HARTREE_TO_EV,
                    "cpu_s": round(seconds, 2),
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
                }
                done.append(row)
                out.write(json.dumps(row) + "\n")
                out.flush()
            spent += seconds


def deviations(qm9: Qm9, rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """Return, by program and step, mHa from QM9's energy by molecule."""
    at = {identity: i for i, identity in enumerate(qm9.ids)}
    found: dict[tuple[str, str], dict[int, float]] = {method: {} for method in METHODS}
    for row in rows:
        i = at[row["gdb9_id"]]
        found[row["program"], row["step"]][i] = 1000 * (row["energy_ha"] - qm9.energies[i])
    return found


def show(qm9: Qm9, rows: list[dict[str, Any]]) -> None:
    """Print the tables."""
    at = {identity: i for i, identity in enumerate(qm9.ids)}
    seconds = {(row["program"], row["step"], at[row["gdb9_id"]]): row["cpu_s"] for row in rows}
    lines: list[list[object]] = []
    worst: list[list[object]] = []
    for method, found in deviations(qm9, rows).items():
        # Rounded as the reference is, of single precision: by up to 15 µHa beyond 256 hartree.
        sizes = {at: int(qm9.heavy[at]) for at in found}
        for label, members in (
            *((str(size), [at for at in found if sizes[at] == size]) for size in range(3, 10)),
            ("all", list(found)),
            ("with F", [at for at in found if (qm9.padded[at] == 9).any()]),
        ):
            if members:
                values = np.array([found[at] for at in members])
                cost = np.mean([seconds[*method, at] for at in members])
                lines.append(
                    [*method, label, len(values), f"{values.mean():.4f}", f"{values.std():.4f}",
                     f"{np.abs(values).max():.4f}", f"{cost:.0f}"]
                )  # fmt: skip
        if method == ("pyscf", "exact"):
            worst = [
                [qm9.ids[at], "".join(SYMBOLS[z] for z in qm9.molecule(at)[0] if z > 1),
                 f"{found[at]:.4f}"]
                for at in sorted(found, key=lambda at: -abs(found[at]))[:5]
            ]  # fmt: skip
    table(
        "B3LYP/6-31G(2df,p) against QM9's U0 - zpve, mHa",
        ["program", "with", "heavy atoms", "n", "mean", "sd", "max abs", "CPU s"],
        lines,
    )
    table("Furthest from QM9 without density fitting", ["gdb9_id", "heavy atoms", "mHa"], worst)
    offsets: list[list[object]] = []
    for method, found in deviations(qm9, rows).items():
        if len(found) < 2 * len(SYMBOLS):
            continue
        counts = np.array([[(qm9.padded[at] == z).sum() for z in SYMBOLS] for at in found])
        present = counts.any(axis=0)
        values = np.array(list(found.values()))
        fit = np.linalg.lstsq(counts[:, present].astype(float), values, rcond=None)[0]
        residual = values - counts[:, present] @ fit
        per_atom = dict(zip(np.array(list(SYMBOLS.values()))[present].tolist(), fit, strict=True))
        offsets.append(
            [*method, len(found),
             *(f"{per_atom[s]:.4f}" if s in per_atom else "-" for s in SYMBOLS.values()),
             f"{residual.std(ddof=int(present.sum())):.4f}"]
        )  # fmt: skip
    table(
        "The same for each atom, mHa: least squares",
        ["program", "with", "n", *SYMBOLS.values(), "residual sd"],
        offsets,
    )


def main() -> None:
    """Compute what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--file", type=Path, default=Path("dft_energies.jsonl"))
    arguments = parser.parse_args()
    qm9 = Qm9(data_folder() / "qm9" / "qm9_b3lyp_geometries.npz")
    rows: list[dict[str, Any]] = []
    if arguments.file.exists():
        rows = [json.loads(line) for line in arguments.file.read_text().splitlines()]
    if arguments.minutes > 0:
        compute(qm9, arguments.file, rows, arguments.minutes)
    show(qm9, rows)


if __name__ == "__main__":
    main()
