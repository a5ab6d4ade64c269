"""Effective samples, R-hat, errors and fits against series whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from orchestrator.chain_statistics import effective_samples, line, moments, r_hat


def correlated(memory: float, chains: int, steps: int, seed: int = 0) -> np.ndarray:
    """Autoregressive series (C, S) of unit variance: their time is (1 + memory)/(1 - memory)."""
    noise = np.random.default_rng(seed).standard_normal((chains, steps + 500))
    return lfilter([np.sqrt(1 - memory**2)], [1.0, -memory], noise, axis=1)[:, 500:]


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9, 0.98])
def test_the_autocorrelation_time_of_an_autoregressive_series(memory: float) -> None:
    found = moments(correlated(memory, 1, 100_000))
    assert found.time == pytest.approx((1 + memory) / (1 - memory), rel=0.12)
    assert found.deviation == pytest.approx(1.0, rel=0.05)
    # Its square forgets twice as fast.
    squares = (1 + memory**2) / (1 - memory**2)
    assert found.variance_error == pytest.approx(np.sqrt(2 * squares / 100_000), rel=0.12)


def test_errors_cover_the_truth_as_often_as_they_say() -> None:
    found = [moments(row[None]) for row in correlated(0.9, 300, 2000, seed=1)]
    off = np.array([one.mean / one.error for one in found])
    assert 0.88 < off.std() < 1.15
    assert (np.abs(off) > 3).mean() < 0.02
    variances = np.array([(one.variance - 1.0) / one.variance_error for one in found])
    assert 0.85 < variances.std() < 1.25


def test_repeats_add_up_and_drifts_are_found() -> None:
    chains = correlated(0.8, 4, 4000, seed=2)
    one, four = effective_samples(chains[:1]), effective_samples(chains)
    assert four == pytest.approx(4 * one, rel=0.25)
    assert r_hat(chains) < 1.01
    apart = chains + np.array([0.0, 0.0, 0.0, 2.0])[:, None]
    assert r_hat(apart) > 1.1
    assert r_hat(chains[:1]) < 1.02
    assert r_hat(chains[:1] + np.linspace(0.0, 5.0, 4000)) > 1.5
    # What disagrees is worth less than one chain seems to be by itself.
    assert effective_samples(apart) < 0.1 * one
    assert effective_samples(chains[:1] + np.linspace(0.0, 5.0, 4000)) < 0.1 * one


def test_series_without_an_answer_give_none() -> None:
    still = moments(np.full((1, 50), 3.0))
    assert (still.mean, still.deviation) == (3.0, 0.0)
    assert np.isnan(still.effective)
    assert np.isnan(still.time)
    assert np.isnan(r_hat(np.full((2, 50), 3.0)))
    assert np.isnan(r_hat(np.random.default_rng(0).normal(size=(1, 7))))
    assert moments(np.zeros((0, 0))).samples == 0
    assert np.isnan(moments(np.zeros((1, 2))).effective)


def test_a_line_and_the_error_of_its_slope() -> None:
    rng = np.random.default_rng(0)
    x = np.linspace(10.0, 400.0, 18)
    error = 0.01 * x
    slopes = []
    for _ in range(400):
        found = line(x, 2.0 + 0.5 * x + error * rng.standard_normal(18), error)
        assert found is not None
        slopes.append(found.slope)
    assert np.mean(slopes) == pytest.approx(0.5, abs=3 * found.slope_error / 20)
    assert np.std(slopes) == pytest.approx(found.slope_error, rel=0.12)
    assert found.r_squared > 0.99
    exact = line(x, 2.0 + 0.5 * x, error)
    assert exact is not None
    assert exact.intercept == pytest.approx(2.0)
    assert exact.at(np.array([4.0]))[0] == pytest.approx(4.0)
    assert line(np.array([3.0, 3.0]), np.array([1.0, 2.0]), np.zeros(2)) is None
    assert line(np.array([1.0, np.nan]), np.array([1.0, 2.0]), np.zeros(2)) is None
