"""Campaigns on the test cluster, what can befall them, and an account of what was computed."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator import shard
from tests.cluster.slurm_cluster import SlurmCluster
from tests.orchestrator.run_fixtures import Run, kill

# Two blocks of one worker each: the host may have no more than two cores. No pinning: what the
# cluster calls nodes are all the same cores.
_SITE = """\
base = "slurm"
address = "127.0.0.1"
poll_every = "1 s"
heartbeat_every = "2 s"
heartbeat_limit = "15 s"
idle_limit = "15 s"

[pools.cpu]
partition = "cpu"
max_blocks = 2
walltime = "{walltime}"
cores_per_node = 1
memory_per_node = "2 GB"
exclusive = {exclusive}
pin = false

[pools.gpu]
partition = "gpu"
max_blocks = 1
walltime = "{walltime}"
cores_per_node = 1
gpus_per_node = 1
memory_per_node = "2 GB"
exclusive = false
pin = false
"""

# Python imports a module of this name by itself. Kernel processes write down each item that they
# start and finish, and show with the file's time that they live.
_RECORDER = """\
import sys

if "orchestrator.child" in sys.orig_argv:
    import os
    import threading
    import time

    from orchestrator import kernel_calls

    name = f"{os.getpid()}-{time.time_ns()}"
    file = os.open(os.path.join(os.environ["BASIN_EXECUTION_LOG"], name), os.O_CREAT | os.O_WRONLY)
    inner = kernel_calls.call

    def call(stage, payloads, stop):
        for payload in payloads:
            os.write(file, f"start {payload.seed:016x} {stage.kernel} {time.time()} -\\n".encode())
        outcomes = [{"status": "raised"}] * len(payloads)
        try:
            outcomes = inner(stage, payloads, stop)
            return outcomes
        finally:
            for payload, outcome in zip(payloads, outcomes):
                what = f"{payload.seed:016x} {stage.kernel} {time.time()} {outcome['status']}"
                os.write(file, f"end {what}\\n".encode())

    def live():
        while True:
            os.utime(file)
            time.sleep(0.2)

    kernel_calls.call = call
    threading.Thread(target=live, daemon=True).start()
"""

# The same of chains: which steps were made, and after which the state was saved.
_STEP_RECORDER = """\
import sys

if "orchestrator.child" in sys.orig_argv:
    import os
    import time

    from kernels.sampling import metropolis
    from orchestrator import chain_calls

    name = f"{os.getpid()}-{time.time_ns()}"
    file = os.open(os.path.join(os.environ["BASIN_STEP_LOG"], name), os.O_CREAT | os.O_WRONLY)

    def say(what, seed, first, last):
        os.write(file, f"{time.time()} {what} {seed:016x} {first} {last}\\n".encode())

    advance, save, together = metropolis.advance, chain_calls.save, chain_calls._together

    def recorded_advance(state, numbers, calculator, settings, seed, **options):
        first = state.step
        advance(state, numbers, calculator, settings, seed, **options)
        say("made", seed, first, state.step)

    def recorded_save(path, arrays):
        save(path, arrays)
        # Of a batch of diffusion chains the state before stands there too.
        last = int(arrays["step"].max())
        say("saved", int(os.path.basename(path)[:16], 16), last, last)

    def recorded_together(stage, payloads, chains, step, stop):
        from kernels.diffusion import chains as kernel

        inner = kernel.diffusion_chains

        def recorded(model, starts, *, on_segment, **options):
            last = step

            def watch(state):
                nonlocal last
                for start in starts:
                    say("made", start.seed, last, state.step)
                last = state.step
                return on_segment(state)

            return inner(model, starts, on_segment=watch, **options)

        kernel.diffusion_chains = recorded
        try:
            return together(stage, payloads, chains, step, stop)
        finally:
            kernel.diffusion_chains = inner

    metropolis.advance = recorded_advance
    chain_calls.save, chain_calls._together = recorded_save, recorded_together
"""


def _first_on_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def write_site(folder: Path, walltime: str = "10 min", *, exclusive: bool = True) -> Path:
    """Write a site file for the test cluster, as a user would; return its path.

    ``exclusive``: each cpu block has a node for itself, and holds all its cores.
    """
    path = folder / "testcluster.toml"
    path.write_text(_SITE.format(walltime=walltime, exclusive=str(exclusive).lower()))
    return path


@dataclass(slots=True)
class Part:
    """What one process made of a chain: steps from ``first`` to ``last``.

    ``saved``: the step of its last saved state, ``first`` where it saved none.
    """

    key: str
    first: int
    last: int
    saved: int


class StepRecords:
    """Which steps of chains were made, in how many processes: seen from outside of Basin."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "steps"
        for path in (self._log, folder / "python"):
            path.mkdir(parents=True)
        (folder / "python" / "sitecustomize.py").write_text(_STEP_RECORDER)
        self.environment = {
            "PYTHONPATH": _first_on_path(folder / "python"),
            "BASIN_STEP_LOG": str(self._log),
        }

    def parts(self) -> list[Part]:
        """Return the parts of all chains, in the order of their beginnings."""
        found: dict[tuple[str, str], tuple[float, Part]] = {}
        for path in self._log.iterdir():
            for line in path.read_text().splitlines():
                moment, what, key, first, last = line.split()
                place = path.name, key
                if place not in found:
                    found[place] = float(moment), Part(key, int(first), int(first), int(first))
                part = found[place][1]
                if what == "saved":
                    part.saved = int(last)
                else:
                    assert part.last == int(first), "steps left out, or made again in one process"
                    part.last = int(last)
        return [part for _, part in sorted(found.values(), key=lambda x: x[0])]


@dataclass(slots=True)
class Execution:
    """One time that an item was computed; ``status`` is empty where it was killed meanwhile."""

    key: str
    kernel: str
    start_s: float
    end_s: float
    status: str = ""


class Records:
    """What was computed how often, and when it was safe: seen from outside of Basin."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "executions"
        self._shards = folder / "shards"
        for path in (self._log, self._shards, folder / "python"):
            path.mkdir(parents=True)
        (folder / "python" / "sitecustomize.py").write_text(_RECORDER)
        self.environment = {
            "PYTHONPATH": _first_on_path(folder / "python"),
            "BASIN_EXECUTION_LOG": str(self._log),
        }
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, store: Path) -> None:
        """Keep a second link to every shard of a store: compaction removes the first."""

        def keep() -> None:
            while not self._end.wait(0.1):
                self._link(store)

        self._thread = threading.Thread(target=keep, daemon=True)
        self._thread.start()

    def _link(self, store: Path) -> None:
        # Not the hidden ones: a worker that is killed between writing and renaming sealed nothing.
        for path in store.glob("inbox/*/[!.]*.h5"):
            target = self._shards / f"{path.parent.name}-{path.name}"
            try:
                if not target.exists():
                    os.link(path, target)
            except (FileNotFoundError, FileExistsError):
                continue

    def stop(self) -> None:
        """End the watch."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def executions(self) -> list[Execution]:
        """Return every execution of an item, in the order of their starts."""
        found: list[Execution] = []
        for path in self._log.iterdir():
            last_sign = path.stat().st_mtime
            running: dict[str, Execution] = {}
            for line in path.read_text().splitlines():
                event, key, kernel, moment, status = line.split()
                if event == "start":
                    running[key] = Execution(key, kernel, float(moment), last_sign)
                    found.append(running[key])
                else:
                    running[key].end_s, running[key].status = float(moment), status
        return sorted(found, key=lambda execution: execution.start_s)

    def sealed(self) -> dict[str, list[float]]:
        """Return the times at which rows of each item were sealed, by the key's first half."""
        found: dict[str, list[float]] = {}
        for path in self._shards.iterdir():
            with shard.open_shard(path) as file:
                if not file.n_rows("tasks"):
                    continue  # the plan's
                keys = file.read("tasks", ["key"])["key"]
            for words in keys.tolist():
                found.setdefault(f"{words[0]:016x}", []).append(path.stat().st_mtime)
        return found


@dataclass(slots=True)
class Account:
    """How much was computed, and how much of it more than once.

    Seconds are wall seconds of workers. ``broken_off_s`` is an upper bound of what was lost with
    items under way, since relaxations go on from their last saved state. ``again``: keys computed
    once more after a row of theirs had been sealed.
    """

    items: int
    repeated_items: int
    repeated_s: float
    broken_off: int
    broken_off_s: float
    useful_s: float
    first_s: float
    last_s: float
    again: list[str]

    @property
    def repeated_share(self) -> float:
        """Seconds spent a second time, on finished and unfinished items, over useful seconds."""
        return (self.repeated_s + self.broken_off_s) / self.useful_s


def account(records: Records) -> Account:
    """Return the account of all that was computed."""
    executions = records.executions()
    sealed = records.sealed()
    last: dict[str, Execution] = {}
    repeated: list[Execution] = []
    broken_off: list[Execution] = []
    useful_s = 0.0
    again = []
    for execution in executions:
        spent = execution.end_s - execution.start_s
        if sealed.get(execution.key) and min(sealed[execution.key]) < execution.start_s:
            again.append(execution.key)
        if execution.status == "open":
            useful_s += spent  # its state is saved, and the next one goes on from there
        elif not execution.status:
            broken_off.append(execution)
        elif execution.key in last:
            repeated.append(execution)
        else:
            last[execution.key] = execution
            useful_s += spent
    return Account(
        items=len(last),
        repeated_items=len(repeated),
        repeated_s=sum(e.end_s - e.start_s for e in repeated),
        broken_off=len(broken_off),
        broken_off_s=sum(e.end_s - e.start_s for e in broken_off),
        useful_s=useful_s,
        first_s=executions[0].start_s,
        last_s=max(e.end_s for e in executions),
        again=again,
    )


class Disturber:
    """A campaign on the cluster, and all that is done to it; each fault returns what it did.

    An empty answer means that there was nothing to hit at that moment.
    """

    def __init__(self, cluster: SlurmCluster, start: Callable[[], Run], rng: random.Random) -> None:
        self.cluster = cluster
        self._start = start
        self._rng = rng
        self.runs = [start()]
        self._down: dict[str, float] = {}
        # Left alone by the other faults, so that it is its walltime that ends them.
        self.shortened: list[str] = []
        self.faults: dict[str, Callable[[], str]] = {
            "block cancelled (scancel)": self.cancel_block,
            "worker pool killed (kill -9)": self.kill_pool,
            "node set down": self.set_node_down,
            "walltime ends early": self.end_walltime,
            "driver killed (kill -9), restarted": self.kill_driver,
            "slurmctld restarted": self.restart_scheduler,
        }

    @property
    def run(self) -> Run:
        """The run of now."""
        return self.runs[-1]

    def _block(self) -> dict[str, str] | None:
        jobs = [job for job in self.cluster.running() if job["id"] not in self.shortened]
        return self._rng.choice(jobs) if jobs else None

    def cancel_block(self) -> str:
        """Cancel a running block behind the driver's back."""
        if (job := self._block()) is None:
            return ""
        self.cluster.scancel(job["id"])
        return f"job {job['id']} on {job['node']}"

    def kill_pool(self) -> str:
        """Kill the manager of a worker pool; its job goes on until it notices."""
        job = self._block()
        pools = self.cluster.pools(job["node"]) if job is not None else []
        victim = self._rng.choice(pools) if pools else None
        return f"process {victim.pid}" if victim is not None and kill(victim) else ""

    def set_node_down(self) -> str:
        """Set a cpu node down; `mend_nodes` brings it back."""
        job = self._block()
        if job is None or self._down:
            return ""
        self.cluster.set_node(job["node"], "down")
        self._down[job["node"]] = time.monotonic()
        return job["node"]

    def mend_nodes(self, after_s: float = 0.0) -> None:
        """Bring back the nodes that were set down so many seconds ago."""
        for node, since in list(self._down.items()):
            if time.monotonic() - since >= after_s:
                self.cluster.set_node(node, "resume")
                del self._down[node]

    def end_walltime(self) -> str:
        """Let a block's walltime end within half a minute, of which its workers know nothing."""
        if (job := self._block()) is None:
            return ""
        self.shortened.append(job["id"])
        self.cluster.shorten(job["id"])
        return f"job {job['id']} on {job['node']}"

    def kill_driver(self) -> str:
        """Kill the driver and start it again, as its user would."""
        if self.run.process.poll() is not None:
            return ""
        kill(psutil.Process(self.run.process.pid))
        self.run.process.wait()
        self.runs.append(self._start())
        return f"process {self.runs[-2].process.pid}"

    def restart_driver(self) -> None:
        """Start it again where it ended by itself."""
        self.runs.append(self._start())

    def restart_scheduler(self) -> str:
        """Restart slurmctld; it is away for some seconds."""
        self.cluster.stop_slurmctld()
        time.sleep(self._rng.uniform(1.0, 6.0))
        self.cluster.start_slurmctld()
        return "away for some seconds"

    def close(self) -> None:
        """End what is left of all runs."""
        for run in self.runs:
            run.close()
