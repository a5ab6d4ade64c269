"""Minimisation by a classical force field: MMFF94, or UFF where MMFF94 has no parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import CollapsedError, ConvergenceError, InputError, NotFiniteError
from kernels.graph import rdkit_molecule
from kernels.initial_hessian import central_differences
from kernels.units import KCAL_TO_EV

if TYPE_CHECKING:
    from rdkit import Chem

VERSION = 1

ForceFieldName = Literal["MMFF94", "UFF"]


@dataclass(frozen=True, slots=True)
class ForceFieldResult:
    """A minimum: `positions` (N, 3) in Å, energies in eV, `iterations` of RDKit's minimiser."""

    force_field: ForceFieldName
    positions: NDArray[np.float64]
    energy_eV: float
    initial_energy_eV: float
    iterations: int


def minimise(smiles: str, positions: ArrayLike, *, max_steps: int) -> ForceFieldResult:
    """Minimise `positions` (N, 3) in Å, given in the canonical order of `smiles`.

    MMFF94 (Halgren, J. Comput. Chem. 1996, 17, 490) when it has every parameter, UFF (Rappé et
    al., J. Am. Chem. Soc. 1992, 114, 10024) otherwise; the result says which. Raises InputError
    when neither covers the molecule, ConvergenceError after `max_steps`, NotFiniteError.
    """
    # MinimizeTrajectory returns objects of this module and does not import it.
    from rdkit.Chem import rdtrajectory  # noqa: F401

    if max_steps < 1:
        raise InputError(f"max_steps {max_steps} is impossible; give 1 or more")
    mol = _placed(smiles, positions)
    name = force_field_name(mol)
    if name is None:
        raise InputError(
            f"neither MMFF94 nor UFF has parameters for {smiles!r}; relax it from a geometry "
            "with GFN2-xTB instead"
        )
    # `mol` must outlive the force field: RDKit keeps a bare pointer to its conformer.
    field = build(mol, name)
    before = float(field.CalcEnergy())
    if not np.isfinite(before):
        raise CollapsedError(
            f"{name} energy of {smiles!r} is {before} at the start; atoms coincide"
        )
    unfinished, snapshots = field.MinimizeTrajectory(1, max_steps)
    after = float(field.CalcEnergy())
    final = np.array(mol.GetConformer().GetPositions(), dtype=np.float64)
    if not (np.isfinite(after) and np.isfinite(final).all()):
        raise NotFiniteError(f"{name} minimisation of {smiles!r} ended at energy {after}")
    if unfinished:
        raise ConvergenceError(
            f"{name} minimisation of {smiles!r} not converged after {max_steps} steps; "
            "raise max_steps"
        )
    return ForceFieldResult(
        force_field=name,
        positions=final,
        energy_eV=after * KCAL_TO_EV,
        initial_energy_eV=before * KCAL_TO_EV,
        iterations=len(snapshots),
    )


def _placed(smiles: str, positions: ArrayLike) -> Chem.Mol:
    """Return a molecule of its own with `positions` (N, 3) in Å as its only conformer."""
    from rdkit import Chem

    mol = Chem.Mol(rdkit_molecule(smiles))
    conformer = Chem.Conformer(mol.GetNumAtoms())
    conformer.SetPositions(checked_positions(mol.GetNumAtoms(), positions))
    mol.RemoveAllConformers()
    mol.AddConformer(conformer, assignId=True)
    return mol


class Surface:
    """The force field of one molecule as a function of its geometry: gradient and Hessian.

    Positions (N, 3) in Å, in the canonical order of `smiles`. Raises InputError where neither
    MMFF94 nor UFF has all parameters.
    """

    # Displacement of the finite differences, Å: what they miss is far below what they are for.
    _DISPLACEMENT = 1e-3

    def __init__(self, smiles: str, positions: ArrayLike) -> None:
        self._mol = _placed(smiles, positions)
        name = force_field_name(self._mol)
        if name is None:
            raise InputError(f"neither MMFF94 nor UFF has parameters for {smiles!r}")
        self.name: ForceFieldName = name
        self._field = build(self._mol, name)

    def gradient(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Gradient of the energy (N, 3) in eV/Å."""
        flat = positions.ravel().tolist()
        # Its distances are those of the last energy: without one the gradient is of old ones.
        self._field.CalcEnergy(flat)
        gradient = np.array(self._field.CalcGrad(flat), dtype=np.float64).reshape(-1, 3)
        return gradient * KCAL_TO_EV

    def hessian(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Second derivatives of the energy (3N, 3N) in eV/Å², by central differences.

        Raises NotFiniteError where atoms coincide.
        """
        hessian = central_differences(self.gradient, positions, self._DISPLACEMENT)
        if not np.isfinite(hessian).all():
            raise NotFiniteError(f"{self.name} has no finite curvature there; atoms coincide")
        return hessian


def compliance(
    hessian: NDArray[np.float64], positions: NDArray[np.float64], softest: float
) -> NDArray[np.float64]:
    """Inverse (3N, 3N) in Å²/eV of a Hessian in eV/Å², without translation and rotation.

    Curvatures enter by their size and count as `softest` eV/Å² at least, so that the answer to a
    force stays finite and downhill, also at a saddle.
    """
    inner = _inner(positions)
    curvature, modes = np.linalg.eigh(inner @ hessian @ inner)
    inverse = (modes / np.maximum(np.abs(curvature), softest)) @ modes.T
    answer: NDArray[np.float64] = inner @ inverse @ inner
    return answer


def _inner(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Projector (3N, 3N) that takes translation and rotation out of a displacement."""
    centred = positions - positions.mean(axis=0)
    axes = np.eye(3)
    rigid = [np.tile(axis, (len(centred), 1)).ravel() for axis in axes]
    rigid += [np.cross(axis, centred).ravel() for axis in axes]
    vectors, sizes, _ = np.linalg.svd(np.array(rigid).T, full_matrices=False)
    # An atom alone and a linear molecule have fewer than six rigid motions.
    vectors = vectors[:, sizes > 1e-6 * sizes[0]]
    projector: NDArray[np.float64] = np.eye(centred.size) - vectors @ vectors.T
    return projector


def force_field_name(mol: Chem.Mol) -> ForceFieldName | None:
    """Name the force field that covers a molecule with explicit hydrogens, None if none does."""
    from rdkit.Chem import rdForceFieldHelpers

    with _quiet():
        if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
            return "MMFF94"
        if rdForceFieldHelpers.UFFHasAllMoleculeParams(mol):
            return "UFF"
    return None


def build(mol: Chem.Mol, name: ForceFieldName) -> Any:
    """Build RDKit's force field on the first conformer of `mol`, which must outlive it."""
    from rdkit.Chem import rdForceFieldHelpers

    with _quiet():
        if name == "MMFF94":
            properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(mol, mmffVariant="MMFF94")
            field = rdForceFieldHelpers.MMFFGetMoleculeForceField(mol, properties)
        else:
            field = rdForceFieldHelpers.UFFGetMoleculeForceField(mol)
    if field is None:
        raise InputError(f"RDKit could not build {name} for this molecule")
    field.Initialize()
    return field


def checked_positions(n_atoms: int, positions: ArrayLike) -> NDArray[np.float64]:
    """Return `positions` as a fresh finite (n_atoms, 3) array in Å, or raise."""
    xyz = np.array(positions, dtype=np.float64, order="C")
    if xyz.shape != (n_atoms, 3):
        raise InputError(f"positions have shape {xyz.shape}; expected ({n_atoms}, 3)")
    if not np.isfinite(xyz).all():
        raise NotFiniteError("positions contain NaN or infinity")
    return xyz


@contextmanager
def _quiet() -> Iterator[None]:
    from rdkit import rdBase

    with rdBase.BlockLogs():
        yield
