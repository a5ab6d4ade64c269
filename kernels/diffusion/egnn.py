"""The network of EDM: an E(3)-equivariant graph network that predicts the noise in a molecule.

Molecules of equal size are computed together as dense arrays: no padding, no masks, no edge
lists. The first layer of every edge network is linear in [h_i, h_j, d², d²_0], so it is split into
products per atom, which are added per pair; the published code multiplies the concatenation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import Any, Final, TypeAlias

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

Scratch: TypeAlias = tuple[Tensor, Tensor]


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
        n_atoms = x.shape[1]
        time = level.to(h.dtype)[:, None, None].expand(-1, n_atoms, 1)
        state = self.embedding(torch.cat([h, time], dim=-1))
        others = 1 - torch.eye(n_atoms, dtype=x.dtype, device=x.device)
        scratch = _scratch(state)
        moved = x
        initial: Tensor | None = None
        for block in self.blocks:
            apart = moved[:, :, None] - moved[:, None]
            squared = apart.square().sum(dim=-1)
            initial = squared if initial is None else initial
            lengths = (squared + _MIN_SQUARED_DISTANCE).sqrt() + self.norm_constant
            directions = apart / lengths[..., None]
            distances = torch.stack([squared, initial], dim=-1)
            state, moved = block(state, moved, distances, directions, others, scratch)
        eps = moved - x
        return eps - eps.mean(dim=1, keepdim=True), self.readout(state)[..., :-1]


def _scratch(state: Tensor) -> Scratch | None:
    """Two arrays (B, N, N, H) that all blocks share, for states (B, N, H); None while training.

    An array of its own for every layer would cost more than the layer's sums: the system hands out
    memory of this size page by page, and takes it back at once.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(state.device.type):
        return None
    batch, n_atoms, width = state.shape
    return state.new_empty(batch, n_atoms, n_atoms, width), state.new_empty(
        batch, n_atoms, n_atoms, width
    )


class _PairNetwork(nn.Module):
    """Two layers over every ordered pair of atoms, from [h_i, h_j, d²_ij now, d²_ij at first]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.first = nn.Linear(2 * hidden + 2, hidden)
        self.second = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, distances: Tensor, scratch: Scratch | None) -> Tensor:
        """Return (B, N, N, H) for h (B, N, H) and distances (B, N, N, 2), maybe in `scratch`."""
        weight, width = self.first.weight, self.hidden
        at_i = functional.linear(h, weight[:, :width], self.first.bias)[:, :, None]
        at_j = functional.linear(h, weight[:, width : 2 * width])[:, None]
        if scratch is None:
            pairs = functional.linear(distances, weight[:, 2 * width :]) + at_i + at_j
            return functional.silu(self.second(functional.silu(pairs)))
        inner, outer = scratch
        torch.add(at_i, at_j, out=inner)
        inner.view(-1, width).addmm_(distances.view(-1, 2), weight[:, 2 * width :].t())
        functional.silu(inner, inplace=True)
        torch.addmm(
            self.second.bias,
            inner.view(-1, width),
            self.second.weight.t(),
            out=outer.view(-1, width),
        )
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
        self, h: Tensor, distances: Tensor, others: Tensor, scratch: Scratch | None
    ) -> Tensor:
        messages = self.pairs(h, distances, scratch)
        weights = others.expand(messages.shape[:-1])
        if self.gate is not None:
            weights = weights * torch.sigmoid(self.gate(messages).squeeze(-1))
        # Σ_j weight_ij m_ij; an atom sends nothing to itself.
        received = (weights[..., None, :] @ messages).squeeze(-2)
        if self.scale != 1:
            received = received * self.scale
        inner = functional.silu(self.node_first(torch.cat([h, received], dim=-1)))
        updated: Tensor = h + self.node_second(inner)
        return updated


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
        distances: Tensor,
        directions: Tensor,
        others: Tensor,
        scratch: Scratch | None,
    ) -> tuple[Tensor, Tensor]:
        for layer in self.messages:
            h = layer(h, distances, others, scratch)
        lengths = self.length(self.pairs(h, distances, scratch)).squeeze(-1)
        if self.tanh:
            # In every block the whole range, not its share of the layers: as published.
            lengths = torch.tanh(lengths) * self.coords_range
        # The direction from an atom to itself is zero.
        moves = (lengths[..., None, :] @ directions).squeeze(-2)
        return h, x + moves * self.scale
