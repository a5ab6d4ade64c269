"""The cluster's scheduler as a person uses it: submit one script, look at a job, cancel it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from orchestrator.errors import SiteError
from site_configs.support.pbs_jobs import find_job, parse_jobs
from site_configs.support.scheduler import without_job

_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a scheduler thinks of a script: whether it would take it, and in words."""

    accepts: bool
    words: str


class Scheduler:
    """One kind of scheduler; its commands are those on PATH."""

    name: ClassVar[str]
    job_id: ClassVar[str]  # the variable in which a batch job finds its own id
    programs: ClassVar[tuple[str, ...]]

    def command(self, script: Path, after: str = "") -> list[str]:
        """Return the command that submits a script, to start where job ``after`` fails."""
        raise NotImplementedError

    def submit(self, script: Path, after: str = "") -> str:
        """Submit a script; return the job's id. Raises SiteError with the scheduler's words."""
        command = self.command(script, after)
        done = self._run(command)
        words = done.stdout.split()
        if done.returncode or not words:
            said = " ".join((done.stderr or done.stdout).split()) or f"exit {done.returncode}"
            raise SiteError(f"{command[0]} refused {script}: {said}")
        # A site's own wrapper may say more before the id, and --parsable adds the cluster's name.
        return words[-1].split(";")[0]

    def cancel(self, jobs: Iterable[str]) -> list[str]:
        """Cancel jobs, those among them that are still there; return these."""
        gone = []
        for job in jobs:
            if self.state(job) and self._run([self.programs[2], job]).returncode == 0:
                gone.append(job)
        return gone

    def state(self, job: str) -> str:
        """Return `pending`, `running`, or "" for a job that is over; in doubt it is not over."""
        raise NotImplementedError

    def answers(self) -> str:
        """Return what is wrong with the scheduler's answers; "" where nothing is."""
        raise NotImplementedError

    def opinion(self, script: str) -> Opinion | None:
        """Ask what would become of a script; None where that cannot be asked."""
        return None

    def found(self) -> bool:
        """Tell whether the scheduler's commands are on PATH."""
        return all(shutil.which(program) for program in self.programs)

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_LIMIT_S,
                env=without_job(os.environ),
                check=False,
            )
        except FileNotFoundError as exc:
            raise SiteError(
                f"{command[0]} is not on PATH: submit where the scheduler's commands are, usually "
                "a login node"
            ) from exc
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(
                command, 124, "", f"no answer from {command[0]} within {_LIMIT_S:.0f} s"
            )


class Slurm(Scheduler):
    """SLURM."""

    name = "slurm"
    job_id = "SLURM_JOB_ID"
    programs = ("sbatch", "squeue", "scancel")

    def command(self, script: Path, after: str = "") -> list[str]:
        wait = [f"--dependency=afternotok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *wait, str(script)]

    def state(self, job: str) -> str:
        done = self._run(["squeue", "--noheader", "--me", "--format=%i %T"])
        if done.returncode:
            return "running"
        for line in done.stdout.splitlines():
            number, _, state = line.partition(" ")
            if number == job:
                return "pending" if state in ("PENDING", "CONFIGURING") else "running"
        return ""

    def opinion(self, script: str) -> Opinion:
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(script)
            file.flush()
            done = self._run(["sbatch", "--test-only", file.name])
        text = " ".join((done.stderr or done.stdout).split()).removeprefix("sbatch: ")
        if done.returncode == 0:
            # "Job 12 to start at 2026-01-02T03:04:05 using 2 processors on nodes n1 in ..."
            return Opinion(True, "a block would" + re.sub(r"^Job \S+ to", "", text))
        return Opinion(False, f"sbatch would refuse a block: {text}")

    def answers(self) -> str:
        done = self._run(["squeue", "--noheader", "--me"])
        return _last_line(done.stderr) if done.returncode else ""


class Pbs(Scheduler):
    """PBS Pro and OpenPBS."""

    name = "pbs"
    job_id = "PBS_JOBID"
    programs = ("qsub", "qstat", "qdel")

    def command(self, script: Path, after: str = "") -> list[str]:
        return ["qsub", *(["-W", f"depend=afternotok:{after}"] if after else []), str(script)]

    def state(self, job: str) -> str:
        # No -x: where the server keeps no history, it would hide the living, too.
        done = self._run(["qstat", "-f", "-F", "json", job])
        if "Unknown Job Id" in done.stderr or "has finished" in done.stderr:
            return ""
        state = (find_job(parse_jobs(done.stdout) or {}, job) or {}).get("job_state", "R")
        if state in "FX":
            return ""
        return "pending" if state in "QHWT" else "running"

    def answers(self) -> str:
        done = self._run(["qstat"])
        return _last_line(done.stderr) if done.returncode else ""


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


SCHEDULERS: dict[str, Scheduler] = {"slurm": Slurm(), "pbs": Pbs()}


def surrounding() -> tuple[Scheduler, str] | None:
    """Return the scheduler and the id of the batch job that this process runs in, if any."""
    for scheduler in SCHEDULERS.values():
        if job := os.environ.get(scheduler.job_id):
            return scheduler, job
    return None
