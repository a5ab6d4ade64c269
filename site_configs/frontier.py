"""Frontier at OLCF: nodes of 64 cores (56 for jobs) and four MI250X, which are eight GPUs (GCDs).

Set your project with `account`. Source: https://docs.olcf.ornl.gov/systems/frontier_user_guide.html
("Slurm": 8 cores reserved by default, blocks of up to 91 nodes run 2 h in `batch`, up to 24 h in
`extended`; "NUMA": which cores lie at which GCD; one hardware thread a core by default).
"""

from __future__ import annotations

from typing import Final

from site_configs.support.settings import DriverJob, PoolSettings, SiteSettings

# The cores beside GCD 0, 1, ... 7, without the first of each eight, which is reserved.
_BESIDE: Final = "list:49-55:57-63:17-23:25-31:1-7:9-15:33-39:41-47"

SETTINGS: Final = SiteSettings(
    scheduler="slurm",
    pools={
        "cpu": PoolSettings(
            partition="batch", nodes_per_block=2, cores_per_node=56, walltime=2 * 3600.0
        ),
        "gpu": PoolSettings(
            partition="batch",
            nodes_per_block=2,
            cores_per_node=56,
            gpus_per_node=8,
            threads_per_worker=7,
            affinity=_BESIDE,
            walltime=2 * 3600.0,
        ),
    },
    driver=DriverJob(partition="extended", walltime=24 * 3600.0),
)
