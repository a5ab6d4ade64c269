"""What `qstat -f -F json` says of jobs; without Parsl, since blocks ask it, too."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import Any, Final

from site_configs.support.records import seconds_of

_JOB: Final = re.compile(r'^\s*"(\d+[^"]*)":\s*\{\s*$\s*"Job_Name"', re.MULTILINE)
_FIELD: Final = re.compile(
    r'^\s*"(Job_Name|job_state|comment|exec_host|stime|obittime|walltime|Exit_status)":'
    r'\s*(?:"((?:[^"\\]|\\.)*)"|(-?\d+))',
    re.MULTILINE,
)


def parse_jobs(text: str) -> dict[str, dict[str, Any]] | None:
    """The jobs in what `qstat -f -F json` printed; None where that is no answer.

    qstat writes what a user's environment holds without care for JSON's rules, so where the whole
    cannot be parsed the few fields that matter are picked out.
    """
    if '"pbs_server"' not in text:
        return None
    try:
        jobs: dict[str, dict[str, Any]] = json.loads(text, strict=False).get("Jobs", {})
        return jobs
    except ValueError:
        pass
    starts = list(_JOB.finditer(text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    found: dict[str, dict[str, Any]] = {}
    for match, end in zip(starts, ends, strict=True):
        job: dict[str, Any] = {}
        for name, word, number in _FIELD.findall(text[match.start() : end]):
            job.setdefault(name, int(number) if number else word)
        # The last of the two walltimes is the limit; the one used comes first.
        times = [w for n, w, _ in _FIELD.findall(text[match.start() : end]) if n == "walltime"]
        job["resources_used"] = {"walltime": times[0]} if len(times) > 1 else {}
        job["Resource_List"] = {"walltime": times[-1]} if times else {}
        found[match[1]] = job
    return found


def find_job(jobs: dict[str, dict[str, Any]], job_id: str) -> dict[str, Any] | None:
    """A job by its id; qstat may print the server's short name where qsub printed the long one."""
    if job_id in jobs:
        return jobs[job_id]
    number = job_id.split(".")[0]
    return next((job for known, job in jobs.items() if known.split(".")[0] == number), None)


def walltime_s(job: dict[str, Any]) -> float | None:
    """A job's limit, seconds; None where it has none."""
    return _seconds(job, "Resource_List")


def start_s(job: dict[str, Any], now: float | None = None) -> float | None:
    """When a job began, seconds since the epoch; None where it has not.

    ``now`` is when the server said so, by default this moment.
    """
    latest = end_s(job, now) or now or time.time()
    return _time(job.get("stime"), latest - (_seconds(job, "resources_used") or 0.0))


def end_s(job: dict[str, Any], now: float | None = None) -> float | None:
    """When a job ended, seconds since the epoch; None where the server does not say."""
    return _time(job.get("obittime"), now or time.time())


def _time(text: str | None, latest: float) -> float | None:
    """The moment that a local time means; in autumn an hour's times come twice.

    Of two it is the last one that is not after ``latest``, give or take a minute.
    """
    try:
        local = datetime.strptime(text or "", "%a %b %d %H:%M:%S %Y")
    except ValueError:
        return None
    moments = sorted(local.replace(fold=fold).timestamp() for fold in (0, 1))
    return moments[1] if moments[1] <= latest + 60.0 else moments[0]


def _seconds(job: dict[str, Any], where: str) -> float | None:
    """A duration as PBS writes it: "04:00:00", or seconds."""
    text = str(job.get(where, {}).get("walltime", ""))
    try:
        return float(text) if text.isdecimal() else seconds_of(text)
    except ValueError:
        return None
