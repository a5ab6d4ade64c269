from pathlib import Path

import numpy as np
import pytest

from kernels.calculators import make_calculator
from kernels.embedding import embed
from kernels.errors import InputError
from kernels.graph import from_geometry, from_rdkit, parse_smiles, rdkit_molecule

DRUG_LIKE = [
    "C[C@H](N)C(=O)O",
    "OC[C@@H](O)[C@H](O)C=O",
    "F/C=C/Cl",
    "[2H]C([2H])O",
    "CC(C)Cc1ccc(cc1)[C@@H](C)C(=O)O",
    "C[N+](C)(C)CC(=O)[O-]",
    "[H]/N=C/C",
    "CC1=C(N=CN1)CSCCN/C(=N/C)NC#N",
]


@pytest.mark.parametrize(
    ("text", "formula", "charge", "multiplicity"),
    [
        ("C", "CH4", 0, 1),
        ("CC(=O)[O-]", "C2H3O2", -1, 1),
        ("[NH4+]", "H4N", 1, 1),
        ("[CH3]", "CH3", 0, 2),
        ("[O][O]", "O2", 0, 3),
        ("[CH2]", "CH2", 0, 3),
        ("[N]=O", "NO", 0, 2),
        ("[H][H]", "H2", 0, 1),
        ("[H+]", "H", 1, 1),
        ("[C-]#[O+]", "CO", 0, 1),
        ("[Na+].[Cl-]", "ClNa", 0, 1),
        ("Brc1ccccc1", "C6H5Br", 0, 1),
    ],
)
def test_charge_and_spin_follow_the_graph(
    text: str, formula: str, charge: int, multiplicity: int
) -> None:
    molecule = parse_smiles(text)
    assert (molecule.formula, molecule.charge, molecule.multiplicity) == (
        formula,
        charge,
        multiplicity,
    )


@pytest.mark.parametrize("text", DRUG_LIKE)
def test_atoms_come_in_the_order_of_the_canonical_smiles(text: str) -> None:
    from rdkit import Chem

    molecule = parse_smiles(text)
    assert parse_smiles(molecule.smiles) == molecule
    reference = Chem.AddHs(Chem.MolFromSmiles(molecule.smiles))
    assert molecule.numbers.tolist() == [atom.GetAtomicNum() for atom in reference.GetAtoms()]
    scrambled = Chem.MolToSmiles(Chem.MolFromSmiles(text), doRandom=True)
    assert parse_smiles(scrambled) == molecule


def test_atom_map_numbers_do_not_make_another_molecule() -> None:
    assert parse_smiles("[CH3:7][OH:2]") == parse_smiles("CO")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("C(", "syntax error around position 2"),
        ("CXC", "syntax error"),
        ("C1CC", "unclosed ring"),
        ("c1ccc1c", "aromatic"),
        ("C(C)(C)(C)(C)C", "valence"),
        ("CCO ethanol", "blanks"),
        ("C*", "not an element"),
        ("[H+2]", "charge"),
        ("\x00\x01", "NUL"),
        ("\N{SNOWMAN}", "syntax error"),
    ],
)
def test_bad_smiles_is_refused_with_its_reason(
    text: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        parse_smiles(text)
    assert repr(text.strip()) in str(caught.value) or not text.strip(" \0\1")
    # RDKit's own log would drown a progress display.
    assert capfd.readouterr() == ("", "")


def test_every_line_of_qm9_is_a_molecule_or_an_input_error(shared_data: Path) -> None:
    lines = (shared_data / "qm9" / "qm9_smiles.csv").read_text().split()[1:]
    refused = 0
    for text in lines[::250]:
        try:
            molecule = parse_smiles(text)
        except InputError:
            refused += 1
        else:
            assert 1 <= molecule.n_heavy <= 9
            assert parse_smiles(molecule.smiles) == molecule
    # The list was perceived from geometries; some of its carbons have five bonds.
    assert 0 < refused < 0.02 * len(lines[::250])


def _conformer(smiles: str) -> tuple[np.ndarray, np.ndarray]:
    made = embed(smiles, seed=3, max_attempts=50)
    return made.numbers, made.positions


def _mmff_energy(smiles: str, numbers: np.ndarray, positions: np.ndarray) -> float:
    calculator = make_calculator("MMFF94", smiles=smiles)
    return float(calculator.evaluate(numbers, positions)[0])  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", DRUG_LIKE)
def test_a_file_in_any_atom_order_gives_the_same_molecule(text: str) -> None:
    from rdkit import Chem

    molecule = parse_smiles(text)
    _, positions = _conformer(molecule.smiles)
    mol = Chem.Mol(rdkit_molecule(molecule.smiles))
    conformer = Chem.Conformer(mol.GetNumAtoms())
    conformer.SetPositions(positions)
    mol.AddConformer(conformer)
    order = np.random.default_rng(0).permutation(mol.GetNumAtoms()).tolist()
    shuffled = Chem.MolFromMolBlock(
        Chem.MolToMolBlock(Chem.RenumberAtoms(mol, order)), removeHs=False
    )
    # What is left and right must come from the geometry, not from marks in the file.
    Chem.RemoveStereochemistry(shuffled)
    read, xyz = from_rdkit(shuffled)
    assert read == molecule
    # The force field knows every bond and angle: a wrong order would cost electronvolts.
    # The mol block keeps 4 decimals.
    expected = _mmff_energy(molecule.smiles, molecule.numbers, positions)
    assert _mmff_energy(read.smiles, read.numbers, xyz) == pytest.approx(expected, abs=2e-3)


def test_hydrogens_left_out_of_a_file_get_places() -> None:
    from rdkit import Chem

    molecule = parse_smiles("CCO")
    numbers, positions = _conformer(molecule.smiles)
    mol = Chem.Mol(rdkit_molecule(molecule.smiles))
    conformer = Chem.Conformer(mol.GetNumAtoms())
    conformer.SetPositions(positions)
    mol.AddConformer(conformer)
    read, xyz = from_rdkit(Chem.RemoveHs(mol))
    assert read == molecule
    assert xyz[:3] == pytest.approx(positions[:3], abs=1e-12)
    lengths = [np.linalg.norm(xyz[i] - xyz[:3], axis=1).min() for i in range(3, 9)]
    assert max(lengths) < 1.15
    assert min(lengths) > 0.9
    assert len(numbers) == len(xyz)


def test_flat_and_missing_coordinates_are_refused() -> None:
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.MolFromSmiles("CCO")
    with pytest.raises(InputError, match="no coordinates"):
        from_rdkit(mol)
    AllChem.Compute2DCoords(mol)
    with pytest.raises(InputError, match="2D"):
        from_rdkit(mol)


@pytest.mark.parametrize(
    "text",
    [
        "CCO",
        "CC(=O)[O-]",
        "C[C@H](N)C(=O)O",
        "c1ccccc1O",
        "[NH3+]CC(=O)[O-]",
        "F/C=C/Cl",
        # Readings with S+ and O- balance the valences of these as well.
        "COC(=O)c1cccnc1SC",
        "O=C(Nc1ccccc1)c1cccs1",
        "CS(=O)(=O)c1ccc([N+](=O)[O-])cc1",
    ],
)
def test_bonds_are_perceived_from_a_shuffled_geometry(text: str) -> None:
    molecule = parse_smiles(text)
    numbers, positions = _conformer(molecule.smiles)
    expected = _mmff_energy(molecule.smiles, numbers, positions)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(numbers))
        read, xyz = from_geometry(numbers[order], positions[order], charge=molecule.charge)
        assert read == molecule
        assert _mmff_energy(read.smiles, read.numbers, xyz) == pytest.approx(expected, abs=1e-6)


def test_a_radical_keeps_its_given_spin() -> None:
    numbers, positions = _conformer("[CH3]")
    read, _ = from_geometry(numbers, positions)
    assert (read.smiles, read.multiplicity) == ("[CH3]", 2)
    oxygen = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.21]])
    read, _ = from_geometry([8, 8], oxygen, multiplicity=3)
    assert read.multiplicity == 3


def test_a_cluster_nothing_perceives_keeps_its_order_and_positions() -> None:
    numbers = np.array([1, 26, 1, 26], dtype=np.uint8)
    positions = np.array([[0.0, 0, 0], [1.6, 0, 0], [2.4, 1.2, 0], [3.9, 0.3, 0]])
    read, xyz = from_geometry(numbers, positions)
    if read.smiles:
        pytest.fail(f"perceived {read.smiles}; choose a stranger cluster for this test")
    assert read.numbers.tolist() == numbers.tolist()
    assert np.array_equal(xyz, positions)
    assert read.formula == "Fe2H2"


@pytest.mark.parametrize(
    ("numbers", "charge", "multiplicity", "says"),
    [
        ([8, 1, 1], 0, 2, "multiplicity 2 is impossible with 10 electrons"),
        ([8, 1, 1], 1, 1, "multiplicity 1 is impossible with 9 electrons"),
        ([1, 1, 1], 7, 1, "charge"),
        ([0, 1, 1], 0, 1, "atomic number 0"),
        ([8, 1, 300], 0, 1, "atomic number 300"),
    ],
)
def test_impossible_geometries_are_refused(
    numbers: list[int], charge: int, multiplicity: int, says: str
) -> None:
    positions = np.array([[0.0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]])
    with pytest.raises(InputError, match=says):
        from_geometry(numbers, positions, charge=charge, multiplicity=multiplicity)


def test_nan_coordinates_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        from_geometry([1, 1], np.array([[0, 0, 0], [0, np.nan, 0.7]]))
