"""Ladders of temperatures: what is known of their averages, of swaps, and of runs in pieces."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.errors import InputError, ScfError
from kernels.sampling.metropolis import ChainSettings, advance, init
from kernels.sampling.replica_exchange import (
    ExchangeSettings,
    SingleProcess,
    parallel_efficiency,
    request_arrays,
    round_trips,
    run_exchange,
)
from kernels.units import BOLTZMANN_EV_PER_K
from tests.kernels.sampling.potentials import (
    double_well,
    double_well_probabilities,
    harmonic,
    mean_and_error,
)

Floats = NDArray[np.float64]

# A right answer is farther off than this once in 16 000 times.
STANDARD_ERRORS = 4.0

TWO = np.ones(2, dtype=np.uint8)
ONE = np.ones(1, dtype=np.uint8)
TIMES = {"compute_s", "total_s", "spent_s"}


class Threads:
    """A group of processes that are threads."""

    def __init__(self, rank: int, given: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(given)
        self.given = given
        self.barrier = barrier

    def allgather(self, sendobj: Any) -> list[Any]:
        # Only what can be sent may be sent.
        self.given[self.rank] = pickle.loads(pickle.dumps(sendobj))
        self.barrier.wait(timeout=60)
        gathered = list(self.given)
        self.barrier.wait(timeout=60)
        return gathered


def together(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Return what `size` processes come to, or the error each ends with."""
    given: list[Any] = [None] * size
    barrier = threading.Barrier(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, given, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def springs(**more: Any) -> Callable[[], Any]:
    return lambda: harmonic(**more)[1]


def same(first: Any, second: Any) -> bool:
    return bool(first.keys() == second.keys()) and all(
        first[name].tobytes() == second[name].tobytes() for name in first.keys() - TIMES
    )


def test_swaps_leave_every_temperature_its_distribution(tmp_path: Path) -> None:
    temperatures = (150.0, 200.0, 300.0, 400.0)
    settings = ExchangeSettings(temperatures, 8_000, 1_000, swap_every=5, tune=True)
    request = request_arrays(TWO, harmonic()[0], settings, 7, {})
    result = run_exchange(request, SingleProcess(), saved=tmp_path / "s.npz", make=springs())
    assert result is not None
    assert result["n_evaluations"].tolist() == [8_001] * 4
    for rung, temperature in enumerate(temperatures):
        thermal = BOLTZMANN_EV_PER_K * temperature
        energies = result["energies"][rung, 1_001:] / thermal
        # Of six springs: mean and variance of the energy are 3 in these units.
        mean, error = mean_and_error(energies)
        assert error < 0.15
        assert abs(mean - 3) < STANDARD_ERRORS * error
        variance, error = mean_and_error((energies - 3) ** 2)
        assert error < 0.4
        assert abs(variance - 3) < STANDARD_ERRORS * error
    # Energies of six springs are gamma distributed, and so the share of swaps is known.
    drawn = np.random.default_rng(1).gamma(3.0, size=(4, 200_000))
    thermal = BOLTZMANN_EV_PER_K * np.array(temperatures)[:, None]
    exponent = (1 / thermal[:-1] - 1 / thermal[1:]) * (
        drawn[:-1] * thermal[:-1] - drawn[1:] * thermal[1:]
    )
    exact = np.minimum(1, np.exp(exponent)).mean(axis=1)
    # 700 swaps each.
    assert result["swap_acceptance"][:3] == pytest.approx(exact, abs=0.07)
    assert np.isnan(result["swap_acceptance"][3])
    assert result["acceptance"] == pytest.approx(0.234, abs=0.05)
    assert result["round_trips"].min() > 3


def test_a_cold_chain_crosses_a_barrier_by_way_of_the_hot_ones(tmp_path: Path) -> None:
    temperatures = (40.0, 85.0, 180.0, 400.0)
    start = np.array([[0.5, 0.0, 0.0]])
    settings = ExchangeSettings(temperatures, 8_000, 500, save_every=1, step_size=0.15)
    request = request_arrays(ONE, start, settings, 3, {})
    result = run_exchange(request, SingleProcess(), saved=tmp_path / "s.npz", make=double_well)
    assert result is not None
    edges = np.array([-1.5, -0.5, 0.0, 0.5, 1.5])
    for rung, temperature in enumerate(temperatures):
        x = result["frames"][rung, 501:, 0, 0].astype(np.float64)
        exact = double_well_probabilities(edges, temperature)
        shares, error = mean_and_error(np.eye(4)[np.digitize(x, edges) - 1])
        # Where the well is hardly ever visited the error cannot be told from the visits.
        assert (np.abs(shares - exact) < STANDARD_ERRORS * error + 0.005).all()
        assert (error < 0.05).all()
    # Alone the coldest stays in the upper well, where all began.
    alone = ChainSettings(40.0, 8_000, 500, save_every=1, step_size=0.15)
    well = double_well()
    state = init(ONE, start, well, alone)
    advance(state, ONE, well, alone, 3, until=8_000)
    assert (state.frames[:, 0, 0] > 0).all()


def test_energies_and_frames_of_a_temperature_belong_together(tmp_path: Path) -> None:
    sites, calculator = harmonic()
    # Neither the last segment nor the frames fit the steps.
    settings = ExchangeSettings((200.0, 250.0, 310.0), 47, 10, save_every=4, swap_every=5)
    request = request_arrays(TWO, sites, settings, 7, {})
    result = run_exchange(request, SingleProcess(), saved=tmp_path / "s.npz", make=springs())
    assert result is not None
    assert result["energies"].shape == (3, 48)
    assert result["frames"].shape == (3, 12, 2, 3)
    assert result["walkers"].shape == (10, 3)
    assert len({tuple(row) for row in result["walkers"].tolist()}) > 1
    for rung in range(3):
        for frame in range(12):
            xyz = result["frames"][rung, frame].astype(np.float64)
            energy = calculator.evaluate(TWO, xyz)[0]
            assert energy == pytest.approx(result["energies"][rung, 4 * frame], abs=1e-6)
    moved = np.diff(result["energies"], axis=1) != 0
    # Where a swap brought another walker's energy, it is not seen here whether that one moved.
    inner = np.array([step for step in range(11, 48) if step % 5 != 1]) - 1
    between = moved[:, inner].mean(axis=1)
    assert result["acceptance"] == pytest.approx(between, abs=0.2)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_the_numbers_are_the_same_for_any_number_of_processes_and_cuts(
    size: int, tmp_path: Path
) -> None:
    settings = ExchangeSettings((150.0, 200.0, 270.0, 360.0), 120, 40, swap_every=4, tune=True)
    request = request_arrays(TWO, harmonic()[0], settings, 2**100 + 9, {})
    # About one in ten fails.
    make = springs(fails=lambda x: abs(x[0, 0]) > 0.08)
    whole = run_exchange(request, SingleProcess(), saved=tmp_path / "whole.npz", make=make)
    assert whole is not None
    assert whole["n_failed"].sum() > 5
    saved = tmp_path / "parts.npz"
    cuts = 0
    # Each time with another number of processes, of which the last one asks to stop.
    for run, processes in enumerate((size, 2, size, size + 1)):
        last = run == 3

        def work(
            communicator: Any, last: bool = last, processes: int = processes
        ) -> dict[str, Any] | None:
            asked = iter([False] * 7 + [communicator.rank == processes - 1] * 1000)
            return run_exchange(
                request,
                communicator,
                saved=saved,
                stop=lambda: not last and next(asked),
                save_every_s=0.0,
                make=make,
            )

        results = together(processes, work)
        if not last:
            assert results == [None] * processes
            cuts += 1
        else:
            assert all(same(result, whole) for result in results)
            assert results[0]["total_s"].shape == (size + 1,)
            assert 0 < parallel_efficiency(results[0]) <= 1
    assert cuts == 3


def test_a_failure_of_one_process_is_raised_by_all(tmp_path: Path) -> None:
    settings = ExchangeSettings((150.0, 200.0, 270.0), 20, 0)
    request = request_arrays(TWO, harmonic()[0], settings, 1, {})

    def work(communicator: Any) -> Any:
        make = springs(fails=lambda x: communicator.rank == 1)
        return run_exchange(request, communicator, saved=tmp_path / "s.npz", make=make)

    errors = together(4, work)
    assert [type(error) for error in errors] == [ScfError] * 4
    (tmp_path / "s.npz").write_bytes(b"no zip")
    errors = together(2, work)
    assert [type(error) for error in errors] == [InputError] * 2
    assert "remove it" in str(errors[1])


def test_a_ladder_saved_for_another_request_is_not_taken_up(tmp_path: Path) -> None:
    settings = ExchangeSettings((150.0, 200.0), 40, 0)
    saved = tmp_path / "s.npz"
    for seed in (1, 2):
        request = request_arrays(TWO, harmonic()[0], settings, seed, {})
        if seed == 1:
            stopped = run_exchange(
                request, SingleProcess(), saved=saved, stop=lambda: True, make=springs()
            )
            assert stopped is None
        else:
            with pytest.raises(InputError, match="another request"):
                run_exchange(request, SingleProcess(), saved=saved, make=springs())


def test_round_trips_go_from_the_lowest_temperature_to_the_highest_and_back() -> None:
    # Walkers: there and back twice; down from the top only; never at the top; never anywhere.
    paths = np.array(
        [
            [0, 1, 3, 3, 1, 0, 2, 3, 0, 3],
            [3, 2, 1, 0, 0, 1, 2, 1, 1, 1],
            [0, 1, 2, 1, 0, 1, 2, 1, 0, 1],
            [1, 1, 2, 2, 1, 2, 1, 2, 1, 2],
        ],
        dtype=np.int16,
    )
    assert round_trips(paths.T).tolist() == [2, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperatures": (300.0,)}, "make no ladder"),
        ({"temperatures": (300.0, 200.0)}, "ascending"),
        ({"temperatures": (0.0, 200.0)}, "temperature 0.0 K"),
        ({"swap_every": 0}, "swap_every 0"),
        ({"burn_in": 30}, "burn_in 30"),
    ],
)
def test_impossible_ladders_are_named(changes: dict[str, Any], words: str) -> None:
    usual: dict[str, Any] = {"temperatures": (100.0, 200.0), "steps": 20, "burn_in": 0}
    with pytest.raises(InputError, match=words):
        ExchangeSettings(**{**usual, **changes})
