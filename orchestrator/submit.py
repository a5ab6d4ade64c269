"""The driver as a batch job of its own: its script, and submitting it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import chain, lock
from orchestrator.errors import SiteError, StoreLockedError
from orchestrator.lock import DRIVER_JOB
from orchestrator.quantities import MEMORY, TIME, QuantityError, parse_quantity
from orchestrator.scheduler import SCHEDULERS, Scheduler
from orchestrator.shard import write_whole
from site_configs.support.records import slurm_path, walltime_text

if TYPE_CHECKING:
    from orchestrator.sites import Site

SCRIPT = "driver.sh"
_NAME_LENGTH = 40


@dataclass(frozen=True, slots=True)
class DriverJob:
    """What the driver's batch job asks for; ``walltime_s`` in s, ``memory`` in bytes.

    ``partition`` is PBS's queue, too; ``setup`` are shell lines that come before the driver.
    """

    scheduler: Scheduler
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    filesystems: str = ""
    walltime_s: float = 86400.0
    memory: float = 8e9
    cores: int = 2
    options: Sequence[str] = ()
    setup: str = ""


def driver_job(site: Site, options: Mapping[str, str | None]) -> DriverJob:
    """Return the driver's job from a site's ``[driver]`` and the command line, which wins.

    ``options`` are `partition`, `account`, `walltime` and `memory`, as the user wrote them.
    Raises SiteError where the site submits to no scheduler, or an option is no quantity.
    """
    table = site.driver
    if table is None or site.scheduler is None:
        raise SiteError(
            f"site {site.name!r} submits to no scheduler, so there is no batch job to put the "
            "driver in; name a SLURM or PBS site with --site (or BASIN_SITE), or use `basin run`"
        )
    job = DriverJob(
        scheduler=SCHEDULERS[site.scheduler],
        partition=table.partition or table.queue or "",
        account=table.account or "",
        qos=table.qos or "",
        constraint=table.constraint or "",
        filesystems=table.filesystems or "",
        walltime_s=table.walltime,
        memory=table.memory,
        cores=table.cores,
        options=table.scheduler_options,
        setup=table.worker_init,
    )
    given: dict[str, Any] = {name: text for name, text in options.items() if text is not None}
    for name, field, dimension in (("walltime", "walltime_s", TIME), ("memory", "memory", MEMORY)):
        if (text := given.pop(name, None)) is not None:
            try:
                given[field] = parse_quantity(text, dimension)
            except QuantityError as exc:
                raise SiteError(f"--{name} {text} {exc}") from None
    return replace(job, **given)


def submit(store: Path, job: DriverJob, script: str) -> str:
    """Put the script into the store and submit it; return the job's id.

    Raises StoreLockedError where a driver works on the store or a driver job waits, SiteError
    where the scheduler refuses.
    """
    if lock.is_running(store):
        raise StoreLockedError(
            f"{store}: a `basin run` is working on this store ({lock.named(lock.who(store))}); "
            f"`basin stop {store}` ends it"
        )
    if states := chain.living(store):
        found, state = next(iter(states.items()))
        raise StoreLockedError(
            f"{store}: driver job {found} is {state} already; `basin stop {store}` ends it"
        )
    path = store / "control" / SCRIPT
    write_whole(path, script.encode())
    chain.forget(store)
    made = job.scheduler.submit(path)
    if chain.read(store) is None:  # else the job has begun already, and written more
        chain.write(store, chain.ChainFile(job.scheduler.name, str(path), [made]))
    return made


def render(job: DriverJob, name: str, store: Path, folder: Path, arguments: Sequence[str]) -> str:
    """Return the script of a driver's job: what it asks for, and ``basin run`` in ``folder``."""
    log = store / "logs" / f"driver-${{{job.scheduler.job_id}}}.log"
    target = store / "control" / SCRIPT
    command = ["basin", "run", *arguments, "--chain", str(target)]
    lines = [
        "#!/bin/bash -l",  # a login shell knows `module`
        f"# The driver of campaign {name!r}, which submits the blocks that compute.",
        *_directives(job, name, store),
        "",
        *job.setup.strip().splitlines(),
        f"cd {shlex.quote(str(folder))} || exit 2",
        "",
        "# From these the driver knows its own end, and drains before it.",
        f"export {DRIVER_JOB}=${job.scheduler.job_id}",
        f"export BASIN_BLOCK_START=$(date +%s) BASIN_BLOCK_WALLTIME_S={job.walltime_s:.0f}",
    ]
    if job.scheduler.name == "pbs":
        # PBS shows a job's output only when it has ended.
        lines.append(f'exec >> "{log}" 2>&1')
    lines += [
        "",
        "# --chain: a follow-up job waits for this one, and goes on where it ends unfinished.",
        f"exec {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n"


def _directives(job: DriverJob, name: str, store: Path) -> list[str]:
    label = "basin.driver." + re.sub(r"[^\w.-]", "_", name)[:_NAME_LENGTH]
    memory = math.ceil(job.memory / 2**20)
    logs = store / "logs"
    if job.scheduler.name == "slurm":
        wanted = [
            f"--job-name={label}",
            *([f"--account={job.account}"] if job.account else []),
            *([f"--partition={job.partition}"] if job.partition else []),
            *([f"--qos={job.qos}"] if job.qos else []),
            *([f"--constraint={job.constraint}"] if job.constraint else []),
            "--nodes=1",
            "--ntasks=1",
            f"--cpus-per-task={job.cores}",
            f"--mem={memory}M",
            f"--time={walltime_text(math.ceil(job.walltime_s))}",
            # A requeued driver and its follow-up would be two.
            "--no-requeue",
            f"--output={slurm_path(str(logs))}/driver-%j.log",
            *job.options,
        ]
        return [f"#SBATCH {words}" for words in wanted]
    wanted = [
        f"-N {label}",
        *([f"-A {job.account}"] if job.account else []),
        *([f"-q {job.partition}"] if job.partition else []),
        f"-l select=1:ncpus={job.cores}:mem={memory}mb",
        f"-l walltime={walltime_text(math.ceil(job.walltime_s))}",
        *([f"-l filesystems={job.filesystems}"] if job.filesystems else []),
        "-r n",
        "-j oe",
        f"-o {logs}/",
        *job.options,
    ]
    return [f"#PBS {words}" for words in wanted]
