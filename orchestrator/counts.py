"""How many tasks of a stage stand where."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageCounts:
    """The tasks of one stage: planned = ok + failed + upstream + waiting.

    ``upstream`` counts those that can never start since an earlier stage failed for them.
    """

    stage: str
    planned: int
    ok: int
    failed: int
    upstream: int
    waiting: int


def in_full(number: float) -> str:
    """Return a number's shortest form that loses nothing: 500.0 as "500"."""
    return repr(float(number)).removesuffix(".0")
