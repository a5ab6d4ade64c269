"""The pool `mpi` on a real SLURM: programs over the nodes of a block, by either launcher."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SITE = """
base = "slurm"
poll_every = "1 s"
[pools.mpi]
partition = "cpu"
walltime = "5 min"
max_blocks = 1
nodes_per_block = 2
nodes_per_task = 2
ranks_per_node = 2
memory_per_node = "1 GB"
"""
# Four ranks on two nodes: 1 + 2 + 3 + 4.
PROGRAM = (
    "from mpi4py import MPI; c = MPI.COMM_WORLD; total = c.allreduce(c.rank + 1); "
    "c.rank or print('total', total, 'of', c.size)"
)
DRIVER = f"""
import parsl, sys
from pathlib import Path
from orchestrator.sites import load_site, prepare

site = load_site(sys.argv[1])
prepare(site, Path(sys.argv[2]))

@parsl.python_app
def program(parsl_resource_specification):
    import os, subprocess, sys
    command = os.environ["PARSL_MPI_PREFIX"].split() + [sys.executable, "-c", {PROGRAM!r}]
    return subprocess.run(command, capture_output=True, text=True).stdout

with parsl.load(site.config):
    wanted = site.resource_specification("mpi")
    print(program(parsl_resource_specification=wanted).result(timeout=90))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    ['mpi_launcher = "mpiexec"', 'mpi_launcher = "srun"\nlauncher_options = "--mpi=pmi2"'],
)
def test_a_program_over_two_nodes(
    slurm_cluster: object,
    require_engine: Callable[[str], None],
    tmp_path: Path,
    launcher: str,
) -> None:
    require_engine("mpi")
    (tmp_path / "my.toml").write_text(f"{SITE}{launcher}\n")
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "driver.py", "my.toml", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.stdout.split("\n")[0] == "total 10 of 4", done.stdout + done.stderr
    left = subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout
    assert left == ""
