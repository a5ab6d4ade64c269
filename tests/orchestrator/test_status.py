"""How a campaign stands: every planned task counted once, every failure explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.campaign import load_campaign
from orchestrator.errors import StoreError
from orchestrator.status import explain
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


def test_before_the_first_task_everything_waits(tmp_path: Path) -> None:
    path = write_campaign(tmp_path, ["CO", "CC"], stages=STAGES)
    campaign = load_campaign(path)
    store, _ = ingested(campaign)
    assert [c.waiting for c in standing_of(path).counts] == [4, 4, 4]
    text = explain(campaign, store, "CC")
    assert text[1].startswith("  embed: waiting; `basin run` computes it")
    with pytest.raises(StoreError, match="no such molecule"):
        explain(campaign, store, "CCCCCC")
