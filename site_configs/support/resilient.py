"""What the providers for SLURM and PBS share: submissions that wait, states that are certain."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from parsl.jobs.states import JobState, JobStatus
from parsl.providers.errors import SubmitException

from site_configs.support.records import NOT_SUBMITTED, BlockRecord, walltime_text
from site_configs.support.scheduler import JOB_PREFIX, Block, Scheduler, Seen, run

if TYPE_CHECKING:
    from parsl.providers.cluster_provider import ClusterProvider as _Base
else:
    _Base = object

LEAST_WALLTIME_S: Final = 60.0
# Where blocks land on a node that is set aside, since it is the only free one, the next waits so
# long, and longer each time.
AVOIDED_PAUSE_S: Final = 30.0
LONGEST_AVOIDED_PAUSE_S: Final = 300.0
# The golden ratio: any few successive blocks spread their ends over the whole range.
_SPREAD: Final = 0.6180339887498949

_STATES: Final = {"pending": JobState.PENDING, "running": JobState.RUNNING}
_ENDS: Final = {
    "completed": JobState.COMPLETED,
    "unknown": JobState.COMPLETED,
    "cancelled": JobState.CANCELLED,
    # Parsl takes an end that was to be expected for no failure when it is called a timeout.
    "walltime": JobState.TIMEOUT,
    "preempted": JobState.TIMEOUT,
    "avoided": JobState.CANCELLED,
    "memory": JobState.FAILED,
    "node": JobState.FAILED,
    "failed": JobState.FAILED,
}


class RefusedError(SubmitException):
    """The scheduler refused a submission for good; said in its own words."""

    def __str__(self) -> str:
        said = " ".join((self.stderr or self.stdout or self.message).split())
        return f"the scheduler refused {self.job_name}: {said}"


class ResilientProvider(_Base):
    """Comes before a ClusterProvider of Parsl's among a class's bases.

    ``scheduler`` is shared by all pools of a site; ``threads`` are those of one worker;
    successive blocks ask for up to ``stagger`` (a fraction) less than the walltime, so that they
    do not all end together.
    """

    def __init__(
        self,
        *,
        pool: str,
        scheduler: Scheduler,
        walltime_s: float,
        threads: int = 1,
        stagger: float = 0.0,
        **parsl: Any,
    ) -> None:
        # Parsl's constructor may ask the scheduler, which `basin plan` must be able to do without.
        self._silent = True
        self._held = False
        self._command = ""
        super().__init__(walltime=walltime_text(walltime_s), **parsl)
        self._silent = False
        self.pool = pool
        self.scheduler = scheduler
        self.walltime_s = walltime_s
        self.threads = threads
        self.stagger = stagger
        self.submitted = 0
        self.excluded: set[str] = set()
        self._submitting = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pool={self.pool!r})"

    # -- what Basin asks ---------------------------------------------------------------------

    def record(self, job_id: str) -> BlockRecord:
        """The latest known of a block; raises KeyError for one that is not of this pool."""
        self.resources[job_id]
        return self.scheduler.blocks[job_id].record

    def look(self) -> None:
        """Ask the scheduler now; never raises, and keeps what is known where it is away."""
        self.scheduler.look()

    def exclude_nodes(self, names: set[str]) -> None:
        """Leave these nodes out in the submissions from now on, as far as possible."""
        self.excluded |= names

    def cancel_by_id(self, job_ids: Sequence[str]) -> list[str]:
        """End jobs that an earlier driver left; those that are gone now, unknown ones included."""
        wanted = [job_id for job_id in job_ids if job_id[:1].isdigit()]
        seen = self.scheduler.names(wanted)
        if seen is None:
            return []
        ours = [job_id for job_id in wanted if seen.get(job_id, JOB_PREFIX).startswith(JOB_PREFIX)]
        return self.scheduler.cancel_jobs(ours)

    def seen_by_id(self, job_ids: Sequence[str]) -> Mapping[str, Seen]:
        """What the scheduler says of jobs that an earlier driver left, of those that it knows."""
        return self.scheduler.seen([job_id for job_id in job_ids if job_id[:1].isdigit()])

    def wait_gone(self, limit_s: float) -> list[str]:
        """Wait until the blocks that were given back are gone; the jobs that are not."""
        return self.scheduler.wait_gone(limit_s)

    # -- what Parsl asks ---------------------------------------------------------------------

    @property
    def status_polling_interval(self) -> int:
        """Seconds between two polls."""
        return max(1, round(self.scheduler.poll_every_s))

    def execute_wait(self, cmd: str, timeout: float | None = None) -> tuple[int, str, str]:
        """Run a command of the scheduler; exit status 124 where it does not answer in time."""
        if self._silent:
            return 1, "", "not asked yet"
        self._command = cmd
        if self._held:
            return 1, "", "later, since the free node is one that is set aside"
        return run(cmd, timeout or self.scheduler.timeout_s)

    def submit(self, command: str, tasks_per_node: int, job_name: str = "block") -> str:
        """Submit a block; where the scheduler is away or takes no more now, do it later.

        Returns an id under which the block is known here. Raises SubmitException where the
        submission is refused for good.
        """
        name = f"{JOB_PREFIX}{self.pool}.{job_name.rpartition('.')[2]}"
        with self._submitting:
            walltime_s = self.next_walltime_s()
            base = self.walltime
            error, job_id = "", None
            self._command = ""
            pause_s = self._pause_s()
            self._held = pause_s > 0.0
            try:
                self.walltime = walltime_text(walltime_s)
                job_id = self.submit_with(walltime_s, command, tasks_per_node, name)
            except SubmitException as exc:
                error = (exc.stderr or "").strip()
                late = self._command and (self._held or self.scheduler.may_come_later(error))
                if not late:
                    raise RefusedError(
                        name, exc.message, exc.stdout, exc.stderr, getattr(exc, "retcode", None)
                    ) from exc
            finally:
                self.walltime, self._held = base, False
            script = shlex.split(self._command)[-1]
            block = Block(
                record=BlockRecord(
                    job_id or f"{NOT_SUBMITTED}{self.pool}-{self.submitted}",
                    self.pool,
                    n_nodes=self.nodes_per_block,
                    words="" if job_id else f"not submitted yet: {' '.join(error.split())}",
                ),
                name=Path(script).name,
                walltime_s=walltime_s,
                stderr=Path(f"{script}.stderr"),
                waiting_command="" if job_id else self._command,
                not_before_s=time.monotonic() + pause_s,
            )
            self.submitted += 1
            own_id = block.record.job_id
            self.resources[own_id] = {
                "job_id": own_id,
                "status": JobStatus(JobState.PENDING),
                "job_stdout_path": f"{script}.stdout",
                "job_stderr_path": f"{script}.stderr",
            }
            self.scheduler.track(block)
            return own_id

    def _pause_s(self) -> float:
        """How long the next submission has to wait; not at all where the last one found work."""
        in_a_row = 0
        for own_id in reversed(list(self.resources)):
            record = self.scheduler.blocks[str(own_id)].record
            if record.reason == "avoided":
                in_a_row += 1
            elif record.start_s:
                break
        if not in_a_row:
            return 0.0
        return min(AVOIDED_PAUSE_S * 2.0 ** min(in_a_row - 1, 10), LONGEST_AVOIDED_PAUSE_S)

    def submit_with(self, walltime_s: float, command: str, tasks_per_node: int, name: str) -> str:
        """Have Parsl write the script and submit it; return the scheduler's id."""
        raise NotImplementedError

    def next_walltime_s(self) -> float:
        """Walltime of the next block, seconds."""
        less = self.stagger * (self.submitted * _SPREAD % 1.0)
        return max(self.walltime_s * (1.0 - less), min(self.walltime_s, LEAST_WALLTIME_S))

    def preamble(self, walltime_s: float) -> str:
        """What every block's script does first: say when it began and what it may use."""
        return (
            f"export BASIN_BLOCK_START=$(date +%s) BASIN_BLOCK_WALLTIME_S={int(walltime_s)}\n"
            f"export BASIN_THREADS={self.threads} OMP_NUM_THREADS={self.threads} "
            f"OPENBLAS_NUM_THREADS={self.threads} MKL_NUM_THREADS={self.threads}\n"
            "export HDF5_USE_FILE_LOCKING=FALSE\n"
        )

    def _status(self) -> None:
        self.scheduler.refresh()
        for job_id, known in list(self.resources.items()):
            if known["status"].terminal:
                continue
            record = self.scheduler.blocks[str(job_id)].record
            state = _ENDS[record.reason] if record.state == "ended" else _STATES[record.state]
            known["status"] = JobStatus(
                state,
                message=record.words or None,
                stdout_path=known["job_stdout_path"],
                stderr_path=known["job_stderr_path"],
            )

    def cancel(self, job_ids: Sequence[Any]) -> list[bool]:
        """End blocks; True for each that is ended, or unknown to the scheduler already."""
        done = self.scheduler.cancel(job_ids)
        for job_id, ended in done.items():
            if ended and not self.resources[job_id]["status"].terminal:
                self.resources[job_id]["status"] = JobStatus(JobState.CANCELLED)
        return [done.get(job_id, True) for job_id in job_ids]
