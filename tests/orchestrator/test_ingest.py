"""Reading molecule files into the plan: every line once, whatever it holds or interrupts it."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kernels.calculators import make_calculator
from kernels.embedding import embed
from kernels.graph import parse_smiles
from orchestrator import ingest
from orchestrator.campaign import load_campaign
from orchestrator.molecules import find_files, read_entries, sources_digest
from orchestrator.plan import Plan
from orchestrator.status import stand
from orchestrator.store import Store
from tests.orchestrator.run_fixtures import (
    by_key,
    complete,
    ingested,
    standing_of,
    store_of,
    until,
    write_campaign,
)

EMBED = '[[stages]]\nkernel = "embed"\n'
RELAX = '[[stages]]\nname = "gfn2"\nkernel = "relax"\n'


def whole(row: dict[str, bytes], name: str) -> int:
    """Return a row's 8-byte whole number."""
    return int(np.frombuffer(row[name], "<i8")[0])


def test_bad_lines_are_rows_and_repeated_molecules_are_read_once(tmp_path: Path) -> None:
    lines = [
        "CCO",
        "C1CC",
        "OCC",
        "# a comment",
        "",
        "nonsense",
        "CC(=O)O",
        "C(O)C again",
        "CN(C)(C)C",
    ]
    path = write_campaign(tmp_path, lines, stages=EMBED)
    store, folder = ingested(load_campaign(path))
    molecules = {r["smiles"]: r for r in by_key(store, "molecules").values()}
    assert {s: whole(r, "line") for s, r in molecules.items()} == {b"CCO": 1, b"CC(=O)O": 7}
    read = {whole(r, "line"): r for r in by_key(store, "tasks").values()}
    assert {line: r["status"] for line, r in read.items()} == {
        2: "input",
        3: "ok",
        6: "input",
        8: "ok",
        9: "input",
    }
    assert {Path(r["source"]).name for r in read.values()} == {"molecules.smi"}
    assert b"[C1CC]" in read[2]["message"]
    assert b"same molecule as an earlier entry: CCO" in read[3]["message"]
    assert read[3]["mol_key"] == molecules[b"CCO"]["key"]
    assert ingest.is_complete(folder)
    found = stand(load_campaign(path), store)
    assert (found.entries, found.bad_entries) == (7, 3)
    assert [(c.planned, c.waiting) for c in found.counts] == [(2, 2)]


@pytest.mark.parametrize("skip", [0, 1, 3, 6, 7, 20])
def test_skipping_entries_is_dropping_them(tmp_path: Path, skip: int) -> None:
    (tmp_path / "b.csv").write_text("smiles,name\nCC,ethane\nC1CC,bad\nCCC,propane\n")
    with gzip.open(tmp_path / "c.smi.gz", "wt") as file:
        file.write("CCCC\n\n# comment\nCCCCC pentane\n")
    path = write_campaign(
        tmp_path, ["C", "bad"], stages=EMBED, files='["*.smi", "*.csv", "*.smi.gz"]'
    )
    source = load_campaign(path).molecules
    files = find_files(source, tmp_path)

    def told(**options: int) -> list[tuple[object, ...]]:
        entries = read_entries(files, source, **options)
        return [(e.source, e.line, e.text, e.name, str(e.error), e.molecule) for e in entries]

    every = told()
    assert len(every) == 7
    assert told(skip=skip) == every[skip:]


def read_in_a_process(campaign: Path, name: str, kill_after: int | None) -> tuple[Store, Path]:
    """Read the molecule files as a run does; kill -9 the reading after so many chunks."""
    loaded = load_campaign(campaign)
    store = Store.create(campaign.with_name(name), loaded.name)
    digest = sources_digest(find_files(loaded.molecules, campaign.parent), loaded.molecules)
    folder = ingest.plan_folder(store, digest)
    reader = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.ingest", str(campaign), str(store.path), digest]
    )
    try:
        if kill_after is None:
            assert reader.wait(100) == 0
        else:
            until(lambda: len(ingest.chunks(folder)) >= kill_after, 60, every=0.001)
    finally:
        reader.kill()
        reader.wait()
    return store, folder


def test_an_interrupted_reading_goes_on_after_its_last_chunk(
    tmp_path: Path, shared_data: Path
) -> None:
    with open(shared_data / "qm9" / "qm9_smiles.csv") as file:
        smiles = [row["smiles"] for row in itertools.islice(csv.DictReader(file), 20_000)]
    # Repeats and bad lines far from what they repeat: across chunks, and across the kills.
    lines = [
        *smiles[:9_000],
        "not a molecule",
        *smiles[:500],
        *smiles[9_000:],
        *smiles[8_000:8_500],
    ]
    campaign = write_campaign(tmp_path, lines, stages=EMBED)
    for kill_after in (1, 3):
        store, folder = read_in_a_process(campaign, "broken", kill_after)
        assert not ingest.is_complete(folder)
        assert len(ingest.chunks(folder)) >= kill_after
    before = {chunk.path.name for chunk in ingest.chunks(folder)}
    store, folder = read_in_a_process(campaign, "broken", None)
    assert before < {chunk.path.name for chunk in ingest.chunks(folder)}
    undisturbed, other = read_in_a_process(campaign, "whole", None)
    steps = [[(c.start, c.stop) for c in ingest.chunks(f)] for f in (folder, other)]
    assert steps[0] == steps[1]
    assert steps[0][-1][1] == len(lines)
    for table in ("molecules", "tasks"):
        leave_out = ("worker_pid", "started_s")
        assert by_key(store, table, leave_out) == by_key(undisturbed, table, leave_out)
    plan = Plan(load_campaign(campaign))
    roots = [
        [root for chunk in ingest.chunks(f) for root in ingest.read_roots(chunk, plan)]
        for f in (folder, other)
    ]
    assert roots[0] == roots[1]
    assert len(roots[0]) == len(by_key(store, "molecules"))
    rows = by_key(store, "tasks")
    assert len(rows) + len(roots[0]) == len(lines)


def xyz(smiles: str, seed: int = 1, comment: str = "") -> str:
    made = embed(smiles, seed=seed, max_attempts=50)
    symbols = {1: "H", 6: "C", 7: "N", 8: "O"}
    atoms = [
        f"{symbols[int(z)]} {x:.10f} {y:.10f} {w:.10f}"
        for z, (x, y, w) in zip(made.numbers, made.positions, strict=True)
    ]
    return "\n".join([str(len(atoms)), comment, *atoms, ""])


def test_geometries_of_a_file_are_where_the_relaxations_start(tmp_path: Path) -> None:
    from rdkit import Chem
    from rdkit.Chem import AllChem

    molecule = Chem.AddHs(Chem.MolFromSmiles("CC(=O)[O-]"))
    AllChem.EmbedMolecule(molecule, randomSeed=3)
    molecule.SetProp("_Name", "acetate")
    flat = Chem.MolFromSmiles("CCO")
    with Chem.SDWriter(str(tmp_path / "a.sdf")) as writer:
        writer.write(molecule)
        writer.write(flat)
    frames = [
        xyz("CO", 1, "charge=0"),
        xyz("CO", 2, "charge=0"),
        xyz("CO", 1, "charge=0"),
        xyz("C[NH3+]", 1, "charge=1"),
        "3\n\nO 0 0 0\nH 0 0\n",
    ]
    (tmp_path / "b.xyz").write_text("".join(frames))
    path = write_campaign(tmp_path, stages=RELAX, files='["*.sdf", "*.xyz"]')
    summary = complete(path)
    store = store_of(path)
    molecules = by_key(store, "molecules")
    assert sorted(r["smiles"] for r in molecules.values()) == [b"CC(=O)[O-]", b"CO", b"C[NH3+]"]
    starts = by_key(store, "geometries")
    assert {r["method"] for r in starts.values()} == {"file"}
    relaxed = by_key(store, "relaxations")
    assert len(relaxed) == len(starts) == summary["counts"][0]["ok"] == 4
    frames_of = by_key(store, "frames")
    for key, row in relaxed.items():
        start = np.frombuffer(starts[row["parent_key"]]["positions"])
        first = np.frombuffer(frames_of[key]["positions"], "<f4")[: start.size]
        np.testing.assert_array_equal(first, start.astype("<f4"))
    # The flat record of the SDF and the broken frame; the frame that says it all again is `ok`.
    read = [r for r in by_key(store, "tasks").values() if r["stage"] == "molecules"]
    assert sorted((Path(r["source"]).name, whole(r, "line"), r["status"]) for r in read) == [
        ("a.sdf", 2, "input"),
        ("b.xyz", 3, "ok"),
        ("b.xyz", 5, "input"),
    ]
    standing = standing_of(path)
    assert (standing.entries, standing.bad_entries) == (7, 2)


def test_a_charge_is_kept_from_the_smiles_to_the_energy(tmp_path: Path) -> None:
    charges = {"CC(=O)[O-]": -1, "[NH4+]": 1, "CCO": 0}
    path = write_campaign(tmp_path, charges, stages=EMBED + RELAX)
    complete(path)
    store = store_of(path)
    molecules = by_key(store, "molecules")
    assert {
        r["smiles"].decode(): int(np.frombuffer(r["charge"], "i1")[0]) for r in molecules.values()
    } == charges
    for row in by_key(store, "relaxations").values():
        smiles = molecules[row["mol_key"]]["smiles"].decode()
        calculator = make_calculator(
            "GFN2-xTB",
            program="tblite",
            charge=charges[smiles],
            multiplicity=parse_smiles(smiles).multiplicity,
            smiles=smiles,
        )
        from ase import Atoms

        atoms = Atoms(
            numbers=np.frombuffer(row["numbers"], np.uint8),
            positions=np.frombuffer(row["positions"]).reshape(-1, 3),
            calculator=calculator,
        )
        stored = np.frombuffer(row["final_energy_eV"])[0]
        assert atoms.get_potential_energy() == pytest.approx(stored, abs=1e-6)


def test_a_damaged_chunk_of_the_plan_is_read_again_from_the_molecule_files(tmp_path: Path) -> None:
    (tmp_path / "m.smi").write_text("".join(f"{'C' * n} alkane{n}\n" for n in range(1, 400)))
    (tmp_path / "c.toml").write_text(
        'name = "c"\n[molecules]\nfiles = ["m.smi"]\n[[stages]]\nkernel = "rehearse"\n'
    )
    command = [sys.executable, "-m", "orchestrator.cli", "run", str(tmp_path / "c.toml"), "--json"]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    folder = next((tmp_path / "c.basin" / "plan").iterdir())
    second = ingest.chunks(folder)[1]
    second.path.write_bytes(second.path.read_bytes()[:-100])
    again = subprocess.run(command, check=True, capture_output=True, timeout=100, text=True)
    end = json.loads(again.stdout.splitlines()[-1])
    assert end["entries"] == 399
    assert end["done_now"] == 0
    assert end["done_before"] == 399
    assert [(c.start, c.stop) for c in ingest.chunks(folder)] == [(0, 128), (128, 399)]
