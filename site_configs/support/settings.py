"""What a user may set for a machine: one model for the site, one for each of its pools.

Times are seconds and sizes bytes here; the site file that is read into them also takes "4 h" and
"64 GB". Every field says beside its default what it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit that a bare number is in."""

    name: Literal["s", "B"]


Seconds: TypeAlias = Annotated[float, Unit("s")]
Bytes: TypeAlias = Annotated[int, Unit("B")]
# One line of a batch script holds it, and a shell may see it.
Word: TypeAlias = Annotated[str, Field(pattern=r"^[^\s'\"`$;&|<>\\]+$", max_length=200)]

GIB: Final = 2**30


class Settings(BaseModel):
    """Nothing unknown is taken, nothing converted by guess."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


def _shown(text: str) -> dict[str, Any]:
    return {"default": text}


class QueueSettings(Settings):
    """To whom and where a job is submitted."""

    account: Word | None = Field(
        default=None,
        json_schema_extra=_shown("the scheduler's"),
        description="Account or project that pays",
    )
    partition: Word | None = Field(
        default=None, json_schema_extra=_shown("the scheduler's"), description="SLURM partition"
    )
    queue: Word | None = Field(
        default=None, json_schema_extra=_shown("the scheduler's"), description="PBS queue"
    )
    qos: Word | None = Field(
        default=None, json_schema_extra=_shown("none"), description="SLURM quality of service"
    )
    constraint: Annotated[str, Field(pattern=r"^[^\s'\"`$;<>\\]+$")] | None = Field(
        default=None,
        json_schema_extra=_shown("none"),
        description='SLURM node features, such as "gpu&hbm80g"',
    )
    scheduler_options: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description='Further options, as after #SBATCH or #PBS: ["--reservation=chem"]',
    )
    modules: tuple[Word, ...] = Field(
        default=(), strict=False, description="Modules loaded at the start of each job"
    )
    worker_init: str = Field(
        default="", description="Shell lines at the start of each job, after the modules"
    )


class PoolSettings(QueueSettings):
    """One pool: the blocks that its workers come in, and what a worker gets."""

    max_blocks: int = Field(default=4, ge=1, le=10_000, description="Blocks (jobs) at most")
    nodes_per_block: int = Field(default=1, ge=1, le=10_000, description="Nodes of a block")
    walltime: Seconds = Field(default=4 * 3600.0, ge=60, description="Walltime of a block")
    stagger: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="Successive blocks ask for up to this fraction of the walltime less",
    )
    cores_per_node: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=_shown("what the scheduler says of the partition"),
        description="Physical cores used of each node",
    )
    threads_per_core: int = Field(
        default=1, ge=1, le=8, description="Hardware threads that the scheduler counts as CPUs"
    )
    memory_per_node: Bytes | None = Field(
        default=None,
        ge=10**8,
        json_schema_extra=_shown("all where exclusive, else 2 GB for each core"),
        description="Memory asked for on each node",
    )
    gpus_per_node: int = Field(
        default=0, ge=0, le=64, description="GPUs used of each node: one worker for each"
    )
    gpu_names: tuple[Word, ...] = Field(
        default=(),
        strict=False,
        json_schema_extra=_shown("0, 1, ..."),
        description='Devices as workers are pinned to them, such as ["0.0", "0.1"]',
    )
    gres: Word | None = Field(
        default=None,
        json_schema_extra=_shown("--gpus-per-node"),
        description='How SLURM is asked for GPUs, where not so: "gpu:a100:4"; or "none"',
    )
    workers_per_node: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        json_schema_extra=_shown("cores / threads_per_worker, or one per GPU"),
        description="Workers on each node",
    )
    threads_per_worker: int = Field(
        default=1, ge=1, le=1024, description="Threads of each worker (OMP_NUM_THREADS and so on)"
    )
    exclusive: bool = Field(default=True, description="Share the nodes with nobody")
    pin: bool = Field(default=True, description="Pin each worker to its own cores")
    affinity: Annotated[str, Field(pattern=r"^list(:[\d,\-]+)+$")] | None = Field(
        default=None,
        json_schema_extra=_shown("cores in their order"),
        description='Cores of each worker, where not in order: "list:0-7:8-15"',
    )
    launcher: Literal["single", "srun", "mpiexec", "mpiexec-pals"] | None = Field(
        default=None,
        json_schema_extra=_shown("single; with several nodes srun or mpiexec"),
        description="What starts the worker pool on each node of a block",
    )
    launcher_options: str = Field(
        default="",
        description='Further options of the launcher; in pool mpi of its own, such as "--mpi=pmi2"',
    )
    clusters: Word | None = Field(
        default=None, json_schema_extra=_shown("none"), description="SLURM clusters (--clusters)"
    )
    select_options: Word | None = Field(
        default=None,
        json_schema_extra=_shown("none"),
        description='PBS: more of a chunk, such as "system=polaris"',
    )
    place: Word | None = Field(
        default=None,
        json_schema_extra=_shown("scatter:exclhost, or scatter where not exclusive"),
        description="PBS: how chunks lie on nodes (-l place)",
    )
    filesystems: Word | None = Field(
        default=None,
        json_schema_extra=_shown("none"),
        description='PBS: file systems that a job needs, such as "home:eagle"',
    )
    mpi_launcher: Literal["srun", "mpiexec"] | None = Field(
        default=None,
        json_schema_extra=_shown("srun for SLURM, mpiexec for PBS"),
        description="Pool mpi: what starts a stage's MPI programs",
    )
    ranks_per_node: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=_shown("cores_per_node / threads_per_worker"),
        description="Pool mpi: ranks on each node",
    )
    nodes_per_task: int = Field(
        default=1, ge=1, description="Pool mpi: nodes of each MPI program; divides nodes_per_block"
    )

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the GPUs that workers are pinned to."""
        return self.gpu_names or tuple(str(i) for i in range(self.gpus_per_node))

    @property
    def cores(self) -> int:
        """Cores used of each node; they must be known."""
        assert self.cores_per_node is not None
        return self.cores_per_node

    @property
    def workers(self) -> int:
        """Workers on each node."""
        fit = max(1, self.cores // self.threads_per_worker)
        asked = self.workers_per_node
        if self.devices:
            return min(asked or len(self.devices), len(self.devices))
        return asked or fit

    @property
    def memory(self) -> int | None:
        """Bytes asked for on each node; None for all there are."""
        if self.memory_per_node is not None or self.exclusive:
            return self.memory_per_node
        return 2 * GIB * self.cores


class DriverJob(QueueSettings):
    """The batch job that `basin submit` runs the driver in."""

    walltime: Seconds = Field(default=24 * 3600.0, ge=60, description="Walltime of the driver")
    memory: Bytes = Field(default=8 * 10**9, ge=10**8, description="Memory of the driver")
    cores: int = Field(default=2, ge=1, le=1024, description="Cores of the driver")
    filesystems: Word | None = Field(
        default=None,
        json_schema_extra=_shown("none"),
        description="PBS: file systems that the driver needs",
    )


class SiteSettings(Settings):
    """A machine: how its batch system is talked to, and its pools."""

    scheduler: Literal["slurm", "pbs"] = Field(description="Batch system")
    address: Word | None = Field(
        default=None,
        json_schema_extra=_shown("all that the login node has"),
        description="Address under which the compute nodes reach the driver",
    )
    scratch: str | None = Field(
        default=None,
        json_schema_extra=_shown("the node's TMPDIR"),
        description='Folder of the workers\' temporary files, such as "/local/$USER"',
    )
    poll_every: Seconds = Field(
        default=20.0, ge=1, description="Time between two queries of the batch system"
    )
    command_limit: Seconds = Field(
        default=30.0, ge=1, description="Longest wait for a command of the batch system"
    )
    heartbeat_every: Seconds = Field(
        default=10.0, ge=1, description="Time between two signs of life of a worker pool"
    )
    heartbeat_limit: Seconds = Field(
        default=60.0, ge=3, description="Silence after which a worker pool counts as lost"
    )
    idle_limit: Seconds = Field(
        default=30.0, ge=1, description="Idle time after which a block is given back"
    )
    driver: DriverJob = Field(default=DriverJob(), description="The driver's own batch job")
    pools: Mapping[str, PoolSettings] = Field(min_length=1, description="Pools by name")
