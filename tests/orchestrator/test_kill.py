"""kill -9 at random moments: after resuming, the store is an uninterrupted run's, key by key."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from orchestrator.lock import who
from orchestrator.store import Store
from orchestrator.tables import Lookup
from tests.orchestrator.run_fixtures import (
    SMALL,
    Run,
    assert_no_key_twice_in_segments,
    by_key,
    complete,
    kill,
    running,
    standing_of,
    standing_still,
    store_of,
    until,
    write_campaign,
)
from tests.orchestrator.tiny_models import write_model

KINDS = ("driver", "worker", "pool", "child")
# 51 atoms and more than fifty steps: seconds of work in one item.
LONG = "CCCCCCOCCOCC(=O)NCCCCC"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return the store of a run that nobody disturbed."""
    campaign = write_campaign(tmp_path_factory.mktemp("undisturbed"), SMALL)
    complete(campaign)
    standing = standing_of(campaign)
    assert [c.ok for c in standing.counts] == [len(SMALL)] * 3
    return store_of(campaign)


def target(run: Run, kind: str, rng: random.Random) -> psutil.Process | None:
    """Return the process of that kind to kill; None where the run has ended meanwhile."""

    def find() -> list[psutil.Process] | None:
        if run.process.poll() is not None:
            return [psutil.Process()]
        if kind == "driver":
            return [psutil.Process(run.process.pid)]
        children = run.children()
        if kind == "worker":
            try:
                return [parent for child in children if (parent := child.parent())]
            except psutil.NoSuchProcess:
                return None
        return children if kind == "child" else run.pools()

    found = rng.choice(until(find, 60, run.output))
    return None if found == psutil.Process() else found


def torture(folder: Path, rounds: int, seed: int, uninterrupted: Store) -> None:
    """Kill that many processes, over as many runs of the campaign as it takes, and compare."""
    rng = random.Random(seed)
    kinds: list[str] = []
    life = 0
    while rounds > 0:
        life += 1
        assert life < 20, f"{rounds} rounds left: the campaign ends before it can be disturbed"
        campaign = write_campaign(
            folder / f"life{life}",
            SMALL,
            run='bundle_time = "1 s"\ncheckpoint_every = "20 ms"\nseal_every = "0.5 s"',
        )
        runs = [Run(campaign)]
        try:
            while rounds > 0 and runs[-1].process.poll() is None:
                kinds = kinds or rng.sample(KINDS, len(KINDS))
                # The random moment is what this test is about; nothing waits for it to pass.
                moment = rng.uniform(0.0, 1.5)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    runs[-1].process.wait(moment)
                victim = target(runs[-1], kinds[-1], rng)
                if victim is None:
                    continue
                if not kill(victim):
                    continue
                rounds -= 1
                if kinds.pop() == "driver":
                    assert runs[-1].wait() == -signal.SIGKILL
                    runs.append(Run(campaign))
                # The first driver may have been killed before it had made one.
                if (folder / f"life{life}" / "store" / "campaign.json").exists():
                    standing_of(campaign)
            assert runs[-1].wait() == 0, runs[-1].output()
            for run in runs:
                run.assert_gone()
        finally:
            for run in runs:
                run.close()
        assert_is_undisturbed(campaign, uninterrupted)


def assert_is_undisturbed(campaign: Path, uninterrupted: Store) -> None:
    """Fail where a store differs from an uninterrupted run's."""
    standing = standing_of(campaign)
    assert [c.ok for c in standing.counts] == [len(SMALL)] * 3
    store = store_of(campaign)
    assert not store.snapshot().problems
    assert_no_key_twice_in_segments(store)
    for table in ("molecules", "geometries", "frames", "relaxations", "tasks"):
        assert by_key(store, table).keys() == by_key(uninterrupted, table).keys(), table
    assert by_key(store, "geometries") == by_key(uninterrupted, "geometries")
    assert {row["status"] for row in by_key(store, "tasks").values()} == {"ok"}
    mine, theirs = (by_key(s, "relaxations") for s in (store, uninterrupted))
    for key, row in mine.items():
        assert row["n_steps"] == theirs[key]["n_steps"]
        energies = [np.frombuffer(r["final_energy_eV"])[0] for r in (row, theirs[key])]
        assert energies[0] == pytest.approx(energies[1], abs=1e-9)
    assert not [p for p in (store.path / "checkpoints").rglob("*.npz") if p.name[0] != "."]


@pytest.mark.slow
def test_four_kills_change_nothing(tmp_path: Path, uninterrupted: Store) -> None:
    torture(tmp_path, 4, 1, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_many_kills_change_nothing(tmp_path: Path, uninterrupted: Store, seed: int) -> None:
    torture(tmp_path, 5, seed, uninterrupted)


def test_nothing_outlives_a_driver_killed_while_it_starts(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, SMALL[:4])
    with running(campaign) as run:
        until(run.interchanges, every=0.001)
        kill(psutil.Process(run.process.pid))
        run.wait()
        run.assert_gone()
    complete(campaign)


def tasks(campaign: Path) -> dict[str, dict[str, Any]]:
    """Return the tasks finished so far; none before there is a store."""
    if not (campaign.parent / "store" / "campaign.json").exists():
        return {}
    return by_key(store_of(campaign), "tasks")


def checkpoint_of(campaign: Path) -> tuple[Path, int] | None:
    """Return the saved state of the relaxation under way, and how many frames it holds."""
    for path in (campaign.parent / "store" / "checkpoints").rglob("*.npz"):
        if not path.name.startswith("."):
            with np.load(path) as saved:
                return path, len(saved["energies"])
    return None


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return the store of the long relaxation, never interrupted."""
    campaign = write_campaign(tmp_path_factory.mktemp("long"), [LONG])
    complete(campaign, workers=1)
    return store_of(campaign)


def assert_went_on(campaign: Path, state: Path, long_run: Store) -> None:
    """Resume; fail unless the saved state was used and the end is that of the unbroken run."""
    # A mark that only a relaxation that starts from this very state carries to its end.
    with np.load(state) as saved:
        arrays = dict(saved)
    arrays["n_evaluations"] = arrays["n_evaluations"] + 1000
    with open(state, "wb") as file:
        np.savez(file, **arrays)
    complete(campaign, workers=1)
    store = store_of(campaign)
    (mine,) = by_key(store, "relaxations").values()
    (theirs,) = by_key(long_run, "relaxations").values()
    assert mine["key"] == theirs["key"]
    evaluations = [np.frombuffer(r["n_evaluations"], "<i4")[0] for r in (mine, theirs)]
    assert evaluations[0] == evaluations[1] + 1000
    for name in ("n_steps", "positions"):
        assert mine[name] == theirs[name]
    energies = [np.frombuffer(r["final_energy_eV"])[0] for r in (mine, theirs)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-9)
    assert by_key(store, "frames") == by_key(long_run, "frames")
    assert not state.exists()


@pytest.mark.parametrize("kind", [pytest.param("everything", marks=pytest.mark.slow), "child"])
def test_a_killed_relaxation_goes_on_from_its_last_saved_step(
    tmp_path: Path, long_run: Store, kind: str
) -> None:
    campaign = write_campaign(tmp_path, [LONG], run='checkpoint_every = "10 ms"')
    with running(campaign, workers=1) as run:

        def far() -> Path | None:
            found = checkpoint_of(campaign)
            return found[0] if found and found[1] >= 10 else None

        state = until(far, 60, run.output, every=0.005)
        for victim in run.children() if kind == "child" else run.processes():
            kill(victim)
        if kind == "everything":
            run.wait()
        else:
            # The guard starts it again by itself, and the run goes on to its end.
            assert run.wait() == 0, run.output()
        run.assert_gone()
    if kind == "everything":
        assert_went_on(campaign, state, long_run)
    else:
        (task,) = (t for t in by_key(store_of(campaign), "tasks").values() if t["stage"] == "gfn2")
        assert task["attempts"] == b"\x02"
        assert by_key(store_of(campaign), "frames") == by_key(long_run, "frames")


def test_an_interrupted_relaxation_saves_its_state_and_goes_on(
    tmp_path: Path, long_run: Store
) -> None:
    campaign = write_campaign(tmp_path, [LONG], run='checkpoint_every = "1 h"')
    with running(campaign, workers=1) as run:
        until(lambda: len(tasks(campaign)) == 2, 60, run.output)
        # As Ctrl-C at a terminal does: everything in the foreground gets it.
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait(40) == 5, run.output()
        run.assert_gone()
    found = checkpoint_of(campaign)
    assert found is not None
    assert [c.waiting for c in standing_of(campaign).counts] == [0, 0, 1]
    assert_went_on(campaign, found[0], long_run)


def test_a_signal_drains_and_the_same_command_finishes(
    tmp_path: Path, uninterrupted: Store
) -> None:
    # So short that much is left when the first rows are seen.
    campaign = write_campaign(tmp_path, SMALL, run='bundle_time = "100 ms"')
    before = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        with running(campaign) as run:
            until(lambda: relaxed(campaign) > before, 60, run.output)  # noqa: B023
            # On a fast machine all would be done before the workers hear of it: it stands still.
            with standing_still(run.children()):
                run.signal(number)
                until(lambda: who(campaign.parent / "store").get("drain"), 30, run.output)
                time.sleep(2.0)  # each worker looks every second
            assert run.wait(40) == 5, run.output()
            assert not run.end()["complete"]
            run.assert_gone()
        assert standing_of(campaign).counts[-1].waiting > 0
        before = relaxed(campaign)
    complete(campaign)
    assert_is_undisturbed(campaign, uninterrupted)


def relaxed(campaign: Path) -> int:
    """Return how many relaxations are done."""
    return sum(row["stage"] == "gfn2" for row in tasks(campaign).values())


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    stages = '[[stages]]\nkernel = "rehearse"\nfaults = {"CC" = "hang"}\n'
    campaign = write_campaign(
        tmp_path, ["C", "CC", "CCC"], stages=stages, run='bundle_time = "1 ms"'
    )
    with running(campaign) as run:
        until(lambda: len(tasks(campaign)) == 2, 60, run.output)
        run.signal(signal.SIGINT)
        until(lambda: '"drain": true' in word(campaign))
        run.signal(signal.SIGINT)
        assert run.wait(20) == 130, run.output()
        assert "finished work is kept" in run.output()
        run.assert_gone()
    (counts,) = standing_of(campaign).counts
    assert (counts.ok, counts.waiting) == (2, 1)


def word(campaign: Path) -> str:
    """Return what the driver tells its workers."""
    return (campaign.parent / "store" / "control" / "driver.json").read_text()


DIFFUSION = """
[[stages]]
kernel = "embed"
[[stages]]
kernel = "diffuse"
model = "wide.safetensors"
n = 80
protocol = "published"
"""
# Batches differ after a kill, and float32 with them, over eighty steps.
SAME_PATH_A = 1e-4


def diffusion_campaign(folder: Path) -> Path:
    campaign = write_campaign(
        folder, SMALL[:16], stages=DIFFUSION, run='bundle_time = "2 s"\nseal_every = "0.5 s"'
    )
    write_model(folder / "wide.safetensors", hidden=128, layers=4, steps=1000)
    return campaign


@pytest.mark.slow
def test_killed_diffusions_end_where_undisturbed_ones_do(tmp_path: Path) -> None:
    calm = diffusion_campaign(tmp_path / "calm")
    complete(calm)
    campaign = diffusion_campaign(tmp_path / "killed")
    rng = random.Random(5)
    runs = [Run(campaign)]
    try:
        for kind in ("child", "driver", "child", "worker"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                runs[-1].process.wait(rng.uniform(0.5, 1.5))
            victim = target(runs[-1], kind, rng)
            if victim is None or not kill(victim):
                continue
            if kind == "driver":
                assert runs[-1].wait() == -signal.SIGKILL
                runs.append(Run(campaign))
        assert runs[-1].wait() == 0, runs[-1].output()
    finally:
        for run in runs:
            run.close()
    assert [c.ok for c in standing_of(campaign).counts] == [16] * 2
    assert_no_key_twice_in_segments(store_of(campaign))
    columns = ["key", "positions", "level"]
    one, other = (Lookup(store_of(path).read("paths", columns)) for path in (calm, campaign))
    at = other.find(one.rows["key"])
    assert (at >= 0).all()
    for row, same in enumerate(at.tolist()):
        moved = np.abs(one.rows["positions"][row] - other.rows["positions"][same])
        assert moved.max() < SAME_PATH_A
