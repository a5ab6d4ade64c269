"""Training: what is learnt, that it goes on exactly where it stopped, and when it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import molecule
from torch import Tensor, nn

from kernels.diffusion import process, training
from kernels.diffusion.egnn import ModelConfig
from kernels.diffusion.training import TrainingSet, TrainSettings, TrainState
from kernels.errors import InputError, NotFiniteError

SMALL = ModelConfig(hidden=32, layers=2)
QUICK = TrainSettings(epochs=5, batch=24, learning_rate=3e-3)
KINDS = ("CH4", "NH3", "C2H6", "CH3CH2OH", "CH3CHO", "HCOOH", "CH3OH")


def toy_set(count: int, seed: int) -> TrainingSet:
    """Small molecules of ASE's collection, turned, and shaken by 0.02 Å."""
    random = np.random.default_rng(seed)
    atoms = [molecule(KINDS[i % len(KINDS)]) for i in range(count)]
    turns = [np.linalg.qr(random.normal(size=(3, 3)))[0] for _ in atoms]
    return TrainingSet(
        [f"toy {i}" for i in range(count)],
        [a.numbers for a in atoms],
        [
            a.positions @ turn + random.normal(scale=0.02, size=a.positions.shape)
            for a, turn in zip(atoms, turns, strict=True)
        ],
    )


def begin(data: TrainingSet, settings: TrainSettings = QUICK, **changes: Any) -> TrainState:
    steps = data.steps(settings.batch, settings.pieces)
    return training.init(replace(SMALL, **changes), settings, steps)


def advance(state: TrainState, data: TrainingSet, steps: int) -> list[float]:
    losses = []
    settings = state.settings
    for _ in range(steps):
        epoch, at = divmod(state.step, state.steps_per_epoch)
        order = data.epoch(settings.batch, settings.pieces, settings.seed, epoch)
        losses.append(training.step(state, data, order[at]))
    return losses


def difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def test_what_is_learnt_holds_for_other_molecules() -> None:
    data, judged = toy_set(140, seed=1), toy_set(42, seed=2)
    state = begin(data, replace(QUICK, ema_decay=0.99))
    before = training.validate(state, judged)
    advance(state, data, 150)
    after = training.validate(state, judged)
    assert before.loss == pytest.approx(1.0, abs=0.1)
    assert after.loss < 0.5 * before.loss
    last = [level for level in after.levels if level.count][-1]
    assert last.last == SMALL.steps
    assert last.loss < 0.3


def test_an_epoch_takes_every_molecule_once_in_pieces_of_equal_size() -> None:
    data = toy_set(101, seed=3)
    order = data.epoch(24, 4, seed=5, number=0)
    assert len(order) == data.steps(24, 4)
    seen = [(p.size, int(row)) for step in order for p in step for row in p.rows]
    assert len(seen) == len(set(seen)) == 101
    assert max(len(step) for step in order) == 4
    for piece in (piece for step in order for piece in step):
        batch = data.take(piece, torch.device("cpu"))
        assert batch["positions"].shape == (len(piece.rows), piece.size, 3)
    again = data.epoch(24, 4, seed=5, number=0)
    other = data.epoch(24, 4, seed=5, number=1)
    flat = [[p.rows.tolist() for s in o for p in s] for o in (order, again, other)]
    assert flat[0] == flat[1] != flat[2]


def test_extra_arrays_stay_with_their_molecules() -> None:
    atoms = [molecule(kind) for kind in KINDS]
    data = TrainingSet(
        list(KINDS),
        [a.numbers for a in atoms],
        [a.positions for a in atoms],
        {"displaced": [a.positions + 1 for a in atoms], "bonds": [np.eye(len(a)) for a in atoms]},
    )
    for step in data.epoch(4, 2, seed=0, number=0):
        for piece in step:
            batch = data.take(piece, torch.device("cpu"))
            torch.testing.assert_close(batch["displaced"], batch["positions"] + 1)
            assert batch["bonds"].shape == (len(piece.rows), piece.size, piece.size)


class _Oracle(nn.Module):
    """Knows the molecule, and so the noise; or says that there is none."""

    def __init__(self, x: Tensor, h: Tensor, state: TrainState, *, knows: bool) -> None:
        super().__init__()
        self.x, self.h, self.schedule, self.knows = x, h, state.schedule, knows

    def forward(
        self, x: Tensor, h: Tensor, level: Tensor, graph: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self.knows:
            return torch.zeros_like(x), torch.zeros_like(h)
        n = (level * self.schedule.steps).round().long()
        alpha = torch.from_numpy(self.schedule.alpha).float()[n][:, None, None]
        sigma = torch.from_numpy(self.schedule.sigma).float()[n][:, None, None]
        return (x - alpha * self.x) / sigma, (h - alpha * self.h) / sigma


@pytest.mark.parametrize("knows", [True, False])
def test_the_published_loss_is_the_error_of_the_noise(knows: bool) -> None:
    state = begin(toy_set(14, seed=4))
    ethanol = molecule("CH3CH2OH")
    many = 2000
    batch = {
        "numbers": torch.from_numpy(ethanol.numbers.astype("i8")).expand(many, -1),
        "positions": torch.from_numpy(ethanol.positions.astype("f4")).expand(many, -1, -1),
        "level": torch.arange(many) % 900 + 100,
    }
    x = process.centred(batch["positions"])
    h = training.features(batch["numbers"], state.config)
    oracle = _Oracle(x, h, state, knows=knows)
    generator = torch.Generator().manual_seed(1)
    losses = training.edm(oracle, state.schedule, state.config, batch, generator, state.settings)
    assert losses.shape == (many,)
    n, f = len(ethanol), state.config.n_features
    # Without its centre of mass, the noise of positions has 3 (N - 1) degrees of freedom.
    expected = 0.0 if knows else (3 * (n - 1) + n * f) / (n * (3 + f))
    assert float(losses.mean()) == pytest.approx(expected, abs=0.01)


def test_levels_are_drawn_as_asked() -> None:
    schedule = training.Schedule(1000, 1e-5)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    even = training.levels_at(u, QUICK, schedule)
    assert (int(even.min()), int(even.max())) == (0, 1000)
    assert float(even.double().mean()) == pytest.approx(500, rel=0.02)
    low = training.levels_at(u, replace(QUICK, max_level=100, level_power=2.0), schedule)
    assert (int(low.min()), int(low.max())) == (0, 100)
    # P(n < 25) = P(u < sqrt(25/101)).
    assert float((low < 25).double().mean()) == pytest.approx(math.sqrt(25 / 101), abs=0.01)


def test_bins_of_levels_cover_them_all_once() -> None:
    schedule = training.Schedule(1000, 1e-5)
    for top in (3, 50, 120, 1000):
        bins = training.level_bins(replace(QUICK, max_level=top), schedule)
        covered = [n for first, last in bins for n in range(first, last + 1)]
        assert covered == list(range(top + 1))


def test_a_saved_training_goes_on_to_the_very_same_weights(tmp_path: Path) -> None:
    data, judged = toy_set(60, seed=5), toy_set(14, seed=6)
    whole = begin(data)
    advance(whole, data, 12)
    part = begin(data)
    advance(part, data, 5)
    training.validate(part, judged)
    path = tmp_path / "state.pt"
    training.state_to_file(part, path, {"data": "digest"})
    again, about = training.state_from_file(path, SMALL, QUICK, part.steps_per_epoch)
    assert about == {"data": "digest"}
    advance(again, data, 7)
    assert again.step == whole.step == 12
    assert difference(again.network, whole.network) == 0.0
    assert difference(again.average, whole.average) == 0.0
    assert again.norms == whole.norms
    assert training.validate(again, judged) == training.validate(whole, judged)


def test_a_training_that_would_be_another_is_not_gone_on_with(tmp_path: Path) -> None:
    data = toy_set(30, seed=7)
    state = begin(data)
    path = tmp_path / "state.pt"
    training.state_to_file(state, path)
    steps = state.steps_per_epoch
    training.state_from_file(path, SMALL, replace(QUICK, learning_rate=1e-5, epochs=9), steps)
    with pytest.raises(InputError, match="seed = 0, not 1"):
        training.state_from_file(path, SMALL, replace(QUICK, seed=1), steps)
    with pytest.raises(InputError, match="hidden = 32, not 16"):
        training.state_from_file(path, replace(SMALL, hidden=16), QUICK, steps)
    with pytest.raises(InputError, match="the data have changed"):
        training.state_from_file(path, SMALL, QUICK, steps + 1)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"state\.pt: is no saved training"):
        training.state_from_file(path, SMALL, QUICK, steps)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    data = toy_set(30, seed=8)
    state = begin(data)
    advance(state, data, 2)
    kept = training.weights(state.network)
    with torch.no_grad():
        state.network.readout.bias[0] = math.inf
    with pytest.raises(NotFiniteError, match="step 3: the loss is"):
        advance(state, data, 1)
    assert state.step == 2
    for name, tensor in state.network.state_dict().items():
        if name != "readout.bias":
            assert torch.equal(tensor, kept[name]), name


def test_a_gradient_spike_is_cut_and_not_remembered_in_full() -> None:
    data = toy_set(60, seed=9)
    state = begin(data)
    state.norms = [1e-3] * 50
    advance(state, data, 1)
    assert state.norms[-1] == pytest.approx(1.5e-3)
    # AdamW's own memory holds a tenth of the gradient as it was cut.
    seen = [state.optimizer.state[p]["exp_avg"] / 0.1 for p in state.network.parameters()]
    assert float(torch.cat([g.flatten() for g in seen]).norm()) == pytest.approx(1.5e-3, rel=1e-3)


def test_the_average_follows_the_weights() -> None:
    data = toy_set(60, seed=10)
    state = begin(data, replace(QUICK, ema_decay=0.5))
    expected = training.weights(state.network)
    for step in range(1, 6):
        advance(state, data, 1)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in state.network.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    for name, tensor in state.average.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_the_learning_rate_rises_and_falls_as_asked() -> None:
    data = toy_set(60, seed=11)
    settings = replace(
        QUICK, epochs=10, learning_rate=1.0, warmup=4, learning_rate_schedule="cosine"
    )
    state = begin(data, settings)
    rates = []
    for step in range(10 * state.steps_per_epoch + 1):
        state.step = step
        rates.append(training.learning_rate(state))
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == pytest.approx(1.0, abs=0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_coarser_arithmetic_learns_too(precision: Any) -> None:
    data = toy_set(60, seed=12)
    losses = advance(begin(data, replace(QUICK, precision=precision)), data, 30)
    exact = advance(begin(data), data, 30)
    assert losses[0] == pytest.approx(exact[0], rel=0.02)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


def test_impossible_settings_are_refused() -> None:
    data = toy_set(14, seed=13)
    with pytest.raises(InputError, match="objective = 'energy'"):
        begin(data, replace(QUICK, objective="energy"))
    with pytest.raises(InputError, match="for models of architecture 'basin'; this one is of arch"):
        begin(data, replace(QUICK, objective="force-field"))
    with pytest.raises(InputError, match="max_level = 2000: the schedule has 1000"):
        begin(data, replace(QUICK, max_level=2000))
    with pytest.raises(InputError, match="do not fit"):
        training.init(SMALL, QUICK, 3, weights={"a": torch.zeros(1)})
    with pytest.raises(InputError, match="toy: a position is not"):
        TrainingSet(["toy"], [np.array([1])], [np.array([[np.nan, 0, 0]])])
    with pytest.raises(InputError, match="do not fit 2 atoms"):
        TrainingSet(["toy"], [np.array([1, 1])], [np.zeros((3, 3))])
