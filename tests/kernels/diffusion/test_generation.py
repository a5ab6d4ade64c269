"""Generation: an ideal network gives back its molecule from noise, and a real one makes some."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.connectivity import bonds
from kernels.diffusion import published
from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import ModelConfig, build, features
from kernels.diffusion.generation import GenerateSettings, Generation, converge, generate
from kernels.diffusion.schedule import Schedule
from kernels.diffusion.sizes import QM9_SIZES, draw_size
from kernels.errors import InputError, KernelError, NotFiniteError

ETHANOL = molecule("CH3CH2OH")
STEPS = 60
# The last step adds noise of sigma_0 = sqrt(1e-5).
DECODED_A = 0.02
# Float32 over all steps of a real model, in batches of different sizes.
SAME_A = 1e-3


class _Ideal(nn.Module):
    """Knows the one molecule there is, and so all noise in what it is shown."""

    def __init__(self, config: ModelConfig, nan_at: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.schedule = Schedule(config.steps, config.precision)
        numbers = torch.from_numpy(ETHANOL.numbers)[None]
        xyz = ETHANOL.positions - ETHANOL.positions.mean(axis=0)
        self.x = torch.from_numpy(xyz.astype(np.float32))[None]
        self.h = features(numbers, config)
        self.nan_at = nan_at

    def forward(
        self, x: Tensor, h: Tensor, level: Tensor, graph: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert graph is None
        n = round(float(level[0]) * self.schedule.steps)
        alpha, sigma = float(self.schedule.alpha[n]), float(self.schedule.sigma[n])
        eps_x, eps_h = (x - alpha * self.x) / sigma, (h - alpha * self.h) / sigma
        if n == self.nan_at:
            eps_x = eps_x.clone()
            eps_x[0] = torch.nan
        return eps_x, eps_h


def ideal(nan_at: int = -1) -> Model:
    config = ModelConfig(steps=STEPS, size_histogram={9: 1}, hidden=16, layers=1)
    network = _Ideal(config, nan_at)
    return Model(config, network, Schedule(STEPS, config.precision), "ideal", "0" * 64)


def good(results: list[Generation | KernelError]) -> list[Generation]:
    made = [result for result in results if isinstance(result, Generation)]
    assert len(made) == len(results), results
    return made


def test_an_ideal_network_finds_its_molecule_in_any_noise() -> None:
    made = good(generate(ideal(), [1, 2, 3]))
    target = ETHANOL.positions - ETHANOL.positions.mean(axis=0)
    for one in made:
        assert one.numbers.tolist() == ETHANOL.numbers.tolist()
        assert np.abs(one.frames[-1] - target).max() < DECODED_A
        assert np.array_equal(bonds(one.numbers, one.frames[-1]), bonds(one.numbers, target))
        assert one.levels.tolist() == list(range(STEPS, -1, -1))
        measured = one.convergence
        last = (measured.elements_final[-1], measured.bonds_final[-1], measured.valid_bonds[-1])
        assert last == (1, 1, 1)
        assert measured.elements_final[0] < 1
        assert measured.bond_deviation[-1] == 0
        # It settles: bonds get closer to their end, and moves get smaller.
        assert measured.bond_deviation[:5].mean() > 5 * measured.bond_deviation[-10:].mean() > 0
        assert np.isnan(measured.step_length[0])
        assert measured.step_length[1:6].mean() > 3 * measured.step_length[-6:].mean()
    # From noise that is each one's own.
    assert np.abs(made[0].frames[0] - made[1].frames[0]).max() > 0.1
    assert made[0].frames[0].std() == pytest.approx(1.0, abs=0.3)


def test_fewer_frames_are_the_same_frames() -> None:
    (whole,) = good(generate(ideal(), [4]))
    (some,) = good(generate(ideal(), [4], GenerateSettings(save_every=7)))
    assert some.levels.tolist() == [56, 49, 42, 35, 28, 21, 14, 7, 0]
    at = np.flatnonzero(np.isin(whole.levels, some.levels))
    assert np.array_equal(some.frames, whole.frames[at])
    assert np.array_equal(some.convergence.step_length, whole.convergence.step_length[at])
    assert np.array_equal(some.convergence.bonds_final, whole.convergence.bonds_final[at])
    with pytest.raises(InputError, match="save_every = 0"):
        GenerateSettings(save_every=0)


def test_nan_costs_its_molecule_alone() -> None:
    first, second = generate(ideal(nan_at=30), [1, 2])
    assert isinstance(first, NotFiniteError)
    assert "n = 29" in str(first)
    assert isinstance(second, Generation)


def test_a_model_that_begins_with_geometries_makes_none() -> None:
    config = ModelConfig(architecture="basin", steps=10)
    model = Model(config, nn.Linear(1, 1), Schedule(10, 1e-5), "own", "0" * 64)
    with pytest.raises(InputError, match="architecture basin"):
        generate(model, [1])


def test_measures_of_two_frames_by_hand() -> None:
    """Water whose one hydrogen is a distant fluorine at first."""
    end = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    start = end + np.array([[0.0, 0, 0], [3.0, 0, 0], [0, 0, 0]])
    elements = np.array([[8, 9, 1], [8, 1, 1]], np.uint8)
    deviation, kinds, counts, usual = converge(np.stack([start, end]), elements)
    # Of the two bonds at the end, one was 3 Å too long.
    assert deviation == pytest.approx([1.5, 0.0], abs=1e-6)
    assert kinds == pytest.approx([2 / 3, 1])
    # Oxygen had one bond of two, the other atom none.
    assert counts == pytest.approx([1 / 3, 1])
    assert usual == pytest.approx([2 / 3, 1])


def test_atoms_without_bonds_deviate_from_nothing() -> None:
    far = np.array([[[0.0, 0, 0], [9, 0, 0]]] * 2)
    deviation, *_ = converge(far, np.full((2, 2), 1, np.uint8))
    assert np.isnan(deviation).all()


def test_sizes_follow_the_histogram_and_the_seed_alone() -> None:
    drawn = Counter(draw_size({5: 1, 7: 3}, seed) for seed in range(2000))
    assert set(drawn) == {5, 7}
    assert drawn[7] / 2000 == pytest.approx(0.75, abs=0.04)
    assert draw_size({5: 1, 7: 3}, 11) == draw_size({7: 3, 5: 1}, 11)
    usual = [draw_size({}, seed) for seed in range(2000)]
    assert set(usual) <= set(QM9_SIZES)
    assert np.mean(usual) == pytest.approx(17.99, abs=0.3)
    for impossible in ({0: 1}, {5: 0}, {5: -1, 6: 1}):
        with pytest.raises(InputError, match="no histogram"):
            draw_size(impossible, 1)


@pytest.fixture
def real(shared_data: Path) -> Model:
    """The public checkpoint from early in its training."""
    config, weights, _ = published.read(next((shared_data / "edm_checkpoint").glob("*_ema.npy")))
    network = build(config)
    network.load_state_dict(weights)
    network.eval().requires_grad_(False)
    return Model(config, network, Schedule(config.steps, config.precision), "early", "0" * 64)


def test_a_real_model_makes_things_like_molecules(real: Model) -> None:
    made = good(generate(real, range(8)))
    kinds: Counter[int] = Counter()
    valid: list[NDArray[np.float32]] = []
    for one in made:
        kinds.update(one.numbers.tolist())
        valid.append(one.convergence.valid_bonds)
        assert np.abs(one.frames.mean(axis=1)).max() < 1e-4
    # QM9 is 51 % hydrogen and 35 % carbon; this model is at the beginning of its training.
    total = sum(kinds.values())
    assert 0.35 < kinds[1] / total < 0.7
    assert 0.2 < kinds[6] / total < 0.55
    at_first, at_last = np.mean([v[0] for v in valid]), np.mean([v[-1] for v in valid])
    assert at_last > 0.75 > at_first
    lengths = np.mean([one.convergence.step_length for one in made], axis=0)
    assert lengths[1:10].mean() > 5 * lengths[-10:].mean()
    # Elements are settled well before positions are.
    final = np.mean([one.convergence.elements_final for one in made], axis=0)
    assert final[-5:].min() > 0.95


def test_a_molecule_is_the_same_alone_and_in_company(real: Model) -> None:
    together = good(generate(real, [5, 6, 7, 8, 9, 10]))
    (alone,) = good(generate(real, [7]))
    assert alone.numbers.tolist() == together[2].numbers.tolist()
    assert np.abs(alone.frames - together[2].frames).max() < SAME_A
