"""A university's SLURM cluster: shared CPU nodes, and GPU nodes asked for by --gres.

An example to start from: the names of partitions and the sizes are those of no cluster in
particular. Options: https://slurm.schedmd.com/sbatch.html.
"""

from __future__ import annotations

from typing import Final

from site_configs.support.settings import GIB, DriverJob, PoolSettings, SiteSettings

SETTINGS: Final = SiteSettings(
    scheduler="slurm",
    pools={
        "cpu": PoolSettings(
            partition="normal",
            cores_per_node=32,
            memory_per_node=60 * GIB,
            exclusive=False,
            max_blocks=8,
            walltime=24 * 3600.0,
        ),
        # A worker with a large molecule needs 2.3 GB and more.
        "dft": PoolSettings(
            partition="normal",
            cores_per_node=32,
            memory_per_node=120 * GIB,
            exclusive=False,
            max_blocks=8,
            walltime=48 * 3600.0,
        ),
        "gpu": PoolSettings(
            partition="gpu",
            cores_per_node=8,
            memory_per_node=60 * GIB,
            gpus_per_node=2,
            gres="gpu:2",
            exclusive=False,
            threads_per_worker=4,
            max_blocks=2,
            walltime=24 * 3600.0,
        ),
        "mpi": PoolSettings(
            partition="normal", cores_per_node=32, nodes_per_block=2, nodes_per_task=2
        ),
    },
    driver=DriverJob(partition="normal"),
)
