"""The store for other programs: Parquet, SDF, extended xyz, or one HDF5 file."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kernels.units import EV_TO_KCAL
from orchestrator import hdf5
from orchestrator.columns import Category, Rows, Varlen, key_bytes, strings_to_varlen
from orchestrator.errors import BasinError, StoreError, StoreFullError
from orchestrator.schema import SCHEMA_VERSION, STATUSES, TABLES, Column
from orchestrator.shard import TEMPORARY
from orchestrator.store import Snapshot, Store
from orchestrator.tables import (
    CHAIN_COLUMNS,
    Lookup,
    arrow_rows,
    arrow_schema,
    chain_atoms,
    path_atoms,
    stream,
)

if TYPE_CHECKING:
    import ase
    from rdkit import Chem

KINDS = ("parquet", "sdf", "extxyz", "hdf5")
_ATTEMPTS = 3
# Rows in memory at once; a row of frames holds a whole path.
_STEP = {"frames": 256, "paths": 256, "single_points": 256, "generations": 256, "chains": 4}
_ROWS = 8192
_SCALAR_CHUNK = 65536
_STEP_CHUNK = 16384
_RAW_CHUNK = 8192

Tell = Callable[[str], None]


def export(
    store: Store,
    kind: str,
    target: Path | str,
    *,
    table: str | None = None,
    stage: str | None = None,
    overwrite: bool = False,
    frames: bool = False,
    tell: Tell | None = None,
) -> Path:
    """Write the store to ``target`` in another format, whole or not at all; return the path.

    - ``parquet``: a folder with one file per table, or only ``table``.
    - ``sdf``: the relaxed geometries, or those of ``stage``, with bonds from the SMILES.
    - ``extxyz``: the same geometries for ASE; with ``frames`` the whole paths, with forces
      where they were saved; for a diffusion stage its paths, with the diffusion step ``n``, and for
      a stage of chains their frames, with the ``step`` of each.
    - ``hdf5``: one file laid out like the store's segments, rows in the segments' order.

    Memory does not grow with the store beyond some hundred bytes a molecule. ``tell`` gets one
    line about everything that was left out (default: a logged warning).

    Raises StoreError when the target is there already and ``overwrite`` is not given, or when
    there is nothing to write; StoreFullError when the disk is full.
    """
    if kind not in KINDS:
        raise StoreError(f"unknown kind of export {kind!r}; there are {', '.join(KINDS)}")
    if frames and kind != "extxyz":
        raise StoreError(f"whole paths go into extxyz only, not into {kind}")
    if table is not None and kind != "parquet":
        raise StoreError(f"a table can be chosen for parquet only, not for {kind}")
    if table is not None and table not in TABLES:
        raise StoreError(f"there is no table {table!r}; the tables are {', '.join(TABLES)}")
    if stage is not None and kind not in ("sdf", "extxyz"):
        raise StoreError(f"a stage can be chosen for sdf and extxyz only, not for {kind}")
    tell = tell or logging.getLogger("basin").warning
    target = Path(target).absolute()
    _check_target(target, kind, overwrite)
    for attempt in range(_ATTEMPTS):
        try:
            snapshot = store.snapshot()
            with _whole(target) as temporary:
                if kind == "parquet":
                    _parquet(snapshot, temporary, [table] if table else list(TABLES))
                elif kind == "hdf5":
                    _hdf5(snapshot, temporary)
                elif kind == "sdf":
                    _sdf(snapshot, temporary, stage, tell)
                elif frames:
                    _extxyz_paths(snapshot, temporary, stage, tell)
                else:
                    _extxyz(snapshot, temporary, stage, tell)
            for path, problem in snapshot.problems.items():
                tell(
                    f"left out: {path}: {problem}"
                    if path not in problem
                    else f"left out: {problem}"
                )
            return target
        except _GoneError:
            if attempt == _ATTEMPTS - 1:
                raise StoreError(
                    f"{store.path}: files kept being compacted away while they were read; "
                    "start the export again"
                ) from None
    raise AssertionError("unreachable")


class _GoneError(Exception):
    """A file of the snapshot was compacted away; a new snapshot has its rows."""


# --- targets ----------------------------------------------------------------------------------


def _check_target(target: Path, kind: str, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise StoreError(f"{target}: the folder {target.parent} does not exist; make it first")
    if not target.exists():
        return
    if not overwrite:
        raise StoreError(f"{target}: exists already; choose another name or add --overwrite")
    if kind != "parquet":
        if target.is_dir():
            raise StoreError(f"{target}: is a folder; {kind} is one file: choose a file's name")
        return
    # A folder is replaced as a whole, so it must hold nothing but an earlier export.
    ours = {f"{name}.parquet" for name in TABLES}
    if not target.is_dir() or not {entry.name for entry in target.iterdir()} <= ours:
        raise StoreError(
            f"{target}: is not the folder of an earlier export (it holds other things), so it is "
            "not overwritten; choose another name"
        )


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside the target; what is there at the end becomes the target."""
    temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{target.name}")
    aside = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{target.name}")
    try:
        yield temporary
        if temporary.is_dir() and target.is_dir():
            os.rename(target, aside)
        os.replace(temporary, target)
    except FileNotFoundError as exc:
        raise _GoneError from exc
    except OSError as exc:
        if isinstance(exc, BasinError):
            raise
        if exc.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(exc):
            raise StoreFullError(
                f"{target.parent}: no space left for the export; free some or choose another disk"
            ) from exc
        raise StoreError(f"{target}: cannot be written: {exc.strerror or exc}") from exc
    finally:
        for path in (temporary, aside):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


# --- Parquet ----------------------------------------------------------------------------------


def _parquet(snapshot: Snapshot, folder: Path, tables: Sequence[str]) -> None:
    import pyarrow.parquet

    folder.mkdir()
    for table in tables:
        schema = arrow_schema(TABLES[table])
        with pyarrow.parquet.ParquetWriter(
            folder / f"{table}.parquet", schema, compression="zstd"
        ) as writer:
            # Row groups of one slice of paths, but of many slices of small rows.
            waiting: list[Any] = []
            n = 0
            for rows in _stream(snapshot, table):
                waiting.append(arrow_rows(rows))
                n += sum(part.nbytes for part in waiting[-1:])
                if n > 64 << 20:
                    _write_group(writer, waiting)
                    waiting, n = [], 0
            _write_group(writer, waiting)


def _write_group(writer: Any, parts: list[Any]) -> None:
    import pyarrow as pa

    if parts:
        whole = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
        writer.write_table(whole, row_group_size=1 << 20)


def _stream(snapshot: Snapshot, table: str, names: Sequence[str] | None = None) -> Iterator[Rows]:
    return stream(snapshot, table, names, _STEP.get(table, _ROWS))


# --- HDF5 -------------------------------------------------------------------------------------


class _Growing:
    """A dataset of a new file that grows slice by slice, with the filters of a segment."""

    def __init__(self, group: Any, name: str, column: Column | None, like: NDArray[Any]) -> None:
        rows, compress = _SCALAR_CHUNK, True
        if column is not None and column.kind == "ragged":
            rows = _RAW_CHUNK if column.raw else _STEP_CHUNK
            compress = not column.raw
        if column is not None and column.kind == "key":
            compress = column.name != "key"
        packing = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
        self._data = group.create_dataset(
            name,
            shape=(0, *like.shape[1:]),
            maxshape=(None, *like.shape[1:]),
            dtype=like.dtype,
            chunks=(rows, *like.shape[1:]),
            fletcher32=True,
            **(packing if compress else {}),
        )
        if column is not None and column.dtype[-2] == "f":
            self._data.attrs["units"] = column.unit or "1"
            self._data.attrs["long_name"] = column.long_name

    def append(self, values: NDArray[Any]) -> None:
        if len(values):
            start = len(self._data)
            self._data.resize(start + len(values), axis=0)
            self._data[start:] = values


class _GrowingTable:
    """One table of the new file."""

    def __init__(self, group: Any, like: Rows) -> None:
        self._group = group
        self._like = like
        self._data: dict[str, _Growing] = {}
        self._offsets: dict[str, int] = {}
        self._names: dict[str, dict[str, int]] = {}
        self.n_rows = 0

    def _append(self, name: str, column: Column | None, values: NDArray[Any]) -> None:
        if name not in self._data:
            self._data[name] = _Growing(self._group, name, column, values)
        self._data[name].append(values)

    def append(self, rows: Rows) -> None:
        pointers: dict[str, NDArray[np.int64]] = {}
        for column in rows.schema.columns:
            values = rows[column.name]
            if isinstance(values, Varlen):
                pointers[f"{column.pointer}_ptr"] = values.ptr
                text = column.kind == "string"
                name = f"{column.name}_bytes" if text else column.name
                self._append(name, column, values.values)
            elif isinstance(values, Category):
                known = self._names.setdefault(column.name, {})
                codes = [known.setdefault(s, len(known)) for s in values.names] or [0]
                self._append(column.name, column, np.array(codes, "<u4")[values.codes])
            else:
                self._append(column.name, column, values)
        for name, ptr in pointers.items():
            offset = self._offsets.get(name, 0)
            first = 0 if name not in self._offsets else 1
            self._append(name, None, ptr[first:] + offset)
            self._offsets[name] = offset + int(ptr[-1])
        self.n_rows += len(rows)

    def finish(self) -> None:
        if not self.n_rows:
            self.append(self._like)
        self._group.attrs["n_rows"] = self.n_rows
        for column, known in self._names.items():
            names = strings_to_varlen(list(known))
            self._append(f"{column}_names_bytes", None, names.values)
            self._append(f"{column}_names_ptr", None, names.ptr)


def _hdf5(snapshot: Snapshot, path: Path) -> None:
    import h5py

    from orchestrator.columns import empty

    with h5py.File(path, "w", libver=None) as file:
        file.attrs["format"] = hdf5.FORMAT
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["kind"] = "export"
        file.attrs["campaign"] = snapshot.store.name
        file.attrs["writer"] = f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
        file.attrs["enum_status"] = json.dumps(STATUSES)
        for table in TABLES:
            growing = _GrowingTable(file.create_group(table), empty(table))
            for rows in _stream(snapshot, table):
                growing.append(rows)
            growing.finish()


# --- geometries -------------------------------------------------------------------------------


def _molecules(snapshot: Snapshot) -> Lookup:
    names = ["key", "smiles", "name", "charge", "multiplicity", "numbers"]
    return Lookup(snapshot.read("molecules", names))


def _text(column: Varlen, row: int) -> str:
    return bytes(column[row]).decode()


def _chosen(snapshot: Snapshot, stage: str | None) -> str:
    """Return the table whose geometries are meant."""
    stages = {
        table: set(snapshot.read(table, ["stage"])["stage"].strings())
        for table in ("relaxations", "geometries", "chains")
    }
    every = sorted(set().union(*stages.values()))
    if stage is None:
        if stages["relaxations"]:
            return "relaxations"
        remedy = f"choose a stage: {', '.join(every)}" if every else "the store has no geometry yet"
        raise StoreError(f"{snapshot.store.path}: no finished relaxation to write; {remedy}")
    for table, names in stages.items():
        if stage in names:
            return table
    there = f"there are {', '.join(every)}" if every else "the store has none yet"
    raise StoreError(f"{snapshot.store.path}: no geometry of a stage {stage!r}; {there}")


_SHARED = ("key", "mol_key", "stage", "conformer", "numbers", "positions", "n_steps")
_COLUMNS = {
    "geometries": (*_SHARED, "method", "energy_eV", "initial_energy_eV"),
    "relaxations": (
        *_SHARED,
        "level",
        "program",
        "optimizer",
        "initial_energy_eV",
        "final_energy_eV",
        "fmax_eV_per_A",
        "connectivity_changed",
    ),
}


def _geometries(
    snapshot: Snapshot, stage: str | None, molecules: Lookup
) -> Iterator[tuple[Rows, int, int, dict[str, Any]]]:
    """Yield (slice, row in it, row of its molecule or -1, what is known about the geometry)."""
    table = _chosen(snapshot, stage)
    if table == "chains":
        raise StoreError(
            f"stage {stage!r} makes chains, which have no single geometry; add --frames for all"
        )
    for rows in _stream(snapshot, table, _COLUMNS[table]):
        if stage is not None:
            rows = rows.take(rows["stage"].equals(stage))
            if not len(rows):
                continue
        owners = molecules.find(rows["mol_key"])
        texts = {
            name: rows[name].strings()
            for name in ("stage", "method", "level", "program", "optimizer")
            if name in rows.columns
        }
        for row, owner in enumerate(owners.tolist()):
            about: dict[str, Any] = {
                "key": key_bytes(rows["key"][row]).hex(),
                "mol_key": key_bytes(rows["mol_key"][row]).hex(),
            }
            about.update({name: column[row] for name, column in texts.items() if column[row]})
            about["conformer"] = int(rows["conformer"][row])
            about["n_steps"] = int(rows["n_steps"][row])
            last = "final_energy_eV" if table == "relaxations" else "energy_eV"
            before, after = float(rows["initial_energy_eV"][row]), float(rows[last][row])
            if np.isfinite(after):
                about["energy_eV"] = after
            if np.isfinite(before - after):
                about["relaxation_kcal_per_mol"] = (before - after) * EV_TO_KCAL
            if table == "relaxations":
                about["fmax_eV_per_A"] = float(rows["fmax_eV_per_A"][row])
                about["connectivity_changed"] = bool(rows["connectivity_changed"][row])
            if owner >= 0:
                known = molecules.rows
                about["name"] = _text(known["name"], owner)
                about["smiles"] = _text(known["smiles"], owner)
                about["charge"] = int(known["charge"][owner])
                about["multiplicity"] = int(known["multiplicity"][owner])
            yield rows, row, owner, about


# --- SDF --------------------------------------------------------------------------------------


def _sdf(snapshot: Snapshot, path: Path, stage: str | None, tell: Tell) -> None:
    from rdkit import Chem

    molecules = _molecules(snapshot)
    without_smiles, without_match = 0, []
    with open(path, "w", encoding="utf-8") as file:
        writer = Chem.SDWriter(file)
        try:
            for rows, row, _, about in _geometries(snapshot, stage, molecules):
                smiles = about.pop("smiles", "")
                if not smiles:
                    without_smiles += 1
                    continue
                mol = _with_bonds(smiles, rows["numbers"][row], rows["positions"][row])
                if mol is None:
                    without_match.append(about["key"])
                    continue
                mol.SetProp("_Name", _one_line(about.pop("name", "")))
                mol.SetProp("smiles", smiles)
                for name, value in about.items():
                    mol.SetProp(name, _value(value))
                writer.write(mol)
        finally:
            writer.close()
    if without_smiles:
        tell(
            f"left out of the SDF: {_geometries_text(without_smiles)} without a SMILES, so "
            "without bonds; `basin export extxyz` has them all"
        )
    if without_match:
        tell(
            f"left out of the SDF: {_geometries_text(len(without_match))} whose elements are not "
            f"those of the SMILES, first {without_match[0]}"
        )


def _geometries_text(n: int) -> str:
    return f"{n} geometr{'y' if n == 1 else 'ies'}"


def _with_bonds(
    smiles: str, numbers: NDArray[np.uint8], positions: NDArray[np.float64]
) -> Chem.Mol | None:
    """Return the SMILES's molecule with these positions; None where the elements differ."""
    from rdkit import Chem
    from rdkit.Geometry import Point3D

    from kernels.errors import InputError
    from kernels.graph import rdkit_molecule

    try:
        mol = Chem.Mol(rdkit_molecule(smiles))
    except InputError:
        return None
    if [atom.GetAtomicNum() for atom in mol.GetAtoms()] != numbers.tolist():
        return None
    conformer = Chem.Conformer(len(numbers))
    conformer.Set3D(True)
    for atom, xyz in enumerate(positions.tolist()):
        conformer.SetAtomPosition(atom, Point3D(*xyz))
    mol.AddConformer(conformer)
    return mol


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return _one_line(f"{value:.12g}" if isinstance(value, float) else str(value))


# --- extended xyz -----------------------------------------------------------------------------


def _comment(about: dict[str, Any]) -> dict[str, Any]:
    """Return what fits ASE's comment line: no line breaks, no quotes, no empty texts."""
    fit = {}
    for name, value in about.items():
        if isinstance(value, str):
            value = _one_line(value.replace('"', "'"))
            if not value:
                continue
        fit[name] = value
    return fit


def _extxyz(snapshot: Snapshot, path: Path, stage: str | None, tell: Tell) -> None:
    import ase
    from ase.calculators.singlepoint import SinglePointCalculator

    molecules = _molecules(snapshot)
    with open(path, "w", encoding="utf-8") as file:
        for rows, row, _, about in _geometries(snapshot, stage, molecules):
            atoms = ase.Atoms(numbers=rows["numbers"][row], positions=rows["positions"][row])
            energy = about.pop("energy_eV", None)
            atoms.info.update(_comment(about))
            if energy is not None:
                atoms.calc = SinglePointCalculator(atoms, energy=energy)  # type: ignore[no-untyped-call]
            _write_xyz(file, [atoms])


def _extxyz_paths(snapshot: Snapshot, path: Path, stage: str | None, tell: Tell) -> None:
    molecules = _molecules(snapshot)
    table = _chosen(snapshot, stage)
    if table == "geometries":
        _diffusion_paths(snapshot, path, str(stage), molecules)
    elif table == "chains":
        _chain_frames(snapshot, path, str(stage), molecules)
    if table != "relaxations":
        return
    names = ["key", "stage", "level", "program", "numbers"]
    relaxations = Lookup(snapshot.read("relaxations", names))
    about_stage = relaxations.rows["stage"]
    lost = 0
    with open(path, "w", encoding="utf-8") as file:
        for rows in _stream(snapshot, "frames"):
            owners = molecules.find(rows["mol_key"]).tolist()
            tasks = relaxations.find(rows["key"]).tolist()
            for row, (owner, task) in enumerate(zip(owners, tasks, strict=True)):
                if owner < 0 or task < 0:
                    lost += 1
                    continue
                if stage is not None and about_stage.names[about_stage.codes[task]] != stage:
                    continue
                known = molecules.rows
                info: dict[str, Any] = {
                    "key": key_bytes(rows["key"][row]).hex(),
                    "mol_key": key_bytes(rows["mol_key"][row]).hex(),
                    "name": _text(known["name"], owner),
                    "smiles": _text(known["smiles"], owner),
                    "charge": int(known["charge"][owner]),
                    "multiplicity": int(known["multiplicity"][owner]),
                }
                for name in ("stage", "level", "program"):
                    column = relaxations.rows[name]
                    info[name] = column.names[column.codes[task]]
                numbers = relaxations.rows["numbers"][task]
                _write_xyz(file, path_atoms(rows, row, numbers, _comment(info)))
    if lost:
        tell(f"left out: {lost} paths whose molecule or relaxation is in an unreadable file")


def _diffusion_paths(snapshot: Snapshot, path: Path, stage: str, molecules: Lookup) -> None:
    import ase

    names = ["key", "mol_key", "stage", "model", "protocol", "level", "numbers", "positions"]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for rows in _stream(snapshot, "paths", names):
            owners = molecules.find(rows["mol_key"]).tolist()
            texts = {name: rows[name].strings() for name in ("stage", "model", "protocol")}
            for row in np.flatnonzero(rows["stage"].equals(stage)).tolist():
                about: dict[str, Any] = {
                    "key": key_bytes(rows["key"][row]).hex(),
                    "mol_key": key_bytes(rows["mol_key"][row]).hex(),
                    **{name: column[row] for name, column in texts.items()},
                }
                if owners[row] >= 0:
                    known = molecules.rows
                    about["name"] = _text(known["name"], owners[row])
                    about["smiles"] = _text(known["smiles"], owners[row])
                numbers = rows["numbers"][row]
                frames = rows["positions"][row].reshape(-1, len(numbers), 3)
                images = [ase.Atoms(numbers=numbers, positions=xyz.astype(float)) for xyz in frames]
                for step, n in enumerate(rows["level"][row].tolist()):
                    images[step].info.update(_comment(about), step=step, n=n)
                _write_xyz(file, images)
                written += 1
    if not written:
        raise StoreError(f"stage {stage!r} keeps no paths; relaxations, diffusions and chains do")


def _chain_frames(snapshot: Snapshot, path: Path, stage: str, molecules: Lookup) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for rows in _stream(snapshot, "chains", CHAIN_COLUMNS):
            owners = molecules.find(rows["mol_key"]).tolist()
            for row in np.flatnonzero(rows["stage"].equals(stage)).tolist():
                about: dict[str, Any] = {
                    "key": key_bytes(rows["key"][row]).hex(),
                    "mol_key": key_bytes(rows["mol_key"][row]).hex(),
                    "stage": stage,
                }
                if owners[row] >= 0:
                    known = molecules.rows
                    about["name"] = _text(known["name"], owners[row])
                    about["smiles"] = _text(known["smiles"], owners[row])
                _write_xyz(file, chain_atoms(rows, row, _comment(about)))


def _write_xyz(file: Any, images: list[ase.Atoms]) -> None:
    from ase.io.extxyz import write_extxyz

    write_extxyz(file, images)
