"""One driver per store: the lock, the driver's word to its workers, and the user's to the driver.

``control/driver.json`` is the driver's word and, by its modification time, its heartbeat;
``control/stop.json`` the user's. Both are read by name each time, so that they reach other hosts
through a shared file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import StoreError, StoreLockedError
from orchestrator.shard import write_whole

STALE_S = 120.0
BEAT_S = 15.0
# The scheduler's job that the driver itself runs in; set by the script of `basin submit`.
DRIVER_JOB = "BASIN_DRIVER_JOB"
_TRIES = 4


class DriverLock:
    """Holds a store for one driver, and says in ``control/driver.json`` who that is.

    The lock is the kernel's own (flock), so that it goes with the process however that ends.
    Where it does not reach another host, or the file system has none, the heartbeat of a driver
    there refuses instead.
    """

    def __init__(self, store: Path, run_id: str) -> None:
        self._store = store
        self._word = store / "control" / "driver.json"
        self.run_id = run_id
        self._taken = False
        self._end = threading.Event()
        try:
            self._file = open(store / "control" / "lock", "w")  # noqa: SIM115
        except OSError as exc:
            raise StoreError(
                f"{store}: cannot be locked for writing: {exc.strerror}; `basin run` needs "
                "write access to the store"
            ) from exc
        try:
            reaches = self._flock()
            holder, beat_s = _word(store)
            # Somebody's flock on this host would have been met; a heartbeat may be from elsewhere.
            if holder and not (reaches and holder.get("boot_id") == boot_id()):
                age = _file_system_time(self._file) - beat_s
                if age < STALE_S:
                    raise StoreLockedError(self._refusal(store, holder) + _patience(age))
            self.say(drain=False)
            write_whole(store / "control" / "stop.json", _stop_word(run_id, ""))
        except BaseException:
            self._file.close()
            raise
        self._heart = threading.Thread(target=self._beat_on, daemon=True, name="heartbeat")
        self._heart.start()

    def _flock(self) -> bool:
        """Take the kernel's lock; False where the file system has none."""
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as exc:
                if exc.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                if not left:
                    refusal = self._refusal(self._store, who(self._store))
                    raise StoreLockedError(refusal) from None
                # `is_running` holds it for a moment while it looks.
                time.sleep(0.05)
        raise AssertionError

    @staticmethod
    def _refusal(store: Path, holder: dict[str, Any]) -> str:
        return (
            f"{store}: another `basin run` is working on this store ({named(holder)}); watch it "
            f"with `basin status {store}`, or stop it with `basin stop {store}` before starting "
            "another"
        )

    def say(self, *, drain: bool) -> None:
        """Tell the workers who drives, and whether to stop after their running items."""
        word = {
            "run_id": self.run_id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "boot_id": boot_id(),
            "job": os.environ.get(DRIVER_JOB, ""),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "drain": drain,
        }
        write_whole(self._word, json.dumps(word).encode())

    def beat(self) -> None:
        """Raise StoreLockedError where a driver elsewhere has taken the store meanwhile.

        That happens to a driver that was not heard of for too long: suspended, or cut off from
        the file system. The heartbeat itself needs no call.
        """
        if self._taken:
            raise StoreLockedError(
                f"{self._store}: nothing was heard of this driver for {STALE_S:.0f} s, and "
                f"another one has taken the store ({named(who(self._store))}); this one ends, and "
                "nothing is lost"
            )

    def _beat_on(self) -> None:
        while not self._end.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if who(self._store).get("run_id", self.run_id) != self.run_id:
                    self._taken = True
                    return
                os.utime(self._word)

    def release(self) -> None:
        """Let the store go."""
        self._end.set()
        self._heart.join(BEAT_S)  # a file system that hangs may hold it
        if not self._taken:
            self._word.unlink(missing_ok=True)
        self._file.close()


def boot_id() -> str:
    """Return what tells this machine, since it was last started, from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _word(store: Path) -> tuple[dict[str, Any], float]:
    """Return ``control/driver.json`` and when it was last touched; empty where there is none."""
    try:
        # Opened for the time too: a network file system looks afresh at what is opened.
        with open(store / "control" / "driver.json") as file:
            word: dict[str, Any] = json.load(file)
            return word, os.fstat(file.fileno()).st_mtime
    except (OSError, ValueError):
        return {}, 0.0


def _file_system_time(file: IO[str]) -> float:
    """Return the clock that modification times go by, which may be a file server's.

    ``file`` is the lock's, whose own time means nothing. Who may not write it has this host's
    clock only.
    """
    try:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def who(store: Path) -> dict[str, Any]:
    """Return what ``control/driver.json`` says of the present or last driver; may be empty."""
    return _word(store)[0]


def named(holder: dict[str, Any]) -> str:
    """Return in words the process that `who` tells of."""
    if not holder:
        return "another process"
    job = f", job {holder['job']}," if holder.get("job") else ""
    return f"process {holder['pid']} on {holder['host']}{job} since {holder['since']}"


def _patience(age: float) -> str:
    return (
        f". Its last sign of life is {max(age, 0):.0f} s old: where it died with its host, this "
        f"works once that is {STALE_S:.0f} s"
    )


def is_running(store: Path) -> bool:
    """Tell whether a driver holds the store now, on this host or on another."""
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(open(store / "control" / "lock"))
        except FileNotFoundError:
            return False
        reaches = True
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)  # a driver may be about to start
        except OSError as exc:
            if exc.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return True
            reaches = False
        holder, beat_s = _word(store)
        if not holder or (reaches and holder.get("boot_id") == boot_id()):
            return False
        return _file_system_time(file) - beat_s < STALE_S


def _stop_word(run_id: str, stop: str) -> bytes:
    word = {
        "run_id": run_id,
        "stop": stop,
        "from": f"process {os.getpid()} on {socket.gethostname()}",
        "at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return json.dumps(word).encode()


def request_stop(store: Path, *, now: bool) -> None:
    """Ask the present driver, wherever it runs, to drain, or to stop at once.

    It goes to that driver alone: one started later does not heed it.
    Raises StoreError where there is no driver, or the store cannot be written.
    """
    run_id = who(store).get("run_id")
    if not run_id:
        raise StoreError(f"{store}: no `basin run` is working on this store")
    stop = "now" if now else "drain"
    write_whole(store / "control" / "stop.json", _stop_word(run_id, stop))


def stop_requested(store: Path, run_id: str) -> str:
    """Return what the user asks of a driver: "" (nothing), "drain", or "now"."""
    try:
        word = json.loads((store / "control" / "stop.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(word.get("stop", "")) if word.get("run_id") == run_id else ""
