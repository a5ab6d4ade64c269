"""Structure relaxation: downhill on a potential energy surface, step by step, resumable.

`init` makes a state, `step` advances it, `relax` drives steps until the largest force is below
the limit. The state holds everything the next step depends on, so that a relaxation stopped
anywhere, saved as arrays and taken up again elsewhere gives the frames an uninterrupted one
gives. The step rules are those of ASE's BFGS, LBFGS and FIRE with ASE's default parameters;
tests hold them to ASE's own classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels import initial_hessian
from kernels.calculators import Rung, evaluate
from kernels.errors import ConvergenceError, InputError, NotFiniteError, StepCapError

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

VERSION = 1

OptimizerName = Literal["BFGS", "LBFGS", "FIRE", "Sella"]
HessianName = Literal["unit", "force-field", "gfn2"]
CoordinatesName = Literal["cartesian", "internal"]
Arrays = dict[str, NDArray[Any]]

# What the tables call the Hessians that are not ASE's.
_HESSIANS = {"force-field": "force field's Hessian", "gfn2": "GFN2-xTB's Hessian"}

# Optimizers that keep a whole Hessian.
HESSIAN_OPTIMIZERS = ("BFGS", "Sella")

# Curvature of the first guess of the Hessian, eV/Å²; also LBFGS's diagonal.
_CURVATURE = 70.0

_LBFGS_MEMORY = 100

# FIRE (Bitzek et al., Phys. Rev. Lett. 2006, 97, 170201): time step and its limits, steps before
# the first speed-up, mixing of velocity and force.
_FIRE_DT, _FIRE_DT_MAX = 0.1, 1.0
_FIRE_DELAY = 5
_FIRE_FASTER, _FIRE_SLOWER = 1.1, 0.5
_FIRE_MIXING, _FIRE_MIXING_DECAY = 0.1, 0.99


@dataclass(frozen=True, slots=True)
class RelaxSettings:
    """What determines a relaxation: `fmax` in eV/Å, `max_step_length` in Å.

    `initial_hessian` is where the optimizer starts from: "unit", its own guess (of BFGS the same
    curvature in all directions, as in ASE), "force-field" or "gfn2". `coordinates` "internal" are
    Sella's. While `coarse_until` (eV/Å, 0: never) is below the largest force, frames are those of
    the calculator that `relax` is given as `coarse`.
    """

    optimizer: OptimizerName = "BFGS"
    fmax: float = 0.03
    max_steps: int = 500
    max_step_length: float = 0.2
    save_forces: bool = False
    initial_hessian: HessianName = "unit"
    coordinates: CoordinatesName = "cartesian"
    coarse_until: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(OptimizerName):
            raise InputError(
                f"optimizer {self.optimizer!r} is unknown; choose from "
                f"{', '.join(get_args(OptimizerName))}"
            )
        if not (math.isfinite(self.fmax) and self.fmax > 0):
            raise InputError(f"fmax {self.fmax} eV/Å is impossible; give a positive force")
        if self.initial_hessian not in get_args(HessianName):
            raise InputError(
                f"initial_hessian {self.initial_hessian!r} is unknown; choose from "
                f"{', '.join(get_args(HessianName))}"
            )
        if self.initial_hessian != "unit" and self.optimizer not in HESSIAN_OPTIMIZERS:
            raise InputError(
                f"initial_hessian {self.initial_hessian!r} needs optimizer "
                f"{' or '.join(HESSIAN_OPTIMIZERS)}, not {self.optimizer}, which keeps no Hessian"
            )
        if self.coordinates not in get_args(CoordinatesName):
            raise InputError(
                f"coordinates {self.coordinates!r} are unknown; choose from "
                f"{', '.join(get_args(CoordinatesName))}"
            )
        if self.coordinates != "cartesian" and self.optimizer != "Sella":
            raise InputError(
                f"coordinates {self.coordinates!r} need optimizer Sella, not {self.optimizer}"
            )
        if not (math.isfinite(self.coarse_until) and self.coarse_until >= 0):
            raise InputError(
                f"coarse_until {self.coarse_until} eV/Å is impossible; give a force, or 0 for never"
            )
        if self.max_steps < 0:
            raise InputError(f"max_steps {self.max_steps} is negative; give 0 or more")
        if not 0 < self.max_step_length <= 1:
            raise InputError(
                f"max_step_length {self.max_step_length} Å is impossible; give 0 < length <= 1"
            )

    @property
    def variant(self) -> str:
        """What differs from the optimizer as ASE has it, each part after a comma, for tables."""
        parts = [
            "internal coordinates" if self.coordinates == "internal" else "",
            _HESSIANS.get(self.initial_hessian, ""),
            f"coarse grid to {self.coarse_until:g} eV/Å" if self.coarse_until else "",
        ]
        return "".join(f", {part}" for part in parts if part)


@dataclass(slots=True, eq=False)
class RelaxState:
    """A relaxation under way; `step` advances it in place.

    `numbers` (N,), `positions` (N, 3) in Å and `forces` (N, 3) in eV/Å are the last frame's;
    `memory` is the optimiser's (Hessian, velocities, ...). Frame 0 is the starting geometry. The
    first `n_coarse` frames are the coarse calculator's, whose energies compare with each other.
    """

    numbers: NDArray[np.uint8]
    positions: NDArray[np.float64]
    forces: NDArray[np.float64]
    optimizer: OptimizerName
    memory: Arrays
    n_evaluations: int
    _energies: list[float] = field(repr=False)
    _fmax: list[float] = field(repr=False)
    _frames: list[NDArray[np.float64]] = field(repr=False)
    _frame_forces: list[NDArray[np.float64]] | None = field(repr=False)
    # The start of the next SCF: as arrays when it came from a file, else in the calculator that
    # made the last frame, which is asked for it only when the state is saved.
    _scf: Arrays | None = field(default=None, repr=False)
    _calculator: Calculator | None = field(default=None, repr=False)
    _calculator_clock: int = field(default=0, repr=False)
    _sella: Any = field(default=None, repr=False)
    n_coarse: int = 0

    @property
    def is_coarse(self) -> bool:
        """Whether the last frame is the coarse calculator's."""
        return self.n_coarse == len(self._energies)

    @property
    def steps(self) -> int:
        """Steps taken so far; one less than the number of frames S."""
        return len(self._energies) - 1

    @property
    def energy(self) -> float:
        """Energy of the last frame in eV."""
        return self._energies[-1]

    @property
    def energies(self) -> NDArray[np.float64]:
        """Energy of every frame (S,) in eV."""
        return np.array(self._energies, dtype=np.float64)

    @property
    def fmax(self) -> NDArray[np.float64]:
        """Largest force on an atom in every frame (S,) in eV/Å."""
        return np.array(self._fmax, dtype=np.float64)

    @property
    def frames(self) -> NDArray[np.float64]:
        """Positions of every frame (S, N, 3) in Å."""
        return np.stack(self._frames)

    @property
    def frame_forces(self) -> NDArray[np.float64] | None:
        """Forces of every frame (S, N, 3) in eV/Å when they were asked for, else None."""
        return None if self._frame_forces is None else np.stack(self._frame_forces)

    def to_arrays(self) -> Arrays:
        """Return all of the state as plain arrays, for a file.

        Call it before the calculator is used for anything else; raises RuntimeError afterwards.
        """
        arrays: Arrays = {
            "numbers": self.numbers.copy(),
            "forces": self.forces.copy(),
            # As bytes: not every file format knows NumPy's strings.
            "optimizer": np.frombuffer(self.optimizer.encode(), dtype=np.uint8),
            "n_evaluations": np.array(self.n_evaluations, dtype=np.int64),
            "n_coarse": np.array(self.n_coarse, dtype=np.int64),
            "energies": self.energies,
            "fmax": self.fmax,
            "frames": self.frames,
        }
        if self._frame_forces is not None:
            arrays["frame_forces"] = np.stack(self._frame_forces)
        memory = _sella_memory(self._sella) if self._sella is not None else self.memory
        arrays.update({f"memory/{name}": np.array(value) for name, value in memory.items()})
        arrays.update({f"scf/{name}": value for name, value in self._scf_start().items()})
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> RelaxState:
        """Rebuild a state from `to_arrays`; raises InputError when a part is missing."""
        try:
            frames = np.array(arrays["frames"], dtype=np.float64)
            frame_forces = arrays.get("frame_forces")
            optimizer = np.asarray(arrays["optimizer"], dtype=np.uint8).tobytes().decode()
            if optimizer not in get_args(OptimizerName):
                raise InputError(f"saved relaxation names an unknown optimizer {optimizer!r}")
            return cls(
                numbers=np.array(arrays["numbers"], dtype=np.uint8),
                positions=frames[-1].copy(),
                forces=np.array(arrays["forces"], dtype=np.float64),
                optimizer=optimizer,  # type: ignore[arg-type]
                memory=_below("memory/", arrays),
                n_evaluations=int(arrays["n_evaluations"]),
                _energies=[float(energy) for energy in arrays["energies"]],
                _fmax=[float(force) for force in arrays["fmax"]],
                _frames=list(frames),
                _frame_forces=None
                if frame_forces is None
                else list(np.array(frame_forces, dtype=np.float64)),
                _scf=_below("scf/", arrays),
                # States saved before there was a choice have none.
                n_coarse=int(arrays.get("n_coarse", 0)),
            )
        except KeyError as error:
            raise InputError(
                f"saved relaxation lacks {error.args[0]!r}; start the relaxation anew"
            ) from error

    def _scf_start(self) -> Arrays:
        if self._calculator is None:
            return dict(self._scf or {})
        if getattr(self._calculator, "n_evaluations", 0) != self._calculator_clock:
            raise RuntimeError(
                "the calculator was used after this state's last step; save the state before that"
            )
        save = getattr(self._calculator, "save_scf", None)
        return {} if save is None else dict(save())


def init(
    numbers: ArrayLike,
    positions: ArrayLike,
    calculator: Calculator,
    settings: RelaxSettings,
    *,
    smiles: str = "",
    charge: int = 0,
    multiplicity: int = 1,
    coarse: bool = False,
) -> RelaxState:
    """Evaluate the starting geometry: numbers (N,), positions (N, 3) in Å.

    `smiles`, in whose canonical order the atoms are, is needed for a force field's Hessian alone,
    `charge` and `multiplicity` for GFN2-xTB's; `coarse` says that the calculator is the coarse one.
    Raises NotFiniteError, CollapsedError, ScfError, HessianError, or InputError.
    """
    z = np.array(numbers, dtype=np.uint8)
    xyz = np.array(positions, dtype=np.float64, order="C")
    reset = getattr(calculator, "reset_scf", None)
    if reset is not None:
        # What this calculator did before must not reach the result.
        reset()
    memory = {}
    if settings.initial_hessian == "force-field":
        memory["hessian"] = initial_hessian.force_field(smiles, xyz)
    elif settings.initial_hessian == "gfn2":
        memory["hessian"] = initial_hessian.gfn2(z, xyz, charge=charge, multiplicity=multiplicity)
    energy, forces = evaluate(calculator, z, xyz)
    state = RelaxState(
        numbers=z,
        positions=xyz,
        forces=forces,
        optimizer=settings.optimizer,
        memory=memory,
        n_evaluations=1,
        _energies=[],
        _fmax=[],
        _frames=[],
        _frame_forces=[] if settings.save_forces else None,
    )
    _record(state, xyz, energy, forces, calculator)
    state.n_coarse = int(coarse)
    return state


def step(state: RelaxState, calculator: Calculator, settings: RelaxSettings) -> RelaxState:
    """Take one step in place and return the state.

    Raises NotFiniteError, CollapsedError, ScfError; the state is then still that of the frame
    before. Raises InputError when the state was made by another optimiser.
    """
    if state.optimizer != settings.optimizer:
        raise InputError(
            f"the saved relaxation used {state.optimizer}, the settings ask for "
            f"{settings.optimizer}; start the relaxation anew"
        )
    if state._calculator is not calculator:
        load = getattr(calculator, "load_scf", None)
        if load is not None:
            load(state._scf_start())
    if settings.optimizer == "Sella":
        return _sella_step(state, calculator, settings)
    displacement, memory = _RULES[settings.optimizer](state, settings.max_step_length)
    positions = state.positions + displacement
    energy, forces = evaluate(calculator, state.numbers, positions)
    state.n_evaluations += 1
    state.memory = memory
    _record(state, positions, energy, forces, calculator)
    return state


def is_converged(state: RelaxState, settings: RelaxSettings) -> bool:
    """Tell whether the largest force of the last frame is below `settings.fmax`.

    Not on the coarse calculator, whatever its forces.
    """
    return state._fmax[-1] < settings.fmax and not state.is_coarse


def relax(
    numbers: ArrayLike,
    positions: ArrayLike,
    calculator: Calculator,
    settings: RelaxSettings,
    *,
    state: RelaxState | None = None,
    on_step: Callable[[RelaxState], bool] | None = None,
    smiles: str = "",
    charge: int = 0,
    multiplicity: int = 1,
    coarse: Calculator | None = None,
) -> RelaxState:
    """Relax numbers (N,) from positions (N, 3) in Å, or go on from a saved `state`.

    With a calculator `coarse` the first frames are its, down to `settings.coarse_until`. The step
    from there ends on `calculator`, with the same Hessian and the density to start from.
    `on_step` sees the state after every evaluation, the first included; when it returns False
    the unfinished state is returned, to be saved. Raises StepCapError after
    `settings.max_steps`, and what `step` raises.
    """
    if state is None:
        state = init(
            numbers,
            positions,
            coarse or calculator,
            settings,
            smiles=smiles,
            charge=charge,
            multiplicity=multiplicity,
            coarse=coarse is not None,
        )
        if on_step is not None and not on_step(state):
            return state
    while not is_converged(state, settings):
        if state.steps >= settings.max_steps:
            raise StepCapError(
                f"largest force {state._fmax[-1]:.4f} eV/Å after {state.steps} steps of "
                f"{settings.optimizer}, limit {settings.fmax:g}; raise max_steps or fmax"
            )
        if coarse is not None and state.is_coarse and state._fmax[-1] >= settings.coarse_until:
            step(state, coarse, settings)
            state.n_coarse += 1
        else:
            step(state, calculator, settings)
        if on_step is not None and not on_step(state):
            break
    return state


def relax_with_ladder(
    numbers: ArrayLike,
    positions: ArrayLike,
    make: Callable[..., Calculator],
    settings: RelaxSettings,
    rungs: tuple[Rung, ...],
    *,
    state: RelaxState | None = None,
    tried: tuple[str, ...] = (),
    on_step: Callable[[RelaxState, tuple[str, ...]], bool] | None = None,
    smiles: str = "",
    charge: int = 0,
    multiplicity: int = 1,
) -> tuple[RelaxState, tuple[str, ...]]:
    """Relax, and on a ConvergenceError start again with the next rung that can help.

    `make(**changes)` builds a calculator with the changed settings; with `settings.coarse_until`
    one on grid "coarse" too, unless a rung has changed the grid. `state` and `tried` take up
    a relaxation that was stopped on the rung `tried` ends with; `on_step` is given both, since
    both must be saved. Returns the state and the names of the rungs taken. When none is left the
    last ConvergenceError is raised with them in `.history`.
    """
    changes: dict[str, Any] = {}
    by_name = {rung.name: rung for rung in rungs}
    for name in tried:
        if name not in by_name:
            raise InputError(f"the saved relaxation stopped on an unknown rung {name!r}")
        settings = _climb(by_name[name], changes, settings)
    while True:
        watch = None if on_step is None else partial(_watch, on_step, tried)
        rough = settings.coarse_until > 0 and "grid" not in changes
        try:
            done = relax(
                numbers,
                positions,
                make(**changes),
                settings,
                state=state,
                on_step=watch,
                smiles=smiles,
                charge=charge,
                multiplicity=multiplicity,
                coarse=make(**changes, grid="coarse") if rough else None,
            )
            return done, tried
        except ConvergenceError as error:
            rung = next(
                (r for r in rungs if r.name not in tried and r.against == type(error).__name__),
                None,
            )
            if rung is None:
                error.history = tried
                raise
            settings = _climb(rung, changes, settings)
            tried = (*tried, rung.name)
            # From the start: one result, one set of settings.
            state = None


def _watch(
    on_step: Callable[[RelaxState, tuple[str, ...]], bool],
    tried: tuple[str, ...],
    state: RelaxState,
) -> bool:
    return on_step(state, tried)


def _climb(rung: Rung, changes: dict[str, Any], settings: RelaxSettings) -> RelaxSettings:
    changes.update(rung.calculator)
    relaxation = dict(rung.relaxation)
    factor = relaxation.pop("max_steps_factor", 1)
    return replace(settings, max_steps=settings.max_steps * factor, **relaxation)


def _record(
    state: RelaxState,
    positions: NDArray[np.float64],
    energy: float,
    forces: NDArray[np.float64],
    calculator: Calculator,
) -> None:
    state.positions = positions
    state.forces = forces
    state._energies.append(energy)
    state._fmax.append(float(np.sqrt(np.einsum("ij,ij->i", forces, forces).max())))
    state._frames.append(positions)
    if state._frame_forces is not None:
        state._frame_forces.append(forces)
    state._scf = None
    state._calculator = calculator
    state._calculator_clock = getattr(calculator, "n_evaluations", 0)


def _bfgs(state: RelaxState, longest: float) -> tuple[NDArray[np.float64], Arrays]:
    """Quasi-Newton step on the full Hessian, |eigenvalues| in place of negative ones."""
    x = state.positions.ravel()
    gradient = -state.forces.ravel()
    if "x" in state.memory:
        hessian = state.memory["hessian"]
        dx = x - state.memory["x"]
        # Also ASE's rule: a step this short says nothing about curvature.
        if np.abs(dx).max() >= 1e-7:
            dg = gradient - state.memory["gradient"]
            hdx = hessian @ dx
            with np.errstate(divide="ignore", invalid="ignore"):
                hessian = hessian + np.outer(dg, dg) / (dx @ dg) - np.outer(hdx, hdx) / (dx @ hdx)
    elif state.memory:
        hessian = state.memory["hessian"]
    else:
        hessian = np.eye(x.size) * _CURVATURE
    displacement = _newton_step(hessian, gradient)
    memory = {"hessian": hessian, "x": x.copy(), "gradient": gradient}
    return _shortened(displacement.reshape(-1, 3), longest), memory


def _newton_step(
    hessian: NDArray[np.float64], gradient: NDArray[np.float64]
) -> NDArray[np.float64]:
    from scipy.linalg.lapack import dposv  # type: ignore[import-untyped,unused-ignore]

    if not np.isfinite(hessian).all():
        raise NotFiniteError("the optimiser's Hessian is no longer finite; a step did not move")
    # While the Hessian is positive definite its eigenvalues are their own absolute values, and a
    # Cholesky solve gives the same step 15 times faster (60 coordinates).
    _, solution, indefinite = dposv(hessian, gradient, lower=1)
    if indefinite == 0:
        newton: NDArray[np.float64] = -solution
        return newton
    eigenvalues, vectors = np.linalg.eigh(hessian)
    step: NDArray[np.float64] = -vectors @ (gradient @ vectors / np.abs(eigenvalues))
    return step


def _lbfgs(state: RelaxState, longest: float) -> tuple[NDArray[np.float64], Arrays]:
    """Two-loop recursion over the last steps (Nocedal, Math. Comput. 1980, 35, 773)."""
    x = state.positions.ravel()
    gradient = -state.forces.ravel()
    if state.memory:
        dx = x - state.memory["x"]
        dg = gradient - state.memory["gradient"]
        s = np.concatenate([state.memory["s"], dx[None]])[-_LBFGS_MEMORY:]
        y = np.concatenate([state.memory["y"], dg[None]])[-_LBFGS_MEMORY:]
        rho = np.append(state.memory["rho"], 1.0 / (dg @ dx))[-_LBFGS_MEMORY:]
    else:
        s = y = np.empty((0, x.size))
        rho = np.empty(0)
    q = gradient.copy()
    alpha = np.empty(len(rho))
    for k in reversed(range(len(rho))):
        alpha[k] = rho[k] * (s[k] @ q)
        q -= alpha[k] * y[k]
    z = q / _CURVATURE
    for k in range(len(rho)):
        z += s[k] * (alpha[k] - rho[k] * (y[k] @ z))
    memory = {"s": s, "y": y, "rho": rho, "x": x.copy(), "gradient": gradient}
    return _shortened(-z.reshape(-1, 3), longest), memory


def _fire(state: RelaxState, longest: float) -> tuple[NDArray[np.float64], Arrays]:
    """Damped dynamics that speeds up while it goes downhill."""
    forces = state.forces.ravel()
    if state.memory:
        velocity = state.memory["velocity"]
        dt, mixing, downhill = (float(value) for value in state.memory["clock"])
        if forces @ velocity > 0:
            speed = math.sqrt(velocity @ velocity)
            velocity = (1 - mixing) * velocity + mixing * forces / math.sqrt(
                forces @ forces
            ) * speed
            if downhill > _FIRE_DELAY:
                dt = min(dt * _FIRE_FASTER, _FIRE_DT_MAX)
                mixing *= _FIRE_MIXING_DECAY
            downhill += 1
        else:
            velocity = np.zeros_like(velocity)
            dt, mixing, downhill = dt * _FIRE_SLOWER, _FIRE_MIXING, 0.0
    else:
        velocity = np.zeros_like(forces)
        dt, mixing, downhill = _FIRE_DT, _FIRE_MIXING, 0.0
    velocity = velocity + dt * forces
    displacement = dt * velocity
    # Unlike the others FIRE limits the length of the whole step, not of each atom's.
    length = math.sqrt(displacement @ displacement)
    if length > longest:
        displacement = longest * displacement / length
    return displacement.reshape(-1, 3), {
        "velocity": velocity,
        "clock": np.array([dt, mixing, downhill]),
    }


_RULES: Mapping[str, Callable[[RelaxState, float], tuple[NDArray[np.float64], Arrays]]] = {
    "BFGS": _bfgs,
    "LBFGS": _lbfgs,
    "FIRE": _fire,
}


def _shortened(displacement: NDArray[np.float64], longest: float) -> NDArray[np.float64]:
    """Scale a step (N, 3) so that no atom moves farther than `longest` Å."""
    length = float(np.sqrt(np.einsum("ij,ij->i", displacement, displacement).max()))
    return displacement * (longest / length) if length >= longest else displacement


def _sella_step(state: RelaxState, calculator: Calculator, settings: RelaxSettings) -> RelaxState:
    """Let Sella (Hermes et al., J. Chem. Theory Comput. 2022, 18, 6974) take one step.

    Sella limits its steps by its own trust radius. Its state is richer than what it lets one
    save: a resumed run keeps the Hessian and the radius, and may differ in the last digits.
    """
    if state._sella is None or state._calculator is not calculator:
        if state._sella is not None:
            state.memory = _sella_memory(state._sella)
        state._sella = _new_sella(state, calculator, settings)
    atoms = state._sella.atoms
    before = atoms.calc.count
    state._sella.step()
    energy = float(atoms.get_potential_energy())
    forces = np.array(atoms.get_forces(), dtype=np.float64)
    state.n_evaluations += atoms.calc.count - before
    _record(state, atoms.get_positions(), energy, forces, calculator)
    return state


def _new_sella(state: RelaxState, calculator: Calculator, settings: RelaxSettings) -> Any:
    from ase import Atoms

    try:
        from sella import Sella
    except ImportError as error:
        raise InputError(
            "optimizer 'Sella' is not installed; pip install 'basin-orchestrator[sella]', or "
            "choose BFGS"
        ) from error

    from kernels.engines import Checked

    atoms = Atoms(numbers=state.numbers, positions=state.positions)
    atoms.calc = Checked(calculator)
    # The last frame is known: Sella need not compute it again.
    atoms.calc.atoms = atoms.copy()  # type: ignore[no-untyped-call]
    atoms.calc.results = {"energy": state.energy, "forces": state.forces}
    hessian: Any = state.memory.get("hessian")
    internal = settings.coordinates == "internal"
    # Sella's default is a search for a saddle point.
    optimizer: Any = Sella(
        atoms,
        order=0,
        internal=internal,
        logfile=None,  # type: ignore[arg-type]
        hessian_function=lambda _: hessian,
    )
    if "delta" in state.memory:
        optimizer.delta = float(state.memory["delta"])
    if hessian is None:
        return optimizer
    if internal and "delta" not in state.memory:
        # Still the initial one, of cartesian coordinates.
        optimizer.pes.calculate_hessian()
    elif len(hessian) == optimizer.pes.dim:
        # Else the coordinates are others than before the interruption, and Sella's guess stays.
        optimizer.pes.set_H(hessian.copy(), initialized=True)
    return optimizer


def _sella_memory(optimizer: Any) -> Arrays:
    memory: Arrays = {"delta": np.array(optimizer.delta)}
    if optimizer.pes.get_H().B is not None:
        memory["hessian"] = np.array(optimizer.pes.get_H().asarray())
    return memory


def _below(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {
        name.removeprefix(prefix): np.array(array)
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
