"""The physics of chains: mean energies of ten molecules below 50 K against (3N-6)/2 kB T.

Runs Metropolis chains of the flexible QM9 molecules with few atoms that come first, through a
campaign of its own in a temporary folder, or with `--store` in one that is kept and gone on with.

    python -m benchmarks.boltzmann [--molecules 10] [--steps 24000] [--store DIR]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import ROOT, cores, table
from orchestrator.boltzmann import analyse, deviations, levels
from orchestrator.boltzmann_tables import check_line
from orchestrator.ladders import rung_of
from orchestrator.store import Store

# Flexible by the published rule, from 9 to 17 atoms.
MOLECULES = (
    "CCO", "COC", "CCC", "CCCO", "CCOC", "OCCO", "CCN", "CC(C)O", "COCCO", "CCOCC",
)  # fmt: skip
TEMPERATURES = (10, 20, 30, 40)

CAMPAIGN = """
name = "boltzmann-physics"
store = "{store}"
[molecules]
files = ["{molecules}"]
[[stages]]
kernel = "embed"
[[stages]]
kernel = "mmff"
[[stages]]
name = "ground"
kernel = "relax"
fmax = 0.001
max_steps = 2000
[[stages]]
kernel = "metropolis"
temperatures = {temperatures}
steps = {steps}
burn_in = {burn_in}
"""


def run(folder: Path, molecules: int, steps: int, burn_in: int) -> Store:
    """Run the campaign in a folder, or go on with it; return its store."""
    names = "".join(f"{smiles} {smiles}\n" for smiles in MOLECULES[:molecules])
    (folder / "molecules.smi").write_text(names)
    campaign = folder / "boltzmann.toml"
    campaign.write_text(
        CAMPAIGN.format(
            store=folder / "store",
            molecules=folder / "molecules.smi",
            temperatures=list(TEMPERATURES),
            steps=steps,
            burn_in=burn_in,
        )
    )
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(campaign)]
    done = subprocess.run([*command, "--workers", str(cores())], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"benchmark did not run: basin run ended with {done.returncode}")
    return Store(folder / "store")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--molecules", type=int, default=len(MOLECULES))
    parser.add_argument("--steps", type=int, default=24000)
    parser.add_argument("--burn-in", type=int, default=5000)
    parser.add_argument("--store", type=Path, help="folder to keep the campaign and its store in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.store.absolute() if options.store else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = analyse(run(folder, options.molecules, options.steps, options.burn_in))
    name = found.thermal
    if name is None:
        sys.exit("benchmark has nothing to show: no chain has finished")
    rows = []
    for subject, ladder in found.of(name):
        cells = []
        for temperature in TEMPERATURES:
            rung = rung_of(ladder, temperature)
            ratio, error = deviations(subject, rung) if rung else (float("nan"), float("nan"))
            worth = rung.found.effective if rung else float("nan")
            cells.append(f"{ratio:.3f} ± {error:.3f} ({(ratio - 1) / error:+.1f} SE, {worth:.0f})")
        rows.append([subject.name, subject.n_atoms, *cells])
    mean = [f"{row.ratio.value:.3f}" for row in levels(found, name)]
    table(
        "Mean energy above the minimum over (3N-6)/2 kB T (standard errors off, effective samples)",
        ["molecule", "atoms", *(f"{t} K" for t in TEMPERATURES)],
        [*rows, ["mean", "", *mean]],
    )
    print(f"\n{check_line(found)}")


if __name__ == "__main__":
    main()
