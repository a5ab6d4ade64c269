"""Replica exchange as a stage of a campaign: MPI programs over the nodes of a SLURM block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import SlurmCluster
from tests.orchestrator.run_fixtures import (
    by_key,
    complete,
    running,
    standing_of,
    store_of,
    write_campaign,
)

pytestmark = pytest.mark.slow

# What needs no MPI runs on the third node: the program waits for the other two.
SITE = """
base = "slurm"
address = "127.0.0.1"
poll_every = "1 s"
heartbeat_every = "2 s"
heartbeat_limit = "15 s"
idle_limit = "5 s"
walltime = "5 min"
memory_per_node = "2 GB"
exclusive = false
pin = false
[pools.cpu]
partition = "gpu"
max_blocks = 1
cores_per_node = 1
[pools.mpi]
partition = "cpu"
max_blocks = 1
nodes_per_block = 2
nodes_per_task = 2
ranks_per_node = 2
mpi_launcher = "mpiexec"
"""
STAGES = """
[[stages]]
kernel = "embed"
[[stages]]
kernel = "mmff"
[[stages]]
name = "exchange"
kernel = "replica_exchange"
temperatures = [50, 100, 170, 260, 400]
steps = 200
swap_every = 5
pool = "{pool}"
"""


def test_a_ladder_over_two_nodes_is_that_of_one_process(
    slurm_cluster: SlurmCluster, require_engine: Callable[[str], None], tmp_path: Path
) -> None:
    require_engine("mpi")
    require_engine("tblite")
    (tmp_path / "site.toml").write_text(SITE)
    over_nodes, alone = (
        write_campaign(tmp_path / pool, ["CO", "CCO"], stages=STAGES.format(pool=pool))
        for pool in ("mpi", "cpu")
    )
    with running(over_nodes, f"--site={tmp_path / 'site.toml'}", workers=None) as run:
        complete(alone, workers=1)
        assert run.wait(120) == 0, run.output() + slurm_cluster.words()
        slurm_cluster.assert_empty()
        run.assert_gone()
    assert [c.ok for c in standing_of(over_nodes).counts] == [2] * 3
    times = ["cpu_s", "wall_s"]
    mine, theirs = (by_key(store_of(c), "chains", times) for c in (over_nodes, alone))
    assert len(mine) == 10
    assert mine == theirs
    tasks = [t for t in by_key(store_of(over_nodes), "tasks").values() if t["stage"] == "exchange"]
    assert {t["attempts"][0] for t in tasks} == {1}
    assert len({t["block"] for t in tasks}) == 1
    # As many chains swapped alike, over four processes and in one.
    times += ["n_processes", "efficiency"]
    assert by_key(store_of(over_nodes), "exchanges", times) == by_key(
        store_of(alone), "exchanges", times
    )
    processes = [set(store_of(c).read("exchanges")["n_processes"]) for c in (over_nodes, alone)]
    assert processes == [{4}, {1}]
    assert not [f for f in (store_of(over_nodes).path / "checkpoints").rglob("*") if f.is_file()]
