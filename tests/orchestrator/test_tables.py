"""Tables as Arrow and SQL, and trajectories: what an analyst sees of a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from orchestrator import hdf5
from orchestrator.columns import from_records
from orchestrator.compact import compact
from orchestrator.errors import CorruptShardError, StoreError
from orchestrator.schema import TABLES
from orchestrator.store import Store
from orchestrator.tables import Lookup, stream
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


def test_arrow_tables_hold_what_was_stored(store: Store) -> None:
    table = store.table("relaxations")
    assert table.num_rows == len(MOLECULES)
    by_steps = {row["n_steps"]: row for row in table.to_pylist()}
    row = by_steps[4]
    assert row["key"] == key("gfn2", bytes.fromhex(row["mol_key"])).hex()
    assert row["level"] == "GFN2-xTB"
    assert row["connectivity_changed"] is False
    assert row["initial_energy_eV"] - row["final_energy_eV"] == pytest.approx(0.1)
    assert np.array(row["positions"]).shape == (9, 3)
    assert pa.types.is_dictionary(table.schema.field("level").type)
    assert table.schema.field("fmax_eV_per_A").metadata[b"units"] == b"eV/angstrom"
    frames = {r["key"]: r for r in store.table("frames").to_pylist()}
    assert len(frames[row["key"]]["energy_eV"]) == 5
    assert np.array(frames[row["key"]]["positions"]).shape == (45, 3)
    assert list(store.table("relaxations").to_pandas().level.unique()) == ["GFN2-xTB"]


def test_what_is_missing_is_null(store: Store) -> None:
    geometries = store.table("geometries").to_pylist()
    assert {g["energy_eV"] for g in geometries if g["stage"] == "embed"} == {None}
    assert {g["parent_key"] for g in geometries if g["stage"] == "embed"} == {None}
    assert all(g["parent_key"] for g in geometries if g["stage"] == "mmff")
    # A NaN would count as the largest number and shift every median.
    answer = store.query("SELECT median(energy_eV) AS m, count(energy_eV) AS n FROM geometries")
    assert answer.to_pylist() == [{"m": -1.0, "n": len(MOLECULES)}]
    bad = store.query("SELECT line, message FROM tasks WHERE mol_key IS NULL").to_pylist()
    assert bad == [{"line": 6, "message": "SMILES 'C(C' is not closed [C(C]"}]


def test_an_unknown_table_is_refused_by_name(store: Store) -> None:
    for asked in (lambda: store.table("relaxation"), lambda: store.query("FROM relaxation")):
        with pytest.raises(StoreError) as caught:
            asked()
        assert "'relaxation'" in str(caught.value)
        assert all(name in str(caught.value) for name in TABLES)


def test_sql_groups_and_joins_by_key(store: Store) -> None:
    grouped = store.query(
        "SELECT level, count(*) AS n, median(n_steps) AS steps, "
        "max(relaxation_kcal_per_mol) AS gain FROM relaxations GROUP BY level"
    ).to_pylist()
    assert [(g["level"], g["n"], g["steps"]) for g in grouped] == [("GFN2-xTB", 5, 6.0)]
    assert grouped[0]["gain"] == pytest.approx(0.5 * 23.060548)
    joined = store.query(
        "SELECT m.name, m.charge FROM relaxations r JOIN molecules m ON r.mol_key = m.key "
        "JOIN tasks t ON t.key = r.key WHERE t.status = 'ok' ORDER BY r.n_steps DESC LIMIT 1"
    )
    assert joined.to_pylist() == [{"name": "acetate", "charge": -1}]


def test_a_filter_on_a_key_finds_its_row(store: Store) -> None:
    wanted = store.table("relaxations").to_pylist()[3]
    sql = f"SELECT n_steps, level FROM relaxations WHERE key = '{wanted['key']}'"
    assert store.query(sql).to_pylist() == [{"n_steps": wanted["n_steps"], "level": "GFN2-xTB"}]
    none = "SELECT key FROM relaxations WHERE level = 'PM7' OR connectivity_changed"
    assert store.query(none).num_rows == 0


def test_frames_are_rows_in_sql(store: Store) -> None:
    rows = store.query(
        "SELECT f.step, f.energy_eV FROM frames f JOIN molecules m ON f.mol_key = m.key "
        "WHERE m.name = 'benzene' ORDER BY step"
    ).to_pylist()
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [r["energy_eV"] for r in rows] == pytest.approx(np.linspace(0.3, 0.0, 7) - 100.0)
    total = store.query("SELECT count(*) AS n, count(DISTINCT key) AS k FROM frames")
    assert total.to_pylist() == [{"n": 35, "k": 5}]


def test_lists_are_in_sql_when_they_are_named(store: Store) -> None:
    assert "positions" not in store.query("SELECT * FROM relaxations").column_names
    answer = store.query(
        "SELECT numbers, len(positions) AS n FROM geometries WHERE stage = 'mmff' AND n = 7"
    ).to_pylist()
    assert answer == [{"numbers": [6, 6, 8, 8, 1, 1, 1], "n": 7}]


def test_only_what_a_query_names_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    compact(store)
    read: list[str] = []
    original = hdf5.TableFile._column

    def noted(group: object, column: object, rows: object) -> object:
        read.append(column.name)  # type: ignore[attr-defined]
        return original(group, column, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(hdf5.TableFile, "_column", staticmethod(noted))
    store.query(
        "WITH t AS (SELECT * FROM relaxations) "
        "SELECT level, median(n_steps) FROM t WHERE stage = 'gfn2' GROUP BY level"
    )
    assert sorted(read) == ["level", "n_steps", "stage"]


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELECT fmax FROM relaxations", "fmax_eV_per_A"),
        ("SELECT r.fmax FROM relaxations r", "fmax_eV_per_A"),
        ("SELEC 1", "syntax error"),
        ("SELECT 1; SELECT 2", "one SELECT"),
        ("", "one SELECT"),
        ("CREATE TABLE x AS SELECT 1", "read-only"),
        ("COPY relaxations TO 'stolen.csv'", "read-only"),
        ("INSTALL httpfs", "read-only"),
        ("SELECT * FROM read_csv('/etc/passwd')", "disabled"),
        ("SELECT * FROM '/etc/passwd'", "no table"),
        ("SELECT * FROM 'other.parquet'", "disabled"),
        ("SELECT n_steps::DATE FROM relaxations", "DATE"),
    ],
)
def test_a_refused_query_says_why_in_one_line(store: Store, sql: str, says: str) -> None:
    with pytest.raises(StoreError) as caught:
        store.query(sql)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_variables_are_no_tables(store: Store) -> None:
    secret = pa.table({"x": [1]})
    with pytest.raises(StoreError, match="no table 'secret'"):
        store.query("SELECT * FROM secret")
    assert secret.num_rows == 1


def test_an_empty_store_answers(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    for table in TABLES:
        assert store.table(table).num_rows == 0
        assert store.query(f"SELECT * FROM {table}").num_rows == 0
        assert store.query(f"SELECT count(*) AS n FROM {table}").to_pylist() == [{"n": 0}]


def test_damage_is_told_as_damage(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    little_records().seal(store)
    compact(store)
    (segment,) = (store.path / "segments").glob("relaxations-*.h5")
    data = bytearray(segment.read_bytes())
    data[:8] = b"\0" * 8
    segment.write_bytes(data)
    with pytest.raises(CorruptShardError, match=segment.name):
        store.query("SELECT count(*), max(n_steps) FROM relaxations")


def test_a_key_stands_for_its_path(store: Store) -> None:
    row = next(r for r in store.table("relaxations").to_pylist() if r["n_steps"] == 8)
    for name in (row["key"], row["key"][:9], row["key"].upper()):
        path = store.trajectory(name)
        assert [atoms.get_potential_energy() for atoms in path] == pytest.approx(
            np.linspace(0.5, 0.0, 9) - 100.0
        )
    last = path[-1]
    assert last.info["name"] == "acetate"
    assert last.info["charge"] == -1
    assert last.get_chemical_formula() == "C2H3O2"
    np.testing.assert_allclose(last.positions, row["positions"], atol=1e-5)
    np.testing.assert_allclose(last.get_forces(), 0.1 * last.positions, atol=1e-5)


def test_forces_that_were_not_saved_are_not_made_up(tmp_path: Path) -> None:
    from ase.calculators.calculator import PropertyNotImplementedError

    store = new_store(tmp_path / "store")
    records = Records()
    relaxed = records.relaxed("water", "O")
    records.seal(store)
    atoms = store.trajectory(relaxed.hex())[0]
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_forces()


def _with_key(name: str, start: str) -> bytes:
    return bytes.fromhex(start.ljust(32, "0"))[:15] + name[:1].encode()


@pytest.fixture
def alike(tmp_path: Path) -> Store:
    """A store with two relaxations whose keys share their first 20 digits."""
    store = new_store(tmp_path / "store")
    records = Records()
    for name, smiles in (("ammonia", "N"), ("water", "O")):
        records.relaxed(name, smiles)
        changed = _with_key(name, "abcdef0123456789abcd")
        for table in ("relaxations", "frames"):
            records.tables[table][-1]["key"] = changed
        records.tables["tasks"][-1]["key"] = changed
    failed = key("failed")
    records.task("gfn2", failed, status="convergence", message="the SCF did not converge")
    records.seal(store)
    compact(store)
    return store


def test_a_key_that_fits_two_is_refused(alike: Store) -> None:
    both = [_with_key(name, "abcdef0123456789abcd").hex() for name in ("ammonia", "water")]
    for start in ("abc", "abcdef0123456789", "abcdef0123456789abcd00"):
        with pytest.raises(StoreError, match="2 relaxations") as caught:
            alike.trajectory(start)
        assert all(one in str(caught.value) for one in both)
    assert alike.trajectory(both[1])[0].info["name"] == "water"


def test_a_key_without_a_path_says_what_it_is(alike: Store) -> None:
    with pytest.raises(StoreError, match="no relaxation has a key that begins with 0123456789"):
        alike.trajectory("0123456789")
    with pytest.raises(StoreError, match="'ethanol' is not a key"):
        alike.trajectory("ethanol")
    with pytest.raises(StoreError, match="convergence: the SCF did not converge"):
        alike.trajectory(key("failed").hex())
    embed = alike.query("SELECT key FROM geometries WHERE stage = 'embed'").to_pylist()[0]["key"]
    with pytest.raises(StoreError, match="stage embed"):
        alike.trajectory(embed)
    water = alike.query("SELECT key FROM molecules WHERE name = 'water'").to_pylist()[0]["key"]
    with pytest.raises(StoreError, match=_with_key("water", "abcdef0123456789abcd").hex()):
        alike.trajectory(water)


def test_a_stream_gives_each_row_once_in_slices(store: Store) -> None:
    slices = list(stream(store.snapshot(), "tasks", ["key", "stage"], step=3))
    assert max(len(rows) for rows in slices) <= 3
    keys = [tuple(k) for rows in slices for k in rows["key"].tolist()]
    assert len(keys) == len(set(keys)) == 3 * len(MOLECULES) + 1


def test_a_stream_prefers_the_retried_task(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    for name, status in (("first", "timeout"), ("second", "ok"), ("third", "timeout")):
        records = Records()
        records.task("gfn2", key("same"), status=status)
        records.seal(store, name)
    (rows,) = stream(store.snapshot(), "tasks", ["status"])
    assert rows["status"].strings() == ["ok"]


def test_lookup_tells_keys_apart_that_share_a_word() -> None:
    keys = [bytes(7) + b"\1" + bytes([0] * 7 + [i]) for i in (3, 1, 2)] + [bytes(15) + b"\7"]
    records = Records()
    for each in keys:
        records.task("embed", each)
    lookup = Lookup(from_records("tasks", records.tables["tasks"]))
    wanted = np.array([[1, 2], [1, 4], [0, 7], [9, 9], [1, 1], [1, 3], [0, 1]], np.uint64)
    assert lookup.find(wanted).tolist() == [2, -1, 3, -1, 1, 0, -1]
