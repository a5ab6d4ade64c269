"""How long the command takes to answer.

python -m benchmarks.startup
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.machine import ROOT, table

ROUNDS = 15


def seconds(command: list[str]) -> list[float]:
    """Return the wall seconds of each round of a command, after one to warm the disk cache."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> None:
    """Print the table."""
    basin = str(Path(sys.executable).with_name("basin"))
    quickstart = str(ROOT / "jobs" / "quickstart.toml")
    bare = statistics.median(seconds([sys.executable, "-c", "pass"]))
    rows = [["python -c pass", f"{bare:.3f}", "-", "1.0"]]
    for what in (["--help"], ["plan", quickstart]):
        times = seconds([basin, *what])
        middle = statistics.median(times)
        name = " ".join(["basin", what[0], *(Path(word).name for word in what[1:])])
        rows.append([name, f"{middle:.3f}", f"{max(times):.3f}", f"{middle / bare:.1f}"])
    table(f"Start-up, median of {ROUNDS}", ["command", "s", "slowest s", "ratio"], rows)


if __name__ == "__main__":
    main()
