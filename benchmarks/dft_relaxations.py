"""What saves gradients of B3LYP/6-31G(2df,p), and what a relaxation costs beside stock ASE's.

Molecules are QM9's, from MMFF94 geometries, relaxed to 0.03 eV/Å. CPU time of this process and of
those it started. Each relaxation is kept in a file as soon as it is done, so that the same command
goes on where it was stopped.

    python -m benchmarks.dft_relaxations screen                  # GFN1-xTB, all sizes
    python -m benchmarks.dft_relaxations options --grid coarse   # DFT, 27 molecules
    python -m benchmarks.dft_relaxations stock                   # against ASE's Psi4 calculator
    python -m benchmarks.dft_relaxations minima                  # Psi4's against PySCF's
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import ROOT, data_folder, table
from kernels import basis, psi4_engine
from kernels.calculators import DFT, DftSettings, make_calculator
from kernels.embedding import embed
from kernels.errors import KernelError
from kernels.forcefield import minimise
from kernels.graph import rdkit_molecule
from kernels.psi4_engine import FITTING_BASIS
from kernels.relaxation import RelaxSettings, relax_with_ladder
from kernels.units import HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM, HARTREE_TO_EV, KCAL_TO_EV

FMAX = 0.03

OPTIONS: dict[str, dict[str, Any]] = {
    "BFGS (published)": {},
    "BFGS, MMFF94's Hessian": {"initial_hessian": "force-field"},
    "BFGS, GFN2-xTB's Hessian": {"initial_hessian": "gfn2"},
    "Sella, internal": {"optimizer": "Sella", "coordinates": "internal"},
    "Sella, internal, MMFF94's Hessian": {
        "optimizer": "Sella",
        "coordinates": "internal",
        "initial_hessian": "force-field",
    },
    "Sella, internal, GFN2-xTB's Hessian": {
        "optimizer": "Sella",
        "coordinates": "internal",
        "initial_hessian": "gfn2",
    },
    "BFGS, GFN2-xTB's Hessian, coarse grid to 0.1 eV/Å": {
        "initial_hessian": "gfn2",
        "coarse_until": 0.1,
    },
}
PLAIN, BEST, BEST_COARSE = (
    "BFGS (published)",
    "BFGS, GFN2-xTB's Hessian",
    "BFGS, GFN2-xTB's Hessian, coarse grid to 0.1 eV/Å",
)

# Of two heavy atoms.
SMALLEST = ("C#N", "C#C", "C=O", "CO", "CC", "CN", "CF")
# QM9's cheapest of three and four heavy atoms, in the order of basis functions.
SMALL = (
    *("CC#N", "NC=O", "C1CO1", "CC=O", "C#CC", "N#CC#N", "CCO", "COC", "C1CC1", "N#CC=O"),
    *("C#CC=O", "O=CC=O", "CCC", "N#CCO", "N#CCN", "C#CCO", "COC=O", "O=CCO", "NC(N)=O", "CC(N)=O"),
)


class Gfn1:
    """GFN1-xTB by tblite: a cheap surface that is not the one the Hessian is of."""

    def __init__(self) -> None:
        self.n_evaluations = 0

    def evaluate(
        self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        """Return the energy in eV and the forces (N, 3) in eV/Å at positions (N, 3) in Å."""
        from tblite.interface import Calculator

        self.n_evaluations += 1
        library = Calculator(
            "GFN1-xTB", numbers.astype(int), positions / psi4_engine.BOHR_TO_ANGSTROM
        )
        library.set("verbosity", 0)
        result = library.singlepoint()
        gradient = result.get("gradient")
        return (
            float(result.get("energy")) * HARTREE_TO_EV,
            gradient * -HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM,
        )


class Kept:
    """Results by name in a file of JSON lines; what is there is not computed again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {tuple(row.pop("of")): row for row in map(json.loads, lines)}

    def get(
        self, of: tuple[str, ...], compute: Callable[..., dict[str, Any]], *given: Any
    ) -> dict[str, Any]:
        """Return the result of that name, what `compute` returns when `given` these."""
        if of not in self.rows:
            row = compute(*given)
            with self.path.open("a") as file:
                file.write(json.dumps({"of": of, **row}) + "\n")
            self.rows[of] = row
            print(*of, *(f"{row[k]:.6g}" for k in ("gradients", "cpu_s")), file=sys.stderr)
        return self.rows[of]


def cpu_s() -> float:
    """Return the CPU time of this process and of all that it has started and seen end."""
    own, others = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def start_of(smiles: str, kind: str = "mmff") -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return elements (N,) and positions (N, 3) in Å, of MMFF94's minimum or GFN2-xTB's."""
    made = embed(smiles, seed=1, max_attempts=50)
    positions = minimise(smiles, made.positions, max_steps=10_000).positions
    if kind == "gfn2":
        settings = RelaxSettings(fmax=0.01)
        done, _ = relax_with_ladder(
            made.numbers, positions, lambda: make_calculator("GFN2-xTB"), settings, ()
        )
        positions = done.positions
    return made.numbers, positions


def relaxed(
    smiles: str, make: Callable[..., Any], fields: Mapping[str, Any], start: Any = "mmff"
) -> dict[str, Any]:
    """Relax a molecule by Basin's kernel; a worker of Psi4 is started and ended within.

    `start` is a kind of geometry, or positions (N, 3) in Å.
    """
    numbers, positions = start_of(smiles, start if isinstance(start, str) else "mmff")
    if not isinstance(start, str):
        positions = start
    settings = RelaxSettings(**{"fmax": FMAX, **fields})
    psi4_engine._end_worker()
    started = cpu_s()
    done, _ = relax_with_ladder(numbers, positions, make, settings, (), smiles=smiles)
    psi4_engine._end_worker()
    return {
        "gradients": done.n_evaluations,
        "coarse": done.n_coarse,
        "cpu_s": cpu_s() - started,
        "energy_eV": done.energy,
        "fmax": float(done.fmax[-1]),
        "initial_energy_eV": float(done.energies[0]),
        "initial_fmax": float(done.fmax[0]),
        "positions": done.positions.tolist(),
    }


def dft(program: str, grid: str = "fine") -> Callable[..., Any]:
    """Return what makes a calculator at QM9's level."""
    return lambda **changes: make_calculator(DFT, program=program, **{"grid": grid, **changes})


def compare(kept: Kept, what: tuple[str, ...], molecules: list[str], names: list[str],
            make: Callable[..., Any], kind: str, title: str) -> None:  # fmt: skip
    """Relax every molecule with every option, and print the gradients of each beside BFGS's."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for smiles in molecules:
        for name in names:
            row = kept.get((*what, kind, smiles, name), relaxed, smiles, make, OPTIONS[name], kind)
            found[name].append(row)
    counts = {name: np.array([row["gradients"] for row in found[name]]) for name in names}
    seconds = {name: np.array([row["cpu_s"] for row in found[name]]) for name in names}
    ends = {name: np.array([row["energy_eV"] for row in found[name]]) for name in names}
    rows = []
    for name in names:
        above = (ends[name] - ends[names[0]]) / KCAL_TO_EV
        rows.append([
            name, f"{counts[name].mean():.1f}", f"{counts[name].max()}",
            f"{(counts[name] / counts[names[0]]).mean():.2f}",
            f"{seconds[name].sum() / seconds[names[0]].sum():.2f}",
            f"{np.median(above):+.3f} ({above.min():+.3f} to {above.max():+.3f})",
        ])  # fmt: skip
    table(
        f"{title}; {len(molecules)} molecules, from {kind} geometries",
        ["option", "gradients (mean)", "most", "gradients / BFGS's (mean)", "CPU / BFGS's (sum)",
         "end above BFGS's, kcal/mol: median (range)"],
        rows,
    )  # fmt: skip


def qm9_sample(n: int) -> list[str]:
    """Return n neutral closed-shell molecules of QM9 spread over all its sizes."""
    found = []
    lines = (data_folder() / "qm9" / "qm9_smiles.csv").read_text().split()[1:]
    # Half from the first thousand, which have up to six heavy atoms.
    for i in [*range(20, 1000, 2000 // n), *range(1000, len(lines), 2 * len(lines) // n)]:
        mol = rdkit_molecule(lines[i])
        plain = all(a.GetFormalCharge() == a.GetNumRadicalElectrons() == 0 for a in mol.GetAtoms())
        if plain:
            found.append(lines[i])
    return found


def screen(kept: Kept, arguments: argparse.Namespace) -> None:
    """Count the gradients of GFN1-xTB that each option takes."""
    names = [name for name in OPTIONS if name != BEST_COARSE]
    molecules = qm9_sample(arguments.molecules or 50)
    for kind in ("mmff", "gfn2"):
        usable = []
        for smiles in molecules:
            try:
                start_of(smiles, kind)
                usable.append(smiles)
            except KernelError as error:
                print(f"{smiles} left out: {error}", file=sys.stderr)
        compare(kept, ("screen",), usable, names[: 3 if kind == "gfn2" else None],
                lambda **_: Gfn1(), kind, "GFN1-xTB")  # fmt: skip


def options(kept: Kept, arguments: argparse.Namespace) -> None:
    """Compare options at QM9's level."""
    names = arguments.options or [PLAIN, "BFGS, MMFF94's Hessian", BEST]
    molecules = [*SMALLEST, *SMALL][: arguments.molecules or 27]
    program, grid = arguments.program, arguments.grid
    compare(kept, ("options", program, grid), molecules, names, dft(program, grid), arguments.start,
            f"{DFT} by {program}, {grid} grid")  # fmt: skip


def stock_python(folder: Path) -> str:
    """Return the interpreter of an environment with Psi4's own packages, numpy < 2 and ASE."""
    python = folder / "bin" / "python"
    if not python.exists():
        base = psi4_engine.find().python
        subprocess.run([base, "-m", "venv", "--system-site-packages", str(folder)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "numpy<2", "ase"], check=True
        )  # fmt: skip
    return str(python)


def stock_relaxed(smiles: str, python: str, *left_out: str) -> dict[str, Any]:
    """Relax a molecule by ASE's Psi4 calculator; CPU time without imports.

    Options of Psi4 are Basin's but for those left out, which are then Psi4's own.
    """
    numbers, positions = start_of(smiles)
    engine = psi4_engine.Psi4(DftSettings())
    path = engine.installation.path
    with tempfile.TemporaryDirectory(prefix="basin-stock-") as folder:
        text = basis.FILE.read_text().replace("cartesian", "spherical", 1)
        (Path(folder) / "basin-qm9.gbs").write_text(text)
        asked = {
            "paths": [path] if path else [],
            "numbers": numbers.tolist(),
            "positions": positions.tolist(),
            "basis": "basin-qm9",
            "fmax": FMAX,
            "options": {
                "df_basis_scf": FITTING_BASIS,
                **{k: v for k, v in engine._options(numbers).items() if k not in left_out},
            },
        }
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [python, str(Path(__file__).with_name("stock_psi4.py"))],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            cwd=folder,
            env={**environment, "PSIPATH": folder, "PSI_SCRATCH": folder},
        )
    if done.returncode:
        sys.exit(f"{python} failed on {smiles}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def stock(kept: Kept, arguments: argparse.Namespace) -> None:
    """Compare CPU time of whole relaxations with ASE's Psi4 calculator, side by side."""
    python = stock_python(Path(arguments.stock_env))
    of_psi4 = arguments.thresholds == "psi4"
    name = "ASE, Psi4's thresholds" if of_psi4 else "ASE"
    left_out = ("e_convergence", "d_convergence") if of_psi4 else ()
    rows = []
    sums = np.zeros(4)
    for smiles in SMALL[: arguments.molecules or 6]:
        found = [kept.get(("stock", smiles, name), stock_relaxed, smiles, python, *left_out)]
        for option in (PLAIN, BEST, BEST_COARSE):
            of = ("stock", smiles, "psi4", option)
            found.append(kept.get(of, relaxed, smiles, dft("psi4"), OPTIONS[option]))
        seconds = np.array([row["cpu_s"] for row in found])
        sums += seconds
        gap = (found[1]["energy_eV"] - found[0]["energy_eV"]) / KCAL_TO_EV
        rows.append([
            smiles, *(f"{row['gradients']}: {row['cpu_s']:.0f}" for row in found),
            *(f"{ratio:.2f}" for ratio in seconds[1:] / seconds[0]), f"{gap:+.4f}",
        ])  # fmt: skip
    rows.append([
        "all", *(f"{total:.0f}" for total in sums),
        *(f"{ratio:.2f}" for ratio in sums[1:] / sums[0]), "",
    ])  # fmt: skip
    heads = ["Basin, BFGS", "Basin, GFN2 Hessian", "and coarse grid first"]
    table(
        f"{DFT} by Psi4 to {FMAX} eV/Å: gradients: CPU s; ASE with the SCF thresholds of "
        f"{'Psi4' if of_psi4 else 'Basin'}",
        ["molecule", "ASE's Psi4 and BFGS", *heads, *(f"{h} / ASE" for h in heads),
         "Basin's BFGS ends above ASE's, kcal/mol"],
        rows,
    )  # fmt: skip


def minima(kept: Kept, arguments: argparse.Namespace) -> None:
    """Relax with Psi4, and from there with PySCF, which tells how far off Psi4's minimum was."""
    fields = {"initial_hessian": "gfn2", "fmax": 0.003}
    rows = []
    for smiles in ("O", "N", "C", *SMALLEST)[: arguments.molecules or 10]:
        first = kept.get(("minima", smiles, "psi4"), relaxed, smiles, dft("psi4"), fields)
        start = np.array(first["positions"])
        then = kept.get(("minima", smiles, "pyscf"), relaxed, smiles, dft("pyscf"), fields, start)
        fall = then["initial_energy_eV"] - then["energy_eV"]
        rows.append([
            smiles, first["gradients"], then["gradients"], f"{fall / KCAL_TO_EV:.5f}",
            f"{then['initial_fmax']:.4f}",
        ])  # fmt: skip
    table(
        f"{DFT}: Psi4's minimum above PySCF's, in PySCF's energy, both to 0.003 eV/Å",
        ["molecule", "gradients, Psi4", "PySCF from there", "kcal/mol",
         "PySCF's force at Psi4's minimum, eV/Å"],
        rows,
    )  # fmt: skip


def main() -> None:
    """Run one part and print its table."""
    parts = {"screen": screen, "options": options, "stock": stock, "minima": minima}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--kept", default=str(ROOT / "results" / "dft_relaxations.jsonl"))
    parser.add_argument("--molecules", type=int, help="the first so many")
    parser.add_argument("--options", nargs="+", choices=OPTIONS, help="of `options`")
    parser.add_argument("--program", choices=("pyscf", "psi4"), default="psi4")
    parser.add_argument("--grid", choices=("fine", "coarse"), default="fine")
    parser.add_argument("--start", choices=("mmff", "gfn2"), default="mmff")
    parser.add_argument(
        "--thresholds",
        choices=("basin", "psi4"),
        default="basin",
        help="of `stock`: of the SCF in ASE's calculator",
    )
    parser.add_argument(
        "--stock-env",
        default=str(ROOT / "results" / "stock-psi4"),
        help="folder of the environment for ASE's calculator, made where it is missing",
    )
    arguments = parser.parse_args()
    parts[arguments.part](Kept(Path(arguments.kept)), arguments)


if __name__ == "__main__":
    main()
