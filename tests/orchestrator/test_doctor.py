"""The doctor: it computes with what it calls fine, and says what to do about the rest."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
