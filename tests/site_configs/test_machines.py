"""The known machines: their batch scripts against the options that the centres document."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from orchestrator.sites import Site, batch_scripts, load_site

MACHINES = (
    "aurora",
    "frontier",
    "lumi",
    "perlmutter",
    "polaris",
    "university_pbs",
    "university_slurm",
)


def script(machine: str, pool: str, tmp_path: Path, more: str = "") -> str:
    """The script for a user whose file names the machine and an account, and no more."""
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "{machine}"\naccount = "chem42"\n{more}')
    return batch_scripts(load_site(str(path)))[pool]


def options(text: str) -> set[str]:
    return {line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("#SBATCH ")}


def pool_arguments(text: str) -> str:
    """The command that starts the worker pool."""
    return next(line for line in text.splitlines() if "orchestrator.worker_pool" in line)


def pbs_options(text: str) -> set[str]:
    return {line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("#PBS ")}


@pytest.mark.parametrize("machine", MACHINES)
def test_every_script_holds_what_any_block_needs(machine: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "{machine}"\naccount = "chem42"\n')
    site = load_site(str(path))
    scripts = batch_scripts(site)
    assert list(scripts) == list(site.pools())
    for pool, text in scripts.items():
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        assert "chem42" in text
        assert "BASIN_BLOCK_START=$(date +%s)" in text
        assert re.search(r"BASIN_BLOCK_WALLTIME_S=\d+", text)
        threads = re.search(r"BASIN_THREADS=(\d+) OMP_NUM_THREADS=(\d+)", text)
        assert threads is not None
        assert threads[1] == threads[2]
        if site.scheduler == "slurm":
            assert "no-requeue" in text
            assert "#SBATCH --mem=" in text
            assert f"#SBATCH --job-name=basin.{pool}." in text
        else:
            assert "#PBS -r n" in text
            assert re.search(r"#PBS -l select=\d+:ncpus=\d+:mem=\d+mb", text)
            assert f"#PBS -N basin.{pool}." in text


@pytest.mark.parametrize("machine", MACHINES)
def test_workers_are_pinned_to_cores_of_their_own(machine: str) -> None:
    site: Site = load_site(machine)
    assert site.settings is not None
    for executor in site.config.executors:
        if executor.label == "mpi":
            continue
        pool = site.settings.pools[executor.label]
        affinity = executor.cpu_affinity
        assert executor.max_workers_per_node * pool.threads_per_worker <= pool.cores
        if affinity == "block":
            continue
        kind, *ranks = affinity.split(":")
        assert kind == "list"
        assert len(ranks) == executor.max_workers_per_node
        seen: list[int] = []
        for rank in ranks:
            first, _, last = rank.partition("-")
            cores = list(range(int(first), int(last or first) + 1))
            assert len(cores) >= pool.threads_per_worker
            seen += cores
        assert len(seen) == len(set(seen))


def test_perlmutter(tmp_path: Path) -> None:
    cpu = script("perlmutter", "cpu", tmp_path)
    assert {"--constraint=cpu", "--qos=regular", "--account=chem42"} <= options(cpu)
    assert {"--nodes=2", "--cpus-per-task=256", "--exclusive"} <= options(cpu)
    assert not any(o.startswith("--partition") for o in options(cpu))
    assert "srun --ntasks 2" in cpu
    assert "--ntasks-per-node=1 --cpus-per-task=256" in cpu
    gpu = script("perlmutter", "gpu", tmp_path, '[pools.gpu]\naccount = "chem42_g"\n')
    assert {"--constraint=gpu", "--account=chem42_g", "--gpus-per-node=4"} <= options(gpu)
    assert "--cpus-per-task=128" in options(gpu)
    assert pool_arguments(gpu).endswith("--available-accelerators 0 1 2 3")
    assert 'export TMPDIR="$SCRATCH/basin-tmp"' in script("perlmutter", "cpu", tmp_path)


def test_frontier(tmp_path: Path) -> None:
    gpu = script("frontier", "gpu", tmp_path)
    assert {"--partition=batch", "--gpus-per-node=8", "--time=120"} <= options(gpu)
    assert "--cpus-per-task=56" in options(gpu), "8 of the 64 cores are the system's"
    assert "srun --ntasks 2" in gpu
    assert pool_arguments(gpu).endswith("--available-accelerators 0 1 2 3 4 5 6 7")
    # The user guide's table: GCD 0 lies at cores 48-55, GCD 4 at 0-7; the first is reserved.
    ranks = re.search(r"list:(\S+)", pool_arguments(gpu))
    assert ranks is not None
    assert ranks[1].split(":")[0] == "49-55"
    assert ranks[1].split(":")[4] == "1-7"


def test_lumi(tmp_path: Path) -> None:
    assert "--partition=standard" in options(script("lumi", "cpu", tmp_path))
    gpu = script("lumi", "gpu", tmp_path)
    assert {"--partition=standard-g", "--gpus-per-node=8"} <= options(gpu)
    # The centre's own mask 7e000000000000 for GCD 0 is cores 49 to 54, and so on.
    masks = ["7e000000000000", "7e00000000000000", "7e0000", "7e000000"]
    masks += ["7e", "7e00", "7e00000000", "7e0000000000"]
    ranks = re.search(r"list:(\S+)", pool_arguments(gpu))
    assert ranks is not None
    for mask, rank in zip(masks, ranks[1].split(":"), strict=True):
        first, last = (int(core) for core in rank.split("-"))
        assert int(mask, 16) == sum(1 << core for core in range(first, last + 1))


def test_polaris(tmp_path: Path) -> None:
    cpu = script("polaris", "cpu", tmp_path)
    assert "-l filesystems=home:eagle" in pbs_options(cpu)
    assert "-l place=scatter" in pbs_options(cpu)
    assert "-l walltime=03:00:00" in pbs_options(cpu)
    (select,) = (o for o in pbs_options(cpu) if o.startswith("-l select"))
    assert re.fullmatch(r"-l select=10:ncpus=64:mem=\d+mb:system=polaris", select)
    assert "mpiexec --cpu-bind none --ppn 1 --depth 64 -n $WORKERCOUNT --hostfile" in cpu
    assert "-q prod" in cpu.splitlines()[-1]
    assert "-A chem42" in cpu.splitlines()[-1]
    gpu = script("polaris", "gpu", tmp_path)
    assert pool_arguments(gpu).endswith("--available-accelerators 0 1 2 3")
    assert "list:24-31:16-23:8-15:0-7" in gpu


def test_aurora(tmp_path: Path) -> None:
    gpu = script("aurora", "gpu", tmp_path)
    assert "-l filesystems=home:flare" in pbs_options(gpu)
    arguments = pool_arguments(gpu)
    assert "--max_workers_per_node=12" in arguments
    assert arguments.endswith("0.0 0.1 1.0 1.1 2.0 2.1 3.0 3.1 4.0 4.1 5.0 5.1")
    for pool in ("cpu", "gpu"):
        ranks = re.search(r"list:(\S+)", pool_arguments(script("aurora", pool, tmp_path)))
        assert ranks is not None
        firsts = {int(rank.split("-")[0]) for rank in ranks[1].split(":")}
        assert firsts.isdisjoint({0, 52}), "these are reserved for the system"


def test_universities(tmp_path: Path) -> None:
    gpu = script("university_slurm", "gpu", tmp_path)
    assert {"--gres=gpu:2", "--mem=61440M", "--cpus-per-task=8"} <= options(gpu)
    assert "--exclusive" not in options(gpu)
    gpu = script("university_pbs", "gpu", tmp_path)
    assert "-l select=1:ncpus=8:mem=61440mb:ngpus=2" in pbs_options(gpu)
    mpi = script("university_pbs", "mpi", tmp_path)
    assert "-l select=2:ncpus=32:mem=122880mb:mpiprocs=32" in pbs_options(mpi)
    site = load_site("university_slurm")
    assert site.resource_specification("mpi") == {"num_nodes": 2, "ranks_per_node": 32}
    assert site.resource_specification("cpu") == {}
    assert site.pools()["mpi"] == 4, "one program a block, four blocks"
