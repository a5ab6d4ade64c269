"""Small batch jobs for the tests of the providers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parsl.launchers import SimpleLauncher

from site_configs.support.records import BlockRecord


def wait_for(provider: Any, job_id: str, wanted: Callable[[BlockRecord], bool]) -> BlockRecord:
    """Look until the block is as wanted, for a minute at most."""
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        provider.look()
        if wanted(record := provider.record(job_id)):
            return record
        time.sleep(0.2)
    raise AssertionError(f"a minute passed and the block is still {provider.record(job_id)}")


def ended(record: BlockRecord) -> bool:
    return record.state == "ended"


def running(record: BlockRecord) -> bool:
    return record.state == "running"


def common(folder: Path, scheduler: Any, walltime_s: float = 60.0) -> dict[str, Any]:
    """Arguments that both kinds of provider take."""
    folder.mkdir(exist_ok=True)
    return {
        "pool": "cpu",
        "scheduler": scheduler,
        "walltime_s": walltime_s,
        "launcher": SimpleLauncher(),
        "init_blocks": 0,
        "max_blocks": 4,
    }
