"""Model files by name or path, and what their headers say; torch is not needed for either."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kernels.errors import InputError

SUFFIX: Final = ".safetensors"
WEIGHTS: Final = Path(__file__).parent / "weights"

# A safetensors file begins with the length of its JSON header; ours are some kilobytes long.
_LENGTH: Final = struct.Struct("<Q")
_LONGEST_HEADER: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a model without its weights.

    `steps`: diffusion steps N; `elements`: atomic numbers it knows; `size_histogram`: numbers of
    atoms and how often each was seen in training (may be empty); `architecture`: its kind.
    """

    steps: int
    elements: tuple[int, ...]
    size_histogram: Mapping[int, int]
    architecture: str


def shipped() -> list[str]:
    """Return the names of the models that come with Basin."""
    return sorted(path.stem for path in WEIGHTS.glob(f"*{SUFFIX}"))


def find(name_or_path: str | Path) -> Path:
    """Return the file of a shipped model, or of a path; InputError when there is none."""
    path = Path(name_or_path)
    if path.name == str(name_or_path) and path.name in shipped():
        return WEIGHTS / f"{path.name}{SUFFIX}"
    if path.is_file():
        return path
    names = ", ".join(shipped()) or "none in this installation"
    raise InputError(
        f"model {str(name_or_path)!r} is neither a file nor a shipped model; give the path of a "
        f"{SUFFIX} file or one of: {names}"
    )


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a checkpoint file, 64 hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_header(path: str | Path) -> Header:
    """Return what the header of a model file says; InputError for what is no Basin checkpoint."""
    try:
        with open(path, "rb") as stream:
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            if length > _LONGEST_HEADER:
                raise ValueError("its header is too long")
            metadata = json.loads(stream.read(length))["__metadata__"]
        config: dict[str, Any] = json.loads(metadata["config"])
        sizes = config.get("size_histogram", {})
        return Header(
            steps=int(config["steps"]),
            elements=tuple(int(number) for number in config["elements"]),
            size_histogram={int(size): int(n) for size, n in sizes.items()},
            architecture=str(config["architecture"]),
        )
    except OSError as error:
        raise InputError(f"model {str(path)!r} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise InputError(
            f"model {str(path)!r} is no Basin checkpoint; turn a published one into it with "
            "`basin model import`"
        ) from None
