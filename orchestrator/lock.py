"""One driver per store: the lock, and the driver's word to its workers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from orchestrator.errors import StoreError, StoreLockedError
from orchestrator.shard import write_whole

STALE_S = 120.0


class DriverLock:
    """Holds a store for one driver, and says in ``control/driver.json`` who that is.

    The lock is the kernel's own (flock), so that it goes with the process however that ends;
    where the file system has none, a recent heartbeat of a driver elsewhere refuses instead.
    """

    def __init__(self, store: Path, run_id: str) -> None:
        self._word = store / "control" / "driver.json"
        self.run_id = run_id
        self._beat = 0.0
        try:
            self._file = open(store / "control" / "lock", "w")  # noqa: SIM115
        except OSError as exc:
            raise StoreError(
                f"{store}: cannot be locked for writing: {exc.strerror}; `basin run` needs "
                "write access to the store"
            ) from exc
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            try:
                if exc.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise StoreLockedError(self._refusal(store, who(store))) from None
                self._refuse_if_alive(store)
            except BaseException:
                self._file.close()
                raise
        self.say(drain=False)

    def _refuse_if_alive(self, store: Path) -> None:
        holder = who(store)
        if holder and time.time() - self._word.stat().st_mtime < STALE_S:
            raise StoreLockedError(self._refusal(store, holder))

    @staticmethod
    def _refusal(store: Path, holder: dict[str, Any]) -> str:
        return (
            f"{store}: another `basin run` is working on this store ({named(holder)}); watch it "
            f"with `basin status {store}`, or stop it with Ctrl-C there before starting another"
        )

    def say(self, *, drain: bool) -> None:
        """Tell the workers who drives, and whether to stop after their running items."""
        word = {
            "run_id": self.run_id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "drain": drain,
        }
        write_whole(self._word, json.dumps(word).encode())
        self._beat = time.monotonic()

    def beat(self) -> None:
        """Show that the driver is alive."""
        if time.monotonic() - self._beat > STALE_S / 8:
            self._beat = time.monotonic()
            os.utime(self._word)

    def release(self) -> None:
        """Let the store go."""
        self._word.unlink(missing_ok=True)
        self._file.close()


def who(store: Path) -> dict[str, Any]:
    """Return what ``control/driver.json`` says of the present or last driver; may be empty."""
    try:
        word: dict[str, Any] = json.loads((store / "control" / "driver.json").read_text())
    except (OSError, ValueError):
        return {}
    return word


def named(holder: dict[str, Any]) -> str:
    """Return in words the process that `who` tells of."""
    if not holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def is_running(store: Path) -> bool:
    """Tell whether a driver holds the store now."""
    try:
        with open(store / "control" / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as exc:
        return exc.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False
