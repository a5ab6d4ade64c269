"""A node where everything crashes is set aside, and what failed there is computed elsewhere."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from orchestrator import progress
from tests.cluster.disturbances import write_site
from tests.cluster.slurm_cluster import SlurmCluster
from tests.orchestrator.run_fixtures import (
    assert_no_key_twice_in_segments,
    by_key,
    running,
    standing_of,
    store_of,
    write_campaign,
)

pytestmark = pytest.mark.slow

# Found by the kernel processes of node n1 only.
_SPOILER = """\
import os
import sys

if "orchestrator.child" in sys.orig_argv and os.environ.get("SLURMD_NODENAME") == "n1":
    from orchestrator import kernel_calls

    kernel_calls._KERNELS["rehearse"] = lambda *_: os.kill(os.getpid(), 11)
"""
ITEMS = 200


def test_a_node_where_all_crashes_is_set_aside_and_nothing_failed_in_the_end(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spoiler").mkdir()
    (tmp_path / "spoiler" / "sitecustomize.py").write_text(_SPOILER)
    path = [str(tmp_path / "spoiler"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    campaign = write_campaign(
        tmp_path,
        ["C" * n for n in range(1, ITEMS + 1)],
        stages='[[stages]]\nkernel = "rehearse"\nseconds = "0.3 s"\n'
        '[[stages]]\nname = "after"\nkernel = "rehearse"\nseconds = "1 ms"\n',
        run='bundle_time = "2 s"\nseal_every = "1 s"',
    )
    with running(campaign, f"--site={write_site(tmp_path)}") as run:
        assert run.wait(240) == 0, run.output()
        end = run.end()
    assert list(end["bad_nodes"]) == ["n1"]
    assert any("node n1 is set aside" in note for note in end["notes"])
    assert all(c.ok == ITEMS for c in standing_of(campaign).counts)
    store = store_of(campaign)
    tasks = by_key(store, "tasks").values()
    assert Counter((row["status"], row["host"]) for row in tasks) == {("ok", "n2"): len(tasks)}
    assert_no_key_twice_in_segments(store)
    told = progress.read(store.path)
    assert told is not None
    assert told.ended
    assert list(told.bad_nodes) == ["n1"]
    assert all(block["state"] == "ended" for block in told.blocks)
    assert not slurm_cluster.running()
