"""Metropolis chains at one temperature, advanced in segments and bit-equal however they are cut.

`init` evaluates the start, `advance` takes the chain to a given step, and the state goes to arrays
and back between any two steps. A step's random numbers come from the seed and its number alone, so
that nothing but the state has to be saved and no chain depends on another.

Each SCF starts from the charges of the geometry evaluated last, accepted or not: the energy of a
geometry then depends on the way there, by about 1e-8 eV, five orders below k_B T at 10 K. (Starting
from the accepted geometry's charges instead was measured to save 2 % of the time at most.) Moves of
all 3N coordinates also shift and turn the molecule, to which the energy is blind: the energies'
distribution is that of the 3N-6 other motions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.calculators import evaluate
from kernels.errors import InputError, NotFiniteError, ScfError
from kernels.units import BOLTZMANN_EV_PER_K, EV_TO_KCAL

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

VERSION: Final = 1

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]

# Best acceptance of random-walk moves in many dimensions (Roberts, Gelman & Gilks, Ann. Appl.
# Probab. 1997, 7, 110).
_BEST_ACCEPTANCE: Final = 0.234

# Robbins-Monro gains k^-0.6 move the step size far at first and by less than a percent at last.
_GAIN_EXPONENT: Final = 0.6

# Tuned step sizes stay within these, in Å.
_SHORTEST, _LONGEST = 1e-6, 1.0

# The second and third words of the Philox counter; no two uses of a seed draw the same numbers.
# (Diffusion proposals use third word 2, the ladder of temperatures 3 and 4.)
_MOVE: Final = (0, 0)
_ACCEPT: Final = (1, 0)

# Steps whose random numbers are drawn at once: to set up the generator for each would cost as much
# as all else that is done here.
_BLOCK: Final = 16


@dataclass(frozen=True, slots=True)
class ChainSettings:
    """What determines a chain beside its start and seed: `temperature` in K, energies in eV.

    `steps` include the `burn_in`; positions are kept at steps 0, `save_every`, 2 `save_every`, ...
    `step_size` is the standard deviation of a Gaussian move along each coordinate in Å, 0 for the
    published one; `tune` adapts it during burn-in, never later. `accept_all` rejects nothing: the
    reference that diverges. A chain that comes to lie more than `max_energy` above its start has
    diverged, and stops there.
    """

    temperature: float
    steps: int
    burn_in: int
    save_every: int = 10
    step_size: float = 0.0
    tune: bool = False
    accept_all: bool = False
    max_energy: float = math.inf

    def __post_init__(self) -> None:
        needs_temperature = not self.accept_all or self.step_size == 0
        if needs_temperature and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature {self.temperature} K is impossible; give more than 0 K")
        if self.steps < 0 or not 0 <= self.burn_in <= self.steps:
            raise InputError(
                f"steps {self.steps} with burn_in {self.burn_in} is impossible; give "
                "0 <= burn_in <= steps"
            )
        if self.save_every < 1:
            raise InputError(f"save_every {self.save_every} is impossible; give 1 or more steps")
        if not 0 <= self.step_size <= _LONGEST:
            raise InputError(
                f"step_size {self.step_size} Å is impossible; give 0 < step_size <= {_LONGEST:g}, "
                "or 0 for the published one"
            )
        if self.tune and self.accept_all:
            raise InputError("tune needs rejections to learn from; drop tune or accept_all")
        if not self.max_energy > 0:
            raise InputError(f"max_energy {self.max_energy} eV is impossible; give more than 0 eV")


class Proposal(Protocol):
    """What a move is; `memory` is what it wants remembered of a geometry, saved with the chain."""

    def init(self, positions: Floats) -> Arrays:
        """Return the memory of the chain's start, positions (N, 3) in Å."""
        ...

    def propose(
        self, positions: Floats, memory: Arrays, seed: int, step: int, step_size: float
    ) -> tuple[Floats, Arrays, float]:
        """Return new positions (N, 3) in Å, their memory, and log q(old|new) - log q(new|old).

        `step_size` in Å is the chain's at that step; random numbers depend on seed and step alone.
        """
        ...


class GaussianProposal:
    """Moves every coordinate by a normal number times the step size; remembers nothing."""

    def init(self, positions: Floats) -> Arrays:
        """Return an empty memory."""
        return {}

    def propose(
        self, positions: Floats, memory: Arrays, seed: int, step: int, step_size: float
    ) -> tuple[Floats, Arrays, float]:
        """Return moved positions (N, 3) in Å, the memory as it was, and 0."""
        noise = _normal(seed, step // _BLOCK, len(positions))[step % _BLOCK]
        return positions + step_size * noise, memory, 0.0


@dataclass(slots=True, eq=False)
class ChainState:
    """A chain under way at `step`; `advance` takes it on in place.

    `positions` (N, 3) in Å and `energy` in eV are the present ones. `energies` (steps+1,) in eV,
    `moved` (steps+1,) whether a step was accepted, and `frames` (steps//save_every+1, N, 3) in Å
    have their final size at once; what lies ahead is NaN or false. `diverged` says why the chain
    stopped, "" while it did not. `n_failed` counts proposals that no energy could be computed for.
    """

    step: int
    positions: Floats
    energy: float
    energies: Floats = field(repr=False)
    moved: NDArray[np.bool_] = field(repr=False)
    frames: NDArray[np.float32] = field(repr=False)
    burn_in: int
    save_every: int
    step_size: float
    n_evaluations: int
    n_failed: int = 0
    diverged: str = ""
    memory: Arrays = field(default_factory=dict, repr=False)
    # The start of the next SCF: as arrays when it came from a file, else in the calculator that
    # made the last energy, which is asked for it only when the state is saved.
    _scf: Arrays = field(default_factory=dict, repr=False)
    _calculator: Calculator | None = field(default=None, repr=False)
    _calculator_clock: int = field(default=0, repr=False)

    @property
    def steps(self) -> int:
        """Steps the chain has when it is done."""
        return len(self.energies) - 1

    @property
    def is_done(self) -> bool:
        """Whether all steps are made, or none can follow."""
        return self.step >= self.steps or self.diverged != ""

    @property
    def n_frames(self) -> int:
        """Number of `frames` there are so far."""
        return self.step // self.save_every + 1

    @property
    def tried(self) -> int:
        """Steps made after burn-in."""
        return max(0, self.step - self.burn_in)

    @property
    def accepted(self) -> int:
        """Steps accepted after burn-in."""
        return int(np.count_nonzero(self.moved[self.burn_in + 1 : self.step + 1]))

    @property
    def acceptance(self) -> float:
        """Share of steps accepted after burn-in; NaN before its end."""
        return self.accepted / self.tried if self.tried else math.nan

    def to_arrays(self) -> Arrays:
        """Return all of the state as plain arrays, for a file; what lies ahead is left out.

        Call it before the calculator is used for anything else; raises RuntimeError afterwards.
        """
        return {
            "step": np.array(self.step, dtype=np.int64),
            "steps": np.array(self.steps, dtype=np.int64),
            "burn_in": np.array(self.burn_in, dtype=np.int64),
            "save_every": np.array(self.save_every, dtype=np.int64),
            "positions": self.positions.copy(),
            "energy": np.array(self.energy),
            "energies": self.energies[: self.step + 1].copy(),
            "moved": self.moved[: self.step + 1].copy(),
            "frames": self.frames[: self.n_frames].copy(),
            "step_size": np.array(self.step_size),
            "n_evaluations": np.array(self.n_evaluations, dtype=np.int64),
            "n_failed": np.array(self.n_failed, dtype=np.int64),
            # As bytes: not every file format knows NumPy's strings.
            "diverged": np.frombuffer(self.diverged.encode(), dtype=np.uint8),
            **{f"memory/{name}": np.array(value) for name, value in self.memory.items()},
            **{f"scf/{name}": value for name, value in self._scf_start().items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ChainState:
        """Rebuild a state from `to_arrays`; raises InputError when a part is missing."""
        try:
            step, steps = int(arrays["step"]), int(arrays["steps"])
            save_every = int(arrays["save_every"])
            positions = np.array(arrays["positions"], dtype=np.float64)
            state = cls(
                step=step,
                positions=positions,
                energy=float(arrays["energy"]),
                burn_in=int(arrays["burn_in"]),
                save_every=save_every,
                step_size=float(arrays["step_size"]),
                n_evaluations=int(arrays["n_evaluations"]),
                n_failed=int(arrays["n_failed"]),
                diverged=np.asarray(arrays["diverged"], dtype=np.uint8).tobytes().decode(),
                memory=_below("memory/", arrays),
                _scf=_below("scf/", arrays),
                **_records(steps, save_every, len(positions)),
            )
            state.energies[: step + 1] = arrays["energies"]
            state.moved[: step + 1] = arrays["moved"]
            state.frames[: state.n_frames] = arrays["frames"]
        except KeyError as error:
            raise InputError(
                f"saved chain lacks {error.args[0]!r}; start the chain anew"
            ) from error
        return state

    def _scf_start(self) -> Arrays:
        if self._calculator is None:
            return dict(self._scf)
        if getattr(self._calculator, "n_evaluations", 0) != self._calculator_clock:
            raise RuntimeError(
                "the calculator was used after this chain's last step; save the chain before that"
            )
        return dict(getattr(self._calculator, "save_scf", dict)())


def published_step_size(temperature: float) -> float:
    """Return 0.01 sqrt(k_B T), with k_B T in kcal/mol, as a step size in Å.

    The published chains' (Rothchild et al., Chem. Sci. 2024, 15, 13506) at `temperature` in K.
    """
    return 0.01 * math.sqrt(BOLTZMANN_EV_PER_K * temperature * EV_TO_KCAL)


def init(
    numbers: ArrayLike,
    positions: ArrayLike,
    calculator: Calculator,
    settings: ChainSettings,
    proposal: Proposal | None = None,
) -> ChainState:
    """Evaluate the start of a chain: numbers (N,), positions (N, 3) in Å.

    Raises NotFiniteError, CollapsedError, ScfError, or InputError: a chain needs a start.
    """
    z = np.array(numbers, dtype=np.uint8)
    xyz = np.array(positions, dtype=np.float64, order="C")
    # What this calculator did before must not reach the chain.
    getattr(calculator, "reset_scf", lambda: None)()
    energy, _ = evaluate(calculator, z, xyz)
    state = ChainState(
        step=0,
        positions=xyz,
        energy=energy,
        burn_in=settings.burn_in,
        save_every=settings.save_every,
        step_size=settings.step_size or published_step_size(settings.temperature),
        n_evaluations=1,
        memory={} if proposal is None else proposal.init(xyz),
        **_records(settings.steps, settings.save_every, len(z)),
    )
    state.energies[0] = energy
    state.frames[0] = xyz
    _hold(state, calculator)
    return state


def advance(
    state: ChainState,
    numbers: ArrayLike,
    calculator: Calculator,
    settings: ChainSettings,
    seed: int,
    *,
    until: int,
    proposal: Proposal | None = None,
) -> None:
    """Take the chain in place to step `until`, or to where it ends or diverges before that.

    `seed` (0 to 2^128 - 1) names the chain's random numbers. A proposal without an energy (its SCF
    failed, atoms collapsed) is rejected, and counted; with `accept_all` it is where the chain
    diverged. Raises InputError, also where the settings are not those of the state, and
    ResourceError; the state is then that of the last whole step.
    """
    given = (settings.steps, settings.burn_in, settings.save_every)
    if given != (state.steps, state.burn_in, state.save_every):
        raise InputError(
            f"the saved chain has steps, burn_in and save_every "
            f"{state.steps, state.burn_in, state.save_every}, the settings {given}; start it anew"
        )
    if not 0 <= seed < 2**128:
        raise InputError(f"seed {seed} is not between 0 and 2^128 - 1")
    z = np.asarray(numbers, dtype=np.uint8)
    if state._calculator is not calculator:
        load = getattr(calculator, "load_scf", None)
        if load is not None:
            load(state._scf_start())
    move = GaussianProposal() if proposal is None else proposal
    thermal_energy = BOLTZMANN_EV_PER_K * settings.temperature
    end = min(until, state.steps)
    try:
        while state.step < end and not state.diverged:
            _step(state, z, calculator, settings, seed, move, thermal_energy)
    finally:
        _hold(state, calculator)


def _step(
    state: ChainState,
    numbers: NDArray[np.uint8],
    calculator: Calculator,
    settings: ChainSettings,
    seed: int,
    move: Proposal,
    thermal_energy: float,
) -> None:
    step = state.step + 1
    positions, memory, log_ratio = move.propose(
        state.positions, state.memory, seed, step, state.step_size
    )
    why = ""
    energy = math.nan
    try:
        energy, _ = evaluate(calculator, numbers, positions)
    except (NotFiniteError, ScfError) as error:
        why = str(error)
    state.n_evaluations += 1
    if why:
        state.n_failed += 1
        # A failed SCF leaves nothing to start the next from, in any engine alike.
        getattr(calculator, "reset_scf", lambda: None)()
    if settings.accept_all:
        if why:
            state.diverged = f"step {step}: {why}"
            return
        accept = True
    elif why or math.isnan(log_ratio):
        accept, exponent = False, -math.inf
    else:
        exponent = (state.energy - energy) / thermal_energy + log_ratio
        accept = exponent >= 0 or _chance(seed, step) < math.exp(exponent)
    if accept:
        state.positions, state.energy, state.memory = positions, energy, memory
        state.moved[step] = True
    state.energies[step] = state.energy
    if step % state.save_every == 0:
        state.frames[step // state.save_every] = state.positions
    if settings.tune and step <= state.burn_in:
        gain = step**-_GAIN_EXPONENT
        state.step_size = tuned_step_size(state.step_size, math.exp(min(0.0, exponent)), gain=gain)
    state.step = step
    above = state.energy - float(state.energies[0])
    if above > settings.max_energy:
        state.diverged = (
            f"step {step}: {above:.3f} eV above the start, more than max_energy "
            f"{settings.max_energy:g} eV"
        )


def gain(number: int) -> float:
    """Return how far the tuning step of this number, from 1, may move the step size."""
    return float(number**-_GAIN_EXPONENT)


def tuned_step_size(step_size: float, acceptance: float, *, gain: float) -> float:
    """Return a step size in Å nearer to the one whose moves are accepted with probability 0.234.

    One Robbins-Monro step on its logarithm, of size `gain`, from a move's chance of acceptance.
    """
    changed = step_size * math.exp(gain * (acceptance - _BEST_ACCEPTANCE))
    return min(max(changed, _SHORTEST), _LONGEST)


def _chance(seed: int, step: int) -> float:
    return _uniform(seed, step // _BLOCK)[step % _BLOCK]


@lru_cache(maxsize=64)
def _normal(seed: int, block: int, n_atoms: int) -> Floats:
    drawn = _generator(seed, block, _MOVE).standard_normal((_BLOCK, n_atoms, 3))
    drawn.flags.writeable = False
    return drawn


@lru_cache(maxsize=64)
def _uniform(seed: int, block: int) -> list[float]:
    # As Python's numbers, which are faster to compare one by one.
    return [float(chance) for chance in _generator(seed, block, _ACCEPT).random(_BLOCK)]


def _generator(seed: int, block: int, words: tuple[int, int]) -> np.random.Generator:
    # Salmon et al., SC 2011. Counting goes up from the lowest word: no two blocks overlap.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, *words, block]))


def _records(steps: int, save_every: int, n_atoms: int) -> dict[str, Any]:
    return {
        "energies": np.full(steps + 1, np.nan),
        "moved": np.zeros(steps + 1, dtype=np.bool_),
        "frames": np.full((steps // save_every + 1, n_atoms, 3), np.nan, dtype=np.float32),
    }


def _hold(state: ChainState, calculator: Calculator) -> None:
    state._scf = {}
    state._calculator = calculator
    state._calculator_clock = getattr(calculator, "n_evaluations", 0)


def _below(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {
        name[len(prefix) :]: np.array(value)
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
