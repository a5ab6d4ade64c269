"""Molecules from pure noise by the whole reverse process of EDM, and how they settle on the way.

The process is that of Hoogeboom et al. (ICML 2022), the measures are those of Rothchild et al.
(Chem. Sci. 2024, 15, 13506). Noise and number of atoms of a molecule depend on its own seed alone,
so that it is the same in any company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.connectivity import bonds
from kernels.diffusion.batching import in_batches
from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import elements_of
from kernels.diffusion.noise import centred_normal
from kernels.diffusion.process import Precision, at_precision, centred, reverse
from kernels.diffusion.schedule import ReverseStep
from kernels.diffusion.sizes import draw_size
from kernels.errors import InputError, KernelError, NotFiniteError

Floats = NDArray[np.float32]

# Numbers of neighbours that atoms of each element usually have in molecules of neutral atoms and
# ions alike; the orders of the bonds are not looked at. Elements not named: anything goes.
NEIGHBOURS: Final[Mapping[int, tuple[int, ...]]] = {
    1: (1,), 5: (3, 4), 6: (2, 3, 4), 7: (1, 2, 3, 4), 8: (1, 2), 9: (1,), 13: (3, 4, 6),
    14: (3, 4), 15: (2, 3, 4, 5), 16: (1, 2, 3, 4, 6), 17: (1, 4), 33: (2, 3, 4, 5), 35: (1, 4),
    53: (1, 2, 3, 4, 6), 80: (1, 2), 83: (2, 3),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """`save_every`: of the diffusion steps, one in so many is kept, and always the last.

    `precision` is that of the network's matrix products.
    """

    save_every: int = 1
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise InputError(f"save_every = {self.save_every}; give 1 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Convergence:
    """How far each of F frames is from the last one.

    Each (F,): `step_length` mean move of an atom in the diffusion step to the frame, in Å (NaN for
    the first); `bond_deviation` mean |distance - final distance| of the pairs bonded at the end, in
    Å (NaN where there are none); `elements_final` and `bonds_final`: share of atoms whose element,
    and number of bonds, are those at the end; `valid_bonds`: share of atoms with a usual number of
    bonds (`NEIGHBOURS`).
    """

    step_length: Floats
    bond_deviation: Floats
    elements_final: Floats
    bonds_final: Floats
    valid_bonds: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """A molecule made from noise: `numbers` (N,) uint8 at its end.

    `frames` (F, N, 3) float32 in Å, the first being noise and the last the result; `levels` (F,)
    int32 is the diffusion step n of each; `convergence` has a value for each.
    """

    numbers: NDArray[np.uint8]
    frames: Floats
    levels: NDArray[np.int32]
    convergence: Convergence


Steps = tuple[NDArray[np.float64], NDArray[np.uint8]]


def generate(
    model: Model,
    seeds: Sequence[int],
    settings: GenerateSettings = GenerateSettings(),
    *,
    memory_limit: int | None = None,
    batch_pairs: int | None = None,
) -> list[Generation | KernelError]:
    """Make one molecule from each seed (0 to 2^128 - 1), where the model is.

    One result per seed, in order: NotFiniteError for a NaN or an infinity on the way,
    ResourceError when memory does not suffice. For the limits see `kernels.diffusion.batching`.
    Raises InputError for a model that predicts no noise.
    """
    if model.config.architecture != "edm":
        raise InputError(
            f"model {model.name!r} is of architecture {model.config.architecture}, which begins "
            "with a geometry; molecules from noise need a model of architecture edm"
        )
    sizes = [draw_size(model.config.size_histogram, seed) for seed in seeds]
    made = in_batches(
        model,
        sizes,
        lambda batch: _denoise(model, [seeds[at] for at in batch], sizes[batch[0]], settings),
        memory_limit=memory_limit,
        batch_pairs=batch_pairs,
    )
    return [
        result if isinstance(result, KernelError) else _generation(*result, settings.save_every)
        for result in made
    ]


def _denoise(
    model: Model, seeds: Sequence[int], n_atoms: int, settings: GenerateSettings
) -> list[Steps | KernelError]:
    """Return frames (steps + 1, N, 3) in Å and elements (steps + 1, N) of molecules of one size."""
    config, schedule, device = model.config, model.schedule, model.device
    steps = schedule.steps

    def noise(n: int) -> tuple[Tensor, Tensor]:
        drawn = [centred_normal(seed, n, n_atoms, config.n_features) for seed in seeds]
        both = torch.from_numpy(np.stack(drawn)).to(device)
        return both[..., :3], both[..., 3:]

    with torch.inference_mode(), at_precision(settings.precision, device) as evaluate:
        # The steps use the counters from their own n down to 0.
        x, h = noise(steps + 1)
        frames = torch.empty((steps + 1, *x.shape), dtype=torch.float32, device=device)
        elements = torch.empty((steps + 1, *x.shape[:2]), dtype=torch.uint8, device=device)

        def step(n: int, coefficients: ReverseStep) -> tuple[Tensor, Tensor]:
            level = torch.full((len(seeds),), n / steps, device=device)
            eps_x, eps_h = evaluate(model.network, x, h, level)
            noise_x, noise_h = noise(n)
            moved = centred(reverse(x, eps_x, coefficients, noise_x))
            return moved, reverse(h, eps_h, coefficients, noise_h)

        for n in range(steps, 0, -1):
            frames[steps - n], elements[steps - n] = x, elements_of(h, config).to(torch.uint8)
            x, h = step(n, schedule.reverse_step(n))
        # Elements are read from z_0 itself; only the positions are decoded.
        elements[steps] = elements_of(h, config).to(torch.uint8)
        frames[steps] = step(0, schedule.decode_step())[0]
        found = frames.cpu().numpy().astype(np.float64) * config.feature_scaling[0]
        kinds = elements.cpu().numpy()
    results: list[Steps | KernelError] = []
    for index in range(len(seeds)):
        finite = np.isfinite(found[:, index]).all(axis=(1, 2))
        if finite.all():
            results.append((found[:, index], kinds[:, index]))
        else:
            at = steps - int(np.flatnonzero(~finite)[0])
            results.append(
                NotFiniteError(f"the positions became NaN or infinite at diffusion step n = {at}")
            )
    return results


def _generation(
    frames: NDArray[np.float64], elements: NDArray[np.uint8], save_every: int
) -> Generation:
    levels = np.arange(len(frames) - 1, -1, -1, dtype=np.int32)
    kept = np.flatnonzero(levels % save_every == 0)
    lengths = np.full(len(frames), np.nan)
    lengths[1:] = np.linalg.norm(np.diff(frames, axis=0), axis=2).mean(axis=1)
    measured = converge(frames[kept], elements[kept])
    return Generation(
        elements[-1],
        frames[kept].astype(np.float32),
        levels[kept],
        Convergence(lengths[kept].astype(np.float32), *measured),
    )


def converge(
    frames: NDArray[np.float64], elements: NDArray[np.uint8]
) -> tuple[Floats, Floats, Floats, Floats]:
    """Return the measures of `Convergence` after the first, of frames (F, N, 3), elements (F, N).

    Bonds of a frame are those of its own elements.
    """
    final = elements[-1]
    pairs = bonds(final, frames[-1])
    first, second = pairs[:, 0], pairs[:, 1]
    distances = np.linalg.norm(frames[:, first] - frames[:, second], axis=2)
    deviation = np.full(len(frames), np.nan)
    if len(pairs):
        deviation = np.abs(distances - distances[-1]).mean(axis=1)
    counts = np.stack(
        [
            np.bincount(bonds(kinds, xyz).ravel(), minlength=len(final))
            for kinds, xyz in zip(elements, frames, strict=True)
        ]
    )
    usual = _usual(elements, counts)
    shares = (
        deviation,
        (elements == final).mean(axis=1),
        (counts == counts[-1]).mean(axis=1),
        usual.mean(axis=1),
    )
    a, b, c, d = (share.astype(np.float32) for share in shares)
    return a, b, c, d


def _usual(elements: NDArray[np.uint8], counts: NDArray[Any]) -> NDArray[np.bool_]:
    usual = np.ones(elements.shape, bool)
    for number, allowed in NEIGHBOURS.items():
        usual &= (elements != number) | np.isin(counts, allowed)
    return usual
