import numpy as np
import pytest

from kernels.calculators import make_calculator
from kernels.embedding import embed
from kernels.errors import ConvergenceError, InputError, NotFiniteError
from kernels.forcefield import minimise
from kernels.graph import parse_smiles
from kernels.units import EV_TO_KCAL


def _start(text: str) -> tuple[str, np.ndarray, np.ndarray]:
    smiles = parse_smiles(text).smiles
    made = embed(smiles, seed=7, max_attempts=50)
    return smiles, made.numbers, made.positions


def test_minimum_is_rdkits_own() -> None:
    from rdkit import Chem
    from rdkit.Chem import rdForceFieldHelpers

    smiles, _, positions = _start("CC(=O)Nc1ccc(O)cc1")
    made = minimise(smiles, positions, max_steps=2000)
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    conformer = Chem.Conformer(mol.GetNumAtoms())
    conformer.SetPositions(positions)
    mol.AddConformer(conformer)
    ((unfinished, kcal),) = rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(
        mol, numThreads=1, maxIters=2000
    )
    assert unfinished == 0
    assert made.force_field == "MMFF94"
    assert made.energy_eV * EV_TO_KCAL == pytest.approx(kcal, abs=1e-9)
    assert made.positions == pytest.approx(mol.GetConformer().GetPositions(), abs=1e-9)
    assert made.energy_eV < made.initial_energy_eV
    assert 0 < made.iterations < 2000


def test_minimum_has_no_force_left() -> None:
    smiles, numbers, positions = _start("CCOC(=O)C")
    made = minimise(smiles, positions, max_steps=2000)
    calculator = make_calculator("MMFF94", smiles=smiles)
    energy, forces = calculator.evaluate(numbers, made.positions)  # type: ignore[attr-defined]
    assert energy == pytest.approx(made.energy_eV, abs=1e-12)
    assert np.linalg.norm(forces, axis=1).max() < 0.01


@pytest.mark.parametrize(
    "text", ["CB(O)O", "C[Se]C", "[Fe]", "[Li]C", "[H][H]", "[C-]#[O+]", "F[P-](F)(F)(F)(F)F"]
)
def test_uff_takes_over_where_mmff_has_no_parameters(text: str) -> None:
    smiles, _, positions = _start(text)
    made = minimise(smiles, positions, max_steps=2000)
    assert made.force_field == "UFF"
    assert made.energy_eV <= made.initial_energy_eV


def test_neither_force_field_is_an_input_error() -> None:
    with pytest.raises(InputError, match="neither MMFF94 nor UFF"):
        minimise("[He]", np.zeros((1, 3)), max_steps=10)


def test_step_cap_is_a_convergence_error() -> None:
    smiles, _, positions = _start("CCCCCCO")
    with pytest.raises(ConvergenceError, match="after 3 steps"):
        minimise(smiles, positions, max_steps=3)


def test_bad_positions_are_refused() -> None:
    smiles, _, positions = _start("CO")
    with pytest.raises(InputError, match=r"\(5, 3\); expected \(6, 3\)"):
        minimise(smiles, positions[:5], max_steps=10)
    positions[2, 1] = np.inf
    with pytest.raises(NotFiniteError):
        minimise(smiles, positions, max_steps=10)


def test_coinciding_atoms_are_not_a_minimum() -> None:
    smiles, _, positions = _start("CO")
    with pytest.raises(NotFiniteError):
        minimise(smiles, np.zeros_like(positions), max_steps=10)
