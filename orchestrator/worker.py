"""What a Parsl worker does with a bundle: run items under guard, seal shards, send a receipt."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.calculators import DFT_LEVELS
from orchestrator import block, child, dft_cost, shard, turn
from orchestrator.columns import Rows, from_records, key_array
from orchestrator.errors import CorruptShardError, StoreVersionError
from orchestrator.frame_file import SavedFrames, frames_path
from orchestrator.guard import CUT, Guard, StillbornError
from orchestrator.kernel_calls import Call, Payload, batches
from orchestrator.memory import Share
from orchestrator.plan import FROM_NO_GEOMETRY, NO_KEY, Item, StagePlan, chain_key
from orchestrator.schema import STATUSES
from orchestrator.under_way import Mark

NOT_STARTED = 255
NO_PARENT = 254
CUT_OFF = 253
TOO_LONG = 252
# Kernels that save their state as they go, and so lose little to the end of a block.
SAVING = frozenset(
    {
        *("relax", "single_points", "metropolis", "gaussian_chain", "replica_exchange"),
        "diffusion_chain",
    }
)
# Estimates are averages: an item is begun where twice as much is left of its block, or where the
# block is so fresh that no other would leave it more.
_SAFETY = 2.0
_FRESH_SHARE = 0.75
_SAVING_SHARE = 0.1
_SAVING_S = 2.0
# A shard is built in memory, of several copies of its rows.
_SEAL_BYTES = 24 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """Items of one stage that one worker runs in one go.

    ``estimates`` (K,) f4: expected seconds of each item; empty where nobody knows;
    ``control_every``: seconds between two looks at the driver's word; ``alone``: whether no other
    bundle may run in its worker pool meanwhile. ``siblings``: where items of several stages run
    together, all those stages; ``stage`` is the first of them.
    """

    id: str
    run_id: str
    store: str
    campaign: str
    stage: StagePlan
    items: list[Item]
    checkpoint_every: float
    seal_every: float
    crash_limit: int
    estimates: bytes = b""
    control_every: float = 1.0
    alone: bool = False
    siblings: tuple[StagePlan, ...] = ()

    def stage_of(self, item: Item) -> StagePlan:
        """Return the stage that an item belongs to."""
        return next((s for s in self.siblings if s.index == item.stage), self.stage)


@dataclass(slots=True)
class Receipt:
    """What became of a bundle's items, in their order; the results themselves are in shards.

    status (K,) u1: index into `schema.STATUSES`, or NOT_STARTED, NO_PARENT, CUT_OFF (broken off by
    its block's end, with no state saved), TOO_LONG (for what was left of the block); shard (K,) u2:
    index into ``shards``; cpu_s, wall_s (K,) f4. ``manager`` and ``block`` are Parsl's names of
    where it ran; ``broken`` says why nothing can run there.
    """

    bundle: str
    node: str
    manager: str = ""
    block: str = ""
    broken: str = ""
    shards: list[str] = field(default_factory=list)
    status: bytes = b""
    shard: bytes = b""
    cpu_s: bytes = b""
    wall_s: bytes = b""
    first_start: float = 0.0
    restarts: int = 0


# One guard per thread, for sites whose workers are threads.
_here = threading.local()


def _own_guard() -> Guard:
    """Return this worker's guard; with the first, tie a Parsl worker to its manager's life."""
    if not hasattr(_here, "guard"):
        if "PARSL_WORKER_RANK" in os.environ:
            # Parsl's worker looks for its manager between bundles only.
            child.die_with_parent()
        _here.guard = Guard()
    guard: Guard = _here.guard
    return guard


def checkpoint_path(store: Path, key: bytes) -> Path:
    """Return where the state of an unfinished item is saved."""
    name = key.hex()
    return store / "checkpoints" / name[:2] / f"{name}.npz"


def forget_checkpoint(store: Path, key: bytes) -> None:
    """Remove the saved state of an item whose result is sealed."""
    path = checkpoint_path(store, key)
    for file in (path, frames_path(path)):
        file.unlink(missing_ok=True)


def started_from(item: Item) -> bytes:
    """Return the key of the task or file geometry an item starts from; zeros for a graph."""
    return NO_KEY if item.parent_key == item.mol_key else item.parent_key


def task_record(
    item: Item, stage: StagePlan, *, status: str, message: str, attempts: int, started_s: float
) -> dict[str, Any]:
    """Return a row of `tasks` for an item; where and for how long it ran is left blank."""
    return {
        "key": item.key,
        "mol_key": item.mol_key,
        "parent_key": started_from(item),
        "stage": stage.name,
        "kernel": stage.label,
        "status": status,
        "message": message,
        "attempts": attempts,
        "ladder": "",
        "conformer": item.conformer,
        "seed": int.from_bytes(item.key[:8], "big"),
        "source": "",
        "line": -1,
        "host": "",
        "block": "",
        "worker_pid": 0,
        "started_s": started_s,
        "wall_s": 0.0,
        "cpu_s": 0.0,
    }


class Control:
    """The driver's word to its workers: go on, drain, or another; not read all the time.

    What is left of the block around them is asked here too.
    """

    def __init__(self, store: Path, run_id: str, every_s: float = 1.0) -> None:
        self._every_s = every_s
        self._path = store / "control" / "driver.json"
        self._run_id = run_id
        self._read = 0.0
        self._stop = False
        self.stop_at = block.stop_time() or math.inf

    def should_stop(self) -> bool:
        if time.time() >= self.stop_at:
            return True
        now = time.monotonic()
        if now - self._read > self._every_s:
            self._read = now
            try:
                word = json.loads(self._path.read_text())
            except (OSError, ValueError):
                return self._stop
            self._stop = word["run_id"] != self._run_id or word["drain"]
        return self._stop


_Found = dict[bytes, tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]]


def _parents(bundle: Bundle) -> _Found:
    """Return the geometry (or the path) that each item starts from, by the parent's key."""
    from orchestrator.store import Store, pick_geometries

    path_table = bundle.stage.path_table
    tables = (path_table,) if path_table else ("geometries", "relaxations")
    found: _Found = {}
    by_hint: dict[str, list[bytes]] = {}
    for item in bundle.items:
        if item.hint:
            by_hint.setdefault(item.hint, []).append(item.parent_key)
    for hint, keys in by_hint.items():
        wanted = key_array(keys)
        by_words = {tuple(w): k for w, k in zip(wanted.tolist(), keys, strict=True)}
        try:
            with shard.open_shard(Path(hint)) as file:
                for table in tables:
                    if file.n_rows(table):
                        pick_geometries(file, table, wanted, by_words, found)
        except (FileNotFoundError, CorruptShardError, StoreVersionError):
            continue  # compacted or damaged meanwhile: the store is asked below
    missing = [item.parent_key for item in bundle.items if item.parent_key not in found]
    if missing:
        found.update(Store(bundle.store).geometries(missing, tables))
    return found


def _settled(bundle: Bundle) -> dict[bytes, int]:
    """Return from which frame of its path on each parent has its final elements."""
    from orchestrator.columns import key_bytes
    from orchestrator.store import Store

    wanted = {item.parent_key for item in bundle.items}
    found: dict[bytes, int] = {}

    def look(rows: Rows) -> None:
        for row, words in enumerate(rows["key"].tolist()):
            key = key_bytes(words)
            if key in wanted:
                changing = np.flatnonzero(rows["all_elements_final"][row] == 0)
                found[key] = int(changing[-1]) + 1 if len(changing) else 0

    names = ["key", "all_elements_final"]
    for hint in {item.hint for item in bundle.items if item.hint}:
        try:
            with shard.open_shard(Path(hint)) as file:
                if file.n_rows("generations"):
                    look(file.read("generations", names))
        except (FileNotFoundError, CorruptShardError, StoreVersionError):
            continue  # compacted or damaged meanwhile: the store is asked below
    if len(found) < len(wanted):
        look(Store(bundle.store).read("generations", names))
    return found


def _lowest_multiplicity(numbers: NDArray[np.uint8] | None, charge: int) -> int:
    """Return 1 or 2 for a molecule that had no electrons to count when it was planned."""
    return 1 if numbers is None else 1 + (int(numbers.sum()) - charge) % 2


def _payloads(bundle: Bundle) -> tuple[list[int], list[Payload]]:
    """Return the runnable items' positions in the bundle, and what to run."""
    needs_geometry = bundle.stage.kernel not in FROM_NO_GEOMETRY
    along_path = bundle.stage.along_path
    parents = _parents(bundle) if needs_geometry else {}
    settled = _settled(bundle) if bundle.stage.settled_only else {}
    where: list[int] = []
    payloads: list[Payload] = []
    store = Path(bundle.store)
    long = bundle.stage.kernel in SAVING
    for i, item in enumerate(bundle.items):
        numbers, positions = parents.get(item.parent_key, (None, None))
        if needs_geometry and positions is None:
            continue
        if bundle.stage.settled_only and item.parent_key not in settled:
            continue
        frames = None
        if along_path and numbers is not None and positions is not None:
            frames = positions.reshape(-1, len(numbers), 3).astype(np.float32, copy=False)
            positions = frames[-1]
        where.append(i)
        payloads.append(
            Payload(
                item.smiles,
                item.charge,
                item.multiplicity or _lowest_multiplicity(numbers, item.charge),
                int.from_bytes(item.key[:8], "big"),
                item.conformer,
                numbers,
                None if positions is None else positions.astype(np.float64),
                str(checkpoint_path(store, item.key)) if long else "",
                frames,
                settled.get(item.parent_key, 0),
                bundle.stage_of(item).settings if bundle.siblings else None,
            )
        )
    return where, payloads


class _Batch:
    """Rows that wait to be sealed together."""

    def __init__(self, bundle: Bundle, host: str, job: str) -> None:
        self.bundle = bundle
        self.host = host
        self.job = job
        self.sealed = 0
        self._clear()

    def _clear(self) -> None:
        self.records: dict[str, list[dict[str, Any]]] = {"tasks": []}
        self.nbytes = 0
        self.since = time.monotonic()
        self.resumed: list[Item] = []

    def __len__(self) -> int:
        return len(self.records["tasks"])

    def add(self, item: Item, outcome: dict[str, Any]) -> None:
        if not len(self):
            self.since = time.monotonic()
        stage = self.bundle.stage_of(item)
        ladder = "; ".join(outcome["ladder"])
        record = task_record(
            item,
            stage,
            status=outcome["status"],
            message=outcome["message"],
            # What passes in the end had no part in the loss of its earlier workers.
            attempts=min(
                255, outcome["attempts"] + (item.losses if outcome["status"] != "ok" else 0)
            ),
            started_s=outcome["started_s"],
        )
        record.update(
            ladder=ladder,
            host=self.host,
            block=self.job,
            worker_pid=os.getpid(),
            wall_s=outcome["wall_s"],
            cpu_s=outcome["cpu_s"],
        )
        self.records["tasks"].append(record)
        for table, found in outcome.get("rows", {}).items():
            for rung, row in enumerate(found if isinstance(found, list) else [found]):
                row.update(
                    key=chain_key(item.key, rung) if isinstance(found, list) else item.key,
                    mol_key=item.mol_key,
                    parent_key=record["parent_key"],
                    stage=stage.name,
                    conformer=item.conformer,
                )
                if table == "relaxations":
                    row.update(ladder=ladder, cpu_s=outcome["cpu_s"], wall_s=outcome["wall_s"])
                elif table == "single_points":
                    row.update(cpu_s=outcome["cpu_s"])
                elif table == "exchanges":
                    row.update(task_key=item.key)
                elif table == "chains":
                    row.update(task_key=item.key)
                    # What it took before it was taken up again stands there already.
                    for name in ("cpu_s", "wall_s") if isinstance(found, dict) else ():
                        row[name] += outcome[name]
                    if isinstance(row["positions"], SavedFrames):
                        row["positions"] = row["positions"].read()
                self.records.setdefault(table, []).append(row)
        self.nbytes += outcome.get("nbytes", 300)
        # A time limit may be raised, so that state is kept; these would fail again from it.
        final = stage.kernel == "relax" and outcome["status"] in ("convergence", "not_finite")
        if outcome.get("checkpointed") or final:
            self.resumed.append(item)

    def full(self) -> bool:
        late = time.monotonic() - self.since > self.bundle.seal_every
        return self.nbytes > _SEAL_BYTES or (late and len(self) > 0)

    def seal(self) -> Path:
        """Write what waits as one shard; only then are saved states of its items let go."""
        store = Path(self.bundle.store)
        folder = store / "inbox" / self.bundle.run_id
        tables: list[Rows] = [from_records(name, rows) for name, rows in self.records.items()]
        name = f"{self.bundle.id}-{self.sealed}"
        path, _ = shard.seal(folder, name, tables, self.bundle.campaign)
        for item in self.resumed:
            forget_checkpoint(store, item.key)
        self.sealed += 1
        self._clear()
        return path


def run_bundle(bundle: Bundle, **resources: object) -> Receipt:
    """Run a bundle and return its receipt (called by Parsl in a worker process).

    ``resources``: what it asked of its executor, which Parsl hands on to what it calls; unused.
    """
    node = block.node_name()
    local = os.environ.get("PARSL_WORKER_BLOCK_ID", "0")
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID") or f"local-{local}"
    receipt = Receipt(bundle.id, node, os.environ.get("PARSL_WORKER_POOL_ID", ""), local)
    n = len(bundle.items)
    status = np.full(n, NOT_STARTED, np.uint8)
    shard_of = np.zeros(n, np.uint16)
    cpu = np.zeros(n, np.float32)
    wall = np.zeros(n, np.float32)
    control = Control(Path(bundle.store), bundle.run_id, bundle.control_every)
    batch = _Batch(bundle, node, job)
    mark = Mark(Path(bundle.store), bundle.run_id, bundle.id)
    mine = turn.Turn(alone=bundle.alone)
    share = Share(memory_needed(bundle))
    try:
        guard = _own_guard()
        restarts = guard.restarts
        where: list[int] = []
        payloads: list[Payload] = []
        if (
            mine.wait(control.should_stop)
            and share.wait(control.should_stop)
            and not control.should_stop()
        ):
            if mine.is_alone:
                mark.set([], 0.0, alone=True)
            where, payloads = _payloads(bundle)
            status[:] = NO_PARENT
            status[where] = NOT_STARTED

        def seal_if_due() -> None:
            if batch.full():
                receipt.shards.append(str(batch.seal()))

        def on_wait(running: Sequence[int], seconds: float) -> None:
            mark.update([bundle.items[where[i]].key for i in running], seconds)
            seal_if_due()

        for index, outcome in _outcomes(guard, bundle, where, payloads, control, on_wait):
            i = where[index]
            if outcome["status"] == child.UNFIT:
                status[i] = TOO_LONG
                continue
            receipt.first_start = receipt.first_start or outcome["started_s"]
            outcome["cpu_s"] += outcome.get("cpu_elsewhere_s", 0.0)
            cpu[i] = outcome["cpu_s"]
            # What it took before it was taken up again is its own, though not this run's.
            outcome["cpu_s"] += outcome.get("cpu_before_s", 0.0)
            outcome["wall_s"] += outcome.get("wall_before_s", 0.0)
            wall[i] = outcome["wall_s"]
            if outcome["status"] == "open":
                continue
            if outcome["status"] == CUT:
                saved = _saved_since(bundle, bundle.items[i], outcome["started_s"])
                status[i] = NOT_STARTED if saved else CUT_OFF
                continue
            batch.add(bundle.items[i], outcome)
            status[i] = STATUSES.index(outcome["status"])
            shard_of[i] = len(receipt.shards)
            seal_if_due()
        receipt.restarts = guard.restarts - restarts
    except (StillbornError, OSError, ImportError) as exc:
        # What is wrong here may be right on other nodes; the driver sees to that.
        receipt.broken = str(exc) if isinstance(exc, StillbornError) else f"{node}: {exc!r}"
    finally:
        share.end()
        mine.end()
        mark.clear()
    if len(batch):
        receipt.shards.append(str(batch.seal()))
    receipt.status = status.tobytes()
    receipt.shard = shard_of.tobytes()
    receipt.cpu_s = cpu.tobytes()
    receipt.wall_s = wall.tobytes()
    return receipt


def _saved_since(bundle: Bundle, item: Item, started_s: float) -> bool:
    """Tell whether a broken off item has come further, and left that on disk."""
    try:
        path = checkpoint_path(Path(bundle.store), item.key)
        return bundle.stage.kernel in SAVING and path.stat().st_mtime > started_s
    except OSError:
        return False


def memory_needed(bundle: Bundle) -> int:
    """Return the bytes that the largest item will take; 0 where that is too little to matter."""
    settings = bundle.stage.settings
    if settings.get("level") not in DFT_LEVELS:
        return 0
    sizes = [dft_cost.n_functions(item.smiles, item.n_atoms) for item in bundle.items]
    return dft_cost.memory(max(sizes), settings["program"])


def needs(bundle: Bundle, whole_s: float) -> list[float]:
    """Return how many seconds must be left of a block of ``whole_s`` to begin each item."""
    fresh = _FRESH_SHARE * whole_s
    if not bundle.estimates:
        return [0.0] * len(bundle.items)
    found: list[float] = []
    for item, seconds in zip(
        bundle.items, np.frombuffer(bundle.estimates, np.float32), strict=True
    ):
        wanted = min(_SAFETY * float(seconds), bundle.stage.time_limit)
        if bundle.stage.kernel in SAVING:
            wanted = min(wanted, max(_SAVING_SHARE * float(seconds), _SAVING_S))
        elif item.cuts:
            wanted = fresh
        found.append(min(wanted, fresh))
    return found


def together(wanted: list[float], grouped: Sequence[Sequence[int]], whole_s: float) -> list[float]:
    """Return needs of items such that no batch of them needs more than a fresh block has."""
    fresh = max(_FRESH_SHARE * whole_s, 1e-6)
    found = list(wanted)
    for batch in grouped:
        share = fresh / max(sum(wanted[i] for i in batch), fresh)
        for i in batch:
            found[i] *= share
    return found


def _outcomes(
    guard: Guard,
    bundle: Bundle,
    where: list[int],
    payloads: list[Payload],
    control: Control,
    on_wait: Callable[[Sequence[int], float], None],
) -> Iterator[tuple[int, dict[str, Any]]]:
    stage = bundle.stage
    common = Call(
        stage.kernel,
        stage.settings,
        bundle.checkpoint_every,
        stage.model,
        # Many workers of an ordinary pool would share, and fill, a GPU that their node has.
        gpu=stage.pool != "cpu",
        memory_limit=stage.memory_limit,
        # Of this very bundle: the next one may have other nodes.
        mpi_prefix=os.environ.get("PARSL_MPI_PREFIX", ""),
    )
    whole_s = control.stop_at - (block.block_start() or time.time())
    grouped = batches(common, payloads)
    wanted: list[float] | None = None
    if math.isfinite(whole_s):
        known = needs(bundle, whole_s)
        wanted = together([known[i] for i in where], grouped, whole_s)
    return guard.run(
        common,
        payloads,
        needs=wanted,
        stop_at=control.stop_at,
        cut_at=block.cut_time() or math.inf,
        batches=grouped,
        time_limit=stage.time_limit,
        memory_limit=stage.memory_limit,
        crash_limit=bundle.crash_limit,
        should_stop=control.should_stop,
        on_wait=on_wait,
    )
