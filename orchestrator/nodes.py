"""Which nodes are bad: where items fail that pass elsewhere, more often than chance explains."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

# Chance that one good node or another of a campaign is taken for a bad one, test for test.
SIGNIFICANCE: Final = 1e-3
NOTHING_PASSED: Final = 4e-2
LEAST_FAILURES: Final = 5
LEAST_PASSED: Final = 5
BROKEN_LIMIT: Final = 2


def excess_probability(failed: int, of: int, all_failed: int, all_of: int) -> float:
    """Return the chance that of ``of`` drawn from ``all_of`` at least ``failed`` have failed.

    One-sided exact test (Fisher, J. R. Stat. Soc. 1922, 85, 87): ``all_failed`` of ``all_of``
    failed altogether, the drawn ones included.
    """

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    total = 0.0
    for k in range(max(failed, of + all_failed - all_of), min(of, all_failed) + 1):
        term = math.exp(
            log_choose(all_failed, k)
            + log_choose(all_of - all_failed, of - k)
            - log_choose(all_of, of)
        )
        total += term
        if term < 1e-15 * total:
            break
    return min(total, 1.0)


@dataclass(slots=True)
class _Tally:
    """Bundles of one stage: how many there were, how many had failures, how many had mostly so.

    Bundles are counted and not items, since items of a bundle are alike (the largest molecules
    travel together, say) and fail together for reasons of their own.
    """

    bundles: int = 0
    some: int = 0
    most: int = 0
    items_failed: int = 0
    items_passed: int = 0


class Nodes:
    """What became of the bundles on each node; ``bad`` names the nodes to avoid, and why."""

    def __init__(self, bad: dict[str, str]) -> None:
        self.bad = dict(bad)
        self._on: defaultdict[tuple[str, str], _Tally] = defaultdict(_Tally)
        self._all: defaultdict[str, _Tally] = defaultdict(_Tally)
        self._passed: defaultdict[str, defaultdict[str, int]] = defaultdict(
            lambda: defaultdict(int)
        )
        self._broken: defaultdict[str, int] = defaultdict(int)

    def add(self, pool: str, stage: str, node: str, passed: int, failed: int) -> str:
        """Count one bundle's items; return why the node is bad now, or nothing.

        ``failed``: items that crashed, or ran out of memory; not those that failed in ways that
        no node has a part in.
        """
        if node in self.bad or not passed + failed:
            return ""
        for tally in (self._on[stage, node], self._all[stage]):
            tally.bundles += 1
            tally.some += failed > 0
            tally.most += 2 * failed >= passed + failed
            tally.items_failed += failed
            tally.items_passed += passed
        if passed:
            self._passed[pool][node] += passed
        return self._judged(pool, stage, node) if failed else ""

    def broken(self, pool: str, node: str) -> bool:
        """Count that nothing could run on a node at all; tell whether that is enough to avoid it.

        It never is for the only node that works.
        """
        self._broken[node] += 1
        return self._broken[node] >= BROKEN_LIMIT and self.works_elsewhere(pool, node)

    def times_broken(self, node: str) -> int:
        """Return how often nothing could run on a node."""
        return self._broken[node]

    def broken_nodes(self) -> int:
        """Return on how many nodes nothing could run."""
        return len(self._broken)

    def works_elsewhere(self, pool: str, node: str) -> bool:
        """Tell whether a pool has another node that is good."""
        return any(
            other != node and other not in self.bad and passed >= 1
            for other, passed in self._passed[pool].items()
        )

    def _judged(self, pool: str, stage: str, node: str) -> str:
        mine, total = self._on[stage, node], self._all[stage]
        passed_elsewhere = total.items_passed - mine.items_passed
        if mine.items_failed < LEAST_FAILURES or passed_elsewhere < LEAST_PASSED:
            return ""
        if not self.works_elsewhere(pool, node):
            return ""
        seen = sum(1 for of_stage, _ in self._on if of_stage == stage)
        chance = min(
            excess_probability(mine.some, mine.bundles, total.some, total.bundles),
            excess_probability(mine.most, mine.bundles, total.most, total.bundles),
        )
        # Two tests of each of the nodes that were seen. One on which nothing has ever passed needs
        # less: it would go on to spoil much before the numbers are large.
        limit = SIGNIFICANCE if self._passed[pool][node] else NOTHING_PASSED
        if 2 * seen * chance >= limit:
            return ""
        elsewhere = total.items_failed - mine.items_failed
        return (
            f"{mine.items_failed} of {mine.items_failed + mine.items_passed} items of stage "
            f"{stage!r} crashed or ran out of memory there, {elsewhere} of "
            f"{elsewhere + passed_elsewhere} elsewhere"
        )
