"""Counting many tasks at a time gives what walking through them one by one gives."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from orchestrator.campaign import load_campaign
from orchestrator.columns import key_array
from orchestrator.key_index import KeyIndex
from orchestrator.plan import Plan, Root, standing
from orchestrator.tally import plan_digest, tally, with_task
from tests.orchestrator.run_fixtures import write_campaign

STAGES = """
[[stages]]
kernel = "embed"
conformers = {conformers}
[[stages]]
kernel = "rehearse"
conformers = 2
[[stages]]
kernel = "mmff"
from = "embed"
[[stages]]
name = "gfn2"
kernel = "relax"
"""


def a_plan(folder: Path, conformers: int = 3) -> Plan:
    stages = STAGES.format(conformers=conformers)
    return Plan(load_campaign(write_campaign(folder, ["CO"], stages=stages)))


def some_roots(rng: random.Random, count: int) -> list[Root]:
    keys = [rng.randbytes(16) for _ in range(count)]
    return [Root(key, key, "CO", 0, 1, 6) for key in keys]


@pytest.mark.parametrize("seed", range(4))
def test_it_counts_what_standing_counts(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    plan = a_plan(tmp_path)
    roots = some_roots(rng, 200)
    index = KeyIndex()
    chance = rng.random()
    for root in roots:
        for _, keys in plan.chains(root):
            for key in filter(None, keys):
                if rng.random() < chance:
                    # Also rows whose parent has none, or failed: a damaged file can do that.
                    index.extend(key_array([key]), np.array([rng.choice([0, 0, 0, 2, 5])], "u1"))
    one_by_one = standing(plan, roots, index)
    at_once = tally(plan, key_array([root.origin for root in roots]), index)
    assert at_once.planned.tolist() == one_by_one.planned
    assert at_once.ok.tolist() == one_by_one.ok
    assert at_once.failed.tolist() == one_by_one.failed
    assert at_once.upstream.tolist() == one_by_one.upstream
    assert at_once.failures == one_by_one.failures
    assert sum(one_by_one.ok) > 0


def test_nothing_done_is_counted_without_making_keys(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    roots = some_roots(random.Random(1), 10)
    counts = tally(plan, key_array([root.origin for root in roots]), KeyIndex())
    assert counts.planned.tolist() == standing(plan, roots, KeyIndex()).planned
    assert counts.finished.tolist() == [0, 0, 0, 0]


def test_a_task_is_found_by_its_key(tmp_path: Path) -> None:
    plan = a_plan(tmp_path)
    roots = some_roots(random.Random(2), 50)
    _, keys = list(plan.chains(roots[17]))[2]
    origins = key_array([root.origin for root in roots])
    assert np.flatnonzero(with_task(plan, origins, keys[3])).tolist() == [17]
    assert not with_task(plan, origins, bytes(16)).any()


def test_the_plans_digest_changes_with_what_is_planned(tmp_path: Path) -> None:
    one = plan_digest(a_plan(tmp_path))
    assert one == plan_digest(a_plan(tmp_path))
    assert one != plan_digest(a_plan(tmp_path, conformers=4))
