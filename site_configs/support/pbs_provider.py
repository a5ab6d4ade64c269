"""PBS Pro and OpenPBS, asked through qstat for all blocks at once, with and without job history."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterable
from typing import Any, Final

from parsl.providers import PBSProProvider
from parsl.providers.errors import SubmitException

from site_configs.support.pbs_jobs import end_s, find_job, parse_jobs, start_s, walltime_s
from site_configs.support.records import Reason
from site_configs.support.resilient import ResilientProvider
from site_configs.support.scheduler import AVOIDED, Scheduler, Seen, run

_RUNNING: Final = frozenset("RBSUE")  # E: its processes end, and still hold the node
_ENDED: Final = frozenset("FX")
# Exit statuses that the server gives, negative, and signals from 256: PBS Guide, "Job Exit Status".
_KILLED_WALLTIME: Final = -29
_KILLED_MEMORY: Final = frozenset({-26, -27})
_DELETED: Final = 256 + 15


def _nodes(exec_host: str | None) -> tuple[str, ...]:
    """Node names in "n1/0*4+n2.cluster/0*4", as a host calls itself: without the domain."""
    parts = [part for part in (exec_host or "").split("+") if part]
    return tuple(dict.fromkeys(part.split("/")[0].split(".")[0] for part in parts))


def _why(job: dict[str, Any]) -> tuple[Reason, str]:
    status, comment = job.get("Exit_status"), str(job.get("comment", ""))
    text = comment.lower()
    if status == _KILLED_WALLTIME or "exceeded resource walltime" in text:
        return "walltime", ""
    if status in _KILLED_MEMORY or re.search(r"exceeded resource (v?mem|pmem|pvmem)", text):
        return "memory", ""
    if "cgroup mem limit" in text:
        return "memory", ""
    if "preempt" in text:
        return "preempted", ""
    if "terminated by" in text or "deleted by" in text or status == _DELETED:
        return "cancelled", ""
    if "node fail" in text or "node down" in text or "mom" in text.split():
        return "node", ""
    if status == 0:
        return "completed", ""
    if status is None:
        return ("cancelled", "before it ran") if not job.get("stime") else ("unknown", comment)
    return "failed", f"exit status {status}"


def _seen(job: dict[str, Any]) -> Seen:
    state = str(job.get("job_state", "Q"))[:1]
    nodes = _nodes(job.get("exec_host"))
    start = start_s(job)
    if state in _ENDED:
        reason, detail = _why(job)
        return Seen("ended", reason, detail, nodes, start, end_s(job))
    if state in _RUNNING:
        limit = walltime_s(job)
        return Seen("running", nodes=nodes, start_s=start, end_s=start and limit and start + limit)
    return Seen("pending", detail=str(job.get("comment", "")))


class PBS(Scheduler):
    """PBS Pro or OpenPBS.

    `qstat -f` lists live jobs only, `qstat -x` the ended ones too, but none at all where the
    server keeps no history, which is its default: so the first is asked, and the second for what
    the first does not list.
    """

    later = (
        "cannot connect to server",
        "Connection refused",
        "Connection timed out",
        "end of file",
        "Communication failure",
        "Premature end of message",
        "Server is shutting down",
        "Request invalid for state of server",
        "did not answer within",
        # "would exceed … limit of jobs", but not "Job exceeds queue … resource limits".
        "would exceed",
        "Maximum number of jobs already in queue",
    )

    def _qstat(self, options: str, job_ids: Iterable[str]) -> dict[str, dict[str, Any]] | None:
        status, out, error = run(f"qstat {options} -F json {' '.join(job_ids)}", self.timeout_s)
        jobs = parse_jobs(out)
        if jobs is None and status and error.strip():
            # Of nothing but unknown jobs some versions print no JSON at all.
            known = ("Unknown Job Id", "Job has finished")
            if all(any(words in line for words in known) for line in error.strip().splitlines()):
                return {}
        return jobs

    def ask(self, job_ids: list[str]) -> dict[str, Seen] | None:
        """All blocks from one qstat; from a second one those that it does not list."""
        jobs = self._qstat("-f", job_ids)
        if jobs is None:
            return None
        missing = [job_id for job_id in job_ids if not find_job(jobs, job_id)]
        if missing:
            ended = self._qstat("-x -f", missing)
            if ended is None:
                return None
            jobs = {**ended, **jobs}
        found = {job_id: find_job(jobs, job_id) for job_id in job_ids}
        return {job_id: _seen(job) for job_id, job in found.items() if job}

    def names(self, job_ids: list[str]) -> dict[str, str] | None:
        """Names of those of the jobs that the scheduler lists; None where it does not answer."""
        jobs = self._qstat("-f", job_ids) if job_ids else {}
        if jobs is None:
            return None
        found = {job_id: find_job(jobs, job_id) for job_id in job_ids}
        return {job_id: str(job.get("Job_Name", "")) for job_id, job in found.items() if job}

    def find(self, name: str) -> str | None:
        """The id of our job of that name; "" where there is none, None where nobody answers."""
        status, out, _ = run(f"qselect -u {getpass.getuser()} -N {name}", self.timeout_s)
        return next(iter(out.split()), "") if status == 0 else None

    def job_id(self, output: str) -> str | None:
        """The id, which is all that qsub prints."""
        lines = output.split()
        return lines[-1] if lines else None

    def cancel_command(self, job_ids: list[str]) -> str:
        """The command that ends these jobs."""
        return f"qdel {' '.join(job_ids)}"

    def cancelled(self, job_ids: list[str], status: int, error: str) -> list[str]:
        """qdel complains, job by job, of those that are gone already."""
        harmless = ("Unknown Job Id", "Job has finished", "Request invalid for state of job")
        lines = [line for line in error.splitlines() if line.strip()]
        if status == 0:
            return job_ids
        bad = [line for line in lines if not any(words in line for words in harmless)]
        if not lines or any(not re.search(r"\d", line) for line in bad):
            return []
        return [i for i in job_ids if not any(i in line for line in bad)]


class ResilientPBSProvider(ResilientProvider, PBSProProvider):
    """Parsl's PBSProProvider for a cluster as it is.

    ``memory`` is that of a node's chunk, such as "64gb". The other arguments are Parsl's.
    """

    def __init__(self, *, memory: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.memory = memory
        extra = self.select_options.strip(":")
        self.select_options = ":".join(part for part in (f"mem={memory}", extra) if part)

    def submit_with(self, walltime_s: float, command: str, tasks_per_node: int, name: str) -> str:
        """Have Parsl write the script and submit it with qsub; return the job's id."""
        options, init = self.scheduler_options, self.worker_init
        try:
            self.scheduler_options = f"#PBS -r n\n{options}".rstrip()
            # A batch job starts in the home folder, where the launchers would leave files.
            self.worker_init = (
                f'cd "{self.script_dir}"\n{self._avoid()}{self.preamble(walltime_s)}{init}'
            )
            job_id: str | None = PBSProProvider.submit(self, command, tasks_per_node, name)
        finally:
            self.scheduler_options, self.worker_init = options, init
        if job_id is None:
            raise SubmitException(name, "qsub printed no job id")
        return job_id

    def _avoid(self) -> str:
        """PBS cannot leave nodes out, so a block that lands on one of these ends at once."""
        if not self.excluded:
            return ""
        names = "|".join(sorted(self.excluded))
        return (
            f"if cat \"${{PBS_NODEFILE:-/dev/null}}\" | grep -Eq '^({names})([.]|$)'; then\n"
            f"  echo '{AVOIDED}' >&2; exit 1\nfi\n"
        )
