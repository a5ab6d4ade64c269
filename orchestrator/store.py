"""The store: a folder of immutable HDF5 files, read through snapshots that take no lock."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from orchestrator import hdf5, manifest, shard
from orchestrator.columns import Rows, concat, empty, key_array
from orchestrator.errors import CorruptShardError, StoreError, StoreFullError, StoreVersionError
from orchestrator.key_index import KeyIndex
from orchestrator.schema import SCHEMA_VERSION, STATUSES, TABLES

if TYPE_CHECKING:
    import ase
    import pyarrow

_Read = TypeVar("_Read")

FOLDERS = ("inbox", "segments", "manifest", "plan", "checkpoints", "control", "logs")
_READ_ATTEMPTS = 5
_ROW_BY_ROW = 64


@dataclass(slots=True)
class Snapshot:
    """What counted at one moment: the newest manifest, and sealed shards not yet compacted."""

    store: Store
    manifest: manifest.Manifest
    shards: list[Path]
    problems: dict[str, str] = field(default_factory=dict)

    def parts(self, table: str, names: Sequence[str] | None = None) -> Iterator[Rows]:
        """Yield the table's rows file by file, duplicates included."""
        yield from self._segments(table, lambda file: file.read(table, names))
        yield from self.shard_parts(table, names)

    def shard_parts(self, table: str, names: Sequence[str] | None = None) -> Iterator[Rows]:
        """Yield the table's rows of each sealed shard; unreadable ones are noted and passed by."""
        yield from self._shards(table, lambda file: file.read(table, names))

    def _segments(self, table: str, read: Callable[[hdf5.TableFile], _Read]) -> Iterator[_Read]:
        for segment in self.manifest.segments:
            if segment.table == table:
                path = self.store.path / segment.file
                with hdf5.TableFile(path, str(path)) as file:
                    yield read(file)

    def _shards(self, table: str, read: Callable[[hdf5.TableFile], _Read]) -> Iterator[_Read]:
        for path in self.shards:
            if str(path) in self.problems:
                continue
            try:
                with shard.open_shard(path) as file:
                    if file.n_rows(table):
                        yield read(file)
            except (CorruptShardError, StoreVersionError) as exc:
                self.problems[str(path)] = str(exc)

    def pick(self, table: str, keys: NDArray[np.uint64]) -> Rows:
        """Return a table's rows of some keys (K, 2), each once; raises like `read`.

        Of the other rows nothing but their keys is read.
        """
        wanted = set(map(tuple, keys.tolist()))

        def few(file: hdf5.TableFile) -> list[Rows]:
            held = file.read(table, ["key"])["key"]
            near = np.flatnonzero(np.isin(held[:, 0], keys[:, 0])).tolist()
            rows = [row for row in near if tuple(held[row].tolist()) in wanted]
            if len(rows) > _ROW_BY_ROW:
                return [file.read(table).take(np.array(rows))]
            return [file.read(table, None, slice(row, row + 1)) for row in rows]

        found = [*self._segments(table, few), *self._shards(table, few)]
        parts = [rows for part in found for rows in part]
        return drop_duplicates(concat(parts)) if parts else empty(table)

    def read(self, table: str, names: Sequence[str] | None = None) -> Rows:
        """Return all rows of a table, each key once; ``names`` picks columns.

        Raises FileNotFoundError when a file was compacted away meanwhile: take a new snapshot
        (``Store.read`` does so by itself).
        """
        wanted = list(names) if names is not None else [c.name for c in TABLES[table].columns]
        extra = ["key", "status", "started_s"] if table == "tasks" else ["key"]
        needed = [*wanted, *(name for name in extra if name not in wanted)]
        parts = list(self.parts(table, needed if self.shards else wanted))
        if not parts:
            return empty(table, wanted)
        rows = concat(parts)
        if self.shards:
            rows = drop_duplicates(rows)
        rows.columns = {name: rows.columns[name] for name in wanted}
        return rows

    def task_index(self) -> KeyIndex:
        """Return every finished task's key with the code of its status (0: ok)."""
        index = KeyIndex()
        keys: list[NDArray[np.uint64]] = []
        codes: list[NDArray[np.uint8]] = []
        for rows in self.parts("tasks", ["key", "status"]):
            names = [STATUSES.index(name) for name in rows["status"].names] or [0]
            keys.append(rows["key"])
            codes.append(np.array(names, np.uint8)[rows["status"].codes])
        if keys:
            index.extend(np.concatenate(keys), np.concatenate(codes))
        return index


def drop_duplicates(rows: Rows) -> Rows:
    """Keep one row a key: of tasks an `ok` one, else the latest; of other tables the first."""
    keep = best_of_each(rows)
    return rows if keep.all() else rows.take(keep)


def best_of_each(rows: Rows) -> NDArray[np.bool_]:
    """Return a mask (R,) of one row a key, as `drop_duplicates` keeps them.

    Looks at the columns key, and of tasks status and started_s.
    """
    hi = rows["key"][:, 0]
    order = np.argsort(hi, kind="stable")
    twin = np.zeros(len(hi), bool)
    equal = hi[order][1:] == hi[order][:-1]
    twin[order[1:][equal]] = True
    twin[order[:-1][equal]] = True
    if not twin.any():
        return ~twin
    best: dict[tuple[int, int], tuple[tuple[bool, float], int]] = {}
    tasks = rows.schema.name == "tasks"
    ok = rows["status"].equals("ok") if tasks else None
    for row in np.flatnonzero(twin).tolist():
        key = tuple(rows["key"][row].tolist())
        rank = (not ok[row], -float(rows["started_s"][row])) if ok is not None else (False, 0.0)
        if key not in best or rank < best[key][0]:
            best[key] = (rank, row)
    keep = ~twin
    keep[[row for _, row in best.values()]] = True
    return keep


def _gone(exc: FileNotFoundError) -> StoreError:
    return StoreError(
        f"{exc.filename or exc}: this file of the store is gone; put it back from a copy of the "
        "store"
    )


class Store:
    """A campaign's results on disk; opening it for reading changes nothing.

    Raises StoreError when ``path`` holds no store, StoreVersionError when the schema differs.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        try:
            self.about: dict[str, Any] = json.loads((self.path / "campaign.json").read_text())
        except FileNotFoundError as exc:
            raise StoreError(
                f"{self.path}: no Basin store here (campaign.json is missing); "
                "`basin run CAMPAIGN.toml` makes one"
            ) from exc
        except (OSError, ValueError) as exc:
            raise StoreError(f"{self.path / 'campaign.json'}: cannot be read: {exc}") from exc
        if not isinstance(self.about, dict):
            raise StoreError(f"{self.path / 'campaign.json'}: is not a description of a store")
        version = self.about.get("schema_version")
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            remedy = "upgrade Basin to read it" if newer else "read it with the Basin that wrote it"
            raise StoreVersionError(
                f"{self.path}: the store has schema {version}, this Basin reads schema "
                f"{SCHEMA_VERSION}; {remedy} (it was written by Basin {self.about.get('basin')})"
            )

    @classmethod
    def create(cls, path: Path, name: str) -> Store:
        """Open the store at ``path``, making it first where there is none."""
        from importlib.metadata import version

        path = path.absolute()
        try:
            for folder in FOLDERS:
                (path / folder).mkdir(parents=True, exist_ok=True)
            if not (path / "campaign.json").exists():
                about = {
                    "campaign": name,
                    "schema_version": SCHEMA_VERSION,
                    "basin": version("basin-orchestrator"),
                    "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "enum_status": STATUSES,
                }
                shard.write_whole(path / "campaign.json", json.dumps(about, indent=1).encode())
        except OSError as exc:
            raise StoreError(
                f"{path}: cannot make the store there: {exc.strerror}; choose another place with "
                "`store = ...` in the campaign file or `--store DIR`"
            ) from exc
        return cls(path)

    @property
    def name(self) -> str:
        """The campaign's name."""
        return str(self.about["campaign"])

    def require_writable(self) -> None:
        """Raise StoreError where the store cannot be written."""
        for folder in ("inbox", "control"):
            if not os.access(self.path / folder, os.W_OK | os.X_OK):
                raise StoreError(
                    f"{self.path}: the store is read-only for you (no write access to "
                    f"{folder}/); reading commands work, `basin run` needs write access"
                )
        try:
            shard.write_whole(self.path / "control" / "writable", b"")
        except StoreFullError:
            raise
        except StoreError as exc:
            raise StoreError(f"{exc}; the store is read-only, `basin run` needs to write") from exc

    def snapshot(self) -> Snapshot:
        """Return what counts now."""
        # The inbox is listed first: a shard compacted in between is then in both, never in none.
        found = sorted(self.sealed_shards())
        current = manifest.newest(self.path / "manifest")
        fresh = [
            path
            for path in found
            if (name := str(path.relative_to(self.path))) not in current.consumed
            and name not in current.quarantine
        ]
        return Snapshot(self, current, fresh, dict(current.quarantine))

    def sealed_shards(self) -> Iterator[Path]:
        """Yield every shard in the inbox, consumed or not."""
        try:
            runs = list(os.scandir(self.path / "inbox"))
        except FileNotFoundError:
            return
        for run in runs:
            if run.is_dir():
                for entry in os.scandir(run.path):
                    if entry.name.endswith(".h5") and not entry.name.startswith("."):
                        yield Path(entry.path)

    def read(self, table: str, names: Sequence[str] | None = None) -> Rows:
        """Return all rows of a table, each key once, as of now."""
        return self.consistent(lambda snapshot: snapshot.read(table, names))

    def consistent(self, read: Callable[[Snapshot], _Read]) -> _Read:
        """Return what ``read`` makes of the store as it is now.

        It is called again where files that it reads are compacted away meanwhile: a new snapshot
        has the same rows elsewhere. Raises StoreError for a file that is not there any more.
        """
        for attempt in range(_READ_ATTEMPTS):
            try:
                return read(self.snapshot())
            except FileNotFoundError as exc:
                if attempt == _READ_ATTEMPTS - 1:
                    raise _gone(exc) from exc
        raise AssertionError("unreachable")

    def geometries(
        self, keys: Sequence[bytes], tables: Sequence[str] = ("geometries", "relaxations")
    ) -> dict[bytes, tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]]:
        """Return numbers (N,) and positions (N, 3) in Å that the given tasks ended with.

        From the table `paths` positions are those of all frames, (F N, 3).
        """
        for _ in range(_READ_ATTEMPTS - 1):
            try:
                return self._geometries(keys, tables)
            except FileNotFoundError:
                continue  # compacted away meanwhile
        try:
            return self._geometries(keys, tables)
        except FileNotFoundError as exc:
            raise _gone(exc) from exc

    def _geometries(
        self, keys: Sequence[bytes], tables: Sequence[str]
    ) -> dict[bytes, tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]]:
        wanted = key_array(keys)
        found: dict[bytes, tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]] = {}
        by_words = {tuple(w): k for w, k in zip(wanted.tolist(), keys, strict=True)}
        for table in tables:
            if len(found) == len(by_words):
                break
            snapshot = self.snapshot()
            for segment in snapshot.manifest.segments:
                if segment.table == table:
                    path = self.path / segment.file
                    with hdf5.TableFile(path, str(path)) as file:
                        pick_geometries(file, table, wanted, by_words, found)
            for path in snapshot.shards:
                try:
                    with shard.open_shard(path) as file:
                        if file.n_rows(table):
                            pick_geometries(file, table, wanted, by_words, found)
                except (CorruptShardError, StoreVersionError):
                    continue
        return found

    def table(self, name: str) -> pyarrow.Table:
        """Return a table, one of those in `schema.TABLES`, as Arrow.

        ``.to_pandas()`` on it gives a data frame. Keys are hexadecimal strings.
        """
        from orchestrator.tables import arrow_table

        return arrow_table(self, name)

    def query(self, sql: str) -> pyarrow.Table:
        """Answer a DuckDB SQL query over the tables."""
        from orchestrator.tables import query

        return query(self, sql)

    def trajectory(self, key: str) -> list[ase.Atoms]:
        """Return the frames of a relaxation or a diffusion, by the task's key or its beginning."""
        from orchestrator.tables import trajectory

        return trajectory(self, key)


def pick_geometries(
    file: hdf5.TableFile,
    table: str,
    wanted: NDArray[np.uint64],
    by_words: dict[tuple[int, ...], bytes],
    found: dict[bytes, tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]],
) -> None:
    """Add the wanted geometries that a file holds to ``found``."""
    keys = file.read(table, ["key"])["key"]
    candidates = np.flatnonzero(np.isin(keys[:, 0], wanted[:, 0]))
    for row in candidates.tolist():
        key = by_words.get(tuple(keys[row].tolist()))
        if key is not None and key not in found:
            rows = file.read(table, ["numbers", "positions"], slice(row, row + 1))
            found[key] = (rows["numbers"][0], rows["positions"][0])


def open_store(path: Path | str) -> Store:
    """Open a store for reading: the folder, or the campaign file that it belongs to."""
    path = Path(path)
    if path.suffix == ".toml":
        from orchestrator.campaign import load_campaign

        path = load_campaign(path, with_models=False).store
    return Store(path)
