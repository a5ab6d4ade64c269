"""Metropolis chains: the Boltzmann distribution where it is known, and runs cut to pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.calculators import make_calculator
from kernels.errors import CollapsedError, InputError, ScfError
from kernels.sampling.metropolis import (
    Arrays,
    ChainSettings,
    ChainState,
    Proposal,
    advance,
    init,
    published_step_size,
)
from kernels.units import BOLTZMANN_EV_PER_K
from tests.kernels.sampling.potentials import (
    Potential,
    double_well,
    double_well_probabilities,
    harmonic,
    mean_and_error,
)

Floats = NDArray[np.float64]

# A right answer is farther off than this once in 16 000 times.
STANDARD_ERRORS = 4.0

HYDROGENS = {n: np.ones(n, dtype=np.uint8) for n in (1, 2, 4)}


def run(
    numbers: NDArray[np.uint8],
    positions: Floats,
    calculator: Any,
    settings: ChainSettings,
    seed: int = 1,
    proposal: Proposal | None = None,
) -> ChainState:
    state = init(numbers, positions, calculator, settings, proposal)
    advance(state, numbers, calculator, settings, seed, until=settings.steps, proposal=proposal)
    return state


def kept(state: ChainState) -> Floats:
    """Energies after burn-in."""
    return state.energies[state.burn_in + 1 :]


def same(first: ChainState, second: ChainState) -> bool:
    one, other = first.to_arrays(), second.to_arrays()
    return one.keys() == other.keys() and all(
        value.tobytes() == other[name].tobytes() for name, value in one.items()
    )


def test_springs_have_the_energy_heat_capacity_and_spreads_of_equipartition() -> None:
    sites, springs = harmonic()
    temperatures = (150.0, 300.0)
    means = []
    for seed, temperature in enumerate(temperatures):
        settings = ChainSettings(temperature, 16_000, 1_000, save_every=1, tune=True)
        state = run(HYDROGENS[2], sites, springs, settings, seed)
        thermal = BOLTZMANN_EV_PER_K * temperature
        mean, error = mean_and_error(kept(state) / thermal)
        assert error < 0.12
        assert abs(mean - 6 / 2) < STANDARD_ERRORS * error
        # The variance of the energy is k_B T² times the heat capacity, here 6/2 k_B.
        capacity, error = mean_and_error((kept(state) / thermal - 6 / 2) ** 2)
        assert error < 0.4
        assert abs(capacity - 6 / 2) < STANDARD_ERRORS * error
        means.append(mean_and_error(kept(state)))
        exact = thermal / (5.0 * np.linspace(1.0, 4.0, 6).reshape(2, 3))
        moved = state.frames[1_001:].astype(np.float64) - sites
        squared, error = mean_and_error(moved**2 / exact)
        assert (np.abs(squared - 1) < STANDARD_ERRORS * error).all()
        assert (error < 0.15).all()
    (cold, cold_error), (hot, hot_error) = means
    per_kelvin = (temperatures[1] - temperatures[0]) * BOLTZMANN_EV_PER_K
    error = np.hypot(cold_error, hot_error) / per_kelvin
    assert error < 0.3
    assert abs((hot - cold) / per_kelvin - 6 / 2) < STANDARD_ERRORS * error


def test_a_molecule_free_to_drift_and_turn_has_the_energy_of_its_vibrations_alone() -> None:
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.7
    pairs = np.triu_indices(4, 1)

    def lengths(x: Floats) -> Floats:
        return np.asarray(np.linalg.norm(x[pairs[0]] - x[pairs[1]], axis=1))

    rest = lengths(corners)
    bonds = Potential(lambda x: float(5.0 * ((lengths(x) - rest) ** 2).sum()))
    settings = ChainSettings(50.0, 16_000, 1_000, tune=True)
    state = run(HYDROGENS[4], corners, bonds, settings)
    assert np.linalg.norm(state.positions.mean(axis=0)) > 0.05
    mean, error = mean_and_error(kept(state) / (BOLTZMANN_EV_PER_K * 50.0))
    assert error < 0.1
    assert abs(mean - (3 * 4 - 6) / 2) < STANDARD_ERRORS * error


def test_a_double_well_is_visited_as_boltzmann_says_and_every_flow_has_its_counterflow() -> None:
    temperature = 400.0
    settings = ChainSettings(temperature, 25_000, 500, save_every=1, step_size=0.35)
    well = run(HYDROGENS[1], np.array([[-0.5, 0.0, 0.0]]), double_well(), settings)
    x = well.frames[500:, 0, 0].astype(np.float64)
    edges = np.array([-1.5, -0.55, -0.35, 0.0, 0.35, 0.55, 1.5])
    exact = double_well_probabilities(edges, temperature)
    places = np.digitize(x, edges) - 1
    shares, error = mean_and_error(np.eye(6)[places])
    assert (np.abs(shares - exact) < STANDARD_ERRORS * error).all()
    assert (error < 0.15 * exact).all()
    flows = np.zeros((6, 6))
    np.add.at(flows, (places[:-1], places[1:]), 1)
    # Also between places that are not neighbours, where the wells are jumped into.
    assert flows[0, 2] > 100
    assert flows[1, 3] > 50
    difference = np.abs(flows - flows.T) / np.sqrt(np.maximum(flows + flows.T, 1))
    assert difference.max() < STANDARD_ERRORS


class Shrinking:
    """Draws the displacements towards zero by a fifth before it shakes them: not symmetric."""

    def __init__(self, centre: Floats, *, corrected: bool = True) -> None:
        self.centre = centre
        self.corrected = corrected

    def init(self, positions: Floats) -> Arrays:
        return {"displacement": positions - self.centre}

    def propose(
        self, positions: Floats, memory: Arrays, seed: int, step: int, step_size: float
    ) -> tuple[Floats, Arrays, float]:
        bits = np.random.Philox(key=seed, counter=[0, 0, 9, step])
        old = memory["displacement"]
        new = 0.8 * old + step_size * np.random.Generator(bits).standard_normal(old.shape)
        there, back = ((new - 0.8 * old) ** 2).sum(), ((old - 0.8 * new) ** 2).sum()
        ratio = float(there - back) / (2 * step_size**2) if self.corrected else 0.0
        return self.centre + new, {"displacement": new}, ratio


def test_a_one_sided_proposal_samples_the_same_distribution_once_its_ratio_is_counted() -> None:
    sites, springs = harmonic()
    thermal = BOLTZMANN_EV_PER_K * 300.0
    found = {}
    for corrected in (True, False):
        settings = ChainSettings(300.0, 12_000, 500, step_size=0.04)
        proposal = Shrinking(sites, corrected=corrected)
        state = run(HYDROGENS[2], sites, springs, settings, proposal=proposal)
        found[corrected] = mean_and_error(kept(state) / thermal)
        assert np.array_equal(state.memory["displacement"] + sites, state.positions)
    mean, error = found[True]
    assert error < 0.1
    assert abs(mean - 3) < STANDARD_ERRORS * error
    mean, error = found[False]
    assert abs(mean - 3) > 2 * STANDARD_ERRORS * error


def test_tuning_ends_with_burn_in_near_the_best_acceptance() -> None:
    sites, springs = harmonic(4)
    settings = ChainSettings(300.0, 6_000, 3_000, step_size=0.001, tune=True)
    state = init(HYDROGENS[4], sites, springs, settings)
    advance(state, HYDROGENS[4], springs, settings, 3, until=3_000)
    tuned = state.step_size
    assert tuned > 0.005
    assert np.isnan(state.acceptance)
    advance(state, HYDROGENS[4], springs, settings, 3, until=6_000)
    assert state.step_size == tuned
    assert state.acceptance == pytest.approx(0.234, abs=0.04)
    assert state.accepted == round(state.acceptance * 3_000)


@pytest.mark.parametrize("tune", [False, True])
def test_a_chain_cut_anywhere_and_saved_is_bit_equal_to_one_that_ran_through(tune: bool) -> None:
    sites, _ = harmonic()

    def calculator() -> Any:
        # Every tenth proposal or so fails.
        return harmonic(fails=lambda x: abs(x[0, 0]) > 0.06)[1]

    settings = ChainSettings(300.0, 400, 150, save_every=7, tune=tune)
    whole = run(HYDROGENS[2], sites, calculator(), settings)
    assert whole.n_failed > 5
    assert whole.n_evaluations == 401
    parts = init(HYDROGENS[2], sites, calculator(), settings)
    for until in (0, 1, 13, 149, 151, 160, 399, 500):
        parts = ChainState.from_arrays(parts.to_arrays())
        advance(parts, HYDROGENS[2], calculator(), settings, 1, until=until)
    assert parts.is_done
    assert same(whole, parts)
    other = run(HYDROGENS[2], sites, calculator(), settings, seed=2)
    assert not np.array_equal(other.energies, whole.energies)


def water() -> tuple[NDArray[np.uint8], Floats]:
    """Water at GFN2-xTB's minimum."""
    from kernels.relaxation import RelaxSettings, relax

    numbers = np.array([8, 1, 1], dtype=np.uint8)
    start = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    tight = RelaxSettings(fmax=0.001)
    return numbers, relax(numbers, start, make_calculator("GFN2-xTB"), tight).positions


@pytest.mark.parametrize("program", ["tblite", "xtb-python"])
def test_a_gfn2_chain_cut_and_saved_is_bit_equal(
    program: str, require_engine: Callable[[str], None]
) -> None:
    require_engine(program)
    numbers, positions = water()

    def make() -> Any:
        return make_calculator("GFN2-xTB", program=program)

    # Hot enough that about half the moves are rejected: the next SCF starts from those too.
    settings = ChainSettings(300.0, 60, 20, save_every=5, tune=True)
    whole = run(numbers, positions, make(), settings)
    assert 5 < whole.accepted < 35
    used = make()
    parts = run(numbers, positions + 0.01, used, ChainSettings(300.0, 3, 0))
    parts = init(numbers, positions, used, settings)
    for until in (9, 10, 41, 60):
        advance(parts, numbers, used, settings, 1, until=until)
        parts, used = ChainState.from_arrays(parts.to_arrays()), make()
    assert parts.energies.tobytes() == whole.energies.tobytes()
    assert parts.positions.tobytes() == whole.positions.tobytes()
    assert parts.frames.tobytes() == whole.frames.tobytes()


def test_cold_water_has_half_a_thermal_energy_in_each_of_three_vibrations(
    require_engine: Callable[[str], None],
) -> None:
    require_engine("tblite")
    numbers, positions = water()
    settings = ChainSettings(30.0, 4_000, 500, tune=True)
    state = run(numbers, positions, make_calculator("GFN2-xTB"), settings)
    mean, error = mean_and_error((kept(state) - state.energies[0]) / (BOLTZMANN_EV_PER_K * 30.0))
    assert error < 0.2
    assert abs(mean - 3 / 2) < STANDARD_ERRORS * error


def test_a_proposal_without_an_energy_is_rejected_and_counted() -> None:
    sites, springs = harmonic(fails=lambda x: bool(x[0, 0] > 0.02))
    settings = ChainSettings(300.0, 2_000, 0, save_every=1, step_size=0.03)
    state = run(HYDROGENS[2], sites, springs, settings)
    assert 100 < state.n_failed < 1_500
    assert state.frames[:, 0, 0].max() <= 0.02
    assert np.isfinite(state.energies).all()
    assert state.diverged == ""


def test_without_rejections_a_chain_diverges_and_says_why() -> None:
    sites, springs = harmonic()
    settings = ChainSettings(
        float("nan"), 5_000, 0, save_every=1, step_size=0.01, accept_all=True, max_energy=2.0
    )
    state = run(HYDROGENS[2], sites, springs, settings)
    assert 100 < state.step < 5_000
    assert state.is_done
    assert "max_energy 2 eV" in state.diverged
    assert state.energies[state.step] > 2.0 > state.energies[state.step - 1]
    assert np.isnan(state.energies[state.step + 1 :]).all()
    assert state.acceptance == 1.0
    again = ChainState.from_arrays(state.to_arrays())
    advance(again, HYDROGENS[2], springs, settings, 1, until=5_000)
    assert same(again, state)
    # The spread of a free walk: 0.01 Å sqrt(steps) in each of six coordinates.
    walked = np.sqrt(((state.positions - sites) ** 2).mean()) / (0.01 * np.sqrt(state.step))
    assert 0.3 < walked < 2.0


def test_without_rejections_a_failed_energy_ends_the_chain_before_that_step() -> None:
    sites, springs = harmonic(fails=lambda x: abs(x[0, 0]) > 0.2)
    settings = ChainSettings(300.0, 5_000, 0, save_every=1, step_size=0.01, accept_all=True)
    state = run(HYDROGENS[2], sites, springs, settings)
    assert f"step {state.step + 1}: no convergence in this corner" == state.diverged
    assert np.isfinite(state.energies[: state.step + 1]).all()
    assert np.array_equal(state.frames[state.step], state.positions.astype(np.float32))


def test_a_chain_that_cannot_start_raises() -> None:
    sites, springs = harmonic(fails=lambda x: True)
    settings = ChainSettings(300.0, 10, 0)
    with pytest.raises(ScfError):
        init(HYDROGENS[2], sites, springs, settings)
    with pytest.raises(CollapsedError):
        init(HYDROGENS[2], np.zeros((2, 3)), harmonic()[1], settings)


def test_the_published_step_size_is_a_hundredth_of_the_root_of_the_thermal_energy() -> None:
    # k_B = 1.987204e-3 kcal/mol/K.
    assert published_step_size(300.0) == pytest.approx(0.01 * (300 * 1.987204e-3) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.0}, "temperature 0.0 K"),
        ({"temperature": float("nan")}, "temperature nan K"),
        ({"burn_in": 11}, "burn_in 11"),
        ({"save_every": 0}, "save_every 0"),
        ({"step_size": -1.0}, "step_size -1.0 Å"),
        ({"tune": True, "accept_all": True}, "tune"),
        ({"max_energy": 0.0}, "max_energy 0.0 eV"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ChainSettings(**{"temperature": 300.0, "steps": 10, "burn_in": 0, **changes})


def test_a_saved_chain_is_not_taken_on_with_other_settings_or_parts() -> None:
    sites, springs = harmonic()
    state = run(HYDROGENS[2], sites, springs, ChainSettings(300.0, 10, 5))
    with pytest.raises(InputError, match="start it anew"):
        advance(state, HYDROGENS[2], springs, ChainSettings(300.0, 20, 5), 1, until=20)
    arrays = state.to_arrays()
    del arrays["energy"]
    with pytest.raises(InputError, match="'energy'"):
        ChainState.from_arrays(arrays)
    springs.evaluate(HYDROGENS[2], sites)
    with pytest.raises(RuntimeError, match="used after"):
        state.to_arrays()
