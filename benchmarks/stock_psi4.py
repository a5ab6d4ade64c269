"""A relaxation by ASE alone: its Psi4 calculator and its BFGS, every SCF from the start.

Run by an interpreter with psi4, ASE and a numpy that this Psi4 can work with; nothing of Basin is
imported. `dft_relaxations` starts it with one JSON object on standard input and reads one from the
last line of standard output.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Relax the molecule asked for."""
    asked = json.load(sys.stdin)
    sys.path.extend(asked["paths"])
    from ase import Atoms
    from ase.calculators.psi4 import Psi4
    from ase.optimize import BFGS

    atoms: Any = Atoms(asked["numbers"], asked["positions"])
    calculator: Any = Psi4(  # type: ignore[no-untyped-call]
        atoms=atoms, method="b3lyp", basis=asked["basis"], memory="2 GB", num_threads=1
    )
    # The calculator passes on no option of the SCF or the grid, so it takes Psi4's own call.
    calculator.psi4.set_options(asked["options"])
    atoms.calc = calculator
    started = time.process_time()
    optimizer: Any = BFGS(atoms, logfile=None)  # type: ignore[no-untyped-call]
    optimizer.run(fmax=asked["fmax"], steps=200)
    done = {
        "cpu_s": time.process_time() - started,
        "gradients": optimizer.nsteps + 1,
        "energy_eV": float(atoms.get_potential_energy()),
    }
    print("\n" + json.dumps(done))


if __name__ == "__main__":
    main()
