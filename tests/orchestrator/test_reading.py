"""Reading on several cores: the same entries in the same order, whatever a record does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import reading
from orchestrator.campaign import load_campaign
from orchestrator.molecules import Entry, Record, find_files, read_entries
from orchestrator.reading import Reading
from tests.orchestrator.run_fixtures import write_campaign
from tests.orchestrator.test_ingest import xyz

EMBED = '[[stages]]\nkernel = "embed"\n'


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_ALONE", 2)
    monkeypatch.setattr(reading, "BATCH", 4)


def told(entry: Entry) -> tuple[Any, ...]:
    at = None if entry.positions is None else entry.positions.tobytes()
    return (entry.source, entry.line, entry.text, entry.name, entry.molecule, at, str(entry.error))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("settings", ["", "limit = 20", "every = 3", 'split = "training"'])
def test_every_format_reads_as_in_one_process(tmp_path: Path, settings: str) -> None:
    from rdkit import Chem

    lines = [f"{'C' * n}O alcohol{n}" for n in range(1, 20)]
    lines[3:3] = ["C1CC broken", "[CH3:1]O mapped", "C[N+](=O)[O-] nitro", "CC(C)(C)(C)C no"]
    write_campaign(tmp_path, lines, stages=EMBED)
    (tmp_path / "b.csv").write_text('smiles,name\nCC,"a, b"\n"CC\nCCC,c\n')
    (tmp_path / "c.sdf").write_text(f"{Chem.MolToMolBlock(Chem.MolFromSmiles('CCN'))}$$$$\nbad\n")
    (tmp_path / "d.xyz").write_text(
        xyz("CO") + "3\n\nO 0 0 0\nH 0 0\n" + xyz("C[NH3+]", 1, "charge=1")
    )
    positions = np.array([[[0.0, 0, 0], [0, 0, 0.74], [0, 0, 0]]])
    np.savez(tmp_path / "e.npz", numbers=np.array([[1, 1, 0]]), positions=positions)
    path = write_campaign(
        tmp_path, stages=EMBED, files='["*.smi", "*.csv", "*.sdf", "*.xyz", "*.npz"]'
    )
    path.write_text(path.read_text().replace("[molecules]\n", f"[molecules]\n{settings}\n"))
    source = load_campaign(path).molecules
    files = find_files(source, tmp_path)
    alone = [told(entry) for entry in read_entries(files, source)]
    with Reading(2) as pool:
        together = [told(e) for e in read_entries(files, source, understand=pool.entries)]
        rest = [told(e) for e in read_entries(files, source, 5, understand=pool.entries)]
    assert together == alone
    assert rest == alone[5:]
    assert len(alone) > 8


def records(count: int, bad: int) -> Iterator[Record]:
    """Yield records of which one takes down the process that reads it."""
    from orchestrator.molecules import _from_smiles

    for n in range(count):
        read = partial(os._exit, 7) if n == bad else partial(_from_smiles, "C" * (n + 1))
        yield Record("f.smi", n + 1, "text", f"m{n}", read)


@pytest.mark.usefixtures("small_batches")
def test_a_record_that_takes_its_reader_down_costs_itself_alone() -> None:
    with Reading(2) as pool:
        entries = list(pool.entries(records(20, 9)))
    assert [entry.line for entry in entries] == list(range(1, 21))
    assert [entry.line for entry in entries if entry.molecule is None] == [10]
    assert "takes down the program that reads it (exit 7)" in str(entries[9].error)


@pytest.mark.usefixtures("small_batches")
def test_no_process_is_left_however_it_ends() -> None:
    with Reading(2) as pool:
        entries = pool.entries(records(40, -1))
        for _ in range(5):
            next(entries)
        started = list(pool._all)
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)
