"""EDM's network computed the published way, to compare with and to test against.

Every molecule is padded to one size, the pairs of all molecules are one flat list with masks, and
the inputs of a pair are concatenated before the first layer. Written from the papers' equations
(Hoogeboom et al., ICML 2022; Satorras et al., ICML 2021) with the parameter names of published
checkpoints.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from kernels.diffusion.egnn import ModelConfig


class PublishedEdm(nn.Module):
    """The noise predictor; the keys of its state_dict are those of published checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.n_features + 1, config.hidden
        egnn = nn.Module()
        egnn.embedding = nn.Linear(width, hidden)
        egnn.embedding_out = nn.Linear(hidden, width)
        for block in range(config.layers):
            egnn.add_module(f"e_block_{block}", _block(config))
        self.dynamics = nn.Module()
        self.dynamics.egnn = egnn
        self.config = config

    def forward(self, x: Tensor, h: Tensor, level: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return eps_x (B, M, 3) and eps_h (B, M, F); `real` (B, M, 1) is 0 for padding."""
        config = self.config
        batch, size, _ = x.shape
        rows, columns = _pairs(batch, size)
        pair_mask = real @ real.transpose(1, 2) * (1 - torch.eye(size))
        pair_mask = pair_mask.reshape(-1, 1)
        mask = real.reshape(-1, 1)
        start = x.reshape(-1, 3) * mask
        time = level[:, None, None].expand(batch, size, 1)
        state = self.dynamics.egnn.embedding(torch.cat([h, time], dim=2).flatten(0, 1) * mask)
        moved, first = start, _squared(start, rows, columns)[0]
        for number in range(config.layers):
            block = self.dynamics.egnn.get_submodule(f"e_block_{number}")
            squared, difference = _squared(moved, rows, columns)
            difference = difference / ((squared + 1e-8).sqrt() + config.norm_constant)
            edges = torch.cat([squared, first], dim=1)
            for layer in range(config.inv_sublayers):
                update = block.get_submodule(f"gcl_{layer}")
                messages = update.edge_mlp(torch.cat([state[rows], state[columns], edges], dim=1))
                if config.attention:
                    messages = messages * update.att_mlp(messages)
                received = _sums(messages * pair_mask, rows, len(state))
                received = received / config.normalization_factor
                state = state + update.node_mlp(torch.cat([state, received], dim=1))
                state = state * mask
            move = block.gcl_equiv.coord_mlp(torch.cat([state[rows], state[columns], edges], dim=1))
            if config.tanh:
                move = torch.tanh(move) * config.coords_range
            total = _sums(difference * move * pair_mask, rows, len(state))
            moved = (moved + total / config.normalization_factor) * mask
            state = state * mask
        out = (self.dynamics.egnn.embedding_out(state) * mask).reshape(batch, size, -1)
        eps = ((moved - start) * mask).reshape(batch, size, 3)
        eps = eps - real * eps.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
        return eps, out[..., :-1]


def _block(config: ModelConfig) -> nn.Module:
    hidden = config.hidden
    block = nn.Module()
    for layer in range(config.inv_sublayers):
        update = nn.Module()
        update.edge_mlp = nn.Sequential(
            nn.Linear(2 * hidden + 2, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        update.node_mlp = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        if config.attention:
            update.att_mlp = nn.Sequential(nn.Linear(hidden, 1), nn.Sigmoid())
        block.add_module(f"gcl_{layer}", update)
    block.gcl_equiv = nn.Module()
    block.gcl_equiv.coord_mlp = nn.Sequential(
        nn.Linear(2 * hidden + 2, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, 1, bias=False),
    )
    return block


@lru_cache
def _pairs(batch: int, size: int) -> tuple[Tensor, Tensor]:
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    offsets = torch.arange(batch)[:, None, None] * size
    rows, columns = (offsets + pairs).flatten(0, 1).unbind(1)
    return rows.contiguous(), columns.contiguous()


def _squared(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    difference = x[rows] - x[columns]
    return difference.square().sum(dim=1, keepdim=True), difference


def _sums(values: Tensor, rows: Tensor, size: int) -> Tensor:
    total = values.new_zeros(size, values.shape[1])
    return total.scatter_add_(0, rows[:, None].expand_as(values), values)
