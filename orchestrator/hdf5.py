"""Table rows as HDF5: whole files built in memory, read column by column."""

from __future__ import annotations

import os

# h5py reads this once, when it is imported; our files are immutable, so a lock could only fail.
os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"

import errno
import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from orchestrator.columns import Category, Rows, Values, Varlen, strings_to_varlen
from orchestrator.errors import CorruptShardError, StoreVersionError
from orchestrator.schema import SCHEMA_VERSION, STATUSES, TABLES, Column

FORMAT = "basin-store"
# What h5py raises on damage depends on which structure of the file is hit.
_DAMAGE = (OSError, LookupError, RuntimeError, TypeError, ValueError, AttributeError)
_SCALAR_CHUNK = 65536
_STEP_CHUNK = 16384
_RAW_CHUNK = 8192


def _write(group: Any, name: str, values: Any, column: Column | None, packed: bool) -> None:
    options: dict[str, Any] = {}
    if packed and len(values):
        rows = _SCALAR_CHUNK
        compress = True
        if column is not None and column.kind == "ragged":
            rows = _RAW_CHUNK if column.raw else _STEP_CHUNK
            compress = not column.raw
        if column is not None and column.kind == "key":
            compress = name != "key"
        options = {"chunks": (min(rows, len(values)), *values.shape[1:]), "fletcher32": True}
        if compress:
            options.update(compression="gzip", compression_opts=1, shuffle=True)
    dataset = group.create_dataset(name, data=values, **options)
    if column is not None and column.dtype[-2] == "f":
        dataset.attrs["units"] = column.unit or "1"
        dataset.attrs["long_name"] = column.long_name


def _write_column(group: Any, column: Column, values: Values, packed: bool) -> None:
    if isinstance(values, Varlen):
        pointer = f"{column.pointer}_ptr"
        if pointer not in group:
            _write(group, pointer, values.ptr, None, packed)
        name = f"{column.name}_bytes" if column.kind == "string" else column.name
        _write(group, name, values.values, column, packed)
    elif isinstance(values, Category):
        _write(group, column.name, values.codes, column, packed)
        names = strings_to_varlen(values.names)
        _write(group, f"{column.name}_names_bytes", names.values, None, packed)
        _write(group, f"{column.name}_names_ptr", names.ptr, None, packed)
    else:
        _write(group, column.name, values, column, packed)


def build(tables: Sequence[Rows], *, kind: str, campaign: str, packed: bool) -> bytes:
    """Return the bytes of an HDF5 file that holds the given tables.

    ``packed`` asks for chunks, gzip and checksums (segments); shards are written plain,
    since a checksum of the whole file stands in their name.
    """
    image = BytesIO()
    with h5py.File(image, "w", libver=None) as file:
        file.attrs["format"] = FORMAT
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["kind"] = kind
        file.attrs["campaign"] = campaign
        file.attrs["writer"] = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
        if packed:
            file.attrs["enum_status"] = json.dumps(STATUSES)
        for rows in tables:
            group = file.create_group(rows.schema.name)
            group.attrs["n_rows"] = len(rows)
            for column in rows.schema.columns:
                _write_column(group, column, rows.columns[column.name], packed)
    return image.getvalue()


class TableFile:
    """An open shard or segment; rows come out column by column, in slices if asked."""

    def __init__(self, source: Path | BytesIO, label: str) -> None:
        self.label = label
        try:
            self._file = h5py.File(source, "r")
        except FileNotFoundError as exc:
            raise FileNotFoundError(errno.ENOENT, "no such file", label) from exc
        except OSError as exc:
            raise CorruptShardError(
                f"{label}: not a readable HDF5 file ({exc}); what a shard held is computed again "
                "by the next `basin run`, a segment must be put back from a copy of the store"
            ) from exc
        try:
            version = int(self._file.attrs["schema_version"])
            ours = bool(self._file.attrs["format"] == FORMAT)
        except _DAMAGE:
            ours = False
        if not ours:
            self._file.close()
            raise CorruptShardError(
                f"{label}: an HDF5 file, but not one of Basin's; it is left where it is and passed "
                "by: move it out of the store"
            )
        if version != SCHEMA_VERSION:
            self._file.close()
            raise StoreVersionError(
                f"{label}: written with store schema {version}, this Basin reads schema "
                f"{SCHEMA_VERSION}; read it with the Basin release that wrote it"
            )

    def __enter__(self) -> TableFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tables(self) -> list[str]:
        """Return the names of the tables in the file."""
        return [name for name in self._file if name in TABLES]

    def n_rows(self, table: str) -> int:
        """Return the number of rows of a table in the file."""
        try:
            return int(self._file[table].attrs["n_rows"]) if table in self._file else 0
        except _DAMAGE as exc:
            raise self._damaged(table, exc) from exc

    def read(
        self, table: str, names: Sequence[str] | None = None, rows: slice | None = None
    ) -> Rows:
        """Read some columns (default: all) of some rows (default: all) of a table."""
        schema = TABLES[table]
        wanted = [c for c in schema.columns if names is None or c.name in names]
        try:
            group = self._file[table]
            return Rows(schema, {c.name: self._column(group, c, rows) for c in wanted})
        except _DAMAGE as exc:
            raise self._damaged(table, exc) from exc

    def _damaged(self, table: str, exc: Exception) -> CorruptShardError:
        return CorruptShardError(
            f"{self.label}: table {table} cannot be read ({exc}); the file was altered or its disk "
            "is failing: put it back from a copy of the store"
        )

    @staticmethod
    def _column(group: Any, column: Column, rows: slice | None) -> Values:
        part = rows or slice(None)
        if column.kind in ("string", "ragged"):
            stop = None if part.stop is None else part.stop + 1
            ptr = group[f"{column.pointer}_ptr"][part.start : stop]
            name = f"{column.name}_bytes" if column.kind == "string" else column.name
            values = group[name][int(ptr[0]) : int(ptr[-1])]
            return Varlen(values, ptr - ptr[0])
        if column.kind == "category":
            names = Varlen(
                group[f"{column.name}_names_bytes"][:], group[f"{column.name}_names_ptr"][:]
            )
            return Category(group[column.name][part], names.strings())
        values = group[column.name][part]
        return np.asarray(values)

    def iterate(
        self, table: str, names: Sequence[str] | None = None, step: int = 8192
    ) -> Iterator[Rows]:
        """Yield a table's rows in slices of at most ``step``."""
        total = self.n_rows(table)
        for start in range(0, total, step):
            yield self.read(table, names, slice(start, min(start + step, total)))
