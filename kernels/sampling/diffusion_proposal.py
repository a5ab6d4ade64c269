"""Moves of a Metropolis chain made by a diffusion model, corrected so that the chain stays exact.

A reverse step n of the diffusion draws from a Gaussian whose mean mu(x) and width are known, and so
is the step back: with log q(x|x') - log q(x'|x) in the acceptance the chain samples the Boltzmann
distribution, whatever the model knows (Hastings, Biometrika 1970, 57, 97). Of the general move

    x' = x + drift (s/s_n)² C (mu(x) - x) + s C^(1/2) xi,    s = width times the chain's step size,

the reverse step itself is drift = 1, C = 1, s = its own width s_n. As in MALA (Roberts & Tweedie,
Bernoulli 1996, 2, 341) the drift goes with the square of the width. Shaped moves take for C the
inverse of the model's own curvature d(x - mu)/dx at the chain's start: stiff where the model pulls
back hard, wide along torsions. C is the same all along the chain, so that shaped moves without
drift are symmetric, need no correction, and no network once the chain has begun.

All moves but the Gaussian ones leave the centre of mass where it is, and xi has its 3N-3 degrees of
freedom. The network computes in float32; what counts is that mu depends on x alone, which holds
within a process for calls of one shape, and mu(x) of the present geometry is remembered with it.
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import features
from kernels.errors import InputError
from kernels.sampling.metropolis import GaussianProposal

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]

Moves = Literal["shaped", "reverse step"]

# The words of the Philox counter after the first, as in `kernels.sampling.metropolis`.
_STREAM: Final = (0, 2)

# Curvatures below this part of the largest are too little known to be trusted: so many times the
# stiffest motion's variance is what the softest is given (measured: 0.001 and 0.03 are worse).
_FLOOR: Final = 0.003

# Displacement in Å for the differences that make the curvature, far above the noise of float32.
_DELTA: Final = 0.004

# Width of a move for a step size of one: see BENCHMARKS.md.
_WIDTHS: Final[dict[Moves, float]] = {"shaped": 0.5, "reverse step": 0.0}
_DRIFTS: Final[dict[Moves, float]] = {"shaped": 0.0, "reverse step": 1.0}

# Pairs of atoms in one call of the network for the curvature: some tens of megabytes at most.
_PAIRS: Final = 8192


class DiffusionProposal:
    """A share of the moves of one molecule's chain from a model, the others Gaussian.

    `numbers` (N,) are its atoms, `n` the diffusion step, `share` the probability of a diffusion
    move. `moves`: "shaped" by the model's curvature, or the "reverse step" as it is. `width` is in
    step sizes of the chain (0: the width of the reverse step, whatever the step size) and `drift`
    as in the module's equation; None: the best measured of each kind.

    Raises InputError for a model that predicts no noise, an element it does not know, and
    impossible settings.
    """

    def __init__(
        self,
        model: Model,
        numbers: NDArray[np.uint8],
        n: int = 20,
        share: float = 0.9,
        *,
        moves: Moves = "shaped",
        width: float | None = None,
        drift: float | None = None,
    ) -> None:
        if model.config.architecture != "edm":
            raise InputError(
                f"model {model.name!r} is of architecture {model.config.architecture}, which "
                "predicts minima and no noise: it has no reverse step; choose a model of "
                "architecture edm, such as qm9-edm"
            )
        if not 1 <= n <= model.schedule.steps:
            raise InputError(
                f"n = {n} is no diffusion step of model {model.name!r}; give 1 to "
                f"{model.schedule.steps}"
            )
        if moves not in get_args(Moves):
            raise InputError(f"moves {moves!r} are unknown; choose from {', '.join(_WIDTHS)}")
        width = _WIDTHS[moves] if width is None else width
        drift = _DRIFTS[moves] if drift is None else drift
        if not 0 <= share <= 1:
            raise InputError(f"share {share} of diffusion moves is impossible; give 0 to 1")
        for name, value in (("width", width), ("drift", drift)):
            if not 0 <= value < np.inf:
                raise InputError(f"{name} {value} of diffusion moves is impossible; give 0 or more")
        self.n, self.share, self.width, self.drift = n, share, width, drift
        self.shaped = moves == "shaped"
        self._model = model
        self._step = model.schedule.reverse_step(n)
        self._scale = model.config.feature_scaling[0]
        with torch.inference_mode():
            self._clean = features(
                torch.from_numpy(np.asarray(numbers)[None].astype(np.int64)).to(model.device),
                model.config,
            )
        self._gaussian = GaussianProposal()

    def init(self, positions: Floats) -> Arrays:
        """Return what is remembered of the start (N, 3) in Å: its pull, and the chain's shape."""
        if positions.shape != (self._clean.shape[1], 3):
            raise InputError(
                f"positions {positions.shape} do not fit the {self._clean.shape[1]} atoms that the "
                "proposal is for"
            )
        memory = {"shape": self._shape(positions)} if self.shaped else {}
        return self._remember(memory, positions)

    def propose(
        self, positions: Floats, memory: Arrays, seed: int, step: int, step_size: float
    ) -> tuple[Floats, Arrays, float]:
        """Return new positions (N, 3) in Å, their memory, and log q(old|new) - log q(new|old).

        Raises InputError for a memory that this proposal has not made.
        """
        if self.shaped != ("shape" in memory) or (self.drift > 0) != ("pull" in memory):
            raise InputError(
                f"the saved chain's proposal remembered {sorted(memory) or 'nothing'}, which are "
                "other moves than these; start the chain anew"
            )
        # As in `kernels.diffusion.noise`: no two steps overlap.
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, *_STREAM, step]))
        if generator.random() >= self.share:
            moved, _, _ = self._gaussian.propose(positions, {}, seed, step, step_size)
            return moved, self._remember(memory, moved), 0.0
        width = self.width * step_size if self.width else self._step.noise * self._scale
        shape = memory.get("shape")
        drawn = width * generator.standard_normal(positions.shape)
        noise = drawn - drawn.mean(axis=0) if shape is None else _shaped(drawn, shape)
        if not self.drift:
            return positions + noise, memory, 0.0
        moved = positions + self._drifted(memory, width) + noise
        remembered = self._remember(memory, moved)
        # What noise would lead from the new mean back to where the chain is.
        back = positions - moved - self._drifted(remembered, width)
        return moved, remembered, (_norm(noise, shape) - _norm(back, shape)) / (2 * width**2)

    def _remember(self, memory: Arrays, positions: Floats) -> Arrays:
        if not self.drift:
            return memory
        return {**memory, "pull": self._means(positions[None])[0] - _centred(positions)}

    def _drifted(self, memory: Arrays, width: float) -> Floats:
        pull: Floats = memory["pull"]
        if "shape" in memory:
            pull = _shaped(_shaped(pull, memory["shape"]), memory["shape"])
        return self.drift * (width / (self._step.noise * self._scale)) ** 2 * pull

    def _means(self, positions: Floats) -> Floats:
        """Mean mu of the reverse step from each of some geometries (B, N, 3) in Å, centred."""
        y = _centred(positions)
        x = torch.from_numpy((y / self._scale).astype(np.float32)).to(self._model.device)
        level = x.new_full((len(x),), self.n / self._model.schedule.steps)
        with torch.inference_mode():
            eps, _ = self._model.network(x, self._clean.expand(len(x), -1, -1), level, None)
        found = eps.double().cpu().numpy() * self._scale
        return _centred(self._step.keep * y - self._step.remove * found)

    def _shape(self, positions: Floats) -> Floats:
        """C^(1/2) (3N, 3N), symmetric, of the model's curvature at a geometry (N, 3) in Å.

        The stiffest motion has variance 1. So have the rotations, to which the energy is blind.
        """
        size = positions.size
        moves = np.eye(size).reshape(size, *positions.shape) * _DELTA
        chunk = max(1, _PAIRS // len(positions) ** 2)
        rows = [
            self._means(positions + moves[at : at + chunk])
            - self._means(positions - moves[at : at + chunk])
            for at in range(0, size, chunk)
        ]
        jacobian = np.concatenate(rows).reshape(size, size) / (2 * _DELTA)
        rigid = _rigid_motions(positions)
        internal = np.eye(size) - rigid @ rigid.T
        curvature = internal @ (np.eye(size) - (jacobian + jacobian.T) / 2) @ internal
        values, vectors = np.linalg.eigh(curvature)
        if not values[-1] > 0:
            raise InputError(
                f"model {self._model.name!r} pulls no motion of this molecule back at "
                f"n = {self.n}: moves have no shape; choose moves 'reverse step', or another model"
            )
        # Rigid motions are in the null space of the projected curvature, and so at the floor.
        spread = np.maximum(values / values[-1], _FLOOR) ** -0.5
        root = internal @ (vectors * spread @ vectors.T) @ internal
        turns = rigid[:, 3:]
        shape: Floats = root + turns @ turns.T
        return shape


def _centred(positions: Floats) -> Floats:
    centred: Floats = positions - positions.mean(axis=-2, keepdims=True)
    return centred


def _shaped(moves: Floats, shape: Floats) -> Floats:
    """Moves (N, 3) times C^(1/2), which also takes their mean away."""
    shaped: Floats = (shape @ moves.ravel()).reshape(moves.shape)
    return shaped


def _norm(moves: Floats, shape: Floats | None) -> float:
    """Squared length of what was, before it was shaped, a move (N, 3) of fixed centre."""
    if shape is None:
        return float((moves**2).sum())
    # C^(1/2) is blind to shifts only: with them added it can be inverted.
    shifts = np.kron(np.full((len(moves), len(moves)), 1 / len(moves)), np.eye(3))
    return float((np.linalg.solve(shape + shifts, moves.ravel()) ** 2).sum())


def _rigid_motions(positions: Floats) -> Floats:
    """Orthonormal shifts (3N, 3) and turns of a geometry (N, 3), side by side: (3N, 6 or fewer).

    Linear molecules have two turns, single atoms none.
    """
    y = _centred(positions)
    shifts = np.tile(np.eye(3), (len(y), 1)) / np.sqrt(len(y))
    turns = np.stack([np.cross(axis, y).ravel() for axis in np.eye(3)], axis=1)
    vectors, sizes, _ = np.linalg.svd(turns, full_matrices=False)
    kept = vectors[:, sizes > 1e-6 * max(1.0, float(sizes[0]))]
    return np.concatenate([shifts, kept], axis=1)
