"""Stores of made-up rows, in any number and with known values, and small file systems for them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import hdf5, shard
from orchestrator.columns import Rows, Varlen, from_records, key_bytes
from orchestrator.store import Store
from tests.conftest import engine_missing
from tests.orchestrator.store_fixtures import NO_KEY, Records, key


def numbered(number: int) -> bytes:
    """Return the key of item ``number``; every seventh shares its first word with another."""
    made = key("item", number)
    if number % 7 == 6:
        return key("item", number - 1)[:8] + made[8:]
    return made


def add_item(
    records: Records, number: int, *, status: str = "ok", started_s: float = 0.0, n_frames: int = 0
) -> None:
    """Add the task of one item, and its relaxation and frames where it went well.

    Every value follows from ``number``, so that `check_item` can tell a wrong one.
    """
    n_frames = n_frames or 1 + number % 4
    rng = np.random.default_rng(number)
    me, mol_key = numbered(number), key("molecule", number // 3)
    records.task(
        "gfn2",
        me,
        mol_key=mol_key,
        status=status,
        message="" if status == "ok" else f"item {number} at {started_s}",
        started_s=started_s,
        wall_s=float(number),
    )
    if status != "ok":
        return
    n_atoms = number % 5
    records.tables["relaxations"].append(
        {
            "key": me,
            "mol_key": mol_key,
            "parent_key": NO_KEY,
            "stage": "gfn2",
            "level": "GFN2-xTB",
            "program": f"program {number % 3}",
            "optimizer": "BFGS",
            "conformer": number % 11,
            "n_atoms": n_atoms,
            "n_steps": n_frames - 1,
            "n_evaluations": n_frames,
            "initial_energy_eV": -float(number),
            "final_energy_eV": -float(number) - 0.5,
            "fmax_eV_per_A": 0.01,
            "connectivity_changed": number % 2,
            "ladder": "",
            "cpu_s": 1.0,
            "wall_s": float(number),
            "numbers": rng.integers(1, 18, n_atoms),
            "positions": rng.normal(size=(n_atoms, 3)),
        }
    )
    records.tables["frames"].append(
        {
            "key": me,
            "mol_key": mol_key,
            "energy_eV": -float(number) - np.arange(n_frames),
            "fmax_eV_per_A": np.full(n_frames, 0.1),
            "positions": np.full((n_frames * n_atoms, 3), number, np.float32),
            "forces": np.zeros((0, 3)),
        }
    )


def wrong_items(relaxations: Rows, frames: Rows, expected: set[int]) -> list[str]:
    """Return what is missing, doubled or wrong in two tables that should hold these items."""
    found: list[str] = []
    by_key = {numbered(number): number for number in expected}
    for name, rows in (("relaxations", relaxations), ("frames", frames)):
        keys = [key_bytes(words) for words in rows["key"].tolist()]
        if len(set(keys)) != len(keys):
            found.append(f"{name}: {len(keys) - len(set(keys))} doubled")
        if lost := set(by_key) - set(keys):
            found.append(f"{name}: {len(lost)} lost")
        if strange := set(keys) - set(by_key):
            found.append(f"{name}: {len(strange)} that nobody wrote")
        for row, row_key in enumerate(keys):
            number = by_key.get(row_key)
            if number is None:
                continue
            if name == "frames":
                n_frames = 1 + number % 4
                good = np.array_equal(rows["energy_eV"][row], -float(number) - np.arange(n_frames))
                good &= bool((rows["positions"][row] == number).all())
                good &= len(rows["positions"][row]) == n_frames * (number % 5)
            else:
                rng = np.random.default_rng(number)
                good = np.array_equal(rows["numbers"][row], rng.integers(1, 18, number % 5))
                good &= np.array_equal(rows["positions"][row], rng.normal(size=(number % 5, 3)))
                good &= rows["initial_energy_eV"][row] == -number
                good &= rows["program"].names[rows["program"].codes[row]] == f"program {number % 3}"
            if not good:
                found.append(f"{name}: item {number} has wrong values")
    return found


def plain_rows(rows: Rows) -> list[dict[str, Any]]:
    """Return rows as mappings of plain Python values, to be compared."""
    columns: dict[str, list[Any]] = {}
    for column in rows.schema.columns:
        values = rows[column.name]
        if column.kind in ("string", "category"):
            columns[column.name] = values.strings()
        elif isinstance(values, Varlen):
            columns[column.name] = [values[row].tolist() for row in range(len(values))]
        else:
            columns[column.name] = values.tolist()
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def many_relaxations(first: int, count: int, n_atoms: int = 20) -> list[Rows]:
    """Return tasks and relaxations of ``count`` items with ``n_atoms`` atoms, made quickly."""
    rng = np.random.default_rng(first)
    keys = rng.integers(0, 2**63, (count, 2)).astype(np.uint64)
    records = Records()
    add_item(records, 4)
    made = []
    for table in ("tasks", "relaxations"):
        one = from_records(table, records.tables[table])
        rows = one.take(np.zeros(count, int))
        rows.columns["key"] = keys
        made.append(rows)
    ptr = np.arange(count + 1, dtype=np.int64) * n_atoms
    made[1].columns["numbers"] = Varlen(rng.integers(1, 9, count * n_atoms).astype(np.uint8), ptr)
    made[1].columns["positions"] = Varlen(rng.normal(size=(count * n_atoms, 3)), ptr)
    return made


def seal_rows(store: Store, rows: list[Rows], name: str, run: str = "run") -> Path:
    """Put rows into a store's inbox as one shard."""
    folder = store.path / "inbox" / run
    folder.mkdir(exist_ok=True)
    return shard.seal(folder, name, rows, store.name)[0]


@contextmanager
def schema_of(version: int) -> Iterator[None]:
    """Be a Basin whose stores have another schema version."""
    before = hdf5.SCHEMA_VERSION
    hdf5.SCHEMA_VERSION = version
    try:
        yield
    finally:
        hdf5.SCHEMA_VERSION = before


def mount(folder: Path, *options: str) -> None:
    """Mount; skip the test where this machine does not let us."""
    if shutil.which("mount") is None:
        engine_missing("tmpfs", "there is no mount command here")
    done = subprocess.run(
        ["mount", *options, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        engine_missing("tmpfs", f"cannot mount a small file system here: {done.stderr.strip()}")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Give a file system of ``size`` (such as "200k") at ``folder``, unmounted at the end."""
    folder.mkdir()
    mount(folder, "-t", "tmpfs", "-o", f"size={size}", "none")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Use up a file system but for about ``leave`` bytes; return the file that does."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))
    return ballast


@contextmanager
def read_only(folder: Path, at: Path) -> Iterator[Path]:
    """Show a folder at another place where nobody, not even root, can write."""
    at.mkdir()
    mount(at, "--bind", str(folder))
    try:
        mount(at, "-o", "remount,bind,ro")
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)
