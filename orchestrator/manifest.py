"""Numbered manifests: the only truth about which files of a store count."""

from __future__ import annotations

import errno
import json
import os
import re
import uuid
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from orchestrator.errors import StoreError
from orchestrator.shard import TEMPORARY, sync_folder, writing_error

_NAME = re.compile(r"^(\d{10})\.json$")
_KEPT = 16


@dataclass(frozen=True, slots=True)
class Segment:
    """One compacted file: where it is, what it holds, and its checksum."""

    file: str
    table: str
    rows: int
    bytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """One generation: the segments that count and the shards they have taken in.

    ``consumed`` and ``superseded`` files wait to be deleted; they say since when (Unix time).
    """

    generation: int = 0
    segments: tuple[Segment, ...] = ()
    consumed: dict[str, float] = field(default_factory=dict)
    superseded: dict[str, float] = field(default_factory=dict)
    quarantine: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the manifest as a line with its CRC-32 and a JSON body."""
        body = json.dumps(
            {
                "generation": self.generation,
                "segments": [asdict(segment) for segment in self.segments],
                "consumed": self.consumed,
                "superseded": self.superseded,
                "quarantine": self.quarantine,
            },
            separators=(",", ":"),
        ).encode()
        return b"%08x\n" % zlib.crc32(body) + body


def decode(data: bytes) -> Manifest | None:
    """Return the manifest in ``data``, or None where its checksum does not hold."""
    head, _, body = data.partition(b"\n")
    if head != b"%08x" % zlib.crc32(body):
        return None
    raw = json.loads(body)
    return Manifest(
        raw["generation"],
        tuple(Segment(**segment) for segment in raw["segments"]),
        raw["consumed"],
        raw["superseded"],
        raw["quarantine"],
    )


def _generations(folder: Path) -> list[int]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((int(m[1]) for m in map(_NAME.match, names) if m), reverse=True)


def newest(folder: Path) -> Manifest:
    """Return the newest manifest whose checksum holds; an empty one where there is none.

    It carries the highest number in use, so that its successor's number is free even where the
    newest file is damaged.
    """
    generations = _generations(folder)
    for generation in generations:
        try:
            found = decode((folder / f"{generation:010d}.json").read_bytes())
        except FileNotFoundError:
            continue
        if found is not None:
            return replace(found, generation=generations[0])
    return Manifest(generation=generations[0] if generations else 0)


def publish(folder: Path, manifest: Manifest) -> bool:
    """Publish a generation; False if another process published that number first.

    Raises StoreFullError when the disk or quota is full, StoreError when it cannot be written.
    """
    temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex}.json"
    path = folder / f"{manifest.generation:010d}.json"
    data = manifest.encode()
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            # NFS may carry the link out and lose the answer; the link count tells.
            if temporary.stat().st_nlink != 2:
                raise StoreError(
                    f"{path}: cannot be published ({os.strerror(exc.errno or errno.EIO)}); the "
                    "file system must allow hard links: put the store on one that does"
                ) from exc
        sync_folder(folder)
    except OSError as exc:
        raise writing_error(path, len(data), exc) from exc
    finally:
        temporary.unlink(missing_ok=True)
    for old in _generations(folder)[_KEPT:]:
        (folder / f"{old:010d}.json").unlink(missing_ok=True)
    return True
