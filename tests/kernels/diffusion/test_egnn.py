from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.published_edm import PublishedEdm
from kernels.diffusion.egnn import Egnn, ModelConfig, Packing, build, elements_of, features
from kernels.diffusion.published import renamed
from kernels.errors import InputError

SMALL = ModelConfig(hidden=64, layers=4)
VARIANTS = {
    "published": SMALL,
    "no attention": replace(SMALL, attention=False),
    "no tanh": replace(SMALL, tanh=False, coords_range=3.0),
    "two sublayers": replace(SMALL, inv_sublayers=2),
    "normalised sums": replace(SMALL, normalization_factor=10.0, norm_constant=0.5),
}


def _molecules(config: ModelConfig, n_atoms: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_atoms)
    x = 1.5 * torch.randn(batch, n_atoms, 3, generator=generator)
    known = torch.tensor(config.elements)
    numbers = known[torch.randint(len(known), (batch, n_atoms), generator=generator)]
    h = features(numbers, config) + 0.1 * torch.randn(
        batch, n_atoms, config.n_features, generator=generator
    )
    return x, h, torch.linspace(0.1, 0.9, batch)


def _pair_of_networks(config: ModelConfig) -> tuple[PublishedEdm, torch.nn.Module]:
    """The literal network and ours, with the same weights."""
    torch.manual_seed(1)
    literal = PublishedEdm(config)
    for name, parameter in literal.named_parameters():
        if name.endswith("coord_mlp.4.weight"):
            # Drawn like other layers, it would throw the atoms about.
            parameter.data *= 0.05
    ours = build(config)
    ours.load_state_dict(renamed(literal.state_dict(), config, "test"))
    return literal, ours


@pytest.mark.parametrize("name", VARIANTS)
def test_the_network_is_the_published_one(name: str) -> None:
    """Against padded, masked, concatenated pairs; 19 atoms of which the literal one sees 24."""
    config = VARIANTS[name]
    literal, ours = _pair_of_networks(config)
    x, h, level = _molecules(config, 19)
    padded_x, padded_h = torch.zeros(3, 24, 3), torch.zeros(3, 24, config.n_features)
    padded_x[:, :19], padded_h[:, :19] = x, h
    real = torch.zeros(3, 24, 1)
    real[:, :19] = 1
    with torch.no_grad():
        expected_x, expected_h = literal(padded_x, padded_h, level, real)
        found_x, found_h = ours(x, h, level)
    assert expected_x.abs().max() > 0.05
    for found, expected in ((found_x, expected_x), (found_h, expected_h)):
        scale = max(1.0, float(expected.abs().max()))
        assert torch.allclose(found, expected[:, :19], atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_and_inference_compute_the_same(name: str) -> None:
    _, ours = _pair_of_networks(VARIANTS[name])
    x, h, level = _molecules(VARIANTS[name], 12)
    trained = ours(x, h, level)
    with torch.inference_mode():
        used = ours(x, h, level)
    for one, other in zip(trained, used, strict=True):
        assert torch.allclose(one, other, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_molecules_of_several_sizes_packed_together_are_as_alone(grad: bool) -> None:
    _, ours = _pair_of_networks(SMALL)
    assert isinstance(ours, Egnn)
    parts = [_molecules(SMALL, size, batch) for batch, size in ((2, 1), (3, 7), (1, 19))]
    flat = [
        torch.cat([part.flatten(0, 1) for part in column])
        for column in list(zip(*parts, strict=True))[:2]
    ]
    level = torch.cat([level.repeat_interleave(x.shape[1]) for x, _, level in parts])
    packing = Packing([(2, 1), (3, 7), (1, 19)], torch.device("cpu"))
    with torch.inference_mode(not grad):
        found = ours.packed(*flat, level, packing)
        alone = [ours(*part) for part in parts]
    for one, expected in zip(found, zip(*alone, strict=True), strict=True):
        together = torch.cat([part.flatten(0, 1) for part in expected])
        assert torch.allclose(one, together, atol=2e-6, rtol=1e-5)


def test_gradients_are_those_of_the_literal_network() -> None:
    literal, ours = _pair_of_networks(SMALL)
    x, h, level = _molecules(SMALL, 9)
    for network, more in ((literal, (torch.ones(3, 9, 1),)), (ours, ())):
        eps_x, eps_h = network(x, h, level, *more)
        (eps_x.square().mean() + eps_h.square().mean()).backward()
    theirs = renamed(
        {name: p.grad for name, p in literal.named_parameters()},  # type: ignore[misc]
        SMALL,
        "test",
    )
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        scale = float(theirs[name].abs().max())
        assert torch.allclose(parameter.grad, theirs[name], atol=1e-4 * scale, rtol=0), name


@pytest.mark.parametrize("name", VARIANTS)
def test_rotation_reflection_translation_permutation(name: str) -> None:
    config = VARIANTS[name]
    _, ours = _pair_of_networks(config)
    network = ours.double()
    x, h, level = (t.double() for t in _molecules(config, 15))
    random = np.random.default_rng(3)
    q, _ = np.linalg.qr(random.normal(size=(3, 3)))
    order = torch.from_numpy(random.permutation(15))
    with torch.inference_mode():
        eps_x, eps_h = network(x, h, level)
        assert eps_x.abs().max() > 0.05
        for sign in (1.0, -1.0):
            turn = sign * torch.from_numpy(q)
            shift = torch.tensor([3.0, -2.0, 7.0], dtype=torch.float64)
            moved_x, moved_h = network((x @ turn + shift)[:, order], h[:, order], level)
            assert torch.allclose(moved_x, (eps_x @ turn)[:, order], atol=1e-9, rtol=0)
            assert torch.allclose(moved_h, eps_h[:, order], atol=1e-9, rtol=0)
    assert eps_x.mean(dim=1).abs().max() < 1e-12


def test_equivariance_holds_to_float_precision() -> None:
    _, network = _pair_of_networks(SMALL)
    x, h, level = _molecules(SMALL, 20)
    q, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))
    turn = torch.from_numpy(q).float()
    with torch.inference_mode():
        eps_x, eps_h = network(x, h, level)
        turned_x, turned_h = network(x @ turn, h, level)
    assert torch.allclose(turned_x, eps_x @ turn, atol=3e-5 * float(eps_x.abs().max()), rtol=0)
    assert torch.allclose(turned_h, eps_h, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_atoms", [1, 2])
def test_the_smallest_molecules_are_no_special_case(n_atoms: int) -> None:
    network = build(SMALL)
    x, h, level = _molecules(SMALL, n_atoms)
    eps_x, eps_h = network(x, h, level)
    assert torch.isfinite(eps_x).all()
    assert torch.isfinite(eps_h).all()
    if n_atoms == 1:
        assert eps_x.abs().max() == 0


def test_features_are_scaled_and_read_back() -> None:
    config = ModelConfig()
    numbers = torch.tensor([[1, 6, 7, 8, 9]])
    h = features(numbers, config)
    assert torch.equal(h[0, :, :5], 0.25 * torch.eye(5))
    assert h[0, :, 5].tolist() == pytest.approx([0.1, 0.6, 0.7, 0.8, 0.9])
    assert torch.equal(elements_of(h, config), numbers)
    with pytest.raises(InputError, match=r"\[16\]"):
        features(torch.tensor([[1, 16]]), config)


def test_a_configuration_survives_json_and_foreign_ones_are_refused() -> None:
    config = ModelConfig(size_histogram={18: 5, 19: 7}, options={"cutoff": 5.0})
    assert ModelConfig.from_json(config.to_json()) == config
    for text, says in (
        ('{"hiden": 3}', "hiden"),
        ('{"architecture": "gpt"}', "gpt"),
        ('{"elements": [1, 1]}', "repeat"),
        ("[1", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"hidden": 0}', "hidden"),
    ):
        with pytest.raises(InputError, match=says):
            ModelConfig.from_json(text)
