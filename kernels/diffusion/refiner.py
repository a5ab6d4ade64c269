"""Basin's own network: what a force field gets wrong at the true minimum.

At a minimum of the target level the force field still pulls: its gradient there is the difference
between the two surfaces. That gradient is a sum of pulls along bonds, across angles, torsions and
contacts, each a smooth function of the surroundings, and a network learns it from ground-state
geometries alone. The minimum is where the force field's gradient equals the predicted one;
`kernels.diffusion.guide` goes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.diffusion.egnn import ModelConfig, features
from kernels.diffusion.schedule import Schedule
from kernels.errors import InputError

if TYPE_CHECKING:
    from torch import Generator

    from kernels.diffusion.training import Batch, TrainSettings

# Bond orders in a graph: none, single, double, triple, aromatic, any other.
BOND_ORDERS: Final = 6

# Distances enter as Gaussians (SchNet, Schütt et al., NeurIPS 2017), denser where bonds are.
_BASIS: Final = 16
_SHORTEST, _LONGEST = 0.9, 6.0

_MIN_SQUARED_DISTANCE = 1e-8

# Objective: weight in Å²/eV of the bare mean squared error beside the energy it stands for, and an
# energy in eV that is too small to matter, so that the square root has a slope there.
_STIFF_WEIGHT: Final = 0.002
_NEGLIGIBLE: Final = 1e-6
# Part of the examples that are the minimum itself but for noise.
_AT_MINIMUM: Final = 0.3


class Terms(NamedTuple):
    """Index lists over the B·N atoms of a batch, flat: what pulls on what.

    `bonds` (2, E), `orders` (E,); `angles` (3, A) as i, k, j; `torsions` (4, T) as i, k, l, j;
    `contacts` (2, C): all pairs farther than three bonds apart.
    """

    bonds: Tensor
    orders: Tensor
    angles: Tensor
    torsions: Tensor
    contacts: Tensor


def terms(graph: Tensor) -> Terms:
    """Bonds, angles, torsions and contacts of a batch of bond-order matrices (B, N, N)."""
    n_batch, n_atoms, _ = graph.shape
    bonded = graph > 0
    degree = int(bonded.sum(-1).max()) if graph.numel() else 0
    shift = (torch.arange(n_batch, device=graph.device) * n_atoms)[:, None]
    at, i, j = torch.nonzero(torch.triu(bonded, 1), as_tuple=True)
    orders = graph[at, i, j]
    bonds = torch.stack([i, j]) + at * n_atoms
    if not len(at):
        none = torch.zeros((4, 0), dtype=torch.long, device=graph.device)
        angles, torsions = none[:3], none
    else:
        # Neighbours of every atom (B·N, degree); -1 where there are fewer.
        ranked = torch.where(bonded, torch.arange(n_atoms, device=graph.device), n_atoms)
        table = ranked.sort(dim=-1).values[..., :degree]
        table = torch.where(table < n_atoms, table + shift[..., None], -1)
        table = table.reshape(-1, degree)
        k, a, b = torch.nonzero((table[:, :, None] >= 0) & (table[:, None] >= 0), as_tuple=True)
        once = a < b
        k, a, b = k[once], a[once], b[once]
        angles = torch.stack([table[k, a], k, table[k, b]])
        first, second = table[bonds[0]], table[bonds[1]]
        fits = (first[:, :, None] >= 0) & (second[:, None] >= 0)
        fits &= (first != bonds[1][:, None])[:, :, None] & (second != bonds[0][:, None])[:, None]
        fits &= first[:, :, None] != second[:, None]
        e, a, b = torch.nonzero(fits, as_tuple=True)
        torsions = torch.stack([first[e, a], bonds[0][e], bonds[1][e], second[e, b]])
    steps = bonded.float()
    near = torch.eye(n_atoms, device=graph.device) + steps
    near = near @ near @ near
    at, i, j = torch.nonzero(torch.triu(near == 0, 1), as_tuple=True)
    return Terms(bonds, orders, angles, torsions, torch.stack([i, j]) + at * n_atoms)


class Layout(NamedTuple):
    """Molecules of any sizes, one after the other: their terms, and per atom what it is bonded by.

    `kinds` (atoms, 6): how many bonds of each order, and how many in all.
    """

    terms: Terms
    kinds: Tensor


def layout(graphs: Sequence[Tensor]) -> Layout:
    """Lay out molecules, each given as its bond orders (N, N), in a row."""
    shift, found, kinds = 0, [], []
    for graph in graphs:
        mine = terms(graph[None])
        moved = [part if part is mine.orders else part + shift for part in mine]
        found.append(Terms(*moved))
        kinds.append(_kinds(graph))
        shift += len(graph)
    joined = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return Layout(Terms(*joined), torch.cat(kinds))


def _kinds(graph: Tensor) -> Tensor:
    orders = functional.one_hot(graph.long(), BOND_ORDERS)[..., 1:].sum(dim=-2)
    return torch.cat([orders, orders.sum(dim=-1, keepdim=True)], dim=-1)


class Refiner(nn.Module):
    """Predicts the force field's gradient (B, N, 3) in eV/Å at the minimum near a geometry.

    Equivariant to rotation, reflection and permutation of the atoms; translation changes nothing,
    and neither force nor torque is left over. Needs bond orders (B, N, N) as its graph.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.embedding = nn.Linear(config.n_features + BOND_ORDERS, hidden)
        self.blocks = nn.ModuleList(_Block(hidden) for _ in range(config.layers))
        self.bond = _Pull(hidden, 1, BOND_ORDERS)
        self.angle = _Pull(hidden, 2, 0)
        self.torsion = _Pull(hidden, 2, 1)
        self.contact = _Pull(hidden, 1, 0)
        self.centres: Tensor
        self.widths: Tensor
        ratio = (_LONGEST / _SHORTEST) ** (1 / (_BASIS - 1))
        centres = _SHORTEST * ratio ** torch.arange(_BASIS, dtype=torch.float32)
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("widths", centres * (ratio - 1) * 1.5, persistent=False)

    def basis(self, lengths: Tensor) -> Tensor:
        """Distances (K,) in Å as (K, basis) smooth numbers."""
        return torch.exp(-(((lengths[:, None] - self.centres) / self.widths) ** 2))

    def forward(
        self, x: Tensor, h: Tensor, level: Tensor, graph: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict for positions x (B, N, 3) in Å, features h (B, N, F), graph (B, N, N).

        Returns the gradient (B, N, 3) and zeros (B, N, F): elements stay. `level` is not used.
        """
        if graph is None:
            raise InputError("this model needs the bonds of a molecule, and they are not known")
        kinds = _kinds(graph).reshape(-1, BOND_ORDERS)
        flat = h.reshape(len(kinds), -1)
        found = self.gradient(x.reshape(-1, 3), flat, Layout(terms(graph), kinds))
        return found.reshape(x.shape), torch.zeros_like(h)

    def gradient(self, x: Tensor, h: Tensor, layout: Layout) -> Tensor:
        """Predict the gradient (atoms, 3) in eV/Å for molecules in a row.

        Positions x (atoms, 3) in Å, features h (atoms, F).
        """
        lists = layout.terms
        state: Tensor = self.embedding(torch.cat([h, layout.kinds.to(h.dtype)], dim=-1))
        orders = functional.one_hot(lists.orders.long(), BOND_ORDERS).to(h.dtype)
        i, j = lists.bonds
        _, lengths = _apart(x, i, j)
        about = torch.cat([self.basis(lengths), orders], dim=-1)
        source, target = torch.cat([i, j]), torch.cat([j, i])
        about2 = torch.cat([about, about])
        for block in self.blocks:
            state = block(state, source, target, about2)
        pulls = torch.zeros_like(x)
        pulls = self._pull(pulls, x, self.bond, (i, j), [state[i] + state[j]], [orders])
        a, k, b = lists.angles
        ends = [state[a] + state[b], state[k]]
        pulls = self._pull(pulls, x, self.angle, (a, b), ends, [])
        a, k, m, b = lists.torsions
        ends = [state[a] + state[b], state[k] + state[m]]
        turn = _cosine(x, a, k, m, b)[:, None]
        pulls = self._pull(pulls, x, self.torsion, (a, b), ends, [turn])
        a, b = lists.contacts
        pulls = self._pull(pulls, x, self.contact, (a, b), [state[a] + state[b]], [])
        return pulls

    def _pull(
        self,
        pulls: Tensor,
        x: Tensor,
        term: _Pull,
        ends: tuple[Tensor, Tensor],
        states: list[Tensor],
        about: list[Tensor],
    ) -> Tensor:
        i, j = ends
        apart, lengths = _apart(x, i, j)
        strength = term(torch.cat([*states, self.basis(lengths), *about], dim=-1))
        along = strength * apart / lengths[:, None]
        return pulls.index_add_(0, i, along).index_add_(0, j, -along)


def _apart(x: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    apart = x[i] - x[j]
    return apart, (apart.square().sum(dim=-1) + _MIN_SQUARED_DISTANCE).sqrt()


def _cosine(x: Tensor, i: Tensor, k: Tensor, m: Tensor, j: Tensor) -> Tensor:
    """Cosine of the dihedral angle i-k-m-j."""
    axis = x[m] - x[k]
    one = torch.linalg.cross(x[i] - x[k], axis)
    two = torch.linalg.cross(x[j] - x[m], axis)
    sizes = (one.square().sum(-1) * two.square().sum(-1) + _MIN_SQUARED_DISTANCE).sqrt()
    cosine: Tensor = (one * two).sum(-1) / sizes
    return cosine


class _Block(nn.Module):
    """One round of messages along bonds."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.sender = nn.Linear(hidden, hidden)
        self.receiver = nn.Linear(hidden, hidden, bias=False)
        self.about = nn.Linear(_BASIS + BOND_ORDERS, hidden, bias=False)
        self.second = nn.Linear(hidden, hidden)
        self.node_first = nn.Linear(2 * hidden, hidden)
        self.node_second = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, source: Tensor, target: Tensor, about: Tensor) -> Tensor:
        normed = self.norm(h)
        messages = self.sender(normed)[source] + self.receiver(normed)[target] + self.about(about)
        messages = functional.silu(self.second(functional.silu(messages)))
        received = torch.zeros_like(h).index_add_(0, target, messages)
        inner = functional.silu(self.node_first(torch.cat([normed, received], dim=-1)))
        updated: Tensor = h + self.node_second(inner)
        return updated


class _Pull(nn.Module):
    """Strength (K, 1) in eV/Å of the pull between the two ends of a term."""

    def __init__(self, hidden: int, states: int, extra: int) -> None:
        super().__init__()
        self.first = nn.Linear(states * hidden + _BASIS + extra, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 1, bias=False)
        nn.init.xavier_uniform_(self.last.weight, gain=0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        inner = functional.silu(self.second(functional.silu(self.first(inputs))))
        strength: Tensor = self.last(inner)
        return strength


def objective(
    network: nn.Module,
    schedule: Schedule,
    config: ModelConfig,
    batch: Batch,
    generator: Generator,
    settings: TrainSettings,
) -> Tensor:
    """Loss (B,): the square root of the energy in eV that the wrong part of the gradient costs.

    The network sees ground states (B, N, 3) that were moved some way towards the force field's
    own minimum near by (`displaced`), with the noise of the schedule at each `level` on top, and is
    asked for the force field's gradient at the ground state (`gradient`). An error r costs
    r·C·r / 2, with the force field's `compliance` C (B, N, N, 3, 3): a wrong pull along a soft
    torsion is dear, along a bond cheap. The root keeps molecules that no model will get right
    from ruling the rest.
    """
    x, displaced = batch["positions"], batch["displaced"]
    share = torch.rand(len(x), generator=generator) ** 2
    share[torch.rand(len(x), generator=generator) < _AT_MINIMUM] = 0
    sigma = torch.from_numpy(schedule.sigma.astype(np.float32)).to(x.device)[batch["level"]]
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    seen = x + share.to(x.device)[:, None, None] * (displaced - x) + sigma[:, None, None] * noise
    found, _ = network(
        seen, features(batch["numbers"], config), batch["level"] / schedule.steps, batch["bonds"]
    )
    wrong = found - batch["gradient"]
    energy: Tensor = 0.5 * torch.einsum("bia,bijac,bjc->b", wrong, batch["compliance"], wrong)
    stiff = _STIFF_WEIGHT * wrong.square().mean(dim=(1, 2))
    loss: Tensor = (energy + stiff + _NEGLIGIBLE).sqrt()
    return loss
