"""Columns: what goes in comes out, through selection, joining and HDF5."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator import hdf5
from orchestrator.columns import (
    category,
    concat,
    empty,
    from_records,
    key_array,
    key_bytes,
    key_words,
    strings_to_varlen,
)
from orchestrator.schema import TABLES
from tests.orchestrator.random_stores import plain_rows

TEXTS = ["", "a", "é", "日本語", "𝛼-helix", "line\nbreak", "nul\0inside", " ", "x" * 300, "", "Å²"]


def random_cell(rng: random.Random, kind: str, dtype: str, width: int, length: int) -> Any:
    if kind == "key":
        return rng.randbytes(16)
    if kind in ("string", "category"):
        return rng.choice(TEXTS)
    info = np.dtype(dtype)
    if info.kind == "f":
        special = [0.0, -0.0, 1e-30, -1e30, float("inf"), 3.5]
        values = [rng.choice(special) for _ in range(length * (width or 1))]
    else:
        limits = np.iinfo(info)
        values = [rng.randint(limits.min, limits.max) for _ in range(length * (width or 1))]
    if kind == "scalar":
        return np.array(values, info)[0]
    return np.array(values, info).reshape(-1, *((width,) if width else ()))


def random_records(rng: random.Random, table: str, count: int) -> list[dict[str, Any]]:
    records = []
    for _ in range(count):
        lengths: dict[str, int] = {}
        record = {}
        for column in TABLES[table].columns:
            length = 1
            if column.kind == "ragged":
                length = lengths.setdefault(column.pointer, rng.choice([0, 0, 1, 2, 7]))
            record[column.name] = random_cell(rng, column.kind, column.dtype, column.width, length)
        records.append(record)
    return records


def plain(table: str, record: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for column in TABLES[table].columns:
        cell = record[column.name]
        if column.kind == "key":
            made[column.name] = list(key_words(cell))
        elif column.kind in ("string", "category"):
            made[column.name] = cell
        else:
            made[column.name] = np.asarray(cell, column.dtype).tolist()
    return made


@pytest.mark.parametrize("table", list(TABLES))
@pytest.mark.parametrize("seed", range(6))
def test_rows_survive_joining_choosing_and_storing(table: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{table} {seed}")
    parts = [random_records(rng, table, rng.choice([0, 1, 2, 9])) for _ in range(5)]
    expected = [plain(table, record) for part in parts for record in part]
    rows = concat([from_records(table, part) for part in parts])
    assert len(rows) == len(expected)
    assert plain_rows(rows) == expected

    order = [rng.randrange(len(expected)) for _ in range(12)] if expected else []
    chosen = rows.take(np.array(order, int))
    assert plain_rows(chosen) == [expected[i] for i in order]
    mask = np.array([rng.random() < 0.5 for _ in expected], bool)
    kept = [row for row, keep in zip(expected, mask, strict=True) if keep]
    assert plain_rows(rows.take(mask)) == kept

    for packed in (False, True):
        path = tmp_path / f"{packed}.h5"
        path.write_bytes(hdf5.build([chosen], kind="test", campaign="c", packed=packed))
        with hdf5.TableFile(path, str(path)) as file:
            assert file.n_rows(table) == len(order)
            assert plain_rows(file.read(table)) == plain_rows(chosen)
            a, b = sorted((rng.randint(0, len(order)), rng.randint(0, len(order))))
            part = file.read(table, rows=slice(a, b))
            assert plain_rows(part) == plain_rows(chosen)[a:b]
            pieces = list(file.iterate(table, step=5))
            assert [row for piece in pieces for row in plain_rows(piece)] == plain_rows(chosen)


def test_a_projection_reads_only_what_is_named(tmp_path: Path) -> None:
    rows = from_records("tasks", random_records(random.Random(5), "tasks", 4))
    path = tmp_path / "tasks.h5"
    path.write_bytes(hdf5.build([rows], kind="test", campaign="c", packed=True))
    with hdf5.TableFile(path, str(path)) as file:
        read = file.read("tasks", ["status", "key"])
    assert set(read.columns) == {"status", "key"}
    assert read["status"].strings() == rows["status"].strings()
    assert set(empty("tasks", ["line"]).columns) == {"line"}


def test_text_that_is_not_unicode_is_stored_all_the_same() -> None:
    # A name read with surrogateescape from a file of unknown encoding.
    odd = b"na\xefve".decode("utf-8", "surrogateescape")
    assert strings_to_varlen([odd, "fine"]).strings() == ["na?ve", "fine"]


@pytest.mark.parametrize("count", [65_536, 65_537, 100_000])
def test_more_categories_than_two_bytes_can_tell(count: int) -> None:
    # One molecule per file, a hundred thousand files: each is a source.
    names = [f"molecule-{i}.xyz" for i in range(count)]
    assert category(names).strings() == names
    rows = empty("tasks", ["source"])
    pieces = []
    for start in range(0, count, 4096):
        piece = empty("tasks", ["source"])
        piece.columns["source"] = category(names[start : start + 4096])
        pieces.append(piece)
    joined = concat([rows, *pieces])
    assert joined["source"].strings() == names


def test_ragged_columns_of_one_row_must_agree() -> None:
    record = random_records(random.Random(1), "relaxations", 1)[0]
    record["numbers"] = np.ones(3, np.uint8)
    record["positions"] = np.zeros((4, 3))
    with pytest.raises(ValueError, match="numbers has 3 entries and positions 4"):
        from_records("relaxations", [record])


def test_key_words_sort_like_hexadecimal() -> None:
    rng = random.Random(4)
    keys = [rng.randbytes(16) for _ in range(200)]
    words = key_array(keys)
    by_words = [keys[i] for i in np.lexsort((words[:, 1], words[:, 0]))]
    assert by_words == sorted(keys)
    assert [key_bytes(pair) for pair in words.tolist()] == keys
