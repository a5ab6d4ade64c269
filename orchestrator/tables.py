"""The store's tables as Arrow, as SQL, and the path of one task as ASE atoms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kernels.units import EV_TO_KCAL
from orchestrator import hdf5, shard
from orchestrator.columns import Category, Rows, Values, Varlen, key_bytes
from orchestrator.errors import CorruptShardError, StoreError, StoreVersionError
from orchestrator.schema import TABLES, Column, TableSchema
from orchestrator.store import Snapshot, Store, drop_duplicates

if TYPE_CHECKING:
    import ase
    import pyarrow

_SHOWN = 5
_BOOLEANS = frozenset({"connectivity_changed", "diverged"})

# SQL only: what an analyst would otherwise type in every second query.
_RELAXATION = "relaxation_kcal_per_mol"
_DERIVED = {
    "geometries": {_RELAXATION: ("initial_energy_eV", "energy_eV")},
    "relaxations": {_RELAXATION: ("initial_energy_eV", "final_energy_eV")},
}
_STEP = "step"
# Tables with a row per chain, and what SQL calls their series with a row per step.
_STEPS_OF = {"chain_steps": "chains"}
_OF_EACH_STEP = ("key", "mol_key", "stage", "kind", "temperature_K", "n", "repeat")
SQL_TABLES = (*TABLES, *_STEPS_OF)


# --- columns as Arrow -------------------------------------------------------------------------


def arrow_type(column: Column) -> pyarrow.DataType:
    """Return the Arrow type of a column: keys and strings as text, categories as dictionaries."""
    import pyarrow as pa

    if column.kind in ("key", "string"):
        return pa.large_string()
    if column.kind == "category":
        return pa.dictionary(pa.uint32(), pa.string())
    if column.name in _BOOLEANS:
        return pa.bool_()
    value = pa.from_numpy_dtype(np.dtype(column.dtype))
    if column.kind == "ragged":
        return pa.large_list(pa.list_(value, column.width) if column.width else value)
    return value


def arrow_schema(schema: TableSchema, names: Sequence[str] | None = None) -> pyarrow.Schema:
    """Return the Arrow schema of a table; units and long names are metadata of its fields."""
    import pyarrow as pa

    fields = []
    for column in schema.columns:
        if names is None or column.name in names:
            about = {"long_name": column.long_name}
            if column.unit:
                about["units"] = column.unit
            fields.append(pa.field(column.name, arrow_type(column), metadata=about))
    return pa.schema(fields)


def hexadecimal(words: NDArray[np.uint64]) -> pyarrow.Array:
    """Return keys (K, 2) as 32 hexadecimal digits each; the zero key, which means none, as null."""
    import pyarrow as pa

    digits = np.ascontiguousarray(words).astype(">u8").tobytes().hex().encode()
    offsets = np.arange(len(words) + 1, dtype=np.int64) * 32
    none = ~words.any(axis=1)
    valid = None
    if none.any():
        valid = pa.py_buffer(np.packbits(~none, bitorder="little").tobytes())
    return pa.LargeStringArray.from_buffers(
        len(words), pa.py_buffer(offsets), pa.py_buffer(digits), valid
    )


def arrow_array(column: Column, values: Values) -> pyarrow.Array:
    """Return one column as Arrow; a NaN, which means that there is no value, as null."""
    import pyarrow as pa

    if isinstance(values, Category):
        return pa.DictionaryArray.from_arrays(
            pa.array(values.codes), pa.array(values.names, pa.string())
        )
    if isinstance(values, Varlen):
        ptr = np.ascontiguousarray(values.ptr, np.int64)
        if column.kind == "string":
            text = np.ascontiguousarray(values.values)
            return pa.LargeStringArray.from_buffers(
                len(values), pa.py_buffer(ptr), pa.py_buffer(text)
            )
        flat = pa.array(values.values.reshape(-1))
        if column.width:
            flat = pa.FixedSizeListArray.from_arrays(flat, column.width)
        return pa.LargeListArray.from_arrays(pa.array(ptr), flat)
    if column.kind == "key":
        return hexadecimal(values)
    if column.name in _BOOLEANS:
        return pa.array(values.astype(bool))
    return pa.array(values, from_pandas=True)


def arrow_rows(rows: Rows) -> pyarrow.Table:
    """Return rows, with the columns they hold, as an Arrow table."""
    import pyarrow as pa

    schema = arrow_schema(rows.schema, list(rows.columns))
    arrays = [arrow_array(rows.schema.column(n), rows.columns[n]) for n in schema.names]
    return pa.Table.from_arrays(arrays, schema=schema)


def arrow_table(store: Store, name: str) -> pyarrow.Table:
    """Return a table as Arrow, as stored: keys are hexadecimal text, missing values null.

    Raises StoreError when there is no table of that name.
    """
    if name not in TABLES:
        raise StoreError(f"there is no table {name!r}; {_tables()}")
    return arrow_rows(store.read(name))


def _tables() -> str:
    return f"the tables are {', '.join(TABLES)}"


# --- rows as a stream -------------------------------------------------------------------------


def stream(
    snapshot: Snapshot, table: str, names: Sequence[str] | None = None, step: int = 8192
) -> Iterator[Rows]:
    """Yield a table's rows, each key once, at most ``step`` at a time.

    Memory: one slice, one shard, and 17 bytes a row while shards await compaction. Raises
    FileNotFoundError when a file was compacted away meanwhile: take a new snapshot.
    """
    needed = ["key", "status", "started_s"] if table == "tasks" else ["key"]
    keep: NDArray[np.bool_] | None = None
    if snapshot.shards:
        counts: list[Rows] = list(snapshot.parts(table, needed))
        if counts:
            keep = _unique(counts)
    start = 0
    for segment in snapshot.manifest.segments:
        if segment.table == table:
            path = snapshot.store.path / segment.file
            with hdf5.TableFile(path, str(path)) as file:
                for rows in file.iterate(table, names, step):
                    yield from _kept(rows, keep, start)
                    start += len(rows)
    for rows in snapshot.shard_parts(table, names):
        for first in range(0, len(rows), step):
            part = rows.take(np.arange(first, min(first + step, len(rows))))
            yield from _kept(part, keep, start)
            start += len(part)


def _unique(parts: list[Rows]) -> NDArray[np.bool_]:
    from orchestrator.columns import concat

    rows = concat(parts)
    total = len(rows)
    # A passenger column: it comes out with the numbers of the rows that stay.
    passenger = Rows(rows.schema, {**rows.columns, "row": np.arange(total)})
    keep: NDArray[np.bool_] = np.zeros(total, bool)
    keep[drop_duplicates(passenger)["row"]] = True
    return keep


def _kept(rows: Rows, keep: NDArray[np.bool_] | None, start: int) -> Iterator[Rows]:
    if keep is not None:
        mask = keep[start : start + len(rows)]
        if not mask.all():
            rows = rows.take(mask)
    if len(rows):
        yield rows


class Lookup:
    """Rows found by their key."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._order = np.argsort(rows["key"][:, 0], kind="stable")
        self._sorted = rows["key"][self._order]

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Return the row of each key (K, 2), -1 where there is none."""
        found = np.full(len(keys), -1, np.intp)
        first = np.searchsorted(self._sorted[:, 0], keys[:, 0])
        inside = np.flatnonzero(first < len(self._sorted))
        same = (self._sorted[first[inside]] == keys[inside]).all(axis=1)
        hits = inside[same]
        found[hits] = self._order[first[hits]]
        for i in inside[~same].tolist():
            # Keys that share their first word stand side by side, in no order.
            at = int(first[i])
            while at < len(self._sorted) and self._sorted[at, 0] == keys[i, 0]:
                if self._sorted[at, 1] == keys[i, 1]:
                    found[i] = self._order[at]
                    break
                at += 1
        return found


# --- SQL --------------------------------------------------------------------------------------


def sql_columns(table: str, *, ragged: bool) -> dict[str, pyarrow.DataType]:
    """Return the columns that a table has in SQL, with their types."""
    import pyarrow as pa

    schema = TABLES[_STEPS_OF.get(table, table)]
    if series := _series(table):
        wanted = _OF_EACH_STEP if table in _STEPS_OF else [c.name for c in schema.columns]
        plain = {
            c.name: arrow_type(c) for c in schema.columns if c.kind != "ragged" and c.name in wanted
        }
        along = {c.name: pa.from_numpy_dtype(np.dtype(c.dtype)) for c in series}
        return {**plain, _STEP: pa.int32(), **along}
    columns = {c.name: arrow_type(c) for c in schema.columns if ragged or c.kind != "ragged"}
    columns.update({name: pa.float64() for name in _DERIVED.get(table, {})})
    return columns


def _series(table: str) -> list[Column]:
    """Return the columns with a value per frame; a table that has them has a row per frame."""
    if table in _STEPS_OF.values():
        return []
    columns = TABLES[_STEPS_OF.get(table, table)].columns
    return [c for c in columns if c.kind == "ragged" and c.pointer == _STEP]


class _Source:
    """One table's columns, read from HDF5 when a query first wants them."""

    def __init__(self, snapshot: Snapshot, table: str) -> None:
        self._snapshot = snapshot
        self._table = table
        self._arrays: dict[str, pyarrow.Array] = {}

    def columns(self, names: Sequence[str]) -> list[pyarrow.Array]:
        """Return the named columns."""
        missing = [name for name in names if name not in self._arrays]
        if missing:
            read = self._by_frame if _series(self._table) else self._plain
            self._arrays.update(read(missing))
        return [self._arrays[name] for name in names]

    def _plain(self, names: list[str]) -> dict[str, pyarrow.Array]:
        import pyarrow as pa

        derived = _DERIVED.get(self._table, {})
        stored = [name for name in names if name not in derived]
        stored += [n for name in names if name in derived for n in derived[name]]
        rows = self._snapshot.read(self._table, list(dict.fromkeys(stored)))
        found = {n: arrow_array(rows.schema.column(n), rows[n]) for n in rows.columns}
        for name in names:
            if name in derived:
                before, after = derived[name]
                found[name] = pa.array((rows[before] - rows[after]) * EV_TO_KCAL, from_pandas=True)
        return found

    def _by_frame(self, names: list[str]) -> dict[str, pyarrow.Array]:
        import pyarrow as pa

        series = [column.name for column in _series(self._table)]
        stored = [name for name in names if name != _STEP]
        if series[0] not in stored:
            stored.append(series[0])
        rows = self._snapshot.read(_STEPS_OF.get(self._table, self._table), stored)
        ptr = rows[series[0]].ptr
        lengths = np.diff(ptr)
        owner = np.repeat(np.arange(len(rows)), lengths)
        found: dict[str, pyarrow.Array] = {}
        for name in names:
            if name == _STEP:
                found[name] = pa.array((np.arange(ptr[-1]) - ptr[:-1][owner]).astype(np.int32))
            elif name in series:
                found[name] = pa.array(rows[name].values, from_pandas=True)
            else:
                one = Rows(rows.schema, {name: rows.columns[name]}).take(owner)
                found[name] = arrow_array(rows.schema.column(name), one[name])
        return found


def _dataset(source: _Source, schema: pyarrow.Schema, problems: list[Exception]) -> Any:
    """Return a table as a pyarrow Dataset that reads a column when DuckDB's scan asks for it.

    DuckDB asks a Dataset for a scanner over just the columns that its optimiser found to be
    needed; so those, and no others, are read.
    """
    import pyarrow as pa
    import pyarrow.dataset

    class Columns(pyarrow.dataset.Dataset):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        @property
        def schema(self) -> pyarrow.Schema:
            return schema

        def scanner(
            self, columns: list[str] | None = None, filter: Any = None, **options: Any
        ) -> Any:
            names = list(schema.names if columns is None else columns)
            if filter is not None:
                # An expression does not list its fields, but its text names them all.
                words = set(re.findall(r"\w+", str(filter)))
                names += [n for n in schema.names if n in words and n not in names]
            try:
                arrays = source.columns(names)
            except Exception as exc:
                problems.append(exc)
                raise
            table = pa.Table.from_arrays(arrays, schema=pa.schema([schema.field(n) for n in names]))
            return pyarrow.dataset.dataset(table).scanner(columns=columns, filter=filter, **options)

    return Columns()


def query(store: Store, sql: str) -> pyarrow.Table:
    """Answer one SELECT over the tables, in DuckDB's SQL.

    Tables: molecules, geometries, relaxations, paths, chains, exchanges, tasks, and, with a row per
    frame numbered by ``step``, frames, single_points, generations and chain_steps, the energies of
    chains. Keys are 32 hexadecimal digits, missing values are null. Beyond the stored columns there
    is ``relaxation_kcal_per_mol``, the energy that a relaxation or a force-field optimisation
    gained. ``numbers``, ``positions`` and a chain's ``energy_eV`` are lists, and there only in a
    query that names numbers or positions. Nothing outside the store can be read, and nothing can
    be written.

    Raises StoreError with DuckDB's message, and the tables or columns there are.
    """
    return store.consistent(lambda snapshot: _answer(snapshot, sql))


def _answer(snapshot: Snapshot, sql: str) -> pyarrow.Table:
    import duckdb
    import pyarrow as pa

    words = set(re.findall(r"\w+", sql.lower()))
    ragged = not words.isdisjoint(("numbers", "positions"))
    schemas = {name: pa.schema(sql_columns(name, ragged=ragged)) for name in SQL_TABLES}
    problems: list[Exception] = []
    connection = duckdb.connect(
        ":memory:",
        config={
            "enable_external_access": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
        },
    )
    try:
        statements = connection.extract_statements(sql)
        kinds = {statement.type for statement in statements}
        reading = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}
        if len(statements) != 1 or not kinds <= reading:
            raise StoreError(
                "a query is one SELECT; the store is read-only, and several statements would "
                "have several answers"
            )
        for name, schema in schemas.items():
            connection.register(name, _dataset(_Source(snapshot, name), schema, problems))
        connection.execute("SET lock_configuration = true")
        answer: pyarrow.Table = connection.sql(sql).to_arrow_table()
        return answer
    except (duckdb.Error, StoreError, OSError) as exc:
        if problems:
            raise problems[0] from None
        if isinstance(exc, duckdb.Error):
            raise StoreError(_explain(str(exc), words, schemas)) from None
        raise
    finally:
        connection.close()


def _explain(message: str, words: set[str], schemas: dict[str, pyarrow.Schema]) -> str:
    line = "; ".join(part.strip() for part in message.partition("\n\n")[0].splitlines())
    unknown = re.search(r"Table with name (.+) does not exist", line)
    if unknown:
        # DuckDB's own suggestion would be one of its internal tables.
        return f"there is no table {unknown[1]!r}; the tables are {', '.join(SQL_TABLES)}"
    if "column" in line.lower() and line.startswith("Binder Error"):
        named = [name for name in schemas if name in words] or list(schemas)
        lists = [f"{name} has {', '.join(schemas[name].names)}" for name in named]
        return "; ".join([line, *lists])
    return line


# --- trajectories -----------------------------------------------------------------------------


def trajectory(store: Store, key: str) -> list[ase.Atoms]:
    """Return the frames of a relaxation, a diffusion or a chain, the starting geometry first.

    ``key`` is the task's key in hexadecimal, or a beginning of it that no other shares; that of
    single points stands for the path they were computed along. Each frame carries its energy (eV),
    where there is one, and its forces (eV/Å), when they were saved, in a SinglePointCalculator;
    frames of a diffusion carry its step n as ``info["n"]``, those of a chain the number of the step
    after which they were stored as ``info["step"]``. Where several stages computed energies
    along a diffusion, those of the stage first by name are taken. Positions are in Å, in the single
    precision of the tables.

    Raises StoreError when the key is unknown, ambiguous, or that of a task without a path.
    """
    return store.consistent(lambda snapshot: _trajectory(snapshot, key.strip().lower()))


def _trajectory(snapshot: Snapshot, key: str) -> list[ase.Atoms]:
    if not re.fullmatch(r"[0-9a-f]{1,32}", key):
        raise StoreError(
            f"{key!r} is not a key: keys are up to 32 hexadecimal digits; "
            "`basin query 'SELECT key, stage FROM relaxations'` lists them"
        )
    tables = {
        m: t
        for t in ("frames", "paths", "chains", "single_points")
        for m in _matches(snapshot, t, key)
    }
    matches = list(tables)
    if len(matches) > 1:
        shown = ", ".join(m.hex() for m in matches[:_SHOWN])
        more = f" and {len(matches) - _SHOWN} more" if len(matches) > _SHOWN else ""
        what = "relaxations" if set(tables.values()) == {"frames"} else "tasks with a path"
        raise StoreError(f"{len(matches)} {what} have a key that begins with {key}: {shown}{more}")
    if not matches:
        raise StoreError(_missing(snapshot, key))
    (match,) = matches
    return _atoms(snapshot, match) if tables[match] == "frames" else _walk(snapshot, match)


def _bounds(key: str) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    low, high = bytes.fromhex(key.ljust(32, "0")), bytes.fromhex(key.ljust(32, "f"))
    as_words = [np.frombuffer(b, ">u8").astype(np.uint64) for b in (low, high)]
    return as_words[0], as_words[1]


def _inside(keys: NDArray[np.uint64], key: str) -> NDArray[np.intp]:
    """Return the rows of keys (K, 2) that begin with the digits ``key``."""
    low, high = _bounds(key)
    rows = np.flatnonzero((keys[:, 0] >= low[0]) & (keys[:, 0] <= high[0]))
    # The second word is only bounded where the first is fully given.
    if low[0] == high[0]:
        second = keys[rows, 1]
        rows = rows[(second >= low[1]) & (second <= high[1])]
    return rows


def _matches(snapshot: Snapshot, table: str, key: str) -> list[bytes]:
    found: dict[bytes, None] = {}
    for rows in snapshot.parts(table, ["key"]):
        for row in _inside(rows["key"], key).tolist():
            found[key_bytes(rows["key"][row])] = None
    return list(found)


def _missing(snapshot: Snapshot, key: str) -> str:
    tasks = snapshot.read("tasks", ["key", "stage", "status", "message"])
    rows = _inside(tasks["key"], key)
    if len(rows):
        one = tasks.take(rows[:1])
        stage, status = one["stage"].strings()[0], one["status"].strings()[0]
        if status != "ok":
            return (
                f"task {key} (stage {stage}) has no path, it failed: {status}: "
                f"{one['message'].strings()[0]}"
            )
        return (
            f"task {key} belongs to stage {stage}, which keeps no path; relaxations, diffusions "
            "and chains do (of a replica exchange the chains have keys of their own: "
            "`basin query 'SELECT key, temperature_K FROM chains'`)"
        )
    molecules = snapshot.read("relaxations", ["key", "mol_key"])
    rows = _inside(molecules["mol_key"], key)
    if len(rows):
        shown = ", ".join(key_bytes(w).hex() for w in molecules["key"][rows[:_SHOWN]])
        return f"{key} is a molecule's key; the keys of its relaxations: {shown}"
    return (
        f"{snapshot.store.path}: no relaxation has a key that begins with {key}; "
        "`basin query 'SELECT key, stage FROM relaxations'` lists them"
    )


def _row(snapshot: Snapshot, table: str, key: bytes, names: Sequence[str]) -> Rows | None:
    """Return the row of one key, reading no more than that from segments."""
    text = key.hex()
    for segment in snapshot.manifest.segments:
        if segment.table == table:
            path = snapshot.store.path / segment.file
            with hdf5.TableFile(path, str(path)) as file:
                at = _inside(file.read(table, ["key"])["key"], text)
                if len(at):
                    return file.read(table, names, slice(int(at[0]), int(at[0]) + 1))
    for path in snapshot.shards:
        try:
            with shard.open_shard(path) as file:
                if file.n_rows(table):
                    at = _inside(file.read(table, ["key"])["key"], text)
                    if len(at):
                        return file.read(table, names, slice(int(at[0]), int(at[0]) + 1))
        except (CorruptShardError, StoreVersionError):
            continue
    return None


def _atoms(snapshot: Snapshot, key: bytes) -> list[ase.Atoms]:
    frames = _row(snapshot, "frames", key, [c.name for c in TABLES["frames"].columns])
    about = _row(snapshot, "relaxations", key, ["numbers", "stage", "level", "mol_key"])
    if frames is None or about is None:
        raise StoreError(
            f"{snapshot.store.path}: relaxation {key.hex()} has frames but no row in the table "
            "relaxations; the file that held it may be quarantined: see `basin status`"
        )
    info = _info(snapshot, key, about)
    info["level"] = about["level"].strings()[0]
    return path_atoms(frames, 0, about["numbers"][0], info)


def _info(snapshot: Snapshot, key: bytes, about: Rows) -> dict[str, Any]:
    mol_key = key_bytes(about["mol_key"][0])
    molecule = _row(snapshot, "molecules", mol_key, ["name", "charge", "multiplicity"])
    info: dict[str, Any] = {
        "key": key.hex(),
        "mol_key": mol_key.hex(),
        "stage": about["stage"].strings()[0],
    }
    if molecule is not None:
        info["name"] = molecule["name"].strings()[0]
        info["charge"] = int(molecule["charge"][0])
        info["multiplicity"] = int(molecule["multiplicity"][0])
    return info


def _walk(snapshot: Snapshot, key: bytes) -> list[ase.Atoms]:
    """Return a diffusion's path, or the geometries of single points, with energies if known."""
    points = _row(snapshot, "single_points", key, [c.name for c in TABLES["single_points"].columns])
    at = key if points is None else key_bytes(points["parent_key"][0])
    about = _row(snapshot, "paths", at, [c.name for c in TABLES["paths"].columns])
    if about is None:
        about = _row(snapshot, "chains", at, CHAIN_COLUMNS)
    for table in ("geometries", "relaxations") if about is None else ():
        names = ["key", "mol_key", "stage", "numbers", "positions"]
        about = _row(snapshot, table, at, names) if about is None else about
    if about is None:
        raise StoreError(
            f"{snapshot.store.path}: the geometries that {key.hex()} was computed for are not "
            "found; the file that held them may be quarantined: see `basin status`"
        )
    if points is None:
        points = _energies_along(snapshot, at)
    numbers = about["numbers"][0]
    info = _info(snapshot, at, about)
    frames = about["positions"][0].reshape(-1, len(numbers), 3)
    energies, forces = np.full(len(frames), np.nan), np.zeros((0, 3))
    steps = np.arange(len(frames))
    if "save_every" in about.columns:
        info, steps, energies = _of_chain(about, len(frames), info)
    if points is not None and len(points["energy_eV"][0]) == len(frames):
        info["level"] = points["level"].strings()[0]
        energies, forces = points["energy_eV"][0], points["forces"][0]
    path = _images(numbers, frames, energies, forces, info, steps)
    if "save_every" not in about.columns and "level" in about.columns:
        for atoms, n in zip(path, about["level"][0].tolist(), strict=True):
            atoms.info["n"] = n
    return path


CHAIN_COLUMNS = (
    "key", "mol_key", "stage", "kind", "level", "model", "temperature_K", "n", "save_every",
    "energy_eV", "numbers", "positions",
)  # fmt: skip


def _of_chain(
    about: Rows, n_frames: int, info: dict[str, Any], row: int = 0
) -> tuple[dict[str, Any], NDArray[np.intp], NDArray[np.float64]]:
    """Return what goes with the frames of a chain: what is known, steps (F,), energies (F,)."""
    steps = np.arange(n_frames) * int(about["save_every"][row])
    along = about["energy_eV"][row]
    energies = along[steps] if len(along) else np.full(n_frames, np.nan)
    more: dict[str, Any] = {name: about[name][row] for name in ("kind", "level", "model")}
    if np.isfinite(about["temperature_K"][row]):
        more["temperature_K"] = float(about["temperature_K"][row])
    if about["n"][row]:
        more["n"] = int(about["n"][row])
    return {**info, **{name: value for name, value in more.items() if value}}, steps, energies


def chain_atoms(chains: Rows, row: int, info: dict[str, Any]) -> list[ase.Atoms]:
    """Return one row of the chains table as ASE atoms, frame after frame."""
    numbers = chains["numbers"][row]
    frames = chains["positions"][row].reshape(-1, len(numbers), 3)
    info, steps, energies = _of_chain(chains, len(frames), info, row)
    return _images(numbers, frames, energies, np.zeros((0, 3)), info, steps)


def _energies_along(snapshot: Snapshot, path: bytes) -> Rows | None:
    """Return the single points of a path, of the stage first by name; None where there are none."""
    wanted = np.array(_bounds(path.hex())[0])
    found: dict[str, bytes] = {}
    for rows in snapshot.parts("single_points", ["key", "parent_key", "stage"]):
        for row in np.flatnonzero((rows["parent_key"] == wanted).all(axis=1)).tolist():
            found[rows["stage"][row]] = key_bytes(rows["key"][row])
    if not found:
        return None
    names = [c.name for c in TABLES["single_points"].columns]
    return _row(snapshot, "single_points", found[min(found)], names)


def path_atoms(
    frames: Rows, row: int, numbers: NDArray[np.uint8], info: dict[str, Any]
) -> list[ase.Atoms]:
    """Return one row of the frames table as ASE atoms, frame after frame."""
    energies = frames["energy_eV"][row]
    positions = frames["positions"][row].reshape(len(energies), len(numbers), 3)
    return _images(numbers, positions, energies, frames["forces"][row], info)


def _images(
    numbers: NDArray[np.uint8],
    positions: NDArray[np.floating[Any]],
    energies: NDArray[np.float64],
    forces: NDArray[np.floating[Any]],
    info: dict[str, Any],
    steps: NDArray[np.intp] | None = None,
) -> list[ase.Atoms]:
    """Return frames (F, N, 3) as ASE atoms, with energies (F,) where finite, and any forces.

    ``steps`` (F,): their numbers, where they are not simply counted.
    """
    import ase
    from ase.calculators.singlepoint import SinglePointCalculator

    path = []
    for step, energy in enumerate(energies.tolist()):
        atoms = ase.Atoms(numbers=numbers, positions=positions[step].astype(float))
        atoms.info.update(info, step=step if steps is None else int(steps[step]))
        path.append(atoms)
        if not np.isfinite(energy):
            continue
        results: dict[str, Any] = {"energy": energy}
        if len(forces):
            results["forces"] = forces.reshape(positions.shape)[step].astype(float)
        atoms.calc = SinglePointCalculator(atoms, **results)  # type: ignore[no-untyped-call]
    return path
