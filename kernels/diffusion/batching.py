"""Molecules in batches, as large as memory allows, and halved where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from kernels.diffusion.checkpoint import Model
from kernels.diffusion.sizes import packed
from kernels.errors import KernelError, ResourceError

Result = TypeVar("Result")

# On a CPU a batch gains nothing once a step's calls cost little beside its arithmetic, and loses
# when the activations of its pairs leave the cache: so many bytes of one such array are best
# (measured between 2 and 4 MB for 12 to 24 atoms and a width of 256).
_CPU_ARRAY = 4 * 2**20

# Arrays of (B, N, N, hidden) that are alive at once at inference, with a margin.
_LIVE_ARRAYS = 4

# Part of a device's free memory that a batch may take when no limit is given.
_FREE_SHARE = 0.7
_CPU_MEMORY = 2**30


def in_batches(
    model: Model,
    sizes: Sequence[int],
    compute: Callable[[list[int]], Sequence[Result | KernelError]],
    *,
    memory_limit: int | None = None,
    batch_pairs: int | None = None,
    mixed: bool = False,
) -> list[Result | KernelError]:
    """Return the result of each of some molecules of ``sizes`` atoms, in their order.

    ``compute`` gets the places of molecules of equal size, or where `mixed` of any sizes, and gives
    a result for each.
    `memory_limit` bounds a batch, in bytes; a batch that runs out of memory all the same is halved
    and tried again, and a molecule that does alone has a ResourceError. `batch_pairs` sets how many
    pairs of atoms share a batch (default: few on a CPU, as memory allows on a GPU).
    """
    results: dict[int, Result | KernelError] = {}
    most = _most_pairs(model, memory_limit, batch_pairs)
    waiting = packed(sizes, most, mixed=mixed)[::-1]
    while waiting:
        batch = waiting.pop()
        try:
            made = compute(batch)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(batch) == 1:
                results[batch[0]] = ResourceError(
                    f"{sizes[batch[0]]} atoms do not fit in the memory of {model.device}: "
                    f"{str(error).splitlines()[0] if str(error) else 'out of memory'}"
                )
                continue
            half = len(batch) // 2
            waiting += [batch[half:], batch[:half]]
        else:
            results.update(zip(batch, made, strict=True))
        _release(model.device)
    return [results[index] for index in range(len(sizes))]


def _most_pairs(model: Model, memory_limit: int | None, batch_pairs: int | None) -> int:
    """Pairs of atoms that share a batch: what memory allows, on a CPU what the cache holds."""
    per_pair = 4 * model.config.hidden * _LIVE_ARRAYS
    device = model.device
    if memory_limit is None:
        memory_limit = _CPU_MEMORY
        if device.type == "cuda":
            memory_limit = int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0])
    pairs = memory_limit // per_pair
    if batch_pairs is not None:
        return min(pairs, batch_pairs)
    return min(pairs, _CPU_ARRAY // (4 * model.config.hidden)) if device.type == "cpu" else pairs


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
