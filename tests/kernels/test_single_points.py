"""Energies along a path: the same numbers as ASE's own, frame by frame, whatever some frames do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from numpy.typing import NDArray

from kernels.calculators import Rung, ladder, make_calculator
from kernels.errors import CollapsedError, InputError, ScfError
from kernels.single_points import SinglePoints, init, single_points

# GFN2-xTB's SCF converges energies to about 1e-7 hartree, from whatever charges it starts.
ENERGY_EV = 1e-5
FORCE_EV_PER_A = 1e-3


def make(**changes: Any) -> Any:
    return make_calculator("GFN2-xTB", program="tblite", **changes)


def ethanol_path(frames: int = 5) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Ethanol that swells by 5 % along the path."""
    atoms: Atoms = molecule("CH3CH2OH")
    swollen = np.linspace(1.0, 1.05, frames)[:, None, None] * atoms.positions
    return atoms.numbers.astype(np.uint8), swollen


@pytest.fixture
def path(require_engine: Callable[[str], None]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    require_engine("tblite")
    return ethanol_path()


def test_every_frame_has_the_energy_it_has_alone(
    path: tuple[NDArray[np.uint8], NDArray[np.float64]],
) -> None:
    from tblite.ase import TBLite

    numbers, frames = path
    found = single_points(numbers, frames, make)
    for at, xyz in enumerate(frames):
        atoms = Atoms(numbers=numbers, positions=xyz)
        atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
        assert found.energies[at] == pytest.approx(atoms.get_potential_energy(), abs=ENERGY_EV)
        assert np.abs(found.forces[at] - atoms.get_forces()).max() < FORCE_EV_PER_A
        assert found.fmax[at] == pytest.approx(
            np.linalg.norm(atoms.get_forces(), axis=1).max(), abs=FORCE_EV_PER_A
        )
    # Forces are the slope of the energies: along the swelling, 1.25 % from frame to frame.
    slope = -np.einsum("ij,ij->", found.forces[2], frames[3] - frames[1]) / 2
    assert (found.energies[3] - found.energies[1]) / 2 == pytest.approx(slope, rel=0.05)


def test_a_collapsed_frame_costs_itself_alone(
    path: tuple[NDArray[np.uint8], NDArray[np.float64]],
) -> None:
    numbers, frames = path
    frames[1, 1] = frames[1, 0] + 0.01
    frames[3, 0] = np.nan
    found = single_points(numbers, frames, make)
    assert np.isfinite(found.energies).tolist() == [True, False, True, False, True]
    assert np.isnan(found.fmax[1])
    assert list(found.problems) == [1, 3]
    assert "collapsed" in found.problems[1]
    assert found.energies[4] == pytest.approx(
        single_points(numbers, frames[4:], make).energies[0], abs=ENERGY_EV
    )


def test_a_path_of_nothing_but_failures_fails(
    path: tuple[NDArray[np.uint8], NDArray[np.float64]],
) -> None:
    numbers, frames = path
    with pytest.raises(CollapsedError):
        single_points(numbers, 0.1 * frames, make)
    with pytest.raises(InputError, match="multiplicity"):
        single_points(numbers, frames, lambda **changes: make(multiplicity=2, **changes))


def test_a_stopped_path_goes_on_to_the_same_numbers(
    path: tuple[NDArray[np.uint8], NDArray[np.float64]],
) -> None:
    numbers, frames = path
    whole = single_points(numbers, frames, make)
    for stop in range(1, len(frames)):
        part = single_points(numbers, frames, make, on_frame=lambda s, n=stop: s.done < n)
        assert part.done == stop
        assert np.isnan(part.energies[stop:]).all()
        saved = SinglePoints.from_arrays(part.to_arrays())
        rest = single_points(numbers, frames, make, state=saved)
        assert np.array_equal(rest.energies, whole.energies)
        assert np.array_equal(rest.forces, whole.forces)


class _Stubborn:
    """Converges nowhere without damping, and nowhere at all beyond x = 2."""

    def __init__(self, log: list[dict[str, Any]], changes: dict[str, Any]) -> None:
        self.log, self.changes = log, changes

    def evaluate(self, numbers: Any, xyz: NDArray[np.float64]) -> tuple[float, Any]:
        self.log.append(self.changes)
        if not self.changes or xyz[0, 0] > 2:
            raise ScfError("no convergence")
        return float(xyz[0, 0]), np.zeros_like(xyz)


def test_rungs_help_without_a_change_of_the_surface() -> None:
    log: list[dict[str, Any]] = []
    rungs: tuple[Rung, ...] = ladder("GFN2-xTB", "tblite")
    frames = np.array([0.5, 1.5, 2.5])[:, None, None] * np.array([[[1.0, 0.0, 0.0]]])
    found = single_points(
        np.array([2], np.uint8), frames, lambda **changes: _Stubborn(log, changes), rungs
    )
    assert found.energies[:2].tolist() == [0.5, 1.5]
    assert np.isnan(found.energies[2])
    assert found.problems == {2: "no convergence"}
    assert found.ladder == (rungs[0].name,)
    assert all("electronic_temperature" not in changes for changes in log)


def test_nothing_is_known_at_first() -> None:
    state = init(np.zeros((3, 2, 3)))
    assert state.done == 0
    assert np.isnan(state.energies).all()
    assert state.forces.shape == (3, 2, 3)
