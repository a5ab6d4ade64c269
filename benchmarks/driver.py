"""The driver by itself: durable rows a second with empty kernels, its memory, and a resume.

Rows are durable when their shard is sealed (fsync, rename) and compacted. The resume kills the
driver after 200 000 items and times the same command from its start to the first new item's.

    python -m benchmarks.driver [--small 10000] [--large 200000]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import data_folder, table


def write_campaign(folder: Path, molecules: int, items_each: int) -> Path:
    """Write a campaign of empty kernels over the first molecules of QM9."""
    lines = (data_folder() / "qm9" / "qm9_smiles.csv").read_text().split()
    folder.mkdir()
    (folder / "molecules.csv").write_text("\n".join(lines[: molecules + 1]) + "\n")
    path = folder / "campaign.toml"
    path.write_text(
        'name = "driver"\nstore = "store"\n[molecules]\nfiles = ["molecules.csv"]\n'
        f'[[stages]]\nkernel = "rehearse"\nconformers = {items_each}\n'
    )
    return path


class Watched:
    """A `basin run` whose memory is watched; optionally killed after so many items."""

    def __init__(self, campaign: Path, kill_after: int | None = None) -> None:
        self.started = time.time()
        self.peak_mb = 0.0
        self.last: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", "run", str(campaign), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        threading.Thread(target=self._watch, daemon=True).start()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.last = json.loads(line)
            if kill_after is not None and self.last["done_now"] >= kill_after:
                self._process.kill()
                break
        self._process.wait()

    def _watch(self) -> None:
        while self._process.poll() is None:
            try:
                with open(f"/proc/{self._process.pid}/status") as file:
                    fields = dict(line.split(":", 1) for line in file)
                self.peak_mb = max(self.peak_mb, int(fields["VmRSS"].split()[0]) / 1024)
            except (OSError, KeyError):
                pass
            time.sleep(0.1)


def first_new_start(store: Path, since: float) -> float:
    """Return the start of the first item that began after ``since``."""
    from orchestrator import open_store

    started = open_store(store).read("tasks", ["stage", "started_s"])
    times = started["started_s"][started["stage"].equals("rehearse")]
    return float(np.min(times[times > since]))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=200_000)
    arguments = parser.parse_args()
    rows = []
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        for items in (arguments.small, arguments.large):
            run = Watched(write_campaign(Path(name) / f"{items}", items // 2, 2))
            done, work_s = run.last["done_now"], run.last["work_s"]
            peaks.append(run.peak_mb)
            rows.append(
                [
                    f"{done:,}",
                    f"{work_s:.1f}",
                    f"{done / work_s:,.0f}",
                    f"{run.peak_mb:.0f}",
                    f"{run.peak_mb / peaks[0]:.2f}",
                ]
            )
        table(
            "Empty kernels: rows a second, compaction included, and memory of the driver",
            ["items", "s, first start to the end", "durable rows/s", "driver MB", "ratio"],
            rows,
        )
        campaign = write_campaign(Path(name) / "resume", arguments.large * 5 // 8, 2)
        killed = Watched(campaign, kill_after=arguments.large)
        since = time.time()
        again = Watched(campaign)
        first = first_new_start(campaign.parent / "store", since)
        table(
            "Resume after kill -9 of the driver",
            ["finished before", "done after", "s from the command to the first new item's start"],
            [
                [
                    f"{killed.last['done_now']:,}+",
                    f"{again.last['done_now']:,}",
                    f"{first - since:.2f}",
                ]
            ],
        )


if __name__ == "__main__":
    main()
