"""A Parsl configuration from settings: one executor for each pool, one scheduler for all."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from site_configs.support.settings import GIB, PoolSettings, QueueSettings, SiteSettings

if TYPE_CHECKING:
    from parsl.config import Config

    from site_configs.support.scheduler import Scheduler

MPI_POOL: Final = "mpi"


def start_of_job(settings: QueueSettings) -> str:
    """Shell lines that give a job the modules and the Python that this process runs on."""
    lines = [f"module load {shlex.quote(name)}" for name in settings.modules]
    if settings.worker_init.strip():
        lines.append(settings.worker_init.strip())
    lines.append(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    return "\n".join(lines) + "\n"


def make_config(site: SiteSettings) -> Config:
    """The Parsl configuration of a machine; every pool's cores must be known."""
    from parsl.config import Config

    scheduler = make_scheduler(site)
    return Config(
        executors=[_executor(site, name, pool, scheduler) for name, pool in site.pools.items()],
        strategy="htex_auto_scale",
        strategy_period=1.0,
        max_idletime=site.idle_limit,
        initialize_logging=False,
    )


def make_scheduler(site: SiteSettings) -> Scheduler:
    """The one batch system that all pools of a site share."""
    from site_configs.support.pbs_provider import PBS
    from site_configs.support.slurm_provider import Slurm

    if site.scheduler == "pbs":
        return PBS(poll_every_s=site.poll_every, timeout_s=site.command_limit)
    clusters = {pool.clusters for pool in site.pools.values()}
    return Slurm(
        poll_every_s=site.poll_every,
        timeout_s=site.command_limit,
        clusters=",".join(sorted(filter(None, clusters))) or None,
    )


def _executor(site: SiteSettings, name: str, pool: PoolSettings, scheduler: Scheduler) -> Any:
    from site_configs.support.executors import MPIPool, WorkerPool

    common: dict[str, Any] = {
        "label": name,
        "address": site.address or "127.0.0.1",
        "encrypted": True,
        "prefetch_capacity": 0,
        "heartbeat_period": max(1, round(site.heartbeat_every)),
        "heartbeat_threshold": max(3, round(site.heartbeat_limit)),
        "poll_period": 100,
        "provider": _provider(site, name, pool, scheduler),
    }
    if name == MPI_POOL:
        executor: Any = MPIPool(
            max_workers_per_block=pool.nodes_per_block // pool.nodes_per_task,
            mpi_launcher=pool.mpi_launcher or ("srun" if site.scheduler == "slurm" else "mpiexec"),
            **common,
        )
        ranks = pool.ranks_per_node or max(1, pool.cores // pool.threads_per_worker)
        executor.resource_specification = {
            "num_nodes": pool.nodes_per_task,
            "ranks_per_node": ranks,
        }
        if pool.launcher_options:
            executor.resource_specification["launcher_options"] = pool.launcher_options
        return _reachable(executor, site)
    executor = WorkerPool(
        # Parsl starts no more workers than fit the cores, so tell it what fits.
        cores_per_worker=min(float(pool.threads_per_worker), pool.cores / pool.workers),
        max_workers_per_node=pool.workers,
        cpu_affinity=_affinity(pool) if pool.pin else "none",
        available_accelerators=list(pool.devices),
        **common,
    )
    return _reachable(executor, site)


def _affinity(pool: PoolSettings) -> str:
    """Which CPUs each worker is pinned to, as Parsl takes it."""
    if pool.affinity is not None:
        return pool.affinity
    if pool.threads_per_core == 1 or not pool.exclusive:
        return "block"
    # Linux numbers the first hardware threads of all cores first: one of each core is used.
    each = max(1, pool.cores // pool.workers)
    if each == 1:
        return "list:" + ":".join(str(i % pool.cores) for i in range(pool.workers))
    return "list:" + ":".join(f"{each * i}-{each * i + each - 1}" for i in range(pool.workers))


def _reachable(executor: Any, site: SiteSettings) -> Any:
    """The executor, which listens on all addresses of this host where none is set.

    Left to itself Parsl would ask a server on the internet for this host's address.
    """
    if site.address is None:
        executor.address = None
        executor.all_addresses = set(host_addresses())
    return executor


def host_addresses() -> list[str]:
    """IPv4 addresses of this host's interfaces; the loopback only where there is no other."""
    import psutil

    found = {
        address.address
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family == socket.AF_INET
    }
    return sorted(a for a in found if not a.startswith("127.")) or ["127.0.0.1"]


def _provider(site: SiteSettings, name: str, pool: PoolSettings, scheduler: Scheduler) -> Any:
    from site_configs.support.pbs_provider import ResilientPBSProvider
    from site_configs.support.slurm_provider import ResilientSlurmProvider

    scratch = f'export TMPDIR="{site.scratch}"\nmkdir -p "$TMPDIR"\n' if site.scratch else ""
    common: dict[str, Any] = {
        "pool": name,
        "scheduler": scheduler,
        "walltime_s": pool.walltime,
        "threads": pool.threads_per_worker,
        "stagger": pool.stagger,
        "account": pool.account,
        "nodes_per_block": pool.nodes_per_block,
        "init_blocks": 0,
        "min_blocks": 0,
        "max_blocks": pool.max_blocks,
        "launcher": _launcher(site.scheduler, name, pool),
        "worker_init": f"export PARSL_CORES={pool.cores}\n{start_of_job(pool)}{scratch}",
    }
    if site.scheduler == "pbs":
        return ResilientPBSProvider(
            queue=pool.queue,
            cpus_per_node=pool.cores * pool.threads_per_core,
            # PBS has no word for all of a node's memory.
            memory=f"{(pool.memory or 2 * GIB * pool.cores) // 2**20}mb",
            select_options=_chunk(name, pool),
            scheduler_options="\n".join(_pbs_options(pool)),
            **common,
        )
    return ResilientSlurmProvider(
        partition=pool.partition,
        qos=pool.qos,
        constraint=pool.constraint,
        clusters=pool.clusters,
        exclusive=pool.exclusive,
        gpus_per_node=pool.gpus_per_node if pool.gpus_per_node and pool.gres is None else None,
        gres=pool.gres if pool.gres != "none" else None,
        memory="0" if pool.memory is None else f"{pool.memory // 2**20}M",
        scheduler_options="\n".join(_slurm_options(pool)),
        **common,
    )


def _slurm_options(pool: PoolSettings) -> list[str]:
    lines = [f"--cpus-per-task={pool.cores * pool.threads_per_core}"]
    return [f"#SBATCH {line}" for line in [*lines, *pool.scheduler_options]]


def _pbs_options(pool: PoolSettings) -> list[str]:
    place = pool.place or ("scatter:exclhost" if pool.exclusive else "scatter")
    lines = [f"-l place={place}"]
    if pool.filesystems:
        lines.append(f"-l filesystems={pool.filesystems}")
    return [f"#PBS {line}" for line in [*lines, *pool.scheduler_options]]


def _chunk(name: str, pool: PoolSettings) -> str:
    parts = []
    if name == MPI_POOL:
        parts.append(f"mpiprocs={pool.ranks_per_node or pool.cores // pool.threads_per_worker}")
    if pool.gpus_per_node and pool.gres != "none":
        parts.append(f"ngpus={pool.gpus_per_node}")
    if pool.select_options:
        parts.append(pool.select_options.strip(":"))
    return ":".join(parts)


def _launcher(scheduler: str, name: str, pool: PoolSettings) -> Any:
    from parsl.launchers import MpiExecLauncher, SimpleLauncher, SingleNodeLauncher, SrunLauncher

    if name == MPI_POOL:
        return SimpleLauncher()
    kind = pool.launcher
    if kind is None:
        several = "srun" if scheduler == "slurm" else "mpiexec"
        kind = several if pool.nodes_per_block > 1 else "single"  # type: ignore[assignment]
    if kind == "srun":
        # Said again: since SLURM 22.05 srun takes the CPUs of a task no more from the job.
        cpus = pool.cores * pool.threads_per_core
        options = f"--ntasks-per-node=1 --cpus-per-task={cpus} --cpu-bind=none"
        return SrunLauncher(debug=False, overrides=f"{options} {pool.launcher_options}".strip())
    if kind == "mpiexec":
        return MpiExecLauncher(debug=False, overrides=pool.launcher_options)
    if kind == "mpiexec-pals":
        # HPE's mpiexec: --cpu-bind none, and all the node's threads for its one process.
        options = f"--ppn 1 --depth {pool.cores * pool.threads_per_core}"
        return MpiExecLauncher(
            debug=False,
            bind_cmd="--cpu-bind",
            overrides=f"{options} {pool.launcher_options}".strip(),
        )
    return SingleNodeLauncher(debug=False)
