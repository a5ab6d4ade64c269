"""Polaris at ALCF: nodes of 32 cores (64 hardware threads) and four A100.

Set your project with `account`. The queue `prod` takes blocks of 10 nodes or more, `preemptable`
and `debug` smaller ones. Sources, under https://docs.alcf.anl.gov/: polaris/running-jobs/ (queues,
limits, mpiexec's options, filesystems), polaris/workflows/parsl/ (the GPUs count from the last
cores to the first).
"""

from __future__ import annotations

from typing import Any, Final

from site_configs.support.settings import DriverJob, PoolSettings, SiteSettings

# What a block of either pool asks for.
_NODES: Final[dict[str, Any]] = {
    "queue": "prod",
    "select_options": "system=polaris",
    "place": "scatter",
    "filesystems": "home:eagle",
    "launcher": "mpiexec-pals",
    "nodes_per_block": 10,
    "max_blocks": 2,
    "cores_per_node": 32,
    "threads_per_core": 2,
    "memory_per_node": 400 * 10**9,
    "walltime": 3 * 3600.0,
}

SETTINGS: Final = SiteSettings(
    scheduler="pbs",
    scratch="/tmp",
    pools={
        "cpu": PoolSettings(
            **_NODES,
        ),
        "gpu": PoolSettings(
            **_NODES,
            gpus_per_node=4,
            # The whole nodes come with their GPUs.
            gres="none",
            threads_per_worker=8,
            affinity="list:24-31:16-23:8-15:0-7",
        ),
    },
    driver=DriverJob(queue="preemptable", filesystems="home:eagle", walltime=72 * 3600.0),
)
