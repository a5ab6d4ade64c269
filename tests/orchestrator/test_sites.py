"""Sites: the project's, a user's own, and what is said of one that is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import SiteError, StoreError
from orchestrator.sites import batch_scripts, known_sites, load_site, require_plain_path

HTEX = """
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider, PBSProProvider, SlurmProvider
from parsl.launchers import SrunLauncher, MpiExecLauncher
"""
SLURM = f"""{HTEX}
config = Config(executors=[HighThroughputExecutor(
    label="cpu", address="127.0.0.1", max_workers_per_node=40,
    provider=SlurmProvider(
        partition="standard", account="chem0042", walltime="03:30:00", nodes_per_block=4,
        max_blocks=5, init_blocks=0, exclusive=True, scheduler_options="#SBATCH --qos=night",
        worker_init="module load basin/1\\nexport OMP_NUM_THREADS=1", launcher=SrunLauncher(),
    ),
)])
"""
PBS = f"""{HTEX}
config = Config(executors=[
    HighThroughputExecutor(
        label="cpu", address="127.0.0.1", max_workers_per_node=32,
        provider=PBSProProvider(
            queue="small", account="e42-relax", walltime="12:00:00", nodes_per_block=2,
            cpus_per_node=128, select_options="mpiprocs=128", init_blocks=0, max_blocks=3,
            worker_init="module load basin/1", launcher=MpiExecLauncher(),
        ),
    ),
    HighThroughputExecutor(
        label="here", address="127.0.0.1", max_workers_per_node=1,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
    ),
])
"""
MAKE = f"""{HTEX}
def make_config(workers=2):
    return Config(executors=[HighThroughputExecutor(
        label="mine", address="127.0.0.1", max_workers_per_node=workers,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
    )])
"""


def site_file(folder: Path, text: str, name: str = "my_site.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(name: str | Path, workers: int | None = None) -> str:
    with pytest.raises(SiteError) as caught:
        load_site(str(name), workers=workers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- working sites ----------------------------------------------------------------------------


def test_a_file_with_a_config(tmp_path: Path) -> None:
    path = site_file(tmp_path, SLURM)
    site = load_site(str(path))
    assert site.name == str(path)
    assert site.pools() == {"cpu": 40 * 4 * 5}
    site.require_pools({"cpu"})


def test_a_file_with_make_config(tmp_path: Path) -> None:
    path = site_file(tmp_path, MAKE)
    assert load_site(str(path)).pools() == {"mine": 2}
    assert load_site(str(path), workers=9).pools() == {"mine": 9}
    bare = site_file(tmp_path, MAKE.replace("workers=2", "workers"), "a.py")
    assert load_site(str(bare), workers=3).pools() == {"mine": 3}
    without = site_file(tmp_path, MAKE.replace("workers=2", "").replace("=workers", "=4"), "b.py")
    assert load_site(str(without)).pools() == {"mine": 4}
    assert "takes no `workers`" in refusal(without, workers=3)


def test_the_projects_own_sites_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"local", "slurm", "pbs"} <= set(known_sites())
    assert "support" not in known_sites()
    for name in known_sites():
        if name in ("slurm", "pbs"):
            monkeypatch.setenv("BASIN_CORES_PER_NODE", "8")
        else:
            monkeypatch.delenv("BASIN_CORES_PER_NODE", raising=False)
        assert load_site(name).pools()


# --- broken ones ------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    message = refusal("archer3")
    assert "archer3" in message
    assert ", ".join(known_sites()) in message
    assert ".py" in message
    assert "no such file" in refusal(tmp_path / "absent.py")
    assert "no such site" in refusal(tmp_path)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("import parsl\nconfig = (\n", 2, "SyntaxError: '(' was never closed"),
        ("a = 1\n\nb = a / 0\n", 3, "ZeroDivisionError"),
        ("import parsl\nimport no_such_module_here\n", 2, "No module named 'no_such_module_here'"),
        ("import os\nhost = os.environ['NO_SUCH_VARIABLE']\n", 2, "NO_SUCH_VARIABLE"),
        ("import sys\nsys.exit('not on this machine')\n", 2, "not on this machine"),
        ("def f():\n    raise OSError('down')\nf()\n", 2, "down"),
        (
            f"{HTEX}\nconfig = Config(executors=[HighThroughputExecutor(\n    lable='cpu')])\n",
            7,
            "lable",
        ),
        ("\ndef make_config():\n    return undefined_name\n", 3, "undefined_name"),
        ("import sys\ndef make_config():\n    sys.exit(1)\n", 3, "SystemExit"),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    line: int,
    words: str,
    relative: bool,
) -> None:
    path = site_file(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    message = refusal(path.name if relative else path)
    assert f"{path}, line {line}" in message
    assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither `config` (a parsl Config) nor `make_config()`"),
        ("config = None\n", "neither `config`"),
        ("config = {'executors': []}\n", "its config is a dict, not a parsl.config.Config"),
        ("def make_config():\n    return 3\n", "its config is a int, not"),
        ("def make_config():\n    pass\n", "neither `config`"),
        (
            "from parsl.config import Config\nfrom parsl.executors import ThreadPoolExecutor\n"
            "config = Config(executors=[ThreadPoolExecutor(label='cpu')])\n",
            "pool 'cpu' is a ThreadPoolExecutor",
        ),
    ],
)
def test_a_file_without_a_usable_config(tmp_path: Path, text: str, words: str) -> None:
    path = site_file(tmp_path, text)
    message = refusal(path)
    assert str(path) in message
    assert words in message


def test_workers_for_a_finished_config(tmp_path: Path) -> None:
    assert "set its workers there" in refusal(site_file(tmp_path, SLURM), workers=4)


def test_a_missing_pool_is_named_with_those_there(tmp_path: Path) -> None:
    site = load_site(str(site_file(tmp_path, PBS)))
    with pytest.raises(SiteError) as caught:
        site.require_pools({"cpu", "gpu"})
    assert "no pool 'gpu'" in str(caught.value)
    assert "cpu, here" in str(caught.value)


# --- batch scripts ----------------------------------------------------------------------------


@pytest.fixture
def no_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a scheduler on PATH that leaves a mark when it is asked for anything."""
    folder = tmp_path / "scheduler"
    folder.mkdir()
    mark = tmp_path / "submitted"
    for name in ("sbatch", "qsub", "squeue", "qstat"):
        program = folder / name
        program.write_text(f"#!/bin/sh\necho {name} >> '{mark}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return mark


def assert_runs_workers(script: str) -> None:
    assert "python3 -m orchestrator.worker_pool " in script
    assert "module load basin/1" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
    assert checked.returncode == 0


def test_the_slurm_script_is_the_one_parsl_would_submit(tmp_path: Path, no_scheduler: Path) -> None:
    scripts = batch_scripts(load_site(str(site_file(tmp_path, SLURM))))
    assert list(scripts) == ["cpu"]
    script = scripts["cpu"]
    assert script.startswith("#!")
    for line in (
        "#SBATCH --partition=standard",
        "#SBATCH --account=chem0042",
        "#SBATCH --time=210",
        "#SBATCH --nodes=4",
        "#SBATCH --qos=night",
        "#SBATCH --exclusive",
    ):
        assert line in script
    assert "srun" in script
    assert "--max_workers_per_node=40" in script
    assert "# submitted with: sbatch RUN_DIR/basin." in script
    assert_runs_workers(script)
    assert not no_scheduler.exists()


def test_the_pbs_script_is_the_one_parsl_would_submit(tmp_path: Path, no_scheduler: Path) -> None:
    scripts = batch_scripts(load_site(str(site_file(tmp_path, PBS))))
    assert list(scripts) == ["cpu"], "the local pool submits nothing"
    script = scripts["cpu"]
    assert "#PBS -l walltime=12:00:00" in script
    assert "#PBS -l select=2:ncpus=128:mpiprocs=128" in script
    assert "--max_workers_per_node=32" in script
    # Parsl gives these two on the command line, not in the script.
    submitted = script.splitlines()[-1]
    assert submitted.startswith("# submitted with: qsub")
    assert "-q small" in submitted
    assert "-A e42-relax" in submitted
    assert_runs_workers(script)
    assert not no_scheduler.exists()


def test_a_provider_that_cannot_make_a_script(tmp_path: Path) -> None:
    path = site_file(tmp_path, SLURM.replace('"03:30:00"', '"three hours"'))
    with pytest.raises(SiteError) as caught:
        batch_scripts(load_site(str(path)))
    assert f"site {str(path)!r}, pool 'cpu'" in str(caught.value)
    assert "SlurmProvider cannot make a batch script: ValueError" in str(caught.value)


def test_plan_prints_the_script_and_starts_nothing(tmp_path: Path, no_scheduler: Path) -> None:
    (tmp_path / "some.smi").write_text("CCO ethanol\n")
    site = site_file(tmp_path, SLURM)
    campaign = tmp_path / "c.toml"
    campaign.write_text(
        'name = "c"\n[molecules]\nfiles = ["some.smi"]\n[[stages]]\nkernel = "embed"\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "plan", campaign, "--site", site],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "batch script for pool cpu:\n#!" in done.stdout
    assert "#SBATCH --account=chem0042" in done.stdout.splitlines()
    assert "pool cpu: 800 workers" in done.stdout
    assert not no_scheduler.exists()
    assert not (tmp_path / "c.basin").exists()
    assert not list(tmp_path.glob("runinfo*"))


@pytest.mark.parametrize("name", ["my runs", "it's", "$HOME", "a;b", 'say "hi"'])
def test_a_store_whose_path_a_batch_script_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(StoreError, match="--store"):
        require_plain_path(Path("/scratch") / name / "store")


def test_usual_paths_are_taken() -> None:
    require_plain_path(Path("/scratch/användare/2026-01-02T10:00_a+b,c=d@e~1/x.basin"))
