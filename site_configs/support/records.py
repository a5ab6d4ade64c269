"""What a batch system says of one block (one job that carries workers), in a form that lasts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

State: TypeAlias = Literal["pending", "running", "ended"]
Reason: TypeAlias = Literal[
    "",  # alive
    "completed",
    "walltime",
    "cancelled",
    "memory",
    "node",
    "preempted",
    "avoided",
    "failed",
    "unknown",
]


# A block that the scheduler has not taken yet is known by an id that begins so.
NOT_SUBMITTED: Final = "waiting-"


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """The latest that is known of a block; times are seconds since the epoch.

    ``reason`` says why it ended, ``words`` is one sentence for the user (while it waits: why, in
    the scheduler's words). ``end_s`` is the latest possible end while the block lives.
    """

    job_id: str
    pool: str
    state: State = "pending"
    reason: Reason = ""
    words: str = ""
    nodes: tuple[str, ...] = ()
    start_s: float | None = None
    end_s: float | None = None
    n_nodes: int = 1


def clock(seconds: float) -> str:
    """A walltime in words: "4 h", "1 h 30 min", "20 s"."""
    whole = round(seconds)
    parts = [(whole // 3600, "h"), (whole % 3600 // 60, "min"), (whole % 60, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "0 s"


def walltime_text(seconds: float) -> str:
    """A walltime as batch systems take it: HH:MM:SS."""
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def slurm_path(path: str) -> str:
    """A path as SLURM's `--output` takes it, which replaces "%j" and the like."""
    return path.replace("%", "%%")


def seconds_of(walltime: str) -> float:
    """Seconds of D-HH:MM:SS, HH:MM:SS or MM:SS; raises ValueError for anything else."""
    days, _, clock_time = walltime.rpartition("-")
    parts = [int(part) for part in clock_time.split(":")]
    if not 2 <= len(parts) <= 3:
        raise ValueError(f"{walltime!r} is no walltime")
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + part
    return float(86400 * int(days or 0) + seconds)


_ENDS: dict[str, str] = {
    "completed": "ended by itself",
    "walltime": "reached its walltime",
    "cancelled": "was cancelled",
    "memory": "was killed for memory",
    "node": "was lost with its node",
    "preempted": "made way for a job of higher priority",
    "avoided": "ended at once, since a node of it is set aside",
    "failed": "failed",
    "unknown": "is no longer known to the scheduler",
}


def in_words(
    job_id: str, reason: Reason, nodes: tuple[str, ...], walltime_s: float | None, detail: str = ""
) -> str:
    """One sentence on how a job ended, such as "job 4711 reached its walltime of 4 h on n1"."""
    text = f"job {job_id} {_ENDS[reason]}"
    if reason == "walltime" and walltime_s:
        text += f" of {clock(walltime_s)}"
    if nodes:
        text += f" {nodes[0]}" if reason == "node" else f" on {nodes[0]}"
        text += f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return f"{text} ({detail})" if detail else text
