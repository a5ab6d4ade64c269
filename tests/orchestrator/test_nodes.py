"""Bad nodes are told from bad luck, and from molecules that fail anywhere."""

from __future__ import annotations

import random

import pytest
from scipy.stats import fisher_exact

from orchestrator.nodes import Nodes, excess_probability


@pytest.mark.parametrize("table", [(5, 5, 5, 40), (0, 4, 7, 30), (8, 8, 9, 12)])
def test_the_exact_test_agrees_with_scipy(table: tuple[int, int, int, int]) -> None:
    failed, of, all_failed, all_of = table
    rest = [all_failed - failed, all_of - of - all_failed + failed]
    expected = fisher_exact([[failed, of - failed], rest], alternative="greater").pvalue
    assert excess_probability(*table) == pytest.approx(expected, rel=1e-9)


def test_a_node_where_everything_crashes_is_found_after_a_few_bundles() -> None:
    nodes = Nodes({})
    for turn in range(60):
        assert not nodes.add("cpu", "gfn2", f"good{turn % 3}", 10, 0)
        if turn % 3 == 0 and (why := nodes.add("cpu", "gfn2", "bad", 0, 10)):
            break
    assert turn < 30
    assert "crashed" in why
    assert "0 of" in why


def test_a_node_where_a_fifth_crashes_is_found() -> None:
    nodes, rng = Nodes({}), random.Random(3)
    for _ in range(400):
        assert not nodes.add("cpu", "gfn2", "good", 10, int(rng.random() < 0.01))
        failed = sum(rng.random() < 0.2 for _ in range(10))
        if nodes.add("cpu", "gfn2", "flaky", 10 - failed, failed):
            return
    pytest.fail("not found")


def test_molecules_that_crash_everywhere_accuse_no_node() -> None:
    """Three hundred campaigns of equal nodes, with failures that come in whole bundles."""
    rng = random.Random(1)
    accused = 0
    for _ in range(300):
        nodes = Nodes({})
        for _ in range(60):
            failed = rng.choice([0, 0, 0, 1, 10])
            accused += bool(nodes.add("cpu", "s", f"n{rng.randrange(4)}", 10 - failed, failed))
    assert accused <= 3


def test_the_only_node_is_never_bad() -> None:
    nodes = Nodes({})
    for _ in range(50):
        assert not nodes.add("cpu", "s", "one", 1, 9)
        assert not nodes.broken("cpu", "one")


def test_a_broken_node_is_bad_once_another_works() -> None:
    nodes = Nodes({})
    assert not nodes.broken("cpu", "bad")
    assert not nodes.broken("cpu", "bad")
    nodes.add("gpu", "s", "elsewhere", 5, 0)
    assert not nodes.broken("cpu", "bad"), "another pool's node is no replacement"
    nodes.add("cpu", "s", "good", 5, 0)
    assert nodes.broken("cpu", "bad")
