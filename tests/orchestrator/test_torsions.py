"""Rotatable bonds of real molecules, and angles set by RDKit read back."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem, rdMolTransforms

from orchestrator.torsions import circular_deviation, dihedrals, overlap, rotatable


def geometry(smiles: str) -> tuple[Chem.Mol, np.ndarray, np.ndarray]:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(mol, randomSeed=7)
    numbers = np.array([a.GetAtomicNum() for a in mol.GetAtoms()], np.uint8)
    return mol, numbers, mol.GetConformer().GetPositions()


@pytest.mark.parametrize(
    ("smiles", "bonds"),
    [
        ("CCO", [(1, 2)]),  # the hydroxyl turns; a methyl group is the same after 120 degrees
        ("CCCC", [(1, 2)]),
        ("CCCN", [(1, 2)]),
        ("C1CCCCC1", []),
        ("C1CCCCC1CO", [(5, 6), (6, 7)]),
        ("C=CC=C", [(1, 2)]),
        ("CC#CC", []),
        ("CC", []),
    ],
)
def test_bonds_that_turn(smiles: str, bonds: list[tuple[int, int]]) -> None:
    _, numbers, positions = geometry(smiles)
    assert [torsion.atoms[1:3] for torsion in rotatable(numbers, positions, smiles)] == bonds


def test_without_a_smiles_bonds_come_from_distances() -> None:
    _, numbers, positions = geometry("COCCO")
    named = [torsion.name for torsion in rotatable(numbers, positions, "COCCO")]
    assert named == ["C1–O2–C3–C4", "O2–C3–C4–O5", "C3–C4–O5–H13"]
    assert [torsion.name for torsion in rotatable(numbers, positions)] == named


def test_angles_are_those_that_were_set() -> None:
    mol, numbers, positions = geometry("CCCC")
    (torsion,) = rotatable(numbers, positions, "CCCC")
    wanted = [-179.0, -60.0, 0.5, 65.0, 120.0]
    frames = []
    for angle in wanted:
        rdMolTransforms.SetDihedralDeg(mol.GetConformer(), *torsion.atoms, angle)
        frames.append(mol.GetConformer().GetPositions())
    assert dihedrals(np.array(frames), [torsion])[0] == pytest.approx(wanted, abs=1e-6)
    assert dihedrals(np.array(frames), []).shape == (0, 5)


def test_spread_and_overlap_know_the_circle() -> None:
    rng = np.random.default_rng(0)
    around = (180.0 + 10.0 * rng.standard_normal(4000) + 180.0) % 360.0 - 180.0
    assert circular_deviation(around) == pytest.approx(10.0, rel=0.05)
    assert circular_deviation(np.array([-170.0, 170.0])) < 15.0
    assert np.isnan(circular_deviation(np.zeros(0)))
    assert overlap(around, around) == pytest.approx(1.0)
    assert overlap(around, around - np.sign(around) * 90.0) < 0.01
    assert np.isnan(overlap(around, np.zeros(0)))
