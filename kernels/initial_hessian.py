"""Where a relaxation's Hessian starts from: a cheaper surface's, at the starting geometry."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kernels.errors import HessianError, InputError, KernelError

# Curvatures in eV/Å² that a Hessian is held between: its softest motions are the least reliable,
# and steps along them the longest.
_SOFTEST, _STIFFEST = 1.0, 200.0

# Displacement of the finite differences of GFN2-xTB, Å.
_DISPLACEMENT = 5e-3


def force_field(smiles: str, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hessian (3N, 3N) in eV/Å² of MMFF94 or UFF at positions (N, 3) in Å, made safe to step with.

    Raises InputError where there are no bonds or no parameters, NotFiniteError.
    """
    from kernels.forcefield import Surface

    if not smiles:
        raise InputError(
            "initial_hessian 'force-field' needs the bonds, and no SMILES is known for this "
            "molecule; choose unit or gfn2"
        )
    return _bounded(Surface(smiles, positions).hessian(positions))


def gfn2(
    numbers: NDArray[np.uint8],
    positions: NDArray[np.float64],
    *,
    charge: int = 0,
    multiplicity: int = 1,
) -> NDArray[np.float64]:
    """Hessian (3N, 3N) in eV/Å² of GFN2-xTB at positions (N, 3) in Å, made safe to step with.

    Central differences of 6N gradients. Raises HessianError where GFN2-xTB has no answer.
    """
    from kernels.calculators import evaluate, make_calculator

    calculator = make_calculator(
        "GFN2-xTB", program="tblite", charge=charge, multiplicity=multiplicity
    )

    def gradient(moved: NDArray[np.float64]) -> NDArray[np.float64]:
        return -evaluate(calculator, numbers, moved)[1]

    try:
        return _bounded(central_differences(gradient, positions, _DISPLACEMENT))
    except KernelError as error:
        # Not its own class: no other setting of the relaxation's level would help.
        raise HessianError(
            f"initial_hessian 'gfn2' fails where the relaxation starts ({error}); choose unit or "
            "force-field"
        ) from error


def central_differences(
    gradient: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    positions: NDArray[np.float64],
    displacement: float,
) -> NDArray[np.float64]:
    """Symmetric Hessian (3N, 3N) from gradients (N, 3) at positions (N, 3) moved both ways."""
    rows = np.empty((positions.size, positions.size))
    for i in range(positions.size):
        moved = positions.copy()
        moved.flat[i] += displacement
        forward = gradient(moved)
        moved.flat[i] -= 2 * displacement
        rows[i] = (forward - gradient(moved)).ravel() / (2 * displacement)
    hessian: NDArray[np.float64] = 0.5 * (rows + rows.T)
    return hessian


def _bounded(hessian: NDArray[np.float64]) -> NDArray[np.float64]:
    curvature, modes = np.linalg.eigh(hessian)
    bounded = np.clip(np.abs(curvature), _SOFTEST, _STIFFEST)
    safe: NDArray[np.float64] = (modes * bounded) @ modes.T
    return safe
