"""A million molecules: plan, run, kill, resume, status, compaction, queries, report.

    python -m benchmarks.scale [--molecules 1000000] [--workers 12] [--seconds "5 ms"]
                               [--folder DIR]

A real campaign with Parsl, whose one kernel only sleeps. The driver is killed (`kill -9`) when half
of it is done, and the same command goes on. A quarter of an hour for a million; DIR (default: a
temporary folder) needs 2 GB and keeps the store.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import million
from benchmarks.machine import table

_SAMPLE_S = 1.0
_STATUS_S = 30.0
_PARTS = {"orchestrator.ingest": "reader", "orchestrator.compact": "compaction"}
SQL = {
    "tasks by status": "SELECT stage, status, count(*), avg(wall_s) FROM tasks GROUP BY ALL",
    "molecules by size": (
        "SELECT n_heavy, count(*), quantile_cont(t.wall_s, 0.9) FROM molecules m "
        "JOIN tasks t ON t.mol_key = m.key WHERE t.stage = 'rehearse' GROUP BY ALL"
    ),
    "one molecule by its name": "SELECT key, smiles FROM molecules WHERE name = 'm0500000'",
}


def basin(*arguments: object, cwd: Path | None = None) -> tuple[float, str]:
    """Run a command; return its seconds and what it printed. Exits where it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    if done.returncode:
        sys.exit(f"basin {' '.join(map(str, arguments))}: {done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process; 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError, ValueError):
        return 0.0


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def _part(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return ""
    return next((_PARTS[word] for word in words if word in _PARTS), "")


@dataclass
class Run:
    """A `basin run` that is watched: memory over time, and what `basin status` takes meanwhile."""

    campaign: Path
    workers: int
    kill_after: int | None = None
    memory: list[tuple[float, int, float]] = field(default_factory=list)
    peak: dict[str, float] = field(default_factory=dict)
    status_s: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = time.time()
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(self.campaign)]
        self._process = subprocess.Popen(
            [*command, "--workers", str(self.workers), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        threads = [threading.Thread(target=t) for t in (self._watch, self._ask)]
        for thread in threads:
            thread.start()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.last = json.loads(line)
            if self.kill_after is not None and self.last["done_now"] >= self.kill_after:
                self._process.kill()
                break
        self._process.wait()
        self.seconds = time.time() - self.started
        for thread in threads:
            thread.join()

    def _watch(self) -> None:
        while self._process.poll() is None:
            found = {"driver": resident_mb(self._process.pid)}
            for child in _children(self._process.pid):
                if part := _part(child):
                    found[part] = resident_mb(child)
            for part, size in found.items():
                self.peak[part] = max(self.peak.get(part, 0.0), size)
            done = int(self.last.get("done_now", 0))
            self.memory.append((time.time() - self.started, done, found["driver"]))
            time.sleep(_SAMPLE_S)

    def _ask(self) -> None:
        asked = time.time()
        while self._process.poll() is None:
            if time.time() - asked > _STATUS_S and self.last:
                self.status_s.append(basin("status", self.campaign, "--json")[0])
                asked = time.time()
            time.sleep(_SAMPLE_S)


def write_campaign(folder: Path, molecules: int, seconds: str) -> Path:
    """Write the molecules and a campaign that sleeps over each of them."""
    million.write(folder / "million.smi", molecules)
    path = folder / "million.toml"
    path.write_text(
        'name = "million"\nstore = "store"\n[molecules]\nfiles = ["million.smi"]\n'
        f'[[stages]]\nkernel = "rehearse"\nseconds = "{seconds}"\n'
    )
    return path


def _memory_rows(run: Run) -> list[list[object]]:
    """Return the driver's memory at ten moments of a run."""
    step = max(1, len(run.memory) // 10)
    return [
        [f"{at:.0f}", f"{done:,}", f"{size:.0f}"] for at, done, size in run.memory[step - 1 :: step]
    ]


def _best(call: Callable[[], float], repeats: int = 3) -> float:
    return min(call() for _ in range(repeats))


def after(campaign: Path, rows: list[list[object]]) -> None:
    """Time what an analyst does with the finished store."""
    store = campaign.parent / "store"
    rows.append(["`basin status`, afterwards", _best(lambda: basin("status", campaign)[0])])
    rows.append(["`basin plan`, afterwards", basin("plan", campaign)[0]])
    smiles = (campaign.parent / "million.smi").read_text().splitlines()[-1].split()[0]
    rows.append(["`basin explain SMILES`", _best(lambda: basin("explain", smiles, campaign)[0])])
    for what, sql in SQL.items():
        rows.append(
            [f"`basin query`: {what}", _best(lambda sql=sql: basin("query", sql, campaign)[0])]
        )
    page = campaign.parent / "report.html"
    rows.append(["`basin report`", basin("report", campaign, page)[0]])
    compaction = _compaction_of_everything(store)
    if compaction:
        rows.append(["compaction of all shards in one go", compaction])


def _compaction_of_everything(store: Path) -> float:
    """Return the seconds that one compaction of the whole inbox takes, in a copy of the store."""
    with tempfile.TemporaryDirectory(dir=store.parent) as name:
        copy = Path(name)
        for part in ("inbox", "campaign.json"):
            subprocess.run(["cp", "-r", store / part, copy / part], check=True)
        for part in ("segments", "manifest", "plan", "checkpoints", "control"):
            (copy / part).mkdir()
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "orchestrator.compact", copy], check=True)
        return time.perf_counter() - start


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--molecules", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", default="5 ms")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder: Path = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        campaign = write_campaign(folder, arguments.molecules, arguments.seconds)
        rows: list[list[object]] = []
        rows.append(["`basin plan`, nothing run yet", basin("plan", campaign)[0]])
        first = Run(campaign, arguments.workers, kill_after=arguments.molecules // 2)
        rows.append(["`basin status`, right after `kill -9`", basin("status", campaign)[0]])
        second = Run(campaign, arguments.workers)
        asked = first.status_s + second.status_s
        rows.append([f"`basin status`, during the run (slowest of {len(asked)})", max(asked)])
        after(campaign, rows)
        table(
            f"{arguments.molecules:,} molecules: seconds of each command",
            ["command", "s"],
            [[what, f"{s:.1f}"] for what, s in rows],
        )
        table(
            "The two runs",
            ["run", "items", "s", "items/s", "driver MB, peak", "reader MB", "compaction MB"],
            [
                [
                    what,
                    f"{run.last['done_now']:,}",
                    f"{run.seconds:.0f}",
                    f"{run.last['done_now'] / run.seconds:,.0f}",
                    *(f"{run.peak.get(p, 0):.0f}" for p in ("driver", "reader", "compaction")),
                ]
                for what, run in (("to the kill", first), ("resumed", second))
            ],
        )
        for what, run in (("to the kill", first), ("resumed", second)):
            table(f"Memory of the driver, {what}", ["s", "items done", "MB"], _memory_rows(run))


if __name__ == "__main__":
    main()
