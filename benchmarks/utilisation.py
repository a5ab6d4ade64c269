"""How busy the cores of a SLURM allocation are, and how soon idle blocks are given back.

Organic molecules and drugs, embedded, MMFF and GFN2, over two blocks of one core on a real SLURM
on this host, with the site's default intervals. Busy: wall seconds of the tasks between the first
and the last start, against the cores of running blocks meanwhile, and against cores times that
whole time. Then a rehearsal whose gpu block is idle soon. Needs root, slurm-wlm and munge.

    python -m benchmarks.utilisation [--minutes 10]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import ROOT, table
from tests.cluster.disturbances import write_site
from tests.cluster.slurm_cluster import SlurmCluster, missing
from tests.orchestrator.run_fixtures import SMALL, running, store_of, write_campaign

CORES = 2
FILES = tuple(str(ROOT / "jobs" / "molecules" / name) for name in ("organics.smi", "drugs.smi"))
STAGES = (
    '[[stages]]\nkernel = "embed"\nconformers = {conformers}\n[[stages]]\nkernel = "mmff"\n'
    '[[stages]]\nname = "gfn2"\nkernel = "relax"\nlevel = "GFN2-xTB"\n'
)
IDLE = (
    '[[stages]]\nname = "gpu"\nkernel = "rehearse"\npool = "gpu"\nseconds = "1 s"\n'
    '[[stages]]\nname = "cpu"\nkernel = "rehearse"\nseconds = "20 s"\n'
)


def _campaign(folder: Path, conformers: int) -> Path:
    files = "[" + ", ".join(f'"{name}"' for name in FILES) + "]"
    return write_campaign(folder, stages=STAGES.format(conformers=conformers), files=files)


def _site(folder: Path) -> Path:
    """Write the test cluster's site file without its hurried intervals."""
    path = write_site(folder, walltime="2 h", exclusive=False)
    hurried = ("poll_every", "heartbeat_", "idle_limit")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(hurried)))
    return path


def conformers_for(seconds: float, folder: Path) -> int:
    """Return how many conformers of each molecule take about so long on two cores."""
    campaign = _campaign(folder, 1)
    with running(campaign, workers=CORES) as run:
        run.wait(900)
    cpu = store_of(campaign).read("tasks", ["cpu_s"])["cpu_s"]
    return max(1, round(seconds * CORES / float(cpu.sum())))


def watch(cluster: SlurmCluster, campaign: Path, site: Path) -> dict[str, list[float]]:
    """Run a campaign; return [first seen running, last seen] of each job, epoch seconds."""
    seen: dict[str, list[float]] = {}
    with running(campaign, f"--site={site}", workers=None) as run:
        while run.process.poll() is None or cluster.squeue():
            for job in cluster.squeue():
                if job["state"] in ("RUNNING", "COMPLETING"):
                    span = seen.setdefault(f"{job['partition']} {job['id']}", [time.time()] * 2)
                    span[1] = time.time()
            time.sleep(0.5)
        assert run.process.returncode == 0, run.output()
    return seen


def last_seen(jobs: dict[str, list[float]], partition: str) -> float:
    """Return when the last job of a partition was seen last."""
    return max(end for job, (_, end) in jobs.items() if job.startswith(partition))


def utilisation(cluster: SlurmCluster, folder: Path, conformers: int) -> None:
    """Print how busy the allocated cores were."""
    campaign = _campaign(folder / "run", conformers)
    jobs = watch(cluster, campaign, _site(folder))
    rows = store_of(campaign).read("tasks", ["started_s", "wall_s", "status"])
    start, wall = rows["started_s"], rows["wall_s"].astype(float)
    first, last = float(start.min()), float(start.max())
    busy = float((np.minimum(start + wall, last) - start).sum())
    allocated = sum(max(0.0, min(end, last) - max(began, first)) for began, end in jobs.values())
    back = last_seen(jobs, "cpu") - float((start + wall).max())
    table(
        f"Utilisation: {len(start):,} tasks of GFN2 work over two one-core blocks of SLURM",
        ["what", "result"],
        [
            ["first to last start", f"{last - first:.0f} s"],
            ["busy", f"{busy:.0f} s"],
            ["busy / (cores x time)", f"{100 * busy / (CORES * (last - first)):.1f} %"],
            ["busy / allocated core seconds", f"{100 * busy / allocated:.1f} %"],
            ["tasks not ok", int((~rows["status"].equals("ok")).sum())],
            ["last block given back after the last task", f"{back:.0f} s"],
        ],
    )


def idle_block(cluster: SlurmCluster, folder: Path) -> None:
    """Print how soon a block without work is given back while the campaign goes on."""
    campaign = write_campaign(folder / "idle", SMALL[:8], stages=IDLE)
    jobs = watch(cluster, campaign, _site(folder))
    rows = store_of(campaign).read("tasks", ["stage", "started_s", "wall_s"])
    ends = rows["started_s"] + rows["wall_s"]
    back = last_seen(jobs, "gpu") - float(ends[rows["stage"].equals("gpu")].max())
    table(
        "Idle blocks",
        ["what", "result"],
        [
            ["gpu block given back after its last task", f"{back:.0f} s"],
            [
                "the campaign went on after that for",
                f"{float(ends.max()) - last_seen(jobs, 'gpu'):.0f} s",
            ],
        ],
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(f"skipped: {reason}")
    with tempfile.TemporaryDirectory(prefix="basin-utilisation-") as name:
        folder = Path(name)
        conformers = conformers_for(60 * arguments.minutes, folder / "trial")
        cluster = SlurmCluster(folder / "slurm")
        cluster.up()
        os.environ["SLURM_CONF"] = str(cluster.conf)
        try:
            utilisation(cluster, folder, conformers)
            idle_block(cluster, folder)
        finally:
            cluster.down()


if __name__ == "__main__":
    main()
