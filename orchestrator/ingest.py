"""Reading the molecule files once, into chunks of the plan, ahead of the run.

Runs as its own process, so that RDKit's work and memory stay out of the driver. A chunk is
sealed into the inbox (it is data) and into ``plan/DIGEST/`` (the driver streams it from there,
now and at every restart); an interrupted reading goes on after the last whole chunk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator import shard
from orchestrator.columns import Rows, from_records, key_array
from orchestrator.errors import CorruptShardError
from orchestrator.key_index import KeyIndex
from orchestrator.plan import NO_KEY, Plan, Root
from orchestrator.store import Store

if TYPE_CHECKING:
    from kernels.graph import Molecule
    from orchestrator.campaign import Campaign
    from orchestrator.molecules import Entry

CHUNK = 4096
_FIRST_CHUNK = 128
_CHUNK_NAME = re.compile(r"^(\d+)-(\d+)-(\d+)-(\d+)-[0-9a-f]{8}\.h5$")
STAGE = "molecules"


def molecule_key(molecule: Molecule, name: str = "") -> bytes:
    """Return the 16-byte key of a molecule: what it is, not how it was written.

    One that is still to be made, and has no atoms yet, goes by its ``name``.
    """
    parts: tuple[Any, ...] = (
        molecule.smiles,
        molecule.numbers.tolist(),
        molecule.charge,
        molecule.multiplicity,
    )
    if not len(molecule.numbers):
        parts = (*parts, name)
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()[:16]


def geometry_key(mol_key: bytes, positions: np.ndarray[Any, Any]) -> bytes:
    """Return the 16-byte key of a geometry read from a file (exact coordinates count)."""
    return hashlib.sha256(mol_key + positions.astype("<f8").tobytes()).digest()[:16]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sealed chunk of the plan: entries ``start`` to ``stop`` of the molecule files.

    ``roots`` is the number of molecules (or geometries from files) that tasks start from, and
    ``bad`` the number of entries that could not be used; both stand in the file's name.
    """

    path: Path
    start: int
    stop: int
    roots: int
    bad: int


def plan_folder(store: Store, digest: str) -> Path:
    """Return where the plan of molecule files with this digest lives."""
    return store.path / "plan" / digest[:32]


def chunks(folder: Path) -> list[Chunk]:
    """Return the chunks sealed so far, in order, up to the first gap."""
    found: dict[int, Chunk] = {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    for name in names:
        if match := _CHUNK_NAME.match(name):
            start, *rest = (int(part) for part in match.groups())
            found[start] = Chunk(folder / name, start, *rest)
    whole: list[Chunk] = []
    at = 0
    while at in found:
        whole.append(found[at])
        at = found[at].stop
    return whole


def mend(folder: Path) -> None:
    """Drop damaged chunks, so that the reading goes on from the first of them."""
    for chunk in chunks(folder):
        try:
            with shard.open_shard(chunk.path):
                pass
        except CorruptShardError:
            (folder / "complete").unlink(missing_ok=True)
            chunk.path.unlink()


def is_complete(folder: Path) -> bool:
    """Tell whether the molecule files have been read to their end."""
    return (folder / "complete").exists()


def read_roots(chunk: Chunk, plan: Plan) -> list[Root]:
    """Return where the tasks of a chunk's molecules start."""
    with shard.open_shard(chunk.path) as file:
        if not file.n_rows("molecules"):
            return []
        names = ["key", "smiles", "charge", "multiplicity", "n_atoms"]
        molecules = file.read("molecules", names)
        geometries = (
            file.read("geometries", ["key", "mol_key"])
            if plan.from_files and file.n_rows("geometries")
            else None
        )
    keys = molecules["key"].astype(">u8").tobytes()
    known = {
        keys[16 * i : 16 * i + 16]: fields
        for i, fields in enumerate(
            zip(
                molecules["smiles"].strings(),
                molecules["charge"].tolist(),
                molecules["multiplicity"].tolist(),
                molecules["n_atoms"].tolist(),
                strict=True,
            )
        )
    }
    if not plan.from_files:
        return [Root(key, key, *fields) for key, fields in known.items()]
    if geometries is None:
        return []
    origins = geometries["key"].astype(">u8").tobytes()
    owners = geometries["mol_key"].astype(">u8").tobytes()
    roots = []
    for at in range(0, len(owners), 16):
        owner = owners[at : at + 16]
        roots.append(Root(owner, origins[at : at + 16], *known[owner]))
    return roots


def read_origins(chunk: Chunk, plan: Plan) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the origins (K, 2) of a chunk's `read_roots`, and their numbers of atoms (K,)."""
    with shard.open_shard(chunk.path) as file:
        if not file.n_rows("molecules"):
            return np.zeros((0, 2), np.uint64), np.zeros(0, np.int64)
        molecules = file.read("molecules", ["key", "n_atoms"])
        keys, n_atoms = molecules["key"], molecules["n_atoms"].astype(np.int64)
        if not plan.from_files:
            return keys, n_atoms
        if not file.n_rows("geometries"):
            return np.zeros((0, 2), np.uint64), np.zeros(0, np.int64)
        geometries = file.read("geometries", ["key", "mol_key"])
    atoms = dict(zip(map(tuple, keys.tolist()), n_atoms.tolist(), strict=True))
    owners = map(tuple, geometries["mol_key"].tolist())
    return geometries["key"], np.array([atoms[owner] for owner in owners], np.int64)


def read_molecule_keys(chunk: Chunk) -> NDArray[np.uint64]:
    """Return the keys (K, 2) of a chunk's molecules."""
    with shard.open_shard(chunk.path) as file:
        if not file.n_rows("molecules"):
            return np.zeros((0, 2), np.uint64)
        keys: NDArray[np.uint64] = file.read("molecules", ["key"])["key"]
    return keys


def bad_entries(chunk: Chunk, most: int) -> list[str]:
    """Return in words the first entries of a chunk that could not be used."""
    with shard.open_shard(chunk.path) as file:
        rows = file.read("tasks", ["status", "message", "source", "line"])
    rows = rows.take(np.flatnonzero(rows["status"].equals("input"))[:most])
    told = zip(
        rows["source"].strings(), rows["line"].tolist(), rows["message"].strings(), strict=True
    )
    return [f"{source}, line {line}: {message}" for source, line, message in told]


def _molecule_record(entry: Entry, molecule: Molecule, key: bytes) -> dict[str, Any]:
    return {
        "key": key,
        "smiles": molecule.smiles,
        "name": entry.name,
        "formula": molecule.formula,
        "source": entry.source,
        "line": entry.line,
        "n_atoms": len(molecule.numbers),
        "n_heavy": molecule.n_heavy,
        "charge": molecule.charge,
        "multiplicity": molecule.multiplicity,
        "numbers": molecule.numbers,
    }


def _file_geometry_record(entry: Entry, molecule: Molecule, mol_key: bytes) -> dict[str, Any]:
    return {
        "key": geometry_key(mol_key, entry.positions),  # type: ignore[arg-type]
        "mol_key": mol_key,
        "parent_key": NO_KEY,
        "stage": STAGE,
        "method": "file",
        "conformer": 0,
        "energy_eV": np.nan,
        "initial_energy_eV": np.nan,
        "n_steps": 0,
        "numbers": molecule.numbers,
        "positions": entry.positions,
    }


def _entry_record(entry: Entry, status: str, message: str, mol_key: bytes) -> dict[str, Any]:
    identity = f"{entry.source}\0{entry.line}\0{entry.text}".encode("utf-8", "replace")
    return {
        "key": hashlib.sha256(identity).digest()[:16],
        "mol_key": mol_key,
        "parent_key": NO_KEY,
        "stage": STAGE,
        "kernel": "read",
        "status": status,
        "message": message,
        "attempts": 1,
        "ladder": "",
        "conformer": 0,
        "seed": 0,
        "source": entry.source,
        "line": entry.line,
        "host": "",
        "block": "",
        "worker_pid": os.getpid(),
        "started_s": time.time(),
        "wall_s": 0.0,
        "cpu_s": 0.0,
    }


def unfit(entry: Entry, needs_geometry: bool) -> str:
    """Return why the first stage cannot start from a readable entry; empty where it can."""
    if needs_geometry and entry.positions is None:
        return (
            "no 3D geometry in this record, and the first stage needs one; embed first, or give "
            "3D coordinates"
        )
    return ""


class Reader:
    """Turns entries of molecule files into table rows, each molecule and geometry once."""

    def __init__(self, with_geometries: bool) -> None:
        self.with_geometries = with_geometries
        self.seen = KeyIndex()

    def rows(self, entries: list[Entry]) -> list[Rows]:
        """Return molecules, geometries and tasks (bad and repeated entries) of some entries."""
        molecules: list[dict[str, Any]] = []
        geometries: list[dict[str, Any]] = []
        tasks: list[dict[str, Any]] = []
        here: set[bytes] = set()
        good = [
            (entry, entry.molecule, molecule_key(entry.molecule, entry.name))
            for entry in entries
            if entry.molecule is not None and not unfit(entry, self.with_geometries)
        ]
        new = self.seen.add_all(key_array([key for _, _, key in good])).tolist()
        starts: list[dict[str, Any]] = []
        if self.with_geometries:
            starts = [_file_geometry_record(*one) for one in good]
            geometry_new = self.seen.add_all(key_array([s["key"] for s in starts])).tolist()
        else:
            geometry_new = [False] * len(good)
        row = 0
        for entry in entries:
            if entry.molecule is None:
                assert entry.error is not None
                shown = f"{entry.error} [{entry.text}]" if entry.text else str(entry.error)
                tasks.append(_entry_record(entry, "input", shown, NO_KEY))
                continue
            if problem := unfit(entry, self.with_geometries):
                tasks.append(_entry_record(entry, "input", problem, NO_KEY))
                continue
            _, molecule, key = good[row]
            if geometry_new[row]:
                geometries.append(starts[row])
            # A chunk is read by itself, so it repeats the molecule of every geometry it holds.
            if (new[row] or geometry_new[row]) and key not in here:
                here.add(key)
                molecules.append(_molecule_record(entry, molecule, key))
            if not new[row] and not geometry_new[row]:
                message = f"same molecule as an earlier entry: {molecule.smiles}"
                tasks.append(_entry_record(entry, "ok", message, key))
            row += 1
        made = {"molecules": molecules, "geometries": geometries, "tasks": tasks}
        return [from_records(name, records) for name, records in made.items() if records]


def batches(entries: Iterator[Entry], start: int) -> Iterator[list[Entry]]:
    """Yield entries in lists: a short one first, so that work can begin at once."""
    size = _FIRST_CHUNK if start == 0 else CHUNK
    while batch := list(itertools.islice(entries, size)):
        yield batch
        size = CHUNK


def ingest(campaign: Campaign, store: Store, digest: str) -> None:
    """Read the campaign's molecule files from where the last reading stopped."""
    from orchestrator.molecules import find_files, read_entries
    from orchestrator.reading import Reading, processes

    folder = plan_folder(store, digest)
    folder.mkdir(parents=True, exist_ok=True)
    reader = Reader(Plan(campaign).from_files)
    done = chunks(folder)
    for chunk in done:
        with shard.open_shard(chunk.path) as file:
            for table in ("molecules", "geometries"):
                if file.n_rows(table):
                    keys = file.read(table, ["key"])["key"]
                    reader.seen.extend(keys, np.zeros(len(keys), np.uint8))
    start = done[-1].stop if done else 0
    files = find_files(campaign.molecules, campaign.path.parent)
    inbox = store.path / "inbox" / f"plan-{digest[:16]}"
    inbox.mkdir(exist_ok=True)
    # Where workers compute on the same cores, they come first; where they wait for more to do,
    # the reading has the cores to itself.
    with Reading(processes(), yielding=True) as reading:
        entries = read_entries(files, campaign.molecules, skip=start, understand=reading.entries)
        for batch in batches(entries, start):
            rows = reader.rows(batch)
            stop = start + len(batch)
            if rows:
                shard.seal(inbox, f"{start:012d}-{stop:012d}", rows, store.name)
            tables = {part.schema.name: part for part in rows}
            tasks = tables.get("tasks")
            n_roots = len(tables.get("geometries" if reader.with_geometries else "molecules", ()))
            n_bad = int(tasks["status"].equals("input").sum()) if tasks is not None else 0
            shard.seal(folder, f"{start:012d}-{stop:012d}-{n_roots}-{n_bad}", rows, store.name)
            start = stop
    shard.write_whole(folder / "complete", str(start).encode())


def main() -> None:
    """Entry point of the reading process: CAMPAIGN STORE DIGEST."""
    from orchestrator.campaign import load_campaign
    from orchestrator.child import die_with_parent
    from orchestrator.errors import BasinError

    # A next driver starts a reading of its own.
    die_with_parent()
    try:
        ingest(load_campaign(Path(sys.argv[1])), Store(sys.argv[2]), sys.argv[3])
    except BasinError as exc:
        print(exc, file=sys.stderr)
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    main()
