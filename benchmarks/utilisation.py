"""How busy the cores of a SLURM allocation are, and how soon idle blocks are given back.

Organic molecules and drugs, embedded, MMFF and GFN2, over two blocks of one core on a real SLURM
on this host; a short rehearsal on the gpu partition leaves a block idle early. Busy: wall seconds
of the tasks between the first and the last start. Allocated: cores of running blocks meanwhile, and
for comparison cores times that whole time. Needs root, slurm-wlm and munge.

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
from tests.orchestrator.run_fixtures import Run, running, store_of, write_campaign

CORES = 2
FILES = tuple(str(ROOT / "jobs" / "molecules" / name) for name in ("organics.smi", "drugs.smi"))
STAGES = (
    '[[stages]]\nkernel = "embed"\nconformers = {conformers}\n[[stages]]\nkernel = "mmff"\n'
    '[[stages]]\nname = "gfn2"\nkernel = "relax"\nlevel = "GFN2-xTB"\n'
)
REHEARSAL = '[[stages]]\nname = "gpu"\nkernel = "rehearse"\npool = "gpu"\nseconds = "20 ms"\n'


def _campaign(folder: Path, conformers: int, more: str = "") -> Path:
    files = "[" + ", ".join(f'"{name}"' for name in FILES) + "]"
    return write_campaign(folder, stages=STAGES.format(conformers=conformers) + more, files=files)


def conformers_for(seconds: float, folder: Path) -> int:
    """Return how many conformers of each molecule take about so long on two cores."""
    campaign = _campaign(folder, 1)
    with running(campaign, workers=CORES) as run:
        run.wait(900)
    wall = store_of(campaign).read("tasks", ["wall_s"])["wall_s"]
    return max(1, round(seconds * CORES / float(wall.sum())))


def watch(cluster: SlurmCluster, run: Run) -> dict[str, list[float]]:
    """Wait for the run's end; return [first seen running, last seen] of each job, epoch seconds."""
    seen: dict[str, list[float]] = {}
    ended = False
    while not ended or cluster.squeue():
        ended = run.process.poll() is not None
        for job in cluster.squeue():
            if job["state"] in ("RUNNING", "COMPLETING"):
                span = seen.setdefault(f"{job['partition']} {job['id']}", [time.time()] * 2)
                span[1] = time.time()
        time.sleep(0.5)
    return seen


def main() -> None:
    """Print the table."""
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
            campaign = _campaign(folder / "run", conformers, REHEARSAL)
            site = write_site(folder, walltime="2 h", exclusive=False)
            run = Run(campaign, f"--site={site}", workers=None)
            try:
                jobs = watch(cluster, run)
                assert run.process.returncode == 0, run.output()
            finally:
                run.close()
        finally:
            cluster.down()
        rows = store_of(campaign).read("tasks", ["stage", "started_s", "wall_s", "status"])
    rehearsed = rows["stage"].equals("gpu")
    start, wall = rows["started_s"][~rehearsed], rows["wall_s"][~rehearsed].astype(float)
    first, last = float(start.min()), float(start.max())
    busy = float((np.minimum(start + wall, last) - start).sum())
    allocated = sum(
        max(0.0, min(end, last) - max(began, first))
        for job, (began, end) in jobs.items()
        if job.startswith("cpu")
    )
    gpu_end = float((rows["started_s"] + rows["wall_s"])[rehearsed].max())
    gpu_back = max(end for job, (_, end) in jobs.items() if job.startswith("gpu")) - gpu_end
    cpu_back = max(end for job, (_, end) in jobs.items() if job.startswith("cpu"))
    cpu_back -= float((start + wall).max())
    span = last - first
    table(
        f"Utilisation: {len(start):,} tasks of GFN2 work over two one-core blocks of SLURM",
        ["what", "result"],
        [
            ["first to last start", f"{span:.0f} s"],
            ["busy", f"{busy:.0f} s"],
            ["busy / (cores x time)", f"{100 * busy / (CORES * span):.1f} %"],
            ["busy / allocated core seconds", f"{100 * busy / allocated:.1f} %"],
            ["tasks not ok", int((~rows["status"].equals("ok")).sum())],
            ["idle block (gpu) given back after its last task", f"{gpu_back:.0f} s"],
            ["last block given back after the last task", f"{cpu_back:.0f} s"],
        ],
    )


if __name__ == "__main__":
    main()
