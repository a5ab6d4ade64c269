"""Parsl's interchange, tied to the driver's life.

Parsl leaves its interchange running when the driver is killed, and with it the worker pools.
Here the system kills it together with the driver; the pools notice and end by themselves. And it
outlives a Ctrl-C at the terminal, which reaches it too, so that the driver can drain.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys

from orchestrator.child import die_with_parent

DRIVER_PID = "BASIN_DRIVER_PID"

# A log that cannot be written, on a full disk, is no reason for tracebacks: the driver says it.
_QUIET = (
    "import logging, runpy, sys; logging.raiseExceptions = False; "
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)


def main() -> None:
    """Become the interchange (Parsl passes its configuration on standard input)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    # One connection a node; many systems allow 1 024 unless asked for more.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if os.environ.get(DRIVER_PID, str(os.getppid())) != str(os.getppid()):
        sys.exit("the driver is gone already")
    script = shutil.which("interchange.py")
    if script is None:
        sys.exit("interchange.py of Parsl is not on PATH")
    os.execv(sys.executable, [sys.executable, "-c", _QUIET, script])


if __name__ == "__main__":
    main()
