"""ASE calculators over tblite, xtb-python and RDKit; imported only when one is made.

Each keeps one library object per molecule and moves its atoms, instead of building a new object
for every geometry as a general-purpose calculator must. Beside ASE's interface each offers
`evaluate(numbers, positions)`, which spares an optimiser ASE's copies and comparisons, and
`save_scf` / `load_scf` / `reset_scf`, which make an SCF started from the last geometry's charges
repeatable: the charges are part of the state of a relaxation.
"""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# OpenMP reads this when the library loads. One thread per process is the rule here, and both
# libraries run 3-20 times slower with more threads than cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from numpy.typing import NDArray

from kernels.calculators import evaluate
from kernels.errors import InputError, NotFiniteError, ResourceError, ScfError
from kernels.forcefield import build, force_field_name
from kernels.graph import check_spin, rdkit_molecule
from kernels.units import (
    BOHR_TO_ANGSTROM,
    BOLTZMANN_EV_PER_K,
    HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM,
    HARTREE_TO_EV,
    KCAL_TO_EV,
)

_HEAVIEST_GFN2_ELEMENT = 86


class Engine(Calculator):
    """An ASE calculator with a direct way to energies in eV and forces in eV/Å."""

    implemented_properties = [  # noqa: RUF012 - as ASE declares it
        "energy",
        "free_energy",
        "forces",
    ]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_evaluations = 0

    @abstractmethod
    def evaluate(
        self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        """Return the energy in eV and the forces (N, 3) in eV/Å at positions (N, 3) in Å."""

    def save_scf(self) -> dict[str, NDArray[np.float64]]:
        """Return what the next SCF will start from; empty when every SCF starts afresh."""
        return {}

    def load_scf(self, arrays: dict[str, NDArray[np.float64]]) -> None:
        """Start the next SCF from what `save_scf` returned."""

    def reset_scf(self) -> None:
        """Start the next SCF afresh, as for a new molecule."""

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill `results` as ASE asks."""
        super().calculate(  # type: ignore[no-untyped-call]
            atoms, properties or ["energy"], system_changes
        )
        assert self.atoms is not None
        energy, forces = self.evaluate(
            self.atoms.numbers.astype(np.uint8), np.ascontiguousarray(self.atoms.positions)
        )
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}


class _Gfn2(Engine):
    """What both programs of GFN2-xTB share: the molecule they were built for, and its guards."""

    def __init__(
        self,
        *,
        charge: int,
        multiplicity: int,
        electronic_temperature: float,
        max_scf_iterations: int,
        accuracy: float,
    ) -> None:
        super().__init__()
        self.charge = charge
        self.multiplicity = multiplicity
        self.electronic_temperature = electronic_temperature
        self.max_scf_iterations = max_scf_iterations
        self.accuracy = accuracy
        self._numbers = b""
        self._library: Any = None
        self._result: Any = None

    def reset_scf(self) -> None:
        self._result = None

    def _move(self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]) -> None:
        bohr = positions / BOHR_TO_ANGSTROM
        key = numbers.tobytes()
        if self._library is not None and key == self._numbers:
            self._library.update(bohr)
            return
        # Before any call: beyond radon xtb stops the whole process, and an impossible spin gives
        # a wrong energy without a word (xtb) or for some electron counts (tblite).
        if numbers.max() > _HEAVIEST_GFN2_ELEMENT or numbers.min() < 1:
            bad = numbers[(numbers > _HEAVIEST_GFN2_ELEMENT) | (numbers < 1)][0]
            raise InputError(
                f"GFN2-xTB has no parameters for atomic number {bad}; it covers 1 to "
                f"{_HEAVIEST_GFN2_ELEMENT}"
            )
        check_spin(numbers, self.charge, self.multiplicity)
        _check_valence_shell(numbers, self.charge, self.multiplicity)
        if self._library is not None:
            # Another molecule: its charges cannot start this one. (Without a library the start,
            # if any, came from `load_scf` and is meant for the molecule at hand.)
            self._result = None
        self._library = self._build(numbers.astype(np.int32), bohr)
        self._numbers = key

    @abstractmethod
    def _build(self, numbers: NDArray[np.int32], bohr: NDArray[np.float64]) -> Any: ...


class TBLite(_Gfn2):
    """GFN2-xTB by tblite, each SCF started from the charges of the last geometry."""

    def __init__(self, *, mixer_damping: float, **settings: Any) -> None:
        import tblite.interface

        super().__init__(**settings)
        self.mixer_damping = mixer_damping
        self._library_class = tblite.interface.Calculator

    def _build(self, numbers: NDArray[np.int32], bohr: NDArray[np.float64]) -> Any:
        library = self._library_class(
            "GFN2-xTB",
            numbers,
            bohr,
            charge=float(self.charge),
            uhf=self.multiplicity - 1,
            logger=_discard,
        )
        library.set("verbosity", 0)
        library.set("accuracy", self.accuracy)
        library.set("max-iter", self.max_scf_iterations)
        library.set("mixer-damping", self.mixer_damping)
        library.set("temperature", self.electronic_temperature * BOLTZMANN_EV_PER_K / HARTREE_TO_EV)
        return library

    def evaluate(
        self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        self._move(numbers, positions)
        self.n_evaluations += 1
        try:
            self._result = self._library.singlepoint(self._result)
        except RuntimeError as error:
            # A half-converged start must not reach the next geometry.
            self._result = None
            raise _scf_failure("tblite", error, self) from error
        energy = float(self._result.get("energy")) * HARTREE_TO_EV
        gradient = self._result.get("gradient")
        return energy, gradient * -HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM

    def save_scf(self) -> dict[str, NDArray[np.float64]]:
        if self._result is None:
            return {}
        with _scratch_file() as path:
            self._result.save(path)
            with np.load(path) as saved:
                arrays = {name: np.array(saved[_PREFIX + name]) for name in _SCF_START}
        arrays["n_orbitals"] = np.array([self._result.get("norbitals")], dtype=np.float64)
        return arrays

    def load_scf(self, arrays: dict[str, NDArray[np.float64]]) -> None:
        from tblite.interface import Result

        if not arrays:
            self._result = None
            return
        # The library reads a whole wavefunction, but starts from the charges and multipoles only:
        # orbitals and density, which are large, stay zero. A test holds it to that.
        n = int(arrays["n_orbitals"][0])
        wavefunction = {
            "density": np.zeros((n, n, 1)),
            "coeff": np.zeros((n, n, 1)),
            "emo": np.zeros((n, 1)),
            "focc": np.zeros((n, 2)),
            **{name: arrays[name] for name in _SCF_START},
        }
        result = Result()  # type: ignore[no-untyped-call]
        with _scratch_file() as path:
            _write_npz(path, {_PREFIX + name: array for name, array in wavefunction.items()})
            result.load(path)
        self._result = result
        self._library = None


class XtbPython(_Gfn2):
    """GFN2-xTB by xtb-python; every SCF starts afresh, since its charges cannot be saved."""

    def __init__(self, **settings: Any) -> None:
        import xtb.interface  # type: ignore[import-untyped,import-not-found,unused-ignore]

        super().__init__(**settings)
        self._api: Any = xtb.interface

    def _build(self, numbers: NDArray[np.int32], bohr: NDArray[np.float64]) -> Any:
        library = self._api.Calculator(
            self._api.Param.GFN2xTB,
            numbers,
            bohr,
            charge=float(self.charge),
            uhf=self.multiplicity - 1,
        )
        library.set_verbosity("muted")
        library.set_accuracy(self.accuracy)
        library.set_max_iterations(self.max_scf_iterations)
        library.set_electronic_temperature(float(self.electronic_temperature))
        return library

    def evaluate(
        self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        self._move(numbers, positions)
        self.n_evaluations += 1
        try:
            result = self._library.singlepoint()
            energy = float(result.get_energy()) * HARTREE_TO_EV
            gradient = result.get_gradient()
        except self._api.XTBException as error:
            raise _scf_failure("xtb-python", error, self) from error
        return energy, gradient * -HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM


class ForceField(Engine):
    """MMFF94 of RDKit for one molecule, or UFF where MMFF94 has no parameters."""

    def __init__(self, smiles: str) -> None:
        super().__init__()
        from rdkit import Chem

        mol = Chem.Mol(rdkit_molecule(smiles))
        mol.AddConformer(Chem.Conformer(mol.GetNumAtoms()), assignId=True)
        name = force_field_name(mol)
        if name is None:
            raise InputError(
                f"neither MMFF94 nor UFF has parameters for {smiles!r}; use GFN2-xTB instead"
            )
        self.force_field = name
        # Kept beside the field, which holds a bare pointer into it.
        self._mol = mol
        self._field = build(mol, name)
        self._numbers = np.array([a.GetAtomicNum() for a in mol.GetAtoms()], dtype=np.uint8)

    def evaluate(
        self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        if not np.array_equal(numbers, self._numbers):
            raise InputError(
                "this force field was built for another molecule; make one calculator per molecule"
            )
        self.n_evaluations += 1
        flat = positions.ravel().tolist()
        energy = float(self._field.CalcEnergy(flat)) * KCAL_TO_EV
        gradient = np.array(self._field.CalcGrad(flat), dtype=np.float64).reshape(-1, 3)
        return energy, gradient * -KCAL_TO_EV


class Checked(Calculator):
    """Any calculator, with the guards of `kernels.calculators.evaluate` around every call."""

    implemented_properties = [  # noqa: RUF012 - as ASE declares it
        "energy",
        "free_energy",
        "forces",
    ]

    def __init__(self, inner: Calculator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inner = inner
        self.count = 0

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill `results` as ASE asks."""
        super().calculate(  # type: ignore[no-untyped-call]
            atoms, properties or ["energy"], system_changes
        )
        assert self.atoms is not None
        self.count += 1
        energy, forces = evaluate(
            self.inner, self.atoms.numbers.astype(np.uint8), self.atoms.positions
        )
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}


_PREFIX = "tblite0_"
_SCF_START = ("kt", "nel", "n0at", "n0sh", "qat", "qsh", "dpat", "qpat")


def _write_npz(path: str, arrays: dict[str, NDArray[np.float64]]) -> None:
    # numpy.savez marks its entries ZIP64 and writes (N, 1) arrays in C order; tblite reads neither.
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            header = {"descr": "<f8", "fortran_order": True, "shape": array.shape}
            np.lib.format.write_array_header_1_0(buffer, header)
            buffer.write(array.astype("<f8").tobytes("F"))
            archive.writestr(f"{name}.npy", buffer.getvalue())


@contextmanager
def _scratch_file() -> Iterator[str]:
    # In memory where the system has such a place: this happens at every save of a relaxation.
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="basin-", dir=folder) as scratch:
        yield os.path.join(scratch, "wavefunction.npz")


def _scf_failure(program: str, error: Exception, engine: _Gfn2) -> Exception:
    text = " ".join(str(error).split())
    if "converge" in text:
        return ScfError(
            f"{program}: SCF not converged in {engine.max_scf_iterations} iterations at "
            f"{engine.electronic_temperature:g} K; raise the electronic temperature or the damping"
        )
    if "eigenvalue" in text or "diagonal" in text:
        return NotFiniteError(f"{program}: {text}; the geometry is unphysical")
    if "llocat" in text or "memory" in text:
        return ResourceError(f"{program}: {text}; give more memory")
    return InputError(f"{program}: {text}")


def _check_valence_shell(numbers: NDArray[np.uint8], charge: int, multiplicity: int) -> None:
    """Refuse more unpaired electrons than a minimal valence shell can hold.

    Neither library does: both return an energy of some other state.
    """
    z = numbers.astype(np.int64)
    electrons = sum(_valence_electrons(int(number)) for number in z) - charge
    orbitals = int(np.where(z == 1, 1, np.where(z < 10, 4, 9)).sum())
    most = min(electrons, 2 * orbitals - electrons)
    if electrons < 0 or multiplicity - 1 > max(most, 0):
        raise InputError(
            f"multiplicity {multiplicity} with charge {charge:+d} is impossible in the valence "
            f"shell of GFN2-xTB ({electrons} electrons in {orbitals} orbitals); give at most "
            f"{max(most, 0) + 1}"
        )


def _valence_electrons(number: int) -> int:
    """Count the electrons GFN2-xTB treats explicitly; a test compares all elements with tblite."""
    if 57 <= number <= 71:
        return 3
    core = max(closed for closed in (0, 2, 10, 18, 36, 54) if closed < number)
    electrons = number - core
    if number >= 72:
        electrons -= 14
    # From group 12 on the d shell is filled and belongs to the core.
    if core >= 18 and electrons >= 12:
        electrons -= 10
    return electrons


def _discard(message: str) -> None:
    """Drop what the library would print."""
