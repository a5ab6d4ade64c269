import argparse
import os
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.published_edm import PublishedEdm
from kernels.diffusion import published
from kernels.diffusion.egnn import DRUGS_ELEMENTS, ModelConfig, build, features
from kernels.diffusion.schedule import Schedule
from kernels.errors import InputError

SETTINGS: dict[str, Any] = {
    "exp_name": "made_up", "model": "egnn_dynamics", "probabilistic_model": "diffusion",
    "diffusion_steps": 1000, "diffusion_noise_schedule": "polynomial_2",
    "diffusion_noise_precision": 1e-5, "nf": 32, "n_layers": 2, "inv_sublayers": 1, "tanh": True,
    "attention": True, "norm_constant": 1, "sin_embedding": False, "normalization_factor": 1,
    "aggregation_method": "sum", "dataset": "geom", "remove_h": False, "include_charges": False,
    "normalize_factors": [1, 4, 10], "context_node_nf": 0, "conditioning": [], "dp": True,
    "lr": 1e-4, "batch_size": 64, "current_epoch": 12, "ema_decay": 0.9999, "n_epochs": 3000,
}  # fmt: skip


def _pair(folder: Path, config: ModelConfig, prefix: str = "", **changes: Any) -> Path:
    """Write a published pair of a small network with `config`'s layout."""
    torch.manual_seed(4)
    state = PublishedEdm(config).state_dict()
    gamma = Schedule(config.steps, config.precision).gamma
    state["gamma.gamma"] = torch.from_numpy(gamma).float()
    state["buffer"] = torch.zeros(1)
    weights = folder / "generative_model_ema_12.npy"
    torch.save({prefix + name: tensor for name, tensor in state.items()}, weights)
    settings = argparse.Namespace(**(SETTINGS | changes))
    (folder / "args_12.pickle").write_bytes(pickle.dumps(settings))
    return weights


DRUGS = ModelConfig(elements=DRUGS_ELEMENTS, charge_channel=False, hidden=32, layers=2)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_layout_of_geom_drugs_is_imported(tmp_path: Path, prefix: str) -> None:
    config, weights, card = published.read(_pair(tmp_path, DRUGS, prefix))
    assert config == DRUGS
    assert config.n_features == 16
    assert card["epoch"] == 12
    network = build(config)
    network.load_state_dict(weights)
    torch.manual_seed(4)
    literal = PublishedEdm(DRUGS)
    numbers = torch.tensor([[6, 1, 1, 1, 80, 83, 53, 5]])
    x, h = torch.randn(1, 8, 3), features(numbers, config)
    level = torch.tensor([0.05])
    with torch.no_grad():
        found, expected = network(x, h, level), literal(x, h, level, torch.ones(1, 8, 1))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (ModelConfig(hidden=24, layers=3, steps=500), {"dataset": "qm9", "include_charges": True}),
        (
            ModelConfig(hidden=24, layers=1, inv_sublayers=2, charge_channel=False, precision=1e-4),
            {"dataset": "qm9_second_half"},
        ),
        (
            ModelConfig(elements=DRUGS_ELEMENTS[1:], hidden=24, layers=2, attention=False,
                        tanh=False, charge_channel=False, normalization_factor=10.0),
            {"remove_h": True, "tanh": False, "normalization_factor": 10},
        ),
    ],
)  # fmt: skip
def test_sizes_come_from_the_checkpoint(
    tmp_path: Path, config: ModelConfig, changes: dict[str, Any]
) -> None:
    changes |= {
        "diffusion_steps": config.steps,
        "diffusion_noise_precision": config.precision,
        # Wrong on purpose: what the weights say counts.
        "nf": 999,
        "n_layers": 999,
    }
    found, weights, _ = published.read(_pair(tmp_path, config, **changes))
    assert found.size_histogram.keys() <= set(range(3, 30))
    assert found.to_json().split('"size_hist')[0] == config.to_json().split('"size_hist')[0]
    build(found).load_state_dict(weights)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"include_charges": True}, "16 features, but the settings mean 17"),
        ({"dataset": "qm9"}, "16 features, but the settings mean 5"),
        ({"dataset": "cifar"}, "'cifar'"),
        ({"diffusion_steps": 500}, "diffusion_steps = 500"),
        ({"diffusion_noise_precision": 1e-3}, "noise schedule differs"),
        ({"diffusion_noise_schedule": "cosine"}, "cosine"),
        ({"aggregation_method": "mean"}, "mean"),
        ({"sin_embedding": True}, "sin_embedding"),
        ({"context_node_nf": 1}, "context_node_nf"),
        ({"model": "gnn_dynamics"}, "gnn_dynamics"),
        ({"tanh": "yes"}, "tanh"),
        ({"normalize_factors": [1, 4]}, "normalize_factors"),
    ],
)
def test_settings_that_contradict_the_weights_are_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        published.read(_pair(tmp_path, DRUGS, **changes))


def test_weights_with_missing_or_foreign_tensors_are_refused(tmp_path: Path) -> None:
    path = _pair(tmp_path, DRUGS)
    state = torch.load(path, weights_only=True)
    name = "dynamics.egnn.e_block_1.gcl_equiv.coord_mlp.2.bias"
    kept = state.pop(name)
    torch.save(state, path)
    with pytest.raises(InputError, match=name):
        published.read(path)
    torch.save(state | {name: kept, "extra": kept}, path)
    with pytest.raises(InputError, match="extra"):
        published.read(path)


class _Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def _evil_pickles(trace: Path) -> list[bytes]:
    hidden = argparse.Namespace(**SETTINGS)
    hidden.lr = _Evil(trace)
    touch = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    return [
        *(pickle.dumps(_Evil(trace), protocol) for protocol in (0, 2, 4)),
        pickle.dumps(hidden),
        # By name with a dot, through a builtin, and through what argparse itself imports.
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93" + pickle.dumps(touch, 0)[:-1] + b"\x85R.",
        b"\x80\x04\x8c\x08argparse\x8c\x0a_os.system\x93" + b"\x8c\x04true\x85R.",
        b"cargparse\n_sys\n.",
    ]


@pytest.mark.parametrize("number", range(7))
def test_a_malicious_settings_file_is_refused_without_running(tmp_path: Path, number: int) -> None:
    trace = tmp_path / "trace"
    content = _evil_pickles(trace)[number]
    if number < 5:
        # The file does harm where it is believed; else this test would prove nothing.
        pickle.loads(content)
        assert trace.exists()
        trace.unlink()
    path = tmp_path / "args.pickle"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"refers to (posix|nt|builtins|argparse)\.\w+"):
        published.read_settings(path)
    assert not trace.exists()


def test_a_settings_file_cannot_reach_the_real_namespace(tmp_path: Path) -> None:
    """A pickle may set attributes of a class that it names."""
    path = tmp_path / "args.pickle"
    path.write_bytes(
        b"\x80\x04\x8c\x08argparse\x8c\x09Namespace\x93N}\x8c\x08poisoned\x8c\x03yess\x86b."
    )
    with pytest.raises(InputError, match=r"not an argparse\.Namespace"):
        published.read_settings(path)
    assert not hasattr(argparse.Namespace, "poisoned")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04}.", b"x" * 1_000_001])
def test_what_is_no_settings_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "args.pickle"
    path.write_bytes(content)
    with pytest.raises(InputError, match="settings"):
        published.read_settings(path)


def test_malicious_weights_are_refused_without_running(tmp_path: Path) -> None:
    path = _pair(tmp_path, DRUGS)
    trace = tmp_path / "trace"
    torch.save({"dynamics": _Evil(trace)}, path)
    with pytest.raises(InputError, match="tensors alone"):
        published.read(path)
    assert not trace.exists()


def test_settings_are_found_beside_the_weights_or_asked_for(tmp_path: Path) -> None:
    weights = tmp_path / "generative_model_ema.npy"
    with pytest.raises(InputError, match=r"args\.pickle"):
        published.settings_beside(weights)
    (tmp_path / "args.pickle").touch()
    assert published.settings_beside(weights).name == "args.pickle"
    (tmp_path / "args_5150.pickle").touch()
    epoch = tmp_path / "generative_model_ema_5150.npy"
    assert published.settings_beside(epoch).name == "args_5150.pickle"


def test_a_real_checkpoint_predicts_noise_as_well_as_it_should(shared_data: Path) -> None:
    """Mean squared error per coordinate, averaged over molecules; zero would give about 0.94."""
    folder = shared_data / "edm_checkpoint"
    config, weights, _ = published.read(next(folder.glob("*_ema.npy")))
    assert (config.hidden, config.layers, config.steps, config.n_features) == (128, 5, 200, 6)
    network = build(config)
    network.load_state_dict(weights)
    schedule = Schedule(config.steps, config.precision)
    data = np.load(shared_data / "qm9" / "qm9_b3lyp_geometries.npz")
    rows = defaultdict(list)
    for row in np.flatnonzero(data["gdb9_id"] % 10 == 0)[::6]:
        rows[int(data["num_atoms"][row])].append(row)
    generator = torch.Generator().manual_seed(0)
    for fraction, expected in ((0.05, 0.63), (0.2, 0.60), (0.5, 0.64), (0.8, 0.23)):
        n = round(fraction * config.steps)
        alpha, sigma = float(schedule.alpha[n]), float(schedule.sigma[n])
        errors: list[float] = []
        for size, members in rows.items():
            x = torch.from_numpy(data["positions"][members, :size]).float()
            x = x - x.mean(dim=1, keepdim=True)
            h = features(torch.from_numpy(data["numbers"][members, :size].astype("i8")), config)
            eps_x = torch.randn(x.shape, generator=generator)
            eps_x = eps_x - eps_x.mean(dim=1, keepdim=True)
            eps_h = torch.randn(h.shape, generator=generator)
            with torch.inference_mode():
                found, _ = network(
                    alpha * x + sigma * eps_x,
                    alpha * h + sigma * eps_h,
                    torch.full((len(members),), n / config.steps),
                )
            errors += (found - eps_x).square().mean(dim=(1, 2)).tolist()
        assert np.mean(errors) == pytest.approx(expected, abs=0.035)
