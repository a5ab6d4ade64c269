"""The reverse process of Basin's own network: a force field guides, the network corrects it.

At the minimum sought the force field's gradient is not zero but what the network predicts, since
that is what it was trained to tell of ground states. Each of the n steps goes half of the way to
where the two agree, by the force field's curvature, so that bonds and torsions arrive together.
Where the two agree is also the network's word on the data z_0, which chains of one reverse step go
by (`kernels.diffusion.chains`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import features
from kernels.diffusion.refiner import Refiner, layout
from kernels.errors import InputError, NotFiniteError
from kernels.forcefield import Surface, compliance
from kernels.graph import bond_orders

# Curvature in eV/Å² that softer motions count as: they would go astray on a small force.
SOFTEST: Final = 0.3

# Part of the way to the predicted minimum, and the longest move of an atom in Å, in one step.
_SHARE: Final = 0.5
_LONGEST: Final = 0.1


class Guide:
    """The force field of one molecule around its starting geometry `positions` (N, 3) in Å.

    Raises InputError where the molecule's bonds are not known or no force field covers it,
    NotFiniteError where atoms coincide.
    """

    def __init__(self, smiles: str, positions: NDArray[np.float64]) -> None:
        if not smiles:
            raise InputError(
                "the model looks at bonds, and no SMILES is known for this molecule; give it as "
                "SMILES or SDF, or use a model of architecture edm"
            )
        self.bonds = bond_orders(smiles)
        self.surface = Surface(smiles, positions)
        self._start = positions
        self.compliance = self._compliance(positions)

    def _compliance(self, positions: NDArray[np.float64]) -> NDArray[np.float64]:
        return compliance(self.surface.hessian(positions), positions, SOFTEST)

    def look(self, positions: NDArray[np.float64]) -> None:
        """Take the curvature at other positions (N, 3) in Å; the start's where it is not finite."""
        try:
            self.compliance = self._compliance(positions)
        except NotFiniteError:
            self.compliance = self._compliance(self._start)

    def aim(
        self, positions: NDArray[np.float64], predicted: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Displacement (N, 3) in Å to where the two agree, for the predicted gradient in eV/Å."""
        excess = (self.surface.gradient(positions) - predicted).ravel()
        return -(self.compliance @ excess).reshape(-1, 3)

    def move(
        self, positions: NDArray[np.float64], predicted: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Displacement (N, 3) in Å of one step, for the predicted gradient (N, 3) in eV/Å."""
        return at_most(_SHARE * self.aim(positions, predicted), _LONGEST)


def at_most(move: NDArray[np.float64], longest: float) -> NDArray[np.float64]:
    """Displacements (N, 3) in Å, shortened together where an atom would move farther than that."""
    length = float(np.sqrt((move**2).sum(axis=1).max()))
    return move if length <= longest else move * (longest / length)


Evaluate: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


def predictor(
    model: Model, evaluate: Evaluate, guides: Sequence[Guide], numbers: Sequence[NDArray[np.uint8]]
) -> Callable[[Sequence[NDArray[np.float64]]], list[NDArray[np.float64]]]:
    """Return what gives, for positions (N, 3) in Å of each molecule, the gradients in eV/Å.

    All of them come from one call of the network, whatever the sizes.
    """
    network, device = cast(Refiner, model.network), model.device
    row = layout([torch.from_numpy(guide.bonds).to(device) for guide in guides])
    h = features(torch.from_numpy(np.concatenate(numbers)).to(device).long(), model.config)
    borders = np.cumsum([len(part) for part in numbers])[:-1]

    def gradient(x: Tensor, h: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return network.gradient(x, h, row), h

    def predict(positions: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        flat = np.concatenate([x - x.mean(axis=0) for x in positions]).astype(np.float32)
        found = evaluate(gradient, torch.from_numpy(flat).to(device), h, None)[0]
        return np.split(found.double().cpu().numpy(), borders)

    return predict


def guided(
    model: Model,
    evaluate: Evaluate,
    guides: Sequence[Guide],
    numbers: Sequence[NDArray[np.uint8]],
    starts: Sequence[NDArray[np.float64]],
    n: int,
) -> list[NDArray[np.float64]]:
    """Path (n + 1, N, 3) in Å of each molecule, all computed together whatever their sizes.

    `numbers` (N,) and `starts` (N, 3) in Å, one each per molecule; `evaluate` calls a network at
    the precision asked for. A molecule that leaves the finite numbers is NaN from there on, and
    the others do not notice.
    """
    predict = predictor(model, evaluate, guides, numbers)
    paths = [np.full((n + 1, *start.shape), np.nan) for start in starts]
    for path, start in zip(paths, starts, strict=True):
        path[0] = start
    for k in range(1, n + 1):
        now = [path[k - 1] for path in paths]
        for guide, path, part in zip(guides, paths, predict(now), strict=True):
            if np.isfinite(path[k - 1]).all() and np.isfinite(part).all():
                path[k] = path[k - 1] + guide.move(path[k - 1], part)
    return paths
