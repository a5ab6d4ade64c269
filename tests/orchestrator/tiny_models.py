"""Model files for tests: the published network, made small, with weights that nobody trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_model(path: Path, *, seed: int = 0, scale: float = 1.0, **config: Any) -> Path:
    """Write a checkpoint of random weights, the last ones times ``scale``; return its path."""
    import torch

    from kernels.diffusion.checkpoint import save
    from kernels.diffusion.egnn import ModelConfig, build

    made = ModelConfig(**{"hidden": 16, "layers": 2, "steps": 100, **config})
    torch.manual_seed(seed)
    state = build(made).state_dict()
    for name in state:
        if "length" in name:
            state[name] = state[name] * scale
    save(path, made, state, {"about": "random weights"})
    return path
