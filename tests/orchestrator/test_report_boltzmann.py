"""The report on chains: what it says and draws, and that it does without what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.drawing import style
from orchestrator.report import findings, write_report
from orchestrator.report_boltzmann import gather, section, sentences
from orchestrator.store import Store
from tests.orchestrator.chain_stores import Chains, published_study
from tests.orchestrator.test_report import Page

VIOLINS = "Energy distributions at matched pairs"
LADDERS = "Energy against temperature and diffusion step"
MAP = "Temperature of a diffusion step"
HARMONIC = "Mean energy over that of harmonic vibrations"
CAPACITY = "Heat capacity over the harmonic one"
DIHEDRALS = "Dihedral distributions"
GAUSSIAN = "Chains without acceptance"


def page_of(store: Store, folder: Path) -> Page:
    return Page(write_report(store, folder / "report.html"))


def test_the_page_has_the_study(tmp_path: Path) -> None:
    study = published_study(5, steps=1000)
    parent = study.molecule("apart", "CCCO")
    study.ladders(parent, (10, 20, 70, 120, 300), (1, 4, 14, 20, 30), moved=2.0)
    study.gaussian(parent)
    store = study.store(tmp_path / "store")
    page = page_of(store, tmp_path)
    assert "What chains sampled" in page.headings
    pictures = page.pictures()
    for name in (VIOLINS, LADDERS, MAP, HARMONIC, CAPACITY, DIHEDRALS, GAUSSIAN):
        assert name in pictures
    assert all(words in pictures[VIOLINS] for words in ("T (K), n", "energy (kcal/mol)"))
    assert "published pairs" in pictures[MAP]
    assert "(discarded)" in pictures[VIOLINS]
    assert "Discarded: apart: the minima differ by" in page.text
    row = next(row for row in page.rows if row[0] == "apart")
    assert row[-1] == "no"
    # Ladders of more than four stages share a row.
    assert any(row[0] == "metropolis (5 stages)" for row in page.rows)
    said = " ".join(findings(store))
    assert "Repeating diffusion step n of qm9-edm samples energies like T = 0.3" in said
    assert "5 molecules, 1 discarded, the published pairs give 0.33" in said
    assert "of 12 chains is within three standard errors of (3N − 6)/2 k_B\u00a0T" in said


@pytest.mark.parametrize("kind", ["metropolis", "diffusion", "replica exchange", "gaussian"])
def test_a_single_chain_has_its_figures(tmp_path: Path, kind: str) -> None:
    study = Chains(steps=300, burn_in=30)
    parent = study.molecule("ethanol")
    if kind == "gaussian":
        study.gaussian(parent)
    elif kind == "diffusion":
        study.chain(parent, kind=kind, n=20)
    else:
        study.chain(parent, kind=kind, temperature=100.0)
    found = gather(study.store(tmp_path / "store"))
    with style():
        shown = section(found)
    assert shown["title"] == "What chains sampled"
    pictures = {picture.alt for picture in [*shown["wide"], *shown["pairs"]]}
    assert (VIOLINS in pictures) == (kind != "gaussian")
    assert (HARMONIC in pictures) == (kind in ("metropolis", "replica exchange"))
    assert (GAUSSIAN in pictures) == (kind == "gaussian")
    assert MAP not in pictures
    assert sentences(found) == ["The store has 1 chain of 1 molecule."]


def test_chains_without_frames_energies_or_moves(tmp_path: Path) -> None:
    study = Chains(steps=300, burn_in=30)
    parent = study.molecule("ethanol")
    study.chain(parent, kind="diffusion", n=20, points=False)
    still = study.chain(parent, temperature=10.0)
    study.row("chains", still)["energy_eV"] = [-100.0] * 301
    page = page_of(study.store(tmp_path / "store"), tmp_path)
    assert "no energies yet" in page.text
