"""Parsl's worker pool, kept together and tied to its interchange.

The pool's own helpers (multiprocessing's resource tracker and shared-state server) do not notice
when its manager is killed, and a manager whose interchange dies while it connects waits for ever.
Here what is left of the process group is ended in both cases. And a pool in a batch job takes no
more work shortly before its end, so that it ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from orchestrator import block, turn
from orchestrator.child import die_with_parent

BUNDLE_TIME = "--bundle_time="
_INNER = "--inner"
_CONNECT_S = 2.0
_LEAST_S = 5
# Of a socket's name; the workers' server makes such files in folders of its own.
_LONGEST = 107
_SOCKET = "pymp-12345678/listener-12345678"


def _become_pool(arguments: list[str]) -> None:
    die_with_parent()
    temporary = tempfile.gettempdir()
    if len(os.fsencode(os.path.join(temporary, _SOCKET))) > _LONGEST:
        sys.exit(
            f"TMPDIR on {block.node_name()} is too long for a worker pool's sockets: {temporary} "
            f"({len(temporary)} characters); set one of at most {_LONGEST - len(_SOCKET) - 1}"
        )
    script = shutil.which("process_worker_pool.py")
    if script is None:
        sys.exit("process_worker_pool.py of Parsl is not on PATH: activate Basin's environment")
    os.execv(sys.executable, [sys.executable, script, *arguments])


def _answers(addresses: list[str], port: int) -> bool:
    for address in addresses:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address.strip("[]"), port), _CONNECT_S),
        ):
            return True
    return False


def _watch(pool: subprocess.Popen[bytes], addresses: list[str], port: int, limit_s: float) -> int:
    """Return the pool's exit status; end it when its interchange is away too long."""
    heard = time.monotonic()
    while True:
        try:
            return pool.wait(limit_s / 4)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            if _answers(addresses, port):
                heard = now
            elif now - heard > limit_s:
                print("the interchange is gone: ending the worker pool", file=sys.stderr)
                return 1


def _until_the_end(bundle_time_s: float) -> list[str]:
    """Tell the workers when their block ends; return the manager's arguments that drain it."""
    os.environ.pop(block.END, None)
    os.environ[block.DEVICES] = block.given_devices(os.environ)
    end = block.block_end()
    if end is None:
        return []
    os.environ[block.END] = str(end)
    os.environ.setdefault(block.START, str(time.time()))
    margin = block.drain_margin(block.whole_walltime(end), bundle_time_s)
    left = int(end - margin - time.time())
    if left < _LEAST_S:
        sys.exit(f"the block ends in {end - time.time():.0f} s: too soon to begin anything")
    return [f"--drain_period={left}"]


def main() -> None:
    """Run ``process_worker_pool.py`` with the arguments given, and clean up behind it."""
    if sys.argv[1:2] == [_INNER]:
        _become_pool(sys.argv[2:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-a", dest="addresses", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--hb_threshold", type=float, default=120.0)
    parser.add_argument(BUNDLE_TIME.strip("="), dest="bundle_time", type=float, default=10.0)
    known, _ = parser.parse_known_args()
    # The last of an option given twice counts.
    arguments = [word for word in sys.argv[1:] if not word.startswith(BUNDLE_TIME)]
    arguments += _until_the_end(known.bundle_time)
    command = [sys.executable, "-m", "orchestrator.worker_pool", _INNER, *arguments]
    pool = subprocess.Popen(command, process_group=0)

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pool.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    # The manager goes by itself, in better order, when it has missed heartbeats for so long.
    status = _watch(pool, known.addresses.split(","), known.port, 1.25 * known.hb_threshold)
    forward(signal.SIGKILL, None)
    turn.lock_path(pool.pid).unlink(missing_ok=True)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
