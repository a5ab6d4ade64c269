import numpy as np
import pytest

from kernels.diffusion.schedule import Schedule
from kernels.errors import InputError


def test_the_ends_are_nearly_clean_and_nearly_noise() -> None:
    schedule = Schedule(1000, 1e-5)
    assert schedule.alpha.shape == schedule.sigma.shape == schedule.gamma.shape == (1001,)
    assert schedule.alpha[0] ** 2 == pytest.approx(1 - 1e-5, abs=1e-12)
    assert schedule.alpha[1000] ** 2 == pytest.approx(1e-5, rel=0.01)
    assert schedule.alpha**2 + schedule.sigma**2 == pytest.approx(np.ones(1001), abs=1e-12)
    assert (np.diff(schedule.gamma) > 0).all()


def test_alpha_is_the_published_polynomial() -> None:
    schedule = Schedule(1000, 1e-5)
    for n in (20, 50, 300, 800):
        alpha2 = (1 - 2e-5) * (1 - (n / 1000) ** 2) ** 2 + 1e-5
        assert schedule.alpha[n] ** 2 == pytest.approx(alpha2, rel=1e-12)
        assert schedule.gamma[n] == pytest.approx(-np.log(alpha2 / (1 - alpha2)), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 50, 999, 1000])
def test_a_reverse_step_undoes_a_forward_step(n: int) -> None:
    """With the true noise the mean of z_m and its variance are those of the forward process."""
    schedule = Schedule(1000, 1e-5)
    step = schedule.reverse_step(n)
    m = n - 1
    # z_n = alpha_n z_0 + sigma_n eps, so the step's mean is a z_0 + b eps; averaged over eps and
    # the step's own noise it must be distributed as z_m is.
    assert step.keep * schedule.alpha[n] == pytest.approx(schedule.alpha[m], rel=1e-10)
    left = step.keep * schedule.sigma[n] - step.remove
    assert left**2 + step.noise**2 == pytest.approx(schedule.sigma[m] ** 2, rel=1e-6)


def test_decoding_inverts_the_forward_process_at_level_0() -> None:
    schedule = Schedule(200, 1e-5)
    step = schedule.decode_step()
    z = schedule.alpha[0] * 1.7 + schedule.sigma[0] * 0.4
    assert step.keep * z - step.remove * 0.4 == pytest.approx(1.7, abs=1e-12)


@pytest.mark.parametrize(("steps", "precision"), [(0, 1e-5), (10, 0.0), (10, 0.5)])
def test_impossible_schedules_are_refused(steps: int, precision: float) -> None:
    with pytest.raises(InputError):
        Schedule(steps, precision)


@pytest.mark.parametrize("n", [0, 11, -1])
def test_there_is_no_step_outside_the_schedule(n: int) -> None:
    with pytest.raises(InputError, match=f"n = {n}"):
        Schedule(10, 1e-5).reverse_step(n)
