import subprocess
import sys

import numpy as np
import pytest

from kernels.connectivity import bonds
from kernels.embedding import embed
from kernels.errors import EmbedError, InputError
from kernels.graph import parse_smiles, rdkit_molecule

SMILES = parse_smiles("CC(C)C[C@H](N)C(=O)OCC").smiles


def test_embedded_bonds_are_those_of_the_graph() -> None:
    made = embed(SMILES, seed=11, max_attempts=50)
    graph = {
        tuple(sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())))
        for bond in rdkit_molecule(SMILES).GetBonds()
    }
    assert {tuple(pair) for pair in bonds(made.numbers, made.positions).tolist()} == graph
    assert not made.random_coords


def test_seed_decides_the_conformer_in_any_process() -> None:
    program = (
        "from kernels.embedding import embed\n"
        f"print(embed({SMILES!r}, seed=11, max_attempts=50).positions.tobytes().hex())\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    here = embed(SMILES, seed=11, max_attempts=50).positions
    assert other.stdout.strip() == here.tobytes().hex()
    assert not np.allclose(embed(SMILES, seed=12, max_attempts=50).positions, here)


def test_seeds_beyond_a_c_int_are_taken() -> None:
    assert embed("CO", seed=2**63 + 5, max_attempts=10).positions.shape == (6, 3)


@pytest.mark.parametrize("text", ["[H+]", "[He]", "[H][H]", "[C-]#[O+]", "[Na+].[Cl-]"])
def test_atoms_and_diatomics_embed(text: str) -> None:
    molecule = parse_smiles(text)
    made = embed(molecule.smiles, seed=0, max_attempts=10)
    assert made.positions.shape == (len(molecule.numbers), 3)


def test_a_molecule_that_cannot_exist_in_space_fails_as_embed() -> None:
    # Norbornane with one bridgehead turned outwards; its mirror-consistent sibling embeds.
    with pytest.raises(EmbedError, match="attempts") as caught:
        embed("C1C[C@]2(F)CC[C@]1(F)C2", seed=0, max_attempts=5)
    assert caught.value.status == "embed"
    assert not embed("C1C[C@]2(F)CC[C@@]1(F)C2", seed=0, max_attempts=5).random_coords


def test_impossible_settings_are_named() -> None:
    with pytest.raises(InputError, match="max_attempts 0"):
        embed("C", seed=0, max_attempts=0)
    with pytest.raises(InputError, match="seed -1"):
        embed("C", seed=-1, max_attempts=1)
