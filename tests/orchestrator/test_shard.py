"""Shards that were cut off, altered, written by others, or have no room: told, and nothing lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest

from orchestrator import compact as compaction
from orchestrator import hdf5, shard
from orchestrator.columns import from_records
from orchestrator.compact import compact
from orchestrator.errors import CorruptShardError, StoreFullError, StoreVersionError
from orchestrator.schema import SCHEMA_VERSION
from orchestrator.store import Store
from tests.orchestrator.random_stores import (
    add_item,
    fill,
    many_relaxations,
    mount,
    schema_of,
    seal_rows,
    small_disk,
    wrong_items,
)
from tests.orchestrator.store_fixtures import Records, new_store


def sealed(store: Store, numbers: range, name: str) -> Path:
    records = Records()
    for number in numbers:
        add_item(records, number)
    return records.seal(store, name)


def named_after_content(folder: Path, data: bytes) -> Path:
    path = folder / f"others-{zlib.crc32(data):08x}.h5"
    path.write_bytes(data)
    return path


def assert_refused(path: Path, remedy: str = "computed again by the next `basin run`") -> None:
    with pytest.raises(CorruptShardError) as caught:
        shard.open_shard(path)
    assert str(path) in str(caught.value)
    assert remedy in str(caught.value)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


# --- damage -----------------------------------------------------------------------------------


def test_a_shard_cut_off_anywhere_is_refused(store: Store) -> None:
    path = sealed(store, range(20), "cut")
    whole = path.read_bytes()
    places = [0, 1, 7, 8, 95, 96, 512, len(whole) // 2, len(whole) - 8, len(whole) - 1]
    for length in [*places, *random.Random(1).sample(range(len(whole)), 40)]:
        path.write_bytes(whole[:length])
        assert_refused(path)
    path.write_bytes(whole + b"\0")
    assert_refused(path)
    path.write_bytes(whole)
    with shard.open_shard(path) as file:
        assert file.n_rows("tasks") == 20


def test_a_single_flipped_bit_is_noticed(store: Store) -> None:
    path = sealed(store, range(5), "flipped")
    whole = path.read_bytes()
    for place in random.Random(2).sample(range(len(whole) * 8), 200):
        altered = bytearray(whole)
        altered[place // 8] ^= 1 << place % 8
        path.write_bytes(altered)
        assert_refused(path)


def test_what_is_not_hdf5_or_of_others_is_refused(store: Store) -> None:
    folder = store.path / "inbox"
    assert_refused(named_after_content(folder, b""))
    assert_refused(named_after_content(folder, b"key,energy\n1,2\n"))
    image = BytesIO()
    with h5py.File(image, "w") as file:
        file["energy"] = np.arange(3)
    assert_refused(named_after_content(folder, image.getvalue()), "move it out of the store")
    with h5py.File(image, "w") as file:
        file.attrs["format"] = "another program's"
        file.attrs["schema_version"] = SCHEMA_VERSION
    assert_refused(named_after_content(folder, image.getvalue()), "move it out of the store")


def test_damage_hides_no_other_shard_and_is_quarantined(store: Store) -> None:
    sealed(store, range(20), "good")
    bad = sealed(store, range(20, 40), "bad")
    bad.write_bytes(bad.read_bytes()[:3000])
    snapshot = store.snapshot()
    assert wrong_items(snapshot.read("relaxations"), snapshot.read("frames"), set(range(20))) == []
    assert list(snapshot.problems) == [str(bad)]
    assert compact(store) == 1
    assert wrong_items(store.read("relaxations"), store.read("frames"), set(range(20))) == []
    assert bad.exists()
    problems = store.snapshot().problems
    assert list(problems) == [str(bad.relative_to(store.path))]
    assert str(bad) in problems[str(bad.relative_to(store.path))]
    # Computed again, its rows count; the damaged file is not looked at any more.
    sealed(store, range(20, 40), "again")
    assert compact(store) == 1
    assert wrong_items(store.read("relaxations"), store.read("frames"), set(range(40))) == []


def test_a_shard_with_one_broken_table_is_taken_in_not_at_all(store: Store) -> None:
    records = Records()
    for number in range(5):
        add_item(records, number)
    tables = [from_records(name, records.tables[name]) for name in ("relaxations", "tasks")]
    image = BytesIO(hdf5.build(tables, kind="shard", campaign="little", packed=False))
    with h5py.File(image, "r+") as file:
        del file["tasks"]["wall_s"]
    folder = store.path / "inbox" / "run"
    folder.mkdir()
    broken = named_after_content(folder, image.getvalue())
    assert compact(store) == 0
    assert len(store.read("relaxations")) == 0
    assert "tasks" in store.snapshot().problems[str(broken.relative_to(store.path))]


def test_temporary_files_are_ignored_until_they_are_old(store: Store) -> None:
    sealed(store, range(3), "good")
    stray = store.path / "inbox" / "run" / f"{shard.TEMPORARY}abc-0000001-0-00000000.h5"
    stray.write_bytes(b"half a sh")
    assert stray not in set(store.sealed_shards())
    compact(store)
    assert stray.exists(), "its writer may still be at work"
    assert not store.snapshot().problems
    old = time.time() - compaction.STRAY_S - 1
    os.utime(stray, (old, old))
    compact(store)
    assert not stray.exists()
    assert len(store.read("tasks")) == 3


# --- other schemas ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, SCHEMA_VERSION - 1])
def test_a_shard_of_another_schema_waits_for_its_own_basin(store: Store, version: int) -> None:
    sealed(store, range(4), "mine")
    with schema_of(version):
        other = sealed(store, range(4, 9), "other")
    with pytest.raises(StoreVersionError, match=f"schema {version}") as caught:
        shard.open_shard(other)
    assert str(other) in str(caught.value)
    snapshot = store.snapshot()
    assert len(snapshot.read("tasks")) == 4
    assert f"schema {version}" in snapshot.problems[str(other)]
    assert compact(store) == 1
    assert other.exists()
    assert len(store.read("tasks")) == 4
    with schema_of(version), shard.open_shard(other) as file:
        assert file.n_rows("tasks") == 5
    # It stays a shard that is still to be taken in: neither consumed nor in quarantine.
    assert store.snapshot().shards == [other]


# --- no room ----------------------------------------------------------------------------------


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{shard.TEMPORARY}*"))


def test_a_full_disk_keeps_what_was_sealed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        store = new_store(disk / "store")
        sealed(store, range(10), "early")
        ballast = fill(disk, leave=20_000)
        with pytest.raises(StoreFullError) as caught:
            sealed(store, range(10, 200), "late")
        assert str(store.path / "inbox" / "run") in str(caught.value)
        assert "no space left" in str(caught.value)
        assert "start the same command again" in str(caught.value)
        assert temporaries(disk) == []
        assert len(store.read("tasks")) == 10
        ballast.unlink()
        sealed(store, range(10, 200), "late")
        expected = set(range(200))
        assert wrong_items(store.read("relaxations"), store.read("frames"), expected) == []


def test_compaction_on_a_full_disk_leaves_all_as_it_was(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        store = new_store(disk / "store")
        for i in range(4):
            seal_rows(store, many_relaxations(i, 100), f"{i}")
        # Room for some of the segments, but not for all of them.
        for leave in (0, 8_000, 60_000):
            ballast = fill(disk, leave=leave)
            with pytest.raises(StoreFullError, match="no space left"):
                compact(store)
            assert temporaries(disk) == []
            assert list((store.path / "segments").iterdir()) == []
            assert len(store.read("relaxations")) == 400
            ballast.unlink()
        assert compact(store) == 4
        assert len(store.read("relaxations")) == 400
        assert store.snapshot().shards == []


def basin(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, **environment},
        check=False,
    )


def campaign_on(disk: Path, folder: Path) -> Path:
    molecules = ["C" * n + "O" for n in range(1, 9)] + ["C" * n + "N" for n in range(1, 9)]
    (folder / "alcohols.smi").write_text("\n".join(molecules))
    path = folder / "full.toml"
    path.write_text(
        f'name = "full"\nstore = "{disk / "store"}"\n[molecules]\nfiles = ["alcohols.smi"]\n'
        '[[stages]]\nkernel = "embed"\nconformers = 8\n[[stages]]\nkernel = "mmff"\n'
    )
    return path


@pytest.mark.parametrize(
    "size",
    [
        pytest.param("8k", id="at-the-start"),
        pytest.param("48k", id="while-reading-molecules"),
        pytest.param("150k", id="while-computing"),
    ],
)
def test_a_run_that_fills_the_disk_says_so_and_goes_on_with_room(tmp_path: Path, size: str) -> None:
    with small_disk(tmp_path / "disk", size) as disk:
        campaign = campaign_on(disk, tmp_path)
        stopped = basin("run", str(campaign), "--workers", "2")
        message = stopped.stderr.strip().splitlines()[-1]
        assert stopped.returncode == 3, stopped.stderr
        assert "no space left" in message
        assert "finished work is kept" in message
        assert "Traceback" not in stopped.stderr
        assert temporaries(disk) == []
        before = disk / "store" / "campaign.json"
        done = 0
        if before.exists():
            # Reading needs no room.
            done = len(Store(disk / "store").read("geometries"))
        mount(disk, "-o", "remount,size=50m")
        finished = basin("run", str(campaign), "--workers", "2", "--json")
        assert finished.returncode == 0, finished.stderr
        end = json.loads(finished.stdout.splitlines()[-1])
        assert [(c["planned"], c["ok"]) for c in end["counts"]] == [(128, 128)] * 2
        assert end["done_before"] == done
        assert end["done_before"] + end["done_now"] == 256
        geometries = Store(disk / "store").read("geometries", ["key"])["key"]
        assert len({tuple(words) for words in geometries.tolist()}) == len(geometries) == 256
