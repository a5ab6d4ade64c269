"""Compaction: no row lost, none doubled, whoever races and dies; large segments others can read."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from orchestrator import compact as compaction
from orchestrator import hdf5, shard
from orchestrator.columns import Rows, key_bytes
from orchestrator.compact import compact
from orchestrator.errors import CorruptShardError, StoreError
from orchestrator.schema import TABLES
from orchestrator.store import Store
from tests.orchestrator.chain_stores import Chains
from tests.orchestrator.diffusion_stores import Study
from tests.orchestrator.random_stores import (
    add_item,
    many_relaxations,
    numbered,
    plain_rows,
    seal_rows,
    wrong_items,
)
from tests.orchestrator.store_fixtures import Records, little_records, new_store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def seal_items(
    store: Store, numbers: list[int], name: str, *, status: str = "ok", started_s: float = 0.0
) -> Path:
    records = Records()
    for number in numbers:
        add_item(records, number, status=status, started_s=started_s)
    return records.seal(store, name)


def outcomes(store: Store) -> dict[bytes, tuple[str, str]]:
    tasks = store.read("tasks", ["key", "status", "message"])
    keys = [key_bytes(words) for words in tasks["key"].tolist()]
    assert len(set(keys)) == len(keys)
    said = zip(tasks["status"].strings(), tasks["message"].strings(), strict=True)
    return dict(zip(keys, said, strict=True))


# --- what is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_shards_and_passes_gives_the_same_tables(
    store: Store, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(compaction, "PASS_BYTES", rng.choice([1, 40_000, 1 << 30]))
    monkeypatch.setattr(compaction, "SEGMENT_ROWS", rng.choice([10, 50, 10_000]))
    monkeypatch.setattr(compaction, "SEGMENT_BYTES", rng.choice([3_000, 1 << 30]))
    ok: set[int] = set()
    latest: dict[int, tuple[float, str]] = {}
    for serial in range(24):
        numbers = rng.sample(range(80), rng.choice([1, 5, 12]))
        status = rng.choice(["ok", "ok", "convergence", "timeout"])
        when = float(rng.randrange(1000)) + serial / 100
        seal_items(store, numbers, f"{rng.randrange(1000):03d}", status=status, started_s=when)
        for number in numbers:
            if status == "ok":
                ok.add(number)
            elif when > latest.get(number, (-1.0, ""))[0]:
                latest[number] = (when, status)
        if rng.random() < 0.3:
            compact(store)
    for compacted in (False, True):
        if compacted:
            compact(store)
        assert wrong_items(store.read("relaxations"), store.read("frames"), ok) == []
        expected = {
            numbered(n): (s, f"item {n} at {when}") for n, (when, s) in latest.items()
        } | dict.fromkeys(map(numbered, ok), ("ok", ""))
        assert outcomes(store) == expected
    snapshot = store.snapshot()
    index = snapshot.task_index()
    assert len(index) == len(expected)
    held = {t: sum(s.rows for s in snapshot.manifest.segments if s.table == t) for t in TABLES}
    assert held["relaxations"] == held["frames"] == len(ok)
    assert held["tasks"] == len(expected)


def test_ok_beats_failed_and_the_latest_failure_wins(store: Store) -> None:
    seal_items(store, [1, 2, 3], "a", status="timeout", started_s=10.0)
    compact(store)
    seal_items(store, [1, 2, 3], "b", status="crash", started_s=30.0)
    seal_items(store, [1, 2, 3], "c", status="convergence", started_s=20.0)
    seal_items(store, [2], "d", status="ok", started_s=5.0)
    expected = {
        numbered(1): ("crash", "item 1 at 30.0"),
        numbered(2): ("ok", ""),
        numbered(3): ("crash", "item 3 at 30.0"),
    }
    assert outcomes(store) == expected
    compact(store)
    assert outcomes(store) == expected
    seal_items(store, [2], "e", status="timeout", started_s=99.0)
    compact(store)
    assert outcomes(store) == expected


def test_the_first_result_of_a_task_stays(store: Store) -> None:
    first, second = Records(), Records()
    add_item(first, 4)
    add_item(second, 4)
    second.tables["relaxations"][0]["final_energy_eV"] = 123.0
    first.seal(store, "a")
    compact(store)
    second.seal(store, "b")
    for _ in range(2):
        assert store.read("relaxations", ["final_energy_eV"])["final_energy_eV"] == [-4.5]
        compact(store)


def test_small_segments_grow_into_few_large_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "SEGMENT_ROWS", 2_000)
    passes = 60
    for i in range(passes):
        seal_rows(store, many_relaxations(i, 100), f"{i}")
        compact(store)
    segments = [s for s in store.snapshot().manifest.segments if s.table == "relaxations"]
    assert sum(s.rows for s in segments) == 100 * passes
    assert len(segments) <= 12
    assert max(s.rows for s in segments) >= 1_000
    assert all(s.rows <= 2_000 for s in segments)
    written = [s.file for s in segments]
    on_disk = {f"segments/{p.name}" for p in (store.path / "segments").iterdir()}
    assert set(written) <= on_disk


def test_rows_of_a_molecule_lie_together(store: Store) -> None:
    for i in range(4):
        seal_items(store, list(range(i, 200, 4)), f"{i}")
    compact(store)
    rows = store.read("relaxations", ["mol_key", "key"])
    keys = np.concatenate([rows["mol_key"], rows["key"]], axis=1).tolist()
    assert keys == sorted(keys)


# --- deleting ---------------------------------------------------------------------------------


def test_files_are_deleted_only_after_the_grace_period(store: Store) -> None:
    seal_items(store, [1, 2], "a")
    compact(store)
    before = store.snapshot()
    seal_items(store, [3], "b")
    compact(store)
    # A reader that looked before can still read all that it saw.
    assert len(before.read("relaxations")) == 2
    assert len(list(store.sealed_shards())) == 2
    compact(store, grace_s=-1.0)
    assert list(store.sealed_shards()) == []
    live = {s.file for s in store.snapshot().manifest.segments}
    assert {f"segments/{p.name}" for p in (store.path / "segments").iterdir()} == live
    assert wrong_items(store.read("relaxations"), store.read("frames"), {1, 2, 3}) == []
    with pytest.raises(FileNotFoundError):
        before.read("relaxations")
    seal_items(store, [4], "c")
    compact(store)
    current = store.snapshot().manifest
    assert len(current.consumed) == 1, "the manifest forgets shards that are gone"


def test_of_very_many_shards_the_oldest_go_sooner(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "KEPT_SHARDS", 2)
    monkeypatch.setattr(compaction, "LEAST_GRACE_S", -1.0)
    for item in range(5):
        seal_items(store, [item], f"s{item}")
        compact(store)
    names = [path.name.split("-")[0] for path in store.sealed_shards()]
    assert sorted(names) == ["s3", "s4"]
    assert wrong_items(store.read("relaxations"), store.read("frames"), set(range(5))) == []


def test_of_very_large_shards_the_oldest_go_sooner(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "LEAST_GRACE_S", -1.0)
    for item in range(4):
        seal_items(store, [item], f"s{item}")
        compact(store)
    sizes = [path.stat().st_size for path in store.sealed_shards()]
    assert len(sizes) == 4
    monkeypatch.setattr(compaction, "KEPT_BYTES", int(2.5 * max(sizes)))
    seal_items(store, [4], "s4")
    compact(store)
    names = {path.name.split("-")[0] for path in store.sealed_shards()}
    assert "s4" in names
    assert "s0" not in names
    assert wrong_items(store.read("relaxations"), store.read("frames"), set(range(5))) == []


def test_an_old_segment_has_its_grace_period_too(store: Store) -> None:
    seal_items(store, [1], "a")
    compact(store)
    (old,) = (store.path / "segments").glob("tasks-*")
    long_ago = time.time() - 10 * compaction.STRAY_S
    os.utime(old, (long_ago, long_ago))
    seal_items(store, [2], "b")
    compact(store)
    assert str(old.relative_to(store.path)) in store.snapshot().manifest.superseded
    assert old.exists()


def test_segments_of_the_dead_are_swept_up(store: Store) -> None:
    seal_items(store, [1], "a")
    compact(store)
    names = (
        "segments/tasks-000009-dead.h5",
        "manifest/.tmp-1",
        "control/.tmp-2",
        "plan/0123/.tmp-3",
        "checkpoints/ab/.tmp-4",
    )
    orphans = [store.path / name for name in names]
    for orphan in orphans:
        orphan.parent.mkdir(exist_ok=True)
        orphan.write_bytes(b"never published")
    compact(store)
    assert all(orphan.exists() for orphan in orphans), "someone may be about to publish it"
    long_ago = time.time() - compaction.STRAY_S - 1
    for orphan in orphans:
        os.utime(orphan, (long_ago, long_ago))
    compact(store)
    assert not any(orphan.exists() for orphan in orphans)


def test_a_temporary_file_that_goes_while_we_look_is_no_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal_items(store, [1], "a")
    real = os.scandir
    looks = 0

    def scandir(path: Any) -> Any:
        nonlocal looks
        # What a worker's write and rename do around the look.
        temporary = Path(path) / f"{shard.TEMPORARY}x"
        temporary.touch()
        entries = list(real(path))
        temporary.unlink()
        looks += 1
        return iter(entries)

    monkeypatch.setattr(os, "scandir", scandir)
    assert compact(store) == 1
    assert looks > 3


def test_a_lost_segment_is_named(store: Store) -> None:
    seal_items(store, [1], "a")
    compact(store)
    (lost,) = (store.path / "segments").glob("relaxations-*")
    lost.unlink()
    with pytest.raises(StoreError, match="is gone") as caught:
        store.read("relaxations")
    assert str(lost) in str(caught.value)
    seal_items(store, [2], "b")
    with pytest.raises(StoreError, match="is gone"):
        compact(store)
    assert [p.name for p in (store.path / "segments").iterdir() if "000002" in p.name] == []


# --- races and deaths -------------------------------------------------------------------------

_WRITER = """
import os, random, sys
from pathlib import Path
from orchestrator.store import Store
from tests.orchestrator.random_stores import add_item
from tests.orchestrator.store_fixtures import Records

store, seed, log = Store(sys.argv[1]), int(sys.argv[2]), open(sys.argv[3], "a")
rng = random.Random(f"{seed} {os.getpid()}")
serial = 0
while True:
    serial += 1
    numbers = rng.sample(range(3000), 20)
    records = Records()
    for number in numbers:
        add_item(records, number, started_s=1.0 + serial)
    failed = rng.sample(range(3000), 5)
    for number in failed:
        if number not in numbers:
            add_item(records, number, status="timeout", started_s=1.0 + serial)
    records.seal(store, f"{os.getpid()}-{serial}")
    print(*numbers, file=log, flush=True)
"""
_COMPACTOR = """
import random, sys, time
from orchestrator import compact as c
from orchestrator.store import Store

rng = random.Random(int(sys.argv[2]))
store = Store(sys.argv[1])
c.PASS_BYTES, c.SEGMENT_ROWS = 400_000, 700
while True:
    c.compact(store, grace_s=1.5)
    time.sleep(rng.random() / 20)
"""


def start(script: str, store: Store, seed: int, *more: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(store.path), str(seed), *map(str, more)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )


def promised(logs: list[Path]) -> set[int]:
    words = (line.split() for log in logs for line in log.read_text().splitlines(keepends=True))
    return {int(word) for line in words for word in line}


@pytest.mark.parametrize("seconds", [pytest.param(6.0), pytest.param(25.0, marks=pytest.mark.slow)])
def test_racing_and_killed_compactors_and_writers_lose_nothing(
    store: Store, tmp_path: Path, seconds: float
) -> None:
    rng = random.Random(7)
    logs = [tmp_path / f"log{i}" for i in range(2)]
    scripts = [(_COMPACTOR, ()), (_COMPACTOR, ()), (_WRITER, (logs[0],)), (_WRITER, (logs[1],))]
    for log in logs:
        log.touch()
    running = [start(code, store, seed, *more) for seed, (code, more) in enumerate(scripts)]
    kills = reads = 0
    end = time.monotonic() + seconds
    next_kill = time.monotonic() + 1.0
    try:
        while time.monotonic() < end:
            safe = promised(logs)
            seen = {key_bytes(w) for w in store.read("relaxations", ["key"])["key"].tolist()}
            assert {numbered(n) for n in safe} <= seen, "a sealed row was not there for a reader"
            reads += 1
            for i, process in enumerate(running):
                assert process.poll() is None, process.stderr.read().decode()
                if time.monotonic() > next_kill and rng.random() < 0.5:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    process.stderr.close()
                    kills += 1
                    code, more = scripts[i]
                    running[i] = start(code, store, 10 * kills + i, *more)
            if time.monotonic() > next_kill:
                next_kill = time.monotonic() + rng.uniform(0.4, 1.2)
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stderr.close()
    assert kills >= 3
    assert reads >= 3
    for _ in range(2):
        rows, frames = store.read("relaxations"), store.read("frames")
        found = {key_bytes(words) for words in rows["key"].tolist()}
        numbers = {n for n in range(3000) if numbered(n) in found}
        assert promised(logs) <= numbers
        assert wrong_items(rows, frames, numbers) == []
        ok = {key for key, (status, _) in outcomes(store).items() if status == "ok"}
        assert ok == found
        compact(store)
    assert store.snapshot().shards == []
    assert store.snapshot().problems == {}


# --- segments for others ----------------------------------------------------------------------


def full_segments(store: Store) -> dict[str, Path]:
    little_records(forces=True).seal(store)
    study = Study()
    relaxed = study.molecule("propane", 9, smiles="CCC")
    study.points(study.diffuse(relaxed), [2.0, 1.0], minimum=relaxed)
    study.generation("sample 0")
    study.records.seal(store, "study")
    chains = Chains(steps=20, burn_in=2)
    chains.chain(chains.molecule("propane", "CCC"), temperature=300.0)
    chains.exchange(chains.molecule("butane", "CCCC"), (20, 70), (50,))
    chains.records.seal(store, "chains")
    compact(store)
    return {s.table: store.path / s.file for s in store.snapshot().manifest.segments}


def test_stock_tools_read_a_segment(store: Store, require_engine: Callable[[str], None]) -> None:
    require_engine("h5dump")
    require_engine("h5ls")
    segments = full_segments(store)
    assert set(segments) == set(TABLES)

    def ask(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = ask("h5ls", "-r", str(segments["relaxations"]))
    path = "/relaxations/final_energy_eV"
    stored = store.read("relaxations", ["final_energy_eV"])["final_energy_eV"]
    assert re.search(rf"{path}\s+Dataset \{{{len(stored)}\}}", listed)
    text = ask("h5dump", "-d", path, "-m", "%.6f", str(segments["relaxations"]))
    values = re.search(r"DATA \{(.*?)\}", text, re.DOTALL)
    assert values is not None
    found = [float(v) for v in re.sub(r"\(\d+\):", "", values[1]).replace("\n", "").split(",")]
    assert found == pytest.approx(stored.tolist(), abs=1e-6)
    assert '"eV"' in ask("h5dump", "-a", f"{path}/units", str(segments["relaxations"]))
    positions = ask("h5dump", "-p", "-H", "-d", "/frames/positions", str(segments["frames"]))
    assert "FLETCHER32" in positions
    assert '"angstrom"' in ask("h5dump", "-a", "/frames/positions/units", str(segments["frames"]))


def test_every_float_says_its_unit(store: Store) -> None:
    for table, path in full_segments(store).items():
        with h5py.File(path, "r") as file:
            for name, dataset in file[table].items():
                if dataset.dtype.kind == "f":
                    assert dataset.attrs["units"], name
                    assert dataset.attrs["long_name"], name
                if len(dataset):
                    assert dataset.fletcher32, name


def test_an_altered_segment_is_refused_wherever_it_was_hit(store: Store, tmp_path: Path) -> None:
    path = full_segments(store)["frames"]
    whole = path.read_bytes()
    good = plain_rows(store.read("frames"))
    with h5py.File(path, "r") as file:
        data = [
            file["frames"][name].id.get_chunk_info(0) for name in ("positions", "energy_eV", "key")
        ]
    for chunk in data:
        altered = bytearray(whole)
        altered[chunk.byte_offset + chunk.size // 2] ^= 16
        path.write_bytes(altered)
        with pytest.raises(CorruptShardError) as caught:
            store.read("frames")
        assert str(path) in str(caught.value)
    # Elsewhere a flip may hit nothing that is read, but never ends as anything but our own error.
    rng = random.Random(5)
    copy = tmp_path / "copy.h5"
    said: list[str] = []
    for place in rng.sample(range(len(whole)), 300):
        altered = bytearray(whole)
        altered[place] ^= 1 << rng.randrange(8)
        copy.write_bytes(altered)
        try:
            with hdf5.TableFile(copy, str(copy)) as file:
                file.n_rows("frames")
                file.read("frames", ["key", "energy_eV"])
        except StoreError as exc:
            said.append(str(exc))
    assert said
    assert all(str(copy) in message for message in said)
    path.write_bytes(whole[:-100])
    with pytest.raises(CorruptShardError, match="copy of the store"):
        store.read("frames")
    path.write_bytes(whole)
    assert plain_rows(store.read("frames")) == good


def test_damage_is_not_merged_into_new_segments(store: Store) -> None:
    path = full_segments(store)["relaxations"]
    whole = path.read_bytes()
    # The description of a column, which no checksum of HDF5 guards.
    at = whole.index(b"largest atomic force at the end")
    path.write_bytes(whole[:at] + b"L" + whole[at + 1 :])
    seal_items(store, [1, 2, 3], "more")
    with pytest.raises(CorruptShardError, match="checksum in the manifest") as caught:
        compact(store)
    assert str(path) in str(caught.value)


# --- memory -----------------------------------------------------------------------------------

_MEASURED = """
import json, re, sys
from orchestrator import compact as c
from orchestrator.store import Store

def peak():
    # Not ru_maxrss, which a new program inherits from the process that started it.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

store = Store(sys.argv[1])
c.PASS_BYTES = c.SEGMENT_BYTES = 8 << 20
if sys.argv[2] == "compact":
    before = peak()
    c.compact(store)
else:
    rows = store.read("tasks", ["key", "status"])
    before = peak()
    if sys.argv[2] == "column":
        assert len(store.read("relaxations", ["final_energy_eV"])) == 240_000
    else:
        assert len(store.read("relaxations")) == 240_000
print(json.dumps(peak() - before))
"""


def test_memory_follows_the_limits_not_the_size_of_the_store(store: Store) -> None:
    rows: list[Rows] = []
    for i in range(60):
        rows = many_relaxations(i, 4_000)
        seal_rows(store, rows, f"{i:02d}")
    total = 60 * sum(r.nbytes() for r in rows)
    assert total > 150e6

    def measure(what: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, str(store.path), what],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(json.loads(done.stdout))

    assert measure("compact") < 100e6
    assert len({s.file for s in store.snapshot().manifest.segments}) > 6
    assert measure("column") < 40e6
    # That the measure can tell: everything at once takes what it must.
    assert measure("all") > 150e6


def test_rows_with_odd_text_survive_compaction(store: Store) -> None:
    records = little_records()
    odd = "Å²: 日本語, \0, \n, 𝛼"
    records.tables["molecules"][0]["name"] = odd
    records.tables["molecules"][1]["name"] = ""
    records.seal(store)
    before = plain_rows(store.read("molecules"))
    compact(store)
    after = plain_rows(store.read("molecules"))
    by_key = {tuple(row["key"]): row for row in before}
    assert {tuple(row["key"]): row for row in after} == by_key
    assert {row["name"] for row in after} >= {odd, ""}
