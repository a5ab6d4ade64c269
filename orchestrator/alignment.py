"""Which way diffusion moves atoms: along the forces, or straight to the relaxed geometry.

All vectors at a frame are in that frame's own orientation: whatever geometry they lead to is first
moved and turned onto the frame. So the forces need no turning, and what is left of a displacement
is change of shape only. Rothchild et al., Chem. Sci. 2024, 15, 13506, section on alignment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.paths import Walk

Floats = NDArray[np.float64]

AHEAD: Final = (1, 10, 30)

# Å or eV/Å: a shorter vector has no direction to speak of, in single precision.
_SHORTEST = 1e-6


def superpose(moving: Floats, fixed: Floats) -> Floats:
    """Return ``moving`` (..., N, 3) moved and turned onto ``fixed`` (..., N, 3), unweighted.

    The best proper rotation in the least-squares sense, so that mirror images stay apart (Kabsch,
    Acta Cryst. A 1976, 32, 922). Leading dimensions broadcast.
    """
    centre = fixed.mean(axis=-2, keepdims=True)
    there = fixed - centre
    here = moving - moving.mean(axis=-2, keepdims=True)
    u, _, vt = np.linalg.svd(np.swapaxes(here, -1, -2) @ there)
    sign = np.sign(np.linalg.det(u @ vt))
    u[..., -1] *= np.where(sign == 0, 1.0, sign)[..., None]
    turned: Floats = here @ (u @ vt) + centre
    return turned


def displacements(frames: Floats, ahead: int) -> Floats:
    """Return the move (F - ahead, N, 3) of each of F frames (F, N, 3) over the next frames."""
    if ahead >= len(frames):
        return np.zeros((0, *frames.shape[1:]))
    moves: Floats = superpose(frames[ahead:], frames[:-ahead]) - frames[:-ahead]
    return moves


def towards(frames: Floats, target: Floats) -> Floats:
    """Return the move (F, N, 3) that takes each frame (F, N, 3) to ``target`` (N, 3)."""
    moves: Floats = superpose(np.broadcast_to(target, frames.shape), frames) - frames
    return moves


def cosines(a: Floats, b: Floats) -> Floats:
    """Return the cosine (...) of vectors (..., 3); NaN where one of them has no length."""
    lengths = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    there = (lengths[0] > _SHORTEST) & (lengths[1] > _SHORTEST)
    product = np.where(there, lengths[0] * lengths[1], np.nan)
    found: Floats = np.einsum("...i,...i->...", a, b) / product
    return found


def of_path(
    frames: Floats, forces: Floats, target: Floats, ahead: Sequence[int] = AHEAD
) -> dict[str, Floats]:
    """Return the cosines (F, N) of every frame and atom; NaN where there is no such angle.

    ``frames`` and ``forces`` (F, N, 3) in Å and eV/Å, ``target`` (N, 3) the relaxed geometry in Å.
    Keys: ``move 1, force`` and ``move 1, minimum`` for each number of frames ahead, and
    ``force, minimum``.
    """
    to_minimum = towards(frames, target)
    found = {"force, minimum": cosines(forces, to_minimum)}
    for k in ahead:
        moves = displacements(frames, k)
        for name, vectors in (("force", forces), ("minimum", to_minimum)):
            angles = np.full(frames.shape[:2], np.nan)
            angles[: len(moves)] = cosines(moves, vectors[: len(moves)])
            found[f"move {k}, {name}"] = angles
    return found


@dataclass(frozen=True, slots=True)
class Alignment:
    """Cosines against the diffusion step, over all atoms of all molecules of a diffuse stage.

    ``levels`` (F,) is the diffusion step n of each frame; ``mean`` and ``deviation`` (one standard
    deviation), (F,) each, go by the keys of `of_path`, those without any angle left out.
    """

    stage: str
    level_of_theory: str
    model: str
    n: int
    protocol: str
    molecules: int
    levels: NDArray[np.int64]
    mean: dict[str, Floats]
    deviation: dict[str, Floats]


class _Sums:
    """Count, sum and sum of squares of cosines, frame by frame."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.molecules = 0
        self._sums: dict[str, Floats] = {}

    def add(self, angles: dict[str, Floats]) -> None:
        """Take in the cosines (F, N) of one path."""
        self.molecules += 1
        for name, values in angles.items():
            there = np.isfinite(values)
            kept = np.where(there, values, 0.0)
            new = np.stack([there.sum(axis=1), kept.sum(axis=1), (kept**2).sum(axis=1)])
            self._sums[name] = self._sums.get(name, 0.0) + new

    def result(self) -> Alignment:
        """Return the means and standard deviations."""
        mean, deviation = {}, {}
        for name, (count, total, squares) in self._sums.items():
            if count.any():
                n = np.where(count > 0, count, np.nan)
                mean[name] = total / n
                deviation[name] = np.sqrt(np.maximum(squares / n - mean[name] ** 2, 0.0))
        walk = self.walk
        return Alignment(
            walk.stage,
            walk.level_of_theory,
            walk.model,
            walk.n,
            walk.protocol,
            self.molecules,
            walk.levels,
            mean,
            deviation,
        )


def align(walks: Iterable[Walk]) -> list[Alignment]:
    """Return the alignment of each diffuse stage, from its paths with forces and a minimum.

    Paths whose bonds changed, on the way or in relaxing, are left out.
    """
    found: dict[tuple[str, str, bytes], _Sums] = {}
    for walk in walks:
        if walk.forces is None or walk.minimum is None or walk.changed:
            continue
        group = (walk.stage, walk.level_of_theory, walk.levels.tobytes())
        found.setdefault(group, _Sums(walk)).add(of_path(walk.frames, walk.forces, walk.minimum))
    return [sums.result() for sums in found.values()]
