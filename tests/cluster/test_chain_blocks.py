"""Chains on a real SLURM: over walltimes and a kill no step is made twice but open segments'."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import psutil
import pytest

from orchestrator.block import stop_margin
from tests.cluster.disturbances import Part, StepRecords, write_site
from tests.cluster.slurm_cluster import SlurmCluster
from tests.orchestrator.run_fixtures import (
    Run,
    by_key,
    kill,
    running,
    standing_still,
    store_of,
    until,
    write_campaign,
)

pytestmark = pytest.mark.slow

LIMIT_S = 240.0
WALLTIME_S = 60.0
STEPS = {"metropolis": 9000, "diffusion_chain": 9000}
STAGES = f"""
[[stages]]
kernel = "embed"
[[stages]]
kernel = "mmff"
[[stages]]
kernel = "metropolis"
temperatures = 300
steps = {STEPS["metropolis"]}
[[stages]]
kernel = "diffusion_chain"
from = "mmff"
model = "qm9-gfn2"
n = [4, 14]
steps = {STEPS["diffusion_chain"]}
save_every = 10
pool = "{{pool}}"
"""
RUN = 'bundle_time = "1 min"\nseal_every = "1 s"\ncheckpoint_every = "0.5 s"'
CHAINS = 3


def saved_steps(campaign: Path) -> dict[str, int]:
    """Return the last saved step of every chain under way."""
    found = {}
    for path in (campaign.parent / "store" / "checkpoints").rglob("[!.]*.npz"):
        # One that is sealed meanwhile is gone.
        with suppress(FileNotFoundError), np.load(path) as saved:
            found[path.name] = int(saved["step"].max())
    return found


def test_chains_make_each_step_once_over_walltimes_and_a_kill(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, in_parts = (
        write_campaign(tmp_path / name, ["CCCO"], stages=STAGES.format(pool=pool), run=RUN)
        # One worker in either, so that the diffusion chains begin together.
        for name, pool in (("at-once", "cpu"), ("in-parts", "gpu"))
    )
    site = f"--site={write_site(tmp_path, walltime=f'{WALLTIME_S:g} s')}"
    records = StepRecords(tmp_path / "records")
    jobs: set[str] = set()

    def blocks() -> set[str]:
        return {job["id"] for name in ("cpu", "gpu") for job in slurm_cluster.running(name)}

    def end_s(job_id: str) -> float:
        return datetime.fromisoformat(slurm_cluster.job(job_id)["EndTime"]).timestamp()

    def look() -> dict[str, int]:
        assert runs[-1].process.poll() is None, runs[-1].output()
        jobs.update(blocks())
        return saved_steps(in_parts)

    with running(at_once, workers=1) as whole:
        for name, value in records.environment.items():
            monkeypatch.setenv(name, value)
        runs = [Run(in_parts, site, workers=None)]
        try:
            until(lambda: len(look()) == CHAINS, LIMIT_S, runs[-1].output, every=0.1)
            # None ends before its block does, however fast the machine: they stand still until
            # shortly before they are told to stop.
            first = sorted(jobs, key=end_s)
            held = {job_id: ExitStack() for job_id in first}
            for process in slurm_cluster.job_processes("orchestrator.child"):
                job_id = process.environ()["SLURM_JOB_ID"]
                held[job_id].enter_context(standing_still([process]))
            for job_id in first:
                stops_s = end_s(job_id) - stop_margin(WALLTIME_S)
                time.sleep(max(0.0, stops_s - 1.0 - time.time()))
                held[job_id].close()
            until(
                lambda: not blocks() & set(first),
                LIMIT_S,
                slurm_cluster.words,
                every=0.2,
            )
            at_the_end = saved_steps(in_parts)
            assert len(at_the_end) == CHAINS
            # As soon as one goes on, before any has ended.
            until(
                lambda: any(step > at_the_end[name] for name, step in look().items()),
                LIMIT_S,
                runs[-1].output,
                every=0.1,
            )
            kill(psutil.Process(runs[-1].process.pid))
            runs.append(Run(in_parts, site, workers=None))
            assert runs[-1].wait(LIMIT_S) == 0, runs[-1].output()
            slurm_cluster.assert_empty()
            assert whole.wait(LIMIT_S) == 0, whole.output()
        finally:
            for run in runs:
                run.close()
    tasks = by_key(store_of(in_parts), "tasks").values()
    assert {(t["status"], t["attempts"][0]) for t in tasks} == {("ok", 1)}
    jobs.update(t["block"] for t in tasks)
    assert len(jobs) >= 3, "one block was enough"
    times = ["cpu_s", "wall_s"]
    mine, theirs = (by_key(store_of(campaign), "chains", times) for campaign in (in_parts, at_once))
    assert len(mine) == CHAINS
    assert mine == theirs
    assert not [f for f in (store_of(in_parts).path / "checkpoints").rglob("*") if f.is_file()]

    of_chain: dict[str, list[Part]] = {}
    for part in records.parts():
        of_chain.setdefault(part.key, []).append(part)
    assert len(of_chain) == CHAINS
    stages = {t["key"][:16]: t["stage"] for t in tasks}
    for key, parts in of_chain.items():
        steps = next(n for kernel, n in STEPS.items() if stages[key].startswith(kernel))
        # What a walltime ended was told before, and lost nothing.
        assert parts[0].last == parts[0].saved
        assert [0, *(part.saved for part in parts[:-1])] == [part.first for part in parts]
        assert parts[-1].last == steps
        open_segments = sum(part.last - part.saved for part in parts[:-1])
        made = sum(part.last - part.first for part in parts)
        assert made - steps - open_segments == 0, parts
