"""The reverse process of Basin's own network: a force field guides, the network corrects it.

At the minimum sought the force field's gradient is not zero but what the network predicts, since
that is what it was trained to tell of ground states. Each of the n steps goes half of the way to
where the two agree, by the force field's curvature, so that bonds and torsions arrive together.
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
from kernels.errors import InputError
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
        self.compliance = compliance(self.surface.hessian(positions), positions, SOFTEST)

    def move(
        self, positions: NDArray[np.float64], predicted: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Displacement (N, 3) in Å of one step, for the predicted gradient (N, 3) in eV/Å."""
        excess = (self.surface.gradient(positions) - predicted).ravel()
        move = -_SHARE * (self.compliance @ excess).reshape(-1, 3)
        length = float(np.sqrt((move**2).sum(axis=1).max()))
        return move if length <= _LONGEST else move * (_LONGEST / length)


Evaluate: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


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
    network, device = cast(Refiner, model.network), model.device
    row = layout([torch.from_numpy(guide.bonds).to(device) for guide in guides])
    h = features(torch.from_numpy(np.concatenate(numbers)).to(device).long(), model.config)
    borders = np.cumsum([len(start) for start in starts])[:-1]

    def predict(x: Tensor, h: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return network.gradient(x, h, row), h

    paths = [np.full((n + 1, *start.shape), np.nan) for start in starts]
    for path, start in zip(paths, starts, strict=True):
        path[0] = start
    for k in range(1, n + 1):
        now = [path[k - 1] for path in paths]
        flat = np.concatenate([x - x.mean(axis=0) for x in now]).astype(np.float32)
        x = torch.from_numpy(flat).to(device)
        predicted = evaluate(predict, x, h, None)[0].double().cpu().numpy()
        for guide, path, part in zip(guides, paths, np.split(predicted, borders), strict=True):
            if np.isfinite(path[k - 1]).all() and np.isfinite(part).all():
                path[k] = path[k - 1] + guide.move(path[k - 1], part)
    return paths
