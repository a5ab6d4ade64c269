"""Turns of a worker pool's workers: all run together, or one of them alone.

Told apart by it is what took a worker pool down: a bundle under suspicion runs by itself. The
workers of a pool are on one node, so locks on a file of that node's own serve: one byte is held
by whatever runs, the other is the gate to it, which stays shut while a lonely one waits or runs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from orchestrator import block

_GATE: Final = 0
_ROOM: Final = 1
_LOOK_S: Final = 0.05


def lock_path(manager_pid: int) -> Path:
    """Return the file that the workers of a pool lock, by the process that started them."""
    return block.node_file(str(manager_pid))


class Turn:
    """One bundle's turn in its worker pool; without locks, or outside of a pool, always its turn.

    ``is_alone`` tells whether nothing else runs in the pool now.
    """

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone
        self._file: IO[bytes] | None = None
        self.is_alone = False

    def wait(self, should_stop: Callable[[], bool]) -> bool:
        """Wait for the turn; tell whether it came, which it does unless it is to stop before."""
        if "PARSL_WORKER_RANK" not in os.environ:
            return True
        kind = fcntl.LOCK_EX if self._alone else fcntl.LOCK_SH
        try:
            path = lock_path(os.getppid())
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
            for place in (_GATE, _ROOM):
                while not self._locked(kind, place):
                    if should_stop():
                        self.end()
                        return False
                    time.sleep(_LOOK_S)
            if not self._alone:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _GATE)
        except OSError:
            self.end()
            return True
        self.is_alone = self._alone
        return True

    def _locked(self, kind: int, place: int) -> bool:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, 1, place)
        except OSError as exc:
            if exc.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def end(self) -> None:
        """Let the others go on."""
        self.is_alone = False
        if self._file is not None:
            self._file.close()
            self._file = None
