"""Alignment of displacements, forces and the way to the minimum, where the answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from orchestrator.alignment import align, cosines, displacements, of_path, superpose, towards
from orchestrator.paths import walks
from tests.orchestrator.diffusion_stores import Study

Floats = NDArray[np.float64]
RNG = np.random.default_rng(5)


def shape(n_atoms: int = 7) -> Floats:
    return RNG.normal(scale=1.5, size=(n_atoms, 3))


def eckart(reference: Floats, moves: Floats) -> Floats:
    """Return moves (N, 3) without what they have of translation and of rotation of the reference.

    With such moves the best superposition of reference + moves on reference is none at all.
    """
    centred = reference - reference.mean(axis=0)
    rigid = [np.tile(axis, (len(reference), 1)) for axis in np.eye(3)]
    rigid += [np.cross(axis, centred) for axis in np.eye(3)]
    basis = np.linalg.qr(np.array(rigid).reshape(6, -1).T)[0]
    flat = moves.reshape(-1)
    return (flat - basis @ (basis.T @ flat)).reshape(-1, 3)


def turned(frames: Floats, *more: Floats) -> list[Floats]:
    """Turn and shift every frame differently; turn vectors that belong to them alike."""
    found = [np.empty_like(f) for f in (frames, *more)]
    for at in range(len(frames)):
        rotation = Rotation.random(rng=RNG).as_matrix()
        found[0][at] = frames[at] @ rotation.T + RNG.normal(size=3)
        for made, vectors in zip(found[1:], more, strict=True):
            made[at] = vectors[at] @ rotation.T
    return found


def test_a_turned_copy_falls_back_onto_itself() -> None:
    fixed = np.stack([shape() for _ in range(4)])
    (moved,) = turned(fixed)
    np.testing.assert_allclose(superpose(moved, fixed), fixed, atol=1e-12)
    np.testing.assert_allclose(superpose(moved[2], fixed[2]), fixed[2], atol=1e-12)


def test_a_mirror_image_stays_one() -> None:
    fixed = shape()
    found = superpose(fixed * [1, 1, -1], fixed)
    assert np.abs(found - fixed).max() > 0.5
    # Distances are kept: it was turned, not squeezed.
    np.testing.assert_allclose(
        np.linalg.norm(found[0] - found[1]), np.linalg.norm(fixed[0] - fixed[1])
    )


def test_flat_and_straight_molecules_superpose() -> None:
    for flat in (shape() * [1, 1, 0], shape(3) * [1, 0, 0], shape(2)):
        (moved,) = turned(flat[None])
        np.testing.assert_allclose(superpose(moved[0], flat), flat, atol=1e-10)


def test_superposition_is_the_closest_there_is() -> None:
    fixed, moving = shape(), shape()
    best = np.square(superpose(moving, fixed) - fixed).sum()
    for _ in range(200):
        rotation = Rotation.random(rng=RNG).as_matrix()
        other = (moving - moving.mean(axis=0)) @ rotation.T + fixed.mean(axis=0)
        assert np.square(other - fixed).sum() >= best


def test_moving_as_a_whole_is_no_displacement() -> None:
    frames = np.broadcast_to(shape(), (6, 7, 3)).copy()
    (moved,) = turned(frames)
    for ahead in (1, 3):
        np.testing.assert_allclose(displacements(moved, ahead), 0.0, atol=1e-12)
    assert displacements(moved, 6).shape == (0, 7, 3)
    np.testing.assert_allclose(towards(moved, frames[0]), 0.0, atol=1e-12)


def test_cosines_of_known_angles() -> None:
    a = np.array([[1.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 0]])
    b = np.array([[3.0, 0, 0], [1, np.sqrt(3), 0], [0, -1, 0], [1, 0, 0]])
    np.testing.assert_allclose(cosines(a, b)[:3], [1.0, 0.5, -1.0])
    assert np.isnan(cosines(a, b)[3])


def test_one_spring_for_all_directions_pulls_straight_home() -> None:
    # Every atom hangs on the same isotropic spring: forces, moves and the way home are one line.
    minimum = shape()
    away = eckart(minimum, RNG.normal(scale=0.1, size=minimum.shape))
    shares = np.linspace(1.0, 0.1, 15)[:, None, None]
    frames = minimum + shares * away
    forces = -2.0 * shares * away
    frames, forces = turned(frames, forces)
    found = of_path(frames, forces, minimum)
    for name in ("force, minimum", "move 1, force", "move 1, minimum", "move 10, minimum"):
        ahead = int(name.split()[1].rstrip(",")) if name.startswith("move") else 0
        np.testing.assert_allclose(found[name][: 15 - ahead], 1.0, atol=1e-9)
        assert np.isnan(found[name][15 - ahead :]).all()
    assert np.isnan(found["move 30, force"]).all()
    away_from_it = of_path(frames[::-1], forces[::-1], minimum)
    np.testing.assert_allclose(away_from_it["move 1, minimum"][:-1], -1.0, atol=1e-9)
    np.testing.assert_allclose(away_from_it["force, minimum"], 1.0, atol=1e-9)


def test_a_narrow_valley_tells_force_from_minimum() -> None:
    # Two normal modes of the whole molecule, one 50 times stiffer: the force points across the
    # valley, a straight walk along it to the minimum.
    minimum = shape(8)
    modes = np.linalg.qr(
        np.stack([eckart(minimum, RNG.normal(size=(8, 3))).reshape(-1) for _ in range(2)], axis=1)
    )[0].T.reshape(2, 8, 3)
    soft, stiff = 0.3 * modes[0], 0.1 * modes[1]
    walk = np.linspace(1.0, 0.2, 9)[:, None, None]
    forces = -(1.0 * walk * soft + 50.0 * walk * stiff)
    straight = of_path(minimum + walk * (soft + stiff), forces, minimum)
    np.testing.assert_allclose(straight["move 1, minimum"][:-1], 1.0, atol=1e-9)
    expected = cosines(soft + 50.0 * stiff, soft + stiff)
    np.testing.assert_allclose(straight["force, minimum"], np.tile(expected, (9, 1)), atol=1e-9)
    np.testing.assert_allclose(straight["move 1, force"][:-1], np.tile(expected, (8, 1)), atol=1e-9)
    assert np.abs(expected).min() < 0.99


def spring_forces(positions: Floats, minimum: Floats) -> Floats:
    """Return forces (N, 3) of springs of strength 1 between all pairs, at rest at the minimum."""
    vectors = positions[:, None] - positions[None]
    lengths = np.linalg.norm(vectors, axis=-1)
    rest = np.linalg.norm(minimum[:, None] - minimum[None], axis=-1)
    np.fill_diagonal(lengths, 1.0)
    pull = (1.0 - np.where(rest > 0, rest, 1.0) / lengths)[..., None] * vectors
    return -pull.sum(axis=1)


def test_steepest_descent_follows_the_force_and_not_the_straight_way() -> None:
    # Springs between atoms do not care how the molecule lies, like the real energy.
    minimum = shape(8)
    frames = [minimum + eckart(minimum, RNG.normal(scale=0.15, size=minimum.shape))]
    for _ in range(60):
        frames.append(frames[-1] + 0.005 * spring_forces(frames[-1], minimum))
    path = np.array(frames)
    forces = np.array([spring_forces(frame, minimum) for frame in frames])
    found = of_path(*turned(path, forces), minimum)
    np.testing.assert_allclose(found["move 1, force"][:-1], 1.0, atol=1e-9)
    # The move lies along the force, so the way home is as far off the one as off the other.
    np.testing.assert_allclose(
        found["move 1, minimum"][:-1], found["force, minimum"][:-1], atol=1e-9
    )
    assert np.mean(found["force, minimum"]) < 0.99
    # Over thirty steps the walk has turned with the valley.
    assert np.mean(found["move 30, minimum"][0]) > np.mean(found["move 1, minimum"][0])


def test_turning_the_frames_changes_nothing() -> None:
    frames = shape() + np.cumsum(RNG.normal(scale=0.05, size=(40, 7, 3)), axis=0)
    forces = RNG.normal(size=frames.shape)
    minimum = shape()
    still = of_path(frames, forces, minimum)
    moved = of_path(*turned(frames, forces), minimum @ Rotation.random(rng=RNG).as_matrix())
    for name, angles in still.items():
        np.testing.assert_allclose(moved[name], angles, atol=1e-8)


def test_mean_and_deviation_are_over_atoms_of_all_molecules(tmp_path: Path) -> None:
    study = Study()
    samples = []
    for name, smiles in (("ethanol", "CCO"), ("ethane", "CC"), ("broken", "CCC")):
        baseline = study.molecule(name, smiles=smiles)
        minimum = study.row("relaxations", baseline)["positions"]
        frames = minimum + np.cumsum(RNG.normal(scale=0.05, size=(21, *minimum.shape)), axis=0)
        frames = frames[::-1].astype(np.float32).astype(float)
        forces = RNG.normal(size=frames.shape).astype(np.float32).astype(float)
        path = study.diffuse(baseline, frames=frames, changed=name == "broken")
        study.points(path, np.linspace(5, 1, 21), minimum=baseline, forces=forces)
        if name != "broken":
            samples.append(of_path(frames, forces, minimum))
    (found,) = align(walks(study.store(tmp_path / "store")))
    assert (found.stage, found.n, found.molecules) == ("diffused-20", 20, 2)
    assert found.levels.tolist() == list(range(20, -1, -1))
    assert set(found.mean) == {
        "force, minimum", "move 1, force", "move 1, minimum", "move 10, force", "move 10, minimum",
    }  # fmt: skip
    for name, mean in found.mean.items():
        every = np.concatenate([sample[name] for sample in samples], axis=1)
        known = ~np.isnan(every[:, 0])
        np.testing.assert_allclose(mean[known], every.mean(axis=1)[known], atol=1e-6)
        np.testing.assert_allclose(
            found.deviation[name][known], every.std(axis=1)[known], atol=1e-6
        )
