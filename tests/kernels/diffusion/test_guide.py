"""Basin's own model: the terms it sees, its symmetries, and the way it guides a relaxation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import ModelConfig, build, features
from kernels.diffusion.guide import Guide
from kernels.diffusion.process import DiffuseSettings, DiffusionPath, Start, diffuse
from kernels.diffusion.refiner import objective, terms
from kernels.diffusion.schedule import Schedule
from kernels.diffusion.training import TrainSettings
from kernels.embedding import embed
from kernels.errors import InputError, NotFiniteError
from kernels.forcefield import Surface, minimise
from kernels.graph import bond_orders, rdkit_molecule

CONFIG = ModelConfig(architecture="basin", hidden=32, layers=2)
MOLECULES = ("CC(=O)OC", "C1CC1C=O", "NCCO", "C#CCO", "OC1CC1", "CCO")


def _model(config: ModelConfig = CONFIG, network: nn.Module | None = None) -> Model:
    torch.manual_seed(3)
    network = (build(config) if network is None else network).eval().requires_grad_(False)
    schedule = Schedule(config.steps, config.precision)
    return Model(config, network, schedule, name="made up", digest="0" * 64)


class _Known(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return self.answer(x), torch.zeros_like(h)

    def gradient(self, x: Tensor, *_: Any) -> Tensor:
        return self.answer(x)


def _start(smiles: str) -> Start:
    made = embed(smiles, seed=1, max_attempts=50)
    positions = minimise(smiles, made.positions, max_steps=2000).positions
    return Start(made.numbers, positions, seed=1, smiles=smiles)


def _ok(results: list[Any]) -> list[DiffusionPath]:
    for result in results:
        assert isinstance(result, DiffusionPath), result
    return results


def _tensors(start: Start) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.from_numpy(start.positions - start.positions.mean(axis=0)).float()[None]
    h = features(torch.from_numpy(start.numbers.astype(np.int64))[None], CONFIG)
    return x, h, torch.from_numpy(bond_orders(start.smiles))[None]


@pytest.mark.parametrize("smiles", [*MOLECULES, "S(F)(F)(F)(F)(F)F", "C1CCC1", "[H][H]"])
def test_terms_are_those_that_rdkit_finds(smiles: str) -> None:
    """Bonds, paths of two and three bonds, and every pair that is farther apart."""
    molecule = rdkit_molecule(smiles)
    n_atoms = molecule.GetNumAtoms()
    distances = np.array(__import__("rdkit.Chem", fromlist=["x"]).GetDistanceMatrix(molecule))
    neighbours = [[a.GetIdx() for a in atom.GetNeighbors()] for atom in molecule.GetAtoms()]
    # Twice the same molecule: the second one's indices follow the first one's.
    graph = torch.from_numpy(np.stack([bond_orders(smiles)] * 2))
    found = terms(graph)
    bonds = {tuple(sorted(b)) for b in found.bonds.T.tolist() if max(b) < n_atoms}
    wanted = {tuple(sorted((b.GetBeginAtomIdx(), b.GetEndAtomIdx()))) for b in molecule.GetBonds()}
    assert bonds == wanted
    angles = {(min(i, j), k, max(i, j)) for i, k, j in found.angles.T.tolist() if k < n_atoms}
    assert angles == {
        (*sorted((i, j))[:1], k, *sorted((i, j))[1:])
        for k in range(n_atoms)
        for i, j in combinations(neighbours[k], 2)
    }
    torsions = [t for t in found.torsions.T.tolist() if max(t) < n_atoms]
    paths = {
        (i, k, m, j)
        for k, m in wanted
        for i in neighbours[k]
        for j in neighbours[m]
        if i != m and j != k and i != j
    }
    assert {min(tuple(t), tuple(t[::-1])) for t in torsions} == {min(p, p[::-1]) for p in paths}
    assert len(torsions) == len(paths)
    contacts = {tuple(sorted(c)) for c in found.contacts.T.tolist() if max(c) < n_atoms}
    assert contacts == {
        (i, j) for i in range(n_atoms) for j in range(i + 1, n_atoms) if distances[i, j] > 3
    }
    assert found.bonds.shape[1] == 2 * len(wanted)


def test_equivariance_and_balance() -> None:
    """Turned, mirrored, shifted and renumbered molecules give turned, mirrored ... gradients."""
    network = _model().network
    random = np.random.default_rng(0)
    for smiles in MOLECULES:
        x, h, graph = _tensors(_start(smiles))
        level = torch.zeros(1)
        found = network(x, h, level, graph)[0]
        assert found.abs().max() > 1e-3
        turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
        rotation = torch.from_numpy(turn).float()
        turned = network(x @ rotation + 2.0, h, level, graph)[0]
        torch.testing.assert_close(turned, found @ rotation, atol=2e-5, rtol=1e-4)
        order = torch.from_numpy(random.permutation(x.shape[1]))
        renumbered = network(x[:, order], h[:, order], level, graph[:, order][:, :, order])[0]
        torch.testing.assert_close(renumbered, found[:, order], atol=2e-5, rtol=1e-4)
        assert found.sum(dim=1).abs().max() < 1e-5
        assert torch.linalg.cross(x, found).sum(dim=1).abs().max() < 1e-4


def test_the_true_gradient_leads_back_to_the_minimum() -> None:
    """Where the network tells the force field's gradient at a geometry, the path ends there."""
    start = _start("CC(=O)OC")
    random = np.random.default_rng(1)
    target = start.positions + 0.004 * random.normal(size=start.positions.shape)
    gradient = Surface(start.smiles, target).gradient(target)
    model = _model(network=_Known(lambda x: torch.from_numpy(gradient).float().expand_as(x)))
    (path,) = _ok(diffuse(model, [start], DiffuseSettings(n=50)))
    # Bonds and angles; torsions softer than the guide goes by take longer.
    begin, wanted, end = (
        np.linalg.norm(x[:, None] - x[None], axis=-1)
        for x in (start.positions, target, path.frames[-1])
    )
    near = wanted < 2.6
    assert np.abs(end - wanted)[near].max() < 0.1 * np.abs(begin - wanted)[near].max()


def test_a_result_is_the_same_alone_and_in_any_batch() -> None:
    """To 1e-5 Å over 50 steps in float32."""
    model = _model()
    starts = [_start(smiles) for smiles in ("NCCO", "CC(=O)OC", "CCOC", "NCCO", "COCO")]
    together = _ok(diffuse(model, starts, DiffuseSettings(n=50), batch_pairs=10**6))
    for start, path in zip(starts, together, strict=True):
        (alone,) = _ok(diffuse(model, [start], DiffuseSettings(n=50)))
        assert path.frames == pytest.approx(alone.frames, abs=1e-5)
        assert path.levels.tolist() == list(range(50, -1, -1))
        assert np.abs(path.frames[-1] - path.frames[0]).max() > 1e-3


def test_failures_are_each_molecules_own() -> None:
    calls: list[int] = []

    def answer(x: Tensor) -> Tensor:
        calls.append(len(x))
        spoilt = torch.zeros_like(x)
        if len(calls) == 3:
            spoilt[len(x) // 2] = torch.nan
        return spoilt

    good = _start("NCCO")
    bare = Start(good.numbers, good.positions, 0)
    iodide = _start("NCCI")
    heap = Start(good.numbers, np.zeros_like(good.positions), 0, good.smiles)
    results = diffuse(
        _model(network=_Known(answer)), [good, bare, good, iodide, heap], DiffuseSettings(n=5)
    )
    assert isinstance(results[0], DiffusionPath)
    assert isinstance(results[1], InputError)
    assert "no SMILES is known" in str(results[1])
    assert isinstance(results[2], NotFiniteError)
    assert "n = 2" in str(results[2])
    assert isinstance(results[3], InputError)
    assert "element I is unknown" in str(results[3])
    assert isinstance(results[4], NotFiniteError)
    assert "atoms coincide" in str(results[4])


def test_the_published_protocol_is_refused() -> None:
    with pytest.raises(InputError, match="predicts minima and no noise"):
        diffuse(_model(), [_start("CCO")], DiffuseSettings(n=5, protocol="published"))


def test_the_loss_is_the_energy_of_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the quadratic form written out, for a wrong answer of known size."""
    n_atoms = 4
    random = np.random.default_rng(5)
    half = random.normal(size=(2, 3 * n_atoms, 3 * n_atoms))
    inverse: NDArray[Any] = half @ half.transpose(0, 2, 1)
    wrong = random.normal(size=(2, n_atoms, 3))
    batch = {
        "numbers": torch.full((2, n_atoms), 6),
        "positions": torch.zeros(2, n_atoms, 3),
        "displaced": torch.zeros(2, n_atoms, 3),
        "gradient": torch.zeros(2, n_atoms, 3),
        "compliance": torch.from_numpy(
            inverse.reshape(2, n_atoms, 3, n_atoms, 3).transpose(0, 1, 3, 2, 4).copy()
        ).float(),
        "bonds": torch.zeros(2, n_atoms, n_atoms, dtype=torch.long),
        "level": torch.tensor([3, 9]),
    }
    network = _Known(lambda x: torch.from_numpy(wrong).float())
    loss = objective(
        network, Schedule(1000, 1e-5), CONFIG, batch, torch.Generator(), TrainSettings(epochs=1)
    )
    flat = wrong.reshape(2, -1)
    energy = 0.5 * np.einsum("bi,bij,bj->b", flat, inverse, flat)
    expected = np.sqrt(energy + 0.002 * (flat**2).mean(axis=1) + 1e-6)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5)


def test_where_atoms_coincide_a_guide_takes_the_curvature_of_the_start() -> None:
    """Not the last one it looked at, which would depend on where a chain was cut."""
    start = _start("CCO")
    guide = Guide(start.smiles, start.positions)
    first = guide.compliance
    guide.look(start.positions * 1.02)
    assert not np.array_equal(guide.compliance, first)
    guide.look(np.zeros_like(start.positions))
    assert np.array_equal(guide.compliance, first)
