"""Sealed shards: one immutable HDF5 file per batch of results, whole or not there at all."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from orchestrator import hdf5
from orchestrator.columns import Rows
from orchestrator.errors import CorruptShardError, StoreError, StoreFullError

TEMPORARY = ".tmp-"


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in place so that readers see all of it or nothing, even after a power cut.

    Raises StoreFullError when the disk or quota is full, StoreError when it cannot be written;
    the temporary file is removed then.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise writing_error(path, len(data), exc) from exc


def writing_error(path: Path, size: int, exc: OSError) -> StoreError:
    """Return the error to raise where writing ``size`` bytes to ``path`` failed."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFullError(
            f"{path.parent}: no space left for {size} bytes; free some space (or raise the "
            "quota) and start the same command again: finished work is kept"
        )
    return StoreError(f"{path}: cannot be written: {exc.strerror}")


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path, name: str, tables: Sequence[Rows], campaign: str) -> tuple[Path, int]:
    """Write tables as one shard ``folder/name-CRC32.h5``; return its path and size in bytes."""
    data = hdf5.build(tables, kind="shard", campaign=campaign, packed=False)
    path = folder / f"{name}-{zlib.crc32(data):08x}.h5"
    write_whole(path, data)
    return path, len(data)


def open_shard(path: Path) -> hdf5.TableFile:
    """Open a shard after checking it against the checksum in its name.

    Raises CorruptShardError (truncated, altered, not HDF5), StoreVersionError (another schema)
    and FileNotFoundError (compacted away meanwhile).
    """
    data = path.read_bytes()
    if f"{zlib.crc32(data):08x}" != path.stem.rpartition("-")[2]:
        raise CorruptShardError(
            f"{path}: {len(data)} bytes that do not match the checksum in the file's name "
            "(truncated or altered); what it held is computed again by the next `basin run`"
        )
    return hdf5.TableFile(BytesIO(data), str(path))
