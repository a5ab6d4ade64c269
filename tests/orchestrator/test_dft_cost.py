"""What DFT will take is told from a molecule's composition before anything has run."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import basis
from kernels.calculators import DFT
from kernels.graph import parse_smiles
from orchestrator import block, dft_cost
from orchestrator.campaign import load_campaign
from orchestrator.forecast import forecast, memory_warnings
from orchestrator.plan import Plan
from orchestrator.sites import load_site
from orchestrator.stream import Estimate
from tests.orchestrator.run_fixtures import SMALL, ingested, write_campaign

DFT_STAGES = (
    '[[stages]]\nkernel = "embed"\n[[stages]]\nkernel = "mmff"\n'
    f'[[stages]]\nname = "dft"\nkernel = "relax"\nlevel = "{DFT}"\n'
)


@pytest.mark.parametrize(
    "smiles",
    [
        *(s for s in SMALL if not {"S", "Cl"} & set(s.replace("Cl", "S"))),
        *("[H][H]", "[2H]C", "[OH-]", "[NH4+]", "c1cc[nH]c1", "[13CH4]", "N#[N+][O-]"),
    ],
)
def test_basis_functions_are_counted_from_smiles(smiles: str) -> None:
    molecule = parse_smiles(smiles)
    counted = dft_cost.n_functions(molecule.smiles, len(molecule.numbers))
    assert counted == basis.n_functions(molecule.numbers)


def test_a_molecule_that_is_still_to_be_made_has_qm9s_average() -> None:
    # QM9's molecules have 18 atoms on average, 8.8 of them not hydrogen.
    assert dft_cost.n_functions("", 18) == pytest.approx(28 * 8.8 + 5 * 9.2, rel=0.02)


# Functions, and MB at the peak of a gradient with 2.4 GB to use, of Psi4 together with the process
# that asks it: BENCHMARKS.md.
PEAKS = {
    "pyscf": {38: 311, 76: 457, 114: 629, 190: 955, 264: 1370},
    "psi4": {38: 264, 114: 821, 248: 2344, 289: 2131},
}


@pytest.mark.parametrize("program", PEAKS)
def test_the_memory_is_what_was_measured_and_a_little_more(program: str) -> None:
    for functions, megabytes in PEAKS[program].items():
        assert 1 <= dft_cost.memory(functions, program) / 1e6 / megabytes < 1.6, functions


def test_cost_follows_basis_functions_not_atoms() -> None:
    estimate = Estimate("relax", 1, DFT)
    benzene, hexane = (estimate.size(n, s) for n, s in ((12, "c1ccccc1"), (20, "CCCCCC")))
    assert (benzene, hexane) == (198, 238)
    assert estimate.seconds(hexane) / estimate.seconds(benzene) == pytest.approx((238 / 198) ** 3.3)
    assert Estimate("relax").size(12, "c1ccccc1") == 12


def test_a_plan_counts_basis_functions_before_and_after_reading(tmp_path: Path) -> None:
    path = write_campaign(tmp_path, ["CCCCCC", "FC(F)(F)F"], stages=DFT_STAGES)
    campaign, site = load_campaign(path), load_site("local", workers=2)
    hours = sum(map(Estimate("relax", 1, DFT, "gfn2").seconds, (238, 140))) / 3600
    before = forecast(campaign, site)
    assert before.stages[2].core_hours == pytest.approx(hours)
    ingested(campaign)
    assert forecast(campaign, site).stages[2].core_hours == pytest.approx(hours)


def test_a_plan_warns_of_memory_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_campaign(tmp_path, ["CCCCCCCCO"], stages=DFT_STAGES)
    monkeypatch.setattr(block, "memory", lambda: 5 * 10**9)
    campaign = load_campaign(path)
    assert forecast(campaign, load_site("local", workers=2)).warnings == []
    (warning,) = forecast(campaign, load_site("local", workers=4)).warnings
    assert "stage 'dft'" in warning
    assert "pool 'cpu', which has 5 GB, 2 can compute" in warning
    assert "--workers 2 leaves no core idle" in warning


def test_a_plan_warns_of_a_limit_that_is_too_low(tmp_path: Path) -> None:
    path = write_campaign(tmp_path, ["CCCCCCCCO"], stages=DFT_STAGES + 'memory_limit = "1 GB"\n')
    (warning,) = forecast(load_campaign(path), load_site("local", workers=1)).warnings
    assert "its memory_limit is 1.0 GB: raise it to 3 GB" in warning


def test_a_plan_names_the_field_of_the_site_file(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'base = "slurm"\n[pools.cpu]\ncores_per_node = 64\nmemory_per_node = "64 GB"\n'
    )
    plan = Plan(load_campaign(write_campaign(tmp_path, ["C"], stages=DFT_STAGES)))
    site = load_site(str(tmp_path / "site.toml"))
    (warning,) = memory_warnings(plan, site, 300)
    assert "of the 64 workers on a node of pool 'cpu', which has 64 GB" in warning
    assert "in [pools.cpu]" in warning
    assert memory_warnings(plan, site, 20) == []
