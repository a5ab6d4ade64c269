"""Stages at QM9's level: their settings, their limits, what they refuse, what they are told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels import calculators
from kernels.calculators import DFT, DFT_DEF2, GRIDS
from kernels.errors import KernelError, ProgramError
from orchestrator import child, guard
from orchestrator.campaign import load_campaign
from orchestrator.errors import CampaignError
from orchestrator.kernel_calls import Payload, calculator_maker
from orchestrator.schema import STATUSES
from orchestrator.stages import RelaxStage
from orchestrator.stream import Estimate
from tests.orchestrator.run_fixtures import by_key, running, store_of, write_campaign


def relax(folder: Path, fields: str, level: str = DFT) -> RelaxStage:
    stages = f'[[stages]]\nkernel = "embed"\n[[stages]]\nkernel = "relax"\nlevel = "{level}"\n'
    stage = load_campaign(write_campaign(folder, ["O"], stages=stages + fields)).stages[1]
    assert isinstance(stage, RelaxStage)
    return stage


@pytest.mark.parametrize("level", [DFT, DFT_DEF2])
def test_dft_has_its_own_settings_and_limits(tmp_path: Path, level: str) -> None:
    stage = relax(tmp_path, "", level)
    settings = stage.settings()
    assert (settings["program"], settings["density_fitting"], settings["grid"]) == (
        "pyscf",
        True,
        "fine",
    )
    assert "electronic_temperature" not in settings
    assert (stage.time_limit, stage.memory_limit) == (6 * 3600.0, 4_000_000_000)
    assert relax(tmp_path, 'time_limit = "1 h"\n', level).time_limit == 3600.0
    assert relax(tmp_path, "density_fitting = false\n", level).settings() != settings
    assert relax(tmp_path, 'memory_limit = "8 GB"\n', level).settings() == settings
    assert "grid" not in relax(tmp_path, "", "GFN2-xTB").settings()
    assert relax(tmp_path, "", "GFN2-xTB").time_limit == 600.0


@pytest.mark.parametrize("level", [DFT, DFT_DEF2])
def test_what_saves_gradients_is_for_each_dft_level(tmp_path: Path, level: str) -> None:
    plain = relax(tmp_path, "", level)
    assert plain.settings()["initial_hessian"] == "gfn2"
    assert set(plain.programs()) == {"pyscf", "tblite"}
    coarse = relax(tmp_path, "coarse_until = 0.1\n", level)
    assert coarse.settings()["coarse_until"] == 0.1


def test_dft_relaxations_start_from_gfn2_unless_something_else_is_said(tmp_path: Path) -> None:
    assert "initial_hessian" not in relax(tmp_path, "", "GFN2-xTB").settings()
    assert "initial_hessian" not in relax(tmp_path, 'optimizer = "FIRE"\n').settings()
    for job in ("qm9_dft_speedup.toml", "qm9_dft_small.toml"):
        relaxations = [
            stage
            for stage in load_campaign(Path(__file__).parents[2] / "jobs" / job).stages
            if isinstance(stage, RelaxStage)
        ]
        # The published protocol.
        assert {stage.words() for stage in relaxations} == {f"{DFT}/pyscf, BFGS to 0.03 eV/Å"}
        assert not any("initial_hessian" in stage.settings() for stage in relaxations)


def test_what_saves_gradients_enters_the_key_and_the_words(tmp_path: Path) -> None:
    stage = relax(
        tmp_path, 'optimizer = "Sella"\ncoordinates = "internal"\ncoarse_until = "100 meV/Å"\n'
    )
    told = {k: stage.settings()[k] for k in ("coordinates", "initial_hessian", "coarse_until")}
    assert told == {"coordinates": "internal", "initial_hessian": "gfn2", "coarse_until": 0.1}
    assert stage.words() == (
        f"{DFT}/pyscf, Sella to 0.03 eV/Å, internal coordinates, GFN2-xTB's Hessian, coarse grid "
        "to 0.1 eV/Å"
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_can_be_asked_for(tmp_path: Path, grid: str) -> None:
    assert relax(tmp_path, f'grid = "{grid}"\n').settings()["grid"] == grid


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ('grid = "coarse"\ncoarse_until = 0.1\n', "coarse_until"),
        ('coordinates = "internal"\n', 'needs optimizer = "Sella"'),
        ('optimizer = "FIRE"\ninitial_hessian = "gfn2"\n', 'needs optimizer = "BFGS" or "Sella"'),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, fields: str, says: str) -> None:
    with pytest.raises(CampaignError, match=says):
        relax(tmp_path, fields)


@pytest.mark.parametrize(
    ("level", "field"),
    [
        ("GFN2-xTB", "density_fitting = false"),
        ("GFN2-xTB", 'grid = "coarse"'),
        ("GFN2-xTB", "coarse_until = 0.1"),
        (DFT, 'electronic_temperature = "1000 K"'),
        (DFT_DEF2, 'electronic_temperature = "1000 K"'),
    ],
)
def test_settings_of_other_levels_are_refused(tmp_path: Path, level: str, field: str) -> None:
    with pytest.raises(CampaignError, match="leave it out") as caught:
        relax(tmp_path, field + "\n", level)
    assert field.split()[0] in str(caught.value)


def test_the_program_is_given_a_share_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(calculators, "make_calculator", lambda level, **more: told.update(more))
    payload = Payload("O", 0, 1, 0, 0, np.array([8], np.uint8), np.zeros((1, 3)), "")
    calculator_maker(relax(tmp_path, "").settings(), payload, 4_000_000_000)(grid="very fine")
    assert told["memory"] == 2_400_000_000
    assert (told["density_fitting"], told["grid"]) == (True, "very fine")


def test_dft_is_expected_to_take_longer() -> None:
    ethanol = Estimate("relax", 1, DFT)
    assert ethanol.seconds(ethanol.size(9, "CCO")) > 1000 * Estimate("relax").seconds(9)
    assert Estimate("single_points", 51, DFT).seconds(108) == pytest.approx(51 * 9.0)


def test_memory_of_a_program_that_the_child_started_counts() -> None:
    hoard = "import sys, time; x = bytearray(200 << 20); print(1, flush=True); time.sleep(60)"
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hoard!r}])"
    process = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE)
    family = [process.pid]
    try:
        assert process.stdout is not None
        process.stdout.readline()
        family = child.family(process.pid)
        assert sum(map(guard._resident, family)) > 200 << 20 > guard._resident(process.pid)
    finally:
        for pid in family:
            os.kill(pid, 9)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_campaign_relaxes_with_both_programs(
    tmp_path: Path, require_engine: Callable[[str], None]
) -> None:
    require_engine("psi4")
    level = 'level = "B3LYP/6-31G(2df,p)"\ngrid = "coarse"\n'
    campaign = write_campaign(
        tmp_path,
        ["O", "Cl"],
        stages='[[stages]]\nkernel = "embed"\n[[stages]]\nkernel = "mmff"\n'
        f'[[stages]]\nname = "dft"\nkernel = "relax"\n{level}'
        f'[[stages]]\nname = "other"\nkernel = "relax"\nfrom = "mmff"\nprogram = "psi4"\n{level}'
        f'[[stages]]\nname = "energies"\nkernel = "single_points"\nfrom = "dft"\n{level}',
    )
    with running(campaign) as run:
        assert run.wait(180.0) in (0, 1), run.output()
    store = store_of(campaign)
    rows = {row["program"].split()[0]: row for row in by_key(store, "relaxations").values()}
    assert set(rows) == {"pyscf", "psi4"}
    for row in rows.values():
        assert np.frombuffer(row["final_energy_eV"])[0] == pytest.approx(-2079.65, abs=0.1)
        oxygen, *hydrogens = np.frombuffer(row["positions"]).reshape(3, 3)
        lengths = [np.linalg.norm(atom - oxygen) for atom in hydrogens]
        assert lengths == pytest.approx([0.962, 0.962], abs=0.005)
    assert len(by_key(store, "single_points")) == 1
    failed = [row for row in by_key(store, "tasks").values() if row["status"] != "ok"]
    assert {(row["stage"], row["status"]) for row in failed} == {
        ("dft", "input"),
        ("other", "input"),
    }
    assert all(b"atomic number 17; use level B3LYP/def2-SVP" in row["message"] for row in failed)


def test_every_failure_of_a_kernel_has_a_class_that_tables_know() -> None:
    kinds = [KernelError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.status for kind in kinds[1:]} <= set(STATUSES)
    assert ProgramError in kinds
