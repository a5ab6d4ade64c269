"""Everything a cluster does to jobs, done to one campaign: its rows are a quiet local run's."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kernels.calculators import DFT
from orchestrator.store import Store
from tests.cluster.disturbances import (
    Disturber,
    Records,
    account,
    write_site,
)
from tests.cluster.slurm_cluster import SlurmCluster
from tests.orchestrator.run_fixtures import (
    SMALL,
    Run,
    assert_no_key_twice_in_segments,
    by_key,
    running,
    standing_of,
    standing_still,
    store_of,
    until,
    write_campaign,
)

pytestmark = pytest.mark.slow

CHEMISTRY = (
    '[[stages]]\nkernel = "embed"\n[[stages]]\nkernel = "mmff"\n'
    '[[stages]]\nname = "gfn2"\nkernel = "relax"\nlevel = "GFN2-xTB"\nfmax = 0.05\n'
)
REHEARSAL = '[[stages]]\nname = "gpu"\nkernel = "rehearse"\npool = "{pool}"\nseconds = "50 ms"\n'
# Rows on disk soon, so that little is done twice; states saved often enough to matter.
RUN = 'bundle_time = "4 s"\nseal_every = "1 s"\ncheckpoint_every = "0.5 s"'
LIMIT_S = 300.0
MOLECULES = 400


_HEADS = "C CC N O F Cl C#C N#C CO CN CS OC(C)(C)"
_MIDDLES = "CC C(=O)C COC CNC C1CC1 CSC C#CC CC(=O)NC C(F)C c1ccccc1 C1CCNC1 CC(O)C"
_TAILS = "C N O F Cl C#N C=O C(=O)O"


def small_molecules(count: int) -> list[str]:
    """Return SMILES of so many different molecules of five to nine heavy atoms."""
    from rdkit import Chem

    heads = _HEADS.split()
    middles = _MIDDLES.split()
    # Tail first, so that any number of them is mixed.
    names = (
        str(Chem.CanonSmiles(head + middle + tail))  # type: ignore[no-untyped-call]
        for tail in _TAILS.split()
        for middle in middles
        for head in heads
    )
    found = [name for name in dict.fromkeys(names) if Chem.MolFromSmiles(name).GetNumAtoms() >= 5]
    return found[:: len(found) // count][:count]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return the store of the same campaign, run on this machine by itself."""
    campaign = write_campaign(
        tmp_path_factory.mktemp("quiet"),
        small_molecules(MOLECULES),
        stages=CHEMISTRY + REHEARSAL.format(pool="cpu"),
        run=RUN,
    )
    with running(campaign) as run:
        assert run.wait(LIMIT_S) == 0, run.output()
    assert [c.ok for c in standing_of(campaign).counts] == [MOLECULES] * 4
    return store_of(campaign)


def relaxed(campaign: Path) -> int:
    """Return how many relaxations are done."""
    if not (campaign.parent / "store" / "campaign.json").exists():
        return 0
    rows = store_of(campaign).read("tasks", ["stage"])
    return int(rows["stage"].equals("gfn2").sum())


def assert_is_quiet(campaign: Path, quiet: Store) -> None:
    """Fail where the store differs from the quiet run's, or a fault was charged to an item."""
    assert [c.ok for c in standing_of(campaign).counts] == [MOLECULES] * 4
    store = store_of(campaign)
    assert not store.snapshot().problems
    assert_no_key_twice_in_segments(store)
    for table in ("molecules", "geometries", "frames", "relaxations", "tasks"):
        assert by_key(store, table).keys() == by_key(quiet, table).keys(), table
    assert by_key(store, "geometries") == by_key(quiet, "geometries")
    tasks = by_key(store, "tasks")
    assert Counter(row["status"] for row in tasks.values()) == {"ok": 4 * MOLECULES}
    assert Counter(row["attempts"][0] for row in tasks.values()) == {1: 4 * MOLECULES}
    mine, theirs = (by_key(s, "relaxations") for s in (store, quiet))
    for key, row in mine.items():
        assert row["n_steps"] == theirs[key]["n_steps"]
        energies = [np.frombuffer(r["final_energy_eV"])[0] for r in (row, theirs[key])]
        assert energies[0] == pytest.approx(energies[1], abs=1e-9)
    assert not [p for p in (store.path / "checkpoints").rglob("*.npz") if p.name[0] != "."]


def test_blocks_drain_before_their_walltime_ends(
    slurm_cluster: SlurmCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    records = Records(tmp_path / "records")
    for name, value in records.environment.items():
        monkeypatch.setenv(name, value)
    stage = '[[stages]]\nkernel = "rehearse"\nconformers = 3\nseconds = "2 s"\n'
    campaign = write_campaign(tmp_path / "draining", SMALL[:20], stages=stage, run=RUN)
    # Two minutes of sleep over two blocks of a minute each, which cannot hold them.
    site = write_site(tmp_path, walltime="1 min")
    with running(campaign, f"--site={site}", workers=None) as run:
        # All of this sleeps: the cores are free for what the other test is compared with.
        for name in records.environment:
            monkeypatch.delenv(name)
        request.getfixturevalue("quiet")
        assert run.wait(LIMIT_S) == 0, run.output()
        summary = run.end()
        slurm_cluster.assert_empty()
        run.assert_gone()
    assert summary["lost_bundles"] == 0
    tasks = by_key(store_of(campaign), "tasks").values()
    assert Counter((row["status"], row["attempts"][0]) for row in tasks) == {("ok", 1): 60}
    executions = records.executions()
    assert Counter(e.status for e in executions) == {"ok": 60}, "begun, but not finished in time"
    blocks = {row["block"] for row in tasks}
    assert len(blocks) >= 3
    ends = {slurm_cluster.job(job_id)["JobState"] for job_id in blocks}
    assert ends <= {"COMPLETED", "CANCELLED"}


def test_a_dft_relaxation_goes_on_through_the_walltimes_of_its_blocks(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    # Steps so short that it takes longer than any block of a minute has time for. Without the
    # Hessian other steps would follow, without the density other last digits.
    slow = CHEMISTRY.replace('name = "gfn2"', 'name = "dft"\nmax_step_length = "0.0025 A"').replace(
        "GFN2-xTB", DFT
    )
    at_once, in_parts = (
        write_campaign(tmp_path / name, ["CO"], stages=slow, run=RUN)
        for name in ("at-once", "in-parts")
    )
    site = write_site(tmp_path, walltime="1 min")
    jobs: set[str] = set()
    with (
        running(in_parts, f"--site={site}", workers=None) as run,
        running(at_once, workers=1) as whole,
    ):

        def ended() -> bool:
            jobs.update(job["id"] for job in slurm_cluster.running())
            return run.process.poll() is not None

        until(ended, 2 * LIMIT_S, run.output, every=1.0)
        assert run.wait(LIMIT_S) == 0, run.output()
        assert whole.wait(LIMIT_S) == 0, whole.output()
        assert run.end()["lost_bundles"] == 0
        slurm_cluster.assert_empty()
    assert len(jobs) >= 2, "one block was enough"
    mine, theirs = (by_key(store_of(campaign), "relaxations") for campaign in (in_parts, at_once))
    times = {"cpu_s", "wall_s"}
    for key, row in mine.items():
        assert {n: v for n, v in row.items() if n not in times} == {
            n: v for n, v in theirs[key].items() if n not in times
        }
    (task,) = (t for t in by_key(store_of(in_parts), "tasks").values() if t["stage"] == "dft")
    assert (task["status"], task["attempts"][0]) == ("ok", 1)


def test_whatever_a_cluster_does_the_rows_are_a_quiet_runs(
    slurm_cluster: SlurmCluster, tmp_path: Path, quiet: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "records")
    for name, value in records.environment.items():
        monkeypatch.setenv(name, value)
    campaign = write_campaign(
        tmp_path / "disturbed",
        small_molecules(MOLECULES),
        stages=CHEMISTRY + REHEARSAL.format(pool="gpu"),
        run=RUN,
    )
    site = write_site(tmp_path)
    records.watch(campaign.parent / "store")
    disturber = Disturber(
        slurm_cluster, lambda: Run(campaign, f"--site={site}", workers=None), random.Random(1)
    )
    try:
        # By the number of finished relaxations, so that each hits the campaign under way.
        for share, fault in (
            (0.02, disturber.end_walltime),
            (0.1, disturber.cancel_block),
            (0.25, disturber.kill_pool),
            (0.4, disturber.set_node_down),
            (0.55, disturber.restart_scheduler),
            (0.7, disturber.kill_driver),
        ):

            def far(share: float = share) -> bool:
                assert disturber.run.process.poll() is None, disturber.run.output()
                return relaxed(campaign) >= share * MOLECULES

            until(far, LIMIT_S, disturber.run.output, every=0.5)
            if fault == disturber.kill_driver:
                # The walltime has ended by then, and is seen by the driver that saw its block. On
                # a fast machine all the work would be done before: it stands still meanwhile.
                (short,) = disturber.shortened
                with standing_still(slurm_cluster.job_processes("orchestrator.child")):
                    until(
                        lambda: slurm_cluster.job(short)["JobState"] == "TIMEOUT",  # noqa: B023
                        120,
                        lambda: f"{slurm_cluster.job(short)}\n{slurm_cluster.words()}",  # noqa: B023
                        every=0.2,
                    )
            until(fault, 60, slurm_cluster.words, every=0.2)
        disturber.mend_nodes()
        assert disturber.run.wait(LIMIT_S) == 0, disturber.run.output()
        slurm_cluster.assert_empty()
        for run in disturber.runs:
            run.assert_gone()
    finally:
        disturber.close()
        records.stop()
    assert_is_quiet(campaign, quiet)
    counted = account(records)
    assert counted.items == 4 * MOLECULES
    assert not counted.again, f"computed again after they had been sealed: {counted.again}"
