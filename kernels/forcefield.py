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
    from rdkit import Chem

    # MinimizeTrajectory returns objects of this module and does not import it.
    from rdkit.Chem import rdtrajectory  # noqa: F401

    if max_steps < 1:
        raise InputError(f"max_steps {max_steps} is impossible; give 1 or more")
    mol = Chem.Mol(rdkit_molecule(smiles))
    xyz = checked_positions(mol.GetNumAtoms(), positions)
    conformer = Chem.Conformer(mol.GetNumAtoms())
    conformer.SetPositions(xyz)
    mol.RemoveAllConformers()
    mol.AddConformer(conformer, assignId=True)
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
