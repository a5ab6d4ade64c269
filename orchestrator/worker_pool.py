"""Parsl's worker pool, kept together: when its manager is killed, nothing of it stays behind.

The pool's own helpers (multiprocessing's resource tracker and shared-state server) do not notice
that the manager died; here whatever is left of its process group is ended then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys

from orchestrator.child import die_with_parent

_INNER = "--inner"


def _become_pool(arguments: list[str]) -> None:
    die_with_parent()
    script = shutil.which("process_worker_pool.py")
    if script is None:
        sys.exit("process_worker_pool.py of Parsl is not on PATH: activate Basin's environment")
    os.execv(sys.executable, [sys.executable, script, *arguments])


def main() -> None:
    """Run ``process_worker_pool.py`` with the arguments given, and clean up behind it."""
    if sys.argv[1:2] == [_INNER]:
        _become_pool(sys.argv[2:])
    command = [sys.executable, "-m", "orchestrator.worker_pool", _INNER, *sys.argv[1:]]
    pool = subprocess.Popen(command, process_group=0)

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pool.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    status = pool.wait()
    forward(signal.SIGKILL, None)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
