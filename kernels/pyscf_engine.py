"""B3LYP by PySCF in QM9's 6-31G(2df,p) or def2-SVP; imported only when a calculator is made.

PySCF has either spherical or cartesian functions, QM9's basis six d and seven f. The molecule is
therefore cartesian, and the orbitals are kept to the space in which each f shell has only its
seven spherical combinations: everything else is PySCF's own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

# Read when the library loads, as in `kernels.engines`.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from pyscf import df, dft, gto, lib
from pyscf.dft import numint
from pyscf.scf import hf
from scipy.linalg import block_diag  # type: ignore[import-untyped,unused-ignore]

from kernels import basis
from kernels.calculators import GRIDS
from kernels.dft_engine import DftEngine, Orbitals
from kernels.errors import NotFiniteError, ResourceError, ScfError
from kernels.units import HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM, HARTREE_TO_EV

# Else every calculation begins with a file in the temporary directory, which a kill leaves there.
hf.MUTE_CHKFILE = True

# With VWN's third functional, as in Gaussian; "b3lyp" depends on the user's configuration.
_FUNCTIONAL: Final = "b3lypg"
_AUXILIARY: Final = "def2-universal-jkfit"
# Krypton: the elements beyond have effective core potentials in def2-SVP.
_LAST_WITHOUT: Final = 36
# Change of the energy in hartree; norm of the orbital gradient, which the error of forces follows.
_TOLERANCES: Final = (1e-9, 1e-5)
# Of the memory: PySCF keeps the integrals there when they leave room for the rest.
_SHARE_OF_FITTING: Final = 0.6
# Points of the grid at a time.
_POINTS: Final = 16 * numint.BLKSIZE
_LEAST_OVERLAP: Final = 1e-9
_MOST_DESCENTS: Final = 10


class _Qm9Functions:
    """What keeps orbitals to six d and seven f functions; mixed into PySCF's SCF classes."""

    mol: Any

    def check_linear_dependency(self, s: NDArray[np.float64], verbose: Any = None) -> Any:
        """Return orthonormal orbitals (cartesian functions, functions) that span the basis."""
        mixed = block_diag(*_combinations(self.mol))
        eigenvalues, vectors = np.linalg.eigh(mixed.T @ s @ mixed)
        if eigenvalues[0] < _LEAST_OVERLAP:
            raise NotFiniteError("pyscf: basis functions coincide; the geometry is unphysical")
        return mixed @ (vectors / np.sqrt(eigenvalues))

    def _eigh(self, h: Any, s: Any, overwrite: bool = False, x: Any = None) -> Any:
        # Not every caller gives the orthonormal orbitals.
        x = self.check_linear_dependency(s) if x is None else x
        return super()._eigh(h, s, overwrite, x)  # type: ignore[misc]


class _Restricted(_Qm9Functions, dft.rks.RKS):  # type: ignore[misc]
    pass


class _Unrestricted(_Qm9Functions, dft.uks.UKS):  # type: ignore[misc]
    pass


class _Integration(numint.NumInt):  # type: ignore[misc]
    """PySCF's, on so few points at a time that their functions stay in the processor's cache.

    As many as memory has room for, as PySCF would take, cost up to a quarter more time; and the
    sums would depend on how much memory happens to be free.
    """

    def block_loop(
        self,
        mol: Any,
        grids: Any,
        nao: int | None = None,
        deriv: int = 0,
        max_memory: float = 2000,
        non0tab: Any = None,
        blksize: int | None = None,
        buf: Any = None,
    ) -> Any:
        return super().block_loop(
            mol, grids, nao, deriv, max_memory, non0tab, blksize or _POINTS, buf
        )


def _combinations(mol: Any) -> list[NDArray[np.float64]]:
    """Return, shell by shell, the functions (cartesian, kept) that the basis has."""
    to_spherical = gto.cart2sph(3, normalized="sp")
    kept = {0: np.eye(1), 1: np.eye(3), 2: np.eye(6), 3: to_spherical}
    shells = range(mol.nbas)
    return [kept[mol.bas_angular(i)] for i in shells for _ in range(mol.bas_nctr(i))]


class PySCF(DftEngine):
    """B3LYP by PySCF, with six d functions in QM9's basis."""

    _cartesian = True

    def evaluate(
        self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        energy, field = self._converged(numbers, positions)
        with _failures():
            gradient = field.nuc_grad_method()
            # Else forces are off by 0.001 eV/Å, as the grid moves with the atoms; costs nothing.
            gradient.grid_response = True
            forces = -_host(gradient.kernel())
        return energy, forces * HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM

    def energy(self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]) -> float:
        return self._converged(numbers, positions)[0]

    def _converged(
        self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]
    ) -> tuple[float, Any]:
        """Return the energy in eV, and PySCF's object for the forces."""
        settings = self.settings
        start = self._begin(numbers)
        self.iterations = 0
        with _failures():
            field = self._field(numbers, positions)
            field.kernel(_density(field.mol, start) if start else None)
            if settings.second_order:
                _descend(field)
            energy = float(field.e_tot)
        if not field.converged:
            raise ScfError(
                f"pyscf: SCF not converged in {settings.max_iterations} iterations; raise their "
                "number, the level shift or the damping"
            )
        self._orbitals = _occupied(field)
        return energy * HARTREE_TO_EV, field

    def _field(self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]) -> Any:
        settings = self.settings
        qm9 = settings.basis == basis.QM9
        mol = gto.M(
            atom=list(zip(numbers.tolist(), positions.tolist(), strict=True)),
            unit="Angstrom",
            basis=basis.for_pyscf() if qm9 else settings.basis,
            # Named for the elements that have one: PySCF would print a line for each other.
            ecp={} if qm9 else {int(z): settings.basis for z in set(numbers) if z > _LAST_WITHOUT},
            charge=settings.charge,
            spin=settings.multiplicity - 1,
            cart=qm9 and self._cartesian,
            verbose=0,
            max_memory=settings.memory / 1e6,
        )
        field = self._method(mol)
        field.xc = _FUNCTIONAL
        if settings.density_fitting:
            field = field.density_fit(auxbasis=_AUXILIARY)
            _check_memory(mol, settings.memory)
        field.grids.atom_grid = GRIDS[settings.grid]
        field.init_guess = {"atomic": "minao", "huckel": "huckel"}[settings.guess]
        field.level_shift = settings.level_shift
        field.damp = settings.damping
        if settings.second_order:
            field = field.newton()
        field.conv_tol, field.conv_tol_grad = _TOLERANCES
        field.max_cycle = settings.max_iterations
        field.callback = self._count
        # No last iteration after the last: it would only take a level shift from orbital energies.
        field.conv_check = False
        return field

    def _method(self, mol: Any) -> Any:
        """Return the SCF of a molecule, kept to QM9's functions where the basis is QM9's."""
        qm9 = self.settings.basis == basis.QM9
        restricted, unrestricted = (_Restricted, _Unrestricted) if qm9 else (dft.RKS, dft.UKS)
        field = (restricted if self.settings.multiplicity == 1 else unrestricted)(mol)
        field._numint = _Integration()
        return field

    def _count(self, _: Any) -> None:
        self.iterations += 1


def _density(mol: Any, start: Orbitals) -> NDArray[np.float64]:
    """Return the density matrix of a geometry's orbitals, made orthonormal where the atoms are."""
    overlap = mol.intor_symmetric("int1e_ovlp")
    coefficients, densities = [], []
    for orbitals in start:
        eigenvalues, vectors = np.linalg.eigh(orbitals.T @ overlap @ orbitals)
        orthonormal = orbitals @ (vectors / np.sqrt(eigenvalues)) @ vectors.T
        coefficients.append(orthonormal)
        densities.append(orthonormal @ orthonormal.T)
    if len(start) == 2:
        return np.array(densities)
    # From the orbitals PySCF has the density on the grid in a fraction of the time.
    occupations = np.full(coefficients[0].shape[1], 2.0)
    density: NDArray[np.float64] = lib.tag_array(
        2 * densities[0], mo_coeff=coefficients[0], mo_occ=occupations
    )
    return density


def _descend(field: Any) -> None:
    """Follow a second-order SCF, which stops at saddle points too, down to a minimum."""
    for _ in range(_MOST_DESCENTS):
        if not field.converged:
            return
        orbitals, _, stable, _ = field.stability(return_status=True)
        if stable:
            return
        field.kernel(orbitals, field.mo_occ)


def _check_memory(mol: Any, memory: int) -> None:
    """Refuse what PySCF would put on disk, where it would stay after a kill, and be slow."""
    n = mol.nao_nr()
    auxiliary = df.addons.make_auxmol(mol, _AUXILIARY).nao_nr()
    needed = 8 * auxiliary * n * (n + 1) // 2
    if needed > _SHARE_OF_FITTING * memory:
        raise ResourceError(
            f"pyscf: density fitting with {n} functions needs {needed / 1e6:.0f} MB for its "
            f"integrals; give {needed / _SHARE_OF_FITTING / 1e9:.1f} GB of memory or more"
        )


@contextmanager
def _failures() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # PySCF's Hückel orbitals use what PySCF itself calls old.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except MemoryError as error:
        raise ResourceError(f"pyscf: {error}; give more memory") from error
    except np.linalg.LinAlgError as error:
        raise NotFiniteError(f"pyscf: {error}; the geometry is unphysical") from error


def _host(array: Any) -> NDArray[np.float64]:
    """Return an array that may be a GPU's as one of this machine's memory."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def _occupied(field: Any) -> Orbitals:
    coefficients, occupations = _host(field.mo_coeff), _host(field.mo_occ)
    if coefficients.ndim == 2:
        return (coefficients[:, occupations > 0],)
    return tuple(c[:, o > 0] for c, o in zip(coefficients, occupations, strict=True))
