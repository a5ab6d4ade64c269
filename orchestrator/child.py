"""The guarded child process: runs kernels item by item and reports to the worker's guard.

Started as ``python -m orchestrator.child FD SHARED_FD`` by `orchestrator.guard`. It may hang,
crash or be killed in the middle of anything; whoever watches it knows which item was running
from a small shared memory, and has all results that were sent before.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

SHARED_BYTES = 64
# Outcome of an item that needs more time than is left of its block.
UNFIT = "unfit"
_CURRENT = struct.Struct("<qd")
_STOP_AT = 32
_SEND_EVERY_S = 0.005
_SEND_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1


class Shared:
    """The memory that guard and child share: running item, its start, and the stop flag."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, SHARED_BYTES)

    def close(self) -> None:
        """Give the memory back."""
        self._map.close()

    def set_current(self, item: int) -> None:
        """Say which item runs from now on, the first of a batch; -1 for none."""
        # Not `pack_into`, which zeroes first: a guard that looked then would see an item that has
        # run since the machine was started. The start goes first, each in one store.
        self._map[8:16] = struct.pack("<d", time.monotonic())
        self._map[0:8] = struct.pack("<q", item)

    def current(self) -> tuple[int, float]:
        """Return the running item (-1: none) and the monotonic time at which it started."""
        item, since = _CURRENT.unpack_from(self._map, 0)
        return item, since

    def set_stop(self, stop: bool) -> None:
        """Ask the child to stop after the running item, saving its state if it can."""
        self._map[_STOP_AT] = int(stop)

    def stop(self) -> bool:
        """Tell whether a stop was asked for."""
        return bool(self._map[_STOP_AT])


def die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def family(pid: int) -> list[int]:
    """Return a process and all that descends from it, as far as Linux tells."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{thread}/children") as file:
                    found += map(int, file.read().split())
    return found


def _failure(exc: BaseException) -> dict[str, Any]:
    status = getattr(exc, "status", None)
    if status is None:
        status = "resource" if isinstance(exc, MemoryError) else "crash"
    message = str(exc) or type(exc).__name__
    if status == "crash":
        where = traceback.extract_tb(exc.__traceback__)[-1]
        message = f"{type(exc).__name__}: {message} ({where.name}, line {where.lineno})"
    return {
        "status": status,
        "message": message,
        "ladder": tuple(getattr(exc, "history", ())),
    }


def _outcomes(stage: Any, payloads: list[Any], shared: Shared) -> list[dict[str, Any]]:
    """Run a batch and share its time out; where it fails as a whole, run its items alone."""
    from orchestrator.kernel_calls import call

    started, wall, cpu = time.time(), time.perf_counter(), time.process_time()
    try:
        outcomes = call(stage, payloads, shared.stop)
    except Exception as exc:
        if len(payloads) > 1:
            return [
                outcome for payload in payloads for outcome in _outcomes(stage, [payload], shared)
            ]
        outcomes = [_failure(exc)]
    wall_s, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    weights = [float(outcome.pop("weight", 1.0)) for outcome in outcomes]
    for outcome, weight in zip(outcomes, weights, strict=True):
        share = weight / sum(weights) if any(weights) else 1 / len(weights)
        outcome.update(wall_s=share * wall_s, cpu_s=share * cpu_s, started_s=started)
    return outcomes


def _run(
    connection: Connection,
    shared: Shared,
    stage: Any,
    work: list[Any],
    needs: list[float],
    stop_at: float,
) -> None:
    """Run batch after batch, but for those that need more seconds than are left."""
    from kernels.errors import KernelError
    from orchestrator.kernel_calls import prepare

    try:
        prepare(stage)
    except KernelError as exc:
        connection.send(("refused", str(exc)))
        return
    ready: list[tuple[int, dict[str, Any]]] = []
    size = 0
    sent = 0.0
    for batch, need in zip(work, needs, strict=True):
        if shared.stop():
            break
        if time.time() + need > stop_at:
            ready += [(index, {"status": UNFIT}) for index, _ in batch]
            continue
        indices, payloads = zip(*batch, strict=True)
        shared.set_current(indices[0])
        outcomes = _outcomes(stage, list(payloads), shared)
        ready += zip(indices, outcomes, strict=True)
        size += sum(outcome.get("nbytes", 200) for outcome in outcomes)
        now = time.monotonic()
        if now - sent > _SEND_EVERY_S or size > _SEND_BYTES:
            connection.send(("results", ready))
            ready, size, sent = [], 0, now
        shared.set_current(-1)
    connection.send(("done", ready))


def main() -> None:
    """Serve what the guard sends, a bundle at a time, until the other end closes."""
    die_with_parent()
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    shared = Shared(int(sys.argv[2]))
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            _run(connection, shared, *task)
        except (BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    main()
