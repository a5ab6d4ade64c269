"""This machine: as many single-threaded workers as there are cores, in one block."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parsl.config import Config


def _asked_for() -> int | None:
    text = os.environ.get("BASIN_WORKERS", "").strip()
    if not text:
        return None
    if not text.isdecimal() or not int(text):
        raise ValueError(f"BASIN_WORKERS={text!r}: give a whole number of workers, 1 or more")
    return int(text)


def make_config(workers: int | None = None) -> Config:
    """Return a configuration with one pool, `cpu`.

    ``workers`` defaults to the environment variable ``BASIN_WORKERS``, else to the number of
    cores that this process may use.
    """
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    cores = len(os.sched_getaffinity(0))
    count = workers or _asked_for() or cores
    return Config(
        executors=[
            HighThroughputExecutor(
                label="cpu",
                address="127.0.0.1",
                # Parsl starts no more workers than fit the cores, so tell it what fits.
                cores_per_worker=min(1.0, cores / count),
                max_workers_per_node=count,
                prefetch_capacity=0,
                # A lost worker pool is noticed, and a lost driver leaves no pool behind, in 10 s.
                heartbeat_period=2,
                heartbeat_threshold=10,
                poll_period=20,
                provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
            )
        ],
        # `none` would wait for ever for a block that died; `simple` starts another one.
        strategy="simple",
        strategy_period=0.5,
        initialize_logging=False,
    )
