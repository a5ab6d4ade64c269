"""Exports, read back by the programs that they are for."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import duckdb
import numpy as np
import pytest
from rdkit import Chem

from orchestrator import export as export_module
from orchestrator import hdf5
from orchestrator.columns import Category, Rows, Varlen
from orchestrator.compact import compact
from orchestrator.errors import StoreError, StoreFullError
from orchestrator.export import KINDS, export
from orchestrator.schema import TABLES
from orchestrator.store import Store
from tests.orchestrator.store_fixtures import MOLECULES, Records, key, little_records, new_store


@pytest.fixture(params=["shards", "compacted", "both"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """A little store: in the inbox, compacted, or compacted with a shard that says it again."""
    made = new_store(tmp_path / "store")
    records = little_records(forces=True)
    records.seal(made)
    if request.param != "shards":
        compact(made)
    if request.param == "both":
        records.seal(made, "again")
    return made


@pytest.fixture
def graphless(tmp_path: Path) -> Store:
    """A store with a molecule without SMILES, one whose elements differ, and a good one."""
    made = new_store(tmp_path / "store")
    records = Records()
    for name, smiles in (("lost", "CO"), ("odd", "CN"), ("good", "CC")):
        records.relaxed(name, smiles)
    records.tables["molecules"][0]["smiles"] = ""
    records.tables["molecules"][1]["smiles"] = "CO"
    records.seal(made)
    return made


def comparable(rows: Rows) -> dict[str, Any]:
    """Return rows as lists, sorted by key, whatever files and dictionaries they came from."""
    order = np.lexsort((rows["key"][:, 1], rows["key"][:, 0]))
    plain = {}
    for name, values in rows.take(order).columns.items():
        if isinstance(values, Category):
            plain[name] = values.strings()
        elif isinstance(values, Varlen):
            plain[name] = [values[i].tolist() for i in range(len(values))]
        else:
            plain[name] = np.nan_to_num(values, nan=-1.0).tolist()
    return plain


def test_parquet_answers_like_the_store(store: Store, tmp_path: Path) -> None:
    folder = export(store, "parquet", tmp_path / "tables")
    assert {p.name for p in folder.iterdir()} == {f"{name}.parquet" for name in TABLES}
    sql = "SELECT key, level, n_steps, final_energy_eV, connectivity_changed FROM {} ORDER BY key"
    theirs = duckdb.sql(sql.format(f"'{folder}/relaxations.parquet'")).fetchall()
    ours = [tuple(row.values()) for row in store.query(sql.format("relaxations")).to_pylist()]
    assert theirs == ours
    assert len(ours) == len(MOLECULES)
    frames = duckdb.sql(f"SELECT sum(len(energy_eV)) FROM '{folder}/frames.parquet'").fetchall()
    assert frames == [(35,)]


def test_parquet_writes_one_table_when_asked(store: Store, tmp_path: Path) -> None:
    folder = export(store, "parquet", tmp_path / "tables", table="tasks")
    assert [p.name for p in folder.iterdir()] == ["tasks.parquet"]


def test_parquet_of_slices_with_different_dictionaries(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    for stage in ("first", "second", "third"):
        records = Records()
        records.task(stage, key(stage))
        records.seal(store, stage)
    folder = export(store, "parquet", tmp_path / "tables")
    rows = duckdb.sql(f"SELECT stage FROM '{folder}/tasks.parquet' ORDER BY 1").fetchall()
    assert rows == [("first",), ("second",), ("third",)]


def test_hdf5_is_one_file_with_every_row_once(store: Store, tmp_path: Path) -> None:
    path = export(store, "hdf5", tmp_path / "all.h5")
    with hdf5.TableFile(path, "export") as file:
        assert sorted(file.tables()) == sorted(TABLES)
        for table in TABLES:
            expected = comparable(store.read(table))
            assert len(expected["key"]) == file.n_rows(table)
            assert comparable(file.read(table)) == expected
            if table in ("paths", "chains", "exchanges", "single_points", "generations"):
                assert not file.n_rows(table)
                continue
            assert file.n_rows(table) > 2
            half = file.read(table, None, slice(1, 3))
            assert comparable(half) == comparable(file.read(table).take(np.array([1, 2])))


def test_hdf5_is_written_slice_by_slice(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(store, "hdf5", tmp_path / "whole.h5")
    monkeypatch.setattr(export_module, "_ROWS", 2)
    monkeypatch.setattr(export_module, "_STEP", {})
    sliced = export(store, "hdf5", tmp_path / "sliced.h5")
    with hdf5.TableFile(whole, "whole") as one, hdf5.TableFile(sliced, "sliced") as other:
        for table in TABLES:
            assert comparable(one.read(table)) == comparable(other.read(table))


def test_sdf_holds_relaxed_molecules_with_their_bonds(store: Store, tmp_path: Path) -> None:
    path = export(store, "sdf", tmp_path / "relaxed.sdf")
    found = {m.GetProp("_Name"): m for m in Chem.SDMolSupplier(str(path), removeHs=False)}
    assert set(found) == set(MOLECULES)
    for row in store.table("relaxations").to_pylist():
        name = store.query(f"SELECT name FROM molecules WHERE key = '{row['mol_key']}'")
        mol = found[name.to_pylist()[0]["name"]]
        assert Chem.CanonSmiles(Chem.MolToSmiles(Chem.RemoveHs(mol))) == Chem.CanonSmiles(
            mol.GetProp("smiles")
        )
        positions = mol.GetConformer().GetPositions()
        np.testing.assert_allclose(positions, row["positions"], atol=1e-4)
        assert mol.GetDoubleProp("energy_eV") == pytest.approx(row["final_energy_eV"], abs=1e-9)
        assert mol.GetProp("key") == row["key"]
    assert Chem.GetFormalCharge(found["acetate"]) == -1
    assert found["benzene"].GetDoubleProp("relaxation_kcal_per_mol") == pytest.approx(6.9181644)


def test_sdf_of_a_stage_holds_that_stages_geometries(store: Store, tmp_path: Path) -> None:
    path = export(store, "sdf", tmp_path / "embedded.sdf", stage="embed")
    found = {m.GetProp("_Name"): m for m in Chem.SDMolSupplier(str(path), removeHs=False)}
    rows = store.table("geometries").to_pylist()
    keys = {row["key"]: row for row in rows if row["stage"] == "embed"}
    assert {m.GetProp("key") for m in found.values()} == set(keys)
    ethanol = found["ethanol"]
    np.testing.assert_allclose(
        ethanol.GetConformer().GetPositions(), keys[ethanol.GetProp("key")]["positions"], atol=1e-4
    )
    assert not ethanol.HasProp("energy_eV")


def test_sdf_tells_what_it_left_out(graphless: Store, tmp_path: Path) -> None:
    said: list[str] = []
    path = export(graphless, "sdf", tmp_path / "some.sdf", tell=said.append)
    assert [m.GetProp("_Name") for m in Chem.SDMolSupplier(str(path))] == ["good"]
    assert len(said) == 2
    assert "1 geometry without a SMILES" in said[0]
    assert "elements" in said[1]


def test_extxyz_reads_in_ase(store: Store, tmp_path: Path) -> None:
    path = export(store, "extxyz", tmp_path / "relaxed.extxyz")
    found = {atoms.info["name"]: atoms for atoms in ase.io.read(path, ":")}
    assert set(found) == set(MOLECULES)
    acetate = found["acetate"]
    assert acetate.info["charge"] == -1
    assert acetate.get_potential_energy() == pytest.approx(-100.0)
    assert acetate.info["smiles"] == "CC(=O)[O-]"
    row = next(r for r in store.table("relaxations").to_pylist() if r["key"] == acetate.info["key"])
    np.testing.assert_allclose(acetate.positions, row["positions"], atol=1e-7)


def test_extxyz_has_molecules_without_bonds_too(graphless: Store, tmp_path: Path) -> None:
    path = export(graphless, "extxyz", tmp_path / "all.extxyz")
    assert sorted(a.info["name"] for a in ase.io.read(path, ":")) == ["good", "lost", "odd"]


def test_extxyz_paths_carry_energies_and_forces(store: Store, tmp_path: Path) -> None:
    path = export(store, "extxyz", tmp_path / "paths.extxyz", frames=True)
    images = ase.io.read(path, ":")
    assert len(images) == 35
    benzene = [atoms for atoms in images if atoms.info["name"] == "benzene"]
    assert [atoms.info["step"] for atoms in benzene] == list(range(7))
    assert [atoms.get_potential_energy() for atoms in benzene] == pytest.approx(
        np.linspace(0.3, 0.0, 7) - 100.0
    )
    np.testing.assert_allclose(benzene[3].get_forces(), 0.1 * benzene[3].positions, atol=1e-6)


@pytest.mark.parametrize("name", ['a "quoted" name', "two\nlines", "$$$$", "x=1 y=2", "β-carotene"])
def test_names_do_not_break_a_file(tmp_path: Path, name: str) -> None:
    store = new_store(tmp_path / "store")
    records = Records()
    records.relaxed(name, "CO")
    records.relaxed("second", "CC")
    records.seal(store)
    xyz = ase.io.read(export(store, "extxyz", tmp_path / "a.extxyz"), ":")
    assert sorted(len(atoms) for atoms in xyz) == [6, 8]
    sdf = export(store, "sdf", tmp_path / "a.sdf")
    mols = [m for m in Chem.SDMolSupplier(str(sdf), removeHs=False) if m is not None]
    assert sorted(m.GetNumAtoms() for m in mols) == [6, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_only_replaced_when_asked(tmp_path: Path, kind: str) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    target = export(store, kind, tmp_path / "out")
    with pytest.raises(StoreError, match="--overwrite"):
        export(store, kind, target)
    more = Records()
    more.relaxed("methane", "C")
    more.seal(store, "more")
    size = sum(p.stat().st_size for p in [target, *target.rglob("*")] if p.is_file())
    export(store, kind, target, overwrite=True)
    assert sum(p.stat().st_size for p in [target, *target.rglob("*")] if p.is_file()) != size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "store"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    thesis = tmp_path / "home" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for kind in KINDS:
        with pytest.raises(StoreError):
            export(store, kind, thesis.parent, overwrite=True)
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_that_breaks_leaves_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    original = export_module.stream

    def full(*arguments: Any) -> Iterator[Rows]:
        yield from original(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "stream", full)
    (tmp_path / "old").mkdir()
    with pytest.raises(StoreFullError, match="no space left"):
        export(store, kind, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "store"]


def test_an_export_goes_on_when_files_are_compacted_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    original = export_module.stream
    calls = []

    def compacting(*arguments: Any) -> Iterator[Rows]:
        if not calls:
            compact(store, grace_s=-1.0)
        calls.append(arguments)
        yield from original(*arguments)

    monkeypatch.setattr(export_module, "stream", compacting)
    path = export(store, "extxyz", tmp_path / "relaxed.extxyz")
    assert len(ase.io.read(path, ":")) == len(MOLECULES)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("cif", {}, "parquet, sdf, extxyz, hdf5"),
        ("sdf", {"stage": "dft"}, "embed, gfn2, mmff"),
        ("parquet", {"table": "atoms"}, "molecules, geometries"),
        ("parquet", {"stage": "gfn2"}, "sdf and extxyz"),
        ("sdf", {"table": "tasks"}, "parquet only"),
        ("sdf", {"frames": True}, "extxyz only"),
        ("extxyz", {"frames": True, "stage": "mmff"}, "keeps no paths"),
    ],
)
def test_what_cannot_be_written_is_said(
    tmp_path: Path, kind: str, options: dict[str, Any], says: str
) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    with pytest.raises(StoreError, match=says):
        export(store, kind, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_store_without_relaxations_says_what_it_has(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    with pytest.raises(StoreError, match="no geometry yet"):
        export(store, "sdf", tmp_path / "out.sdf")
    records = little_records()
    records.tables["relaxations"].clear()
    records.seal(store)
    with pytest.raises(StoreError, match="choose a stage: embed, mmff"):
        export(store, "sdf", tmp_path / "out.sdf")
    assert export(store, "hdf5", tmp_path / "all.h5").exists()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    with pytest.raises(StoreError, match="nowhere does not exist"):
        export(store, "parquet", tmp_path / "nowhere" / "out")


def test_a_damaged_shard_is_told_and_passed_by(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    (store.path / "inbox" / "run" / "bad-00000000.h5").write_bytes(b"half a fi")
    said: list[str] = []
    export(store, "parquet", tmp_path / "out", tell=said.append)
    assert len(said) == 1
    assert "bad-00000000.h5" in said[0]
