"""The command as a user meets it: what it prints, where, and the status it ends with."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli, forecast, lock
from orchestrator import progress as progress_file
from orchestrator.cli import main
from orchestrator.counts import StageCounts
from orchestrator.errors import CampaignError, SiteError
from orchestrator.run import Progress
from orchestrator.show import Shower, core_hours, duration
from orchestrator.store import Store
from tests.orchestrator.random_stores import read_only, schema_of
from tests.orchestrator.store_fixtures import little_records

LIMIT_S = 110
COMMANDS = [
    "plan", "run", "submit", "stop", "status", "explain", "query", "export", "report", "speedup",
    "compact", "doctor",
]  # fmt: skip
CAMPAIGN = """
name = "tiny"
[molecules]
files = ["tiny.smi"]
[[stages]]
kernel = "embed"
[[stages]]
kernel = "mmff"
[[stages]]
name = "gfn2"
kernel = "relax"
level = "GFN2-xTB"
fmax = "0.1 eV/Å"
"""


def basin(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command: in a process of its own where it starts others, else here (quicker)."""
    words = [str(argument) for argument in arguments]
    if words[0] in ("run", "doctor"):
        return subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", *words],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    status: object = 0
    out, error = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["basin", *words])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", error)
        try:
            main()
        except SystemExit as exc:
            status = exc.code or 0
    for stream in (out, error):
        stream.flush()
    said, complained = (stream.buffer.getvalue().decode() for stream in (out, error))  # type: ignore[attr-defined]
    assert isinstance(status, int)
    return subprocess.CompletedProcess(words, status, said, complained)


def strict_json(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def on_terminal(*arguments: object, columns: int = 80) -> str:
    """Run the command on a terminal of 24 lines; return what it shows, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "dumb", "NO_COLOR": "1"}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    shown = b""
    try:
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.5)[0]:
                try:
                    block = os.read(ours, 65536)
                except OSError:  # the other end is closed
                    break
                if not block:
                    break
                shown += block
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three molecules, one of them twice, and a bad line, from SMILES to GFN2 minima."""
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "tiny.smi").write_text("CCO ethanol\nCO methanol\nO water\nC(C bad\nOC again\n")
    path = folder / "tiny.toml"
    path.write_text(CAMPAIGN)
    done = basin("run", path, "--workers", 2, "--report", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "run.json").write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def store(campaign: Path) -> Store:
    return Store(campaign.with_suffix(".basin"))


def key_of(store: Store, smiles: str) -> str:
    sql = (
        "SELECT r.key FROM relaxations r JOIN molecules m ON m.key = r.mol_key "
        f"WHERE m.smiles = '{smiles}'"
    )
    return str(store.query(sql).to_pylist()[0]["key"])


# --- starting ---------------------------------------------------------------------------------


def test_the_command_starts_without_the_heavy_packages() -> None:
    heavy = "numpy h5py rdkit parsl pandas duckdb ase pyarrow scipy matplotlib pydantic rich"
    code = f"import sys, orchestrator.cli; print(*(set({heavy.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself(command: str) -> None:
    done = basin(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith(f"Usage: basin {command}".rstrip())
    assert max(map(len, done.stdout.splitlines())) <= 80
    if not command:
        for name in COMMANDS:
            assert f"\n  {name} " in done.stdout
        assert "..." not in done.stdout.partition("Commands:")[2], "a summary was cut"


# --- what a run says --------------------------------------------------------------------------


def test_run_ends_with_the_counts(campaign: Path, store: Store) -> None:
    end = strict_json((campaign.parent / "run.json").read_text().splitlines()[-1])
    assert end["event"] == "end"
    assert end["complete"] is True
    assert [(c["stage"], c["planned"], c["ok"]) for c in end["counts"]] == [
        ("embed", 3, 3),
        ("mmff", 3, 3),
        ("gfn2", 3, 3),
    ]
    assert (end["entries"], end["bad_entries"], end["done_now"]) == (5, 1, 9)
    assert end["problems"] == {}
    assert Path(end["store"]) == store.path
    assert Path(end["report"]).read_text().startswith("<!")


def test_run_again_finds_all_done(campaign: Path) -> None:
    done = basin("run", campaign, "--workers", 1)
    assert done.returncode == 0
    assert done.stderr == "", "a run that is over at once has no progress to tell"
    assert "0 tasks done now (9 before)" in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["stage", "planned", "ok", "failed", "not", "reached", "waiting"]
    assert lines[3].split() == ["gfn2", "3", "3", "0", "0", "0"]


def test_status_says_how_it_stands(campaign: Path, store: Store) -> None:
    for place in (campaign, store.path):
        done = basin("status", place)
        assert done.returncode == 0
        assert done.stdout.startswith("tiny: not running; 5 entries read, 1 bad\n")
        assert "not reached" in done.stdout.splitlines()[1]
        assert "failures by class: input: 1" in done.stdout
        answer = strict_json(basin("status", place, "--json").stdout)
        assert answer["running"] is False
        assert answer["failures"] == {"input": 1}
        for c in answer["counts"]:
            assert c["planned"] == c["ok"] + c["failed"] + c["upstream"] + c["waiting"] == 3


def test_plan_says_what_would_run(campaign: Path, tmp_path: Path) -> None:
    shutil.copy(campaign.parent / "tiny.smi", tmp_path)
    fresh = Path(shutil.copy(campaign, tmp_path))
    done = basin("plan", fresh)
    assert done.returncode == 0
    assert "5 entries, 3 molecules, 1 repeated, 1 that cannot be read" in done.stdout
    assert f"{tmp_path / 'tiny.smi'}, line 4: SMILES 'C(C'" in done.stdout
    assert "what is left takes less than 0.001 core-hours, less than 1 s on" in done.stdout
    assert str(tmp_path / "tiny.basin") in done.stdout
    assert not (tmp_path / "tiny.basin").exists()
    answer = strict_json(basin("plan", fresh, "--json").stdout)
    assert [s["tasks"] for s in answer["stages"]] == [3, 3, 3]
    assert [s["done"] for s in answer["stages"]] == [0, 0, 0]
    finished = basin("plan", campaign)
    assert "nothing is left to do" in finished.stdout
    elsewhere = strict_json(basin("plan", campaign, "--store", tmp_path / "x", "--json").stdout)
    assert [s["done"] for s in elsewhere["stages"]] == [0, 0, 0]


def test_plan_fits_a_terminal(campaign: Path) -> None:
    table = on_terminal("plan", campaign).partition("stage ")[2].partition("nothing is left")[0]
    assert max(map(len, f"stage {table}".splitlines())) <= 80
    assert "GFN2-xTB/tblite, BFGS to 0.1 eV/Å" in table


@pytest.mark.parametrize("stage", ["embed", "mmff", "gfn2"])
def test_explain_tells_each_stage(campaign: Path, store: Store, stage: str) -> None:
    for what in ("OCC", key_of(store, "CCO"), key_of(store, "CCO")[:12]):
        done = basin("explain", what, campaign)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].startswith("ethanol: CCO (")
        assert any(line.startswith(f"  {stage}: ok; ") for line in lines)
    answer = strict_json(basin("explain", "OCC", store.path, "--json").stdout)
    assert len(answer["lines"]) == 4


def test_doctor_answers_in_json() -> None:
    done = basin("doctor", "--json")
    answer = strict_json(done.stdout)
    states = {f["what"]: f["state"] for f in answer}
    assert states["Python"] == states["site local"] == "ok"
    assert done.returncode == (1 if "broken" in states.values() else 0)


# --- from anywhere ---------------------------------------------------------------------------


def write_slow(folder: Path, seconds: str = "0.3 s", n: int = 200) -> Path:
    """Write a campaign that takes a minute on one worker."""
    (folder / "some.smi").write_text("".join(f"{'C' * k}O\n" for k in range(1, n)))
    path = folder / "slow.toml"
    path.write_text(
        'name = "slow"\n[molecules]\nfiles = ["some.smi"]\n[[stages]]\nkernel = "rehearse"\n'
        f'seconds = "{seconds}"\n[run]\nseal_every = "0.5 s"\nbundle_time = "2 s"\n'
    )
    return path


@pytest.mark.slow
def test_a_detached_run_is_watched_and_stopped_from_elsewhere(tmp_path: Path) -> None:
    path = write_slow(tmp_path)
    store = tmp_path / "slow.basin"
    done = basin("run", path, "--workers", 1, "--detach")
    assert done.returncode == 0, done.stderr
    head, log, _, _ = done.stdout.splitlines()
    pid = lock.who(store)["pid"]
    assert head == f"slow goes on as process {pid}; you may log out"
    assert Path(log.split()[1]).parent == store / "logs"
    assert os.getsid(pid) == pid, "it has a session of its own"
    second = basin("run", path, "--workers", 1, "--detach")
    assert second.returncode == 3
    assert f"process {pid}" in second.stderr
    end = time.monotonic() + 60
    while not (ok := strict_json(basin("status", path, "--json").stdout)["counts"][0]["ok"]):
        assert time.monotonic() < end
        time.sleep(0.2)
    running = strict_json(basin("status", store, "--json").stdout)
    assert running["running"] is True
    assert {"blocks", "bad_nodes", "node_hours", "rate"} <= set(running["run"])
    stopped = basin("stop", store)
    assert stopped.returncode == 0, stopped.stderr
    lines = stopped.stdout.splitlines()
    assert lines[0].startswith(f"asked process {pid} on ")
    assert lines[-1] == "stopped; finished work is kept, and `basin run` goes on from there"
    assert not lock.is_running(store)
    (counts,) = strict_json(basin("status", path, "--json").stdout)["counts"]
    assert ok <= counts["ok"] < 199
    assert counts["failed"] == 0
    assert "not finished" in Path(log.split()[1]).read_text()
    again = basin("stop", store)
    assert again.stdout == f"nothing works on {store}\n"


def test_a_detached_run_that_cannot_start_says_why(campaign: Path, store: Store) -> None:
    held = lock.DriverLock(store.path, "somebody")
    try:
        done = basin("run", campaign, "--workers", 1, "--detach")
        assert f"process {os.getpid()}" in one_line(done, 3)
    finally:
        held.release()


def test_status_shows_blocks_nodes_and_what_was_used(campaign: Path, store: Store) -> None:
    copy = campaign.parent / "told.basin"
    shutil.copytree(store.path, copy, ignore=shutil.ignore_patterns("logs"))
    now = time.time()
    told = {"reason": "", "words": "", "nodes": [], "start_s": None, "end_s": None, "pool": "cpu"}
    blocks = [
        {**told, "job_id": "11", "state": "running", "nodes": ["n1", "n2"]},
        *({**told, "job_id": str(n), "state": "pending", "words": "Priority"} for n in (12, 13)),
        {**told, "job_id": "10", "state": "ended", "reason": "walltime", "words": "job 10 of n3"},
    ]
    blocks[0] |= {"start_s": now - 60, "end_s": now + 3600}
    held = lock.DriverLock(copy, "r")
    try:
        run = progress_file.ProgressFile(
            run_id="r", time_s=now, blocks=blocks, bad_nodes={"n7": "9 of 9 items failed there"},
            node_hours=12.5, rate=3.0, left_s=600.0,
        )  # fmt: skip
        progress_file.write(copy, run)
        shown = basin("status", copy)
    finally:
        held.release()
    lines = shown.stdout.splitlines()
    block = next(line.split() for line in lines if line.startswith("11 "))
    assert block[:4] == ["11", "cpu", "n1", "+1"]
    assert "pool cpu: 2 blocks wait in the queue (Priority)" in lines
    assert "job 10 of n3" in lines
    assert "bad node n7: 9 of 9 items failed there" in lines
    assert "12.5 node-hours used, 3.0 tasks/s, 10 min 00 s left" in lines
    # Its driver gone, the same store says what may be left, and who cancels it.
    gone = basin("status", copy).stdout
    assert "its jobs 11, 12, 13 may be left: `basin stop" in gone
    assert "12.5 node-hours used" in gone


def test_the_site_may_come_from_the_environment(
    campaign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASIN_SITE", "archer3")
    assert "archer3" in one_line(basin("plan", campaign), 2)
    assert basin("plan", campaign, "--site", "local").returncode == 0


def test_plan_refuses_what_costs_too_much(campaign: Path, tmp_path: Path) -> None:
    done = basin("plan", campaign, "--store", tmp_path / "x", "--max-node-hours", 0)
    assert done.returncode == 2
    assert "basin: --max-node-hours 0: what is left takes about " in done.stderr
    assert basin("plan", campaign, "--max-node-hours", 0).returncode == 0, "nothing is left"


def test_run_refuses_at_its_start_what_costs_too_much(campaign: Path, tmp_path: Path) -> None:
    place = tmp_path / "x"
    for more in ([], ["--detach"]):
        said = one_line(basin("run", campaign, "--store", place, "--max-node-hours", 0, *more), 2)
        assert re.search(r"takes about \d+\.\d\d node-hours, and 0\.00 of 0 are used", said)
        assert re.search(r"allow 0\.\d\d or more", said)
    site = tmp_path / "mycluster.toml"
    site.write_text('base = "slurm"\n[driver]\n[pools.cpu]\ncores_per_node = 2\n')
    done = basin(
        *("submit", campaign, "--store", place, "--site", site, "--print"),
        *("--max-node-hours", 0),
    )
    assert "what is left takes about" in one_line(done, 2)
    assert not place.exists(), "no store is made for nothing"


def test_what_earlier_runs_used_counts_against_the_budget(campaign: Path, tmp_path: Path) -> None:
    place = Store.create(tmp_path / "x", "tiny").path
    progress_file.write(place, progress_file.ProgressFile(node_hours=100.0))
    said = one_line(basin("run", campaign, "--store", place, "--max-node-hours", 100), 2)
    assert "and 100.00 of 100 are used" in said
    assert not (place / "control" / "driver.json").exists()


@pytest.mark.parametrize("limit", [1234567.25, 0.1, 500.0, 1e-7, 2.0**60])
def test_a_budget_is_passed_on_as_it_was_given(campaign: Path, limit: float) -> None:
    words = cli._Options("local", max_node_hours=limit).words(cli._campaign(campaign))
    (word,) = (word for word in words if word.startswith("--max-node-hours="))
    assert float(word.partition("=")[2]) == limit
    assert not word.endswith(".0")


def test_what_cannot_be_forecast_is_started(
    campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise SiteError("its nodes are not known")

    loaded = cli._campaign(campaign, tmp_path / "x")
    options = cli._Options("local", max_node_hours=0.0)
    with pytest.raises(CampaignError, match="what is left takes about"):
        cli._require_budget(loaded, options)
    monkeypatch.setattr(forecast, "forecast", unknown)
    cli._require_budget(loaded, options)


# --- queries ----------------------------------------------------------------------------------

WIDE = "SELECT * FROM relaxations ORDER BY n_atoms"


def test_query_into_a_pipe_cuts_nothing(store: Store) -> None:
    done = basin("query", WIDE, store.path)
    assert done.returncode == 0
    head, *rows = done.stdout.splitlines()
    assert {"key", "mol_key", "final_energy_eV", "fmax_eV_per_A"} <= set(head.split())
    assert len(rows) == 3
    assert "…" not in done.stdout
    assert len(rows[0].split()[0]) == 32


def test_query_aligns_numbers_to_the_right(store: Store) -> None:
    sql = "SELECT n_atoms, stage, final_energy_eV AS e FROM relaxations ORDER BY 1"
    lines = basin("query", sql, store.path).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["n_atoms", "3", "6", "9"]
    assert [line.index(word) for line, word in zip(lines[1:], "369", strict=True)] == [6, 6, 6]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert lines[0].endswith("  e")
    # An energy of a hundred eV still shows the meV.
    assert len(lines[1].rpartition(".")[2]) == 6


def test_query_on_a_terminal_shows_wide_rows_one_value_a_line(store: Store) -> None:
    shown = on_terminal("query", WIDE, store.path)
    lines = shown.splitlines()
    assert lines[0] == "-- row 1"
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines if line.startswith("n_atoms")] == [
        ["n_atoms", "3"],
        ["n_atoms", "6"],
        ["n_atoms", "9"],
    ]
    narrow = on_terminal("query", "SELECT stage, status, attempts FROM tasks", store.path)
    assert narrow.splitlines()[0].split() == ["stage", "status", "attempts"]


def test_query_limits_rows_on_a_terminal_only(store: Store) -> None:
    many = "SELECT range AS n FROM range(60)"
    shown = on_terminal("query", many, store.path).splitlines()
    assert len(shown) == 1 + 50 + 1
    assert shown[-1] == "... 60 rows in all; --limit shows more, --csv all"
    assert len(on_terminal("query", many, store.path, "--limit", 60).splitlines()) == 61
    assert len(basin("query", many, store.path).stdout.splitlines()) == 61
    assert basin("query", many, store.path, "--limit", 0).returncode == 2


def test_query_as_csv_and_json(store: Store) -> None:
    sql = "SELECT key, stage, n_atoms, positions FROM relaxations ORDER BY n_atoms"
    rows = list(csv.DictReader(io.StringIO(basin("query", sql, store.path, "--csv").stdout)))
    answer = strict_json(basin("query", sql, store.path, "--json").stdout)
    assert [row["n_atoms"] for row in rows] == ["3", "6", "9"]
    assert [row["n_atoms"] for row in answer] == [3, 6, 9]
    assert [row["key"] for row in rows] == [row["key"] for row in answer]
    assert json.loads(rows[1]["positions"]) == answer[1]["positions"]
    assert len(answer[2]["positions"]) == 9


def test_query_without_an_answer(store: Store) -> None:
    done = basin("query", "SELECT key, stage FROM tasks WHERE stage = 'nope'", store.path)
    assert done.returncode == 0
    assert done.stdout == "key  stage\nno rows\n"
    nothing = "SELECT 'nan'::DOUBLE AS x, NULL AS y, 'inf'::DOUBLE AS z"
    answer = strict_json(basin("query", nothing, store.path, "--json").stdout)
    assert answer == [{"x": None, "y": None, "z": None}]


# --- files to take away -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "start"),
    [
        ("out.sdf", [], b"ethanol"),
        ("out.extxyz", [], None),
        ("out.xyz", ["--frames"], None),
        ("out.h5", [], b"\x89HDF"),
        ("tasks.parquet", ["--table", "tasks"], b"PAR1"),
    ],
)
def test_export_goes_by_the_ending(
    store: Store, tmp_path: Path, name: str, more: list[str], start: bytes | None
) -> None:
    target = tmp_path / name
    done = basin("export", store.path, target, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(target)
    data = target.read_bytes() if target.is_file() else b""
    if start == b"ethanol":
        assert data.count(b"$$$$") == 3
    elif start is not None and target.is_file():
        assert data.startswith(start)
    elif target.is_file():
        assert int(data.split()[0]) in (3, 6, 9)
    again = basin("export", store.path, target, *more)
    assert again.returncode == 3
    assert "--overwrite" in again.stderr


def test_export_of_a_folder_and_of_an_unknown_ending(store: Store, tmp_path: Path) -> None:
    assert basin("export", store.path, tmp_path / "tables").returncode == 0
    assert (tmp_path / "tables" / "relaxations.parquet").exists()
    refused = basin("export", store.path, tmp_path / "out.txt")
    assert refused.returncode == 2
    assert "'.txt'" in refused.stderr
    assert "--as" in refused.stderr
    assert not (tmp_path / "out.txt").exists()
    assert basin("export", store.path, tmp_path / "out.txt", "--as", "sdf").returncode == 0


def test_report_says_where_it_is(store: Store, tmp_path: Path) -> None:
    done = basin("report", store.path)
    assert done.stdout.strip() == str(store.path / "report.html")
    done = basin("report", store.path, tmp_path / "mine.html")
    assert done.stdout.strip() == str(tmp_path / "mine.html")
    page = (tmp_path / "mine.html").read_text()
    # The report and the terminal use the same words for the same counts.
    for word in ("planned", "not reached", "waiting"):
        assert word in page


# --- errors -----------------------------------------------------------------------------------


def one_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    assert done.returncode == status, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("basin: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = \n", "bad.toml"),
        ('name = "x"\n', "molecules"),
        (CAMPAIGN.replace("tiny.smi", "absent.smi"), "absent.smi"),
        (CAMPAIGN + "fmx = 3\n", "fmax"),
        (CAMPAIGN.replace("0.1 eV/Å", "0.1 Å"), "0.1 Å"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run", "submit"])
def test_a_wrong_campaign_is_one_message(
    tmp_path: Path, text: str, words: str, command: str
) -> None:
    (tmp_path / "tiny.smi").write_text("CCO\n")
    path = tmp_path / "bad.toml"
    path.write_text(text)
    done = basin(command, path)
    assert done.returncode == 2
    assert done.stderr.startswith("basin: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.basin").exists()
    assert not (tmp_path / "tiny.basin").exists()


@pytest.mark.parametrize("command", ["plan", "run", "status", "report"])
def test_a_campaign_file_that_is_not_there(tmp_path: Path, command: str) -> None:
    assert "no such file" in one_line(basin(command, tmp_path / "none.toml"), 2)


def test_a_wrong_site_is_one_message(campaign: Path) -> None:
    for command in ("plan", "run"):
        message = one_line(basin(command, campaign, "--site", "archer3"), 2)
        assert "known are aurora, frontier, local, " in message


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["stop"], ["query", "SELECT 1"], ["report"], ["compact"], ["explain", "CCO"]],
    ids=lambda a: a[0],
)
def test_where_there_is_no_store(tmp_path: Path, arguments: list[str]) -> None:
    message = one_line(basin(*arguments, tmp_path), 3)
    assert f"{tmp_path}: no Basin store here" in message


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT nope FROM tasks", "nope"),
        ("SELECT * FROM nope", "the tables are molecules, geometries"),
        ("DELETE FROM tasks", "one SELECT"),
        ("", "one SELECT"),
        ("SELECT 1; SELECT 2", "one SELECT"),
        ("SELECT * FROM read_csv('/etc/passwd')", ""),
    ],
)
def test_a_wrong_query_is_one_message(store: Store, sql: str, words: str) -> None:
    assert words in one_line(basin("query", sql, store.path), 3)


def test_a_query_whose_arguments_are_swapped(store: Store) -> None:
    message = one_line(basin("query", store.path, "SELECT 1"), 2)
    assert "the SQL comes first" in message
    assert str(store.path) in message


def test_explaining_what_is_not_there(campaign: Path) -> None:
    for what in ("ffffffffffffffffffffffffffffffff", "CCCCCCCC", "no molecule"):
        assert repr(what) in one_line(basin("explain", what, campaign), 3)


@pytest.mark.parametrize("version", [2, 0])
def test_a_store_of_another_schema(
    campaign: Path, store: Store, tmp_path: Path, version: int
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy, ignore=shutil.ignore_patterns("logs"))
    about = json.loads((copy / "campaign.json").read_text())
    (copy / "campaign.json").write_text(json.dumps({**about, "schema_version": version}))
    before = {p: p.stat().st_mtime for p in copy.rglob("*") if p.is_file()}
    for arguments in (
        ["status", copy],
        ["query", "SELECT 1", copy],
        ["report", copy],
        ["compact", copy],
        ["plan", campaign, "--store", copy],
        ["run", campaign, "--store", copy],
    ):
        message = one_line(basin(*arguments), 3)
        assert f"schema {version}, this Basin reads schema 1" in message
        assert ("upgrade" in message) is (version == 2)
    assert {p: p.stat().st_mtime for p in copy.rglob("*") if p.is_file()} == before


def test_shards_of_a_newer_schema_are_told_and_left(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy, ignore=shutil.ignore_patterns("logs"))
    with schema_of(2):
        newer = little_records().seal(Store(copy), "newer")
    status = basin("status", copy)
    assert status.returncode == 0
    assert str(newer) in status.stderr
    assert "schema 2" in status.stderr
    assert strict_json(basin("status", copy, "--json").stdout)["problems"]
    campaign = store.path.with_suffix(".toml")
    done = basin("run", campaign, "--store", copy, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert newer.exists()


def test_a_damaged_shard_is_told_and_computed_again(
    campaign: Path, store: Store, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy, ignore=shutil.ignore_patterns("logs", "segments"))
    # As if the driver had died before any compaction, and the disk had lost an end since.
    for path in (copy / "manifest").iterdir():
        path.unlink()
    (copy / "segments").mkdir()
    (victim,) = (copy / "inbox").rglob("0000003-*.h5")
    victim.write_bytes(victim.read_bytes()[:-1000])
    assert str(victim) in basin("status", copy).stderr
    done = basin("run", campaign, "--store", copy, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert str(victim) in done.stderr
    assert victim.exists()
    counts = strict_json(basin("status", copy, "--json").stdout)["counts"]
    assert [c["ok"] for c in counts] == [3, 3, 3]
    assert store.read("tasks")["key"].shape == Store(copy).read("tasks")["key"].shape


def test_usage_errors_end_with_two() -> None:
    for arguments in (["nope"], ["run"], ["run", "x.toml", "--workers", "0"], ["query", "x"]):
        done = basin(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "Error: " in done.stderr


def test_a_second_driver_is_refused(campaign: Path, store: Store) -> None:
    held = lock.DriverLock(store.path, "somebody")
    try:
        message = one_line(basin("run", campaign, "--workers", 1), 3)
        assert f"process {os.getpid()}" in message
        running = basin("status", store.path)
        assert running.stdout.startswith(f"tiny: running (process {os.getpid()}")
    finally:
        held.release()


def test_a_run_that_was_stopped_ends_with_five(tmp_path: Path) -> None:
    (tmp_path / "some.smi").write_text("".join(f"{'C' * n}O\n" for n in range(1, 30)))
    path = tmp_path / "slow.toml"
    path.write_text(
        'name = "slow"\n[molecules]\nfiles = ["some.smi"]\n[[stages]]\nkernel = "rehearse"\n'
        'seconds = "0.2 s"\n[run]\nseal_every = "0.5 s"\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "run", str(path), "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        inbox = tmp_path / "slow.basin" / "inbox"
        while not list(inbox.glob("2*/*.h5")) and time.monotonic() < end:
            time.sleep(0.1)
        process.terminate()
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 5, error
    assert "the same command goes on from here" in error
    assert "rehearse" in out
    counts = strict_json(basin("status", path, "--json").stdout)["counts"][0]
    assert 0 < counts["ok"] < 29
    assert counts["ok"] + counts["waiting"] == 29


def test_a_reader_that_goes_away_is_no_error(store: Store) -> None:
    many = "SELECT range, repeat('x', 100) FROM range(50000)"
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "query", many, str(store.path), "--csv"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) != 0


# --- places where nothing can be written ------------------------------------------------------


def test_a_read_only_store_can_be_read(campaign: Path, store: Store, tmp_path: Path) -> None:
    with read_only(store.path, tmp_path / "seen") as seen:
        for arguments in (
            ["status", seen],
            ["query", "SELECT count(*) FROM relaxations", seen],
            ["explain", "CCO", seen],
            ["plan", campaign, "--store", seen],
            ["report", seen, tmp_path / "report.html"],
            ["export", seen, tmp_path / "out.sdf"],
        ):
            done = basin(*arguments)
            assert done.returncode == 0, done.stderr
            assert done.stderr == ""
        message = one_line(basin("run", campaign, "--store", seen), 3)
        assert "read-only" in message
        assert str(seen) in message
        message = one_line(basin("report", seen), 3)
        assert str(seen / "report.html") in message
        assert "Read-only file system" in message
        assert one_line(basin("run", campaign, "--store", seen / "inbox" / "new"), 3)


def test_shards_in_a_read_only_store_are_read(tmp_path: Path, store: Store) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy, ignore=shutil.ignore_patterns("logs"))
    little_records().seal(Store(copy), "more")
    with read_only(copy, tmp_path / "seen") as seen:
        done = basin("query", "SELECT count(*) AS n FROM relaxations", seen, "--json")
        assert strict_json(done.stdout) == [{"n": 8}]
        assert "Read-only file system" in one_line(basin("compact", seen), 3)


# --- how numbers and progress are shown -------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.2, "less than 1 s"),
        (59.4, "59 s"),
        (59.7, "1 min 00 s"),
        (119.9, "2 min 00 s"),
        (3599.8, "1 h 00 min"),
        (90061.0, "25 h 01 min"),
        (864000.0, "10.0 d"),
    ],
)
def test_durations_as_a_person_says_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.0, "0"), (1e-7, "less than 0.001"), (0.01234, "0.0123"), (42.0, "42"), (12345.6, "12,346")],
)
def test_core_hours_have_no_powers_of_ten(hours: float, text: str) -> None:
    assert core_hours(hours) == text


def progress(done: int) -> Progress:
    return Progress(
        campaign="c",
        stages=[StageCounts("embed", 9, done, 0, 0, 9 - done)],
        complete_plan=True,
        entries=9,
        bad_entries=0,
        elapsed_s=20.0,
        done_now=done,
        rate=1.0,
        left_s=4.0,
        core_s=7.2,
        in_flight=1,
        draining=False,
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_plain_progress_begins_when_there_is_something_to_tell(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Shower(as_json=as_json) as shower:
        shower(progress(0))
        assert capsys.readouterr() == ("", "")
        clock[0] += 20.0
        shower(progress(4))
        shower(progress(5))
    out, error = capsys.readouterr()
    if as_json:
        (line,) = out.splitlines()
        assert strict_json(line)["stages"][0]["ok"] == 4
    else:
        assert out == ""
        (line,) = error.splitlines()
        assert line == "[20 s] embed 4/9 of 9 entries; 1.0/s, 4 s left, 0.002 core-hours"
