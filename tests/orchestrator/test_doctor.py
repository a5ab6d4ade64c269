"""The doctor: it computes with what it calls fine, and says what to do about the rest."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels.calculators import DFT
from orchestrator import doctor
from orchestrator.doctor import Finding, examine
from tests.orchestrator.random_stores import read_only


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    folder = tmp_path_factory.mktemp("doctor")
    answers = examine(folder)
    assert list(folder.iterdir()) == [], "nothing is left behind"
    assert len({answer.what for answer in answers}) == len(answers)
    return {answer.what: answer for answer in answers}


def test_what_works_here_is_ok(found: dict[str, Finding]) -> None:
    for what in ("Python", "parsl", "rdkit", "machine", "hard links here", "site local"):
        assert found[what].state == "ok", found[what]
    assert {answer.state for answer in found.values()} <= {"ok", "missing", "broken"}


def test_engines_are_tried_with_known_energies(
    found: dict[str, Finding], require_engine: Callable[[str], None]
) -> None:
    model = found["diffusion models"]
    assert model.state == "ok", model.detail
    length = re.search(r"C-C of ethanol (\d\.\d+) Å", model.detail)
    # GFN2-xTB itself: 1.525 Å.
    assert length is not None
    assert float(length[1]) == pytest.approx(1.525, abs=0.015)
    require_engine("tblite")
    answer = found["tblite (GFN2-xTB)"]
    assert answer.state == "ok"
    # GFN2-xTB of water is -5.07 hartree.
    assert "-137.9" in answer.detail
    assert found["RDKit (ETKDGv3, MMFF94)"].state == "ok"


def test_both_programs_agree_on_water(
    found: dict[str, Finding], require_engine: Callable[[str], None]
) -> None:
    require_engine("tblite")
    require_engine("xtb-python")
    words = [found[f"{name} (GFN2-xTB)"].detail.split() for name in ("tblite", "xtb-python")]
    energies = [float(w[w.index("eV") - 1]) for w in words]
    assert energies[0] == pytest.approx(energies[1], abs=1e-3)


def test_dft_is_tried_with_both_programs(
    found: dict[str, Finding], require_engine: Callable[[str], None]
) -> None:
    # Of water, -76.42 hartree; five d functions in place of six are 0.08 eV above.
    pyscf = found[f"PySCF ({DFT})"]
    assert (pyscf.state, "energy of water -2079.65" in pyscf.detail) == ("ok", True), pyscf
    require_engine("psi4")
    psi4 = found[f"Psi4 ({DFT})"]
    assert (psi4.state, "energy of water -2079.57" in psi4.detail) == ("ok", True), psi4


def test_psi4_is_missing_or_wrongly_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import psi4_engine

    monkeypatch.setenv("BASIN_PSI4_PYTHON", "/bin/false")
    wrong = doctor._psi4()
    assert wrong.state == "broken"
    assert "BASIN_PSI4_PYTHON=/bin/false cannot import psi4" in wrong.detail
    monkeypatch.delenv("BASIN_PSI4_PYTHON")
    monkeypatch.setattr(psi4_engine, "_ask_version", lambda *_: None)
    psi4_engine._find.cache_clear()
    missing = doctor._psi4()
    psi4_engine._find.cache_clear()
    assert missing.state == "missing"
    assert "apt-get install psi4" in missing.detail


def test_an_optional_engine_that_lacks_is_missing_not_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name in ("xtb", "tblite") else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    optional = doctor._engine("xtb-python", "xtb", "xtb", "")
    assert optional.state == "missing"
    assert "pip install 'basin-orchestrator[xtb]'" in optional.detail
    assert doctor._engine("tblite", "tblite", "", "").state == "broken"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('no parameters')", "RuntimeError: no parameters"),
        ("import os; os.kill(os.getpid(), 11)", "exit status -11"),
        ("import os; os._exit(3)", "exit status 3"),
    ],
)
def test_an_engine_that_dies_takes_nobody_with_it(code: str, words: str) -> None:
    answer = doctor._engine("some engine", "json", "", code)
    assert answer.state == "broken"
    assert words in answer.detail


def test_an_engine_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ENGINE_LIMIT_S", 0.2)
    answer = doctor._engine("some engine", "json", "", "import time; time.sleep(60)")
    assert answer.state == "broken"
    assert "no answer" in answer.detail


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with read_only(tmp_path / "folder", tmp_path / "seen") as folder:
        links = {f.what: f for f in doctor._machine(folder)}["hard links here"]
    assert links.state == "broken"
    assert "put the store elsewhere" in links.detail


# --- a site, looked at closely ----------------------------------------------------------------

CLUSTER = """\
base = "slurm"
account = "chem"
[pools.cpu]
partition = "standard"
cores_per_node = 64
"""


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, opinion: str) -> None:
    """Put a SLURM first on PATH that thinks so of any script."""
    (folder / "bin").mkdir()
    answers = {"sbatch": opinion, "squeue": "", "scancel": "exit 1"}
    for name, text in answers.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def site_findings(folder: Path, text: str = CLUSTER) -> dict[str, Finding]:
    path = folder / "mycluster.toml"
    path.write_text(text)
    return {f.what: f for f in doctor._site(str(path), folder)}


def test_a_site_that_would_work_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "sbatch: Job 7 to start at 2030-01-01T10:00:00 using 64 processors on nodes n1"
    slurm(tmp_path, monkeypatch, f'echo "$*" > {tmp_path}/asked; echo "{words}" >&2')
    found = site_findings(tmp_path)
    assert {f.state for f in found.values()} == {"ok"}
    assert found["site mycluster.toml: cpu"].detail.startswith("a block would start at 2030-01-01")
    assert "--test-only" in (tmp_path / "asked").read_text(), "nothing is submitted"
    assert "python" in found["site mycluster.toml: workers"].detail
    (slurm_found, pbs) = doctor._schedulers()
    assert (slurm_found.state, pbs.state) == ("ok", "missing")


def test_what_is_wrong_with_a_site_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(tmp_path, monkeypatch, "echo 'allocation failure: Invalid account' >&2; exit 1")
    found = site_findings(tmp_path, CLUSTER.replace("account", 'worker_init = "exit 3"\naccount'))
    account, workers = (found[f"site mycluster.toml: {what}"] for what in ("cpu", "workers"))
    assert account.state == workers.state == "broken"
    assert "sbatch would refuse a block: allocation failure: Invalid account" in account.detail
    assert "worker_init" in workers.detail
    (typo,) = site_findings(tmp_path, CLUSTER.replace("partition", "partiton")).values()
    assert typo.state == "broken"
    assert 'did you mean "partition"' in typo.detail


def test_a_cluster_seen_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = site_findings(tmp_path)
    assert found["site mycluster.toml"].state == "ok", "the file itself is"
    assert "try a login node" in found["site mycluster.toml: scheduler"].detail
