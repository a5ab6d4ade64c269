"""Twenty minutes of what a cluster can do to a campaign, at random; what it costs.

A real SLURM of three nodes on this host, GFN2 relaxations over two blocks of one worker and a
rehearsal on the gpu partition; every 20 to 40 s one of: a block cancelled, a worker pool killed, a
node set down, a block's walltime ended early, the driver killed and started again, slurmctld
restarted. Exits with 1 where an item is lost or charged with what befell it, where something is
left behind, or where more than the given share of the work was done twice. Needs root, slurm-wlm
and munge.

    python -m benchmarks.chaos [--minutes 20] [--seed 1] [--most-repeated 3]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.machine import table
from tests.cluster.disturbances import Account, Disturber, Records, account, write_site
from tests.cluster.slurm_cluster import SlurmCluster, missing
from tests.cluster.test_faults import RUN, small_molecules
from tests.orchestrator.run_fixtures import (
    Run,
    by_key,
    running,
    standing_of,
    store_of,
    write_campaign,
)

WORKERS = 2
PAUSE_S = (20.0, 40.0)
NODE_DOWN_S = 25.0
MOLECULES = 400
SAMPLE = 40
# Times the minutes asked for: when to end a campaign that is still not done.
PATIENCE = 1.25
# Faults take worker time away; the campaign is sized so that it ends about when they do.
SHARE_LEFT = 0.85
STAGES = (
    '[[stages]]\nkernel = "embed"\nconformers = {conformers}\n[[stages]]\nkernel = "mmff"\n'
    '[[stages]]\nname = "gfn2"\nkernel = "relax"\nlevel = "GFN2-xTB"\nfmax = 0.03\n'
    '[[stages]]\nname = "gpu"\nkernel = "rehearse"\npool = "{pool}"\nseconds = "20 ms"\n'
)


def undisturbed(folder: Path) -> tuple[float, float]:
    """Return CPU seconds per conformer, and the workers' busy share, of a small local run."""
    campaign = write_campaign(
        folder,
        small_molecules(MOLECULES)[:: MOLECULES // SAMPLE],
        stages=STAGES.format(conformers=2, pool="cpu"),
        run=RUN,
    )
    with running(campaign, workers=WORKERS) as run:
        assert run.wait(600) == 0, run.output()
    rows = store_of(campaign).read("tasks", ["stage", "started_s", "wall_s", "cpu_s"])
    cpu = float(rows["cpu_s"][~rows["stage"].equals("gpu")].sum())
    span = float((rows["started_s"] + rows["wall_s"]).max() - rows["started_s"].min())
    return cpu / (2 * SAMPLE), float(rows["wall_s"].sum()) / (span * WORKERS)


class Chaos:
    """One run of it."""

    def __init__(self, folder: Path, cluster: SlurmCluster, minutes: float, seed: int) -> None:
        self.minutes = minutes
        self.rng = random.Random(seed)
        self.cluster = cluster
        self.faults: Counter[str] = Counter()
        self.to_come: list[str] = []
        self.gave_up = 0
        self.left = ""
        self.each_s, self.local_share = undisturbed(folder / "undisturbed")
        budget_s = 60 * minutes * WORKERS * SHARE_LEFT
        n = max(1, round(budget_s / (self.each_s * MOLECULES)))
        molecules = small_molecules(min(MOLECULES, round(budget_s / (self.each_s * n))))
        self.planned = 4 * n * len(molecules)
        self.campaign = write_campaign(
            folder / "chaos", molecules, stages=STAGES.format(conformers=n, pool="gpu"), run=RUN
        )
        self.site = write_site(folder, walltime=f"{max(2, minutes / 4):g} min")
        self.records = Records(folder / "records")
        os.environ.update(self.records.environment)

    def go(self) -> None:
        """Run the campaign to its end, with a fault every 20 to 40 s for the time asked for."""
        self.records.watch(self.campaign.parent / "store")
        disturber = Disturber(
            self.cluster,
            lambda: Run(self.campaign, f"--site={self.site}", workers=None),
            self.rng,
        )
        began = time.monotonic()
        try:
            while self._under_way(disturber, began):
                if time.monotonic() - began < 60 * self.minutes:
                    self._fault(disturber, began)
            disturber.mend_nodes()
            try:
                self.cluster.assert_empty()
                for run in disturber.runs:
                    run.assert_gone()
            except AssertionError as exc:
                self.left = str(exc)
        finally:
            disturber.close()
            self.records.stop()

    def _under_way(self, disturber: Disturber, began: float) -> bool:
        """Wait for the time of the next fault; tell whether there is still something to hit."""
        until = time.monotonic() + self.rng.uniform(*PAUSE_S)
        while time.monotonic() < until:
            disturber.mend_nodes(NODE_DOWN_S)
            status = disturber.run.process.poll()
            if status == 0:
                return False
            if status is not None:
                print(f"the driver gave up: {disturber.run.output()[-2000:]}", file=sys.stderr)
                self.gave_up += 1
                if self.gave_up > 5:
                    return False
                disturber.restart_driver()
            if time.monotonic() - began > 60 * self.minutes * PATIENCE:
                # A machine that others use as well: what is left then stays waiting.
                disturber.run.signal(signal.SIGINT)
                disturber.run.wait()
                return False
            time.sleep(0.5)
        return True

    def _fault(self, disturber: Disturber, began: float) -> None:
        """Make a fault: each kind once in random order, then again; skip one that hits nothing."""
        self.to_come = self.to_come or self.rng.sample(
            list(disturber.faults), len(disturber.faults)
        )
        for kind in list(self.to_come):
            if words := disturber.faults[kind]():
                self.to_come.remove(kind)
                self.faults[kind] += 1
                print(f"{time.monotonic() - began:7.1f} s  {kind}: {words}", file=sys.stderr)
                return

    def verdict(self, most_repeated: float) -> list[str]:
        """Print the tables; return what is wrong."""
        counts = standing_of(self.campaign).counts
        ok, waiting = (sum(getattr(c, name) for c in counts) for name in ("ok", "waiting"))
        tasks = by_key(store_of(self.campaign), "tasks")
        charged = sum(row["attempts"][0] != 1 or row["status"] != "ok" for row in tasks.values())
        # Not finished, not waiting either; or on disk once, and not in the store now.
        kept = {key[:16] for key in tasks}
        lost = self.planned - ok - waiting + len(self.records.sealed().keys() - kept)
        found = account(self.records)
        self._print(found, lost, charged, ok)
        wrong = {
            f"{lost} items lost": lost != 0,
            f"{charged} items charged": charged > 0,
            f"{len(found.again)} items computed again after they had been sealed": found.again,
            f"{100 * found.repeated_share:.1f} % repeated": 100 * found.repeated_share
            > most_repeated,
            f"the driver gave up {self.gave_up} times": self.gave_up > 0,
            f"left behind: {self.left}": bool(self.left),
        }
        return [words for words, is_so in wrong.items() if is_so]

    def _print(self, found: Account, lost: int, charged: int, ok: int) -> None:
        span = found.last_s - found.first_s
        table(
            f"Chaos: faults in {span / 60:.1f} minutes",
            ["fault", "times"],
            [*sorted(self.faults.items()), ["all", sum(self.faults.values())]],
        )
        # The rehearsal has a node of its own.
        rehearsed = sum(
            e.end_s - e.start_s for e in self.records.executions() if e.kernel == "rehearse"
        )
        useful = found.useful_s - rehearsed
        idle = 1 - useful / (span * WORKERS)
        table(
            "Chaos: what became of the work",
            ["what", "result"],
            [
                ["items planned", f"{self.planned:,}"],
                ["items finished", f"{ok:,}"],
                ["items lost", lost],
                ["items charged with a fault", charged],
                ["items computed again after they had been sealed", len(found.again)],
                [
                    "finished items computed twice",
                    f"{found.repeated_items} ({100 * found.repeated_items / found.items:.2f} %)",
                ],
                ["items broken off under way", found.broken_off],
                ["work repeated, at most", f"{100 * found.repeated_share:.2f} % of worker seconds"],
                ["useful worker time", f"{useful:.0f} of {span * WORKERS:.0f} s"],
                ["worker time lost", f"{100 * idle:.1f} %"],
                ["the same, undisturbed local run", f"{100 * (1 - self.local_share):.1f} %"],
            ],
        )


def main() -> None:
    """Make it happen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most-repeated", type=float, default=3.0, help="in %% of worker seconds")
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(f"skipped: {reason}")
    with tempfile.TemporaryDirectory(prefix="basin-chaos-") as name:
        cluster = SlurmCluster(Path(name) / "slurm")
        cluster.up()
        os.environ["SLURM_CONF"] = str(cluster.conf)
        try:
            chaos = Chaos(Path(name), cluster, arguments.minutes, arguments.seed)
            chaos.go()
            wrong = chaos.verdict(arguments.most_repeated)
        finally:
            cluster.down()
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    main()
