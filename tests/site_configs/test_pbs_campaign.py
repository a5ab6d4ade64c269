"""A whole campaign over a PBS server, in the bare environment that PBS gives jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.store import open_store
from tests.site_configs import fake_pbs

SITE = """
base = "pbs"
account = "chem"
poll_every = "1 s"
heartbeat_every = "2 s"
heartbeat_limit = "10 s"
address = "127.0.0.1"
[pools.cpu]
queue = "workq"
walltime = "5 min"
max_blocks = 2
memory_per_node = "500 MB"
"""
CAMPAIGN = """
name = "c"
[molecules]
files = ["some.smi"]
[[stages]]
kernel = "embed"
"""


@pytest.mark.slow
@pytest.mark.parametrize("history", [True, False])
def test_a_campaign_on_pbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: bool) -> None:
    binaries = fake_pbs.install(tmp_path / "pbs", history=history)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.toml").write_text(SITE)
    (tmp_path / "c.toml").write_text(CAMPAIGN)
    (tmp_path / "some.smi").write_text("".join(f"{'C' * n}O c{n}\n" for n in range(1, 13)))
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "run", "c.toml", "--site", "my.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = open_store(tmp_path / "c.basin").snapshot().task_index()
    assert len(rows) == 12
    log = (tmp_path / "pbs" / "log").read_text().splitlines()
    submitted = [line for line in log if line.startswith("qsub")]
    assert 1 <= len(submitted) <= 2, "no block was taken for ended while it ran"
    left = subprocess.run(["qstat"], capture_output=True, text=True, check=True).stdout
    assert left.count("\n") == 2, "the queue is empty when the command returns"
