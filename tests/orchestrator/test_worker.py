"""What a worker begins before the end of its block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.plan import Item, StagePlan
from orchestrator.worker import Bundle, needs, together

STAGE = StagePlan(
    index=0, name="s", kernel="embed", settings={}, label="", digest=b"", parent=-1, conformers=1,
    pool="cpu", time_limit=3600.0, memory_limit=0,
)  # fmt: skip
HOUR = 3600.0


def needed(kernel: str, seconds: float, *, cuts: int = 0, limit: float = HOUR) -> float:
    """Return what must be left of a block of an hour to begin an item estimated that long."""
    item = Item(b"k" * 16, b"m" * 16, b"", 0, "C", 0, 1, 5, cuts=cuts)
    stage = replace(STAGE, kernel=kernel, time_limit=limit)
    estimates = np.array([seconds], np.float32).tobytes()
    bundle = Bundle("1", "r", "", "", stage, [item], 60.0, 30.0, 2, estimates)
    (need,) = needs(bundle, HOUR)
    return need


def test_an_estimate_is_an_average_and_so_is_doubled() -> None:
    assert needed("embed", 100.0) == pytest.approx(200.0)


def test_no_item_needs_more_than_its_time_limit() -> None:
    assert needed("embed", 100.0, limit=120.0) == pytest.approx(120.0)


def test_what_saves_its_state_begins_with_less() -> None:
    assert needed("relax", 1000.0) == pytest.approx(100.0)
    assert needed("relax", 0.01) < 1.0


def test_what_fits_in_no_block_is_tried_in_a_fresh_one() -> None:
    assert needed("embed", 1e6, limit=1e9) == pytest.approx(0.75 * HOUR)


def test_what_was_broken_off_waits_for_a_fresh_block() -> None:
    assert needed("embed", 1.0, cuts=1) == pytest.approx(0.75 * HOUR)
    assert needed("relax", 1.0, cuts=1) < 10.0


def test_a_batch_that_fits_in_no_block_is_tried_in_a_fresh_one() -> None:
    wanted = [2000.0, 2000.0, 10.0, 20.0]
    found = together(wanted, [[0, 1], [2, 3]], HOUR)
    assert sum(found[:2]) == pytest.approx(0.75 * HOUR)
    assert found[2:] == wanted[2:]
    assert together([0.0], [[0]], 0.0) == [0.0], "a block that is over"
