"""What the driver tells everybody: ``control/progress.json`` of a store.

Written whole every few seconds while a driver runs, and once more at its end; readable from any
host that sees the store. The next driver learns from it which blocks the last one left behind,
which nodes were bad, and how many node-hours were used.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.counts import StageCounts
from orchestrator.shard import write_whole
from site_configs.support.records import NOT_SUBMITTED


@dataclass(slots=True)
class ProgressFile:
    """How a run stands, or how the last one ended.

    ``site``: name, or absolute path of its file; ``digest``: of the molecule files planned;
    ``plan``: of the stages (`tally.plan_digest`);
    ``blocks``: one dictionary a batch job, with ``pool``, ``block``, ``job_id``, ``state``
    (pending, running, ended), ``reason``, ``words``, ``nodes``, ``start_s``, ``end_s`` (epoch, s)
    and ``n_nodes``; ``bad_nodes``: names with the reason in words; ``node_hours``: of all runs so
    far; ``rate``: tasks per second of this run; ``left_s``: estimated seconds to the end;
    ``workers``: connected now; ``ended``: whether the driver has left in good order.
    """

    run_id: str = ""
    site: str = ""
    time_s: float = 0.0
    digest: str = ""
    plan: str = ""
    plan_complete: bool = False
    entries: int = 0
    bad_entries: int = 0
    stages: list[StageCounts] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    bad_nodes: dict[str, str] = field(default_factory=dict)
    node_hours: float = 0.0
    rate: float = 0.0
    left_s: float | None = None
    workers: int = 0
    draining: bool = False
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    ended: bool = False

    @property
    def alive(self) -> list[dict[str, Any]]:
        """Blocks that the scheduler had taken, and that had not ended when this was written."""
        return [
            block
            for block in self.blocks
            if block.get("state") != "ended"
            and not str(block.get("job_id") or NOT_SUBMITTED).startswith(NOT_SUBMITTED)
        ]


def progress_path(store: Path) -> Path:
    """Return where a store's progress stands."""
    return store / "control" / "progress.json"


def write(store: Path, progress: ProgressFile) -> None:
    """Put the progress in place whole; raises StoreError where it cannot be written."""
    write_whole(progress_path(store), json.dumps(asdict(progress)).encode())


def read(store: Path) -> ProgressFile | None:
    """Return what the present or last driver wrote; None where there is nothing to be read."""
    try:
        content: dict[str, Any] = json.loads(progress_path(store).read_text())
        names = {f.name for f in dataclasses.fields(ProgressFile)}
        found = ProgressFile(**{k: v for k, v in content.items() if k in names})
        found.stages = [StageCounts(**stage) for stage in content.get("stages", [])]
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return found
