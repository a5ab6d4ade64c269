"""Replica exchange: a ladder of Metropolis chains whose neighbours in temperature swap places.

A walker is a chain that keeps its geometry, its calculator and its random numbers; what walkers
exchange is the temperature (and its step size), so that a swap moves two numbers, not molecules.
After every segment of `swap_every` steps all processes learn all energies and draw the same random
numbers, and so agree on the swaps without asking; between segments nothing is shared. Since each
walker has its own calculator, the numbers are bit-equal for any number of processes, and however
a run was stopped, killed and taken up again.

Swaps: Swendsen & Wang, Phys. Rev. Lett. 1986, 57, 2607; even and odd pairs in turn.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError, KernelError
from kernels.sampling import metropolis
from kernels.sampling.metropolis import Arrays, ChainSettings, ChainState
from kernels.units import BOLTZMANN_EV_PER_K

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

VERSION: Final = 1

T = TypeVar("T")

# The third word of the Philox counter (see `metropolis`): seeds of walkers, and swaps.
_WALKER: Final = 3
_SWAP: Final = 4

_NOTHING, _SAVE, _STOP = 0, 1, 2


class Communicator(Protocol):
    """What is asked of a group of processes; mpi4py's communicators offer it."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def allgather(self, sendobj: Any) -> list[Any]:
        """Return what every process gave, in order of their ranks."""
        ...


class SingleProcess:
    """The group of one process."""

    rank: Final = 0
    size: Final = 1

    def allgather(self, sendobj: Any) -> list[Any]:
        """Return what was given, in a list."""
        return [sendobj]


@dataclass(frozen=True, slots=True)
class ExchangeSettings:
    """What determines a ladder beside its start and seed: `temperatures` in K, ascending.

    The other fields are those of `metropolis.ChainSettings`, and `swap_every` the steps between
    swaps. With `tune` each temperature's step size is adapted during burn-in.
    """

    temperatures: tuple[float, ...]
    steps: int
    burn_in: int
    save_every: int = 10
    swap_every: int = 10
    step_size: float = 0.0
    tune: bool = False

    def __post_init__(self) -> None:
        given = self.temperatures
        if len(given) < 2 or any(low >= high for low, high in pairwise(given)):
            raise InputError(
                f"temperatures {list(given)} K make no ladder; give two or more in ascending order"
            )
        if self.swap_every < 1:
            raise InputError(f"swap_every {self.swap_every} is impossible; give 1 or more steps")
        self.chains()

    @property
    def n_segments(self) -> int:
        """Number of segments between swaps; the last may be shorter."""
        return -(-self.steps // self.swap_every)

    def chains(self) -> list[ChainSettings]:
        """Return the settings of the chain at each temperature; raises InputError."""
        return [
            ChainSettings(t, self.steps, self.burn_in, self.save_every, self.step_size)
            for t in self.temperatures
        ]


@dataclass(slots=True, eq=False)
class ExchangeState:
    """A ladder of R temperatures under way, as one process of several sees it.

    `walkers` are this process's own; everything else is the same in all. `rungs` (segments, R):
    the number of each walker's temperature in every segment, -1 in those ahead; `step_sizes` (R,)
    in Å, `n_failed` (R,) by temperature; `swaps_tried` and `swaps_accepted` (R-1,) after burn-in,
    of each temperature with the next. `compute_s` is spent in energies, of this process.
    """

    segment: int
    walkers: dict[int, ChainState]
    calculators: dict[int, Calculator] = field(repr=False)
    rungs: NDArray[np.int16]
    step_sizes: NDArray[np.float64]
    n_failed: NDArray[np.int64]
    swaps_tried: NDArray[np.int64]
    swaps_accepted: NDArray[np.int64]
    compute_s: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether all segments are made."""
        return self.segment >= len(self.rungs)


def init(
    numbers: ArrayLike,
    positions: ArrayLike,
    make: Callable[[], Calculator],
    settings: ExchangeSettings,
    communicator: Communicator,
) -> ExchangeState:
    """Start all temperatures from numbers (N,) at positions (N, 3) in Å; `make` gives calculators.

    Raises on all processes together what `metropolis.init` raises on any.
    """
    chains = settings.chains()
    own = _own(len(chains), communicator)
    calculators = {walker: make() for walker in own}

    walkers: dict[int, ChainState] = {}

    def start() -> None:
        for walker in own:
            walkers[walker] = metropolis.init(
                numbers, positions, calculators[walker], chains[walker]
            )

    begun = time.perf_counter()
    _together(communicator, start)
    ladder = len(chains)
    rungs = np.full((settings.n_segments, ladder), -1, dtype=np.int16)
    rungs[:1] = np.arange(ladder)
    return ExchangeState(
        segment=0,
        walkers=walkers,
        calculators=calculators,
        rungs=rungs,
        step_sizes=np.array(
            [c.step_size or metropolis.published_step_size(c.temperature) for c in chains]
        ),
        n_failed=np.zeros(ladder, dtype=np.int64),
        swaps_tried=np.zeros(ladder - 1, dtype=np.int64),
        swaps_accepted=np.zeros(ladder - 1, dtype=np.int64),
        compute_s=time.perf_counter() - begun,
    )


def advance(
    state: ExchangeState,
    numbers: ArrayLike,
    settings: ExchangeSettings,
    seed: int,
    communicator: Communicator,
    *,
    message: Any = None,
) -> list[Any]:
    """Take all walkers through one segment and swap; return the messages of all processes.

    `seed` (0 to 2^128 - 1) is the ladder's. Raises on all processes together what
    `metropolis.advance` raises on any; the state cannot be used afterwards.
    """
    chains = settings.chains()
    first = state.segment * settings.swap_every
    last = min(first + settings.swap_every, settings.steps)
    rungs = state.rungs[state.segment]

    def walk() -> tuple[dict[int, tuple[float, int, int]], Any]:
        begun = time.perf_counter()
        seen = {}
        for walker, chain in state.walkers.items():
            chain.step_size = float(state.step_sizes[rungs[walker]])
            failed = chain.n_failed
            metropolis.advance(
                chain,
                numbers,
                state.calculators[walker],
                chains[rungs[walker]],
                _walker_seed(seed, walker),
                until=last,
            )
            moved = int(np.count_nonzero(chain.moved[first + 1 : last + 1]))
            seen[walker] = (chain.energy, moved, chain.n_failed - failed)
        state.compute_s += time.perf_counter() - begun
        return seen, message

    gathered = _together(communicator, walk)
    energies, moved = np.empty(len(chains)), np.empty(len(chains))
    for seen, _ in gathered:
        for walker, (energy, accepted, failed) in seen.items():
            energies[rungs[walker]] = energy
            moved[rungs[walker]] = accepted
            state.n_failed[rungs[walker]] += failed
    if settings.tune and last <= settings.burn_in:
        gain = metropolis.gain(state.segment + 1)
        for rung, share in enumerate(moved / (last - first)):
            state.step_sizes[rung] = metropolis.tuned_step_size(
                float(state.step_sizes[rung]), float(share), gain=gain
            )
    state.segment += 1
    if not state.is_done:
        state.rungs[state.segment] = _swapped(state, energies, settings, seed, last)
    return [sent for _, sent in gathered]


def _swapped(
    state: ExchangeState,
    energies: NDArray[np.float64],
    settings: ExchangeSettings,
    seed: int,
    step: int,
) -> NDArray[np.int16]:
    """Return the walkers' temperatures after swaps; `energies` (R,) in eV by temperature."""
    rungs: NDArray[np.int16] = state.rungs[state.segment - 1].copy()
    beta = 1 / (BOLTZMANN_EV_PER_K * np.array(settings.temperatures))
    bits = np.random.Philox(key=seed, counter=[0, 0, _SWAP, state.segment])
    drawn = np.random.Generator(bits).random(len(beta) - 1)
    walker_at = np.argsort(rungs)
    for low in range((state.segment - 1) % 2, len(beta) - 1, 2):
        exponent = (beta[low] - beta[low + 1]) * (energies[low] - energies[low + 1])
        accept = exponent >= 0 or drawn[low] < np.exp(exponent)
        if accept:
            rungs[walker_at[low]], rungs[walker_at[low + 1]] = low + 1, low
        if step > settings.burn_in:
            state.swaps_tried[low] += 1
            state.swaps_accepted[low] += bool(accept)
    return rungs


def to_arrays(state: ExchangeState, communicator: Communicator) -> Arrays:
    """Return all of the ladder as plain arrays, in every process; to be called by all together."""
    own = {
        f"walker{walker}/{name}": array
        for walker, chain in state.walkers.items()
        for name, array in chain.to_arrays().items()
    }
    arrays: Arrays = {
        "segment": np.array(state.segment, dtype=np.int64),
        "rungs": state.rungs,
        "step_sizes": state.step_sizes,
        "n_failed": state.n_failed,
        "swaps_tried": state.swaps_tried,
        "swaps_accepted": state.swaps_accepted,
    }
    for part in communicator.allgather(own):
        arrays.update(part)
    return arrays


def from_arrays(
    arrays: Mapping[str, NDArray[Any]],
    make: Callable[[], Calculator],
    communicator: Communicator,
) -> ExchangeState:
    """Rebuild a process's part of a ladder from `to_arrays`, of any number of processes.

    Raises InputError when a part is missing.
    """
    try:
        rungs = np.array(arrays["rungs"], dtype=np.int16)
        own = _own(rungs.shape[1], communicator)
        walkers = {}
        for walker in own:
            prefix = f"walker{walker}/"
            walkers[walker] = ChainState.from_arrays(
                {n[len(prefix) :]: a for n, a in arrays.items() if n.startswith(prefix)}
            )
        return ExchangeState(
            segment=int(arrays["segment"]),
            walkers=walkers,
            calculators={walker: make() for walker in own},
            rungs=rungs,
            step_sizes=np.array(arrays["step_sizes"]),
            n_failed=np.array(arrays["n_failed"]),
            swaps_tried=np.array(arrays["swaps_tried"]),
            swaps_accepted=np.array(arrays["swaps_accepted"]),
        )
    except KeyError as error:
        raise InputError(f"saved ladder lacks {error.args[0]!r}; start the ladder anew") from error


def summarise(arrays: Mapping[str, NDArray[Any]], settings: ExchangeSettings) -> Arrays:
    """Sort a finished ladder's walkers, as `to_arrays` gave them, by temperature.

    Of R temperatures in ascending order: `temperatures` (R,) in K; `energies` (R, steps+1) in eV
    and `frames` (R, steps//save_every+1, N, 3) in Å, the latter float32; `acceptance`, `step_size`
    in Å, `n_evaluations` and `n_failed` (R,); `swap_acceptance` (R,) with the next temperature,
    the last NaN, and the `swaps_tried` and `swaps_accepted` (R-1,) behind it; `walkers` (segments,
    R): who was there; `round_trips` (R,) of each walker, from the lowest temperature to the highest
    and back.
    """
    rungs = arrays["rungs"]
    walkers = np.argsort(rungs, axis=1).astype(np.int16)
    steps = np.arange(settings.steps + 1)
    ladder = len(settings.temperatures)
    if len(walkers) == 0:
        walkers = np.arange(ladder, dtype=np.int16)[None]
    # Step k is made in segment (k-1) // swap_every; the start belongs to the first.
    there = walkers[np.maximum(steps - 1, 0) // settings.swap_every].T
    energies = np.stack([arrays[f"walker{w}/energies"] for w in range(ladder)])
    moved = np.stack([arrays[f"walker{w}/moved"] for w in range(ladder)])
    frames = np.stack([arrays[f"walker{w}/frames"] for w in range(ladder)])
    saved = steps[:: settings.save_every]
    kept = np.take_along_axis(moved, there, axis=0)[:, settings.burn_in + 1 :]
    swaps = np.full(ladder, np.nan)
    tried = arrays["swaps_tried"]
    np.divide(arrays["swaps_accepted"], tried, out=swaps[:-1], where=tried > 0)
    return {
        "temperatures": np.array(settings.temperatures),
        "energies": np.take_along_axis(energies, there, axis=0),
        "frames": frames[there[:, saved], np.arange(len(saved))],
        "acceptance": kept.mean(axis=1) if kept.shape[1] else np.full(ladder, np.nan),
        "swap_acceptance": swaps,
        "swaps_tried": tried,
        "swaps_accepted": arrays["swaps_accepted"],
        "step_size": arrays["step_sizes"],
        "n_evaluations": np.full(ladder, settings.steps + 1, dtype=np.int64),
        "n_failed": arrays["n_failed"],
        "walkers": walkers,
        "round_trips": round_trips(rungs),
    }


def round_trips(rungs: NDArray[np.int16]) -> NDArray[np.int64]:
    """Count every walker's ways from the lowest temperature to the highest and back.

    `rungs` (segments, R) are the numbers of the walkers' temperatures; returns (R,).
    """
    n_walkers = rungs.shape[1]
    trips = np.zeros(n_walkers, dtype=np.int64)
    for walker in range(n_walkers):
        path = rungs[:, walker]
        ends = path[(path == 0) | (path == n_walkers - 1)]
        # Once it stands at the low end, every change between the ends is half a round trip.
        from_low = ends[np.argmax(ends == 0) :] if (ends == 0).any() else ends[:0]
        trips[walker] = np.count_nonzero(np.diff(from_low)) // 2
    return trips


def request_arrays(
    numbers: ArrayLike,
    positions: ArrayLike,
    settings: ExchangeSettings,
    seed: int,
    calculator: Mapping[str, Any],
) -> Arrays:
    """Return as plain arrays what `run_exchange` computes: numbers (N,), positions (N, 3) in Å.

    `calculator` holds the keywords of `kernels.calculators.make_calculator`.
    """
    words = {"settings": asdict(settings), "seed": str(seed), "calculator": dict(calculator)}
    text = json.dumps(words, sort_keys=True)
    return {
        "numbers": np.array(numbers, dtype=np.uint8),
        "positions": np.array(positions, dtype=np.float64),
        "request": np.frombuffer(text.encode(), dtype=np.uint8),
    }


def run_exchange(
    request: Mapping[str, NDArray[Any]],
    communicator: Communicator,
    *,
    saved: Path,
    stop: Callable[[], bool] = lambda: False,
    save_every_s: float = 60.0,
    make: Callable[[], Calculator] | None = None,
) -> Arrays | None:
    """Run a ladder from `request_arrays`, or go on with it where `saved` exists; for all processes.

    Returns the arrays of `summarise` with `numbers`, and of every process `compute_s`, spent in
    energies, and `total_s`, both of this call. `spent_s` (3,) sums over all calls that the ladder
    took, up to what each of them saved: time in energies and time of all processes, and the time
    that went by, in s. `stop` is asked by every process once a segment;
    when any says so, all save and return None. The first process alone writes and reads `saved`,
    every `save_every_s` seconds, and leaves it there at the end. `make` stands in for calculators
    by name. Raises InputError where `saved` belongs to another request, and what `advance` raises.
    """
    begun = time.perf_counter()
    numbers, positions = request["numbers"], request["positions"]
    settings, seed, make = _understood(request, make)
    digest = _digest(request)
    arrays = on_first(communicator, lambda: _read_saved(saved, digest))
    before = np.zeros(3)
    if arrays is None:
        state = init(numbers, positions, make, settings, communicator)
    else:
        state = from_arrays(arrays, make, communicator)
        before = arrays.get("spent_s", before)

    def times() -> list[tuple[float, float]]:
        return communicator.allgather((state.compute_s, time.perf_counter() - begun))

    last_save = time.perf_counter()
    while not state.is_done:
        message = _NOTHING
        if stop():
            message = _STOP
        elif communicator.rank == 0 and time.perf_counter() - last_save >= save_every_s:
            message = _SAVE
        asked = max(advance(state, numbers, settings, seed, communicator, message=message))
        if asked != _NOTHING:
            arrays = to_arrays(state, communicator)
            spent = _spent(before, times())
            if communicator.rank == 0:
                write_npz(saved, {**arrays, "digest": digest, "spent_s": spent})
            last_save = time.perf_counter()
            if asked == _STOP and not state.is_done:
                # Nobody leaves before the file is there.
                communicator.allgather(None)
                return None
    result = summarise(to_arrays(state, communicator), settings)
    result["numbers"] = np.array(numbers, dtype=np.uint8)
    taken = times()
    result["compute_s"], result["total_s"] = np.array(taken).T
    result["spent_s"] = _spent(before, taken)
    return result


def _spent(
    before: NDArray[np.float64], times: Sequence[tuple[float, float]]
) -> NDArray[np.float64]:
    compute, total = np.array(times).T
    return np.add(before, [compute.sum(), len(total) * total.max(), total.max()])


def parallel_efficiency(result: Mapping[str, NDArray[Any]]) -> float:
    """Return the share of all processes' time spent in energies, from `run_exchange`'s result."""
    compute, total, _ = result["spent_s"].tolist()
    return float(compute / total)


def on_first(communicator: Communicator, work: Callable[[], T]) -> T:
    """Do something in the first process alone; all get its value, or raise its KernelError."""

    def first() -> T | None:
        return work() if communicator.rank == 0 else None

    value: T = _together(communicator, first)[0]
    return value


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays so that `path` is always whole: the old ones or the new ones."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            untyped: dict[str, Any] = dict(arrays)
            np.savez(file, **untyped)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _together(communicator: Communicator, work: Callable[[], Any]) -> list[Any]:
    # A process that raised alone would leave the others waiting for ever.
    value: Any = None
    problem: KernelError | None = None
    try:
        value = work()
    except KernelError as error:
        problem = error
    gathered: list[tuple[Any, KernelError | None]] = communicator.allgather((value, problem))
    for _, raised in gathered:
        if raised is not None:
            raise raised
    return [given for given, _ in gathered]


def _own(n_walkers: int, communicator: Communicator) -> Sequence[int]:
    return range(communicator.rank, n_walkers, communicator.size)


def _walker_seed(seed: int, walker: int) -> int:
    low, high = np.random.Philox(key=seed, counter=[0, 0, _WALKER, walker]).random_raw(2)
    return int(low) + (int(high) << 64)


def _understood(
    request: Mapping[str, NDArray[Any]], make: Callable[[], Calculator] | None
) -> tuple[ExchangeSettings, int, Callable[[], Calculator]]:
    words = json.loads(np.asarray(request["request"], dtype=np.uint8).tobytes())
    wanted = words["settings"]
    wanted["temperatures"] = tuple(wanted["temperatures"])
    if make is None:
        from kernels.calculators import make_calculator

        def make() -> Calculator:
            return make_calculator(**words["calculator"])

    return ExchangeSettings(**wanted), int(words["seed"]), make


def _digest(request: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in ("numbers", "positions", "request"):
        digest.update(np.ascontiguousarray(request[name]).tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _read_saved(path: Path, digest: NDArray[np.uint8]) -> Arrays | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no saved ladder ({error}); remove it to start anew") from error
    if not np.array_equal(arrays.pop("digest", np.empty(0)), digest):
        raise InputError(
            f"{path} was saved by another request (other molecule, settings or seed); remove it to "
            "start anew, or give another name"
        )
    return arrays
