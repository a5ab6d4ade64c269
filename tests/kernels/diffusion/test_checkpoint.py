import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kernels.diffusion import checkpoint
from kernels.diffusion.egnn import ModelConfig, build
from kernels.errors import InputError

CONFIG = ModelConfig(hidden=16, layers=2, steps=100, size_histogram={9: 3})


def _saved(path: Path, **more: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    weights = build(CONFIG).state_dict()
    checkpoint.save(path, CONFIG, weights, {"data": "QM9", "losses": [1.5, 0.5]}, **more)  # type: ignore[arg-type]
    return weights


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "small.safetensors"
    weights = _saved(path)
    model = checkpoint.load(path)
    assert model.config == CONFIG
    assert model.card == {"data": "QM9", "losses": [1.5, 0.5]}
    assert (model.name, model.schedule.steps) == ("small", 100)
    assert model.digest == checkpoint.digest(path)
    assert len(model.digest) == 64
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert [entry.name for entry in path.parent.iterdir()] == ["small.safetensors"]


def test_half_precision_halves_the_file_and_is_loaded_as_float32(tmp_path: Path) -> None:
    _saved(tmp_path / "full.safetensors")
    weights = _saved(tmp_path / "half.safetensors", dtype="float16")
    half = checkpoint.load(tmp_path / "half.safetensors")
    for name, tensor in half.network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, weights[name], rtol=1e-3, atol=1e-6)
    full_size, half_size = (
        (tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")
    )
    assert half_size < 0.7 * full_size


def test_the_digest_tells_weights_apart(tmp_path: Path) -> None:
    weights = _saved(tmp_path / "a.safetensors")
    weights["readout.bias"] = weights["readout.bias"] + 1e-6
    checkpoint.save(tmp_path / "b.safetensors", CONFIG, weights, {})
    assert checkpoint.digest(tmp_path / "a.safetensors") != checkpoint.digest(
        tmp_path / "b.safetensors"
    )


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    weights = build(CONFIG).state_dict()
    weights["readout.bias"][0] = 1e6
    with pytest.raises(InputError, match=r"readout\.bias.*float16"):
        checkpoint.save(tmp_path / "a.safetensors", CONFIG, weights, {}, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_nowhere_is_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"'qm8'.*neither a file nor a shipped model"):
        checkpoint.load("qm8")


def test_every_shipped_model_loads_and_has_a_card() -> None:
    for name in checkpoint.shipped():
        path = checkpoint.find(name)
        assert checkpoint.load(name).name == name
        assert len(path.with_suffix(".md").read_text()) > 500


def _rewritten(path: Path, **changes: str) -> Path:
    weights = _saved(path)
    metadata = {
        "format": checkpoint.FORMAT,
        "version": str(checkpoint.FORMAT_VERSION),
        "config": CONFIG.to_json(),
        "card": "{}",
    }
    save_file(weights, path, metadata=metadata | changes)
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "pt"}, "not one of Basin's"),
        ({"version": "2"}, "format version '2'.*update Basin"),
        ({"version": "x"}, "format version 'x'"),
        ({"config": "{}"}, "weights do not fit"),
        ({"config": json.dumps({"wings": 2})}, "unknown settings"),
    ],
)
def test_foreign_and_newer_files_are_refused(
    tmp_path: Path, changes: dict[str, str], says: str
) -> None:
    path = _rewritten(tmp_path / "odd.safetensors", **changes)
    with pytest.raises(InputError, match=says) as caught:
        checkpoint.load(path)
    assert "odd.safetensors" in str(caught.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _saved(path)
    content = path.read_bytes()
    for damaged in (b"", b"hello", content[:-100], content[:50]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            checkpoint.load(path)
