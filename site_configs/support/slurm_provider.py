"""SLURM, asked through squeue for all blocks at once, and through sacct for what it forgot."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import datetime
from itertools import product
from typing import Any, Final

from parsl.providers import SlurmProvider

from site_configs.support.records import Reason, State, slurm_path
from site_configs.support.resilient import ResilientProvider
from site_configs.support.scheduler import Scheduler, Seen, run

# https://slurm.schedmd.com/squeue.html, "JOB STATE CODES"
_PENDING: Final = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"}
    | {"SPECIAL_EXIT"}
)
_ENDED: Final[dict[str, Reason]] = {
    "COMPLETED": "completed",
    "TIMEOUT": "walltime",
    "DEADLINE": "walltime",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "OUT_OF_MEMORY": "memory",
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
    "PREEMPTED": "preempted",
    "FAILED": "failed",
}
_FIELDS: Final = "%i|%j|%T|%r|%N|%S|%e"
# Seconds since the epoch: in autumn an hour's local times come twice.
_TIMES: Final = {"SLURM_TIME_FORMAT": "%s"}
_NO_ACCOUNTING: Final = ("storage is disabled", "not found", "not running a supported")
_NODE_GROUP: Final = re.compile(r"(?:[^\[,]|\[[^\]]*\])+")
_NODE_PART: Final = re.compile(r"\[[^\]]*\]|[^\[]+")


def _numbers(ranges: str) -> list[str]:
    found: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return found


def expand_nodes(text: str) -> tuple[str, ...]:
    """Names of the nodes in SLURM's short form: "n[1-3,7],gpu01"."""
    names: list[str] = []
    for group in _NODE_GROUP.findall(text):
        # Of a cluster with racks both are ranges: "r[1-2]n[1-4]".
        parts = [
            _numbers(part[1:-1]) if part.startswith("[") else [part]
            for part in _NODE_PART.findall(group)
        ]
        names += map("".join, product(*parts))
    return tuple(names)


def _time(text: str) -> float | None:
    try:
        return float(text) if text.isdecimal() else datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None  # "N/A", "Unknown", "NONE"


def _seen(state: str, detail: str, nodes: str, start: str, end: str) -> Seen:
    # sacct: "CANCELLED by 1000".
    word = state.split()[0] if state.split() else "UNKNOWN"
    detail = "" if detail in ("None", "") else detail
    hosts = () if nodes in ("", "None assigned", "(null)") else expand_nodes(nodes)
    where: State = "ended" if word in _ENDED else "pending" if word in _PENDING else "running"
    reason = _ENDED.get(word, "")
    if where == "ended" and detail in ("TimeLimit", "NonZeroExitCode", "NodeDown", "None"):
        detail = ""  # says no more than the state does
    return Seen(where, reason, detail, hosts, _time(start), _time(end))


class Slurm(Scheduler):
    """SLURM, with or without accounting.

    squeue is asked for all of the user's jobs rather than for ids: over a single id that it has
    forgotten it fails.
    """

    later = (
        "Unable to contact slurm controller",
        "Socket timed out",
        "Connection refused",
        "Connection timed out",
        "Connection reset",
        "Zero Bytes were transmitted",
        "Unexpected message received",
        "temporarily unable to accept job",
        "Resource temporarily unavailable",
        "Slurm backup controller in standby mode",
        "did not answer within",
        # Only the word before it tells this limit from those of size and time, which last.
        "MaxSubmitJob",
    )

    def __init__(
        self, *, poll_every_s: float = 20.0, timeout_s: float = 30.0, clusters: str | None = None
    ) -> None:
        super().__init__(poll_every_s=poll_every_s, timeout_s=timeout_s)
        self._clusters = f" --clusters={clusters}" if clusters else ""
        self._accounting = True

    def _squeue(self) -> list[list[str]] | None:
        status, out, _ = run(
            f"squeue --user={os.getuid()} --all --states=all --noheader{self._clusters} "
            f"--format='{_FIELDS}'",
            self.timeout_s,
            _TIMES,
        )
        if status:
            return None
        rows = [line.split("|") for line in out.splitlines()]
        return [row for row in rows if len(row) == _FIELDS.count("|") + 1]

    def _sacct(self, job_ids: Iterable[str]) -> dict[str, Seen]:
        """What accounting knows of jobs that the controller no longer lists."""
        if not self._accounting:
            return {}
        status, out, error = run(
            f"sacct --allocations --noheader --parsable2 --duplicates{self._clusters} "
            f"--format=JobID,State,ExitCode,NodeList,Start,End --jobs={','.join(job_ids)}",
            self.timeout_s,
            _TIMES,
        )
        if status:
            self._accounting = not any(words in error for words in _NO_ACCOUNTING)
            return {}
        found: dict[str, Seen] = {}
        for row in (line.split("|") for line in out.splitlines()):
            if len(row) == 6:
                job_id, state, exit_code, nodes, start, end = row
                detail = f"exit status {exit_code}" if state == "FAILED" else ""
                found[job_id] = _seen(state, detail, nodes, start, end)
        return found

    def ask(self, job_ids: list[str]) -> dict[str, Seen] | None:
        """All blocks from one squeue; from one sacct those it does not list."""
        rows = self._squeue()
        if rows is None:
            return None
        wanted = set(job_ids)
        found = {
            job_id: _seen(state, detail, nodes, start, end)
            for job_id, _, state, detail, nodes, start, end in rows
            if job_id in wanted
        }
        missing = [job_id for job_id in job_ids if job_id not in found]
        return {**self._sacct(missing), **found} if missing else found

    def names(self, job_ids: list[str]) -> dict[str, str] | None:
        """Names of those of the jobs that the scheduler lists; None where it does not answer."""
        rows = self._squeue()
        return None if rows is None else {row[0]: row[1] for row in rows if row[0] in job_ids}

    def find(self, name: str) -> str | None:
        """The id of our job of that name; "" where there is none, None where nobody answers."""
        rows = self._squeue()
        return None if rows is None else next((row[0] for row in rows if row[1] == name), "")

    def job_id(self, output: str) -> str | None:
        """The id in "Submitted batch job 4711"."""
        match = re.search(r"Submitted batch job (\S+)", output)
        return match[1] if match else None

    def cancel_command(self, job_ids: list[str]) -> str:
        """The command that ends these jobs."""
        return f"scancel{self._clusters} {' '.join(job_ids)}"

    def cancelled(self, job_ids: list[str], status: int, error: str) -> list[str]:
        """scancel complains, job by job, of those that are gone already."""
        harmless = ("Invalid job id", "already completing or completed")
        lines = [line for line in error.splitlines() if line.strip()]
        fine = status == 0 or (
            bool(lines) and all(any(words in line for words in harmless) for line in lines)
        )
        return job_ids if fine else []


class ResilientSlurmProvider(ResilientProvider, SlurmProvider):
    """Parsl's SlurmProvider for a cluster as it is.

    ``memory`` is that of a node as `--mem` takes it; "0" is all of it. ``launcher`` and the
    other arguments are Parsl's.
    """

    def __init__(self, *, memory: str = "0", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.memory = memory

    def next_walltime_s(self) -> float:
        """Whole minutes, because Parsl gives SLURM no others."""
        return max(60.0, super().next_walltime_s() // 60 * 60)

    def _write_submit_script(
        self, template: str, script_filename: str, job_name: str, configs: dict[str, Any]
    ) -> None:
        """Have Parsl write the script, with its paths as SLURM takes them."""
        names = ("job_stdout_path", "job_stderr_path")
        paths = {name: slurm_path(configs[name]) for name in names}
        super()._write_submit_script(template, script_filename, job_name, {**configs, **paths})

    def submit_with(self, walltime_s: float, command: str, tasks_per_node: int, name: str) -> str:
        """Have Parsl write the script and submit it with sbatch; return the job's id."""
        options, init = self.scheduler_options, self.worker_init
        lines = ["#SBATCH --no-requeue", f"#SBATCH --mem={self.memory}"]
        if self.excluded:
            lines.append(f"#SBATCH --exclude={','.join(sorted(self.excluded))}")
        try:
            self.scheduler_options = f"{options}{chr(10).join(lines)}\n"
            self.worker_init = self.preamble(walltime_s) + init
            job_id: str = SlurmProvider.submit(self, command, tasks_per_node, name)
        finally:
            self.scheduler_options, self.worker_init = options, init
        return job_id
