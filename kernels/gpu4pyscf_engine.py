"""B3LYP/6-31G(2df,p) on a GPU by gpu4pyscf; imported only when a calculator is made.

Written after the interface of gpu4pyscf 1.9 and PySCF 2.14 (https://pyscf.org/user/gpu.html), and
not run on a GPU so far. Its own SCF classes cannot be kept to six d and seven f functions as
PySCF's can: d functions are five here, as in Psi4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyscf import dft

from kernels.errors import InputError
from kernels.pyscf_engine import PySCF


def require_gpu() -> None:
    """Raise InputError where gpu4pyscf cannot be loaded, or sees no GPU."""
    try:
        import cupy  # type: ignore[import-not-found]
        import gpu4pyscf  # type: ignore[import-not-found]  # noqa: F401

        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # what CUDA's libraries raise is their own
        raise InputError(
            f"program 'gpu4pyscf' cannot be loaded ({error}); pip install gpu4pyscf-cuda12x "
            "cutensor-cu12, for the CUDA that is there"
        ) from error
    if not devices:
        raise InputError(
            "program 'gpu4pyscf' sees no GPU; run the stage on a pool that has some (`pool`)"
        )


class GPU4PySCF(PySCF):
    """B3LYP/6-31G(2df,p) with five d functions by gpu4pyscf, otherwise as by PySCF."""

    _cartesian = False

    def _method(self, mol: Any) -> Any:
        return (dft.RKS if self.settings.multiplicity == 1 else dft.UKS)(mol).to_gpu()

    def _field(self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]) -> Any:
        field = super()._field(numbers, positions)
        # Of zero it would make an iteration more.
        field.level_shift = self.settings.level_shift or None
        field.damp = self.settings.damping or None
        return field
