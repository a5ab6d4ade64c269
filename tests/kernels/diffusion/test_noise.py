import numpy as np
import pytest

from kernels.diffusion.noise import centred_normal, normal
from kernels.errors import InputError


def test_numbers_follow_from_seed_and_step_alone() -> None:
    first = normal(7, 3, (12, 9))
    normal(8, 3, (5,))
    assert np.array_equal(first, normal(7, 3, (12, 9)))
    assert not np.array_equal(first, normal(7, 4, (12, 9)))
    assert not np.array_equal(first, normal(8, 3, (12, 9)))
    # Keys of tasks are long; their upper half counts.
    assert not np.array_equal(first, normal(7 + 2**100, 3, (12, 9)))


def test_the_stream_is_pinned() -> None:
    """Results are kept under keys that hold the seed; another stream would belie them."""
    assert normal(1, 2, (3,)) == pytest.approx([1.1197171, -1.2581526, 0.7917979], abs=1e-6)


def test_numbers_are_standard_normal_and_steps_are_independent() -> None:
    drawn = np.stack([normal(seed, step, (200,)) for seed in range(20) for step in range(20)])
    n = drawn.size
    assert abs(drawn.mean()) < 5 / np.sqrt(n)
    assert abs(drawn.var() - 1) < 5 * np.sqrt(2 / n)
    between = np.corrcoef(drawn)[np.triu_indices(len(drawn), 1)]
    assert np.abs(between).max() < 6 / np.sqrt(200)


def test_noise_of_positions_has_no_centre_of_mass() -> None:
    drawn = centred_normal(5, 1, 19, 6)
    assert drawn.shape == (19, 9)
    assert np.abs(drawn[:, :3].mean(axis=0)).max() < 1e-6
    assert np.abs(drawn[:, 3:].mean(axis=0)).max() > 0.01


@pytest.mark.parametrize("seed", [-1, 2**128])
def test_impossible_seeds_are_refused(seed: int) -> None:
    with pytest.raises(InputError, match="seed"):
        normal(seed, 0, (1,))
