"""Starting a driver that outlives the terminal it was started from."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator import lock
from orchestrator.errors import StoreError

_LOOK_S = 0.2
# A driver says for the first time how it goes once Parsl has started.
_STARTED_S = 60.0


@dataclass(frozen=True, slots=True)
class Detached:
    """A driver that goes on by itself; ``status`` is None while it does, else how it ended."""

    pid: int
    log: Path
    status: int | None


def detach(store: Path, arguments: Sequence[str], started: Callable[[], bool]) -> Detached:
    """Start ``basin run`` with ``arguments`` in a session of its own; return when it runs.

    It writes to ``logs/driver-<time>.log`` in the store. ``started`` tells whether it goes on by
    itself. Raises StoreError where the log cannot be written.
    """
    log = store / "logs" / f"driver-{time.strftime('%Y%m%dT%H%M%S')}.log"
    try:
        with open(log, "x") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", "run", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
    except OSError as exc:
        raise StoreError(f"{log}: cannot be written: {exc.strerror}") from exc
    deadline = time.monotonic() + _STARTED_S
    while process.poll() is None and time.monotonic() < deadline:
        if lock.who(store).get("pid") == process.pid and started():
            break
        time.sleep(_LOOK_S)
    return Detached(process.pid, log, process.poll())
