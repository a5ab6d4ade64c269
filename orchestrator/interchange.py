"""Parsl's interchange, tied to the driver's life.

Parsl leaves its interchange running when the driver is killed, and with it the worker pools.
Here the system kills it together with the driver; the pools notice and end by themselves.
"""

from __future__ import annotations

import os
import shutil
import sys

from orchestrator.child import die_with_parent


def main() -> None:
    """Become the interchange (Parsl passes its configuration on standard input)."""
    die_with_parent()
    script = shutil.which("interchange.py")
    if script is None:
        sys.exit("interchange.py of Parsl is not on PATH")
    os.execv(sys.executable, [sys.executable, script])


if __name__ == "__main__":
    main()
