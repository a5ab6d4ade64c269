"""Manifests: one generation each number, whoever is first; damaged ones are passed by."""

from __future__ import annotations

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import manifest, shard
from orchestrator.compact import compact
from orchestrator.errors import StoreError, StoreFullError
from orchestrator.manifest import Manifest, Segment
from tests.orchestrator.random_stores import add_item, wrong_items
from tests.orchestrator.store_fixtures import Records, new_store

FULL = Manifest(
    7,
    (Segment("segments/tasks-000007-0a.h5", "tasks", 12, 3456, 0xFFFFFFFF),),
    {"inbox/run/a-00000000.h5": 1.5},
    {"segments/tasks-000003-0b.h5": 2.5},
    {"inbox/run/bäd-1.h5": "truncated: 3 bytes"},
)


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    assert manifest.publish(tmp_path, FULL)
    assert manifest.newest(tmp_path) == FULL
    assert manifest.newest(tmp_path / "nowhere") == Manifest()


def test_each_generation_is_published_once(tmp_path: Path) -> None:
    def publish(who: int) -> bool:
        return manifest.publish(tmp_path, Manifest(1, quarantine={"by": str(who)}))

    with ThreadPoolExecutor(8) as pool:
        won = [who for who, first in enumerate(pool.map(publish, range(40))) if first]
    assert len(won) == 1
    assert manifest.newest(tmp_path).quarantine == {"by": str(won[0])}
    assert sorted(os.listdir(tmp_path)) == ["0000000001.json"]


def test_a_damaged_manifest_gives_way_to_the_one_before(tmp_path: Path) -> None:
    for generation in (1, 2):
        assert manifest.publish(tmp_path, replace(FULL, generation=generation))
    newest = tmp_path / "0000000002.json"
    whole = newest.read_bytes()
    rng = random.Random(3)
    for length in (0, 1, 8, 9, len(whole) - 1, *rng.sample(range(len(whole)), 20)):
        newest.write_bytes(whole[:length])
        found = manifest.newest(tmp_path)
        assert found.segments == FULL.segments
        # The damaged number is not free, so the next one is that after it.
        assert manifest.publish(tmp_path, replace(found, generation=found.generation + 1))
        (tmp_path / "0000000003.json").unlink()
    for place in rng.sample(range(len(whole)), 40):
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert manifest.decode(newest.read_bytes()) is None


def test_a_store_goes_on_after_its_newest_manifest_was_damaged(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    for part in range(3):
        records = Records()
        for number in range(10 * part, 10 * part + 10):
            add_item(records, number)
        records.seal(store, f"part{part}")
        if part < 2:
            compact(store)
    newest = max((store.path / "manifest").iterdir())
    newest.write_bytes(newest.read_bytes()[:-20])
    expected = set(range(30))
    assert wrong_items(store.read("relaxations"), store.read("frames"), expected) == []
    assert compact(store) == 2, "what only the damaged manifest said is taken in again"
    assert store.snapshot().shards == []
    assert wrong_items(store.read("relaxations"), store.read("frames"), expected) == []


def test_all_manifests_damaged_leaves_what_the_inbox_holds(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    records = Records()
    for number in range(10):
        add_item(records, number)
    records.seal(store)
    compact(store)
    for path in (store.path / "manifest").iterdir():
        path.write_bytes(b"")
    assert compact(store) == 1
    assert wrong_items(store.read("relaxations"), store.read("frames"), set(range(10))) == []


def test_only_the_last_generations_are_kept(tmp_path: Path) -> None:
    for generation in range(1, 60):
        assert manifest.publish(tmp_path, Manifest(generation))
    left = sorted(int(path.stem) for path in tmp_path.iterdir())
    assert left == list(range(60 - len(left), 60))
    assert 2 <= len(left) <= 20
    assert manifest.newest(tmp_path).generation == 59


def test_strange_files_are_no_manifests(tmp_path: Path) -> None:
    manifest.publish(tmp_path, Manifest(3))
    for name in ("0000000009.json~", ".tmp-0000000009.json", "9.json", "notes.txt"):
        (tmp_path / name).write_bytes(Manifest(9).encode())
    assert manifest.newest(tmp_path).generation == 3


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (errno.ENOSPC, StoreFullError, "no space left"),
        (errno.EDQUOT, StoreFullError, "no space left"),
        (errno.EPERM, StoreError, "hard links"),
    ],
)
def test_a_link_that_fails_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type, words: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(error, match=words):
        manifest.publish(tmp_path, Manifest(1))
    assert os.listdir(tmp_path) == [], "nothing half-made stays"


def test_a_link_whose_answer_was_lost_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # NFS may do the work, lose the reply, and report an error to the second try.
    real = os.link

    def lossy(source: Any, target: Any) -> None:
        real(source, target)
        raise OSError(errno.EIO, "reply lost")

    monkeypatch.setattr(os, "link", lossy)
    assert manifest.publish(tmp_path, Manifest(1))
    assert manifest.newest(tmp_path).generation == 1
    assert not list(tmp_path.glob(f"{shard.TEMPORARY}*"))
