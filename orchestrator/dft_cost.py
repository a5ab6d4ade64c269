"""What DFT takes, by the number of basis functions: seconds and bytes, before anything has run.

Measured for B3LYP/6-31G(2df,p) with density fitting on a busy machine; see BENCHMARKS.md. Functions
are counted in that basis, which has the more for memory to be on the safe side with another one.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from kernels import basis
from kernels.calculators import DFT_DEF2

# A gradient of a relaxation takes so many seconds of CPU at 108 functions; how that grows.
_FUNCTIONS: Final = 108
_GRADIENT_S: Final = 9.0
_POWER: Final = 2.3
# Gradients of a relaxation from a force field's minimum for each function: of 54 molecules of QM9's
# kind at GFN2-xTB, 13 at 144 functions and 26 at 246 on average.
_RELAXATION: Final = 0.09
# Of those, what a relaxation takes that starts from a Hessian of another level.
_WITH_HESSIAN: Final = 0.4
# Bytes resident at the peak of a gradient: Python with its libraries, and for each function.
_MEMORY: Final = {"pyscf": (150e6, 5.6e6), "psi4": (60e6, 9.3e6)}
# Of those functions, what another basis has for organic molecules.
_SHARE: Final = {DFT_DEF2: 0.65}
# An atom in brackets, or one of those that need none; hydrogens by themselves are told apart.
_ATOM: Final = re.compile(r"\[[^\]]*\]|Cl|Br|[BCNOPSFIbcnops]")
_HYDROGEN: Final = re.compile(r"\[\d*H[H\d+-]*\]")
# Of QM9's atoms, where a molecule is still to be made.
_HEAVY_SHARE: Final = 0.49


@lru_cache(maxsize=1)
def _of_atoms() -> tuple[int, int]:
    """Return the basis functions of hydrogen, and of a heavier atom, which all have as many."""
    return basis.n_functions([1]), basis.n_functions([6])


def n_functions(smiles: str, n_atoms: int) -> int:
    """Return the basis functions of a molecule; of its composition's average without SMILES.

    An element that the basis lacks, whose molecule will fail, counts as one that it has.
    """
    heavy = round(_HEAVY_SHARE * n_atoms)
    if smiles:
        heavy = sum(not _HYDROGEN.match(atom) for atom in _ATOM.findall(smiles))
    light, heavier = _of_atoms()
    return heavier * heavy + light * max(0, n_atoms - heavy)


def item_s(kernel: str, level: str, initial_hessian: str = "unit") -> tuple[float, float]:
    """Return the power p and the factor f of f n^p, CPU seconds of an item of n functions."""
    gradient = _GRADIENT_S * (_SHARE.get(level, 1.0) / _FUNCTIONS) ** _POWER
    if kernel != "relax":
        return _POWER, gradient
    gradients = _RELAXATION * (1.0 if initial_hessian == "unit" else _WITH_HESSIAN)
    return _POWER + 1, gradients * gradient


def memory(functions: int, program: str) -> int:
    """Return the bytes that a worker takes at its peak, those of the program beside it included."""
    fixed, each = _MEMORY.get(program, _MEMORY["pyscf"])
    return int(fixed + each * functions)
