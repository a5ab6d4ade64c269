"""Chains of one and the same reverse step of the diffusion, applied again and again.

The features are clean before every step, and the geometry recorded is the one right after it,
without decoding (Rothchild et al., Chem. Sci. 2024, 15, 13506). At a small n such a chain wanders
about a minimum like a molecule at a low temperature. Chains share the network's calls, whatever
their n and their molecules. The noise of a chain depends on its seed and the step alone.

Models of architecture "basin" predict no noise but z_0: the minimum near a geometry, to which the
force field's curvature leads (`kernels.diffusion.guide`). The reverse step follows from it as well,
with eps = (z_n - alpha_n z_0) / sigma_n.

Cut anywhere, saved and taken up again with the same starts on the same machine, chains are the same
to the last bit. In other company the network's sums may be rounded otherwise: by 1e-7 at first, but
chains that wander freely may come apart over thousands of steps, and are then as good as others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Final, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.connectivity import bonds, collapsed
from kernels.diffusion.batching import in_batches
from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import Egnn, Packing, features
from kernels.diffusion.guide import Evaluate, Guide, at_most, predictor
from kernels.diffusion.noise import normal
from kernels.diffusion.process import Precision, at_precision
from kernels.diffusion.schedule import Schedule
from kernels.errors import InputError, KernelError, NotFiniteError, ResourceError

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]

# Steps whose noise is drawn at once: making the generator costs more than a step's numbers.
_NOISE_BLOCK: Final = 64

# Steps of a basin model's chain by one curvature of the force field: its torsions turn, and the
# molecule too. A longer move of an atom to the predicted minimum (Å) is not believed.
_CURVATURE_EVERY: Final = 10
_FARTHEST: Final = 0.2

# Steps between two looks at whether the molecules still hold together, counted from step 0.
_LOOK_EVERY: Final = 100

# Atoms of two pieces are further apart than so many sums of their covalent radii: far beyond any
# bond that vibrates, or is being exchanged for another.
_PIECES_FACTOR: Final = 2.0

# How long a segment lasts, and what its frames may take, when its steps are not given. The end of
# a batch job is heard between two of them, some seconds ahead.
_SEGMENT_S: Final = 2.0
_SEGMENT_BYTES: Final = 2 << 20


@dataclass(frozen=True, slots=True, eq=False)
class ChainStart:
    """Where a chain begins: `numbers` (N,) uint8, `positions` (N, 3) float64 in Å.

    `n` is the diffusion step that is repeated; `seed` (0 to 2^128 - 1) determines the noise;
    `smiles`, in whose canonical order the atoms are, tells the bonds to models that need them.
    """

    numbers: NDArray[np.uint8]
    positions: NDArray[np.float64]
    seed: int
    n: int
    smiles: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class DiffusionChain:
    """A chain: `frames` (F, N, 3) float32 in Å, in the frame of the start, which is frame 0.

    Frames are those of steps 0, save_every, ..., less what `ChainsState.take_frames` has given
    away. `n_steps` were made; they are fewer than asked for where the chain was stopped, or has
    `diverged`, which then tells why ("" otherwise).
    """

    frames: Floats
    n_steps: int
    diverged: str


@dataclass(slots=True, eq=False)
class ChainsState:
    """Chains under way, all after `step` steps; `diffusion_chains` advances it in place.

    `x`: of each, positions (N, 3) float32 as the network has them; `n_steps`: steps it made before
    it diverged; `diverged`: why it did, or "".
    """

    step: int
    x: list[Floats]
    n_steps: list[int]
    diverged: list[str]
    _frames: list[list[Floats]]

    def take_frames(self) -> list[Floats]:
        """Return the new frames (F, N, 3) in Å of each chain, and forget them.

        Whoever saves them thus keeps the memory of long chains small.
        """
        taken = self._pending()
        self._frames = [[] for _ in taken]
        return taken

    def _pending(self) -> list[Floats]:
        return [
            np.concatenate(frames) if frames else np.empty((0, *x.shape), np.float32)
            for frames, x in zip(self._frames, self.x, strict=True)
        ]

    def to_arrays(self) -> Arrays:
        """Return all of the state, the frames not taken included, as plain arrays for a file."""
        frames = self._pending()
        return {
            "step": np.array(self.step),
            "n_steps": np.array(self.n_steps, dtype=np.int64),
            "diverged": np.array(self.diverged, dtype=np.str_),
            "n_atoms": np.array([len(x) for x in self.x], dtype=np.int64),
            "n_frames": np.array([len(made) for made in frames], dtype=np.int64),
            "x": np.concatenate([*self.x, np.empty((0, 3), np.float32)]),
            "frames": np.concatenate(
                [*(made.reshape(-1, 3) for made in frames), np.empty((0, 3), np.float32)]
            ),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ChainsState:
        """Rebuild a state from `to_arrays`; raises InputError when a part is missing."""
        try:
            n_atoms, n_frames = arrays["n_atoms"], arrays["n_frames"]
            x = np.split(arrays["x"].astype(np.float32), np.cumsum(n_atoms)[:-1])
            frames = np.split(arrays["frames"].astype(np.float32), np.cumsum(n_atoms * n_frames))
            return cls(
                step=int(arrays["step"]),
                x=[part.copy() for part in x] if len(n_atoms) else [],
                n_steps=[int(steps) for steps in arrays["n_steps"]],
                diverged=[str(why) for why in arrays["diverged"]],
                _frames=[
                    [made.reshape(-1, int(size), 3).copy()] if size and len(made) else []
                    for made, size in zip(frames[:-1], n_atoms, strict=True)
                ],
            )
        except KeyError as error:
            raise InputError(
                f"saved diffusion chains lack {error.args[0]!r}; start the chains anew"
            ) from error


def diffusion_chains(
    model: Model,
    starts: Sequence[ChainStart],
    *,
    steps: int,
    save_every: int = 1,
    state: ChainsState | None = None,
    on_segment: Callable[[ChainsState], bool] = lambda state: True,
    segment: int | None = None,
    precision: Precision = "float32",
    memory_limit: int | None = None,
    batch_pairs: int | None = None,
) -> list[DiffusionChain | KernelError]:
    """Repeat the reverse step n of each start `steps` times, all together, where the model is.

    One result per start, in order. A chain that meets NaN or infinity, whose atoms fall into each
    other or whose molecule falls to pieces has diverged: it ends there, and the others go on. A
    start that cannot be computed gives its own error: InputError for an element that the model does
    not know, an impossible n or geometry, NotFiniteError for a NaN in it, ResourceError when memory
    does not suffice. `save_every`: of the steps, one in so many is kept.

    ``on_segment`` sees the state after every `segment` steps (default: about two seconds' worth; of
    a basin model's chains the next multiple of ten), the last included; false ends the work there,
    and what there is is returned. ``state`` goes on from a saved one, in place. For the limits see
    `kernels.diffusion.batching`.

    Raises InputError for impossible settings, and a state of other starts.
    """
    basin = model.config.architecture == "basin"
    for name, value in (("steps", steps), ("save_every", save_every), ("segment", segment)):
        if value is not None and value < 1:
            raise InputError(f"{name} = {value} of a diffusion chain; give 1 or more")
    problems: dict[int, KernelError] = {}
    guides: dict[int, Guide] = {}
    for index, start in enumerate(starts):
        try:
            _check(model, start)
            if basin:
                guides[index] = Guide(start.smiles, start.positions)
        except KernelError as error:
            problems[index] = error
    state = _before(model, starts, problems) if state is None else state
    sizes = [0 if at in problems else len(start.numbers) for at, start in enumerate(starts)]
    if [len(x) for x in state.x] != sizes:
        raise InputError(
            f"a saved state of {len(state.x)} diffusion chains does not fit the {len(starts)} "
            "starts; start the chains anew"
        )
    # A curvature that was taken before a cut would not be known after it.
    whole = _CURVATURE_EVERY if basin else 1
    most = max(1, _SEGMENT_BYTES // max(1, 12 * sum(sizes)) * save_every)
    length = -(-min(segment or 10, steps, most) // whole) * whole
    while state.step < steps:
        for index, made in enumerate(state.n_steps):
            if made < state.step and not state.diverged[index] and index not in problems:
                problems[index] = ResourceError("the chain did not fit in memory when it began")
        going = [index for index in range(len(starts)) if index not in problems]
        last = min(steps, state.step + length)
        piece = _Piece(state.step, last, save_every)
        began = time.perf_counter()
        results = in_batches(
            model,
            [sizes[index] for index in going],
            partial(_advance, model, state, starts, guides, going, piece, precision),
            memory_limit=memory_limit,
            batch_pairs=batch_pairs,
            mixed=True,
        )
        for index, result in zip(going, results, strict=True):
            if isinstance(result, KernelError):
                problems[index] = result
            elif not state.diverged[index]:
                _record(state, index, starts[index], model, piece, result)
        state.step = last
        if segment is None:
            took = max(time.perf_counter() - began, 1e-9)
            length = max(1, min(int(length * _SEGMENT_S / took), most))
            length = -(-length // whole) * whole
        if not on_segment(state):
            break
    frames = state._pending()
    return [
        problems[index]
        if index in problems
        else DiffusionChain(frames[index], state.n_steps[index], state.diverged[index])
        for index in range(len(starts))
    ]


def _origin(start: ChainStart) -> NDArray[np.float64]:
    origin: NDArray[np.float64] = start.positions.mean(axis=0)
    return origin


def _check(model: Model, start: ChainStart) -> None:
    numbers, positions = start.numbers, start.positions
    if numbers.ndim != 1 or not len(numbers) or positions.shape != (len(numbers), 3):
        raise InputError(f"positions {positions.shape} do not fit numbers {numbers.shape}")
    if not 1 <= start.n <= model.schedule.steps:
        raise InputError(
            f"n = {start.n} is no diffusion step of model {model.name!r}; give 1 to "
            f"{model.schedule.steps}"
        )
    if not np.isfinite(positions).all():
        raise NotFiniteError("the starting positions contain NaN or infinity")
    features(torch.from_numpy(numbers[None].astype(np.int64)), model.config)


def _before(
    model: Model, starts: Sequence[ChainStart], problems: Mapping[int, KernelError]
) -> ChainsState:
    """Return the state before the first step: the centred starts, taken for z_n as they are."""
    scale = model.config.feature_scaling[0]
    x: list[Floats] = []
    frames: list[list[Floats]] = []
    for index, start in enumerate(starts):
        if index in problems:
            x.append(np.empty((0, 3), np.float32))
            frames.append([])
        else:
            x.append(((start.positions - _origin(start)) / scale).astype(np.float32))
            frames.append([start.positions[None].astype(np.float32)])
    return ChainsState(0, x, n_steps=[0] * len(x), diverged=[""] * len(x), _frames=frames)


class _Piece(NamedTuple):
    """Steps from `first` (made) to `last`, and which are kept."""

    first: int
    last: int
    save_every: int

    def kept(self) -> list[int]:
        return [step for step in self._steps() if step % self.save_every == 0]

    def looked_at(self) -> list[int]:
        return [step for step in self._steps() if step % _LOOK_EVERY == 0]

    def _steps(self) -> range:
        return range(self.first + 1, self.last + 1)


class _Made(NamedTuple):
    """Of one chain, `x` (N, 3) at the end of a piece, and at the steps kept and looked at in it."""

    x: Floats
    kept: Floats
    looked_at: Floats


def _advance(
    model: Model,
    state: ChainsState,
    starts: Sequence[ChainStart],
    guides: Mapping[int, Guide],
    going: Sequence[int],
    piece: _Piece,
    precision: Precision,
    places: Sequence[int],
) -> list[_Made | KernelError]:
    """Advance those of the chains `going` at some places, in order of size, over a piece.

    The state itself is left as it is.
    """
    batch = [going[place] for place in places]
    now = [state.x[index] for index in batch]
    if all(state.diverged[index] for index in batch):
        return [_Made(x, x[None], x[None]) for x in now]
    mine = [starts[index] for index in batch]
    kept, looked_at = piece.kept(), piece.looked_at()
    wanted = {step: at for at, step in enumerate(sorted({*kept, *looked_at}))}
    # Guides work on the CPU, wherever the network is.
    device = torch.device("cpu") if guides else model.device
    sizes = [len(x) for x in now]
    packing = Packing([(len(list(same)), size) for size, same in groupby(sizes)], device)
    width = _per_atom(mine, [model.schedule.reverse_step(start.n).noise for start in mine], device)
    with torch.inference_mode(), at_precision(precision, model.device) as evaluate:
        if guides:
            # One that ended stays in the batch: others' sums must not be rounded otherwise.
            ended = [bool(state.diverged[index]) for index in batch]
            mean = _guided_mean(model, evaluate, mine, [guides[index] for index in batch], ended)
        else:
            mean = _mean(model, evaluate, mine, packing)
        x = torch.from_numpy(np.concatenate(now)).to(device)
        found = torch.empty((len(wanted), *x.shape), dtype=torch.float32, device=device)
        noise = x.new_empty(0)
        for step in range(piece.first, piece.last):
            block, at = divmod(step, _NOISE_BLOCK)
            if at == 0 or step == piece.first:
                drawn = np.concatenate([_noise(start, block) for start in mine], axis=1)
                noise = torch.from_numpy(drawn).to(device) * width
            x = mean(step, x).add_(noise[at])
            for part in packing.atoms(x):
                part.sub_(part.mean(dim=1, keepdim=True))
            if step + 1 in wanted:
                found[wanted[step + 1]] = x
        x_after, frames = x.cpu().numpy(), found.cpu().numpy()
    rows_kept = frames[[wanted[step] for step in kept]]
    rows_looked_at = frames[[wanted[step] for step in looked_at]]
    ends = np.cumsum(sizes)
    return [
        _Made(x_after[first:end].copy(), rows_kept[:, first:end], rows_looked_at[:, first:end])
        for first, end in zip(ends - sizes, ends, strict=True)
    ]


def _per_atom(
    starts: Sequence[ChainStart], values: Sequence[float], device: torch.device
) -> Tensor:
    """Values (A, 1) of all atoms of some chains, for one of each chain."""
    repeated = np.repeat(np.array(values, dtype=np.float32), [len(s.numbers) for s in starts])
    return torch.from_numpy(repeated[:, None]).to(device)


# Mean of the reverse step (A, 3), for its number and the positions (A, 3) of all atoms.
_Mean: TypeAlias = Callable[[int, Tensor], Tensor]


def _mean(
    model: Model, evaluate: Evaluate, starts: Sequence[ChainStart], packing: Packing
) -> _Mean:
    """Reverse steps by the noise that the network predicts."""
    network, schedule, device = cast(Egnn, model.network), model.schedule, model.device
    steps = [schedule.reverse_step(start.n) for start in starts]
    keep = _per_atom(starts, [step.keep for step in steps], device)
    remove = _per_atom(starts, [step.remove for step in steps], device)
    level = _per_atom(starts, [start.n / schedule.steps for start in starts], device)[:, 0]
    numbers = torch.from_numpy(np.concatenate([start.numbers for start in starts]))
    clean = features(numbers.to(device).long(), model.config)

    def mean(step: int, x: Tensor) -> Tensor:
        eps, _ = evaluate(network.packed, x, clean, level, packing)
        return (keep * x).sub_(remove * eps)

    return mean


def _guided_mean(
    model: Model,
    evaluate: Evaluate,
    starts: Sequence[ChainStart],
    guides: Sequence[Guide],
    ended: Sequence[bool],
) -> _Mean:
    """Reverse steps by the minimum that the guides find; a chain that ended stays where it is."""
    scale, schedule = model.config.feature_scaling[0], model.schedule
    predict = predictor(model, evaluate, guides, [start.numbers for start in starts])
    borders = np.cumsum([len(start.numbers) for start in starts])[:-1]

    def mean(step: int, x: Tensor) -> Tensor:
        now = np.split(x.double().numpy(), borders)
        predicted = predict([part * scale for part in now])
        means = []
        for start, guide, part, gradient, over in zip(
            starts, guides, now, predicted, ended, strict=True
        ):
            if not over and step % _CURVATURE_EVERY == 0 and np.isfinite(part).all():
                guide.look(part * scale)
            means.append(
                part if over else _guided_step(guide, part, gradient, schedule, start.n, scale)
            )
        return torch.from_numpy(np.concatenate(means).astype(np.float32))

    return mean


def _guided_step(
    guide: Guide,
    x: NDArray[np.float64],
    gradient: NDArray[np.float64],
    schedule: Schedule,
    n: int,
    scale: float,
) -> NDArray[np.float64]:
    """Mean (N, 3) of the reverse step from x (N, 3), for the predicted gradient; or NaN."""
    if not (np.isfinite(x).all() and np.isfinite(gradient).all()):
        return np.full_like(x, np.nan)
    data = x + at_most(guide.aim(x * scale, gradient), _FARTHEST) / scale
    eps = (x - schedule.alpha[n] * data) / schedule.sigma[n]
    step = schedule.reverse_step(n)
    mean: NDArray[np.float64] = step.keep * x - step.remove * eps
    return mean


def _noise(start: ChainStart, block: int) -> Floats:
    """Noise (_NOISE_BLOCK, N, 3) of a block of steps, its mean over the atoms zero."""
    drawn = normal(start.seed, block, (_NOISE_BLOCK, len(start.numbers), 3))
    drawn -= drawn.mean(axis=1, keepdims=True)
    return drawn


def _record(
    state: ChainsState, index: int, start: ChainStart, model: Model, piece: _Piece, made: _Made
) -> None:
    """Take a piece of a chain into the state, up to where it diverged."""
    scale = model.config.feature_scaling[0]
    kept = np.array(piece.kept(), dtype=np.int64)
    finite = np.isfinite(made.kept).all(axis=(1, 2))
    end, why = piece.last, ""
    for step, x in zip(piece.looked_at(), made.looked_at, strict=True):
        if why := _broken(start, x * scale):
            end = step
            break
    if not why and not np.isfinite(made.x).all():
        # What is not finite stays so: the last finite step of those that are kept is the same
        # however the chain is cut.
        before = piece.first // piece.save_every * piece.save_every
        why, end = "the positions became NaN or infinite", int(max(kept[finite], default=before))
    frames = made.kept[finite & (kept <= end)]
    if len(frames):
        placed = frames.astype(np.float64) * scale + _origin(start)
        state._frames[index].append(placed.astype(np.float32))
    state.n_steps[index] = end
    if why:
        # Its row stays in the batch, where it was: others' sums must not be rounded otherwise.
        state.diverged[index] = f"{why} (n = {start.n})"
    else:
        state.x[index] = made.x


def _broken(start: ChainStart, positions: Floats) -> str:
    """Tell why positions (N, 3) in Å are no molecule any more; "" while they are, or are NaN."""
    if not np.isfinite(positions).all():
        return ""
    xyz = positions.astype(np.float64)
    if collapsed(start.numbers, xyz):
        return "two atoms fell into each other"
    pieces = _pieces(start.numbers, xyz)
    if pieces > 1 and pieces > _pieces(start.numbers, start.positions):
        return f"the molecule fell into {pieces} pieces"
    return ""


def _pieces(numbers: NDArray[np.uint8], positions: NDArray[np.float64]) -> int:
    near = np.eye(len(numbers), dtype=np.float32)
    first, second = bonds(numbers, positions, factor=_PIECES_FACTOR).T
    near[first, second] = near[second, first] = 1
    for _ in range(len(numbers).bit_length()):
        near = np.minimum(near @ near, 1)
    # Each piece is counted by the first of its atoms.
    return int((near.argmax(axis=1) == np.arange(len(numbers))).sum())
