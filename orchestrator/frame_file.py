"""Frames of a chain under way, in a file that only grows, beside the chain's saved state.

The state says how many of them count; what a kill left behind them is written over.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def frames_path(checkpoint: Path) -> Path:
    """Return where the frames are that belong to a saved state."""
    return checkpoint.with_suffix(".frames")


@dataclass(frozen=True, slots=True)
class SavedFrames:
    """Frames in a file: the first ``count`` of them, of ``n_atoms`` atoms each."""

    path: str
    count: int
    n_atoms: int

    @property
    def nbytes(self) -> int:
        """Bytes of the frames."""
        return self.count * self.n_atoms * 3 * 4

    def read(self) -> NDArray[np.float32]:
        """Return them, (count N, 3) in Å; raises ValueError where the file is too short."""
        found = np.fromfile(self.path, "<f4", count=self.count * self.n_atoms * 3)
        if len(found) < self.count * self.n_atoms * 3:
            raise ValueError(f"{self.path}: {len(found)} numbers, too few for {self.count} frames")
        return found.reshape(-1, 3)

    def append(self, frames: NDArray[np.floating[Any]]) -> SavedFrames:
        """Write frames (F, N, 3) after those that count; return what counts then."""
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if self.count else "wb") as file:
            file.truncate(self.nbytes)
            file.seek(self.nbytes)
            file.write(np.ascontiguousarray(frames, "<f4").tobytes())
        return SavedFrames(self.path, self.count + len(frames), self.n_atoms)

    def sync(self) -> None:
        """Have what was written on disk, before a state is saved that counts on it."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
