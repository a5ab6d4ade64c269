"""Model files for tests: the published network, made small, with weights that nobody trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_model(path: Path, *, seed: int = 0, broken: bool = False, **config: Any) -> Path:
    """Write a checkpoint of random weights; return its path.

    A ``broken`` one has weights so large that it gives NaN.
    """
    import torch

    from kernels.diffusion.checkpoint import save
    from kernels.diffusion.egnn import ModelConfig, build

    made = ModelConfig(**{"hidden": 16, "layers": 2, "steps": 100, **config})
    torch.manual_seed(seed)
    state = build(made).state_dict()
    if broken:
        state = {name: 1e30 * tensor for name, tensor in state.items()}
    save(path, made, state, {"about": "random weights"})
    return path
