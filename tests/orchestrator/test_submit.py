"""The driver's batch job: its script, what may be set of it, and a chain of two on a real SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import chain, lock
from orchestrator.errors import SiteError, StoreLockedError
from orchestrator.sites import load_site
from orchestrator.store import Store
from orchestrator.submit import driver_job, render, submit
from tests.cluster.slurm_cluster import SlurmCluster
from tests.orchestrator.run_fixtures import standing_of, until, write_campaign

ROOT = Path(__file__).resolve().parents[2]
SLURM = """\
base = "slurm"
account = "chem"
modules = ["python/3.12"]
[driver]
partition = "serial"
walltime = "24 h"
[pools.cpu]
partition = "standard"
cores_per_node = 64
"""
PBS = """\
base = "pbs"
account = "chem"
modules = ["python/3.12"]
[driver]
queue = "serial"
walltime = "24 h"
[pools.cpu]
queue = "workq"
cores_per_node = 64
"""


def basin(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def site_file(folder: Path, text: str) -> Path:
    path = folder / "mycluster.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("kind", "text"), [("slurm", SLURM), ("pbs", PBS)])
def test_the_scripts_in_jobs_are_what_submit_makes(tmp_path: Path, kind: str, text: str) -> None:
    site = site_file(tmp_path, text)
    done = basin(
        *("submit", "jobs/quickstart.toml", "--site", site, "--print"),
        *("--store", tmp_path / "quickstart"),
    )
    assert done.returncode == 0, done.stderr
    made = done.stdout.replace(str(Path(sys.executable).parent), "/home/you/basin/.venv/bin")
    made = made.replace(str(ROOT), "/home/you/basin").replace(str(tmp_path), "/home/you")
    assert made == (ROOT / "jobs" / f"driver_{kind}.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=made, text=True, check=False).returncode == 0
    assert not (tmp_path / "quickstart").exists(), "--print makes no store"


def test_options_come_before_the_site_file(tmp_path: Path) -> None:
    site = load_site(str(site_file(tmp_path, SLURM)))
    wanted = {"partition": "long", "account": None, "walltime": "90 min", "memory": "2 GiB"}
    script = render(driver_job(site, wanted), "my run", tmp_path / "s", tmp_path, ["c.toml"])
    for line in ("--partition=long", "--account=chem", "--time=01:30:00", "--mem=2048M"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --job-name=basin.driver.my_run\n" in script
    with pytest.raises(SiteError, match=r"--walltime 2 GB .*write a time"):
        driver_job(site, {"walltime": "2 GB"})


def test_a_percent_sign_of_the_stores_path_is_not_slurms(tmp_path: Path) -> None:
    job = driver_job(load_site(str(site_file(tmp_path, SLURM))), {})
    script = render(job, "c", Path("/scratch/50%j"), tmp_path, ["c.toml"])
    assert "#SBATCH --output=/scratch/50%%j/logs/driver-%j.log\n" in script
    assert "/scratch/50%j/control/driver.sh" in script


def test_a_site_without_a_scheduler_has_no_job_for_the_driver(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, ["C"])
    done = basin("submit", campaign, "--site", "local")
    assert done.returncode == 2
    assert "submits to no scheduler" in done.stderr
    assert "basin run" in done.stderr
    assert not (tmp_path / "store").exists()


def test_one_store_has_one_driver_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    answers = {"sbatch": "echo 12", "squeue": "echo '12 PENDING'", "scancel": ""}
    for name, text in answers.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    store = Store.create(tmp_path / "store", "one").path
    job = driver_job(load_site(str(site_file(tmp_path, SLURM))), {})
    held = lock.DriverLock(store, "there")
    with pytest.raises(StoreLockedError, match="basin stop"):
        submit(store, job, "#!/bin/bash\n")
    held.release()
    assert submit(store, job, "#!/bin/bash\n") == "12"
    assert (store / "control" / "driver.sh").read_text() == "#!/bin/bash\n"
    with pytest.raises(StoreLockedError, match="driver job 12 is pending"):
        submit(store, job, "#!/bin/bash\n")


CLUSTER = """\
base = "slurm"
poll_every = "1 s"
[driver]
partition = "gpu"
walltime = "10 min"
memory = "1 GB"
cores = 1
[pools.cpu]
partition = "cpu"
walltime = "10 min"
memory_per_node = "1 GB"
exclusive = false
"""


@pytest.mark.slow
def test_a_killed_driver_job_is_followed_to_the_end(
    tmp_path: Path, slurm_cluster: SlurmCluster
) -> None:
    """Real jobs: the first driver is killed by its process, and the next one finishes."""
    site = site_file(tmp_path, CLUSTER)
    smiles = ["C" * n + "O" for n in range(1, 25)]
    stages = '[[stages]]\nkernel = "rehearse"\nseconds = "2 s"\n'
    run = 'bundle_time = "4 s"\nseal_every = "1 s"\n'
    campaign = write_campaign(tmp_path, smiles, stages=stages, run=run)
    done = basin("submit", campaign, "--site", site)
    assert done.returncode == 0, done.stderr
    store = tmp_path / "store"
    logs = store / "logs"

    def log() -> str:
        return "\n".join(path.read_text() for path in sorted(logs.glob("driver-*.log")))

    until(lambda: standing_of(campaign).counts[0].ok >= 2, 120, log, every=1.0)
    first = chain.read(store)
    assert first is not None
    assert [first.links, len(first.jobs)] == [1, 2]
    assert lock.who(store)["job"] == first.jobs[0]
    again = basin("submit", campaign, "--site", site)
    assert again.returncode == 3
    assert f"job {first.jobs[0]}" in again.stderr
    os.kill(int(lock.who(store)["pid"]), signal.SIGKILL)
    until(lambda: (found := chain.read(store)) and found.links == 2, 60, log, every=0.5)
    until(lambda: not chain.living(store), 180, log, every=1.0)
    (counts,) = standing_of(campaign).counts
    assert (counts.ok, counts.waiting) == (24, 0), log()
    second = chain.read(store)
    assert second is not None
    assert (second.links, second.jobs) == (2, [first.jobs[1]])
    assert "was not needed and is cancelled" in log()
    slurm_cluster.assert_empty()
