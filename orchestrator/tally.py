"""Counting how planned tasks stand, many at a time and without making them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.columns import key_array
from orchestrator.key_index import ABSENT, KeyIndex
from orchestrator.plan import Plan


@dataclass(slots=True)
class Tally:
    """Counts per stage (S,); ``failures`` by the failed tasks' code in `schema.STATUSES`."""

    planned: NDArray[np.int64]
    ok: NDArray[np.int64]
    failed: NDArray[np.int64]
    upstream: NDArray[np.int64]
    failures: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, plan: Plan) -> Tally:
        """Return one of zeros."""
        return cls(*np.zeros((4, len(plan.stages)), np.int64))

    def __iadd__(self, other: Tally) -> Tally:
        self.planned += other.planned
        self.ok += other.ok
        self.failed += other.failed
        self.upstream += other.upstream
        self.failures += other.failures
        return self

    def scale(self, factor: float) -> None:
        """Make of a sample's counts those of what it was drawn from."""
        for counts in (self.planned, self.ok, self.failed, self.upstream):
            counts[:] = np.rint(counts * factor)

    @property
    def finished(self) -> NDArray[np.int64]:
        """Tasks per stage that are over: ok, failed, or never to be reached."""
        return self.ok + self.failed + self.upstream


def plan_digest(plan: Plan) -> str:
    """Return, as hex, a digest of all that decides which tasks each molecule gives."""
    stages = [f"{s.name} {s.digest.hex()} {s.parent} {s.conformers}" for s in plan.stages]
    return hashlib.sha256("\n".join(stages).encode()).hexdigest()


def _keys(digest: bytes, origins: NDArray[np.uint64], tail: bytes) -> NDArray[np.uint64]:
    """Return `StagePlan.key` (K, 2) of many origins (K, 2)."""
    sha256 = hashlib.sha256
    packed = origins.astype(">u8").tobytes()
    made = b"".join(
        [sha256(digest + packed[at : at + 16] + tail).digest() for at in range(0, len(packed), 16)]
    )
    return np.frombuffer(made, ">u8").reshape(-1, 4)[:, :2].astype(np.uint64)


def _chains(plan: Plan, origins: NDArray[np.uint64]) -> Iterator[dict[int, NDArray[np.uint64]]]:
    """Yield, conformer by conformer, the keys (K, 2) of each stage's tasks."""
    conformers = max((s.conformers for s in plan.stages if s.parent < 0), default=1)
    for conformer in range(conformers):
        keys: dict[int, NDArray[np.uint64]] = {}
        for stage in plan.stages:
            if stage.parent < 0 and conformer < stage.conformers:
                tail = conformer.to_bytes(4, "little")
                keys[stage.index] = _keys(stage.digest, origins, tail)
            elif stage.parent in keys:
                keys[stage.index] = _keys(stage.digest, keys[stage.parent], b"")
        yield keys


def with_task(plan: Plan, origins: NDArray[np.uint64], key: bytes) -> NDArray[np.bool_]:
    """Tell (K,) from which of some origins (K, 2) the task of a key is reached."""
    words = key_array([key])
    found = np.zeros(len(origins), bool)
    for keys in _chains(plan, origins):
        for made in keys.values():
            found |= (made == words).all(axis=1)
    return found


def tally(plan: Plan, origins: NDArray[np.uint64], index: KeyIndex) -> Tally:
    """Compare what is planned from some origins (K, 2) with the finished tasks of the store.

    Gives the counts of `plan.standing`, without its items.
    """
    result = Tally.of(plan)
    if not len(index):
        result.planned += len(origins) * np.array(plan.tasks_per_root())
        return result
    for keys in _chains(plan, origins):
        dead: dict[int, NDArray[np.bool_]] = {}
        for s in keys:
            parent = plan.stages[s].parent
            cut = dead[parent] if parent >= 0 else np.zeros(len(origins), bool)
            code = index.lookup(keys[s])
            ok = ~cut & (code == 0)
            failed = ~cut & (code != 0) & (code != ABSENT)
            dead[s] = cut | failed
            result.planned[s] += len(origins)
            result.ok[s] += ok.sum()
            result.failed[s] += failed.sum()
            result.upstream[s] += cut.sum()
            codes, counts = np.unique(code[failed], return_counts=True)
            result.failures.update(dict(zip(codes.tolist(), counts.tolist(), strict=True)))
    return result
