"""The basis set of QM9, 6-31G(2df,p) with six d and seven f functions, as data of the project."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from kernels.errors import InputError

FILE: Final = Path(__file__).parent / "basis_sets" / "qm9-6-31g-2df-p.gbs"

_ANGULAR: Final = {"S": (0,), "P": (1,), "SP": (0, 1), "D": (2,), "F": (3,)}
_FUNCTIONS: Final = (1, 3, 6, 7)
_NUMBERS: Final = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}

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


def check(numbers: ArrayLike) -> None:
    """Raise InputError where one of atoms `numbers` (N,) has no functions in this basis."""
    known = shells()
    missing = sorted({int(number) for number in np.asarray(numbers)} - known.keys())
    if missing:
        raise InputError(
            f"6-31G(2df,p) as in QM9 is defined for {', '.join(_NUMBERS)} only, not for atomic "
            f"number {missing[0]}; use another level, GFN2-xTB say, for this molecule"
        )


def n_functions(numbers: ArrayLike) -> int:
    """Return the number of basis functions of atoms `numbers` (N,); raises InputError."""
    check(numbers)
    size = {atom: sum(_FUNCTIONS[shell[0]] for shell in held) for atom, held in shells().items()}
    return sum(size[int(number)] for number in np.asarray(numbers))


def for_pyscf() -> dict[str, list[list[Any]]]:
    """Return the basis by element symbol in PySCF's own form."""
    known = shells()
    return {
        symbol: [[momentum, *map(list, rows)] for momentum, rows in known[number]]
        for symbol, number in _NUMBERS.items()
    }
