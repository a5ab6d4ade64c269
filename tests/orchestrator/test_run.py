"""Whole campaigns: faults cost one item each, circumstances change no row, nothing goes missing."""

from __future__ import annotations

import csv
import itertools
import os
import re
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from orchestrator.campaign import load_campaign
from orchestrator.store import Store
from tests.orchestrator.run_fixtures import (
    CHEMISTRY,
    SMALL,
    assert_no_key_twice_in_segments,
    assert_same_rows,
    by_key,
    complete,
    ingested,
    kill,
    running,
    standing_of,
    store_of,
    until,
    write_campaign,
)

FAULTS = {
    "CC": ("segfault", "crash"),
    "CCC": ("hang", "timeout"),
    "CCCC": ("memory", "resource"),
    "CCCCC": ("exit", "crash"),
    "CCCCCC": ("error", "crash"),
}


def rehearsal(faults: dict[str, str], extra: str = "") -> str:
    told = ", ".join(f'"{smiles}" = "{fault}"' for smiles, fault in faults.items())
    return f'[[stages]]\nkernel = "rehearse"\nfaults = {{{told}}}\n{extra}'


def by_smiles(store: Store) -> dict[str, dict[str, object]]:
    """Return the tasks of a one-stage campaign by the SMILES of their molecule."""
    smiles = {k: row["smiles"].decode() for k, row in by_key(store, "molecules").items()}
    return {smiles[row["mol_key"]]: row for row in by_key(store, "tasks").values()}


@pytest.mark.slow
def test_faults_of_one_bundle_are_rows_of_their_own(tmp_path: Path) -> None:
    molecules = ["C" * n for n in range(1, 21)]
    limits = 'time_limit = "6 s"\nmemory_limit = "250 MB"\n'
    stages = rehearsal({s: fault for s, (fault, _) in FAULTS.items()}, limits)
    campaign = write_campaign(tmp_path, molecules, stages=stages)
    complete(campaign, workers=1)
    first = by_smiles(store_of(campaign))
    assert {s: row["status"] for s, row in first.items()} == {
        s: FAULTS[s][1] if s in FAULTS else "ok" for s in molecules
    }
    words = {"segfault": b"SIGSEGV", "hang": b"time limit", "exit": b"exit status 3"}
    for smiles, (fault, _) in FAULTS.items():
        assert words.get(fault, b"") in first[smiles]["message"]  # type: ignore[operator]
    (counts,) = standing_of(campaign).counts
    assert (counts.planned, counts.ok, counts.failed) == (20, 15, 5)

    again = complete(campaign)
    assert again["done_now"] == 0

    retried = complete(campaign, "--retry-failed", workers=1)
    assert retried["done_now"] == 5
    second = by_smiles(store_of(campaign))
    anew = {s for s in molecules if second[s]["started_s"] != first[s]["started_s"]}
    assert anew == set(FAULTS)
    assert {s: r["status"] for s, r in second.items()} == {s: r["status"] for s, r in first.items()}
    assert_no_key_twice_in_segments(store_of(campaign))


def test_finished_rows_are_sealed_while_a_long_item_runs(tmp_path: Path) -> None:
    campaign = write_campaign(
        tmp_path,
        ["CCC", "CC", "C"],
        stages=rehearsal({"C": "hang"}, "seconds = 0.05\n"),
        run='seal_every = "0.2 s"',
    )
    with running(campaign, workers=1) as run:

        def sealed() -> bool:
            return len(by_smiles(store_of(campaign))) == 2 if run.children() else False

        until(sealed, 30, run.output)
        assert run.process.poll() is None


@pytest.mark.slow
def test_a_lost_interchange_ends_the_run_and_not_the_campaign(tmp_path: Path) -> None:
    molecules = ["C" * n for n in range(1, 9)]
    campaign = write_campaign(tmp_path, molecules, stages=rehearsal({}, "seconds = 0.5\n"))
    with running(campaign) as run:
        until(run.children, 60, run.output)
        (interchange,) = run.interchanges()
        interchange.kill()
        assert run.wait(60) == 4, run.output()
        assert "interchange ended or hangs (exit status -9)" in run.output()
        run.assert_gone()
    complete(campaign)


@pytest.mark.slow
def test_a_lost_pool_is_replaced_within_the_run(tmp_path: Path) -> None:
    molecules = ["C" * n for n in range(1, 9)]
    campaign = write_campaign(tmp_path, molecules, stages=rehearsal({}, "seconds = 0.5\n"))
    with running(campaign) as run:
        until(run.children, 60, run.output)
        for pool in run.pools():
            assert kill(pool)
        assert run.wait() == 0, run.output()
        assert run.end()["lost_bundles"] >= 1
        run.assert_gone()
    assert [c.ok for c in standing_of(campaign).counts] == [8]


@pytest.mark.slow
def test_a_pool_that_never_starts_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, ["C"], stages=rehearsal({}))
    site = tmp_path / "broken.py"
    site.write_text(
        "from site_configs.local import make_config as local\n"
        "def make_config(workers=None):\n"
        "    config = local(workers)\n"
        "    config.executors[0].provider.worker_init = 'no-such-module-command; exit 7'\n"
        "    return config\n"
    )
    with running(campaign, f"--site={site}") as run:
        assert run.wait(60) == 4, run.output()
        message = run.output()
        run.assert_gone()
    assert "pool 'cpu'" in message
    assert "exit status 7" in message
    assert "no-such-module-command" in message


def test_a_worker_that_cannot_start_kernels_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, ["C"], stages=rehearsal({}))
    (tmp_path / "broken").mkdir()
    # Found by the kernel processes only: workers have imported it before.
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import sys\nif 'orchestrator.child' in ' '.join(sys.orig_argv):\n"
        "    sys.exit('a library is missing')\n"
    )
    site = tmp_path / "site.py"
    site.write_text(
        "from site_configs.local import make_config as local\n"
        "def make_config(workers=None):\n"
        "    config = local(workers)\n"
        f"    config.executors[0].provider.worker_init = 'export PYTHONPATH={tmp_path}/broken'\n"
        "    return config\n"
    )
    with running(campaign, f"--site={site}") as run:
        assert run.wait(60) == 4, run.output()
        assert "a library is missing" in run.output()
        run.assert_gone()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return the store of a campaign run with the usual settings, two conformers a molecule."""
    campaign = write_campaign(tmp_path_factory.mktemp("reference"), SMALL[:16], stages=CONFORMERS)
    complete(campaign)
    return store_of(campaign)


CONFORMERS = CHEMISTRY.replace('"embed"\n', '"embed"\nconformers = 2\n')


@pytest.mark.parametrize(
    ("workers", "bundle_time", "backwards"),
    [pytest.param(1, "100 s", True, marks=pytest.mark.slow), (3, "1 ms", False)],
)
def test_bundles_workers_and_order_change_no_row(
    tmp_path: Path, reference: Store, workers: int, bundle_time: str, backwards: bool
) -> None:
    smiles = SMALL[:16][::-1] if backwards else SMALL[:16]
    campaign = write_campaign(
        tmp_path, smiles, stages=CONFORMERS, run=f'bundle_time = "{bundle_time}"'
    )
    complete(campaign, workers=workers)
    assert_same_rows(store_of(campaign), reference)


def test_a_resumed_run_computes_only_what_is_missing(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, ["C", "CC"], stages=rehearsal({}))
    assert complete(campaign)["done_now"] == 2
    (tmp_path / "molecules.smi").write_text("CC\nCCC\nC\nCCCC\n")
    grown = complete(campaign)
    assert grown["done_now"] == 2
    assert grown["done_before"] == 2
    assert [(c.planned, c.ok) for c in standing_of(campaign).counts] == [(4, 4)]
    (tmp_path / "molecules.smi").write_text("CCC\n")
    assert complete(campaign)["done_now"] == 0
    assert [(c.planned, c.ok) for c in standing_of(campaign).counts] == [(1, 1)]


def test_ctrl_c_while_the_files_are_read_drains(tmp_path: Path) -> None:
    """At a terminal Ctrl-C reaches the driver's own children as well; they must not break off."""
    molecules = ["C" * n for n in range(1, 4000)]
    campaign = write_campaign(tmp_path, molecules, stages=rehearsal({}, "seconds = 0.5\n"))
    with running(campaign) as run:
        until(run.children, 60, run.output)
        interchange = until(run.interchanges)
        for process in psutil.Process(run.process.pid).children():
            # The terminal signals a process group: these would be in it.
            if process in interchange:
                process.send_signal(signal.SIGINT)
        assert run.interchanges() == interchange
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait(40) == 5, run.output()
        assert "failed" not in run.output().splitlines()[-1].split("event")[0]
        run.assert_gone()


@pytest.mark.slow
def test_a_start_that_is_gone_leaves_its_task_waiting(tmp_path: Path) -> None:
    """Geometries of a file live in one shard of the inbox; without it there is no start."""
    (tmp_path / "water.xyz").write_text("3\n\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n")
    stages = '[[stages]]\nkernel = "relax"\n'
    campaign = write_campaign(tmp_path, stages=stages, files='["water.xyz"]')
    store, _ = ingested(load_campaign(campaign))
    (start,) = (store.path / "inbox").rglob("*.h5")
    kept = start.read_bytes()
    start.unlink()
    with running(campaign, workers=1) as run:
        assert run.wait(40) == 5, run.output()
    assert [(c.ok, c.waiting) for c in standing_of(campaign).counts] == [(0, 1)]
    start.write_bytes(kept)
    complete(campaign)
    assert [(c.ok, c.waiting) for c in standing_of(campaign).counts] == [(1, 0)]


@pytest.mark.slow
def test_every_line_of_real_data_sets_is_accounted_for(tmp_path: Path, shared_data: Path) -> None:
    from rdkit import Chem, rdBase

    with open(shared_data / "geom_drugs" / "geom_drugs_smiles.csv") as file:
        drugs = [row["smiles"] for row in csv.DictReader(file)]
    assert len(drugs) == 700
    good: list[str] = []
    bad: list[str] = []
    with open(shared_data / "qm9" / "qm9_smiles.csv") as file, rdBase.BlockLogs():
        for row in itertools.islice(csv.DictReader(file), None):
            if len(good) < 900:
                readable = Chem.MolFromSmiles(row["smiles"]) is not None
                (good if readable else bad).append(row["smiles"])
            elif len(bad) == 100:
                break
            elif re.search(r"\[n|\[N", row["smiles"]) and Chem.MolFromSmiles(row["smiles"]) is None:
                bad.append(row["smiles"])
    lines = [*drugs, *good[:450], *bad, *good[450:]]
    assert len(lines) == 1700
    stages = (
        '[[stages]]\nkernel = "embed"\ntime_limit = "30 s"\n'
        '[[stages]]\nkernel = "mmff"\ntime_limit = "30 s"\n'
    )
    campaign = write_campaign(tmp_path, lines, stages=stages)
    with running(campaign) as run:
        assert run.wait(600) == 0, run.output()
        run.assert_gone()
    standing = standing_of(campaign)
    store = store_of(campaign)
    molecules = by_key(store, "molecules")
    read = [row for row in by_key(store, "tasks").values() if row["stage"] == "molecules"]
    refused = [row for row in read if row["status"] == "input"]
    repeated = [row for row in read if row["status"] == "ok"]
    assert len(lines) == len(molecules) + len(repeated) + len(refused) == standing.entries
    assert len(refused) == standing.bad_entries >= 100
    at = [int(np.frombuffer(row["line"], "<i8")[0]) for row in [*read, *molecules.values()]]
    assert sorted(at) == list(range(1, 1701))
    for counts in standing.counts:
        assert counts.planned == len(molecules)
        assert counts.waiting == 0
    embed, mmff = standing.counts
    assert mmff.upstream == embed.failed
    assert mmff.ok > 1500
    assert load_campaign(campaign).store == store.path
