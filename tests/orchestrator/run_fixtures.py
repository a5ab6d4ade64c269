"""Campaigns run as a user runs them: the command in a process of its own, watched from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from orchestrator import ingest
from orchestrator.campaign import Campaign, load_campaign
from orchestrator.columns import Category, Varlen, key_bytes
from orchestrator.schema import TABLES
from orchestrator.status import Standing, stand
from orchestrator.store import Store

RUN_LIMIT_S = 110.0
# Parsl's worker pools notice a lost interchange after the local site's 10 s of silence.
GONE_LIMIT_S = 40.0
CHEMISTRY = (
    '[[stages]]\nkernel = "embed"\n'
    '[[stages]]\nkernel = "mmff"\n'
    '[[stages]]\nname = "gfn2"\nkernel = "relax"\nlevel = "GFN2-xTB"\nfmax = 0.005\n'
)
# What a run may differ in from another run of the same tasks.
CIRCUMSTANCES = {
    "attempts",
    "host",
    "block",
    "worker_pid",
    "started_s",
    "wall_s",
    "cpu_s",
    "source",
}

# Forty molecules of 12 to 30 atoms, ions among them.
_SMALL = (
    "CCCCCC CCCCCO CCCCN OCCCCO COCCOC CCOCCO CC(=O)OCC CCCC(=O)O CC(C)CO CC(C)(C)O "
    "CCC(=O)CC CC(C)C(=O)N NCCCN OCC(O)CO C1CCCCC1 C1CCOCC1 C1CCNCC1 CC1CCCC1 Cc1ccccc1 "
    "COc1ccccc1 Nc1ccccc1C OCc1ccccc1 CC(=O)Nc1ccccc1 CC[NH2+]CC CCC(=O)[O-] C[C@H](N)C(=O)O "
    "CC(C)C[C@H](N)C(=O)O CSCCC CCSSCC CC(F)(F)CO ClCCOCCCl C=CCC=C CC#CCC CCC#N CCCCC=O "
    "c1ccc2[nH]ccc2c1 Cn1ccnc1 Cc1ccncc1 O=C1CCCCC1 CN(C)C(=O)CC"
)
SMALL = _SMALL.split()


def write_campaign(
    folder: Path,
    smiles: Iterable[str] | None = None,
    *,
    stages: str = CHEMISTRY,
    run: str = "",
    name: str = "test",
    molecules: str = "",
    files: str = '["molecules.smi"]',
) -> Path:
    """Write a campaign file, and its molecules where they are given; return the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if smiles is not None:
        (folder / "molecules.smi").write_text("".join(f"{s}\n" for s in smiles))
    path = folder / "campaign.toml"
    path.write_text(
        f'name = "{name}"\nstore = "store"\n[molecules]\nfiles = {files}\n{molecules}\n'
        f"{stages}\n[run]\n{run}\n"
    )
    return path


class Run:
    """One `basin run` under way, with everything that it started."""

    def __init__(self, campaign: Path, *arguments: str, workers: int | None = 2) -> None:
        log = campaign.with_name(f"log-{uuid.uuid4().hex[:8]}.txt")
        self._log = open(log, "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "orchestrator.cli", "run", str(campaign)),
                *([] if workers is None else [f"--workers={workers}"]),
                *("--json", *arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def output(self) -> str:
        """Return what the command printed so far."""
        self._log.flush()
        return Path(self._log.name).read_text()

    def end(self) -> dict[str, Any]:
        """Return the summary that the command printed at its end."""
        for line in self.output().splitlines():
            if line.startswith("{") and json.loads(line).get("event") == "end":
                summary: dict[str, Any] = json.loads(line)
                return summary
        raise AssertionError(f"no summary in {self.output()!r}")

    def wait(self, limit: float = RUN_LIMIT_S) -> int:
        """Return the exit status; fail where it takes longer than ``limit`` seconds."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {limit} s: {self.output()!r}\n{self.processes()}"
            ) from None

    def processes(self, pattern: str = "") -> list[psutil.Process]:
        """Return the living processes of this run whose command line matches."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                words = " ".join(process.cmdline())
                # All of them stay in the session that the command was started in.
                if re.search(pattern, words) and os.getsid(process.pid) == self.process.pid:
                    found.append(process)
            except (psutil.Error, ProcessLookupError):
                continue
        return found

    def children(self) -> list[psutil.Process]:
        """Return the guarded kernel processes."""
        return self.processes(r"orchestrator\.child")

    def interchanges(self) -> list[psutil.Process]:
        """Return Parsl's interchange, from the moment it starts."""
        return self.processes(r"HTEX interchange|interchange\.py|orchestrator\.interchange")

    def pools(self) -> list[psutil.Process]:
        """Return the worker pool managers."""
        return [
            p
            for p in self.processes(r"process_worker_pool\.py|parsl: HTEX manager")
            if p.name() != "bash"
        ]

    def signal(self, number: int) -> None:
        """Send a signal to the driver alone."""
        self.process.send_signal(number)

    def close(self) -> None:
        """End whatever is left."""
        for process in [*self.processes(), *self.processes()]:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait(10)
        self._log.close()

    def assert_gone(self) -> None:
        """Wait for every process of the run to end; fail where one stays."""
        until(lambda: not self.processes(), GONE_LIMIT_S, lambda: f"left: {self.processes()}")


@contextmanager
def running(campaign: Path, *arguments: str, workers: int | None = 2) -> Iterator[Run]:
    """Start `basin run`; end everything it started on the way out."""
    run = Run(campaign, *arguments, workers=workers)
    try:
        yield run
    finally:
        run.close()


def complete(campaign: Path, *arguments: str, workers: int = 2) -> dict[str, Any]:
    """Run a campaign to its end; return its summary."""
    with running(campaign, *arguments, workers=workers) as run:
        assert run.wait() == 0, run.output()
        return run.end()


@contextmanager
def standing_still(processes: list[psutil.Process]) -> Iterator[None]:
    """Suspend what computes; what a signal ends meanwhile is gone afterwards."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def until(
    condition: Callable[[], Any],
    limit: float = 30.0,
    otherwise: Callable[[], str] = lambda: "",
    every: float = 0.02,
) -> Any:
    """Return the condition's first true value; fail after ``limit`` seconds without one."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every)
    raise AssertionError(f"not within {limit} s: {otherwise()}")


def kill(process: psutil.Process) -> bool:
    """Kill -9; tell whether there was still something to kill."""
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def store_of(campaign: Path) -> Store:
    """Open a campaign's store."""
    return Store(load_campaign(campaign).store)


def standing_of(campaign: Path) -> Standing:
    """Return how a campaign stands; planned = ok + failed + upstream + waiting holds in it."""
    loaded = load_campaign(campaign)
    standing = stand(loaded, Store(loaded.store))
    for counts in standing.counts:
        parts = (counts.ok, counts.failed, counts.upstream, counts.waiting)
        assert counts.planned == sum(parts), counts
        assert min(parts) >= 0, counts
    return standing


def by_key(store: Store, table: str, leave_out: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Return a table's rows by key (hexadecimal), values as plain comparable objects."""
    rows = store.read(table)
    columns: dict[str, list[Any]] = {}
    for name, values in rows.columns.items():
        if name in leave_out:
            continue
        if isinstance(values, Varlen):
            columns[name] = [values[i].tobytes() for i in range(len(values))]
        elif isinstance(values, Category):
            columns[name] = values.strings()
        elif np.asarray(values).ndim == 2:
            columns[name] = [key_bytes(words).hex() for words in values.tolist()]
        else:
            # As bytes, so that NaN equals NaN and -0.0 is not 0.0.
            columns[name] = [value.tobytes() for value in np.asarray(values)]
    made = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    found = {row["key"]: row for row in made}
    assert len(found) == len(made), f"{table}: a key twice in {len(made)} rows"
    return found


def assert_same_rows(one: Store, other: Store) -> None:
    """Fail where two stores differ in anything but the circumstances of their runs."""
    for table in TABLES:
        leave_out = {*CIRCUMSTANCES, "line"}
        if table == "tasks":
            leave_out.add("message")  # of a repeated entry, which one repeats depends on the order
        a, b = (by_key(store, table, sorted(leave_out)) for store in (one, other))
        assert a.keys() == b.keys(), table
        for key, row in a.items():
            assert row == b[key], f"{table} {key}"


def assert_no_key_twice_in_segments(store: Store) -> None:
    """Fail where compacted segments, read raw, hold a key more than once."""
    snapshot = store.snapshot()
    assert not snapshot.shards, "not everything is compacted"
    for table in TABLES:
        keys = [tuple(k) for rows in snapshot.parts(table, ["key"]) for k in rows["key"].tolist()]
        assert len(keys) == len(set(keys)), table


def ingested(campaign: Campaign) -> tuple[Store, Path]:
    """Read a campaign's molecule files in this process; return its store and plan folder."""
    from orchestrator.molecules import find_files, sources_digest

    store = Store.create(campaign.store, campaign.name)
    files = find_files(campaign.molecules, campaign.path.parent)
    digest = sources_digest(files, campaign.molecules)
    ingest.ingest(campaign, store, digest)
    return store, ingest.plan_folder(store, digest)
