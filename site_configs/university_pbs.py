"""A university's PBS cluster: shared CPU nodes, and GPU nodes asked for by ngpus.

An example to start from: the names of queues and the sizes are those of no cluster in particular.
Options: the PBS Professional User's Guide, chapters "Allocating Resources & Placing Jobs" and
"Submitting a PBS Job", https://www.altair.com/pbs-works-documentation/.
"""

from __future__ import annotations

from typing import Final

from site_configs.support.settings import GIB, DriverJob, PoolSettings, SiteSettings

SETTINGS: Final = SiteSettings(
    scheduler="pbs",
    pools={
        "cpu": PoolSettings(
            queue="workq",
            cores_per_node=32,
            memory_per_node=60 * GIB,
            exclusive=False,
            max_blocks=8,
            walltime=24 * 3600.0,
        ),
        # A worker with a large molecule needs 2.3 GB and more.
        "dft": PoolSettings(
            queue="workq",
            cores_per_node=32,
            memory_per_node=120 * GIB,
            exclusive=False,
            max_blocks=8,
            walltime=48 * 3600.0,
        ),
        "gpu": PoolSettings(
            queue="gpu",
            cores_per_node=8,
            memory_per_node=60 * GIB,
            gpus_per_node=2,
            exclusive=False,
            threads_per_worker=4,
            max_blocks=2,
            walltime=24 * 3600.0,
        ),
        "mpi": PoolSettings(
            queue="workq",
            cores_per_node=32,
            memory_per_node=120 * GIB,
            nodes_per_block=2,
            nodes_per_task=2,
        ),
    },
    driver=DriverJob(queue="workq"),
)
