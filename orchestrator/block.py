"""The batch job that this process runs in: where, until when, with which devices and memory."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from site_configs.support.pbs_jobs import find_job, parse_jobs, start_s, walltime_s
from site_configs.support.records import seconds_of

# Said by the batch script, and by the worker pool to its workers.
START: Final = "BASIN_BLOCK_START"
WALLTIME: Final = "BASIN_BLOCK_WALLTIME_S"
END: Final = "BASIN_BLOCK_END"
DEVICES: Final = "BASIN_BLOCK_DEVICES"

_ASK_LIMIT_S: Final = 20.0
# Before its end a block stops its running items, which save their state and seal their rows.
_STOP_S: Final = (15.0, 120.0)
_STOP_SHARE: Final = 0.12
# And before that it takes no more bundles, so that it ends by itself.
_DRAIN_S: Final = 30.0
_DRAIN_SHARE: Final = 0.25
AMD_DRIVER: Final = "/dev/kfd"
_VISIBLE: Final = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def node_name() -> str:
    """Return the node's name as the scheduler knows it, else the host's without its domain."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def node_file(name: str) -> Path:
    """Return the path of a file of this node's own, in memory where that can be."""
    shared = Path("/dev/shm")
    folder = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"basin-{os.getuid()}-{name}"


def memory() -> int:
    """Return the bytes of memory that processes here may use together: the node's, or the job's."""
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_control_groups()]
    # In MiB; 0 stands for all of a node's.
    if (asked := _told("SLURM_MEM_PER_NODE")) is not None and asked > 0:
        known.append(int(asked * 2**20))
    return min(known)


def _control_groups() -> Iterator[int]:
    """Yield the limits that control groups set to this process's memory, in either version."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", kinds)
        file = "memory.limit_in_bytes" if kinds else "memory.max"
        group = root / name.lstrip("/")
        for place in (group, *group.parents):
            try:
                yield int((place / file).read_text())
            except (OSError, ValueError):
                continue  # none here, or "max"


def block_end() -> float | None:
    """Return when the batch job around this process ends (epoch, s); None outside of one.

    Asks the scheduler once, where nothing in the environment tells.
    """
    return _told(END) or _told("SLURM_JOB_END_TIME") or _asked() or _computed()


def block_start() -> float | None:
    """Return when the batch job began (epoch, s), where its script says so."""
    return _told(START)


def _told(name: str) -> float | None:
    try:
        return float(os.environ[name])
    except (KeyError, ValueError):
        return None


def _computed() -> float | None:
    start, walltime = _told(START), _told(WALLTIME)
    return start + walltime if start and walltime else None


def _asked() -> float | None:
    # On each of a block's many nodes at once, a question would be a storm of questions.
    if os.environ.get("SLURM_NODEID", "0") != "0" and _computed():
        return None
    if job := os.environ.get("SLURM_JOB_ID"):
        return _slurm_end(_answer(["squeue", "--noheader", "--jobs", job, "--format", "%L"]))
    if job := os.environ.get("PBS_JOBID"):
        return _pbs_end(_answer(["qstat", "-f", "-F", "json", job]), job)
    return None


def _answer(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _slurm_end(left: str) -> float | None:
    try:
        return time.time() + seconds_of(left)
    except ValueError:
        return None  # "UNLIMITED", or no answer


def _pbs_end(text: str, job_id: str) -> float | None:
    job = find_job(parse_jobs(text) or {}, job_id) or {}
    start, walltime = start_s(job), walltime_s(job)
    return start + walltime if start and walltime else None


def stop_margin(walltime_s: float) -> float:
    """Return how long (s) before a block's end its running items are told to stop."""
    low, high = _STOP_S
    return min(max(low, min(high, 0.02 * walltime_s)), _STOP_SHARE * walltime_s)


def drain_margin(walltime_s: float, bundle_time_s: float) -> float:
    """Return how long (s) before its end a block takes no more bundles."""
    wanted = stop_margin(walltime_s) + max(_DRAIN_S, 1.5 * bundle_time_s)
    return min(wanted, _DRAIN_SHARE * walltime_s)


def stop_time() -> float | None:
    """Return when the running items of this block are to stop (epoch, s); None for never."""
    end = _told(END)
    return None if end is None else end - stop_margin(whole_walltime(end))


def cut_time() -> float | None:
    """Return when what did not stop by itself is broken off (epoch, s); None for never."""
    end = _told(END)
    return None if end is None else end - stop_margin(whole_walltime(end)) / 2


def driver_drain_time() -> float | None:
    """Return when a driver in a batch job has to drain (epoch, s); None outside of one."""
    end = block_end()
    return None if end is None else end - drain_margin(whole_walltime(end), 0.0)


def whole_walltime(end: float) -> float:
    """Return the length (s) of a block that ends then; what is left of it, where not known."""
    start = block_start()
    return end - start if start and start < end else max(end - time.time(), 1.0)


def own_devices(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the device variables of a worker, numbered as its batch job numbers the devices.

    Parsl counts a worker's device from 0; a scheduler that gives a job the third device of a
    node, and does not hide the others, says so in a list that Parsl overwrites.
    """
    found: dict[str, str] = {}
    given = dict(part.split("=", 1) for part in environment.get(DEVICES, "").split() if part)
    for name in _VISIBLE:
        devices = given.get(name, "").split(",")
        mine = environment.get(name, "")
        if devices != [""] and mine.isdecimal() and int(mine) < len(devices):
            found[name] = devices[int(mine)]
    if "ROCR_VISIBLE_DEVICES" in environment and os.path.exists(AMD_DRIVER):
        # ROCm numbers anew what ROCR leaves visible, and takes this one to be its own as well.
        found["CUDA_VISIBLE_DEVICES"] = "0"
    return found


def given_devices(environment: Mapping[str, str]) -> str:
    """Return what `own_devices` wants to know of a batch job's own environment."""
    return " ".join(f"{name}={environment[name]}" for name in _VISIBLE if environment.get(name))
