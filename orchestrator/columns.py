"""Rows of a table in memory, column by column: build from records, select, join end to end."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.schema import TABLES, Column, TableSchema

Array = NDArray[Any]

# Bytes of a row above which an index of its values would weigh more than a loop over rows costs.
_LONG_ROW = 2048


@dataclass(slots=True)
class Varlen:
    """A run of values per row: row i owns ``values[ptr[i]:ptr[i+1]]``; ptr is (R+1,) int64."""

    values: Array
    ptr: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def __getitem__(self, row: int) -> Array:
        values: Array = self.values[self.ptr[row] : self.ptr[row + 1]]
        return values

    def take(self, rows: NDArray[np.integer[Any]]) -> Varlen:
        """Return the given rows, in the given order."""
        lengths = (self.ptr[1:] - self.ptr[:-1])[rows]
        ptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=ptr[1:])
        index = np.arange(ptr[-1]) + np.repeat(self.ptr[:-1][rows] - ptr[:-1], lengths)
        return Varlen(self.values[index], ptr)

    def strings(self) -> list[str]:
        """Decode each row as UTF-8."""
        data = self.values.tobytes()
        ptr = self.ptr.tolist()
        return [data[a:b].decode() for a, b in itertools.pairwise(ptr)]


@dataclass(slots=True)
class Category:
    """A string per row out of a set: ``names[codes[i]]``; codes is (R,) uint32."""

    codes: NDArray[np.uint32]
    names: list[str]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> str:
        return self.names[int(self.codes[row])]

    def take(self, rows: NDArray[np.integer[Any]]) -> Category:
        """Return the given rows, in the given order."""
        return Category(self.codes[rows], self.names)

    def equals(self, name: str) -> NDArray[np.bool_]:
        """Return a mask (R,) of the rows that hold ``name``."""
        if name not in self.names:
            return np.zeros(len(self.codes), bool)
        mask: NDArray[np.bool_] = self.codes == self.names.index(name)
        return mask

    def strings(self) -> list[str]:
        """Return the string of each row."""
        return [self.names[code] for code in self.codes.tolist()]


Values = Array | Varlen | Category


@dataclass(slots=True)
class Rows:
    """Rows of one table; ``columns`` may hold fewer columns than the schema (a projection)."""

    schema: TableSchema
    columns: dict[str, Values] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def take(self, rows: NDArray[Any]) -> Rows:
        """Return the given rows (indices, or a boolean mask) in the given order."""
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        return Rows(self.schema, {name: _taken(v, rows) for name, v in self.columns.items()})

    def nbytes(self) -> int:
        """Return the memory held by the columns, in bytes."""
        total = 0
        for values in self.columns.values():
            if isinstance(values, Varlen):
                total += values.values.nbytes + values.ptr.nbytes
            elif isinstance(values, Category):
                total += values.codes.nbytes
            else:
                total += values.nbytes
        return total


def key_words(key: bytes) -> tuple[int, int]:
    """Return the two big-endian words of a key's first 16 bytes."""
    return int.from_bytes(key[:8], "big"), int.from_bytes(key[8:16], "big")


def key_array(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Return keys as (K, 2) uint64, big-endian words, so that order and hexadecimal agree."""
    packed = b"".join(key[:16] for key in keys)
    return np.frombuffer(packed, ">u8").reshape(-1, 2).astype(np.uint64)


def key_bytes(words: Iterable[int]) -> bytes:
    """Return the 16 bytes of a key from its two words."""
    hi, lo = words
    return int(hi).to_bytes(8, "big") + int(lo).to_bytes(8, "big")


def strings_to_varlen(strings: Sequence[str]) -> Varlen:
    """Return strings as UTF-8 bytes with a row pointer."""
    encoded = [s.encode("utf-8", "replace") for s in strings]
    ptr = np.zeros(len(encoded) + 1, np.int64)
    if encoded:
        np.cumsum([len(e) for e in encoded], out=ptr[1:])
    return Varlen(np.frombuffer(b"".join(encoded), np.uint8), ptr)


def category(strings: Sequence[str]) -> Category:
    """Return strings as codes into the set of those that occur."""
    index: dict[str, int] = {}
    codes = [index.setdefault(s, len(index)) for s in strings]
    return Category(np.array(codes, np.uint32), list(index))


def _ragged(column: Column, cells: Sequence[Any]) -> Varlen:
    tail = (column.width,) if column.width else ()
    arrays = [np.asarray(cell, column.dtype).reshape(-1, *tail) for cell in cells]
    ptr = np.zeros(len(arrays) + 1, np.int64)
    if arrays:
        np.cumsum([len(a) for a in arrays], out=ptr[1:])
    values = np.concatenate(arrays) if arrays else np.zeros((0, *tail), column.dtype)
    return Varlen(values, ptr)


def from_records(table: str, records: Sequence[Mapping[str, Any]]) -> Rows:
    """Build rows from one mapping per row; every column of the table must be in each.

    Raises ValueError where ragged columns that share a row pointer differ in length.
    """
    schema = TABLES[table]
    columns: dict[str, Values] = {}
    pointers: dict[str, tuple[str, Varlen]] = {}
    for column in schema.columns:
        cells = [record[column.name] for record in records]
        if column.kind == "key":
            columns[column.name] = key_array(cells)
        elif column.kind == "scalar":
            columns[column.name] = np.array(cells, column.dtype)
        elif column.kind == "string":
            columns[column.name] = strings_to_varlen(cells)
        elif column.kind == "category":
            columns[column.name] = category(cells)
        else:
            columns[column.name] = made = _ragged(column, cells)
            first, other = pointers.setdefault(column.pointer, (column.name, made))
            if not np.array_equal(other.ptr, made.ptr):
                row = int(np.flatnonzero(np.diff(other.ptr) != np.diff(made.ptr))[0])
                raise ValueError(
                    f"table {table}, row {row}: {first} has {len(other[row])} entries and "
                    f"{column.name} {len(made[row])}; they must be as many"
                )
    return Rows(schema, columns)


def empty(table: str, names: Sequence[str] | None = None) -> Rows:
    """Return no rows, with all columns or the named ones."""
    rows = from_records(table, [])
    if names is not None:
        rows.columns = {name: rows.columns[name] for name in names}
    return rows


def _taken(values: Values, rows: NDArray[np.integer[Any]]) -> Values:
    return values.take(rows) if isinstance(values, Varlen | Category) else values[rows]


def concat(parts: Sequence[Rows]) -> Rows:
    """Join rows of one table end to end (all parts hold the same columns)."""
    if len(parts) == 1:
        return parts[0]
    joined = {name: _joined([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Rows(parts[0].schema, joined)


def _joined(pieces: Sequence[Values]) -> Values:
    first = pieces[0]
    if isinstance(first, Varlen):
        offset = 0
        ptrs = [np.zeros(1, np.int64)]
        for piece in pieces:
            ptrs.append(piece.ptr[1:] + offset)  # type: ignore[union-attr]
            offset += int(piece.ptr[-1])  # type: ignore[union-attr]
        values = np.concatenate([piece.values for piece in pieces])  # type: ignore[union-attr]
        return Varlen(values, np.concatenate(ptrs))
    if isinstance(first, Category):
        index: dict[str, int] = {}
        codes = []
        for piece in pieces:
            assert isinstance(piece, Category)
            table = [index.setdefault(s, len(index)) for s in piece.names] or [0]
            codes.append(np.array(table, np.uint32)[piece.codes])
        return Category(np.concatenate(codes), list(index))
    joined: Array = np.concatenate(pieces)  # type: ignore[arg-type]
    return joined


def gather(parts: Sequence[Rows], rows: NDArray[np.integer[Any]], *, last: bool) -> Rows:
    """Take rows out of parts of one table, by their numbers as if they were joined, in that order.

    Long rows are never held more than twice. With ``last`` the parts lose each column as it is
    taken, and are empty afterwards.
    """
    starts = np.cumsum([0, *(len(part) for part in parts)])
    taken: dict[str, Values] = {}
    for name in list(parts[0].columns):
        pieces = [part.columns.pop(name) if last else part.columns[name] for part in parts]
        if isinstance(pieces[0], Varlen) and _long(pieces):
            taken[name] = _copied(pieces, rows, starts)
        else:
            taken[name] = _taken(_joined(pieces), rows)
    return Rows(parts[0].schema, taken)


def _long(pieces: Sequence[Any]) -> bool:
    """Whether rows are long enough to be copied one by one."""
    held: int = sum(piece.values.nbytes for piece in pieces)
    return held > _LONG_ROW * sum(map(len, pieces))


def _copied(
    pieces: Sequence[Any], rows: NDArray[np.integer[Any]], starts: NDArray[np.integer[Any]]
) -> Varlen:
    lengths = np.concatenate([np.diff(piece.ptr) for piece in pieces])[rows]
    ptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=ptr[1:])
    values = np.empty((int(ptr[-1]), *pieces[0].values.shape[1:]), pieces[0].values.dtype)
    owners = np.searchsorted(starts, rows, side="right") - 1
    for at, (row, owner) in enumerate(zip(rows.tolist(), owners.tolist(), strict=True)):
        values[ptr[at] : ptr[at + 1]] = pieces[owner][row - int(starts[owner])]
    return Varlen(values, ptr)
