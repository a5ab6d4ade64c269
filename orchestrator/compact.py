"""Compaction: shards into large sorted segments, published by numbered manifests.

Any process may run it, several may race, any may die: a shard counts until the manifest that
says it was taken in is published, and a segment only counts from then on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator import hdf5, manifest, shard
from orchestrator.columns import Rows, concat, gather
from orchestrator.errors import BasinError, CorruptShardError, StoreError, StoreVersionError
from orchestrator.manifest import Manifest, Segment
from orchestrator.schema import TABLES
from orchestrator.store import Store, best_of_each, drop_duplicates

# Of uncompressed rows. A pass ends with the shard that goes beyond; with the segments that it is
# merged with it is held twice at its worst moment.
PASS_BYTES = 24 << 20
SEGMENT_ROWS = 1_000_000
SEGMENT_BYTES = 48 << 20
GRACE_S = 24 * 3600.0
# Of more shards, or bytes, than these the oldest go sooner: a snapshot is read in minutes at most,
# the list of those taken in is part of every manifest, and chains are large.
KEPT_SHARDS = 20_000
KEPT_BYTES = 512 << 20
LEAST_GRACE_S = 900.0
_ASKED_FILES = 2000
STRAY_S = 48 * 3600.0


def compact(store: Store, *, grace_s: float = GRACE_S) -> int:
    """Take in every sealed shard; return how many were taken in.

    Superseded files are deleted once they are older than ``grace_s`` seconds.
    """
    taken = 0
    while True:
        count, more = _one_pass(store)
        taken += count
        if not more:
            break
    _delete_old(store, grace_s)
    return taken


def _one_pass(store: Store) -> tuple[int, bool]:
    current = manifest.newest(store.path / "manifest")
    read: list[str] = []
    quarantine = dict(current.quarantine)
    parts: dict[str, list[Rows]] = {name: [] for name in TABLES}
    size = 0
    more = False
    found = {str(path.relative_to(store.path)): path for path in store.sealed_shards()}
    for name, path in sorted(found.items()):
        if name in current.consumed or name in current.quarantine:
            continue
        if size > PASS_BYTES:
            more = True
            break
        try:
            with shard.open_shard(path) as file:
                tables = {table: file.read(table) for table in file.tables()}
            size += path.stat().st_size
        except CorruptShardError as exc:
            quarantine[name] = str(exc)
        except StoreVersionError:
            continue  # a newer Basin wrote it: left for that one to take in
        except FileNotFoundError:
            return 0, True  # taken in and deleted by another process: look again
        else:
            read.append(name)
            for table, rows in tables.items():
                parts[table].append(rows)
    segments = list(current.segments)
    now = time.time()
    superseded = dict(current.superseded)
    made: list[Segment] = []
    for table, pieces in parts.items():
        if pieces:
            try:
                kept, new = _merge(store, table, segments, pieces, current.generation + 1)
            except FileNotFoundError as exc:
                _discard(store, made)
                if manifest.newest(store.path / "manifest").generation != current.generation:
                    return 0, True  # merged and deleted by another process: look again
                raise StoreError(
                    f"{exc.filename or exc}: this segment of the store is gone; put it back from "
                    "a copy of the store"
                ) from exc
            except StoreError:
                _discard(store, made)
                raise
            gone = [s.file for s in segments if s.table == table and s not in kept]
            superseded.update(dict.fromkeys(gone, now))
            segments = [s for s in segments if s.table != table] + kept + new
            made += new
    if not read and quarantine == current.quarantine:
        return 0, False
    successor = Manifest(
        current.generation + 1,
        tuple(segments),
        # The listing tells which are still there, without a question for each.
        {n: t for n, t in current.consumed.items() if n in found} | dict.fromkeys(read, now),
        _still_there(store, superseded),
        quarantine,
    )
    try:
        published = manifest.publish(store.path / "manifest", successor)
    except StoreError:
        if manifest.newest(store.path / "manifest").generation == current.generation:
            _discard(store, made)  # else it may have been published before the error
        raise
    if not published:
        _discard(store, made)
        return 0, True
    return len(read), more


def _discard(store: Store, segments: list[Segment]) -> None:
    for segment in segments:
        (store.path / segment.file).unlink(missing_ok=True)


def _still_there(store: Store, files: dict[str, float]) -> dict[str, float]:
    return {name: since for name, since in files.items() if (store.path / name).exists()}


def _merge(
    store: Store, table: str, segments: list[Segment], pieces: list[Rows], generation: int
) -> tuple[list[Segment], list[Segment]]:
    """Return the old segments that stay, and the new ones made of ``pieces`` and the others.

    ``pieces`` is emptied, so that its rows need not be held twice.
    """
    rows = drop_duplicates(concat(pieces))
    pieces.clear()
    mine = [s for s in segments if s.table == table]
    kept: list[Segment] = []
    absorbed: list[Rows] = []
    total_rows, total_bytes = len(rows), rows.nbytes()
    for segment in sorted(mine, key=lambda s: s.bytes):
        path = store.path / segment.file
        with hdf5.TableFile(path, str(path)) as file:
            names = ["key", "status"] if table == "tasks" else ["key"]
            held = file.read(table, names)
            twins = np.isin(rows["key"][:, 0], held["key"][:, 0])
            # Few, steadily larger segments: a small one is merged, a large one is left alone
            # unless a retried task of it has a better row now.
            small = segment.rows + total_rows <= SEGMENT_ROWS and (
                segment.bytes + total_bytes <= SEGMENT_BYTES and segment.rows <= 4 * total_rows
            )
            if twins.any() and table != "tasks":
                near = held["key"][np.isin(held["key"][:, 0], rows["key"][twins, 0])]
                pairs = set(map(tuple, near.tolist()))
                fresh = [tuple(key) not in pairs for key in rows["key"].tolist()]
                rows = rows.take(np.array(fresh, bool))
            elif twins.any():
                small = True
            if small:
                if _crc32(path) != segment.crc32:
                    raise CorruptShardError(
                        f"{path}: does not match its checksum in the manifest (altered, or its "
                        "disk is failing); put it back from a copy of the store"
                    )
                piece = file.read(table)
                absorbed.append(piece)
                total_rows += len(piece)
                total_bytes += piece.nbytes()
            else:
                kept.append(segment)
    parts = [*absorbed, rows]
    absorbed.clear()
    del rows
    order = _sorted_by_molecule(parts)
    if not len(order):
        return mine, []
    size = sum(part.nbytes() for part in parts)
    step = max(1, int(len(order) * min(1.0, 2 * SEGMENT_BYTES / max(1, size))))
    new: list[Segment] = []
    for start in range(0, len(order), step):
        stop = min(start + step, len(order))
        piece = gather(parts, order[start:stop], last=stop == len(order))
        data = hdf5.build([piece], kind=f"segment:{table}", campaign=store.name, packed=True)
        n_rows = len(piece)
        del piece
        name = f"segments/{table}-{generation:06d}-{uuid.uuid4().hex[:8]}.h5"
        try:
            shard.write_whole(store.path / name, data)
        except StoreError:
            _discard(store, new)
            raise
        new.append(Segment(name, table, n_rows, len(data), zlib.crc32(data)))
        del data
    return kept, new


def _sorted_by_molecule(parts: list[Rows]) -> NDArray[np.intp]:
    """Return one row a key, by their numbers in the parts joined, sorted by molecule and key."""
    names = [name for name in ("key", "mol_key", "status", "started_s") if name in parts[0].columns]
    keys = concat([Rows(p.schema, {name: p.columns[name] for name in names}) for p in parts])
    kept = np.flatnonzero(best_of_each(keys))
    key = keys["key"][kept]
    by = keys["mol_key"][kept] if "mol_key" in names else key
    return kept[np.lexsort((key[:, 1], key[:, 0], by[:, 1], by[:, 0]))]


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def _delete_old(store: Store, grace_s: float) -> None:
    current = manifest.newest(store.path / "manifest")
    now = time.time()
    live = {segment.file for segment in current.segments}
    known = live | current.superseded.keys()
    newest = sorted(current.consumed.values(), reverse=True)[:KEPT_SHARDS]
    sooner = min(grace_s, LEAST_GRACE_S)
    many = len(newest) == KEPT_SHARDS
    kept = 0
    old = [*current.consumed.items(), *current.superseded.items()]
    for name, since in sorted(old, key=lambda one: -one[1]):
        if name in live:
            continue
        path = store.path / name
        # Thousands of shards are small ones, and not worth a question each.
        with contextlib.suppress(FileNotFoundError):
            kept += path.stat().st_size if len(old) <= _ASKED_FILES else 0
        early = kept > KEPT_BYTES or (many and name in current.consumed and since < newest[-1])
        if now - since > (sooner if early else grace_s):
            path.unlink(missing_ok=True)
    for folder in _written_folders(store):
        for entry in os.scandir(folder):
            name = str(Path(entry.path).relative_to(store.path))
            stray = entry.name.startswith(shard.TEMPORARY) or (
                name.startswith("segments/") and name not in known
            )
            # Temporary files come and go while others write.
            with contextlib.suppress(FileNotFoundError):
                if stray and now - entry.stat().st_mtime > STRAY_S:
                    os.unlink(entry.path)


def _written_folders(store: Store) -> Iterator[Path]:
    for name in ("segments", "manifest", "control"):
        yield store.path / name
    for name in ("inbox", "plan", "checkpoints"):
        for entry in os.scandir(store.path / name):
            if entry.is_dir():
                yield Path(entry.path)


def main() -> None:
    """Entry point of the compacting process: STORE."""
    try:
        compact(Store(sys.argv[1]))
    except BasinError as exc:
        print(exc, file=sys.stderr)
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    main()
