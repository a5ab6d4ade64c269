"""Molecule files as people have them: each record is accounted for, and a bad one costs itself."""

from __future__ import annotations

import gzip
import io
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.graph import parse_smiles
from orchestrator.campaign import MoleculeSource, load_campaign
from orchestrator.errors import CampaignError
from orchestrator.molecules import (
    Entry,
    find_files,
    read_archive,
    read_entries,
    sources_digest,
    split_of,
)

ROOT = Path(__file__).parents[2]
WATER = "3\n\nO 0.0 0.0 0.119\nH 0.0 0.763 -0.477\nH 0.0 -0.763 -0.477\n"
METHANOL = (
    "6\nmethanol\n"
    "C -0.046 0.662 0.0\nO -0.046 -0.758 0.0\nH -1.086 0.975 0.0\n"
    "H 0.437 1.071 0.889\nH 0.437 1.071 -0.889\nH 0.861 -1.057 0.0\n"
)


def source(**settings: object) -> MoleculeSource:
    return MoleculeSource.model_validate({"files": ["*"], **settings})


def read(path: Path, content: str | bytes, **settings: object) -> list[Entry]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    entries = list(read_entries([path], source(**settings)))
    for entry in entries:
        assert (entry.molecule is None) != (entry.error is None)
        assert len(entry.text) <= 500
        assert entry.error is None or entry.error.status == "input"
    return entries


def smiles_of(entries: list[Entry]) -> list[str | None]:
    return [entry.molecule.smiles if entry.molecule else None for entry in entries]


def sdf(*smiles: str, flat: bool = False) -> list[str]:
    """Blocks of an SD file, each ending in $$$$, with geometries from ETKDG or without."""
    from rdkit import Chem
    from rdkit.Chem import rdDepictor, rdDistGeom

    blocks = []
    for text in smiles:
        mol = Chem.MolFromSmiles(text)
        if flat:
            rdDepictor.Compute2DCoords(mol)
        else:
            mol = Chem.AddHs(mol)
            rdDistGeom.EmbedMolecule(mol, randomSeed=7)
        mol.SetProp("_Name", text)
        blocks.append(Chem.MolToMolBlock(mol) + "> <note>\nx\n\n$$$$\n")
    return blocks


# SMILES lists


def test_smi_skips_comments_and_keeps_line_numbers(tmp_path: Path) -> None:
    text = "\ufeffSMILES name\n# comment\n\nCCO\tethanol, pure\r\n  C1CC1\n"
    text += "C(C)(C)(C)(C)C bad\nC=C=\nO\n"
    entries = read(tmp_path / "a.smi", text)
    assert smiles_of(entries) == ["CCO", "C1CC1", None, None, "O"]
    assert [entry.line for entry in entries] == [4, 5, 6, 7, 8]
    assert [entry.name for entry in entries] == ["ethanol, pure", "", "bad", "", ""]
    assert "valence" in str(entries[2].error)


def test_smi_survives_garbage_bytes(tmp_path: Path) -> None:
    text = (
        b"CC\xff\xfeO broken\nCCO caf\xe9\nC\x00C nul\n"
        + np.random.default_rng(0).bytes(3000)
        + b"\nCCN end\n"
    )
    entries = read(tmp_path / "a.smi", text)
    assert smiles_of(entries)[:3] == [None, "CCO", None]
    assert "UTF-8" in str(entries[0].error)
    assert "NUL" in str(entries[2].error)
    assert smiles_of(entries)[-1] == "CCN"


def test_smi_bounds_a_runaway_line(tmp_path: Path) -> None:
    entries = read(tmp_path / "a.smi", "C" * 3_000_000 + "\nCCO after\n")
    assert smiles_of(entries) == [None, "CCO"]
    assert "line end lost" in str(entries[0].error)
    assert entries[1].line == 2


def test_smi_refuses_extensions_it_would_misread(tmp_path: Path) -> None:
    (entry,) = read(tmp_path / "a.smi", "CC |^1:0| ethyl\n")
    assert "CXSMILES" in str(entry.error)


def test_charges_stay(tmp_path: Path) -> None:
    entries = read(tmp_path / "a.smi", "CC(=O)[O-]\nCC[NH3+]\n[NH3+]CC(=O)[O-]\n")
    assert [entry.molecule.charge for entry in entries if entry.molecule] == [-1, 1, 0]


# CSV tables


def test_csv_reads_quoted_fields_and_reports_short_rows(tmp_path: Path) -> None:
    text = (
        '\ufeffid,smiles,name\n1,CCO,"ethanol, dry"\n2\n\n3,CCN,"two\nlines"\n'
        '4,C1CC,open ring\n5,C,5"-ring\n6,"C#N",prussic\n'
    )
    entries = read(tmp_path / "a.csv", text)
    assert smiles_of(entries) == ["CCO", None, "CCN", None, "C", "C#N"]
    assert [entry.line for entry in entries] == [2, 3, 5, 7, 8, 9]
    assert [entry.name for entry in entries] == [
        "ethanol, dry", "", "twolines", "open ring", '5"-ring', "prussic",
    ]  # fmt: skip
    assert "1 cells" in str(entries[1].error)


def test_csv_stray_quotation_mark_costs_one_row(tmp_path: Path) -> None:
    rows = "".join(f"C{'C' * i},n{i}\n" for i in range(200))
    entries = read(tmp_path / "a.csv", 'smiles,name\nCO,"open\n' + rows)
    assert len(entries) == 201
    assert "quotation mark" in str(entries[0].error)
    assert entries[1].line == 3
    assert all(entry.molecule for entry in entries[1:])


def test_csv_of_a_european_spreadsheet(tmp_path: Path) -> None:
    entries = read(tmp_path / "a.csv", "Name;SMILES\nethanol;CCO\n", smiles_column="SMILES",
                   name_column="Name")  # fmt: skip
    assert (smiles_of(entries), entries[0].name) == (["CCO"], "ethanol")


@pytest.mark.parametrize(
    ("content", "settings", "parts"),
    [
        ("Smiles,id\nC,1\n", {}, ['smiles_column = "smiles"', '"Smiles", "id"', '= "Smiles"?']),
        ("smiles,title\nC,1\n", {"name_column": "titel"}, ["name_column", '"title"?']),
        ("", {}, ["is empty"]),
        ("smiles\rC\rCC\r", {}, [":1:", "cannot be read"]),
    ],
)
def test_csv_without_the_column_is_refused_before_anything_runs(
    tmp_path: Path, content: str, settings: dict[str, str], parts: list[str]
) -> None:
    good, bad = tmp_path / "a.smi", tmp_path / "b.csv"
    good.write_text("C\n")
    bad.write_text(content)
    with pytest.raises(CampaignError) as error:
        read_entries([good, bad], source(**settings))
    for part in ["b.csv", *parts]:
        assert part in str(error.value)


def test_csv_without_a_name_column_has_empty_names(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "smiles\nC\n")[0].name == ""


# SD files


def test_sdf_gives_geometries_in_the_molecules_order(tmp_path: Path) -> None:
    from rdkit import Chem

    blocks = sdf("OCC", "CC(=O)[O-]")
    ethanol, acetate = read(tmp_path / "a.sdf", "".join(blocks))
    assert ethanol.molecule == parse_smiles("CCO")
    assert acetate.molecule is not None
    assert acetate.molecule.charge == -1
    assert [entry.line for entry in (ethanol, acetate)] == [1, 2]
    assert ethanol.name == "OCC"
    given = Chem.MolFromMolBlock(blocks[0], removeHs=False)
    oxygen = given.GetConformer().GetPositions()[0]
    assert ethanol.positions is not None
    at = int(np.flatnonzero(ethanol.molecule.numbers == 8)[0])
    np.testing.assert_allclose(ethanol.positions[at], oxygen, atol=1e-4)


def test_sdf_broken_records_cost_only_themselves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ethane, water, methane, amine, last = sdf("CC", "O", "C", "CN", "CO")
    truncated = water[: len(water) // 2] + "\n$$$$\n"
    unterminated = methane.replace("$$$$\n", "") + amine
    text = ethane + truncated + "garbage\x00\n$$$$\n" + unterminated + last.replace("$$$$\n", "")
    entries = read(tmp_path / "a.sdf", text)
    assert smiles_of(entries) == ["CC", None, None, None, "CO"]
    assert "cut short" in str(entries[1].error)
    assert "2 molecules" in str(entries[3].error)
    entries = read(tmp_path / "b.sdf", ethane.replace(".", "x", 4) + water)
    assert smiles_of(entries) == [None, "O"]
    assert "coordinates on line 5" in str(entries[0].error)
    assert capfd.readouterr().err == ""  # RDKit's log would tear the progress display


def test_sdf_pentavalent_carbon_carries_the_parsers_reason(tmp_path: Path) -> None:
    (neopentane,) = sdf("CC(C)(C)C", flat=True)
    broken = neopentane.replace("  5  4", "  5  5", 1).replace("M  END", "  1  5  1  0\nM  END")
    broken = broken.replace("  2  3  1  0", "  2  3  2  0")
    entries = read(tmp_path / "a.sdf", broken + neopentane)
    assert smiles_of(entries) == [None, "CC(C)(C)C"]
    assert "valence" in str(entries[0].error)


def test_sdf_flat_drawing_gives_the_molecule_without_a_geometry(tmp_path: Path) -> None:
    (entry,) = read(tmp_path / "a.sdf", sdf("C[C@H](O)CC", flat=True)[0])
    assert entry.molecule == parse_smiles("C[C@H](O)CC")
    assert entry.positions is None


# XYZ and extended XYZ


def test_xyz_reads_frames_and_names(tmp_path: Path) -> None:
    entries = read(tmp_path / "a.xyz", WATER + "\n" + METHANOL)
    assert smiles_of(entries) == ["O", "CO"]
    assert [entry.name for entry in entries] == ["", "methanol"]
    assert entries[0].positions is not None
    distances = np.linalg.norm(entries[0].positions[1:] - entries[0].positions[0], axis=1)
    np.testing.assert_allclose(distances, 0.969, atol=1e-3)


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (METHANOL.replace("H 0.861 -1.057 0.0\n", ""), "after 5 of 6 atoms"),
        (METHANOL.replace("6\n", "4\n", 1), "more atoms follow"),
        (METHANOL.replace("6\n", "six\n", 1), "not an atom count"),
        (METHANOL.replace("6\n", "999999999\n", 1), "not an atom count"),
        (METHANOL.replace("0.437 1.071 0.889", "0.437 oops"), "is not an atom after 3 of 6"),
        (METHANOL.replace("C -0", "Xx -0"), "'Xx' is not an element"),
        (METHANOL.replace("-0.758", "nan"), "NaN"),
        ("\x00\x01\ufffd garbage\nmore 1 2 3\n", "not an atom count"),
        (METHANOL.replace("methanol", "charge=abc"), "charge=abc is not a whole number"),
        (METHANOL.replace("methanol", "charge=1 multiplicity=1"), "multiplicity 1 is impossible"),
        (METHANOL.replace("methanol", "spin=0"), "write multiplicity=1"),
        (METHANOL.replace("methanol", 'Lattice="9 0 0 0 9 0 0 0 9"'), "periodic"),
        (METHANOL.replace("methanol", "Properties=pos:R:3"), "no species"),
    ],
)
def test_xyz_bad_frame_costs_only_itself(tmp_path: Path, bad: str, part: str) -> None:
    entries = read(tmp_path / "a.xyz", WATER + bad + WATER)
    assert smiles_of(entries) == ["O", None, "O"]
    assert [entry.line for entry in entries] == [1, 2, 3]
    assert part in str(entries[1].error)


def test_xyz_last_frame_cut_short(tmp_path: Path) -> None:
    entries = read(tmp_path / "a.xyz", WATER + METHANOL[:60])
    assert smiles_of(entries) == ["O", None]
    assert "complete the frame" in str(entries[1].error)
    assert smiles_of(read(tmp_path / "b.xyz", WATER + "6\n")) == ["O", None]


def test_xyz_charge_and_multiplicity_from_comment_or_campaign(tmp_path: Path) -> None:
    def molecule(comment: str, **settings: int) -> tuple[int, int]:
        (entry,) = read(tmp_path / "a.xyz", WATER.replace("\n\n", f"\n{comment}\n", 1), **settings)
        assert entry.molecule is not None, entry.error
        return entry.molecule.charge, entry.molecule.multiplicity

    assert molecule("") == (0, 1)
    assert molecule("charge=1") == (1, 2)
    assert molecule("total_charge=1.0 spin=4") == (1, 4)
    assert molecule('Charge="-1" multiplicity=2 energy=3.0', charge=1) == (-1, 2)
    assert molecule("", charge=1, multiplicity=4) == (1, 4)
    assert molecule("", multiplicity=3) == (0, 3)


def test_extxyz_takes_columns_from_properties(tmp_path: Path) -> None:
    text = (
        '3\nProperties=id:I:1:pos:R:3:Z:I:1:forces:R:3 pbc="F F F" name=water\n'
        "7 0.0 0.0 0.119 8 9 9 9\n7 0.0 0.763 -0.477 1 9 9 9\n7 0.0 -0.763 -0.477 1 9 9 9\n"
    )
    (entry,) = read(tmp_path / "a.extxyz", text)
    assert (smiles_of([entry]), entry.name) == (["O"], "water")
    assert entry.positions is not None
    np.testing.assert_allclose(entry.positions[0], [0, 0, 0.119])


def test_frames_written_by_ase_read_back(tmp_path: Path) -> None:
    from ase.build import molecule
    from ase.io import write

    names = ("CH3CH2OH", "C6H6", "CH3CONH2")
    frames = [molecule(name) for name in names]  # type: ignore[no-untyped-call]
    write(tmp_path / "a.extxyz", frames)
    entries = list(read_entries([tmp_path / "a.extxyz"], source()))
    assert smiles_of(entries) == ["CCO", "c1ccccc1", "CC(N)=O"]
    for entry, atoms in zip(entries, frames, strict=True):
        assert entry.molecule is not None
        assert entry.positions is not None
        given = np.column_stack([atoms.numbers, atoms.positions])
        ours = np.column_stack([entry.molecule.numbers, entry.positions])
        np.testing.assert_allclose(given[np.lexsort(given.T)], ours[np.lexsort(ours.T)], atol=1e-7)


# Files as such


@pytest.mark.parametrize("name", ["a.smi.gz", "b.csv.gz", "c.xyz.gz", "d.sdf.gz"])
def test_gzip_reads_alike_and_damage_is_one_failure(tmp_path: Path, name: str) -> None:
    plain = {
        "a.smi.gz": "".join(f"{'C' * i} n{i}\n" for i in range(1, 300)),
        "b.csv.gz": "smiles\n" + "".join(f"{'C' * i}\n" for i in range(1, 300)),
        "c.xyz.gz": WATER * 300,
        "d.sdf.gz": "".join(sdf("CC", "CCO", "CCN") * 60),
    }[name].encode()
    whole = read(tmp_path / name.removesuffix(".gz"), plain)
    packed = gzip.compress(plain)
    assert smiles_of(read(tmp_path / name, packed)) == smiles_of(whole)
    entries = read(tmp_path / name, packed[: len(packed) * 2 // 3])
    good = [entry for entry in entries if entry.molecule]
    assert 0 < len(good) < len(whole)
    assert "gzip data are damaged" in str(entries[-1].error)


def test_a_file_useless_from_the_start_is_refused(tmp_path: Path) -> None:
    for name, content, part in [
        ("a.smi.gz", b"not gzip at all", "gzip"),
        ("a.smi", "CCO\n".encode("utf-16"), "save it as UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CampaignError, match=part):
            read_entries([tmp_path / name], source())
    with pytest.raises(CampaignError, match=r"gone\.smi: cannot be read"):
        read_entries([tmp_path / "gone.smi"], source())


def test_patterns_find_each_file_once(tmp_path: Path) -> None:
    for name in ("b.smi", "a.smi", "deep/er/c.CSV.GZ", "odd[1].xyz", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = ["*.smi", "a.smi", "./deep/../b.smi", "**/*.GZ", "odd[1].xyz", str(tmp_path / "a.smi")]
    found = find_files(source(files=files), tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["a.smi", "b.smi", "deep/er/c.CSV.GZ", "odd[1].xyz"]
    with pytest.raises(CampaignError, match=r'"c\.smi": no such file.*a\.smi'):
        find_files(source(files=["c.smi"]), tmp_path)
    with pytest.raises(CampaignError, match=r"no folder .*nowhere"):
        find_files(source(files=["nowhere/*.smi"]), tmp_path)
    with pytest.raises(CampaignError, match=r"notes\.txt is of no known format"):
        find_files(source(files=["*"]), tmp_path)


def test_digest_follows_content_and_reading_but_not_place(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    here, there = tmp_path / "a.smi", tmp_path / "moved" / "b.smi"
    here.write_text("C\n")
    there.write_text("C\n")
    digest = sources_digest([here], source())
    assert digest == sources_digest([there], source())
    assert digest != sources_digest([here, there], source())
    assert digest != sources_digest([here], source(limit=5))
    there.write_text("CC\n")
    assert digest != sources_digest([there], source())


def test_limit_counts_bad_records_over_all_files(tmp_path: Path) -> None:
    for name in ("a.smi", "b.smi"):
        (tmp_path / name).write_text("C\nbad\n")
    files = [tmp_path / "a.smi", tmp_path / "b.smi"]
    assert smiles_of(list(read_entries(files, source(limit=3)))) == ["C", None, "C"]


def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parsing is replaced: what is measured is the reader, and 20 MB of it take a moment.
    import kernels.graph

    water = parse_smiles("O")
    monkeypatch.setattr(kernels.graph, "parse_smiles", lambda _: water)
    path = tmp_path / "a.smi"
    with path.open("wb") as stream:
        block = b"".join(b"CCO %d\n" % i + b"C" * 3_900 + b" long\n" for i in range(256))
        for _ in range(20):
            stream.write(block)
    tracemalloc.start()
    count = sum(1 for _ in read_entries([path], source()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20 * 512
    assert peak < path.stat().st_size / 10


# NumPy archives, and the parts of a data set


WATER_XYZ = [[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]]
METHANOL_XYZ = [[float(x) for x in line.split()[1:]] for line in METHANOL.splitlines()[2:]]


def arrays(**changes: Any) -> dict[str, Any]:
    """Water and methanol, padded with zeros to seven atoms."""
    numbers, positions = np.zeros((2, 7), np.int64), np.zeros((2, 7, 3))
    numbers[0, :3], positions[0, :3] = [8, 1, 1], WATER_XYZ
    numbers[1, :6], positions[1, :6] = [6, 8, 1, 1, 1, 1], METHANOL_XYZ
    return {"numbers": numbers, "positions": positions, **changes}


def read_archive_of(folder: Path, settings: dict[str, object], **changes: Any) -> list[Entry]:
    path = folder / "set.npz"
    np.savez(path, **arrays(**changes))
    return read(path, path.read_bytes(), **settings)


def test_archives_are_read_without_their_padding(tmp_path: Path) -> None:
    entries = read_archive_of(tmp_path, {}, gdb9_id=np.array([3, 12]))
    assert [entry.name for entry in entries] == ["gdb9 3", "gdb9 12"]
    assert [entry.line for entry in entries] == [1, 2]
    assert smiles_of(entries) == ["O", "CO"]
    assert entries[0].positions is not None
    distances = np.linalg.norm(entries[0].positions[1:] - entries[0].positions[0], axis=1)
    assert distances == pytest.approx([0.9687] * 2, abs=1e-3)
    path = tmp_path / "set.npz"
    plain = list(read_archive(path))
    assert [name for name, _, _ in plain] == ["gdb9 3", "gdb9 12"]
    assert plain[1][1].tolist() == [6, 8, 1, 1, 1, 1]
    assert plain[1][2] == pytest.approx(np.array(METHANOL_XYZ))


@pytest.mark.parametrize(
    ("column", "values", "names"),
    [
        ("name", ["water", "methanol"], ["water", "methanol"]),
        ("id", [7, 8], ["id 7", "id 8"]),
        ("index", [0, 1], ["index 0", "index 1"]),
        (None, None, ["1", "2"]),
    ],
)
def test_names_of_archived_molecules(
    tmp_path: Path, column: str | None, values: list[Any] | None, names: list[str]
) -> None:
    more = {} if column is None else {column: np.array(values)}
    entries = read_archive_of(tmp_path, {}, **more)
    assert [entry.name for entry in entries] == names


def test_charges_in_an_archive_go_before_those_of_the_campaign(tmp_path: Path) -> None:
    hydroxide = np.zeros((1, 3), np.uint8)
    hydroxide[0, :2] = [8, 1]
    positions = np.zeros((1, 3, 3), np.float32)
    positions[0, 1, 0] = 0.96
    both: dict[str, Any] = {"numbers": hydroxide, "positions": positions}
    (stated,) = read_archive_of(tmp_path, {"charge": 0}, **both, charge=np.array([-1]))
    assert stated.molecule is not None
    assert (stated.molecule.smiles, stated.molecule.charge) == ("[OH-]", -1)
    (asked,) = read_archive_of(tmp_path, {"charge": -1}, **both)
    assert asked.molecule == stated.molecule


def test_a_bad_record_of_an_archive_costs_itself(tmp_path: Path) -> None:
    numbers, positions = arrays()["numbers"], arrays()["positions"]
    numbers = np.concatenate([numbers, numbers, numbers])
    positions = np.concatenate([positions, positions, positions])
    numbers[1, 2] = 0  # a hole in the padding
    numbers[2, 0] = 200
    positions[3, 0, 0] = np.nan
    numbers[4] = 0
    entries = read_archive_of(tmp_path, {}, numbers=numbers, positions=positions)
    assert [entry.error is None for entry in entries] == [True] + [False] * 4 + [True]
    assert "padded" in str(entries[1].error)
    with pytest.raises(CampaignError, match=r"record 2: numbers are not padded at the end"):
        list(read_archive(tmp_path / "set.npz"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"numbers": np.zeros((2, 7, 1), int)}, "do not fit"),
        ({"numbers": np.zeros((3, 7), int)}, "do not fit"),
        ({"positions": np.zeros((2, 6, 3))}, "do not fit"),
        ({"numbers": np.zeros((2, 7))}, "whole and floating-point"),
        ({"positions": np.zeros((2, 7, 3), int)}, "whole and floating-point"),
        ({"gdb9_id": np.arange(3)}, "not 2"),
        ({"charge": np.array(0)}, "not 2"),
        ({"numbers": np.array([[8, 1], [6]], dtype=object)}, "no NumPy archive of plain arrays"),
        ({"name": np.array(["a", None], dtype=object)}, "no NumPy archive of plain arrays"),
    ],
)
def test_an_archive_of_other_arrays_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(CampaignError, match=words):
        read_archive_of(tmp_path, {}, **changes)


def test_pickled_objects_in_an_archive_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    trap = np.empty(2, dtype=object)
    trap[:] = [Trap(), Trap()]
    with pytest.raises(CampaignError, match="plain arrays"):
        read_archive_of(tmp_path, {}, name=trap)
    # Nor is what nobody asks for.
    assert len(read_archive_of(tmp_path, {}, notes=trap)) == 2
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **arrays())
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[120:160] = bytes(40)
    for content in (b"", b"PK", whole[: len(whole) // 2], bytes(damaged), b"numbers,positions\n"):
        with pytest.raises(CampaignError, match=r"set\.npz"):
            read(path, content)
    with path.open("wb") as stream:
        np.save(stream, arrays()["numbers"])
    with pytest.raises(CampaignError, match="one array without a name"):
        read(path, path.read_bytes())
    np.savez(path, numbers=arrays()["numbers"])
    with pytest.raises(CampaignError, match="no array 'positions'"):
        read(path, path.read_bytes())


def test_parts_of_a_data_set_go_by_the_last_number_in_the_name() -> None:
    by_name = {
        "gdb9 10": "validation", "gdb9 12": "training", "gdb9 21": "test", "0": "validation",
        "dsgdb9nsd_000131": "test", "mol 20 v3": "training",
    }  # fmt: skip
    assert {name: split_of(name) for name in by_name} == by_name
    nameless = [split_of("molecule " + "x" * n) for n in range(1000)]
    assert set(nameless) == {"training", "validation", "test"}
    assert 700 < nameless.count("training") < 900
    assert split_of("aspirin") == split_of("aspirin")


@pytest.mark.parametrize("ending", [".npz", ".xyz"])
def test_every_record_is_in_one_part(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"set{ending}"
    if ending == ".npz":
        water = {
            "numbers": np.tile([8, 1, 1], (30, 1)),
            "positions": np.tile(WATER_XYZ, (30, 1, 1)),
        }
        np.savez(path, index=np.arange(30), **water)
    else:
        path.write_text("".join(WATER.replace("\n\n", f"\nindex {i}\n", 1) for i in range(30)))
    content = path.read_bytes()
    parts = {part: read(path, content, split=part) for part in ("training", "validation", "test")}
    found = {part: [entry.name for entry in entries] for part, entries in parts.items()}
    assert found["validation"] == ["index 0", "index 10", "index 20"]
    assert found["test"] == ["index 1", "index 11", "index 21"]
    assert len(found["training"]) == 24
    assert all(entry.error is None for entries in parts.values() for entry in entries)
    # Reading that goes on, and limits, count the part's own records.
    rest = list(read_entries([path], source(split="training", limit=20), skip=5))
    assert [entry.name for entry in rest] == found["training"][5:20]


def test_a_part_is_another_plan(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **arrays())
    digests = {
        sources_digest([path], source(**settings))
        for settings in ({}, {"split": "test"}, {"split": "training"})
    }
    assert len(digests) == 3


def test_a_part_that_is_none_names_the_parts(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'name = "a"\n[molecules]\nfiles = ["set.npz"]\nsplit = "valid"\n[[stages]]\n'
        'kernel = "relax"\n'
    )
    with pytest.raises(CampaignError, match=r'a\.toml:4: .*"valid".*"validation"'):
        load_campaign(tmp_path / "a.toml")


# The lists that come with the project


def test_quickstart_molecules() -> None:
    campaign = load_campaign(ROOT / "jobs" / "quickstart.toml")
    files = find_files(campaign.molecules, campaign.path.parent)
    entries = list(read_entries(files, campaign.molecules))
    by_file = {path.name: [e for e in entries if Path(e.source) == path] for path in files}
    good = [entry.molecule for entry in entries if entry.molecule]
    assert len({molecule.smiles for molecule in good}) >= 60
    assert len(good) - len({molecule.smiles for molecule in good}) == 1  # ethanol, twice
    assert [entry.name for entry in entries if entry.error] == ["pentavalent carbon"]
    organics = [e.molecule for e in by_file["organics.smi"] if e.molecule]
    assert max(molecule.n_heavy for molecule in organics) <= 9
    assert sorted(molecule.charge for molecule in good if molecule.charge) == [-1, 1]
    assert all(molecule.multiplicity == 1 for molecule in good)


# Molecular formulas as in the pharmacopoeia, independent of the SMILES.
DRUGS = {
    "aspirin": "C9H8O4", "paracetamol": "C8H9NO2", "ibuprofen": "C13H18O2",
    "caffeine": "C8H10N4O2", "sildenafil": "C22H30N6O4S", "isoniazid": "C6H7N3O",
    "omeprazole": "C17H19N3O3S", "metronidazole": "C6H9N3O3", "metformin": "C4H11N5",
    "lidocaine": "C14H22N2O", "procaine": "C13H20N2O2", "celecoxib": "C17H14F3N3O2S",
    "naproxen": "C14H14O3", "warfarin": "C19H16O4", "fluorouracil": "C4H3FN2O2",
    "carbamazepine": "C15H12N2O", "diazepam": "C16H13ClN2O", "propranolol": "C16H21NO2",
    "phenytoin": "C15H12N2O2", "nicotine": "C10H14N2",
}  # fmt: skip


def test_drugs_have_their_known_formulas() -> None:
    entries = read_entries([ROOT / "jobs" / "molecules" / "drugs.smi"], source())
    found = {entry.name: entry.molecule.formula for entry in entries if entry.molecule}
    assert found == DRUGS


# Public data, where it is at hand


def shared(name: str) -> Path:
    path = Path(os.environ.get("BASIN_DATA", ROOT.parent / "shared" / "data")) / name
    if not path.is_file():
        pytest.skip(f"{path} is not here; set BASIN_DATA to the folder of the public data")
    return path


def test_geom_drugs_are_all_accounted_for() -> None:
    entries = list(read_entries([shared("geom_drugs/geom_drugs_smiles.csv")], source()))
    assert len(entries) == 700
    assert [entry.line for entry in entries] == list(range(2, 702))
    assert all(entry.molecule for entry in entries)


def test_qm9_records_fail_one_by_one() -> None:
    path = shared("qm9/qm9_smiles.csv")
    entries = list(read_entries([path], source(limit=5000)))
    bad = [entry for entry in entries if entry.error]
    assert len(entries) == 5000
    assert bad
    lines = io.StringIO(path.read_text()).readlines()
    assert all(lines[entry.line - 1].strip() == entry.text for entry in bad)


def test_md17_frames_are_ethanol() -> None:
    path = shared("md17/md17_ethanol_2000.xyz.gz")
    entries = list(read_entries([path], source(limit=100)))
    assert smiles_of(entries) == ["CCO"] * 100


def test_only_molecules_of_some_elements(tmp_path: Path) -> None:
    """Bad lines are kept: nothing that cannot be read is passed over in silence."""
    path = tmp_path / "a.smi"
    path.write_text("CCO ethanol\nCCCl chloride\nC(( bad\nO water\nCSC sulfide\n")
    source = MoleculeSource(files=(str(path),), elements=("H", "C", "O"))
    found = list(read_entries([path], source))
    assert [entry.name for entry in found] == ["ethanol", "bad", "water"]
    assert found[1].error is not None
    again = list(read_entries([path], source, skip=1))
    assert [entry.name for entry in again] == ["bad", "water"]


def test_every_so_many_entries(tmp_path: Path) -> None:
    path = tmp_path / "a.smi"
    path.write_text("".join(f"{'C' * n} n{n}\n" for n in range(1, 11)))
    thin = MoleculeSource(files=(str(path),), every=3)
    assert [entry.name for entry in read_entries([path], thin)] == ["n1", "n4", "n7", "n10"]
    assert [entry.name for entry in read_entries([path], thin, skip=2)] == ["n7", "n10"]
    few = MoleculeSource(files=(str(path),), every=3, limit=2)
    assert [entry.name for entry in read_entries([path], few)] == ["n1", "n4"]
