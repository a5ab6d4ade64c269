"""The driver: plan -> bounded stream -> Parsl -> receipts -> compaction; resume is the same."""

from __future__ import annotations

import contextlib
import functools
import heapq
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from orchestrator import block, fleet, ingest, lock, progress, shard, under_way
from orchestrator.campaign import Campaign
from orchestrator.chain_calls import company
from orchestrator.columns import from_records
from orchestrator.counts import StageCounts, in_full
from orchestrator.errors import (
    BasinError,
    CampaignError,
    CorruptShardError,
    RunError,
    StoreError,
)
from orchestrator.forecast import learned_estimates, memory_warnings
from orchestrator.interchange import DRIVER_PID
from orchestrator.key_index import KeyIndex
from orchestrator.lock import DriverLock
from orchestrator.molecules import find_files, sources_digest
from orchestrator.nodes import BROKEN_LIMIT, Nodes
from orchestrator.plan import Item, Plan, StagePlan
from orchestrator.schema import STATUSES
from orchestrator.sites import Site, prepare, require_plain_path
from orchestrator.store import Store
from orchestrator.stream import Stream
from orchestrator.tally import plan_digest
from orchestrator.train_stage import TrainJob, TrainReceipt, drive, run_training
from orchestrator.worker import (
    CUT_OFF,
    NO_PARENT,
    NOT_STARTED,
    TOO_LONG,
    Bundle,
    Receipt,
    checkpoint_path,
    run_bundle,
    task_record,
)
from orchestrator.worker_pool import BUNDLE_TIME

if TYPE_CHECKING:
    from concurrent.futures import Future

BACKLOG_ITEMS = 8192
COMPACT_SHARDS = 256
COMPACT_EVERY_S = 120.0
ANSWER_LIMIT_S = 30.0
LOSS_LIMIT = 2
# Worker pools that may be lost with an item and others in them, before it runs there alone.
SUSPECT_LIMIT = 2
# What was lost with one worker pool is heard of within so long.
TOGETHER_S = 2.0
PARENT_LOOKS = 3
CUT_LIMIT = 3
BLOCK_FAILURE_LIMIT = 3
# A block that ends sooner, and did nothing, has failed whatever its scheduler says.
SHORT_BLOCK_S = 30.0
# Bundles that wait for workers which are not there yet: enough to have their blocks asked for.
WAITING_BUNDLES = 4096
# Failed items that are remembered with their nodes, to be computed again where one proves bad.
SUSPECTS = 20_000
NOTES = 100
# Reads of the driver's word that its file system has to stand in a second.
CONTROL_READS_S = 2000
_NODE_CLASSES = frozenset(STATUSES.index(name) for name in ("crash", "resource"))
_TICK_S = 0.2
_LOOK_EVERY_S = 2.0
_WATCH_EVERY_S = 1.0
_WRITE_EVERY_S = 5.0
_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 120.0
_GONE_LIMIT_S = 30.0
_TAIL_BYTES = 4096


@dataclass(slots=True)
class Progress:
    """What a run has done so far, for whoever shows it."""

    campaign: str
    stages: list[StageCounts]
    complete_plan: bool
    entries: int
    bad_entries: int
    elapsed_s: float
    done_now: int
    rate: float
    left_s: float | None
    core_s: float
    in_flight: int
    draining: bool
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Summary:
    """How a run ended."""

    complete: bool
    counts: list[StageCounts]
    entries: int
    bad_entries: int
    done_before: int
    done_now: int
    elapsed_s: float
    work_s: float
    core_s: float
    workers: int
    lost_bundles: int
    notes: list[str]
    node_hours: float = 0.0
    bad_nodes: dict[str, str] = field(default_factory=dict)


class Notes:
    """What a run has to say to its user: the last of it, events of one kind summed up."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, str] = OrderedDict()
        self._left_out = 0

    def add(self, text: str, key: str = "") -> None:
        """Add a note, or replace the one with the same key."""
        self._lines[key or text] = text
        while len(self._lines) > NOTES:
            self._lines.popitem(last=False)
            self._left_out += 1

    def lines(self) -> list[str]:
        """Return the notes in the order in which they came."""
        more = [f"{self._left_out} earlier notes are left out"] if self._left_out else []
        return [*more, *self._lines.values()]


@dataclass(slots=True)
class _Loss:
    """A bundle whose worker pool was lost, until it is known why."""

    bundle: Bundle
    error: Any
    since: float


def _record(executor: Any, name: str) -> Any:
    """Return what the scheduler says of a block; None where its provider keeps no records."""
    try:
        return executor.provider.record(executor.blocks_to_job_id[name])
    except (AttributeError, KeyError):
        return None


def _without_failures(index: KeyIndex, retry: bool) -> KeyIndex:
    if not retry:
        return index
    kept = KeyIndex()
    keys, codes = index.items()
    again = (codes == 0) | (codes == STATUSES.index("input"))
    kept.extend(keys[again], codes[again])
    return kept


class Driver:
    """Runs a campaign to its end, or to where it is told to stop."""

    def __init__(
        self,
        campaign: Campaign,
        site: Site,
        *,
        retry_failed: bool = False,
        show: Callable[[Progress], None] = lambda progress: None,
        max_node_hours: float | None = None,
        drain_at: float | None = None,
        forget_nodes: bool = False,
    ) -> None:
        """Prepare a run; nothing is started.

        ``max_node_hours``: used by all runs of the campaign together, it drains; ``drain_at``
        (epoch, s): when it drains, by default before the end of a batch job around this process;
        ``forget_nodes``: take nodes again that were found to be bad.
        """
        self.campaign = campaign
        self.site = site
        self.plan = Plan(campaign)
        site.require_pools(campaign.pools)
        require_plain_path(campaign.store)
        if campaign.train is not None:
            # What is wrong in it is better known now than after all the rest.
            from orchestrator.train_file import load_training

            load_training(campaign.training_file)
        self.store = Store.create(campaign.store, campaign.name)
        self.store.require_writable()
        self.run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"
        self.show = show
        self.retry_failed = retry_failed
        self.draining = False
        self._max_node_hours = max_node_hours
        self._drain_at = drain_at if drain_at is not None else block.driver_drain_time()
        self._told = False
        self._training: Callable[[TrainJob], Future[TrainReceipt]] | None = None
        self._training_words = ""
        self._trained = campaign.train is None
        self._interrupts = 0
        self._done: queue.SimpleQueue[tuple[Bundle, Future[Receipt]]] = queue.SimpleQueue()
        self._flying: dict[str, Bundle] = {}
        self._flying_in: Counter[str] = Counter()
        self._unexplained: list[_Loss] = []
        self._loss_items: Counter[str] = Counter()
        self._deferred: list[tuple[float, int, int, Item]] = []
        self._arrivals = 0
        self._idle_looks = 0
        self._watched = 0.0
        self._written = 0.0
        self._blocks_written = -1
        self._digest = ""
        self._worked: set[tuple[str, str]] = set()
        self._short_lived: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        self._suspects: OrderedDict[bytes, tuple[str, int, Item, int]] = OrderedDict()
        self._classes: Counter[int] = Counter()
        before = progress.read(self.store.path) or progress.ProgressFile()
        self._left_behind = before.blocks
        self._hours_before = fleet.hours_used(before, list(site.config.executors))
        self.nodes = Nodes({} if forget_nodes else before.bad_nodes)
        self.fleet = fleet.Fleet({})
        self._executors: dict[str, Any] = {}
        self._orphans: list[tuple[int, Item]] = []
        self._parent_looks = 0
        self._compactor: subprocess.Popen[bytes] | None = None
        self._compacted = time.monotonic()
        self._looked = time.monotonic()
        self._shards = 0
        self._serial = 0
        self._started = time.monotonic()
        self._first_start = 0.0
        self._done_now = 0
        self._core_s = 0.0
        self._lost = 0
        self._reader: subprocess.Popen[bytes] | None = None
        self._said: dict[int, IO[bytes]] = {}
        self._failed_blocks: dict[str, int] = {}
        self._forgiven_blocks: dict[str, int] = {}
        self.notes = Notes()

    def run(self) -> Summary:
        """Run until all is done, or drained; raise RunError when it cannot go on."""
        files = find_files(self.campaign.molecules, self.campaign.path.parent)
        lock = DriverLock(self.store.path, self.run_id)
        try:
            with self._signals(lock):
                origin = {"path": str(self.campaign.path.absolute())}
                shard.write_whole(
                    self.store.path / "control" / "campaign_file.json", json.dumps(origin).encode()
                )
                (self.store.path / "inbox" / self.run_id).mkdir(exist_ok=True)
                under_way.clear(self.store.path)
                digest = self._digest = sources_digest(files, self.campaign.molecules)
                folder = ingest.plan_folder(self.store, digest)
                ingest.mend(folder)
                if not ingest.is_complete(folder):
                    self._reader = self._python(
                        "orchestrator.ingest", self.campaign.path, self.store.path, digest
                    )
                with self._parsl() as apps:
                    snapshot = self.store.snapshot()
                    index = _without_failures(snapshot.task_index(), self.retry_failed)
                    estimates = learned_estimates(snapshot, self.plan)
                    self.stream = Stream(self.plan, folder, index, estimates, self._company)
                    self._loop(lock, apps)
                    self._train(lock)
                    self._write_progress()
                self._stop_process(self._compactor)
                self._compactor = None
                self._wait_process(self._compact(), "compaction")
                return self._summary()
        finally:
            self._last_word()
            for process in (self._reader, self._compactor):
                if process is not None and process.poll() is None:
                    process.kill()
                    process.wait()
            for said in self._said.values():
                said.close()
            lock.release()

    # -- set-up -----------------------------------------------------------------------------

    def _python(self, module: str, *arguments: object) -> subprocess.Popen[bytes]:
        # Not a pipe: nobody reads it before the end, and a full one would hold the process up.
        # Not in the store: its disk may be full, and that is what there is to say.
        said = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as its process runs
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stderr=said,
            # A Ctrl-C at the terminal is for the driver, which then ends these in good order.
            process_group=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE"},
        )
        self._said[process.pid] = said
        return process

    @contextlib.contextmanager
    def _signals(self, lock: DriverLock) -> Iterator[None]:
        def interrupt(number: int, frame: Any) -> None:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            self.draining = True

        before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _parsl(self) -> Iterator[dict[str, Any]]:
        import logging

        import parsl

        logging.getLogger("parsl").setLevel(logging.CRITICAL)
        prepare(self.site, self.store.path / "logs" / self.run_id)
        os.environ[DRIVER_PID] = str(os.getpid())
        self._clear_the_way()
        self._tolerate_lost_blocks()
        try:
            kernel = parsl.load(self.site.config)
        except Exception as exc:
            what = f"site {self.site.name!r} could not be started: {exc}"
            if "nterchange" in what:
                what += "; an `address` in the site file must be one of this host's (see `ip addr`)"
            raise RunError(what) from exc
        try:
            pools = self.campaign.pools
            self._executors = {pool: kernel.executors[pool] for pool in pools}
            self.fleet = fleet.Fleet(self._executors, self._hours_before, self.nodes.bad)
            for executor in self._executors.values():
                if (client := getattr(executor, "command_client", None)) is not None:
                    # Parsl would wait for ever for the answer of an interchange that died.
                    client.run = functools.partial(client.run, timeout_s=ANSWER_LIMIT_S)

            def app(function: Callable[..., Any], pool: str) -> Any:
                made = parsl.python_app(
                    function, data_flow_kernel=kernel, executors=[pool], cache=False
                )
                wanted = self.site.resource_specification(pool)
                if not wanted:
                    return made
                return functools.partial(made, parsl_resource_specification=wanted)

            if self.campaign.train is not None:
                self._training = app(run_training, self.campaign.train.pool)
            yield {pool: app(run_bundle, pool) for pool in {s.pool for s in self.plan.stages}}
        finally:
            with contextlib.suppress(Exception):
                kernel.cleanup()
            # Parsl leaves blocks behind where its interchange or its executor broke down.
            self.fleet.cancel_all(_GONE_LIMIT_S)
            parsl.clear()

    def _clear_the_way(self) -> None:
        """End what an earlier driver left behind; prepare the pools for what is known already."""
        executors: list[Any] = list(self.site.config.executors)
        if gone := fleet.cancel_leftovers(executors, self._left_behind, _GONE_LIMIT_S):
            self.notes.add(
                f"{len(gone)} blocks of an earlier run were cancelled: {', '.join(gone)}"
            )
        for executor in executors:
            if self.nodes.bad and hasattr(executor.provider, "exclude_nodes"):
                executor.provider.exclude_nodes(set(self.nodes.bad))
            head, module, tail = executor.launch_cmd.partition("orchestrator.worker_pool ")
            if module and BUNDLE_TIME not in tail:
                option = f"{BUNDLE_TIME}{self.campaign.run.bundle_time:g} "
                executor.launch_cmd = f"{head}{module}{option}{tail}"

    def _tolerate_lost_blocks(self) -> None:
        """Let a pool break down only when several blocks in a row fail with nothing done between.

        Parsl's own rule would end the run with the first block that is lost.
        """
        from parsl.jobs.error_handlers import simple_error_handler
        from parsl.jobs.errors import TooManyJobFailuresError

        told: set[tuple[str, str]] = set()

        def judge(executor: Any, blocks: dict[str, Any]) -> None:
            pool = executor.label
            failed = [name for name in list(blocks) if self._has_failed(executor, name)]
            self._failed_blocks[pool] = len(failed)
            for name in failed:
                if (pool, name) not in told:
                    told.add((pool, name))
                    record = _record(executor, name)
                    if record is None or (pool, name) in self._worked:
                        continue
                    # A node has no part in an end that others decided on.
                    by_others = record.reason in fleet.KNOWN_ENDS - {"completed"}
                    if len(record.nodes) == 1 and not by_others:
                        self._short_lived.put((pool, record.nodes[0], record.words))
            if len(failed) - self._forgiven_blocks.get(pool, 0) >= BLOCK_FAILURE_LIMIT:
                last, record = blocks[failed[-1]], _record(executor, failed[-1])
                words = f"{BLOCK_FAILURE_LIMIT} blocks in a row failed"
                if last.exit_code is not None:
                    words += f", the last with exit status {last.exit_code}"
                if record is not None and record.words:
                    words += f": {record.words}"
                said = (last.stderr_summary or last.message or "no message").strip()
                if record is None or said != record.words:
                    words += f": {said}"
                executor.set_bad_state_and_fail_all(TooManyJobFailuresError(words))

        executors: list[Any] = list(self.site.config.executors)
        for executor in executors:
            if getattr(executor, "block_error_handler", None) is simple_error_handler:
                executor.block_error_handler = judge

    def _has_failed(self, executor: Any, name: str) -> bool:
        """Tell whether a block ended as none should: by a fault, or at once with nothing done."""
        from parsl.jobs.states import JobState

        status = executor.status_facade.get(name)
        if status is None or not status.terminal or status.state == JobState.SCALED_IN:
            return False
        job = executor.blocks_to_job_id.get(name)
        if job in self.fleet.given_back:
            return False
        fault = status.state in (JobState.FAILED, JobState.MISSING)
        record = _record(executor, name)
        if record is None or record.state != "ended":
            return fault
        if record.reason == "avoided":
            return False
        if (executor.label, name) not in self._worked:
            lived = (record.end_s or 0.0) - record.start_s if record.start_s else 0.0
            return lived < SHORT_BLOCK_S or (fault and record.reason not in fleet.KNOWN_ENDS)
        return fault and record.reason not in fleet.KNOWN_ENDS

    # -- the loop ---------------------------------------------------------------------------

    def _beat(self, lock: DriverLock) -> None:
        """Show that the driver lives, and pass on that it drains."""
        lock.beat()
        if self.draining and not self._told:
            lock.say(drain=True)
            self._told = True

    def _train(self, lock: DriverLock) -> None:
        """Have the campaign's model trained, once nothing is left that it could learn from."""
        if self._training is None or self.draining or any(c.waiting for c in self.counts()):
            return
        # What it learns from is read where the rows lie together.
        self._stop_process(self._compactor)
        self._compactor = None
        self._wait_process(self._compact(), "compaction")
        workers = self.site.pools()

        def tick(words: str) -> None:
            self._beat(lock)
            self._check_executors()
            self._training_words = words
            self.show(self._progress(workers))

        job = TrainJob(
            str(self.campaign.training_file), str(self.store.path), self.store.name, self.run_id
        )
        while True:
            receipt = drive(self._training, job, tick)
            if receipt.finished or self.draining:
                break
            # The end of its block: it goes on in the next one.
        self._training_words = ""
        self._trained = receipt.finished
        self.notes.add(f"{receipt.words}; {receipt.output}")

    def _company(self, item: Item) -> str:
        return company(checkpoint_path(self.store.path, item.key))

    def _loop(self, lock: DriverLock, apps: dict[str, Any]) -> None:
        workers = self.site.pools()
        while True:
            self._beat(lock)
            self._absorb()
            self._check_reader()
            self._watch()
            self._explain_losses()
            if not self.draining:
                self._wake()
                self._refill()
                for pool, app in apps.items():
                    self._submit(pool, app, workers[pool])
            self._check_executors()
            self._maybe_compact()
            self.show(self._progress(workers))
            if self.draining and self._nothing_runs():
                return
            waiting = self._unexplained or self._deferred
            if not self._flying and not waiting and (self.draining or self._finished()):
                return
            if not self._flying:
                time.sleep(0.05)

    def _nothing_runs(self) -> bool:
        """Tell, while draining, whether what was submitted still waits for workers."""
        if not self._flying:
            self._unexplained.clear()
            self._deferred.clear()
            return True
        if self.fleet.poll(_WATCH_EVERY_S):
            self._idle_looks = self._idle_looks + 1 if self.fleet.tasks == 0 else 0
        # A result may be on its way from the worker pool to here.
        return self._idle_looks >= 3

    def _watch(self) -> None:
        """Once a second: the user's word, the limits, the blocks, and the file that tells."""
        now = time.monotonic()
        if now - self._watched < _WATCH_EVERY_S:
            return
        self._watched = now
        asked = lock.stop_requested(self.store.path, self.run_id)
        if asked == "now":
            raise KeyboardInterrupt
        if asked == "drain":
            self.draining = True
        self.fleet.poll()
        used = self.fleet.node_hours()
        if self._max_node_hours is not None and used >= self._max_node_hours and not self.draining:
            self.draining = True
            self.notes.add(
                f"stopped: {used:.2f} node-hours are used, of {in_full(self._max_node_hours)} "
                "allowed (--max-node-hours counts all runs of a campaign)"
            )
        if self._drain_at is not None and time.time() >= self._drain_at and not self.draining:
            self.draining = True
            self.notes.add("stopped: the driver's own batch job is about to end")
        self._judge_short_lived()
        blocks = sum(len(executor.blocks_to_job_id) for executor in self._executors.values())
        if now - self._written > _WRITE_EVERY_S or blocks != self._blocks_written:
            self._blocks_written = blocks
            self._write_progress()

    def _wake(self) -> None:
        """Take up again the items that found no block with enough time left."""
        now = time.monotonic()
        fresh = self.fleet.arrivals != self._arrivals
        self._arrivals = self.fleet.arrivals
        while self._deferred and (fresh or self._deferred[0][0] <= now):
            _, _, stage, item = heapq.heappop(self._deferred)
            self.stream.push(stage, item)

    def _defer(self, stage: int, item: Item) -> None:
        wait = min(_FIRST_WAIT_S * 2.0 ** min(item.waits, 10), _LONGEST_WAIT_S)
        self._serial += 1
        item = item._replace(waits=item.waits + 1)
        heapq.heappush(self._deferred, (time.monotonic() + wait, self._serial, stage, item))

    def _finished(self) -> bool:
        """Whether nothing is left to submit, once nothing is under way."""
        if not self.stream.exhausted or self.stream.backlog():
            return False
        if not self._orphans:
            return True
        if self._parent_looks == PARENT_LOOKS:
            self.notes.add(
                f"{len(self._orphans)} tasks wait: the geometries they start from are not found"
            )
            return True
        # A network file system may show another machine's shard only after a while.
        self._parent_looks += 1
        time.sleep(self._parent_looks)
        for stage, item in self._orphans:
            self.stream.push(stage, item._replace(hint=""))
        self._orphans = []
        return False

    def _refill(self) -> None:
        functions = self.stream.functions
        while self.stream.backlog() < BACKLOG_ITEMS and self.stream.pull():
            pass
        if self.stream.functions > functions:
            found = memory_warnings(self.plan, self.site, self.stream.functions)
            for at, warning in enumerate(found):
                self.notes.add(warning, f"memory {at}")
        if time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._looked = time.monotonic()
            self.stream.look()

    def _submit(self, pool: str, app: Any, workers: int) -> None:
        connected = min(self.fleet.connected[pool], workers)
        limit = connected * self.campaign.run.window
        limit += min(workers - connected, WAITING_BUNDLES)
        while self._flying_in[pool] < limit:
            taken = self.stream.take(pool, self.campaign.run.bundle_time, connected or workers)
            if taken is None:
                return
            stage, items = taken
            self._serial += 1
            estimate = self.stream.estimates[stage.index]
            seconds = [estimate.seconds_of(item) for item in items]
            bundle = Bundle(
                id=f"{self._serial:07d}",
                run_id=self.run_id,
                store=str(self.store.path),
                campaign=self.store.name,
                stage=stage,
                items=items,
                checkpoint_every=self.campaign.run.checkpoint_every,
                seal_every=self.campaign.run.seal_every,
                crash_limit=self.campaign.run.crash_limit,
                estimates=np.array(seconds, np.float32).tobytes(),
                control_every=max(1.0, workers / CONTROL_READS_S),
                siblings=self.plan.siblings(stage),
                alone=any(item.suspected >= SUSPECT_LIMIT for item in items),
            )
            self._flying[bundle.id] = bundle
            self._flying_in[pool] += 1
            future = app(bundle)
            future.add_done_callback(lambda done, b=bundle: self._done.put((b, done)))

    def _absorb(self) -> None:
        """Take in finished bundles; wait a moment for the first one."""
        from parsl.executors.high_throughput.errors import ManagerLost

        try:
            # All that could be submitted was: only a finished bundle or a new chunk changes that.
            bundle, future = self._done.get(timeout=_TICK_S if self._flying else 0.0)
            while True:
                self._flying.pop(bundle.id)
                self._flying_in[bundle.stage.pool] -= 1
                error = future.exception()
                if error is None:
                    self._settle(bundle, future.result())
                elif isinstance(error, ManagerLost):
                    self._unexplained.append(_Loss(bundle, error, time.monotonic()))
                else:
                    self._recover(bundle, error)
                bundle, future = self._done.get_nowait()
        except queue.Empty:
            pass

    def _settle(self, bundle: Bundle, receipt: Receipt) -> None:
        status = np.frombuffer(receipt.status, np.uint8)
        where = np.frombuffer(receipt.shard, np.uint16)
        cpu = np.frombuffer(receipt.cpu_s, np.float32)
        wall = np.frombuffer(receipt.wall_s, np.float32)
        pool = bundle.stage.pool
        self._forgiven_blocks[pool] = self._failed_blocks.get(pool, 0)
        stage = bundle.stage.index
        self._core_s += float(cpu.sum())
        self._shards += len(receipt.shards)
        if receipt.first_start:
            self._first_start = min(self._first_start or np.inf, receipt.first_start)
        ok = status == 0
        estimate = self.stream.estimates[stage]
        sizes = [estimate.size(item.n_atoms, item.smiles) for item in bundle.items]
        estimate.learn(np.array(sizes, np.int64)[ok], wall[ok])
        self.fleet.seen(bundle.stage.pool, receipt.manager, receipt.node)
        bad = receipt.node in self.nodes.bad
        for i, (item, code) in enumerate(zip(bundle.items, status.tolist(), strict=True)):
            if code == NOT_STARTED or (bad and code in _NODE_CLASSES):
                self.stream.push(stage, item)
            elif code == TOO_LONG:
                self._defer(stage, item)
            elif code == CUT_OFF:
                self._cut_off(bundle.stage_of(item), item)
            elif code == NO_PARENT:
                self._orphans.append((stage, item))
            else:
                if code in _NODE_CLASSES:
                    self._suspect(receipt.node, stage, item, code)
                self._finish(stage, item, code, receipt.shards[where[i]])
        if receipt.first_start:
            self._worked.add((pool, receipt.block))
        failed = int(np.isin(status, list(_NODE_CLASSES)).sum())
        why = self.nodes.add(pool, bundle.stage.name, receipt.node, int(ok.sum()), failed)
        if why:
            self._set_node_aside(receipt.node, why)
        if receipt.broken:
            self._broken(pool, receipt.node, receipt.broken)

    def _finish(self, stage: int, item: Item, code: int, path: str) -> None:
        self._done_now += 1
        if code:
            self._classes[code] += 1
        self.stream.finished(stage, item, code == 0, path)

    # -- nodes ------------------------------------------------------------------------------

    def _suspect(self, node: str, stage: int, item: Item, code: int) -> None:
        """Remember what failed where, in case it is the node's fault."""
        self._suspects[item.key] = (node, stage, item, code)
        if len(self._suspects) > SUSPECTS:
            self._suspects.popitem(last=False)

    def _broken(self, pool: str, node: str, words: str) -> None:
        """Take in that nothing can run on a node; end the run where there is no other."""
        enough = self.nodes.broken(pool, node)
        if node in self.nodes.bad:
            return
        if enough:
            self._set_node_aside(node, words)
            return
        times = self.nodes.times_broken(node)
        if self.nodes.works_elsewhere(pool, node) or times < BROKEN_LIMIT:
            return
        can_avoid = hasattr(self._executors[pool].provider, "exclude_nodes")
        others = self.site.nodes().get(pool, 1) > 1 and can_avoid
        if others and self.nodes.broken_nodes() < BLOCK_FAILURE_LIMIT:
            self._set_node_aside(node, words)
            return
        raise RunError(words)

    def _judge_short_lived(self) -> None:
        """Count blocks that ended at once against their nodes."""
        while True:
            try:
                pool, node, words = self._short_lived.get_nowait()
            except queue.Empty:
                return
            if node not in self.nodes.bad and self.nodes.broken(pool, node):
                self._set_node_aside(node, f"blocks end there as soon as they begin: {words}")

    def _set_node_aside(self, node: str, why: str) -> None:
        """Use a node no more, and compute elsewhere what failed on it."""
        self.nodes.bad[node] = why
        for executor in self._executors.values():
            if hasattr(executor.provider, "exclude_nodes"):
                executor.provider.exclude_nodes({node})
        again = [found for found in self._suspects.values() if found[0] == node]
        for _, stage, item, code in again:
            del self._suspects[item.key]
            self._classes[code] -= 1
            self._done_now -= 1
            self.stream.reopen(stage, item)
        more = f"; {len(again)} items are computed again elsewhere" if again else ""
        self.notes.add(f"node {node} is set aside: {why}{more}")

    # -- losses -----------------------------------------------------------------------------

    def _explain_losses(self) -> None:
        """Take back what lost worker pools had, as soon as it is known why they were lost."""
        by_manager: dict[str, list[_Loss]] = {}
        for loss in self._unexplained:
            by_manager.setdefault(loss.error.manager_id.decode(), []).append(loss)
        self._unexplained = []
        now = time.monotonic()
        for manager, losses in by_manager.items():
            pool, host = losses[0].bundle.stage.pool, losses[0].error.hostname
            age = now - min(loss.since for loss in losses)
            waited = float("inf") if self.draining else age
            verdict = self.fleet.verdict(pool, manager, host, waited)
            if verdict is None or (not verdict.blameless and age < TOGETHER_S):
                self._unexplained += losses
            elif verdict.blameless:
                for loss in losses:
                    self._take_back(loss.bundle, verdict)
            else:
                self._look_for_culprit(losses, verdict)

    def _take_back(self, bundle: Bundle, verdict: fleet.Verdict) -> None:
        """Send again, uncharged, what the end of a block took away."""
        rest = self._unsealed(bundle)
        ran = under_way.take(self.store.path, self.run_id, bundle.id)
        if verdict.walltime and ran is not None:
            for item in rest:
                if item.key in ran.keys and not self._came_further(item, ran.since_s):
                    self._cut_off(bundle.stage_of(item), item)
                elif item.key in ran.keys:
                    self.stream.push(bundle.stage_of(item).index, item)
            rest = [item for item in rest if item.key not in ran.keys]
        if rest:
            self.stream.again.append((bundle.stage.index, rest))
        self._note_loss(verdict, len(bundle.items), "none charged")

    def _came_further(self, item: Item, since_s: float) -> bool:
        try:
            return checkpoint_path(self.store.path, item.key).stat().st_mtime > since_s
        except OSError:
            return False

    def _look_for_culprit(self, losses: list[_Loss], verdict: fleet.Verdict) -> None:
        """Judge what was lost with one worker pool, for no reason that excuses it.

        Only who ran there alone is to blame for certain. Otherwise all come under suspicion, and
        who has been there too often is sent to run alone.
        """
        found = [under_way.take(self.store.path, self.run_id, x.bundle.id) for x in losses]
        alone = [x for x, ran in zip(losses, found, strict=True) if ran is not None and ran.alone]
        if len(losses) == 1:
            alone = losses
        for loss in losses:
            if loss in alone:
                self._recover(loss.bundle, loss.error, verdict)
                continue
            rest = self._unsealed(loss.bundle)
            charged = "none charged: another ran alone"
            if not alone:
                rest = [item._replace(suspected=item.suspected + 1) for item in rest]
                charged = "in halves, to find one that is to blame"
            self._note_loss(self._named(loss.error, verdict), len(loss.bundle.items), charged)
            parts = [rest] if alone else [rest[: len(rest) // 2], rest[len(rest) // 2 :]]
            self.stream.again += [(loss.bundle.stage.index, part) for part in parts if part]

    def _cut_off(self, stage: StagePlan, item: Item) -> None:
        """Count an end of a block that left nothing of an item; not for ever."""
        item = item._replace(cuts=item.cuts + 1)
        if item.cuts < CUT_LIMIT:
            self.stream.push(stage.index, item)
            return
        words = (
            f"the end of its block broke it off {item.cuts} times, with nothing saved: give pool "
            f"{stage.pool!r} a longer walltime, or choose a cheaper level for molecules like this"
        )
        self._set_aside(stage, item, "timeout", words, 1)

    def _note_loss(self, verdict: fleet.Verdict, items: int, charged: str) -> None:
        self._lost += 1
        self._loss_items[verdict.event] += items
        if len(self._loss_items) > NOTES:
            del self._loss_items[next(iter(self._loss_items))]
        count = self._loss_items[verdict.event]
        self.notes.add(f"{verdict.words}: {count} items sent again, {charged}", verdict.event)

    def _recover(
        self, bundle: Bundle, error: BaseException, verdict: fleet.Verdict | None = None
    ) -> None:
        """Take in what a lost worker had sealed, and send the rest again."""
        from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost

        if not isinstance(error, ManagerLost | WorkerLost):
            if isinstance(error, BasinError):
                raise error
            self._check_executors()
            raise RunError(
                f"a worker could not run a bundle of stage {bundle.stage.name!r}: "
                f"{type(error).__name__}: {error}; logs are in {self.store.path / 'logs'}"
            ) from error
        verdict = self._named(error, verdict)
        self._note_loss(verdict, len(bundle.items), "in halves, to find one that is to blame")
        rest = self._unsealed(bundle)
        stage = bundle.stage.index
        if len(rest) == 1:
            item = rest[0]._replace(losses=rest[0].losses + 1)
            if item.losses >= LOSS_LIMIT:
                words = (
                    f"its worker was lost {item.losses} times while it ran alone "
                    f"({verdict.words}; {error})"
                )
                self._set_aside(bundle.stage_of(item), item, "lost", words, item.losses)
            else:
                self.stream.again.append((stage, [item]))
        elif rest:
            # One of them may be what took the worker down: halves find it, and only it pays.
            half = len(rest) // 2
            self.stream.again.append((stage, rest[:half]))
            self.stream.again.append((stage, rest[half:]))

    @staticmethod
    def _named(error: Any, verdict: fleet.Verdict | None) -> fleet.Verdict:
        """Return a verdict that has words, also where the scheduler knows of no fault."""
        from parsl.executors.high_throughput.errors import WorkerLost

        if verdict is not None and verdict.words:
            return verdict
        what = "workers" if isinstance(error, WorkerLost) else "worker pools"
        event = f"{type(error).__name__} {error.hostname}"
        return fleet.Verdict(False, f"lost {what} on {error.hostname}", event)

    def _unsealed(self, bundle: Bundle) -> list[Item]:
        """Take in what a lost worker had sealed; return the rest."""
        found = self._sealed(bundle)
        rest: list[Item] = []
        for item in bundle.items:
            if item.key in found:
                status, path = found[item.key]
                self._finish(bundle.stage.index, item, STATUSES.index(status), path)
            else:
                rest.append(item)
        return rest

    def _sealed(self, bundle: Bundle) -> dict[bytes, tuple[str, str]]:
        found: dict[bytes, tuple[str, str]] = {}
        folder = self.store.path / "inbox" / self.run_id
        for path in sorted(folder.glob(f"{bundle.id}-*.h5")):
            with contextlib.suppress(CorruptShardError), shard.open_shard(path) as file:
                rows = file.read("tasks", ["key", "status"])
                keys = rows["key"].astype(">u8").tobytes()
                for i, status in enumerate(rows["status"].strings()):
                    found[keys[16 * i : 16 * i + 16]] = (status, str(path))
        return found

    def _set_aside(
        self, stage: StagePlan, item: Item, status: str, message: str, attempts: int
    ) -> None:
        record = task_record(
            item,
            stage,
            status=status,
            message=message,
            attempts=attempts,
            started_s=time.time(),
        )
        folder = self.store.path / "inbox" / self.run_id
        shard.seal(
            folder, f"aside-{item.key.hex()}", [from_records("tasks", [record])], self.store.name
        )
        self._finish(stage.index, item, STATUSES.index(status), "")

    # -- watching ---------------------------------------------------------------------------

    def _check_reader(self) -> None:
        if self._reader is not None and self._reader.poll() is not None:
            reader, self._reader = self._reader, None
            self._wait_process(reader, "reading the molecule files")

    def _check_executors(self) -> None:
        for executor in self._executors.values():
            interchange: Any = getattr(executor, "interchange_proc", None)
            client: Any = getattr(executor, "command_client", None)
            if interchange is not None and (interchange.poll() is not None or not client.ok):
                raise RunError(
                    f"pool {executor.label!r} of site {self.site.name!r}: Parsl's interchange "
                    f"ended or hangs (exit status {interchange.poll()}); logs are in "
                    f"{self.store.path / 'logs' / self.run_id}; start the same command again"
                )
            if getattr(executor, "bad_state_is_set", False):
                raise RunError(
                    f"pool {executor.label!r} of site {self.site.name!r} broke down: "
                    f"{getattr(executor, 'executor_exception', '')}; logs are in "
                    f"{self.store.path / 'logs' / self.run_id}; start the same command again"
                )

    def _maybe_compact(self) -> None:
        if self._compactor is not None and self._compactor.poll() is not None:
            process, self._compactor = self._compactor, None
            self._wait_process(process, "compaction")
        due = self._shards >= COMPACT_SHARDS or (
            self._shards > 0 and time.monotonic() - self._compacted > COMPACT_EVERY_S
        )
        if due and self._compactor is None:
            self._compactor = self._compact()

    def _compact(self) -> subprocess.Popen[bytes]:
        self._shards = 0
        self._compacted = time.monotonic()
        return self._python("orchestrator.compact", self.store.path)

    @staticmethod
    def _stop_process(process: subprocess.Popen[bytes] | None) -> None:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()

    def _wait_process(self, process: subprocess.Popen[bytes], what: str) -> None:
        process.wait()
        with self._said.pop(process.pid) as said:
            said.seek(max(0, said.seek(0, os.SEEK_END) - _TAIL_BYTES))
            error = said.read()
        if process.returncode:
            lines = error.decode(errors="replace").strip().splitlines() or ["no message"]
            kinds = {kind.exit_code: kind for kind in (CampaignError, StoreError)}
            raise kinds.get(process.returncode, RunError)(f"{what} failed: {lines[-1]}")

    # -- telling ----------------------------------------------------------------------------

    def counts(self) -> list[StageCounts]:
        """Return how the planned tasks stand, stage by stage."""
        s = self.stream
        return [
            StageCounts(
                stage=stage.name,
                planned=s.planned(i),
                ok=s.ok[i],
                failed=s.failed[i],
                upstream=s.upstream[i],
                waiting=s.planned(i) - s.ok[i] - s.failed[i] - s.upstream[i],
            )
            for i, stage in enumerate(self.plan.stages)
        ]

    def _progress(self, workers: dict[str, int]) -> Progress:
        elapsed = time.monotonic() - self._started
        counts = self.counts()
        total = sum(workers.values())
        waiting_s = sum(c.waiting * self.stream.mean_s(s) for s, c in enumerate(counts))
        return Progress(
            campaign=self.store.name,
            stages=counts,
            complete_plan=self.stream.plan_complete,
            entries=self.stream.entries,
            bad_entries=self.stream.bad_entries,
            elapsed_s=elapsed,
            done_now=self._done_now,
            rate=self._done_now / elapsed if elapsed else 0.0,
            left_s=waiting_s / total if self._done_now and self.stream.plan_complete else None,
            core_s=self._core_s,
            in_flight=len(self._flying),
            draining=self.draining,
            notes=[
                *self.notes.lines()[-3:],
                *([self._training_words] if self._training_words else []),
            ],
        )

    def _summary(self) -> Summary:
        counts = self.counts()
        now = time.time()
        return Summary(
            complete=self.stream.exhausted
            and all(c.waiting == 0 for c in counts)
            and self._trained,
            counts=counts,
            entries=self.stream.entries,
            bad_entries=self.stream.bad_entries,
            done_before=self.stream.ok_before,
            done_now=self._done_now,
            elapsed_s=time.monotonic() - self._started,
            work_s=now - self._first_start if self._first_start else 0.0,
            core_s=self._core_s,
            workers=sum(self.site.pools().values()),
            lost_bundles=self._lost,
            notes=self.notes.lines(),
            node_hours=self.fleet.node_hours(),
            bad_nodes=dict(self.nodes.bad),
        )

    def _write_progress(self, *, ended: bool = False) -> None:
        self._written = time.monotonic()
        elapsed = time.monotonic() - self._started
        counts = self.counts()
        classes = self.stream.failures + self._classes
        failures = {STATUSES[code]: count for code, count in classes.items() if count > 0}
        if self.stream.bad_entries:
            failures["input"] = failures.get("input", 0) + self.stream.bad_entries
        path = self.site.name.endswith((".py", ".toml"))
        progress.write(
            self.store.path,
            progress.ProgressFile(
                run_id=self.run_id,
                site=os.path.abspath(self.site.name) if path else self.site.name,
                time_s=time.time(),
                digest=self._digest,
                plan=plan_digest(self.plan),
                plan_complete=self.stream.plan_complete,
                entries=self.stream.entries,
                bad_entries=self.stream.bad_entries,
                stages=counts,
                failures=failures,
                blocks=self.fleet.blocks(),
                bad_nodes=dict(self.nodes.bad),
                node_hours=self.fleet.node_hours(),
                rate=self._done_now / elapsed if elapsed else 0.0,
                left_s=self._progress(self.site.pools()).left_s,
                workers=sum(self.fleet.connected.values()),
                draining=self.draining,
                notes=self.notes.lines(),
                complete=self.stream.exhausted
                and all(c.waiting == 0 for c in counts)
                and self._trained,
                ended=ended,
            ),
        )

    def _last_word(self) -> None:
        """Leave behind how it ended, also where that was an error; it must not hide another."""
        # Another driver that has taken the store meanwhile tells of itself.
        own = lock.who(self.store.path).get("run_id", self.run_id) == self.run_id
        if own and hasattr(self, "stream"):
            with contextlib.suppress(Exception):
                self._write_progress(ended=True)
