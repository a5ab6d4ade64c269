"""A node's memory, shared out among the workers there, so that what they run never swaps.

Items of DFT take gigabytes, and how many fit on a node depends on their sizes. A worker therefore
takes what its bundle will need before it begins, and waits while others leave too little: first
come, first served. What is taken stands in a file of that node's own; what a dead process had
taken is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from kernels.processes import started
from orchestrator import block

# The system and what is too small to be counted have the rest.
USABLE: Final = 0.9
_LOOK_S: Final = 0.2


def _path() -> Path:
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID") or "local"
    return block.node_file(f"memory-{job}")


class Share:
    """One bundle's share (bytes) of its node's memory; 0 is always there."""

    def __init__(self, wanted: int, *, path: Path | None = None, whole: int | None = None) -> None:
        self._wanted = wanted
        self._path = path or _path()
        self._whole = whole
        self._name = uuid.uuid4().hex

    def wait(self, should_stop: Callable[[], bool]) -> bool:
        """Wait for the share; tell whether it came, which it does unless it is to stop before.

        A share larger than all there is comes when nothing else runs.
        """
        if not self._wanted:
            return True
        usable = int(USABLE * (self._whole or block.memory()))
        try:
            while not self._granted(usable):
                if should_stop():
                    self.end()
                    return False
                time.sleep(_LOOK_S)
        except OSError:
            return True  # no place for the file: nobody waits
        return True

    def end(self) -> None:
        """Give the share back."""
        if self._wanted:
            with contextlib.suppress(OSError), self._queue() as queue:
                queue[:] = [entry for entry in queue if entry["name"] != self._name]

    def _granted(self, usable: int) -> bool:
        with self._queue() as queue:
            if self._name not in [entry["name"] for entry in queue]:
                pid = os.getpid()
                mine = {"name": self._name, "pid": pid, "started": started(pid)}
                queue.append({**mine, "bytes": self._wanted, "granted": False})
            taken = sum(entry["bytes"] for entry in queue if entry["granted"])
            first = next(entry for entry in queue if not entry["granted"])
            if first["name"] != self._name or (taken and taken + self._wanted > usable):
                return False
            first["granted"] = True
            return True

    @contextlib.contextmanager
    def _queue(self) -> Iterator[list[dict[str, Any]]]:
        """Lock the file, and give who waits or has a share, in the order in which they came."""
        with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                found = json.load(file)
            except ValueError:
                found = []  # new, or its writer was killed
            queue = [entry for entry in found if started(entry["pid"]) == entry["started"]]
            yield queue
            file.seek(0)
            file.truncate()
            json.dump(queue, file)
