"""CPU time and peak memory of a B3LYP/6-31G(2df,p) gradient, by the number of basis functions.

``python -m benchmarks.dft_resources [--program pyscf] [SMILES ...]``: each molecule in a process of
its own, from its MMFF94 minimum, with an SCF from atomic densities; against what
`orchestrator.dft_cost` expects.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from kernels.calculators import DFT
from orchestrator import dft_cost

MOLECULES = ("O", "CO", "CCO", "CCCCO", "Cc1ccccc1O")
# What a stage with the default memory limit of 4 GB tells its program to use.
MEMORY = 2_400_000_000


def measure(smiles: str, program: str) -> str:
    """Return functions, CPU seconds and peak bytes of one gradient, of Psi4's process included."""
    from kernels import basis
    from kernels.calculators import make_calculator
    from kernels.embedding import embed
    from kernels.forcefield import minimise
    from orchestrator.child import family
    from orchestrator.kernel_calls import cpu_outside_s

    made = embed(smiles, seed=1, max_attempts=50)
    start = minimise(smiles, made.positions, max_steps=2000)
    calculator = make_calculator(DFT, program=program, memory=MEMORY)
    before = time.process_time() + cpu_outside_s()
    calculator.evaluate(made.numbers, start.positions)  # type: ignore[attr-defined]
    spent = time.process_time() + cpu_outside_s() - before
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for pid in family(os.getpid())[1:]:
        status = Path(f"/proc/{pid}/status").read_text()
        peak += 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return f"{basis.n_functions(made.numbers)} {spent} {peak}"


def main() -> None:
    """Print the table, or with --one what one molecule takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("smiles", nargs="*", default=MOLECULES)
    parser.add_argument("--program", default="pyscf")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(measure(asked.smiles[0], asked.program))
        return
    print("| molecule | functions | CPU s | expected s | peak MB | reserved MB |")
    print("|---|---|---|---|---|---|")
    power, factor = dft_cost.item_s("gradient", DFT)
    for smiles in asked.smiles:
        command = [sys.executable, "-m", "benchmarks.dft_resources", "--one"]
        command += ["--program", asked.program, smiles]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        functions, spent, peak = done.stdout.split()
        n = int(functions)
        print(
            f"| {smiles} | {n} | {float(spent):.1f} | {factor * n**power:.1f} "
            f"| {int(peak) / 1e6:.0f} | {dft_cost.memory(n, asked.program) / 1e6:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
