import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.calculators import evaluate, make_calculator
from kernels.diffusion.chains import ChainsState, ChainStart, DiffusionChain, diffusion_chains
from kernels.diffusion.checkpoint import Model, load
from kernels.diffusion.egnn import ModelConfig, Packing, build, features
from kernels.diffusion.schedule import Schedule
from kernels.embedding import embed
from kernels.errors import InputError, NotFiniteError
from kernels.relaxation import RelaxSettings, relax
from kernels.units import BOLTZMANN_EV_PER_K

CONFIG = ModelConfig(hidden=16, layers=2)


def _model(network: nn.Module | None = None, config: ModelConfig = CONFIG) -> Model:
    torch.manual_seed(8)
    network = build(config) if network is None else network
    network.eval().requires_grad_(False)
    schedule = Schedule(config.steps, config.precision)
    return Model(config, network, schedule, name="made up", digest="0" * 64)


class _Known(nn.Module):
    """A network whose noise in the positions is what a function of them and the level says."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.weight = nn.Parameter(torch.zeros(1))

    def packed(
        self, x: Tensor, h: Tensor, level: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        molecules = zip(packing.atoms(x), packing.atoms(level), strict=True)
        found = [self.answer(part, at[:, 0]).flatten(0, 1) for part, at in molecules]
        return torch.cat(found), torch.full_like(h, math.nan)


# Propane and water, far from the origin.
PROPANE = np.array(
    [[0.0, 0.59, 0.0], [1.27, -0.26, 0.0], [-1.27, -0.26, 0.0], [0.0, 1.25, 0.88],
     [0.0, 1.25, -0.88], [2.17, 0.37, 0.0], [-2.17, 0.37, 0.0], [1.31, -0.9, 0.88],
     [1.31, -0.9, -0.88], [-1.31, -0.9, 0.88], [-1.31, -0.9, -0.88]]
) + np.array([10.0, -4.0, 3.0])  # fmt: skip
WATER = np.array([[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]]) - 7.0


def _propane(n: int, seed: int = 1) -> ChainStart:
    return ChainStart(np.array([6] * 3 + [1] * 8, np.uint8), PROPANE, 2**90 + seed, n)


def _water(n: int, seed: int = 1) -> ChainStart:
    return ChainStart(np.array([8, 1, 1], np.uint8), WATER, seed, n)


def _ok(results: list[Any]) -> list[DiffusionChain]:
    for result in results:
        assert isinstance(result, DiffusionChain), result
    return results


def test_every_step_is_the_reverse_step_of_its_n() -> None:
    """Frames are those of the equations with clean features; the noise has the step's width."""
    model = _model()
    model.network.get_submodule("blocks.0").length.weight.data *= 30  # type: ignore[operator, union-attr]
    start = _propane(n=30)
    (chain,) = _ok(diffusion_chains(model, [start], steps=200))
    assert chain.frames.shape == (201, 11, 3)
    assert chain.frames[0] == pytest.approx(PROPANE, abs=1e-6)
    alpha, sigma = model.schedule.alpha, model.schedule.sigma
    ratio = alpha[30] / alpha[29]
    added = sigma[30] ** 2 - ratio**2 * sigma[29] ** 2
    clean = features(torch.from_numpy(start.numbers[None].astype("i8")), CONFIG)
    noises, drifts = [], []
    for before, after in zip(chain.frames[:-1].astype("f8"), chain.frames[1:], strict=True):
        z = before - PROPANE.mean(axis=0)
        with torch.no_grad():
            eps = model.network(torch.from_numpy(z[None]).float(), clean, torch.tensor([0.03]))
        mu = z / ratio - added / (ratio * sigma[30]) * eps[0][0].double().numpy()
        noises.append(after - PROPANE.mean(axis=0) - mu)
        drifts.append(np.abs(mu - z).max())
    noise = np.array(noises)
    width = math.sqrt(added) * sigma[29] / sigma[30]
    # The network matters, or a wrong one would not be noticed.
    assert np.mean(drifts) > 0.1 * width
    assert np.abs(noise.mean(axis=1)).max() < 3e-6
    # 200 steps of 30 degrees of freedom: the standard error of the width is 1 %.
    degrees = noise.size - 3 * len(noise)
    assert math.sqrt((noise**2).sum() / degrees) == pytest.approx(width, rel=0.03)
    lagged = (noise[1:] * noise[:-1]).sum() / degrees / width**2
    assert abs(lagged) < 0.05
    assert len(np.unique(noise[:, 0, 0])) == 200


def test_a_harmonic_score_gives_the_known_spread() -> None:
    """An eps linear in x makes a Gaussian chain, whose stationary variance is known exactly."""
    rest = torch.from_numpy((WATER - WATER.mean(axis=0)).astype(np.float32))
    sigma = torch.from_numpy(_model().schedule.sigma.astype(np.float32))

    def answer(x: Tensor, level: Tensor) -> Tensor:
        return (x - rest) / sigma[(level * 1000).round().long()][:, None, None]

    model, levels = _model(_Known(answer)), [20, 40]
    chains = _ok(diffusion_chains(model, [_water(n, seed=n) for n in levels], steps=12_000))
    for n, chain in zip(levels, chains, strict=True):
        keep, remove, width = model.schedule.reverse_step(n)
        decay = keep - remove / model.schedule.sigma[n]
        # The rest position moves a little, since `keep` stretches the molecule.
        middle = (decay - keep) / (decay - 1) * rest.double().numpy()
        away = chain.frames[100:].astype("f8") - WATER.mean(axis=0) - middle
        # 6 degrees of freedom, correlated over some ten steps: a standard error of 2 %.
        spread = (away**2).sum(axis=(1, 2)).mean() / 6
        assert spread == pytest.approx(width**2 / (1 - decay**2), rel=0.07)


@pytest.mark.parametrize(
    ("cuts", "taken"), [([1, 50], False), ([64, 100, 163], True), ([7, 8, 9, 250], True)]
)
def test_chains_cut_anywhere_are_the_same_to_the_last_bit(cuts: list[int], taken: bool) -> None:
    model = _model()
    starts = [_propane(5), _water(40), _propane(40, 2), _water(1), _propane(20, 3)]
    whole = _ok(diffusion_chains(model, starts, steps=260, save_every=4))
    state: ChainsState | None = None
    kept: list[list[NDArray[np.float32]]] = [[] for _ in starts]
    done: list[Any] = []
    for cut in [*cuts, 260]:
        done = diffusion_chains(
            model, starts, steps=260, save_every=4, state=state,
            segment=cut - (state.step if state else 0), on_segment=(found := []).append,
        )  # fmt: skip
        (state,) = found
        assert state is not None
        assert state.step == cut
        if taken:
            for mine, new in zip(kept, state.take_frames(), strict=True):
                mine.append(new)
        state = ChainsState.from_arrays(state.to_arrays())
    for one, other, mine in zip(whole, _ok(done), kept, strict=True):
        frames = np.concatenate(mine) if taken else other.frames
        assert one.n_steps == other.n_steps == 260
        assert one.frames.shape == (66, *one.frames.shape[1:])
        assert np.array_equal(one.frames, frames)


def test_a_chain_is_its_own_in_any_company() -> None:
    """To 1e-5 Å over 60 steps in float32; chains of other seeds are others."""
    model = load("qm9-edm")
    starts = [_propane(10), _water(30), _propane(35, 2), _propane(35, 3), _water(2)]
    together = _ok(diffusion_chains(model, starts, steps=60, batch_pairs=10**6))
    backwards = _ok(diffusion_chains(model, starts[::-1], steps=60, batch_pairs=300))[::-1]
    for start, one, two in zip(starts, together, backwards, strict=True):
        (alone,) = _ok(diffusion_chains(model, [start], steps=60))
        assert alone.frames == pytest.approx(one.frames, abs=1e-5)
        assert two.frames == pytest.approx(one.frames, abs=1e-5)
    assert np.abs(together[2].frames[-1] - together[3].frames[-1]).max() > 0.02


def test_a_trained_model_wanders_further_at_a_larger_n() -> None:
    """It keeps propane whole, and its bonds spread with n."""
    model = load("qm9-edm")
    levels = [2, 10, 40]
    chains = _ok(diffusion_chains(model, [_propane(n) for n in levels], steps=400, save_every=5))
    spreads = []
    for chain in chains:
        assert (chain.diverged, chain.n_steps, len(chain.frames)) == ("", 400, 81)
        lengths = np.linalg.norm(chain.frames[20:, 0] - chain.frames[20:, 1], axis=1)
        assert lengths.mean() == pytest.approx(1.53, abs=0.1)
        spreads.append(lengths.std())
    assert spreads[0] < spreads[1] < spreads[2] < 0.2


def _diverging(x: Tensor, level: Tensor) -> Tensor:
    """Blows the molecule up where level > 0.03, makes NaN of it where level > 0.05 and r > 6 Å."""
    eps = torch.where(level[:, None, None] > 0.03, -20 * x, 0 * x)
    far = x.abs().amax(dim=(1, 2), keepdim=True) > 6
    return torch.where(far & (level[:, None, None] > 0.05), math.nan, eps)


@pytest.mark.parametrize("segment", [37, 1000])
def test_a_diverging_chain_stops_alone(segment: int) -> None:
    model = _model(_Known(_diverging))
    starts = [_propane(10), _propane(40, 1), _propane(60, 2), _water(10)]
    quiet, blown, lost, water = _ok(
        diffusion_chains(model, starts, steps=1000, save_every=10, segment=segment)
    )
    (same,) = _ok(diffusion_chains(model, starts[:1], steps=1000, save_every=10))
    assert np.array_equal(quiet.frames, same.frames)
    assert quiet.diverged == water.diverged == ""
    assert len(quiet.frames) == 101
    assert blown.diverged == "the molecule fell into 11 pieces (n = 40)"
    assert lost.diverged == "the positions became NaN or infinite (n = 60)"
    for chain in (blown, lost):
        assert 0 < chain.n_steps < 1000
        assert len(chain.frames) == chain.n_steps // 10 + 1
        assert np.isfinite(chain.frames).all()
    # Where they end depends on nothing else.
    again = _ok(diffusion_chains(model, starts[1:3], steps=1000, save_every=10, segment=110))
    assert [chain.n_steps for chain in again] == [blown.n_steps, lost.n_steps]


def test_what_cannot_be_computed_leaves_the_others_alone() -> None:
    model = _model()
    odd = replace(_water(3), numbers=np.array([8, 1, 17], np.uint8))
    hole = replace(_water(3), positions=np.full((3, 3), np.nan))
    flat = replace(_water(3), positions=np.zeros((3, 2)))
    found = diffusion_chains(model, [odd, _water(0), hole, _water(3), flat], steps=5)
    assert [type(result) for result in found] == [
        InputError, InputError, NotFiniteError, DiffusionChain, InputError,
    ]  # fmt: skip
    assert "17" in str(found[0])
    assert "n = 0" in str(found[1])


def test_wrong_use_is_refused_with_the_remedy() -> None:
    model = _model()
    with pytest.raises(InputError, match="steps = 0"):
        diffusion_chains(model, [_water(3)], steps=0)
    with pytest.raises(InputError, match="save_every = 0"):
        diffusion_chains(model, [_water(3)], steps=5, save_every=0)
    states: list[ChainsState] = []
    diffusion_chains(model, [_water(3)], steps=5, on_segment=states.append)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not fit the 1 starts"):
        diffusion_chains(model, [_propane(3)], steps=5, state=states[0])
    arrays = states[0].to_arrays()
    del arrays["x"]
    with pytest.raises(InputError, match="lack 'x'; start the chains anew"):
        ChainsState.from_arrays(arrays)


@pytest.fixture(scope="module")
def ground() -> ChainStart:
    """Return propylamine at its GFN2-xTB minimum."""
    made = embed("CCCN", seed=1, max_attempts=50)
    calculator = make_calculator("GFN2-xTB")
    settings = RelaxSettings(fmax=0.005, max_steps=1000)
    relaxed = relax(made.numbers, made.positions, calculator, settings)
    return ChainStart(made.numbers, relaxed.positions, 7, 14, "CCCN")


def test_a_model_of_minima_makes_chains_as_warm_as_published(ground: ChainStart) -> None:
    """Mean energies above the minimum as at T = mu n², mu near 0.33 K (Rothchild et al., 2024)."""
    levels = [14, 20]
    starts = [replace(ground, n=n, seed=n) for n in levels]
    chains = _ok(diffusion_chains(load("qm9-gfn2"), starts, steps=600, save_every=20))
    calculator = make_calculator("GFN2-xTB")
    at_rest, _ = evaluate(calculator, ground.numbers, ground.positions)
    harmonic = (3 * len(ground.numbers) - 6) / 2 * BOLTZMANN_EV_PER_K
    for n, chain in zip(levels, chains, strict=True):
        energies = [evaluate(calculator, ground.numbers, x)[0] for x in chain.frames[5:]]
        temperature = (np.mean(energies) - at_rest) / harmonic
        # 26 correlated energies of 33 vibrations: within a third.
        assert 0.22 * n**2 < temperature < 0.5 * n**2, (n, temperature)


def test_chains_of_a_model_of_minima_are_the_same_however_they_are_cut(ground: ChainStart) -> None:
    model = load("qm9-gfn2")
    water = replace(_water(9), smiles="O")
    unknown = replace(ground, smiles="")
    starts = [ground, unknown, water]
    whole = diffusion_chains(model, starts, steps=37, save_every=3)
    states: list[ChainsState] = []

    def stop(state: ChainsState) -> bool:
        states.append(ChainsState.from_arrays(state.to_arrays()))
        return False

    diffusion_chains(model, starts, steps=37, save_every=3, segment=15, on_segment=stop)
    (cut,) = states
    assert cut.step == 20
    parts = diffusion_chains(model, starts, steps=37, save_every=3, state=cut)
    assert isinstance(whole[1], InputError)
    assert "no SMILES" in str(whole[1])
    assert isinstance(parts[1], InputError)
    for one, other in zip(_ok([whole[0], whole[2]]), _ok([parts[0], parts[2]]), strict=True):
        assert one.n_steps == other.n_steps == 37
        assert np.array_equal(one.frames, other.frames)


def test_no_chains_are_no_trouble() -> None:
    assert diffusion_chains(_model(), [], steps=3) == []
