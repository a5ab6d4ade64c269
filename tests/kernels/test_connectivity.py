import numpy as np
import pytest

from kernels.connectivity import bonds, changes
from kernels.embedding import embed
from kernels.graph import parse_smiles, rdkit_molecule

SMILES = [
    "CC(=O)Nc1ccc(O)cc1",
    "FC(F)(Cl)Br",
    "CS(=O)(=O)C",
    "COP(=O)(OC)OC",
    "C1CC2CC1C2",
    "N#CC#N",
    "OO",
    "NN",
    "C[Si](C)(C)I",
    "[H][H]",
    "FF",
]


@pytest.mark.parametrize("text", SMILES)
def test_distances_find_the_bonds_of_the_graph(text: str) -> None:
    smiles = parse_smiles(text).smiles
    made = embed(smiles, seed=5, max_attempts=50)
    graph = sorted(
        sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))
        for bond in rdkit_molecule(smiles).GetBonds()
    )
    assert bonds(made.numbers, made.positions).tolist() == graph


def test_a_pulled_hydrogen_is_a_broken_bond() -> None:
    numbers = np.array([8, 1, 1])
    water = np.array([[0.0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]])
    far = water.copy()
    far[1, 2] = 2.5
    broken, formed = changes(numbers, water, far)
    assert broken.tolist() == [[0, 1]]
    assert formed.shape == (0, 2)
    broken, formed = changes(numbers, far, water)
    assert broken.shape == (0, 2)
    assert formed.tolist() == [[0, 1]]


def test_drifting_over_one_limit_is_no_change() -> None:
    numbers = np.array([6, 6])
    near, far = np.zeros((2, 3)), np.zeros((2, 3))
    near[1, 0], far[1, 0] = 1.88, 1.92
    assert len(bonds(numbers, near)) == 1
    assert len(bonds(numbers, far)) == 0
    assert all(len(pairs) == 0 for pairs in changes(numbers, near, far))


def test_a_lone_atom_has_no_bonds() -> None:
    assert bonds([2], np.zeros((1, 3))).shape == (0, 2)
