"""The network of EDM: an E(3)-equivariant graph network that predicts the noise in a molecule.

Molecules are computed together as dense arrays: what is per atom or per pair for all of them at
once, sums over the atoms of a molecule for those of one size; no padding, no edge lists. The first
layer of every edge network is linear in [h_i, h_j, d², d²_0], so it is split into products per
atom, which are added per pair; the published code multiplies the concatenation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.errors import InputError

# Where the class of each architecture is found; it is built from a ModelConfig.
ARCHITECTURES: Final[Mapping[str, tuple[str, str]]] = {
    "edm": ("kernels.diffusion.egnn", "Egnn"),
    "basin": ("kernels.diffusion.refiner", "Refiner"),
}

# Elements of the published models, in the order of their channels.
QM9_ELEMENTS: Final = (1, 6, 7, 8, 9)
DRUGS_ELEMENTS: Final = (1, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 33, 35, 53, 80, 83)

_MIN_SQUARED_DISTANCE = 1e-8

# An array that is written again and again, and its parts by size.
Parted: TypeAlias = tuple[Tensor, list[Tensor]]


class Scratch(NamedTuple):
    """Arrays that all blocks of a network share: two (P, H), and two (3, P)."""

    inner: Parted
    outer: Parted
    apart: Parted
    along: Parted


@dataclass(frozen=True)
class ModelConfig:
    """What a network is and what it was trained for; the defaults are published EDM's for QM9.

    `elements`: atomic numbers in the order of the one-hot channels; `charge_channel`: whether the
    nuclear charge is one more feature; `steps` and `precision`: of the schedule; `feature_scaling`
    divides positions, one-hot and charge; `size_histogram`: numbers of atoms and how often each
    was seen in training, for generation; `options`: settings of one architecture alone.
    """

    architecture: str = "edm"
    elements: tuple[int, ...] = QM9_ELEMENTS
    charge_channel: bool = True
    steps: int = 1000
    precision: float = 1e-5
    hidden: int = 256
    layers: int = 9
    inv_sublayers: int = 1
    attention: bool = True
    tanh: bool = True
    coords_range: float = 15.0
    norm_constant: float = 1.0
    normalization_factor: float = 1.0
    feature_scaling: tuple[float, float, float] = (1.0, 4.0, 10.0)
    size_histogram: Mapping[int, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"model architecture {self.architecture!r} is unknown; there is "
                f"{', '.join(ARCHITECTURES)}"
            )
        if not self.elements or len(set(self.elements)) != len(self.elements):
            raise InputError(f"model elements {self.elements} are empty or repeat one")
        for name in ("steps", "hidden", "layers", "inv_sublayers"):
            if getattr(self, name) < 1:
                raise InputError(f"model {name} = {getattr(self, name)}; give 1 or more")
        if len(self.feature_scaling) != 3 or min(self.feature_scaling) <= 0:
            raise InputError(f"model feature_scaling {self.feature_scaling}; give 3 factors > 0")

    @property
    def n_features(self) -> int:
        """Number of feature channels h of an atom."""
        return len(self.elements) + int(self.charge_channel)

    def to_json(self) -> str:
        """Write the configuration as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Read what `to_json` wrote; raises InputError for anything else."""
        try:
            values = json.loads(text)
            unknown = set(values) - {known.name for known in fields(cls)}
            if unknown:
                raise InputError(
                    f"model configuration has unknown settings {sorted(unknown)}; "
                    "a newer version of Basin wrote it"
                )
            for name in ("elements", "feature_scaling"):
                if name in values:
                    values[name] = tuple(values[name])
            sizes = values.get("size_histogram", {})
            values["size_histogram"] = {int(size): int(n) for size, n in sizes.items()}
            return cls(**values)
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"model configuration cannot be read: {error}") from error


def build(config: ModelConfig) -> nn.Module:
    """Make the network of a configuration, its weights drawn from torch's generator.

    Called as network(x (B, N, 3), h (B, N, F), level (B,) = n/steps, graph (B, N, N) or None) for
    B molecules of N atoms each; returns (eps_x (B, N, 3), eps_h (B, N, F)).
    """
    module, name = ARCHITECTURES[config.architecture]
    network = getattr(import_module(module), name)(config)
    assert isinstance(network, nn.Module)
    return network


def features(numbers: Tensor, config: ModelConfig) -> Tensor:
    """Clean, scaled features (B, N, F) of atomic numbers (B, N): one-hot element and charge.

    Raises InputError for an element that the model does not know.
    """
    channel_of = [-1] * 256
    for channel, number in enumerate(config.elements):
        channel_of[number] = channel
    channels = torch.tensor(channel_of, device=numbers.device)[numbers.long()]
    if bool((channels < 0).any()):
        unknown = sorted({int(number) for number in numbers[channels < 0]})
        raise InputError(f"atomic numbers {unknown} are not among the model's {config.elements}")
    _, onehot_scale, charge_scale = config.feature_scaling
    onehot = functional.one_hot(channels, len(config.elements)).float() / onehot_scale
    if not config.charge_channel:
        return onehot
    return torch.cat([onehot, numbers[..., None].float() / charge_scale], dim=-1)


def elements_of(h: Tensor, config: ModelConfig) -> Tensor:
    """Atomic numbers (B, N) that features (B, N, F) stand for: the largest one-hot channel."""
    known = torch.tensor(config.elements, device=h.device)
    return known[h[..., : len(config.elements)].argmax(dim=-1)]


class Packing:
    """Molecules one after the other, those of one size in a row, and all ordered pairs of atoms.

    `groups`: how many molecules there are of a size, and that size; A atoms and P pairs in all.
    The pairs of a molecule are in the order of its first atom, and then of its second.
    """

    def __init__(self, groups: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.groups = list(groups)
        self._n_atoms = [count * size for count, size in self.groups]
        self._n_pairs = [count * size**2 for count, size in self.groups]
        # 0 for an atom and itself, else 1: (P,).
        self.others = torch.cat(
            [
                (1 - torch.eye(size, device=device)).flatten().repeat(count)
                for count, size in self.groups
            ]
        )
        self._scratch: Scratch | None = None

    def atoms(self, values: Tensor, dim: int = 0) -> list[Tensor]:
        """Views of the values of all atoms along a dimension, by size: (B, N) in its place."""
        return _parted(values, dim, self._n_atoms, self.groups)

    def pairs(self, values: Tensor, dim: int = 0) -> list[Tensor]:
        """Views of the values of all pairs along a dimension, by size: (B, N, N) in its place."""
        return _parted(values, dim, self._n_pairs, [(count, n, n) for count, n in self.groups])

    def scratch(self, state: Tensor) -> Scratch | None:
        """Arrays that all blocks share, for states (A, H); None while training.

        An array of its own for every layer would cost more than the layer's sums: the system hands
        out memory of this size page by page, and takes it back at once.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled(state.device.type):
            return None
        if self._scratch is None:
            n_pairs, hidden = sum(self._n_pairs), state.shape[1]
            wide = [state.new_empty(n_pairs, hidden) for _ in range(2)]
            flat = [state.new_empty(3, n_pairs) for _ in range(2)]
            self._scratch = Scratch(
                *((array, self.pairs(array)) for array in wide),
                *((array, self.pairs(array, 1)) for array in flat),
            )
        return self._scratch


class Egnn(nn.Module):
    """The noise predictor of EDM (Hoogeboom et al., ICML 2022; EGNN: Satorras et al., ICML 2021).

    Equivariant to rotation, reflection and permutation of the atoms; translation of the input
    changes nothing, and eps_x has zero mean over the atoms.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_constant = config.norm_constant
        # The noise level is one more feature.
        self.embedding = nn.Linear(config.n_features + 1, config.hidden)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.readout = nn.Linear(config.hidden, config.n_features + 1)

    def forward(
        self, x: Tensor, h: Tensor, level: Tensor, graph: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict the noise in positions x (B, N, 3) and features h (B, N, F) at level (B,).

        Returns eps_x (B, N, 3) and eps_h (B, N, F); the bond graph is not used.
        """
        batch, n_atoms, _ = x.shape
        flat_level = level[:, None].expand(batch, n_atoms).flatten()
        packing = Packing([(batch, n_atoms)], x.device)
        eps_x, eps_h = self.packed(x.flatten(0, 1), h.flatten(0, 1), flat_level, packing)
        return eps_x.reshape(x.shape), eps_h.reshape(h.shape)

    def packed(
        self, x: Tensor, h: Tensor, level: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        """Predict the noise for molecules of several sizes, packed together.

        Positions x (A, 3), features h (A, F) and level (A,) of all atoms; returns eps_x (A, 3) and
        eps_h (A, F).
        """
        state = self.embedding(torch.cat([h, level.to(h.dtype)[:, None]], dim=-1))
        scratch = packing.scratch(state)
        start = x.t()
        moved = start
        initial: Tensor | None = None
        for block in self.blocks:
            apart = _apart(moved, packing, scratch)
            squared = apart.square().sum(dim=0)
            initial = squared if initial is None else initial
            lengths = (squared + _MIN_SQUARED_DISTANCE).sqrt() + self.norm_constant
            distances = torch.stack([squared, initial])
            state, moved = block(state, moved, apart, distances, lengths, packing, scratch)
        eps = [part - part.mean(dim=2, keepdim=True) for part in packing.atoms(moved - start, 1)]
        return _joined([part.flatten(1) for part in eps], 1).t(), self.readout(state)[..., :-1]


def _parted(
    values: Tensor, dim: int, lengths: Sequence[int], shapes: Sequence[tuple[int, ...]]
) -> list[Tensor]:
    before, after = values.shape[:dim], values.shape[dim + 1 :]
    parts = [values] if len(shapes) == 1 else values.split_with_sizes(lengths, dim)
    return [part.view(*before, *shape, *after) for part, shape in zip(parts, shapes, strict=True)]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _apart(x: Tensor, packing: Packing, scratch: Scratch | None) -> Tensor:
    """Vectors x_i - x_j (3, P) of all pairs, for x (3, A)."""
    ends = [(part[..., None], part[..., None, :]) for part in packing.atoms(x, 1)]
    if scratch is None:
        return _joined([(i - j).flatten(1) for i, j in ends], 1)
    found, parts = scratch.apart
    for (i, j), out in zip(ends, parts, strict=True):
        torch.sub(i, j, out=out)
    return found


class _PairNetwork(nn.Module):
    """Two layers over every ordered pair of atoms, from [h_i, h_j, d²_ij now, d²_ij at first]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.first = nn.Linear(2 * hidden + 2, hidden)
        self.second = nn.Linear(hidden, hidden)

    def forward(
        self, h: Tensor, distances: Tensor, packing: Packing, scratch: Scratch | None
    ) -> Tensor:
        """Return (P, H) for h (A, H) and distances (2, P), maybe in `scratch`."""
        weight, width = self.first.weight, self.hidden
        at_i = packing.atoms(functional.linear(h, weight[:, :width], self.first.bias))
        at_j = packing.atoms(functional.linear(h, weight[:, width : 2 * width]))
        ends = [(i[:, :, None], j[:, None]) for i, j in zip(at_i, at_j, strict=True)]
        if scratch is None:
            sums = _joined([(i + j).flatten(0, 2) for i, j in ends], 0)
            pairs = functional.linear(distances.t(), weight[:, 2 * width :]) + sums
            return functional.silu(self.second(functional.silu(pairs)))
        inner, outer = scratch.inner[0], scratch.outer[0]
        for (i, j), out in zip(ends, scratch.inner[1], strict=True):
            torch.add(i, j, out=out)
        inner.addmm_(distances.t(), weight[:, 2 * width :].t())
        functional.silu(inner, inplace=True)
        torch.addmm(self.second.bias, inner, self.second.weight.t(), out=outer)
        return functional.silu(outer, inplace=True)


class _Messages(nn.Module):
    """Update of the atoms' features by gated messages from all other atoms."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.scale = 1 / config.normalization_factor
        self.pairs = _PairNetwork(hidden)
        self.gate = nn.Linear(hidden, 1) if config.attention else None
        self.node_first = nn.Linear(2 * hidden, hidden)
        self.node_second = nn.Linear(hidden, hidden)

    def forward(
        self, h: Tensor, distances: Tensor, packing: Packing, scratch: Scratch | None
    ) -> Tensor:
        messages = self.pairs(h, distances, packing, scratch)
        # An atom sends nothing to itself.
        weights = packing.others
        if self.gate is not None:
            weights = weights * torch.sigmoid(self.gate(messages).squeeze(-1))
        received = _received(weights, messages, packing, scratch)
        if self.scale != 1:
            received = received * self.scale
        inner = functional.silu(self.node_first(torch.cat([h, received], dim=-1)))
        updated: Tensor = h + self.node_second(inner)
        return updated


def _received(
    weights: Tensor, messages: Tensor, packing: Packing, scratch: Scratch | None
) -> Tensor:
    """Sum over j of weight_ij m_ij (A, H), for weights (P,) and messages (P, H)."""
    if scratch is None:
        both = zip(packing.pairs(weights), packing.pairs(messages), strict=True)
        sums = [(weight[:, :, None] @ message).squeeze(2) for weight, message in both]
    else:
        # Products of such small matrices cost several times as much as the bare sum.
        messages.mul_(weights[:, None])
        sums = [part.sum(dim=2) for part in scratch.outer[1]]
    return _joined([part.flatten(0, 1) for part in sums], 0)


class _Block(nn.Module):
    """Some rounds of messages, then one move of the atoms along the lines between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.messages = nn.ModuleList(_Messages(config) for _ in range(config.inv_sublayers))
        self.pairs = _PairNetwork(config.hidden)
        self.length = nn.Linear(config.hidden, 1, bias=False)
        # The published model starts with moves close to none.
        nn.init.xavier_uniform_(self.length.weight, gain=0.001)
        self.tanh = config.tanh
        self.coords_range = config.coords_range
        self.scale = 1 / config.normalization_factor

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        apart: Tensor,
        distances: Tensor,
        lengths: Tensor,
        packing: Packing,
        scratch: Scratch | None,
    ) -> tuple[Tensor, Tensor]:
        for layer in self.messages:
            h = layer(h, distances, packing, scratch)
        moves = self.length(self.pairs(h, distances, packing, scratch)).squeeze(-1)
        if self.tanh:
            # In every block the whole range, not its share of the layers: as published.
            moves = torch.tanh(moves) * self.coords_range
        # The vector from an atom to itself is zero.
        weights = moves / lengths
        if scratch is None:
            along = packing.pairs(apart * weights, 1)
        else:
            along = scratch.along[1]
            torch.mul(apart, weights, out=scratch.along[0])
        total = _joined([part.sum(dim=-1).flatten(1) for part in along], 1)
        return h, x + total * self.scale
