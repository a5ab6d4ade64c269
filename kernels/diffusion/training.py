"""Training of a diffusion model: `init` makes the state, `step` advances it, `validate` judges it.

A step sees a few pieces of the training set, each of molecules with equal numbers of atoms, so
that nothing is padded. Everything random follows from the seed and the number of the step, never
from a generator's history: a state that was saved and read again goes on with the very same
weights. Under `torch.distributed` every process takes some of a step's pieces, and the gradients
are those of one process that takes them all.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from kernels.diffusion import refiner
from kernels.diffusion.checkpoint import write_whole
from kernels.diffusion.egnn import ModelConfig, build, features
from kernels.diffusion.process import add_noise, centred
from kernels.diffusion.schedule import Schedule
from kernels.errors import InputError, NotFiniteError

FORMAT: Final = 1

# Bounds of the bins of noise levels that losses are reported in: (1, 5] and so on, of 1000.
_LEVEL_BOUNDS: Final = (5, 10, 20, 30, 50, 100, 200, 400, 700, 1000)
_TRAINING_STREAM: Final = 0
_VALIDATION_STREAM: Final = 1
_ORDER_STREAM: Final = 2
# Norms of the last gradients, of which the adaptive clip takes mean and deviation.
_NORMS_KEPT: Final = 50
_NORMS_NEEDED: Final = 10


def _described(
    text: str,
    *,
    at_least: float | None = None,
    more_than: float | None = None,
    less_than: float | None = None,
    unit: str = "",
) -> dict[str, Any]:
    about = {
        "description": text, "ge": at_least, "gt": more_than, "lt": less_than, "unit": unit
    }  # fmt: skip
    return {name: value for name, value in about.items() if value not in (None, "")}


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained; the defaults are those of the published model.

    Each field's metadata hold its description and its bounds.
    """

    objective: str = field(
        default="edm",
        metadata=_described(
            "What is learnt; edm: the noise, as published; force-field: what the force field gets "
            "wrong at minima, for architecture basin"
        ),
    )
    epochs: int | None = field(
        default=None, metadata=_described("Training ends after so many epochs", at_least=1)
    )
    max_time_s: float | None = field(
        default=None,
        metadata=_described(
            "Training ends after this time, earlier runs included", more_than=0, unit="s"
        ),
    )
    batch: int = field(default=64, metadata=_described("Molecules in one step", at_least=1))
    pieces: int = field(
        default=4,
        metadata=_described(
            "Pieces of a step, each of molecules with equal numbers of atoms", at_least=1
        ),
    )
    learning_rate: float = field(
        default=1e-4, metadata=_described("Learning rate of AdamW (AMSGrad)", more_than=0)
    )
    weight_decay: float = field(
        default=1e-12, metadata=_described("Weight decay of AdamW", at_least=0)
    )
    learning_rate_schedule: Literal["constant", "cosine"] = field(
        default="constant",
        metadata=_described("cosine lowers the rate to final_rate times it at the end of training"),
    )
    final_rate: float = field(
        default=0.01,
        metadata=_described("Part of the learning rate that cosine ends with", at_least=0),
    )
    warmup: int = field(
        default=0, metadata=_described("Steps over which the rate rises from zero", at_least=0)
    )
    gradient_clip: float | None = field(
        default=None, metadata=_described("Largest norm of a gradient", more_than=0)
    )
    adaptive_clip: bool = field(
        default=True,
        metadata=_described(
            "Limit a gradient's norm to 1.5 times the mean of the last 50 plus twice their "
            "deviation, as published"
        ),
    )
    ema_decay: float = field(
        default=0.9999,
        metadata=_described(
            "Decay of the moving average of the weights; less in the first steps",
            at_least=0,
            less_than=1,
        ),
    )
    max_level: int | None = field(
        default=None, metadata=_described("Largest noise level n that is learnt", at_least=0)
    )
    level_power: float = field(
        default=1.0,
        metadata=_described(
            "Levels are drawn as max_level * u^power with uniform u; more than 1 favours small n",
            more_than=0,
        ),
    )
    validation_every: float = field(
        default=1.0, metadata=_described("Epochs between two validations", more_than=0)
    )
    validation_levels: int = field(
        default=4,
        metadata=_described("Noise levels at which a validation molecule is judged", at_least=1),
    )
    validation_limit: int = field(
        default=400, metadata=_described("Validation molecules used at most", at_least=1)
    )
    checkpoint_every: float | None = field(
        default=None, metadata=_described("Epochs between two kept checkpoints", more_than=0)
    )
    precision: Literal["float32", "tf32", "bfloat16"] = field(
        default="float32", metadata=_described("Arithmetic of the network's matrix products")
    )
    seed: int = field(default=0, metadata=_described("Root of all random numbers", at_least=0))


# What a training that is taken up again may not change, for it would not be the same training.
FIXED_SETTINGS: Final = ("objective", "batch", "pieces", "max_level", "level_power", "seed")

Batch: TypeAlias = dict[str, Tensor]
Objective: TypeAlias = Callable[
    [Module, Schedule, ModelConfig, Batch, Generator, TrainSettings], Tensor
]


# The training set


class Piece(NamedTuple):
    """Molecules of one number of atoms: their rows in the group of that size."""

    size: int
    rows: NDArray[np.int64]


class TrainingSet:
    """Geometries, grouped by their number of atoms.

    ``numbers``: one (N,) array of atomic numbers per molecule; ``positions``: (N, 3) in Å;
    ``extra``: further arrays by name, one per molecule, whose leading axes are atoms or pairs of
    atoms, or that have none. Raises InputError where shapes do not fit.
    """

    def __init__(
        self,
        names: Sequence[str],
        numbers: Sequence[NDArray[Any]],
        positions: Sequence[NDArray[Any]],
        extra: Mapping[str, Sequence[NDArray[Any]]] | None = None,
    ) -> None:
        self.names = list(names)
        self.groups: dict[int, Batch] = {}
        rows: dict[int, list[int]] = {}
        for row, (name, z, x) in enumerate(zip(names, numbers, positions, strict=True)):
            if x.shape != (len(z), 3) or not len(z):
                raise InputError(f"{name}: positions {x.shape} do not fit {len(z)} atoms")
            if not np.isfinite(x).all():
                raise InputError(f"{name}: a position is not a finite number")
            rows.setdefault(len(z), []).append(row)
        for size, members in sorted(rows.items()):
            group = {
                "numbers": torch.from_numpy(np.stack([numbers[i] for i in members]).astype("i8")),
                "positions": torch.from_numpy(
                    np.stack([positions[i] for i in members]).astype("f4")
                ),
            }
            for name, arrays in (extra or {}).items():
                stacked = np.stack([arrays[i] for i in members])
                kind = "f4" if stacked.dtype.kind == "f" else "i8"
                group[name] = torch.from_numpy(stacked.astype(kind))
            self.groups[size] = group

    def __len__(self) -> int:
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Memory of all arrays, in bytes."""
        return sum(t.nbytes for group in self.groups.values() for t in group.values())

    def to(self, device: torch.device) -> TrainingSet:
        """This set with its arrays moved to a device."""
        for group in self.groups.values():
            for name, array in group.items():
                group[name] = array.to(device)
        return self

    def take(self, piece: Piece, device: torch.device) -> Batch:
        """The arrays of a piece's molecules, (B, ...) each, on a device."""
        group = self.groups[piece.size]
        where = group["numbers"].device
        rows = torch.from_numpy(piece.rows).to(where)
        return {name: array[rows].to(device) for name, array in group.items()}

    def steps(self, batch: int, pieces: int) -> int:
        """Steps of one epoch."""
        size = max(1, batch // pieces)
        return math.ceil(
            sum(math.ceil(len(g["numbers"]) / size) for g in self.groups.values()) / pieces
        )

    def epoch(self, batch: int, pieces: int, seed: int, number: int) -> list[list[Piece]]:
        """The steps of one epoch in a shuffled order: each molecule once, a few pieces a step."""
        random = np.random.default_rng([seed, _ORDER_STREAM, number])
        size = max(1, batch // pieces)
        cut: list[Piece] = []
        for atoms, group in self.groups.items():
            rows = random.permutation(len(group["numbers"]))
            cut += [Piece(atoms, rows[i : i + size]) for i in range(0, len(rows), size)]
        order = random.permutation(len(cut)).tolist()
        return [[cut[i] for i in order[at : at + pieces]] for at in range(0, len(cut), pieces)]

    def in_order(self, batch: int, limit: int) -> list[Piece]:
        """Pieces of up to ``batch`` molecules that cover the set, or an even selection of it."""
        share = min(1.0, limit / max(len(self), 1))
        cut: list[Piece] = []
        for atoms, group in self.groups.items():
            n = len(group["numbers"])
            kept = max(1, round(share * n))
            rows = np.unique(np.linspace(0, n - 1, kept).round().astype(np.int64))
            cut += [Piece(atoms, rows[i : i + batch]) for i in range(0, len(rows), batch)]
        return cut


# Objectives: what the network is asked for


def noise(generator: Generator, like: Tensor) -> Tensor:
    """Standard normal numbers of a tensor's shape, the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def edm(
    network: Module,
    schedule: Schedule,
    config: ModelConfig,
    batch: Batch,
    generator: Generator,
    settings: TrainSettings,
) -> Tensor:
    """Mean squared error (B,) of the predicted noise, over positions and features.

    z_n = alpha_n z_0 + sigma_n eps, eps of the positions with zero centre of mass (Hoogeboom et
    al., ICML 2022, eq. 6 and 13, the l2 loss of their code; each molecule's error is divided by
    its own size instead of the largest one's, and level 0 is treated like every other).
    """
    x, h = centred(batch["positions"]), features(batch["numbers"], config)
    level = batch["level"]
    eps_x, eps_h = centred(noise(generator, x)), noise(generator, h)
    z_x, z_h = add_noise(schedule, x, h, level, eps_x, eps_h)
    found_x, found_h = network(z_x, z_h, level / schedule.steps, None)
    wrong: Tensor = ((found_x - eps_x) ** 2).sum((1, 2)) + ((found_h - eps_h) ** 2).sum((1, 2))
    return wrong / (x.shape[1] * (3 + h.shape[2]))


OBJECTIVES: Final[dict[str, Objective]] = {"edm": edm, "force-field": refiner.objective}

# The architecture that an objective is for: another one would learn what its process never asks.
_LEARNS: Final[dict[str, str]] = {"edm": "edm", "force-field": "basin"}

# What an objective needs of each molecule beside numbers and positions.
NEEDS: Final[dict[str, tuple[str, ...]]] = {"edm": (), "force-field": ("bonds", "force_field")}


def check(config: ModelConfig, settings: TrainSettings) -> None:
    """Raise InputError where the objective is unknown, or not for the model's architecture."""
    if settings.objective not in OBJECTIVES:
        raise InputError(
            f"objective = {settings.objective!r}: there is {', '.join(sorted(OBJECTIVES))}"
        )
    architecture = _LEARNS[settings.objective]
    if config.architecture != architecture:
        fitting = next(name for name, kind in _LEARNS.items() if kind == config.architecture)
        raise InputError(
            f"objective = {settings.objective!r} is for models of architecture {architecture!r}; "
            f"this one is of architecture {config.architecture!r}, for which write "
            f"objective = {fitting!r}"
        )


def max_level(settings: TrainSettings, schedule: Schedule) -> int:
    """The largest noise level that is learnt; raises InputError if the schedule has fewer."""
    found = schedule.steps if settings.max_level is None else settings.max_level
    if found > schedule.steps:
        raise InputError(f"max_level = {found}: the schedule has {schedule.steps} steps only")
    return found


def levels_at(u: Tensor, settings: TrainSettings, schedule: Schedule) -> Tensor:
    """Noise levels n (B,), whole numbers from 0 to max_level, of uniform numbers u in [0, 1)."""
    top = max_level(settings, schedule)
    return ((u.double() ** settings.level_power) * (top + 1)).long().clamp(max=top)


# The state


@dataclass
class TrainState:
    """Everything a training consists of between two steps.

    ``history``: one row per validation; ``best``: step and validation loss of the best average
    weights so far; ``elapsed_s``: time trained, earlier runs included; ``norms``: of the last
    gradients; ``losses``: sum and number of training losses since the last validation.
    """

    config: ModelConfig
    settings: TrainSettings
    schedule: Schedule
    network: Module
    average: Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    steps_per_epoch: int
    step: int = 0
    elapsed_s: float = 0.0
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    parallel: DistributedDataParallel | None = None

    @property
    def epochs(self) -> float:
        """Epochs done, with the part of the present one."""
        return self.step / self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether the training has come to its end."""
        settings = self.settings
        return (
            settings.epochs is not None and self.step >= settings.epochs * self.steps_per_epoch
        ) or (settings.max_time_s is not None and self.elapsed_s >= settings.max_time_s)

    @property
    def progress(self) -> float:
        """Part of the training that is done, 0 to 1."""
        settings, parts = self.settings, [0.0]
        if settings.epochs is not None:
            parts.append(self.step / (settings.epochs * self.steps_per_epoch))
        if settings.max_time_s is not None:
            parts.append(self.elapsed_s / settings.max_time_s)
        return min(1.0, max(parts))


def init(
    config: ModelConfig,
    settings: TrainSettings,
    steps_per_epoch: int,
    *,
    device: str | torch.device = "cpu",
    weights: Mapping[str, Tensor] | None = None,
) -> TrainState:
    """The state before the first step; ``weights`` are those to start from, else drawn anew.

    Raises InputError for an unknown objective, one for another architecture, a level out of range
    or weights that do not fit.
    """
    check(config, settings)
    schedule = Schedule(config.steps, config.precision)
    max_level(settings, schedule)
    where = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = build(config)
        average = build(config)
    if weights is not None:
        try:
            network.load_state_dict(dict(weights))
        except RuntimeError as exc:
            raise InputError(f"the weights to start from do not fit the model: {exc}") from None
    average.load_state_dict(network.state_dict())
    average.requires_grad_(False)
    network, average = network.to(where), average.to(where)
    return TrainState(
        config=config,
        settings=settings,
        schedule=schedule,
        network=network,
        average=average,
        optimizer=_optimizer(network, settings),
        device=where,
        steps_per_epoch=steps_per_epoch,
    )


def _optimizer(network: Module, settings: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        network.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        amsgrad=True,
    )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _generator(seed: int, stream: int, *at: int) -> Generator:
    words = np.random.SeedSequence([seed, stream, *at]).generate_state(1, np.uint64)
    return Generator().manual_seed(int(words[0] >> np.uint64(1)))


def _arithmetic(state: TrainState) -> AbstractContextManager[Any]:
    precision = state.settings.precision
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    if precision == "bfloat16":
        return torch.autocast(state.device.type, torch.bfloat16)
    return nullcontext()


def learning_rate(state: TrainState) -> float:
    """The learning rate of the next step."""
    settings = state.settings
    rate = settings.learning_rate
    if settings.learning_rate_schedule == "cosine":
        fall = 0.5 * (1 + math.cos(math.pi * state.progress))
        rate *= settings.final_rate + (1 - settings.final_rate) * fall
    return rate * min(1.0, (state.step + 1) / (settings.warmup + 1))


# One step


def step(state: TrainState, data: TrainingSet, pieces: Sequence[Piece]) -> float:
    """Learn from the pieces of one step; returns the loss, the mean over their molecules.

    Raises NotFiniteError, before the weights change, when the loss or its gradient is not finite.
    """
    settings, world, rank = state.settings, _world(), _rank()
    total = sum(len(piece.rows) for piece in pieces)
    # A process without a piece still takes part in the exchange of gradients, with weight zero.
    mine = [(i, 1.0) for i in range(rank, len(pieces), world)] or [(0, 0.0)]

    def loss_of(network: Module, i: int) -> Tensor:
        batch = data.take(pieces[i], state.device)
        generator = _generator(settings.seed, _TRAINING_STREAM, state.step, i)
        u = torch.rand(len(pieces[i].rows), generator=generator)
        batch["level"] = levels_at(u, settings, state.schedule).to(state.device)
        with _arithmetic(state):
            return _losses(state, network, batch, generator).sum() / total

    parallel = _distributed(state, lambda network: loss_of(network, 0)) if world > 1 else None
    state.optimizer.zero_grad(set_to_none=True)
    summed = torch.zeros((), device=state.device)
    for at, (i, weight) in enumerate(mine):
        waits = parallel is not None and at < len(mine) - 1
        with parallel.no_sync() if parallel is not None and waits else nullcontext():
            loss = weight * loss_of(parallel or state.network, i)
            torch.autograd.backward(loss * world)
        summed += loss.detach()
    if world > 1:
        torch.distributed.all_reduce(summed)
    norm = _clip(state)
    value = float(summed)
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise NotFiniteError(
            f"step {state.step + 1}: the loss is {value:g} and its gradient's norm {norm:g} "
            f"(learning rate {learning_rate(state):g}); lower learning_rate or gradient_clip, or "
            "raise warmup"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state)
        group["weight_decay"] = settings.weight_decay
    state.optimizer.step()
    state.step += 1
    _follow(state)
    state.losses[0] += value
    state.losses[1] += 1
    return value


def _losses(state: TrainState, network: Module, batch: Batch, generator: Generator) -> Tensor:
    objective = OBJECTIVES[state.settings.objective]
    return objective(
        network, state.schedule, state.config, batch, generator, state.settings
    ).float()


def _distributed(state: TrainState, probe: Callable[[Module], Tensor]) -> DistributedDataParallel:
    if state.parallel is None:
        devices = [state.device.index] if state.device.type == "cuda" else None
        # An objective need not use every output, and looking for the unused costs time.
        torch.autograd.backward(probe(state.network))
        unused = any(p.grad is None for p in state.network.parameters() if p.requires_grad)
        state.optimizer.zero_grad(set_to_none=True)
        state.parallel = DistributedDataParallel(
            state.network, device_ids=devices, find_unused_parameters=unused
        )
    return state.parallel


def _clip(state: TrainState) -> float:
    """Limits the gradient's norm and returns what it was."""
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    limit = state.settings.gradient_clip
    most = math.inf if limit is None else limit
    if state.settings.adaptive_clip and math.isfinite(norm):
        if len(state.norms) >= _NORMS_NEEDED:
            most = min(
                most, 1.5 * statistics.fmean(state.norms) + 2 * statistics.pstdev(state.norms)
            )
        # A spike enters the memory at what it was cut to, or the next one would pass.
        state.norms = [*state.norms, min(norm, most)][-_NORMS_KEPT:]
    if norm > most:
        torch._foreach_mul_(gradients, most / norm)
    return norm


@torch.no_grad()
def _follow(state: TrainState) -> None:
    # Early on the average would otherwise hold on to weights that had learnt nothing.
    decay = min(state.settings.ema_decay, (1 + state.step) / (10 + state.step))
    average: list[Tensor] = list(state.average.parameters())
    present: list[Tensor] = list(state.network.parameters())
    torch._foreach_lerp_(average, present, 1 - decay)
    for kept, buffer in zip(state.average.buffers(), state.network.buffers(), strict=True):
        kept.copy_(buffer)


def agree(state: TrainState, stop: bool) -> bool:
    """Whether any process wants to stop; all take over the first one's clock."""
    if _world() == 1:
        return stop
    clock = state.elapsed_s if _rank() == 0 else 0.0
    word = torch.tensor([float(stop), clock], dtype=torch.float64, device=state.device)
    torch.distributed.all_reduce(word)
    state.elapsed_s = float(word[1])
    return bool(word[0] > 0)


# Validation


@dataclass(frozen=True, slots=True)
class LevelLoss:
    """Mean loss over the noise levels from ``first`` to ``last``, and how many it is a mean of."""

    first: int
    last: int
    loss: float
    count: int


@dataclass(frozen=True, slots=True)
class Validation:
    """The loss as the training weighs levels, and by bins of noise levels."""

    loss: float
    levels: tuple[LevelLoss, ...]


def level_bins(settings: TrainSettings, schedule: Schedule) -> list[tuple[int, int]]:
    """First and last noise level of each bin that losses are reported in."""
    top = max_level(settings, schedule)
    bounds = [round(b * schedule.steps / 1000) for b in _LEVEL_BOUNDS]
    bounds = sorted({b for b in bounds if 0 < b < top} | {top})
    return list(zip([0, *(b + 1 for b in bounds[:-1])], bounds, strict=True))


@torch.no_grad()
def validate(state: TrainState, data: TrainingSet) -> Validation:
    """Loss of the average weights on a set, at levels and noise that never change.

    Every molecule is judged at ``validation_levels`` levels, spread as the training draws them.
    """
    settings, world, rank = state.settings, _world(), _rank()
    bins = level_bins(settings, state.schedule)
    last = torch.tensor([b for _, b in bins])
    sums, counts = torch.zeros(len(bins), dtype=torch.float64), torch.zeros(len(bins))
    pieces = data.in_order(max(settings.batch, 1), settings.validation_limit)
    for i in range(rank, len(pieces), world):
        batch = data.take(pieces[i], state.device)
        rows = len(pieces[i].rows)
        offset = torch.rand(
            rows, generator=_generator(settings.seed, _VALIDATION_STREAM, pieces[i].size, i)
        )
        for k in range(settings.validation_levels):
            generator = _generator(settings.seed, _VALIDATION_STREAM, pieces[i].size, i, k)
            level = levels_at((k + offset) / settings.validation_levels, settings, state.schedule)
            batch["level"] = level.to(state.device)
            with _arithmetic(state):
                losses = _losses(state, state.average, batch, generator).double().cpu()
            at = torch.searchsorted(last, level)
            sums.index_add_(0, at, losses)
            counts.index_add_(0, at, torch.ones(rows))
    if world > 1:
        word = torch.stack([sums, counts.double()]).to(state.device)
        torch.distributed.all_reduce(word)
        sums, counts = word.cpu()[0], word.cpu()[1]
    return Validation(
        loss=float(sums.sum() / counts.sum()),
        levels=tuple(
            LevelLoss(first, end, float(s / n) if n else math.nan, int(n))
            for (first, end), s, n in zip(bins, sums.tolist(), counts.tolist(), strict=True)
        ),
    )


# Saved states

_ANEW: Final = "; remove the file to begin anew"


def weights(module: Module) -> dict[str, Tensor]:
    """A module's tensors by name, copied to main memory."""
    return {name: t.detach().to("cpu", copy=True) for name, t in module.state_dict().items()}


def state_to_file(state: TrainState, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Save everything the training needs to go on; the file is there wholly or not at all.

    ``about`` is kept beside it: plain values that `read_about` gives back.
    """
    content = {
        "format": FORMAT,
        "about": dict(about or {}),
        "config": _plain(asdict(state.config)),
        "settings": asdict(state.settings),
        "network": state.network.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "steps_per_epoch": state.steps_per_epoch,
        "step": state.step,
        "elapsed_s": state.elapsed_s,
        "norms": state.norms,
        "losses": state.losses,
        "history": state.history,
        "best": state.best,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, KeyError) as exc:
        raise InputError(f"{path}: is no saved training ({exc}){_ANEW}") from None
    except Exception as exc:
        # torch raises pickle's own errors for a file that is not one of its archives.
        raise InputError(f"{path}: is no saved training ({type(exc).__name__}){_ANEW}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: is no saved training of this version{_ANEW}")
    return content


def state_from_file(
    path: Path,
    config: ModelConfig,
    settings: TrainSettings,
    steps_per_epoch: int,
    *,
    device: str | torch.device = "cpu",
) -> tuple[TrainState, dict[str, Any]]:
    """The saved training, with what was kept beside it.

    ``settings`` may differ from the saved ones where that leaves it the same training. Raises
    InputError naming the first thing that may not differ and does.
    """
    content = _read(path)
    now = {"config": _plain(asdict(config)), "settings": asdict(settings)}
    # The sizes of the molecules are a matter of the data, and told as such.
    model = tuple(name for name in now["config"] if name != "size_histogram")
    for part, names in (("config", model), ("settings", FIXED_SETTINGS)):
        for name in names:
            before, after = content[part].get(name), now[part][name]
            if before != after:
                raise InputError(
                    f"{path}: this training was begun with {name} = {before!r}, not {after!r}; "
                    "write that, or another output"
                )
    if content["steps_per_epoch"] != steps_per_epoch:
        raise InputError(
            f"{path}: an epoch of this training has {content['steps_per_epoch']} steps, not "
            f"{steps_per_epoch}: the data have changed; write another output, or remove the folder"
        )
    state = init(config, settings, steps_per_epoch, device=device)
    state.network.load_state_dict(content["network"])
    state.average.load_state_dict(content["average"])
    state.optimizer.load_state_dict(content["optimizer"])
    for name in ("step", "elapsed_s", "norms", "losses", "history", "best"):
        setattr(state, name, content[name])
    return state, content["about"]
