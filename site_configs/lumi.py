"""LUMI at CSC: LUMI-C nodes of 128 cores, LUMI-G nodes of 64 cores and eight GPUs (GCDs).

Set your project with `account` ("project_..."). Sources, under https://docs.lumi-supercomputer.eu/:
runjobs/scheduled-jobs/partitions/ (partitions and limits), runjobs/scheduled-jobs/lumig-job/ (one
core of each LUMI-G node is reserved; the cores at each GCD, of which six of eight are used).
"""

from __future__ import annotations

from typing import Final

from site_configs.support.settings import DriverJob, PoolSettings, SiteSettings

_BESIDE: Final = "list:49-54:57-62:17-22:25-30:1-6:9-14:33-38:41-46"

SETTINGS: Final = SiteSettings(
    scheduler="slurm",
    pools={
        "cpu": PoolSettings(
            partition="standard", nodes_per_block=2, cores_per_node=128, walltime=12 * 3600.0
        ),
        # Half the workers, with twice the memory: nodes have 2 GB for each core.
        "dft": PoolSettings(
            partition="standard",
            nodes_per_block=2,
            cores_per_node=128,
            threads_per_worker=2,
            walltime=12 * 3600.0,
        ),
        "gpu": PoolSettings(
            partition="standard-g",
            cores_per_node=56,
            gpus_per_node=8,
            threads_per_worker=6,
            affinity=_BESIDE,
            walltime=12 * 3600.0,
        ),
    },
    driver=DriverJob(partition="small", walltime=72 * 3600.0),
)
