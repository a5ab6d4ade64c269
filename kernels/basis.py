"""Basis sets: QM9's 6-31G(2df,p), with six d and seven f functions, as data of the project, and
def2-SVP, which PySCF and Psi4 both have (Weigend and Ahlrichs, Phys. Chem. Chem. Phys. 2005, 7,
3297; with the effective core potentials that belong to it, for 28 electrons of iodine say).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from kernels.errors import InputError

FILE: Final = Path(__file__).parent / "basis_sets" / "qm9-6-31g-2df-p.gbs"

QM9: Final = "6-31G(2df,p)"
DEF2: Final = "def2-SVP"

_ANGULAR: Final = {"S": (0,), "P": (1,), "SP": (0, 1), "D": (2,), "F": (3,)}
_FUNCTIONS: Final = (1, 3, 6, 7)
_NUMBERS: Final = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}

# Up to an atomic number, the number of functions of def2-SVP: none for the lanthanides.
_DEF2_FUNCTIONS: Final = (
    (2, 5), (4, 9), (10, 14), (11, 15), (18, 18), (20, 24), (30, 31), (36, 32), (37, 24), (38, 23),
    (48, 31), (53, 26), (54, 50), (55, 24), (56, 23), (57, 32), (71, 0), (80, 32), (85, 26),
    (86, 50),
)  # fmt: skip

# An angular momentum, and the (exponent in bohr⁻², coefficient) of its primitives.
Shell = tuple[int, tuple[tuple[float, float], ...]]


@lru_cache(maxsize=1)
def shells() -> dict[int, list[Shell]]:
    """Map each atomic number that has the basis to its contracted shells."""
    found: dict[int, list[Shell]] = {}
    lines = iter(FILE.read_text().splitlines())
    atom = 0
    for line in lines:
        words = line.split()
        if len(words) == 2 and words[0] in _NUMBERS:
            atom = _NUMBERS[words[0]]
            found[atom] = []
        elif len(words) == 3 and words[0] in _ANGULAR:
            rows = [[float(word) for word in next(lines).split()] for _ in range(int(words[1]))]
            for column, momentum in enumerate(_ANGULAR[words[0]], start=1):
                found[atom].append((momentum, tuple((row[0], row[column]) for row in rows)))
    return found


@lru_cache(maxsize=2)
def _sizes(basis: str) -> dict[int, int]:
    """Map each atomic number that has the basis to its number of functions."""
    if basis == QM9:
        return {z: sum(_FUNCTIONS[shell[0]] for shell in held) for z, held in shells().items()}
    sizes: dict[int, int] = {}
    for last, size in _DEF2_FUNCTIONS:
        sizes |= dict.fromkeys(range(len(sizes) + 1, last + 1), size)
    return {z: size for z, size in sizes.items() if size}


def check(numbers: ArrayLike, basis: str = QM9) -> None:
    """Raise InputError where one of atoms `numbers` (N,) has no functions in `basis`."""
    known = _sizes(basis)
    missing = sorted({int(number) for number in np.asarray(numbers)} - known.keys())
    if not missing:
        return
    if basis == QM9:
        other = f"level B3LYP/{DEF2}" if missing[0] in _sizes(DEF2) else "another level, GFN2-xTB,"
        raise InputError(
            f"6-31G(2df,p) as in QM9 is defined for {', '.join(_NUMBERS)} only, not for atomic "
            f"number {missing[0]}; use {other} for this molecule and those compared with it"
        )
    raise InputError(
        f"{DEF2} is defined for H to Rn without Ce to Lu, not for atomic number {missing[0]}; "
        "leave this molecule out"
    )


def n_functions(numbers: ArrayLike, basis: str = QM9) -> int:
    """Return the number of basis functions of atoms `numbers` (N,); raises InputError."""
    check(numbers, basis)
    sizes = _sizes(basis)
    return sum(sizes[int(number)] for number in np.asarray(numbers))


def for_pyscf() -> dict[str, list[list[Any]]]:
    """Return QM9's basis by element symbol in PySCF's own form."""
    known = shells()
    return {
        symbol: [[momentum, *map(list, rows)] for momentum, rows in known[number]]
        for symbol, number in _NUMBERS.items()
    }
