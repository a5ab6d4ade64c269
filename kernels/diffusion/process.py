"""The process that relaxes: the last n steps of the reverse diffusion, from a given geometry.

Molecules of equal size and the same n are computed together. The noise of a molecule depends on
its own seed and the step alone, so that its path is the same in any company.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.diffusion.batching import in_batches
from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import elements_of, features
from kernels.diffusion.guide import Evaluate, Guide, guided
from kernels.diffusion.noise import centred_normal
from kernels.diffusion.schedule import ReverseStep, Schedule
from kernels.errors import InputError, KernelError, NotFiniteError

Protocol = Literal["published", "deterministic"]
Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """A geometry to relax: `numbers` (N,) uint8, `positions` (N, 3) float64 in Å.

    `seed` (0 to 2^128 - 1) determines the noise; `smiles`, in whose canonical order the atoms
    are, tells the bonds to models that need them ("": not known).
    """

    numbers: NDArray[np.uint8]
    positions: NDArray[np.float64]
    seed: int
    smiles: str = ""


@dataclass(frozen=True, slots=True)
class DiffuseSettings:
    """What determines a path: `n`, the number of reverse steps, and `protocol`.

    "published" takes the geometry for z_n as it is, lets the features evolve, adds the noise of
    the ancestral process and of its decoding (Rothchild et al., Chem. Sci. 2024, 15, 13506).
    "deterministic" adds no noise and resets the features before every step; its last frame is the
    mean of the positions given z_0. Models of architecture "basin" know no other than
    "deterministic", and go their own way there (`kernels.diffusion.guide`). `precision` is that
    of the network's matrix products.
    """

    n: int
    protocol: Protocol = "deterministic"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"n = {self.n} diffusion steps; give 1 or more")
        for name, choices in (("protocol", Protocol), ("precision", Precision)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"{name} {getattr(self, name)!r} is unknown; choose from "
                    f"{', '.join(get_args(choices))}"
                )


@dataclass(frozen=True, slots=True, eq=False)
class DiffusionPath:
    """The path of one molecule: `frames` (n + 1, N, 3) float32 in Å, in the frame of the start.

    Frame 0 is the start, the last one the decoded result; `levels` (n + 1,) int32 is n, ..., 0;
    `changed_elements` counts atoms whose features ended as another element's, which is ignored.
    """

    frames: NDArray[np.float32]
    levels: NDArray[np.int32]
    changed_elements: int


def add_noise(
    schedule: Schedule, x: Tensor, h: Tensor, level: Tensor, eps_x: Tensor, eps_h: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise a batch: z_n = alpha_n z_0 + sigma_n eps for x (B, N, 3), h (B, N, F), n (B,)."""
    alpha, sigma = (
        torch.from_numpy(values.astype(np.float32)).to(x.device)[level][:, None, None]
        for values in (schedule.alpha, schedule.sigma)
    )
    return alpha * x + sigma * eps_x, alpha * h + sigma * eps_h


def reverse(z: Tensor, eps: Tensor, step: ReverseStep, noise: Tensor | None) -> Tensor:
    """Take one reverse step from z given the predicted noise; without `noise`, to its mean."""
    found = step.keep * z - step.remove * eps
    return found if noise is None else found.add_(noise, alpha=step.noise)


def centred(x: Tensor) -> Tensor:
    """Positions (B, N, 3) with their mean at the origin."""
    return x - x.mean(dim=1, keepdim=True)


def diffuse(
    model: Model,
    starts: Sequence[Start],
    settings: DiffuseSettings,
    *,
    memory_limit: int | None = None,
    batch_pairs: int | None = None,
) -> list[DiffusionPath | KernelError]:
    """Relax geometries by the last n steps of the reverse diffusion, where the model is.

    One result per start, in order. A start that cannot be computed gives its own error and leaves
    the others alone: InputError for an element that the model does not know or impossible input,
    NotFiniteError for a NaN or an infinity on the way, ResourceError when memory does not even
    suffice for the one molecule. `memory_limit` bounds a batch, in bytes; a batch that runs out of
    memory all the same is halved and tried again. `batch_pairs` sets how many pairs of atoms share
    a batch (default: few on a CPU, as memory allows on a GPU).

    Raises InputError when the schedule has fewer than n steps.
    """
    if settings.n > model.schedule.steps:
        raise InputError(
            f"n = {settings.n}: model {model.name!r} has {model.schedule.steps} diffusion steps"
        )
    if model.config.architecture == "basin" and settings.protocol != "deterministic":
        raise InputError(
            f"protocol {settings.protocol!r}: model {model.name!r} is of architecture basin, which "
            "predicts minima and no noise; choose deterministic, or a model of architecture edm"
        )
    results: list[DiffusionPath | KernelError | None] = [_problem(model, start) for start in starts]
    batches = _guide_batch if model.config.architecture == "basin" else _diffuse_batch
    fit = [index for index, result in enumerate(results) if result is None]
    made = in_batches(
        model,
        [len(starts[index].numbers) for index in fit],
        lambda batch: batches(model, [starts[fit[at]] for at in batch], settings),
        memory_limit=memory_limit,
        batch_pairs=batch_pairs,
        mixed=batches is _guide_batch,
    )
    for index, path in zip(fit, made, strict=True):
        results[index] = path
    return [result for result in results if result is not None]


def _problem(model: Model, start: Start) -> KernelError | None:
    numbers, positions = start.numbers, start.positions
    if numbers.ndim != 1 or not len(numbers) or positions.shape != (len(numbers), 3):
        return InputError(f"positions {positions.shape} do not fit numbers {numbers.shape}")
    unknown = sorted(set(numbers.tolist()) - set(model.config.elements))
    if unknown:
        return InputError(
            f"element {_symbols(unknown)} is unknown to model {model.name!r}, which was trained "
            f"on {_symbols(model.config.elements)}"
        )
    if not np.isfinite(positions).all():
        return NotFiniteError("the starting positions contain NaN or infinity")
    return None


def _symbols(numbers: Sequence[int]) -> str:
    from ase.data import chemical_symbols

    return ", ".join(
        chemical_symbols[n] if n < len(chemical_symbols) else f"Z={n}" for n in numbers
    )


def _diffuse_batch(
    model: Model, starts: Sequence[Start], settings: DiffuseSettings
) -> list[DiffusionPath | KernelError]:
    config, schedule, device = model.config, model.schedule, model.device
    n_atoms = len(starts[0].numbers)
    origin = np.stack([start.positions.mean(axis=0) for start in starts])
    given = np.stack([start.positions for start in starts]) - origin[:, None]
    numbers = torch.from_numpy(np.stack([start.numbers for start in starts])).to(device).long()

    with torch.inference_mode(), at_precision(settings.precision, device) as evaluate:
        clean = features(numbers, config)
        x_scale = config.feature_scaling[0]
        x = torch.from_numpy((given / x_scale).astype(np.float32)).to(device)
        h = clean
        frames = torch.empty((settings.n + 1, *x.shape), dtype=torch.float32, device=device)
        frames[0] = x
        ancestral = settings.protocol == "published"

        def step(n: int, coefficients: ReverseStep) -> tuple[Tensor, Tensor]:
            time = torch.full((len(starts),), n / schedule.steps, device=device)
            eps_x, eps_h = evaluate(model.network, x, h if ancestral else clean, time)
            noise_x = noise_h = None
            if ancestral:
                # n - 1 of this step; the decoding from z_0 has a counter of its own.
                noise = _noise(starts, n, n_atoms, config.n_features).to(device)
                noise_x, noise_h = noise[..., :3], noise[..., 3:]
            moved = centred(reverse(x, eps_x, coefficients, noise_x))
            return moved, reverse(h, eps_h, coefficients, noise_h) if ancestral else h

        for n in range(settings.n, 0, -1):
            x, h = step(n, schedule.reverse_step(n))
            frames[settings.n - n + 1] = x
        # Elements are read from z_0 itself; only the positions are decoded.
        changed = (elements_of(h, config) != numbers).sum(dim=1).tolist()
        frames[settings.n] = step(0, schedule.decode_step())[0]
        found = frames.cpu().numpy().astype(np.float64) * x_scale

    return [
        _path(found[:, index] + origin[index], settings.n, int(changed[index]))
        for index in range(len(starts))
    ]


def _path(frames: NDArray[np.float64], n: int, changed: int) -> DiffusionPath | KernelError:
    levels = np.arange(n, -1, -1, dtype=np.int32)
    finite = np.isfinite(frames).all(axis=(1, 2))
    if finite.all():
        return DiffusionPath(frames.astype(np.float32), levels, changed)
    return NotFiniteError(
        "the positions became NaN or infinite at diffusion step "
        f"n = {levels[int(np.flatnonzero(~finite)[0])]}"
    )


def _guide_batch(
    model: Model, starts: Sequence[Start], settings: DiffuseSettings
) -> list[DiffusionPath | KernelError]:
    made = [_guide(start) for start in starts]
    fit = [index for index, guide in enumerate(made) if isinstance(guide, Guide)]
    results: list[DiffusionPath | KernelError | None] = [
        guide if isinstance(guide, KernelError) else None for guide in made
    ]
    if fit:
        with torch.inference_mode(), at_precision(settings.precision, model.device) as evaluate:
            frames = guided(
                model,
                evaluate,
                [guide for guide in made if isinstance(guide, Guide)],
                [starts[index].numbers for index in fit],
                [starts[index].positions for index in fit],
                settings.n,
            )
        for index, path in zip(fit, frames, strict=True):
            results[index] = _path(path, settings.n, 0)
    return [result for result in results if result is not None]


def _guide(start: Start) -> Guide | KernelError:
    try:
        return Guide(start.smiles, start.positions)
    except KernelError as error:
        return error


def _noise(starts: Sequence[Start], step: int, n_atoms: int, n_features: int) -> Tensor:
    return torch.from_numpy(
        np.stack([centred_normal(start.seed, step, n_atoms, n_features) for start in starts])
    )


@contextmanager
def at_precision(precision: Precision, device: torch.device) -> Iterator[Evaluate]:
    """Give a function that calls a network at a precision; its results are float32."""

    def evaluate(
        network: torch.nn.Module,
        x: Tensor,
        h: Tensor,
        level: Tensor,
        graph: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            eps_x, eps_h = network(x, h, level, graph)
        return eps_x.float(), eps_h.float()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield evaluate
    finally:
        torch.set_float32_matmul_precision(before)
