from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.diffusion import process, published
from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import DRUGS_ELEMENTS, ModelConfig, build, elements_of, features
from kernels.diffusion.noise import centred_normal
from kernels.diffusion.process import DiffuseSettings, DiffusionPath, Start, diffuse
from kernels.diffusion.schedule import Schedule
from kernels.errors import InputError, NotFiniteError, ResourceError

CONFIG = ModelConfig(hidden=64, layers=3, steps=1000)


def _model(config: ModelConfig = CONFIG, network: nn.Module | None = None) -> Model:
    torch.manual_seed(6)
    network = build(config) if network is None else network
    if config.architecture == "edm":
        for name, parameter in network.named_parameters():
            if name.endswith("length.weight"):
                # As large as in a trained network: the paths must be worth comparing.
                parameter.data *= 30
    network.eval().requires_grad_(False)
    schedule = Schedule(config.steps, config.precision)
    return Model(config, network, schedule, name="made up", digest="0" * 64)


class _Known(nn.Module):
    """A network that gives what a function of its inputs says."""

    def __init__(self, answer: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.answer = answer
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, h: Tensor, level: Tensor, graph: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.answer(x, h, level, graph)


def _starts(sizes: list[int], config: ModelConfig = CONFIG) -> list[Start]:
    """Molecules whose atoms sit apart, far from the origin, each with a seed of its own."""
    random = np.random.default_rng(len(sizes))
    found = []
    for index, size in enumerate(sizes):
        grid = np.stack(np.meshgrid(*[np.arange(4) * 1.4] * 3), axis=-1).reshape(-1, 3)
        places = grid[random.permutation(len(grid))[:size]] + random.normal(size=(size, 3)) * 0.1
        numbers = random.choice(config.elements, size).astype(np.uint8)
        found.append(Start(numbers, places + np.array([10.0, -5.0, 2.0]), seed=2**70 + index))
    return found


def _ok(results: list[Any]) -> list[DiffusionPath]:
    for result in results:
        assert isinstance(result, DiffusionPath), result
    return results


@pytest.mark.parametrize("protocol", ["published", "deterministic"])
def test_a_result_is_the_same_alone_and_in_any_batch(protocol: Any) -> None:
    """To 1e-5 Å over 50 steps in float32, whatever the batch and its order."""
    model, settings = _model(), DiffuseSettings(n=50, protocol=protocol)
    starts = _starts([18, 9, 18, 23, 18, 9, 18, 18])
    together = _ok(diffuse(model, starts, settings, batch_pairs=10**6))
    alone = [_ok(diffuse(model, [start], settings))[0] for start in starts]
    backwards = _ok(diffuse(model, starts[::-1], settings, batch_pairs=1000))[::-1]
    for one, two, three, start in zip(together, alone, backwards, starts, strict=True):
        assert one.frames.shape == (51, len(start.numbers), 3)
        assert one.frames[0] == pytest.approx(start.positions, abs=1e-5)
        assert np.abs(one.frames[-1] - one.frames[0]).max() > 0.02
        for other in (two, three):
            assert other.frames == pytest.approx(one.frames, abs=1e-5)
            assert other.changed_elements == one.changed_elements


def test_a_real_model_is_batch_invariant_too(shared_data: Path) -> None:
    config, weights, _ = published.read(next((shared_data / "edm_checkpoint").glob("*_ema.npy")))
    model = _model(config)
    model.network.load_state_dict(weights)
    data = np.load(shared_data / "qm9" / "qm9_b3lyp_geometries.npz")
    starts = []
    for row in np.flatnonzero(data["num_atoms"] == 17)[:6]:
        starts.append(
            Start(data["numbers"][row, :17], data["positions"][row, :17].astype("f8"), int(row))
        )
    settings = DiffuseSettings(n=50, protocol="published")
    together = _ok(diffuse(model, starts, settings, batch_pairs=10**6))
    for start, path in zip(starts, together, strict=True):
        (alone,) = _ok(diffuse(model, [start], settings))
        assert alone.frames == pytest.approx(path.frames, abs=1e-5)
        # It was trained on such molecules: it keeps them together.
        assert np.linalg.norm(path.frames[-1] - path.frames[0], axis=1).max() < 3.0


def test_the_path_turns_with_the_molecule() -> None:
    model, (start,) = _model(), _starts([14])
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))
    turned = Start(start.numbers, start.positions @ q - 7.0, start.seed)
    settings = DiffuseSettings(n=20)
    one, other = _ok(diffuse(model, [start, turned], settings))
    assert other.frames == pytest.approx(one.frames @ q - 7.0, abs=2e-5)


def _reference(
    model: Model, start: Start, n: int, protocol: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The process as its equations have it, in float64, for one molecule."""
    alpha, sigma = model.schedule.alpha, model.schedule.sigma
    clean = features(torch.from_numpy(start.numbers[None].astype("i8")), model.config)[0].numpy()
    centre = start.positions.mean(axis=0)
    z = np.concatenate([start.positions - centre, clean], axis=1).astype(np.float64)
    frames = [start.positions]

    def predicted(level: int) -> NDArray[np.float64]:
        h = clean if protocol == "deterministic" else z[:, 3:]
        with torch.no_grad():
            eps = model.network(
                torch.from_numpy(z[None, :, :3]).float(),
                torch.from_numpy(h[None]).float(),
                torch.tensor([level / model.schedule.steps]),
                None,
            )
        return np.concatenate([part[0].numpy() for part in eps], axis=1).astype(np.float64)

    def noise(step: int) -> NDArray[np.float64]:
        if protocol == "deterministic":
            return np.zeros_like(z)
        return centred_normal(start.seed, step, len(z), model.config.n_features).astype(np.float64)

    for t in range(n, 0, -1):
        s = t - 1
        alpha_ts = alpha[t] / alpha[s]
        sigma2_ts = sigma[t] ** 2 - alpha_ts**2 * sigma[s] ** 2
        mu = z / alpha_ts - sigma2_ts / (alpha_ts * sigma[t]) * predicted(t)
        z = mu + np.sqrt(sigma2_ts) * sigma[s] / sigma[t] * noise(t)
        frames.append(z[:, :3] + centre)
    x = (z[:, :3] - sigma[0] * predicted(0)[:, :3]) / alpha[0]
    frames[-1] = x + sigma[0] / alpha[0] * noise(0)[:, :3] + centre
    return np.array(frames), z[:, 3:]


@pytest.mark.parametrize("protocol", ["published", "deterministic"])
def test_the_process_is_that_of_the_equations(protocol: Any) -> None:
    model, (start,) = _model(), _starts([11])
    (path,) = _ok(diffuse(model, [start], DiffuseSettings(n=30, protocol=protocol)))
    frames, _ = _reference(model, start, 30, protocol)
    assert path.levels.tolist() == list(range(30, -1, -1))
    assert path.frames == pytest.approx(frames, abs=2e-5)


def test_only_the_published_protocol_is_random() -> None:
    model, (start,) = _model(), _starts([11])
    other = Start(start.numbers, start.positions, start.seed + 1)
    for protocol, same in (("deterministic", True), ("published", False)):
        settings = DiffuseSettings(n=10, protocol=protocol)  # type: ignore[arg-type]
        one, two = _ok(diffuse(model, [start, other], settings))
        assert np.array_equal(one.frames, two.frames) is same


def test_the_true_noise_leads_back_to_the_molecule() -> None:
    """A network that knows the answer denoises to it, from any level."""
    (start,) = _starts([12])
    target = torch.from_numpy(start.positions - start.positions.mean(axis=0)).float()
    schedule = Schedule(1000, 1e-5)

    def answer(x: Tensor, h: Tensor, level: Tensor, graph: Any) -> tuple[Tensor, Tensor]:
        n = int((level * 1000).round()[0])
        eps = (x - float(schedule.alpha[n]) * target) / float(schedule.sigma[n])
        return eps, torch.zeros_like(h)

    model = _model(network=_Known(answer))
    random = np.random.default_rng(1)
    moved = start.positions + random.normal(size=start.positions.shape) * 0.1
    moved += start.positions.mean(axis=0) - moved.mean(axis=0)
    begin = Start(start.numbers, moved, 3)
    (path,) = _ok(diffuse(model, [begin], DiffuseSettings(n=50)))
    assert path.frames[-1] == pytest.approx(start.positions, abs=1e-4)
    assert np.abs(path.frames[25] - start.positions).max() > 1e-3


def test_elements_that_change_are_counted_and_ignored() -> None:
    """The network pulls every atom's features towards oxygen."""
    clean = features(torch.tensor([[8]]), CONFIG)

    def answer(x: Tensor, h: Tensor, level: Tensor, graph: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), 40 * (h - clean)

    numbers = np.array([6, 1, 8, 1, 8, 7], dtype=np.uint8)
    start = Start(numbers, _starts([6])[0].positions, 0)
    model = _model(network=_Known(answer))
    (path,) = _ok(diffuse(model, [start], DiffuseSettings(n=50, protocol="published")))
    assert path.changed_elements == 4
    (path,) = _ok(diffuse(model, [start], DiffuseSettings(n=50, protocol="deterministic")))
    assert path.changed_elements == 0


def test_the_deterministic_protocol_shows_the_network_clean_features() -> None:
    seen = []

    def answer(x: Tensor, h: Tensor, level: Tensor, graph: Any) -> tuple[Tensor, Tensor]:
        assert graph is None
        seen.append(h.clone())
        return torch.zeros_like(x), torch.ones_like(h)

    start = _starts([7])[0]
    diffuse(_model(network=_Known(answer)), [start], DiffuseSettings(n=5))
    assert len(seen) == 6
    for h in seen:
        assert elements_of(h, CONFIG)[0].tolist() == start.numbers.tolist()
        assert torch.equal(h, seen[0])


def test_an_unknown_element_is_named_and_its_neighbours_go_on() -> None:
    starts = _starts([5, 5, 5])
    starts[1] = Start(np.array([6, 16, 1, 35, 1], np.uint8), starts[1].positions, 0)
    results = diffuse(_model(), starts, DiffuseSettings(n=3))
    assert isinstance(results[1], InputError)
    assert "S, Br" in str(results[1])
    assert "H, C, N, O, F" in str(results[1])
    assert isinstance(results[0], DiffusionPath)
    assert isinstance(results[2], DiffusionPath)
    drugs = _model(ModelConfig(elements=DRUGS_ELEMENTS, charge_channel=False, hidden=32, layers=2))
    _ok(diffuse(drugs, starts, DiffuseSettings(n=3)))


def test_nan_is_an_error_of_its_molecule_alone() -> None:
    def answer(x: Tensor, h: Tensor, level: Tensor, graph: Any) -> tuple[Tensor, Tensor]:
        eps = torch.zeros_like(x)
        lost = (h[:, 0, :5].argmax(dim=-1) == 4) & (level < 0.0045)
        eps[lost] = float("nan")
        return eps, torch.zeros_like(h)

    starts = _starts([6, 6, 6])
    for index, first in enumerate((6, 9, 7)):
        starts[index].numbers[0] = first
    results = diffuse(_model(network=_Known(answer)), starts, DiffuseSettings(n=8))
    assert isinstance(results[1], NotFiniteError)
    # Level 4 is the first that the network answers with NaN; the frame after it is that of n = 3.
    assert "n = 3" in str(results[1])
    assert isinstance(results[0], DiffusionPath)
    assert isinstance(results[2], DiffusionPath)


def test_nan_at_the_start_is_an_error_at_once() -> None:
    starts = _starts([6, 6])
    starts[0].positions[2, 1] = np.nan
    first, second = diffuse(_model(), starts, DiffuseSettings(n=2))
    assert isinstance(first, NotFiniteError)
    assert isinstance(second, DiffusionPath)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_batch_out_of_memory_is_halved_until_it_fits(error: Exception) -> None:
    sizes = []

    def answer(x: Tensor, h: Tensor, level: Tensor, graph: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(x))
        if len(x) > 2 or x.shape[1] == 9:
            raise error
        return 0.1 * x, torch.zeros_like(h)

    starts = _starts([6] * 7 + [9])
    model = _model(network=_Known(answer))
    results = diffuse(model, starts, DiffuseSettings(n=4), batch_pairs=10**6)
    assert isinstance(results[7], ResourceError)
    assert "9 atoms" in str(results[7])
    assert max(sizes) == 7
    for start, path in zip(starts[:7], _ok(results[:7]), strict=True):
        assert path.frames[0] == pytest.approx(start.positions, abs=1e-5)
        centred = start.positions - start.positions.mean(axis=0)
        ratio = (path.frames[-1] - start.positions.mean(axis=0))[0] / centred[0]
        assert ratio == pytest.approx(np.full(3, ratio[0]), abs=1e-3)


def test_other_errors_of_the_network_are_not_hidden() -> None:
    def answer(*inputs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        diffuse(_model(network=_Known(answer)), _starts([4]), DiffuseSettings(n=2))


def test_memory_limit_bounds_the_batches() -> None:
    sizes = []

    def answer(x: Tensor, h: Tensor, level: Tensor, graph: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(x))
        return torch.zeros_like(x), torch.zeros_like(h)

    model, starts = _model(network=_Known(answer)), _starts([10] * 12)
    _ok(diffuse(model, starts, DiffuseSettings(n=1), memory_limit=10**9, batch_pairs=10**9))
    assert max(sizes) == 12
    sizes.clear()
    _ok(diffuse(model, starts, DiffuseSettings(n=1), memory_limit=500_000, batch_pairs=10**9))
    assert 1 <= max(sizes) < 6


def test_reduced_precision_stays_close() -> None:
    model, starts = _model(), _starts([12, 12])
    exact = _ok(diffuse(model, starts, DiffuseSettings(n=20)))
    before = torch.get_float32_matmul_precision()
    for precision, tolerance in (("tf32", 1e-2), ("bfloat16", 0.1)):
        settings = DiffuseSettings(n=20, precision=precision)  # type: ignore[arg-type]
        for one, other in zip(exact, _ok(diffuse(model, starts, settings)), strict=True):
            assert other.frames == pytest.approx(one.frames, abs=tolerance)
    assert torch.get_float32_matmul_precision() == before


def test_impossible_settings_are_refused() -> None:
    for wrong, says in (
        ({"n": 0}, "n = 0"),
        ({"n": 5, "protocol": "magic"}, "magic"),
        ({"n": 5, "precision": "float8"}, "float8"),
    ):
        with pytest.raises(InputError, match=says):
            DiffuseSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1000 diffusion steps"):
        diffuse(_model(), [], DiffuseSettings(n=1001))


def test_shapes_that_do_not_fit_are_refused() -> None:
    start = Start(np.array([1, 1], np.uint8), np.zeros((3, 3)), 0)
    (result,) = diffuse(_model(), [start], DiffuseSettings(n=1))
    assert isinstance(result, InputError)


def test_noising_follows_the_schedule() -> None:
    schedule = Schedule(1000, 1e-5)
    x, h = torch.ones(2, 3, 3), torch.ones(2, 3, 6)
    eps_x, eps_h = torch.full_like(x, 2.0), torch.full_like(h, -1.0)
    level = torch.tensor([0, 700])
    z_x, z_h = process.add_noise(schedule, x, h, level, eps_x, eps_h)
    for row, n in enumerate((0, 700)):
        alpha, sigma = schedule.alpha[n], schedule.sigma[n]
        assert z_x[row].numpy() == pytest.approx(np.full((3, 3), alpha + 2 * sigma), rel=1e-6)
        assert z_h[row].numpy() == pytest.approx(np.full((3, 6), alpha - sigma), rel=1e-5, abs=1e-6)
