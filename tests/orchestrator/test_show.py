"""The line of progress in a log stays one that a person reads, however many stages there are."""

from __future__ import annotations

from orchestrator.counts import StageCounts
from orchestrator.run import Progress
from orchestrator.show import _line


def progress(stages: list[StageCounts]) -> Progress:
    return Progress(
        campaign="mine",
        stages=stages,
        complete_plan=True,
        entries=3,
        bad_entries=0,
        elapsed_s=10.0,
        done_now=4,
        rate=0.4,
        left_s=60.0,
        core_s=8.0,
        in_flight=2,
        draining=False,
    )


def stage(name: str, ok: int, failed: int = 0) -> StageCounts:
    return StageCounts(
        stage=name, planned=3, ok=ok, failed=failed, upstream=0, waiting=3 - ok - failed
    )


def test_a_few_stages_are_all_told() -> None:
    line = _line(progress([stage("embed", 3), stage("mmff", 1, 1), stage("gfn2", 0)]))
    assert "embed 3/3 | mmff 1/3 (1 failed) | gfn2 0/3 of 3 entries" in line


def test_of_a_ladder_only_what_moves_is_told() -> None:
    ladder = [stage("ground", 3), *(stage(f"chain-{k}", 0) for k in range(20))]
    assert "] 1 of 21 stages done of 3 entries" in _line(progress(ladder))
    ladder[5] = stage("chain-4", 1)
    assert "] 1 of 21 stages done | chain-4 1/3 of 3 entries" in _line(progress(ladder))
    many = [stage(f"chain-{k}", 1) for k in range(20)]
    line = _line(progress(many))
    assert "] 0 of 20 stages done | chain-0 1/3 | " in line
    assert "chain-7 1/3 | ... of 3 entries" in line
    assert "chain-8" not in line
