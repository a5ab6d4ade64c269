"""What Linux tells of processes by their numbers."""

from __future__ import annotations

from pathlib import Path


def stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; none when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def started(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None when it is gone."""
    fields = stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None
