import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.calculators import evaluate, ladder, levels, make_calculator, program_version
from kernels.embedding import embed
from kernels.errors import CollapsedError, InputError, NotFiniteError, ScfError
from kernels.forcefield import minimise
from kernels.graph import parse_smiles
from kernels.units import HARTREE_TO_EV

PROGRAMS = levels()["GFN2-xTB"]

# Twenty small molecules: charged, radical, and every element of organic chemistry among them.
SMALL = [
    "C",
    "O",
    "N",
    "C#N",
    "[C-]#[O+]",
    "O=C=O",
    "CCO",
    "CC(=O)[O-]",
    "C[NH3+]",
    "[CH3]",
    "[N]=O",
    "[O][O]",
    "c1ccccc1",
    "CC(=O)N",
    "CS(=O)C",
    "FC(F)Cl",
    "COP(=O)(O)O",
    "C[Si](C)(C)Br",
    "c1ccncc1",
    "[NH3+]CC(=O)[O-]",
]


def _geometry(text: str) -> tuple[Any, np.ndarray]:
    molecule = parse_smiles(text)
    start = embed(molecule.smiles, seed=1, max_attempts=50).positions
    return molecule, minimise(molecule.smiles, start, max_steps=5000).positions


def _calculator(molecule: Any, program: str, **settings: Any) -> Any:
    return make_calculator(
        "GFN2-xTB",
        program=program,
        charge=molecule.charge,
        multiplicity=molecule.multiplicity,
        **settings,
    )


def _xtb_command_line(molecule: Any, positions: np.ndarray, folder: Path) -> float:
    from ase.data import chemical_symbols

    atoms = "".join(
        f"{chemical_symbols[z]} {x:.12f} {y:.12f} {w:.12f}\n"
        for z, (x, y, w) in zip(molecule.numbers, positions, strict=True)
    )
    (folder / "molecule.xyz").write_text(f"{len(positions)}\n\n{atoms}")
    command = ["xtb", "molecule.xyz", "--gfn", "2", "--chrg", str(molecule.charge)]
    command += ["--uhf", str(molecule.multiplicity - 1), "--acc", "0.01", "--json", "--norestart"]
    subprocess.run(
        command, cwd=folder, check=True, capture_output=True, env={**os.environ, "LC_ALL": "C"}
    )
    return float(json.loads((folder / "xtbout.json").read_text())["total energy"])


@pytest.mark.parametrize("text", SMALL)
def test_gfn2_energies_are_those_of_the_xtb_command_line(
    text: str, tmp_path: Path, require_engine: Callable[[str], None]
) -> None:
    require_engine("xtb")
    molecule, positions = _geometry(text)
    reference = _xtb_command_line(molecule, positions, tmp_path)
    for program in PROGRAMS:
        if program == "xtb-python" and text != "CC(=O)[O-]":
            continue
        require_engine(program)
        energy, _ = evaluate(_calculator(molecule, program), molecule.numbers, positions)
        assert energy / HARTREE_TO_EV == pytest.approx(reference, abs=1e-6), program


@pytest.mark.parametrize("program", PROGRAMS)
def test_gfn2_forces_are_the_slope_of_the_energy(
    program: str, require_engine: Callable[[str], None]
) -> None:
    require_engine(program)
    molecule, positions = _geometry("CC(=O)[O-]")
    positions = positions + np.random.default_rng(0).normal(scale=0.05, size=positions.shape)
    calculator = _calculator(molecule, program, accuracy=0.001)
    _assert_forces(calculator, molecule.numbers, positions, step=1e-3, tolerance=2e-4)


@pytest.mark.parametrize("text", ["CC(=O)[O-]", "CB(O)O"])
def test_force_field_forces_are_the_slope_of_the_energy(text: str) -> None:
    molecule, positions = _geometry(text)
    positions = positions + np.random.default_rng(0).normal(scale=0.05, size=positions.shape)
    calculator: Any = make_calculator("MMFF94", smiles=molecule.smiles)
    assert calculator.force_field == ("UFF" if "B" in text else "MMFF94")
    _assert_forces(calculator, molecule.numbers, positions, step=1e-4, tolerance=1e-5)


def _assert_forces(
    calculator: Any, numbers: np.ndarray, positions: np.ndarray, *, step: float, tolerance: float
) -> None:
    _, forces = evaluate(calculator, numbers, positions)
    slope = np.empty_like(positions)
    for index in np.ndindex(positions.shape):
        moved = positions.copy()
        moved[index] += step
        above, _ = evaluate(calculator, numbers, moved)
        moved[index] -= 2 * step
        below, _ = evaluate(calculator, numbers, moved)
        slope[index] = (above - below) / (2 * step)
    assert np.abs(forces).max() > 0.5
    assert forces == pytest.approx(-slope, abs=tolerance)


@pytest.mark.parametrize("program", PROGRAMS)
def test_calculators_serve_ase_atoms(program: str, require_engine: Callable[[str], None]) -> None:
    from ase import Atoms

    require_engine(program)
    molecule, positions = _geometry("CCO")
    atoms = Atoms(molecule.numbers, positions)
    atoms.calc = _calculator(molecule, program)
    energy, forces = evaluate(_calculator(molecule, program), molecule.numbers, positions)
    assert atoms.get_potential_energy() == energy
    assert np.array_equal(atoms.get_forces(), forces)
    atoms.rattle(0.1, seed=1)
    assert atoms.get_potential_energy() > energy + 0.1


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_calculator_may_meet_another_molecule(
    program: str, require_engine: Callable[[str], None]
) -> None:
    require_engine(program)
    calculator = None
    for text in ("CCO", "CO", "OCC"):
        molecule, positions = _geometry(text)
        calculator = calculator or _calculator(molecule, program)
        energy, _ = evaluate(calculator, molecule.numbers, positions)
        alone, _ = evaluate(_calculator(molecule, program), molecule.numbers, positions)
        assert energy == alone


@pytest.mark.parametrize("program", PROGRAMS)
def test_libraries_print_nothing(program: str, require_engine: Callable[[str], None]) -> None:
    require_engine(program)
    # In a process of its own: Fortran writes its buffers when it ends.
    done = subprocess.run(
        [sys.executable, "-c", _ONE_ENERGY_AND_ONE_FAILURE, program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


_ONE_ENERGY_AND_ONE_FAILURE = """
import sys
import numpy as np
from kernels.calculators import evaluate, make_calculator
from kernels.errors import ScfError
numbers = np.array([8, 1, 1], dtype=np.uint8)
water = np.array([[0.0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]])
evaluate(make_calculator("GFN2-xTB", program=sys.argv[1]), numbers, water)
try:
    evaluate(
        make_calculator("GFN2-xTB", program=sys.argv[1], max_scf_iterations=2), numbers, water
    )
except ScfError:
    sys.exit(0)
sys.exit("converged in two iterations")
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_would_stop_or_fool_the_library_is_refused_first(
    program: str, require_engine: Callable[[str], None]
) -> None:
    require_engine(program)
    pair = np.array([[0.0, 0, 0], [0, 0, 1.7]])

    def energy(numbers: list[int], charge: int, multiplicity: int) -> None:
        calculator = make_calculator(
            "GFN2-xTB", program=program, charge=charge, multiplicity=multiplicity
        )
        evaluate(calculator, np.array(numbers, dtype=np.uint8), pair[: len(numbers)])

    # Americium makes xtb stop the whole process.
    with pytest.raises(InputError, match="atomic number 95"):
        energy([95, 1], 0, 1)
    with pytest.raises(InputError, match="multiplicity 2 is impossible with 2 electrons"):
        energy([1, 1], 0, 2)
    with pytest.raises(InputError, match="multiplicity 5"):
        energy([1, 1], 0, 5)
    with pytest.raises(InputError, match="charge"):
        energy([1, 1], 3, 2)
    # Ten electrons, two of them in a core the method leaves out.
    with pytest.raises(InputError, match="valence shell"):
        energy([8, 1], -1, 11)


def test_valence_electrons_are_those_tblite_counts() -> None:
    from kernels.engines import _valence_electrons

    for number in range(1, 87):
        calculator: Any = make_calculator("GFN2-xTB", multiplicity=1 + number % 2)
        atom = np.array([number], dtype=np.uint8)
        calculator.evaluate(atom, np.zeros((1, 3)))
        occupations = calculator._result.get("orbital-occupations")
        assert np.sum(occupations) == pytest.approx(_valence_electrons(number), abs=1e-6), number


@pytest.mark.parametrize("program", PROGRAMS)
def test_scf_that_does_not_converge_is_said_and_leaves_nothing_behind(
    program: str, require_engine: Callable[[str], None]
) -> None:
    require_engine(program)
    molecule, positions = _geometry("CC(=O)N")
    calculator = _calculator(molecule, program, max_scf_iterations=3)
    with pytest.raises(ScfError, match="3 iterations at 300 K"):
        evaluate(calculator, molecule.numbers, positions)
    assert not calculator.save_scf()


def test_geometries_no_energy_belongs_to_are_refused() -> None:
    numbers = np.array([8, 1, 1], dtype=np.uint8)
    water = np.array([[0.0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]])
    calculator = make_calculator("GFN2-xTB")
    broken = water.copy()
    broken[1, 0] = np.nan
    with pytest.raises(NotFiniteError, match="atom 2"):
        evaluate(calculator, numbers, broken)
    close = water.copy()
    close[2] = close[1] + [0, 0, 0.05 * 0.529]
    with pytest.raises(CollapsedError, match=r"atoms 2 and 3 are 0\.026 Å apart"):
        evaluate(calculator, numbers, close)
    with pytest.raises(InputError, match=r"\(2, 3\); expected \(3, 3\)"):
        evaluate(calculator, numbers, water[:2])
    assert evaluate(calculator, numbers, water)[0] == pytest.approx(-137.9, abs=0.2)


def test_a_nan_from_any_ase_calculator_is_caught_and_lack_of_memory_is_not() -> None:
    from ase.calculators.calculator import Calculator, all_changes

    class Faulty(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012 - as ASE declares it
        fault: Exception | None = None

        def calculate(self, atoms=None, properties=None, system_changes=all_changes) -> None:  # type: ignore[no-untyped-def]
            super().calculate(atoms, properties, system_changes)
            if self.fault is not None:
                raise self.fault
            self.results = {"energy": np.nan, "forces": np.zeros((len(atoms), 3))}

    numbers, positions = np.array([1, 1], dtype=np.uint8), np.array([[0.0, 0, 0], [0, 0, 0.74]])
    calculator = Faulty()
    with pytest.raises(NotFiniteError, match="energy is nan"):
        evaluate(calculator, numbers, positions)
    calculator = Faulty()
    calculator.fault = MemoryError()
    with pytest.raises(MemoryError):
        evaluate(calculator, numbers, positions)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"level": "GFN2-XTB"}, "did you mean 'GFN2-xTB'"),
        ({"level": "gfn2"}, "did you mean 'GFN2-xTB'"),
        ({"level": "MMFF"}, "did you mean 'MMFF94'"),
        ({"level": "GFN2-xTB", "program": "rdkit"}, "choose from tblite, xtb-python"),
        ({"level": "GFN2-xTB", "electronic_temperature": 0.0}, "electronic_temperature"),
        ({"level": "GFN2-xTB", "mixer_damping": 2.0}, "mixer_damping 2.0"),
        ({"level": "MMFF94"}, "SMILES"),
    ],
)
def test_unknown_names_and_impossible_values_are_answered(
    arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        make_calculator(**arguments)


def test_a_program_that_is_not_installed_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib import metadata

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(InputError, match=r"pip install 'basin-orchestrator\[xtb\]'"):
        program_version("xtb-python")


def test_every_rung_is_a_setting_its_calculator_takes() -> None:
    for level, programs in levels().items():
        for program in programs:
            changes: dict[str, Any] = {}
            for rung in ladder(level, program):
                changes.update(rung.calculator)
            make_calculator(level, program=program, smiles="C", **changes)


def test_a_hot_rung_really_heats_the_electrons(require_engine: Callable[[str], None]) -> None:
    molecule, positions = _geometry("[O][O]")
    stretched = positions * 1.6
    for program in PROGRAMS:
        require_engine(program)
        cold, _ = evaluate(_calculator(molecule, program), molecule.numbers, stretched)
        hot, _ = evaluate(
            _calculator(molecule, program, electronic_temperature=5000.0),
            molecule.numbers,
            stretched,
        )
        assert hot < cold - 0.01
