"""Parsl's executors for blocks of a batch system: at the end they wait until the jobs are gone."""

from __future__ import annotations

from parsl.executors import HighThroughputExecutor, MPIExecutor

from site_configs.support.pools import GONE_LIMIT_S


def _wait_gone(executor: HighThroughputExecutor) -> None:
    wait = getattr(executor.provider, "wait_gone", None)
    if wait is not None:
        wait(GONE_LIMIT_S)


class WorkerPool(HighThroughputExecutor):
    """Workers of one pool."""

    def shutdown(self, timeout: float = 10.0) -> None:
        """End the interchange, and return when the blocks have left their nodes."""
        super().shutdown(timeout)
        _wait_gone(self)


class MPIPool(MPIExecutor):
    """Workers that each start MPI programs over the nodes of their block."""

    resource_specification: dict[str, int]

    def shutdown(self, timeout: float = 10.0) -> None:
        """End the interchange, and return when the blocks have left their nodes."""
        super().shutdown(timeout)
        _wait_gone(self)
