"""Diffusion moves leave known distributions as they are, whatever the model says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.diffusion.checkpoint import Model, load
from kernels.diffusion.egnn import ModelConfig, build
from kernels.diffusion.schedule import Schedule
from kernels.errors import InputError
from kernels.sampling.diffusion_proposal import DiffusionProposal
from kernels.sampling.metropolis import ChainSettings, ChainState, advance, init
from kernels.units import BOLTZMANN_EV_PER_K

Floats = NDArray[np.float64]

CONFIG = ModelConfig(hidden=8, layers=1)
NITROGEN = np.array([7, 7], np.uint8)
METHANOL = np.array([6, 8, 1, 1, 1, 1], np.uint8)
METHANOL_AT = np.array(
    [[-0.66, -0.02, 0.0], [0.75, 0.12, 0.0], [-1.03, -0.54, 0.89], [-1.03, -0.54, -0.89],
     [-1.08, 0.98, 0.0], [1.13, -0.76, 0.0]]
)  # fmt: skip
TEMPERATURE = 300.0
THERMAL = BOLTZMANN_EV_PER_K * TEMPERATURE


def _model(network: nn.Module | None = None) -> Model:
    torch.manual_seed(3)
    network = build(CONFIG) if network is None else network
    for name, parameter in network.named_parameters():
        if name.endswith("length.weight"):
            # Random weights of published size move next to nothing.
            parameter.data *= 100
    network.eval().requires_grad_(False)
    schedule = Schedule(CONFIG.steps, CONFIG.precision)
    return Model(CONFIG, network, schedule, name="made up", digest="0" * 64)


class _Pull(nn.Module):
    """A network that finds two atoms too far apart, and the further so, neither in proportion."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, h: Tensor, level: Tensor, graph: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        apart = x[:, 1] - x[:, 0]
        length = apart.norm(dim=1, keepdim=True)
        pull = apart / length * torch.tanh(3 * (length - 1.15))
        return 4 * torch.stack([-pull, pull], dim=1), h


class _DoubleWell:
    """Two atoms with minima of equal depth at 1.0 and 1.4 Å, and a barrier between."""

    def __init__(self, barrier: float = 1.5 * THERMAL) -> None:
        self.barrier = barrier

    def energy(self, length: Any) -> Any:
        return self.barrier * (((length - 1.2) / 0.2) ** 2 - 1) ** 2

    def evaluate(self, numbers: Any, positions: Floats) -> tuple[float, Floats]:
        length = float(np.linalg.norm(positions[1] - positions[0]))
        return self.energy(length), np.zeros_like(positions)


class _Springs:
    """Every atom on a spring of its own, of stiffness (N,) in eV/Å²."""

    def __init__(self, rest: Floats, stiffness: Floats) -> None:
        self.rest, self.stiffness = rest, stiffness

    def evaluate(self, numbers: Any, positions: Floats) -> tuple[float, Floats]:
        away = positions - self.rest
        energy = 0.5 * float((self.stiffness[:, None] * away**2).sum())
        return energy, -self.stiffness[:, None] * away


class _Uncorrected(DiffusionProposal):
    """Forgets that the way back is not as likely as the way there."""

    def propose(self, *arguments: Any) -> Any:
        positions, memory, _ = super().propose(*arguments)
        return positions, memory, 0.0


def _chain(
    numbers: Any, start: Floats, calculator: Any, proposal: Any, steps: int, step_size: float
) -> ChainState:
    settings = ChainSettings(TEMPERATURE, steps, 0, save_every=1, step_size=step_size)
    state = init(numbers, start, calculator, settings, proposal)
    advance(state, numbers, calculator, settings, seed=11, until=steps, proposal=proposal)
    return state


def _mean(series: Floats) -> tuple[float, float]:
    """Mean and its standard error, from the means of 25 blocks."""
    blocks = series[len(series) % 25 :].reshape(25, -1).mean(axis=1)
    return float(blocks.mean()), float(blocks.std(ddof=1) / 5)


def _lengths(state: ChainState) -> Floats:
    apart: Floats = np.linalg.norm(state.frames[:, 1] - state.frames[:, 0], axis=1)
    return apart.astype(np.float64)


def test_a_double_well_is_sampled_as_it_is() -> None:
    """Mean energy, mean length and the inner well's share, by quadrature over r² exp(-E/kT)."""
    well = _DoubleWell()
    start = np.array([[0.0, 0.0, -0.5], [0.0, 0.0, 0.5]])
    grid = np.linspace(0.7, 1.8, 4000)
    weights = grid**2 * np.exp(-well.energy(grid) / THERMAL)
    weights /= weights.sum()
    known = [
        float((weights * well.energy(grid)).sum()),
        float((weights * grid).sum()),
        float(weights[grid < 1.2].sum()),
    ]

    def measured(kind: type[DiffusionProposal], steps: int) -> list[tuple[float, float]]:
        proposal = kind(
            _model(_Pull()), NITROGEN, 40, share=0.8, moves="reverse step", width=1.0, drift=0.8
        )
        state = _chain(NITROGEN, start, well, proposal, steps, step_size=0.1)
        assert 0.1 < state.acceptance < 0.9
        lengths = _lengths(state)
        return [_mean(state.energies), _mean(lengths), _mean((lengths < 1.2).astype(float))]

    for (value, error), expected in zip(measured(DiffusionProposal, 7000), known, strict=True):
        assert error < 0.1 * expected
        assert value == pytest.approx(expected, abs=4 * error)
    # The test would notice: without the correction the model's opinion shows.
    (_, _, (value, error)) = measured(_Uncorrected, 3000)
    assert abs(value - known[2]) > 5 * error


def test_a_random_network_leaves_a_harmonic_molecule_harmonic() -> None:
    """Mean energy 3N/2 kT and heat capacity 3N/2 k over every spring, stiff or soft."""
    springs = _Springs(METHANOL_AT, np.array([30.0, 20.0, 10.0, 10.0, 5.0, 3.0]))
    proposal = DiffusionProposal(_model(), METHANOL, 40, share=0.7, moves="reverse step")
    state = _chain(METHANOL, METHANOL_AT, springs, proposal, steps=5_000, step_size=0.035)
    energies = state.energies[500:]
    mean, error = _mean(energies)
    assert mean == pytest.approx(9 * THERMAL, abs=4 * error)
    assert error < 0.08 * mean
    variance, spread = _mean((energies - 9 * THERMAL) ** 2)
    assert variance == pytest.approx(9 * THERMAL**2, abs=4 * spread)


SETTINGS = [
    {"moves": "reverse step"},
    {"moves": "reverse step", "width": 1.2, "drift": 0.5},
    {"moves": "shaped"},
    {"moves": "shaped", "drift": 0.7, "width": 0.4},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_way_back_has_the_negative_log_ratio(settings: Any) -> None:
    """And the ratio is that of the two densities, computed from their definition."""
    model = load("qm9-edm")
    proposal = DiffusionProposal(model, METHANOL, 15, share=1.0, **settings)
    here = proposal.init(METHANOL_AT)
    there, remembered, ratio = proposal.propose(METHANOL_AT, here, 5, 1, 0.01)
    assert np.abs(there - METHANOL_AT).max() > 1e-3
    # A model whose opinion matters, and a centre that stays.
    assert (abs(ratio) > 0.05) == (proposal.drift > 0)
    assert there.mean(axis=0) == pytest.approx(METHANOL_AT.mean(axis=0), abs=1e-12)

    def mean_from(positions: Floats, memory: Any) -> tuple[Floats, Floats]:
        """Where a move leads without noise, and the square root of its covariance."""
        width = 0.01 * proposal.width or model.schedule.reverse_step(15).noise
        root = width * memory.get("shape", np.eye(18) - np.tile(np.eye(3) / 6, (6, 6)))
        if not proposal.drift:
            return positions, root
        scale = proposal.drift / model.schedule.reverse_step(15).noise ** 2
        return positions + scale * (root @ root @ memory["pull"].ravel()).reshape(6, 3), root

    def log_density(to: Floats, positions: Floats, memory: Any) -> float:
        mean, root = mean_from(positions, memory)
        values, vectors = np.linalg.eigh(root)
        # Shifts, which have no width, are not among the 15 degrees of freedom.
        kept = values > 1e-9
        assert kept.sum() == 15
        along = vectors[:, kept].T @ (to - mean).ravel() / values[kept]
        return -0.5 * float(along @ along)

    forth = log_density(there, METHANOL_AT, here)
    back = log_density(METHANOL_AT, there, remembered)
    assert ratio == pytest.approx(back - forth, abs=1e-6)
    # What is remembered of a geometry is what a chain that began there would know.
    if "pull" in remembered:
        assert remembered["pull"] == pytest.approx(proposal.init(there)["pull"], abs=0)


def test_the_pull_is_the_reverse_step_of_the_network() -> None:
    model = load("qm9-edm")
    proposal = DiffusionProposal(model, METHANOL, 20, share=1.0, moves="reverse step")
    pull = proposal.init(METHANOL_AT)["pull"]
    y = METHANOL_AT - METHANOL_AT.mean(axis=0)
    from kernels.diffusion.egnn import features

    clean = features(torch.from_numpy(METHANOL[None].astype("i8")), model.config)
    with torch.no_grad():
        eps, _ = model.network(torch.from_numpy(y[None]).float(), clean, torch.tensor([0.02]))
    step = model.schedule.reverse_step(20)
    expected = (step.keep - 1) * y - step.remove * eps[0].double().numpy()
    assert pull == pytest.approx(expected, abs=1e-7)
    # Methanol is a molecule to it: the mean stays close, compared to the width.
    assert np.abs(pull).max() < 3 * step.noise


def test_a_network_gives_the_same_bits_for_the_same_geometry() -> None:
    """The correction rests on it: the mean is a function of the geometry and of nothing before."""
    proposal = DiffusionProposal(load("qm9-edm"), METHANOL, 20, moves="reverse step")
    first = proposal.init(METHANOL_AT)["pull"]
    for seed in range(20):
        proposal.propose(METHANOL_AT, {"pull": first}, seed, 1, 0.01)
        assert np.array_equal(proposal.init(METHANOL_AT)["pull"], first)


def test_shaped_moves_are_wide_along_the_soft_torsion() -> None:
    """The trained model's shape lets methanol's hydroxyl turn further than its bonds stretch."""
    proposal = DiffusionProposal(load("qm9-edm"), METHANOL, 20)
    shape = proposal.init(METHANOL_AT)["shape"]
    assert shape == pytest.approx(shape.T, abs=1e-12)
    # Bonds C-O and O-H stretch; the hydroxyl's hydrogen leaves the plane of C, O and itself.
    stretch = np.zeros((6, 3))
    stretch[1], stretch[0] = 1.0 * np.array([1.0, 0.1, 0.0]), -np.array([1.0, 0.1, 0.0])
    torsion = np.zeros((6, 3))
    torsion[5] = [0.0, 0.0, 1.0]
    widths = []
    for direction in (stretch, torsion):
        unit = direction.ravel() / np.linalg.norm(direction)
        widths.append(math.sqrt(unit @ shape @ shape @ unit))
    assert widths[1] > 1.5 * widths[0]
    shifts = np.tile(np.eye(3), (6, 1))
    assert np.abs(shape @ shifts).max() < 1e-9
    turn = np.cross([0.0, 0.0, 1.0], METHANOL_AT - METHANOL_AT.mean(axis=0)).ravel()
    assert shape @ turn == pytest.approx(turn, abs=1e-9)


@pytest.mark.parametrize("settings", SETTINGS[1:])
def test_a_chain_cut_and_saved_is_the_same_to_the_last_bit(settings: Any) -> None:
    springs = _Springs(METHANOL_AT, np.full(6, 10.0))
    chain = ChainSettings(TEMPERATURE, 60, 20, save_every=1, tune=True)

    def proposal() -> DiffusionProposal:
        return DiffusionProposal(load("qm9-edm"), METHANOL, 20, share=0.8, **settings)

    whole = init(METHANOL, METHANOL_AT, springs, chain, proposal())  # type: ignore[arg-type]
    advance(whole, METHANOL, springs, chain, 4, until=60, proposal=proposal())  # type: ignore[arg-type]
    parts = init(METHANOL, METHANOL_AT, springs, chain, proposal())  # type: ignore[arg-type]
    for until in (7, 31, 60):
        advance(parts, METHANOL, springs, chain, 4, until=until, proposal=proposal())  # type: ignore[arg-type]
        parts = ChainState.from_arrays(parts.to_arrays())
    assert whole.moved.sum() > 5
    assert np.array_equal(whole.energies, parts.energies)
    assert np.array_equal(whole.frames, parts.frames)


def _refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()


def test_wrong_use_is_refused_with_the_remedy() -> None:
    model = _model()
    _refused(lambda: DiffusionProposal(load("qm9-b3lyp"), METHANOL), "architecture edm")
    _refused(lambda: DiffusionProposal(model, METHANOL, 0), "n = 0 is no diffusion step")
    _refused(lambda: DiffusionProposal(model, METHANOL, share=1.5), "share 1.5")
    _refused(lambda: DiffusionProposal(model, METHANOL, width=-1), "width -1")
    _refused(lambda: DiffusionProposal(model, METHANOL, moves="odd"), "shaped, reverse step")  # type: ignore[arg-type]
    _refused(lambda: DiffusionProposal(model, np.array([17, 1])), "17")
    proposal = DiffusionProposal(model, METHANOL, moves="reverse step")
    _refused(lambda: proposal.init(METHANOL_AT[:4]), "the 6 atoms")
    _refused(lambda: proposal.propose(METHANOL_AT, {}, 1, 1, 0.1), "remembered nothing")
