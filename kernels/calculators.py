"""Levels of theory by name: which programs compute them, and a calculator for one molecule."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.connectivity import closest_contact, collapsed
from kernels.errors import CollapsedError, InputError, NotFiniteError

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

# QM9's level, and one for the elements that it lacks.
DFT: Final = "B3LYP/6-31G(2df,p)"
DFT_DEF2: Final = "B3LYP/def2-SVP"
# Level -> basis.
DFT_LEVELS: Final[Mapping[str, str]] = MappingProxyType(
    {level: level.partition("/")[2] for level in (DFT, DFT_DEF2)}
)

_LEVELS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "GFN2-xTB": ("tblite", "xtb-python"),
        **dict.fromkeys(DFT_LEVELS, ("pyscf", "psi4", "gpu4pyscf")),
        "MMFF94": ("rdkit",),
    }
)

# Program -> (distribution on PyPI, what installs it with this package).
_DISTRIBUTIONS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "tblite": ("tblite", "pip install tblite"),
        "xtb-python": ("xtb", "pip install 'basin-orchestrator[xtb]'"),
        "rdkit": ("rdkit", "pip install rdkit"),
        "pyscf": ("pyscf", "pip install pyscf"),
        "gpu4pyscf": ("gpu4pyscf-cuda12x", "pip install gpu4pyscf-cuda12x cutensor-cu12"),
        "sella": ("sella", "pip install 'basin-orchestrator[sella]'"),
    }
)

# tblite's own default; stronger damping mixes less of each new density.
MIXER_DAMPING: Final = 0.4


@dataclass(frozen=True, slots=True)
class Rung:
    """One changed setting to try when a calculation does not converge.

    `calculator` holds keywords of `make_calculator`, `relaxation` fields of `RelaxSettings`;
    `against` is the name of the error class it can help with.
    """

    name: str
    against: str
    calculator: Mapping[str, Any] = field(default_factory=dict)
    relaxation: Mapping[str, Any] = field(default_factory=dict)


# Radial shells and angular points of each atom's integration grid.
GRIDS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"fine": (75, 302), "coarse": (50, 194), "very fine": (99, 590)}
)
GUESSES: Final = ("atomic", "huckel")


@dataclass(frozen=True, slots=True)
class DftSettings:
    """What a calculation by DFT is made with; as in `make_calculator`."""

    basis: str = DFT_LEVELS[DFT]
    charge: int = 0
    multiplicity: int = 1
    density_fitting: bool = True
    grid: str = "fine"
    guess: str = "atomic"
    level_shift: float = 0.0
    damping: float = 0.0
    second_order: bool = False
    max_iterations: int = 250
    memory: int = 2_000_000_000


# The last one changes the energy surface, though only by the error of the usual grid.
_DFT_RUNGS: Final = (
    Rung("second-order SCF", "ScfError", calculator={"second_order": True}),
    Rung(
        "SCF with level shift 0.3 Ha and damping 0.3, 500 iterations",
        "ScfError",
        calculator={
            "second_order": False,
            "level_shift": 0.3,
            "scf_damping": 0.3,
            "max_scf_iterations": 500,
        },
    ),
    # Never first and never without the second order: Hückel orbitals of stretched bonds can lead
    # to states with a hole in a core.
    Rung(
        "second-order SCF from Hückel orbitals",
        "ScfError",
        calculator={
            "second_order": True,
            "level_shift": 0.0,
            "scf_damping": 0.0,
            "scf_guess": "huckel",
        },
    ),
    Rung("grid of 99 shells of 590 points", "ScfError", calculator={"grid": "very fine"}),
)


def levels() -> Mapping[str, tuple[str, ...]]:
    """Map each level of theory to its programs, the default first."""
    return _LEVELS


def program_version(program: str) -> str:
    """Return the installed version of a program without importing it; raises InputError."""
    if program == "psi4":
        from kernels.psi4_engine import find

        return find().version
    distribution, remedy = _DISTRIBUTIONS[_named(program, _DISTRIBUTIONS, "program")]
    # One distribution for each version of CUDA.
    for name in dict.fromkeys(distribution.replace("12x", cuda) for cuda in ("12x", "13x", "11x")):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    raise InputError(f"program {program!r} is not installed; {remedy}")


def make_calculator(
    level: str,
    *,
    program: str | None = None,
    charge: int = 0,
    multiplicity: int = 1,
    smiles: str | None = None,
    electronic_temperature: float = 300.0,
    max_scf_iterations: int = 250,
    mixer_damping: float = MIXER_DAMPING,
    accuracy: float = 1.0,
    density_fitting: bool = True,
    grid: str = "fine",
    scf_guess: str = "atomic",
    level_shift: float = 0.0,
    scf_damping: float = 0.0,
    second_order: bool = False,
    memory: int = 2_000_000_000,
) -> Calculator:
    """Make an ASE calculator (eV, Å) for one molecule of this charge and multiplicity.

    `electronic_temperature` in K; `accuracy` scales the thresholds of the SCF (smaller is
    tighter); `mixer_damping` in (0, 1] is tblite's; "MMFF94" needs `smiles` and ignores the
    electronic settings. DFT has no electronic temperature, and takes from `density_fitting` on:
    `grid` "fine" (75 radial shells of 302 points), "coarse" (50 of 194) or "very fine" (99 of 590),
    `scf_guess` "atomic" or "huckel", `level_shift` in hartree, `scf_damping` the share of the old
    matrix kept in each iteration, `memory` in bytes, which changes how results are computed and not
    what they are.
    Raises InputError for unknown names, impossible values and a program that is not installed.
    """
    level = _named(level, _LEVELS, "level")
    program = _LEVELS[level][0] if program is None else program
    if program not in _LEVELS[level]:
        raise InputError(
            f"program {program!r} does not compute {level}; choose from {', '.join(_LEVELS[level])}"
        )
    if level == "MMFF94":
        if not smiles:
            raise InputError("MMFF94 needs the molecular graph; give its SMILES")
        from kernels.engines import ForceField

        return ForceField(smiles)
    if level in DFT_LEVELS:
        return _dft(
            program,
            DftSettings(
                basis=DFT_LEVELS[level],
                charge=charge,
                multiplicity=multiplicity,
                density_fitting=density_fitting,
                grid=grid,
                guess=scf_guess,
                level_shift=level_shift,
                damping=scf_damping,
                second_order=second_order,
                max_iterations=max_scf_iterations,
                memory=memory,
            ),
        )
    if electronic_temperature <= 0 or max_scf_iterations < 1 or accuracy <= 0:
        raise InputError(
            f"electronic_temperature {electronic_temperature} K, max_scf_iterations "
            f"{max_scf_iterations}, accuracy {accuracy}: all must be positive"
        )
    if not 0 < mixer_damping <= 1:
        raise InputError(f"mixer_damping {mixer_damping} is impossible; give 0 < damping <= 1")
    common: dict[str, Any] = {
        "charge": charge,
        "multiplicity": multiplicity,
        "electronic_temperature": electronic_temperature,
        "max_scf_iterations": max_scf_iterations,
        "accuracy": accuracy,
    }
    from kernels.engines import TBLite, XtbPython

    if program == "xtb-python" and mixer_damping != MIXER_DAMPING:
        raise InputError("xtb-python has no mixer_damping; leave it out or use tblite")
    try:
        if program == "tblite":
            return TBLite(mixer_damping=mixer_damping, **common)
        return XtbPython(**common)
    except ImportError as error:
        # Not by looking up the version first: that reads a file, and this is done per molecule.
        raise InputError(
            f"program {program!r} cannot be loaded ({error}); {_DISTRIBUTIONS[program][1]}"
        ) from error


def _dft(program: str, settings: DftSettings) -> Calculator:
    if settings.grid not in GRIDS:
        raise InputError(f"grid {settings.grid!r} is unknown; choose from {', '.join(GRIDS)}")
    if settings.guess not in GUESSES:
        raise InputError(f"scf_guess {settings.guess!r} is unknown; choose from atomic, huckel")
    if settings.max_iterations < 1 or settings.memory < 100_000_000 or settings.level_shift < 0:
        raise InputError(
            f"max_scf_iterations {settings.max_iterations}, memory {settings.memory}, level_shift "
            f"{settings.level_shift}: give at least 1, 100 MB and 0"
        )
    if not 0 <= settings.damping < 1:
        raise InputError(f"scf_damping {settings.damping} is impossible; give 0 <= damping < 1")
    try:
        if program == "pyscf":
            from kernels.pyscf_engine import PySCF

            return PySCF(settings)
        if program == "gpu4pyscf":
            from kernels.gpu4pyscf_engine import GPU4PySCF

            return GPU4PySCF(settings)
        from kernels.psi4_engine import Psi4

        return Psi4(settings)
    except ImportError as error:
        raise InputError(
            f"program {program!r} cannot be loaded ({error}); {_DISTRIBUTIONS[program][1]}"
        ) from error


def ladder(level: str, program: str | None = None) -> tuple[Rung, ...]:
    """List the changed settings to try, in order, when a calculation at `level` fails.

    Rungs add up: each keeps the changes of those before it. The first keep the energy surface
    and only change the way down; the electronic temperature comes last because it changes it.
    """
    level = _named(level, _LEVELS, "level")
    of_relaxations = (
        Rung("unit initial Hessian", "HessianError", relaxation={"initial_hessian": "unit"}),
        Rung(
            "steps of at most 0.05 Å, twice as many",
            "StepCapError",
            relaxation={"max_step_length": 0.05, "max_steps_factor": 2},
        ),
    )
    if level == "MMFF94":
        return of_relaxations
    if level in DFT_LEVELS:
        return (*_DFT_RUNGS, *of_relaxations)
    damping = {"mixer_damping": 0.1} if (program or _LEVELS[level][0]) == "tblite" else {}
    return (
        Rung(
            "SCF damping 0.1, 1000 iterations" if damping else "SCF 1000 iterations",
            "ScfError",
            calculator={**damping, "max_scf_iterations": 1000},
        ),
        Rung(
            "electronic temperature 1000 K",
            "ScfError",
            calculator={"electronic_temperature": 1000.0},
        ),
        *of_relaxations,
    )


def evaluate(
    calculator: Calculator, numbers: NDArray[np.uint8], positions: ArrayLike
) -> tuple[float, NDArray[np.float64]]:
    """Return a checked energy in eV and forces (N, 3) in eV/Å at positions (N, 3) in Å.

    Raises NotFiniteError for NaN or infinity going in or coming out, CollapsedError when two
    atoms sit on top of each other, and whatever the calculator raises.
    """
    xyz = np.ascontiguousarray(positions, dtype=np.float64)
    if xyz.shape != (len(numbers), 3):
        raise InputError(f"positions have shape {xyz.shape}; expected ({len(numbers)}, 3)")
    if not np.isfinite(xyz).all():
        atom = int(np.nonzero(~np.isfinite(xyz))[0][0])
        raise NotFiniteError(f"position of atom {atom + 1} is {xyz[atom].tolist()} Å")
    if collapsed(numbers, xyz):
        i, j, distance = closest_contact(numbers, xyz)
        raise CollapsedError(
            f"atoms {i + 1} and {j + 1} are {distance:.3f} Å apart; the geometry has collapsed"
        )
    direct = getattr(calculator, "evaluate", None)
    if direct is not None:
        energy, forces = direct(numbers, xyz)
    else:
        from ase import Atoms

        atoms = Atoms(numbers=numbers, positions=xyz)
        untyped: Any = calculator
        forces = np.asarray(untyped.get_property("forces", atoms), dtype=np.float64)
        energy = float(untyped.get_property("energy", atoms))
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        raise NotFiniteError(
            f"energy is {energy} eV, largest force component {np.abs(forces).max()} eV/Å"
        )
    return energy, forces


def _named(name: str, valid: Mapping[str, Any], what: str) -> str:
    if name in valid:
        return name
    close = get_close_matches(name.lower(), [v.lower() for v in valid], n=1, cutoff=0.4)
    nearest = next((v for v in valid if close and v.lower() == close[0]), None)
    hint = f"did you mean {nearest!r}?" if nearest else f"choose from {', '.join(valid)}"
    raise InputError(f"{what} {name!r} is unknown; {hint}")
