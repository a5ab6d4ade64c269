"""Checkpoints: weights in a safetensors file, with the configuration and a model card inside."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from kernels.diffusion.egnn import ModelConfig, build
from kernels.diffusion.model_files import SUFFIX, digest, find, shipped
from kernels.diffusion.schedule import Schedule
from kernels.errors import InputError

__all__ = ["Model", "digest", "find", "load", "read", "save", "shipped", "write_whole"]

FORMAT: Final = "basin-diffusion"
FORMAT_VERSION: Final = 1


@dataclass(frozen=True, eq=False)
class Model:
    """A network ready for use, with all that was known about it when it was saved.

    `name` is the shipped name or the file's stem; `digest` the SHA-256 of the file, which stands
    for the model in the keys of results; `card` its model card's entries.
    """

    config: ModelConfig
    network: nn.Module
    schedule: Schedule
    name: str
    digest: str
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device


def save(
    path: str | Path,
    config: ModelConfig,
    state_dict: Mapping[str, Tensor],
    card: Mapping[str, Any],
    *,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Write a checkpoint, whole or not at all; `card` holds anything that JSON can.

    float16 halves the file; weights are loaded as float32 either way.
    """
    target = Path(path)
    if target.suffix != SUFFIX:
        raise InputError(f"checkpoint {str(path)!r}: give a name that ends in {SUFFIX}")
    kind = {"float32": torch.float32, "float16": torch.float16}[dtype]
    tensors = {
        name: (tensor.to(kind) if tensor.is_floating_point() else tensor).detach().cpu().clone()
        for name, tensor in state_dict.items()
    }
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise InputError(f"weights {broken[0]!r} are not finite in {dtype}; nothing was written")
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "config": config.to_json(),
        "card": json.dumps(dict(card), sort_keys=True),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, _reproducible(serialize(tensors, metadata)))


def write_whole(target: Path, content: bytes | memoryview) -> None:
    """Write a file that is there wholly or not at all, and in place of any older one."""
    unfinished = target.with_name(f".tmp-{uuid.uuid4().hex}-{target.name}")
    try:
        with open(unfinished, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _reproducible(content: bytes) -> bytes:
    """Sort the header of a safetensors file, whose order safetensors leaves to chance.

    Equal models thus have equal digests, and results equal keys.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def read(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Return configuration, weights (float32, on the CPU) and card of a checkpoint file.

    Raises InputError for a file that is not a Basin checkpoint, is damaged, or is newer than this
    version of Basin.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            config = _configuration(path, metadata)
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"checkpoint {str(path)!r} cannot be read: {error}; give a Basin checkpoint, or turn a "
            "published one into it with `basin model import`"
        ) from error
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    return config, weights, dict(json.loads(metadata.get("card", "{}")))


def load(name_or_path: str | Path, device: str | torch.device = "cpu") -> Model:
    """Load a shipped model by name, or a checkpoint file; see `find` and `read` for errors."""
    path = find(name_or_path)
    config, weights, card = read(path)
    network = build(config)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"checkpoint {str(path)!r}: the weights do not fit the configuration: {error}"
        ) from error
    network.eval().requires_grad_(False)
    return Model(
        config=config,
        network=network.to(device),
        schedule=Schedule(config.steps, config.precision),
        name=path.stem,
        digest=digest(path),
        card=card,
    )


def _configuration(path: str | Path, metadata: Mapping[str, str]) -> ModelConfig:
    if metadata.get("format") != FORMAT:
        raise InputError(f"checkpoint {str(path)!r} is a safetensors file, but not one of Basin's")
    version = metadata.get("version", "")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise InputError(
            f"checkpoint {str(path)!r} has format version {version!r}; this version of Basin reads "
            f"up to {FORMAT_VERSION}: update Basin"
        )
    try:
        return ModelConfig.from_json(metadata.get("config", ""))
    except InputError as error:
        raise InputError(f"checkpoint {str(path)!r}: {error}") from error
