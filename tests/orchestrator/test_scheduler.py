"""The scheduler's commands: what is asked of them, and what their answers mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import SiteError
from orchestrator.scheduler import SCHEDULERS, surrounding

SLURM, PBS = SCHEDULERS["slurm"], SCHEDULERS["pbs"]
# As a real PBS server answers, with and without history; shortened.
PBS_RUNNING = (
    '{"pbs_server":"pbs01","Jobs":{"33.pbs01":{"Job_Name":"basin.driver.c","job_state":"R"}}}'
)
# What a shell's function in the job's environment makes of it: no strict JSON.
PBS_QUEUED = PBS_RUNNING.replace('"R"', '"Q","Variable_List":{"F":"() {\n  ls\n}"}')
# And of a quotation mark there: no JSON at all.
PBS_ODD = """{
    "pbs_server":"pbs01",
    "Jobs":{
        "33.pbs01":{
            "Job_Name":"basin.driver.c",
            "job_state":"Q",
            "Variable_List":{
                "SAID":"a "word""
            }
        }
    }
}"""
Programs = Callable[[str, str], None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Return what puts a program of that name and shell text first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, text: str) -> None:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\n{text}\n')
        (folder / name).chmod(0o755)

    return make


def test_a_follow_up_starts_where_the_first_job_fails(tmp_path: Path, programs: Programs) -> None:
    script = tmp_path / "driver.sh"
    programs("sbatch", "echo 'charged to: chem'; echo '4711;tetralith'")
    programs("qsub", "echo 28.pbs01")
    assert SLURM.submit(script, after="4710") == "4711"
    assert PBS.submit(script, after="27.pbs01") == "28.pbs01"
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"sbatch --parsable --dependency=afternotok:4710 --kill-on-invalid-dep=yes {script}",
        f"qsub -W depend=afternotok:27.pbs01 {script}",
    ]


def test_a_refusal_is_told_in_the_schedulers_words(tmp_path: Path, programs: Programs) -> None:
    programs("sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    with pytest.raises(SiteError, match=r"sbatch refused .*driver.sh: .*Invalid account"):
        SLURM.submit(tmp_path / "driver.sh")
    with pytest.raises(SiteError, match=r"qsub is not on PATH.*login node"):
        PBS.submit(tmp_path / "driver.sh")


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (f"echo '{PBS_RUNNING}'", "running"),
        (f"echo '{PBS_RUNNING.replace('R', 'H')}'", "pending"),
        (f"echo '{PBS_QUEUED}'", "pending"),
        (f"echo '{PBS_ODD}'", "pending"),
        (f"echo '{PBS_RUNNING.replace(chr(34) + 'R', chr(34) + 'F')}'", ""),
        ("echo 'qstat: Unknown Job Id 33.pbs01' >&2; exit 153", ""),
        ("echo 'qstat: 33.pbs01 Job has finished, use -x or -H to obtain' >&2; exit 35", ""),
        # A server that is away says nothing about the job, which may well be there.
        ("echo 'Connection refused' >&2; exit 111", "running"),
    ],
)
def test_what_pbs_says_of_a_job(programs: Programs, answer: str, state: str) -> None:
    programs("qstat", answer)
    assert PBS.state("33.pbs01") == state


def test_pbs_is_not_asked_for_a_history_that_would_hide_the_living(
    tmp_path: Path, programs: Programs
) -> None:
    programs("qstat", f"echo '{PBS_RUNNING}'")
    PBS.state("33.pbs01")
    assert " -x" not in (tmp_path / "asked").read_text()


def test_only_what_is_there_is_cancelled(tmp_path: Path, programs: Programs) -> None:
    programs("squeue", "echo '12 PENDING'; echo '123 COMPLETING'")
    programs("scancel", "")
    assert SLURM.state("12") == "pending"
    assert SLURM.state("123") == "running"
    assert SLURM.cancel(["12", "1", "123"]) == ["12", "123"]
    asked = (tmp_path / "asked").read_text()
    assert "scancel 12\n" in asked
    assert "scancel 1\n" not in asked
    programs("squeue", "exit 1")
    assert SLURM.state("1") == "running", "an answer that fails says nothing"


def test_a_job_submitted_from_a_job_inherits_nothing(
    tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4710")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_CLUSTERS", "tetralith")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    found = surrounding()
    assert found == (SLURM, "4710")
    programs("sbatch", f"env > {tmp_path}/environment; echo 4711")
    SLURM.submit(tmp_path / "driver.sh")
    environment = (tmp_path / "environment").read_text()
    assert "SLURM_CONF=/etc/slurm.conf" in environment
    assert "SLURM_CLUSTERS=tetralith" in environment
    assert "SLURM_MEM_PER_CPU" not in environment
    assert "SQUEUE_STATES" not in environment, "it would hide what waits"
    assert "SLURM_JOB_ID" not in environment
