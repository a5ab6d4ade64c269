"""How a campaign stands: every planned task counted once, every failure explained."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import progress, status
from orchestrator.campaign import Campaign, load_campaign
from orchestrator.counts import StageCounts
from orchestrator.errors import StoreError
from orchestrator.molecules import find_files, sources_digest
from orchestrator.plan import Plan
from orchestrator.status import explain, stand
from orchestrator.tally import plan_digest
from tests.orchestrator.run_fixtures import (
    by_key,
    complete,
    ingested,
    standing_of,
    store_of,
    write_campaign,
)

# Two bridgeheads that cannot both have the configuration asked for: no geometry exists.
IMPOSSIBLE = "F[C@]12C[C@@](F)(C1)C2"
STAGES = (
    '[[stages]]\nkernel = "embed"\nconformers = 2\nmax_attempts = 5\n'
    '[[stages]]\nkernel = "mmff"\n'
    '[[stages]]\nname = "gfn2"\nkernel = "relax"\n'
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished campaign with one molecule that cannot be embedded and one bad line."""
    folder = tmp_path_factory.mktemp("status")
    path = write_campaign(folder, ["CO methanol", IMPOSSIBLE, "C1CC", "CC"], stages=STAGES)
    complete(path)
    return path


def test_what_a_failure_cuts_off_is_upstream(finished: Path) -> None:
    standing = standing_of(finished)
    assert [(c.planned, c.ok, c.failed, c.upstream, c.waiting) for c in standing.counts] == [
        (6, 4, 2, 0, 0),
        (6, 4, 0, 2, 0),
        (6, 4, 0, 2, 0),
    ]
    assert standing.failures == {"embed": 2, "input": 1}
    assert standing.plan_complete
    assert (standing.entries, standing.bad_entries) == (4, 1)


def test_explain_says_why_later_stages_never_started(finished: Path) -> None:
    text = explain(load_campaign(finished), store_of(finished), IMPOSSIBLE)
    assert text[0].endswith("molecules.smi, line 2)")
    assert text[1].startswith("  embed: failed (embed): ")
    assert "no geometry" in text[1]
    assert text[2:4] == [
        "  mmff: never started, since 'embed' failed",
        "  gfn2: never started, since 'embed' failed",
    ]
    assert text[4].startswith("  embed (conformer 1): failed (embed): ")


def test_explain_takes_any_spelling_a_key_or_its_start(finished: Path) -> None:
    campaign, store = load_campaign(finished), store_of(finished)
    by_smiles = explain(campaign, store, "OC")
    assert by_smiles[0].startswith("methanol: CO (")
    assert by_smiles[0].endswith("molecules.smi, line 1)")
    assert [line.split(":")[1].split(";")[0] for line in by_smiles[1:]] == [" ok"] * 6
    (key,) = (
        k
        for k, row in by_key(store, "tasks").items()
        if row["stage"] == "gfn2" and row["key"] in "".join(by_smiles[:4])
    )
    for what in (key, key[:10], key.upper()):
        told = explain(campaign, store, what)
        assert told == by_smiles[:4]


def test_explain_finds_a_bad_line_by_its_text(finished: Path) -> None:
    with pytest.raises(StoreError, match="neither the key"):
        explain(load_campaign(finished), store_of(finished), "no such thing")
    (line,) = explain(load_campaign(finished), store_of(finished), "C1CC")
    assert "molecules.smi, line 3: input failure: " in line
    # A molecule that is part of a bad line is not that line.
    assert not any("input failure" in t for t in told(finished, "CC"))


def told(finished: Path, what: str) -> list[str]:
    return explain(load_campaign(finished), store_of(finished), what)


def told_by(campaign: Campaign, **changes: Any) -> progress.ProgressFile:
    """Return what a driver of this campaign could have written, with made-up counts."""
    stages = [StageCounts(stage.name, 9, 8, 1, 0, 0) for stage in campaign.stages]
    digest = sources_digest(
        find_files(campaign.molecules, campaign.path.parent), campaign.molecules
    )
    told = progress.ProgressFile(
        run_id="one", digest=digest, plan=plan_digest(Plan(campaign)), entries=9, stages=stages,
        failures={"embed": 1}, time_s=time.time() + 60, ended=True,
    )  # fmt: skip
    return dataclasses.replace(told, **changes)


def test_the_drivers_counts_stand_while_nothing_is_newer(tmp_path: Path) -> None:
    path = write_campaign(tmp_path, ["CO", "CC"], stages=STAGES)
    campaign = load_campaign(path)
    store, _ = ingested(campaign)
    counted = stand(campaign, store)
    assert (counted.as_of, counted.current, counted.counts[0].planned) == (None, True, 4)
    last = told_by(campaign)
    progress.write(store.path, last)
    told = stand(campaign, store)
    assert (told.as_of, told.current, told.counts[0].planned) == (last.time_s, True, 9)
    assert told.failures == {"embed": 1}
    assert stand(campaign, store, exact=True) == counted
    # Older than the newest chunk; killed; of other stages; of other molecules; nothing looked at.
    for changes in (
        {"time_s": time.time() - 3600},
        {"ended": False},
        {"plan": "other"},
        {"digest": "other"},
        {"entries": 0},
    ):
        progress.write(store.path, told_by(campaign, **changes))
        assert stand(campaign, store) == counted


def test_of_very_many_tasks_a_killed_drivers_last_word_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_campaign(tmp_path, ["CO", "CC"], stages=STAGES)
    campaign = load_campaign(path)
    store, _ = ingested(campaign)
    monkeypatch.setattr(status, "COUNTED_TASKS", 20)
    progress.write(store.path, told_by(campaign, ended=False))
    told = stand(campaign, store)
    assert (told.current, told.counts[0].ok) == (False, 8)
    assert stand(campaign, store, exact=True).current


def test_before_the_first_task_everything_waits(tmp_path: Path) -> None:
    path = write_campaign(tmp_path, ["CO", "CC"], stages=STAGES)
    campaign = load_campaign(path)
    store, _ = ingested(campaign)
    assert [c.waiting for c in standing_of(path).counts] == [4, 4, 4]
    text = explain(campaign, store, "CC")
    assert text[1].startswith("  embed: waiting; `basin run` computes it")
    with pytest.raises(StoreError, match="no such molecule"):
        explain(campaign, store, "CCCCCC")
