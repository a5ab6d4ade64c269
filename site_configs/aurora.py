"""Aurora at ALCF: nodes of 104 cores (102 for jobs) and six GPUs of two tiles, a worker for each.

Set your project with `account`. Sources, under https://docs.alcf.anl.gov/aurora/:
running-jobs-aurora/ (queues and limits; cores 0 and 52 are reserved; PALS's mpiexec; tiles and
ZE_AFFINITY_MASK), workflows/parsl/.
"""

from __future__ import annotations

from typing import Any, Final

from site_configs.support.settings import DriverJob, PoolSettings, SiteSettings

_FIRST_FREE: Final = (1, 53)
# Eight cores for each of the six tiles of a socket.
_BESIDE: Final = "list:" + ":".join(
    f"{first + 8 * i}-{first + 8 * i + 7}" for first in _FIRST_FREE for i in range(6)
)
_EACH: Final = "list:" + ":".join(str(first + i) for first in _FIRST_FREE for i in range(51))

# What a block of either pool asks for.
_NODES: Final[dict[str, Any]] = {
    "queue": "prod",
    "place": "scatter",
    "filesystems": "home:flare",
    "launcher": "mpiexec-pals",
    "nodes_per_block": 2,
    "cores_per_node": 102,
    "threads_per_core": 2,
    "memory_per_node": 800 * 10**9,
    "walltime": 6 * 3600.0,
}

SETTINGS: Final = SiteSettings(
    scheduler="pbs",
    scratch="/tmp",
    pools={
        "cpu": PoolSettings(
            **_NODES,
            affinity=_EACH,
        ),
        "gpu": PoolSettings(
            **_NODES,
            gpus_per_node=6,
            gpu_names=tuple(f"{gpu}.{tile}" for gpu in range(6) for tile in range(2)),
            # The whole nodes come with their GPUs.
            gres="none",
            threads_per_worker=8,
            affinity=_BESIDE,
        ),
    },
    driver=DriverJob(queue="prod", filesystems="home:flare", walltime=6 * 3600.0),
)
