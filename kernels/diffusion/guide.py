"""The reverse process of Basin's own network: a force field guides, the network corrects it.

At the minimum sought the force field's gradient is not zero but what the network predicts, since
that is what it was trained to tell of ground states. Each of the n steps goes half of the way to
where the two agree, by the force field's curvature, so that bonds and torsions arrive together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import features
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

    Raises InputError where the molecule's bonds are not known or no force field covers it.
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
    members: Sequence[Guide],
    numbers: NDArray[np.uint8],
    start: NDArray[np.float64],
    n: int,
) -> NDArray[np.float64]:
    """Paths (n + 1, B, N, 3) in Å of B molecules of equal size from numbers and start (B, N, 3).

    `evaluate` calls the network at the precision asked for. A molecule that leaves the finite
    numbers is NaN from there on, and the others do not notice.
    """
    device = model.device
    graph = torch.from_numpy(np.stack([guide.bonds for guide in members])).to(device)
    h = features(torch.from_numpy(numbers).to(device).long(), model.config)
    frames = np.full((n + 1, *start.shape), np.nan)
    frames[0] = start
    for k in range(1, n + 1):
        now = frames[k - 1]
        x = torch.from_numpy((now - now.mean(axis=1, keepdims=True)).astype(np.float32)).to(device)
        level = torch.full((len(members),), (n - k + 1) / model.config.steps, device=device)
        predicted = evaluate(model.network, x, h, level, graph)[0].double().cpu().numpy()
        for row, guide in enumerate(members):
            if np.isfinite(now[row]).all() and np.isfinite(predicted[row]).all():
                frames[k, row] = now[row] + guide.move(now[row], predicted[row])
    return frames
