"""Perlmutter at NERSC: CPU nodes of 128 cores, GPU nodes of 64 cores and four A100.

Set your project with `account`, and once more, with `_g` at its end, in [pools.gpu]. Sources:
https://docs.nersc.gov/jobs/policy/ (qos, limits, charging), https://docs.nersc.gov/systems/perlmutter/
(nodes; two hardware threads a core, counted as CPUs), https://docs.nersc.gov/jobs/affinity/.
"""

from __future__ import annotations

from typing import Final

from site_configs.support.settings import DriverJob, PoolSettings, SiteSettings

SETTINGS: Final = SiteSettings(
    scheduler="slurm",
    scratch="$SCRATCH/basin-tmp",
    pools={
        "cpu": PoolSettings(
            constraint="cpu",
            qos="regular",
            nodes_per_block=2,
            cores_per_node=128,
            threads_per_core=2,
            walltime=12 * 3600.0,
        ),
        # Half the workers, with twice the memory: 512 GB are not enough for 128 large molecules.
        "dft": PoolSettings(
            constraint="cpu",
            qos="regular",
            nodes_per_block=2,
            cores_per_node=128,
            threads_per_core=2,
            threads_per_worker=2,
            walltime=12 * 3600.0,
        ),
        "gpu": PoolSettings(
            constraint="gpu",
            qos="regular",
            cores_per_node=64,
            threads_per_core=2,
            gpus_per_node=4,
            threads_per_worker=16,
            walltime=6 * 3600.0,
            max_blocks=2,
        ),
    },
    # A part of a node is enough for the driver.
    driver=DriverJob(qos="shared", constraint="cpu"),
)
