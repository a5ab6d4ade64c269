"""What a worker runs just now, left where its driver finds it: ``control/running`` of a store.

A driver that loses a worker knows the bundle that it had, and from here which of its items had
begun. Only items that run for a while are marked, so that quick ones cost the file system nothing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MARK_AFTER_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Found:
    """Items that ran when their worker was last heard of.

    ``since_s`` is when they began, by the clock of the store's file system; ``alone`` tells that
    nothing else ran in their worker pool.
    """

    keys: frozenset[bytes]
    since_s: float
    alone: bool


def _path(store: Path, run_id: str, bundle: str) -> Path:
    return store / "control" / "running" / f"{run_id}-{bundle}.json"


def clear(store: Path) -> None:
    """Make the folder anew: what a former run left there means nothing any more."""
    folder = store / "control" / "running"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)


def take(store: Path, run_id: str, bundle: str) -> Found | None:
    """Return what ran of a bundle when its worker was lost, and forget it; None: nothing known."""
    path = _path(store, run_id, bundle)
    try:
        word = json.loads(path.read_text())
        since = path.stat().st_mtime - float(word["seconds"])
        found = Found(frozenset(map(bytes.fromhex, word["keys"])), since, bool(word["alone"]))
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return found


class Mark:
    """One bundle's mark, as its worker keeps it. Where it cannot be written there is none."""

    def __init__(self, store: Path, run_id: str, bundle: str) -> None:
        self._path = _path(store, run_id, bundle)
        self._keys: list[bytes] = []
        self._alone = False
        self._written = False

    def update(self, keys: Sequence[bytes], seconds: float) -> None:
        """Say what has been running for so long, once that is worth a file."""
        if keys and seconds >= MARK_AFTER_S and list(keys) != self._keys:
            self.set(keys, seconds, alone=self._alone)

    def set(self, keys: Sequence[bytes], seconds: float, *, alone: bool) -> None:
        """Say what has been running for so long (s)."""
        self._keys, self._alone = list(keys), alone
        word = {"keys": [key.hex() for key in keys], "seconds": seconds, "alone": alone}
        temporary = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(word))
            temporary.rename(self._path)
            self._written = True

    def clear(self) -> None:
        """Say that nothing of it runs any more."""
        if self._written:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
