"""The report: what it says, that it stands alone, and that nothing in a store can break it."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from orchestrator import report as report_module
from orchestrator.compact import compact
from orchestrator.counts import StageCounts
from orchestrator.errors import StoreError
from orchestrator.report import activity, findings, write_report
from orchestrator.store import Store
from tests.orchestrator.store_fixtures import STARTED, Records, key, little_records, new_store


class Page(HTMLParser):
    """The parts of a page that tests ask about."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.items: list[str] = []
        self._into: list[list[str]] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", self.html))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        into = {"h2": self.headings, "h3": self.headings, "li": self.items}
        if tag in ("td", "th"):
            into[tag] = self.rows[-1]
        if tag in into:
            into[tag].append("")
            self._into.append(into[tag])

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "h3", "li", "td", "th"):
            self._into.pop()

    def handle_data(self, data: str) -> None:
        if self._into:
            self._into[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """Return the first table row that starts with a word."""
        return next(row for row in self.rows if row and row[0] == first)

    def pictures(self) -> dict[str, str]:
        """Return the SVG text of each picture by its description."""
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                source = attributes["src"] or ""
                assert source.startswith("data:image/svg+xml;base64,")
                found[attributes["alt"] or ""] = base64.b64decode(source.partition(",")[2]).decode()
        return found


def store_of(path: Path, records: Records) -> Store:
    store = new_store(path / "store")
    records.seal(store)
    compact(store)
    return store


def test_findings_are_three_true_sentences(tmp_path: Path) -> None:
    molecules, energy, effort = findings(store_of(tmp_path, little_records()))
    assert molecules == (
        "5 of 5 molecules have a relaxed GFN2-xTB geometry; 1 entry of the molecule files could "
        "not be read."
    )
    # Gains are 0.1 to 0.5 eV.
    assert energy == (
        "Relaxing lowers the energy by 6.9 kcal/mol in the median (middle half 4.6 to 9.2); "
        "most for acetate (11.5)."
    )
    assert effort == (
        "A relaxation takes 6 optimiser steps and 0.90 s of CPU time in the median; "
        "no bond changed."
    )


def test_findings_speak_of_the_last_stage(tmp_path: Path) -> None:
    records = Records()
    records.relaxed("methanol", "CO", stage="rough", gain_eV=1.0)
    records.relaxed("ethane", "CC", stage="tight", gain_eV=0.1, changed=True, started_s=2 * STARTED)
    sentences = findings(store_of(tmp_path, records))
    assert sentences[0].startswith("1 of 2 molecules has a relaxed")
    assert "2.3 kcal/mol" in sentences[1]
    assert "bonds changed in 1 of 1 relaxation" in sentences[2]


def test_the_report_tells_the_campaign(tmp_path: Path) -> None:
    records = little_records()
    records.relaxed("ring opener", "C1CC1", steps=40, gain_eV=3.0, changed=True)
    failed = key("failed")
    records.task(
        "gfn2", failed, status="convergence", message="the SCF did not converge",
        mol_key=records.tables["molecules"][0]["key"], attempts=3,
    )  # fmt: skip
    store = store_of(tmp_path, records)
    counts = [StageCounts("embed", 9, 6, 0, 0, 3), StageCounts("gfn2", 9, 6, 1, 1, 1)]
    page = Page(write_report(store, tmp_path / "report.html", counts=counts))
    assert page.items == findings(store)
    assert page.row("gfn2")[:6] == ["gfn2", "9", "6", "1", "1", "1"]
    assert ["gfn2", "convergence", "1"] in page.rows
    rows = {row[1]: row for row in page.rows if len(row) == 7 and row[0] in ("gfn2", "molecules")}
    assert rows["convergence"] == [
        "gfn2", "convergence", "ethanol", "some.smi:1", "the SCF did not converge", "3",
        failed.hex()[:12],
    ]  # fmt: skip
    assert rows["input"][3] == "some.smi:6"
    assert ["gfn2", "GFN2-xTB", "tblite 0.8.0", "BFGS", "6", "6.5", "8.1", "0.90 s"] in page.rows
    pictures = page.pictures()
    assert "structure of ring opener" in pictures
    assert "energy gained (kcal/mol)" in pictures["Energy gained per molecule"]
    assert "heavy atom (kcal/mol)" in pictures["Energy gained per heavy atom"]
    assert "optimiser steps" in pictures["Optimiser steps"]
    assert "CPU time of a relaxation (s)" in pictures["CPU time against number of atoms"]
    for title in ("Largest energy gain", "Most steps", "Bonds changed", "Failed"):
        assert title in page.headings


def test_the_report_stands_alone(tmp_path: Path) -> None:
    page = Page(write_report(store_of(tmp_path, little_records()), tmp_path / "report.html"))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in page.html
    assert "@import" not in page.html
    assert len(page.html) < 3_000_000


def test_what_a_file_says_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    records = Records()
    records.relaxed(evil, "CO", changed=True)
    records.task(
        evil, key(1), status="crash", message=evil, source=evil,
        mol_key=records.tables["molecules"][0]["key"], host=evil,
    )  # fmt: skip
    page = Page(write_report(store_of(tmp_path, records), tmp_path / "report.html"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert any(evil in item for item in page.items)
    assert any(evil in cell for row in page.rows for cell in row)


def test_without_a_plan_the_report_counts_what_finished(tmp_path: Path) -> None:
    page = Page(write_report(store_of(tmp_path, little_records()), tmp_path / "report.html"))
    assert page.row("stage")[:4] == ["stage", "finished", "ok", "failed"]
    # Five good entries and a bad one were read.
    assert page.row("molecules")[:4] == ["molecules", "6", "5", "1"]
    assert page.row("gfn2")[:4] == ["gfn2", "5", "5", "0"]
    assert "waiting" not in page.row("stage")


def test_an_empty_store_has_a_report(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    assert findings(store) == ["No task has finished yet."]
    page = Page(write_report(store, tmp_path / "report.html"))
    assert page.items == ["No task has finished yet."]
    assert page.pictures() == {}


def test_a_store_of_failures_has_a_report(tmp_path: Path) -> None:
    records = Records()
    for line in range(1, 80):
        records.bad_line(line, f"line {line} is not a SMILES")
    store = store_of(tmp_path, records)
    (sentence,) = findings(store)
    assert "79 entries of the molecule files could not be read" in sentence
    page = Page(write_report(store, tmp_path / "report.html"))
    assert "The first 50 of 79" in page.headings
    assert sum("is not a SMILES" in cell for row in page.rows for cell in row) == 50


def test_a_campaign_that_only_embeds_has_a_report(tmp_path: Path) -> None:
    records = little_records()
    for table in ("relaxations", "frames"):
        records.tables[table].clear()
    store = store_of(tmp_path, records)
    assert findings(store) == [
        "No relaxation has finished yet: there are 5 molecules and 10 geometries; 1 entry of "
        "the molecule files could not be read."
    ]
    page = Page(write_report(store, tmp_path / "report.html"))
    assert ["mmff", "MMFF94", "5", "30"] in page.rows


def test_odd_numbers_do_not_stop_a_report(tmp_path: Path) -> None:
    records = Records()
    records.relaxed("one", "CO", frame_energies=[np.nan, np.inf])
    records.relaxed("still", "CC", steps=0, frame_energies=[-5.0])
    for row in records.tables["relaxations"]:
        row["cpu_s"] = 0.0
    for row in records.tables["tasks"]:
        row["wall_s"] = row["cpu_s"] = 0.0
    records.tables["molecules"][0].update(smiles="", name="", n_heavy=0)
    records.tables["molecules"][1].update(smiles="not a SMILES", name="")
    page = Page(write_report(store_of(tmp_path, records), tmp_path / "report.html"))
    assert "0.0 kcal/mol in the median" in page.items[1]
    assert "nan" not in page.text


def test_large_campaigns_are_drawn_in_part_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "_DRAWN", 3)
    page = Page(write_report(store_of(tmp_path, little_records()), tmp_path / "report.html"))
    assert "3 dots drawn at random of 5" in page.text


def test_an_unreadable_shard_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path, little_records())
    (store.path / "inbox" / "run" / "bad-00000000.h5").write_bytes(b"half a fi")
    assert "bad-00000000.h5" in Page(write_report(store, tmp_path / "report.html")).text


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    with pytest.raises(StoreError, match="nowhere"):
        write_report(store, tmp_path / "nowhere" / "report.html")


def test_activity_of_two_busy_workers_with_a_pause() -> None:
    # Two workers, 50 tasks of 10 s each, half of it CPU time; an hour off in the middle.
    start = np.concatenate([np.arange(25) * 10.0, np.arange(25) * 10.0 + 3850.0])
    started = np.concatenate([start, start + 1e-4])
    wall, cpu = np.full(100, 10.0), np.full(100, 5.0)
    rng = np.random.default_rng(0)
    order = rng.permutation(100)
    found = activity(started[order], wall, cpu)
    assert found.workers == 2
    assert found.pauses == 1
    assert found.span == pytest.approx(500.0, abs=0.01)
    assert found.efficiency == pytest.approx(0.5, rel=1e-3)
    np.testing.assert_allclose(found.busy, 2.0, rtol=1e-3)


def test_activity_adds_up_to_the_time_worked() -> None:
    rng = np.random.default_rng(1)
    started = 1.7e9 + np.sort(rng.uniform(0, 3000, 500))
    wall = rng.exponential(20.0, 500)
    found = activity(started, wall, wall)
    assert float(found.busy @ np.diff(found.edges)) == pytest.approx(wall.sum(), rel=1e-6)
    assert activity(np.zeros(0), np.zeros(0), np.zeros(0)).efficiency == 0.0
