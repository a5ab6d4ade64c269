"""The user's site file: five lines are enough, and every slip is named with its remedy."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from orchestrator.errors import SiteError
from orchestrator.sites import batch_scripts, load_site
from site_configs.support.settings import DriverJob, PoolSettings, SiteSettings
from tests.site_configs import fake_pbs

JOBS = Path(__file__).parents[2] / "jobs"


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def refusal(folder: Path, text: str) -> list[str]:
    with pytest.raises(SiteError) as caught:
        load_site(write(folder, text))
    return [line.removeprefix(f"{folder}/") for line in str(caught.value).splitlines()]


FIVE = """base = "slurm"
account = "chem"
[pools.cpu]
partition = "normal"
cores_per_node = 48
"""


def test_five_lines(tmp_path: Path) -> None:
    site = load_site(write(tmp_path, FIVE))
    assert site.name == str(tmp_path / "mine.toml")
    assert site.pools() == {"cpu": 4 * 48}
    assert site.nodes() == {"cpu": 4}
    assert site.workers_per_node() == {"cpu": 48}
    assert site.walltime_s() == {"cpu": 4 * 3600.0}
    assert site.scheduler == "slurm"
    text = batch_scripts(site)["cpu"]
    for line in ("--partition=normal", "--account=chem", "--cpus-per-task=48", "--mem=0"):
        assert f"#SBATCH {line}" in text
    assert "--cpu-affinity block" in text
    assert "--max_workers_per_node=48" in text
    (executor,) = site.config.executors
    assert executor.encrypted
    assert executor.prefetch_capacity == 0
    assert site.config.max_idletime == 30.0
    assert executor.provider.init_blocks == executor.provider.min_blocks == 0


def test_top_pool_and_machine_in_that_order(tmp_path: Path) -> None:
    text = """base = "perlmutter"
account = "m1"
walltime = "30 min"
[pools.gpu]
account = "m1_g"
max_blocks = 7
[driver]
walltime = "2 h"
"""
    site = load_site(write(tmp_path, text))
    assert site.settings is not None
    pools = site.settings.pools
    assert list(pools) == ["cpu", "dft", "gpu"]
    assert {pool.walltime for pool in pools.values()} == {1800.0}
    assert [pool.account for pool in pools.values()] == ["m1", "m1", "m1_g"]
    assert pools["gpu"].max_blocks == 7
    assert pools["gpu"].gpus_per_node == 4
    assert site.driver is not None
    assert site.driver.account == "m1"
    assert site.driver.walltime == 7200.0
    assert "export PATH=" in site.driver.worker_init


def test_every_slip_is_named(tmp_path: Path) -> None:
    found = refusal(
        tmp_path,
        """base = "slurm"
acount = "chem"
[pools.cpu]
partion = "normal"
walltime = "4 hh"
cores_per_node = "48"
max_blocks = 0
queue = "workq"
[driver]
memory = "2 h"
""",
    )
    assert found[0].startswith("7 problems in ") or found[0].startswith("6 problems in ")
    rest = "\n".join(found[1:])
    assert 'mine.toml:2: acount = "chem": unknown key; did you mean "account"?' in rest
    assert (
        'mine.toml:4: [pools.cpu] partion = "normal": unknown key; did you mean "partition"?'
        in rest
    )
    assert 'mine.toml:5: [pools.cpu] walltime = "4 hh": has the unknown unit "hh"' in rest
    assert 'mine.toml:6: [pools.cpu] cores_per_node = "48": must be a whole number' in rest
    assert "mine.toml:7: [pools.cpu] max_blocks = 0: must be at least 1" in rest
    assert 'mine.toml:10: [driver] memory = "2 h": is a time, and a memory size is needed' in rest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "base is missing; write base ="),
        (
            'base = "slrm"\n',
            'mine.toml:1: base = "slrm": is not a known machine; did you mean "slurm"?',
        ),
        ('base = "slurm"\nqueue = "q"\n', "mine.toml:2: queue"),
        ('base = "pbs"\n[pools.cpu]\nqos = "q"\n', "mine.toml:3: [pools.cpu] qos"),
        (
            'base = "slurm"\n[pools.mpi]\nnodes_per_block = 3\nnodes_per_task = 2\n',
            "does not divide",
        ),
        ('base = "slurm"\n[pools.a]\nnodes_per_block = 3\nlauncher = "single"\n', "leave it out"),
        ('base = "slurm"\n[pools.a]\nlauncher = "sruun"\n', 'did you mean "srun"?'),
        ('base = "pbs"\n[pools.a]\nlauncher = "srun"\n', "is SLURM's"),
        ('base = "slurm"\naccount = "a; rm -rf ~"\n', "mine.toml:2: account"),
        ('base = "slurm"\n[pools.a]\nwalltime = "20 s"\n', "must be at least 1 min"),
        ('base = "slurm"\n[pool.cpu]\npartition = "x"\n', 'did you mean "pools"?'),
        ('base = "slurm"\n[pools.cpu\n', "not valid TOML"),
    ],
)
def test_refusals(tmp_path: Path, text: str, words: str) -> None:
    assert words in "\n".join(refusal(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="there is no such file"):
        load_site(str(tmp_path / "absent.toml"))


def test_the_environment_sets_a_generic_site(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("ACCOUNT", "chem"),
        ("PARTITION", "debug"),
        ("WALLTIME", "30 min"),
        ("CORES_PER_NODE", "12"),
    ):
        monkeypatch.setenv(f"BASIN_{name}", value)
    text = batch_scripts(load_site("slurm"))["cpu"]
    for line in ("--partition=debug", "--account=chem", "--cpus-per-task=12", "--time=30"):
        assert f"#SBATCH {line}" in text
    assert "-q debug -A chem" in batch_scripts(load_site("pbs"))["cpu"]
    monkeypatch.setenv("BASIN_WALLTIME", "half an hour")
    with pytest.raises(SiteError, match="environment: walltime"):
        load_site("slurm")


def test_cores_and_memory_come_from_the_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 'base = "pbs"\n')
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SiteError) as caught:
        load_site(path)
    assert "pbsnodes does not say how many cores" in str(caught.value)
    assert "cores_per_node = 64" in str(caught.value)
    binaries = fake_pbs.install(tmp_path / "pbs", ncpus=16)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}/usr/bin:/bin")
    text = batch_scripts(load_site(path))["cpu"]
    megabytes = int(0.95 * 24684092 * 2**10) // 2**20
    assert f"#PBS -l select=1:ncpus=16:mem={megabytes}mb" in text


def test_cores_come_from_a_real_slurm(slurm_cluster: object, tmp_path: Path) -> None:
    site = load_site(write(tmp_path, 'base = "slurm"\nexclusive = false\npartition = "cpu"\n'))
    assert site.workers_per_node() == {"cpu": 2}


def test_what_sinfo_says_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two kinds of node, hyperthreads counted as CPUs, less than 2 GB of memory a core.
    program = tmp_path / "sinfo"
    program.write_text("#!/bin/sh\necho '128|2|32|256000|old'\necho '64|2|16+|8000+|short*'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    text = batch_scripts(load_site(write(tmp_path, 'base = "slurm"\nexclusive = false\n')))["cpu"]
    assert "#SBATCH --cpus-per-task=64" in text
    assert "#SBATCH --mem=7600M" in text
    assert "--max_workers_per_node=32" in text


@pytest.mark.parametrize("name", ["site_slurm", "site_pbs"])
def test_the_examples_load(name: str) -> None:
    site = load_site(str(JOBS / f"{name}.toml"))
    assert set(batch_scripts(site)) == set(site.pools())


def test_the_examples_hold_every_setting() -> None:
    text = "".join((JOBS / f"site_{name}.toml").read_text() for name in ("slurm", "pbs"))
    settings = {"base", *SiteSettings.model_fields, *PoolSettings.model_fields}
    settings |= set(DriverJob.model_fields)
    missing = [
        name
        for name in settings - {"scheduler", "pools", "driver"}
        if not re.search(rf"^(# )?{name} = ", text, re.MULTILINE)
    ]
    assert missing == []
