"""Every benchmark, one after the other (`make bench`).

python -m benchmarks.all
"""

from __future__ import annotations

import subprocess
import sys

MODULES = ("startup", "guard", "query", "relaxation", "diffusion", "driver", "efficiency")


def main() -> None:
    """Run each in a process of its own, so that none measures another's memory."""
    failed = [
        name
        for name in MODULES
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
    ]
    if failed:
        sys.exit(f"benchmarks that did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
