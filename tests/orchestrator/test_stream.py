"""The stream's counts stay true when a failure is taken back, and its first bundles are small."""

from __future__ import annotations

from pathlib import Path

from orchestrator.campaign import load_campaign
from orchestrator.key_index import KeyIndex
from orchestrator.plan import Plan
from orchestrator.stream import FIRST_ITEMS, Estimate, Stream
from tests.orchestrator.run_fixtures import ingested, write_campaign

STAGES = '[[stages]]\nkernel = "embed"\n[[stages]]\nkernel = "mmff"\n'


def stream_of(folder: Path, molecules: int) -> Stream:
    """Return the stream of a campaign of two stages, all of it pulled."""
    campaign = load_campaign(
        write_campaign(folder, ["C" * n for n in range(1, molecules + 1)], stages=STAGES)
    )
    _, plan_folder = ingested(campaign)
    plan = Plan(campaign)
    estimates = [Estimate(stage.kernel) for stage in plan.stages]
    stream = Stream(plan, plan_folder, KeyIndex(), estimates)
    while stream.pull():
        pass
    return stream


def test_a_failure_that_is_taken_back_leaves_no_trace(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 3)
    taken = stream.take("cpu", 10.0, 1)
    assert taken is not None
    _, (item, *_) = taken
    before = (list(stream.ok), list(stream.failed), list(stream.upstream))
    stream.finished(0, item, False, "")
    assert (stream.failed, stream.upstream) == ([1, 0], [0, 1])
    waiting = stream.backlog()
    stream.reopen(0, item)
    assert (stream.ok, stream.failed, stream.upstream) == before
    assert stream.backlog() == waiting + 1
    stream.finished(0, item, True, "shard")
    assert stream.ok == [1, 0]
    assert stream.ready[1][0].parent_key == item.key


def test_what_follows_an_item_starts_with_a_clean_record(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 1)
    item = stream.ready[0].popleft()._replace(losses=1, cuts=2, waits=3)
    stream.finished(0, item, True, "shard")
    (follower,) = stream.ready[1]
    assert (follower.losses, follower.cuts, follower.waits) == (0, 0, 0)


def test_no_worker_gets_everything_while_costs_are_guessed(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 200)
    sizes = []
    while taken := stream.take("cpu", 1e9, 4):
        sizes.append(len(taken[1]))
    assert sum(sizes) == 200
    assert max(sizes) <= FIRST_ITEMS
