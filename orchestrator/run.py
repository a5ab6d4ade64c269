"""The driver: plan -> bounded stream -> Parsl -> receipts -> compaction; resume is the same."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator import block, ingest, shard
from orchestrator.campaign import Campaign
from orchestrator.columns import from_records
from orchestrator.counts import StageCounts
from orchestrator.errors import (
    BasinError,
    CampaignError,
    CorruptShardError,
    RunError,
    StoreError,
)
from orchestrator.forecast import learned_estimates
from orchestrator.interchange import DRIVER_PID
from orchestrator.key_index import KeyIndex
from orchestrator.lock import DriverLock
from orchestrator.molecules import find_files, sources_digest
from orchestrator.plan import Item, Plan, StagePlan
from orchestrator.schema import STATUSES
from orchestrator.sites import Site, prepare
from orchestrator.store import Store
from orchestrator.stream import Stream
from orchestrator.train_stage import TrainJob, TrainReceipt, drive, run_training
from orchestrator.worker import NO_PARENT, NOT_STARTED, Bundle, Receipt, run_bundle, task_record

if TYPE_CHECKING:
    from concurrent.futures import Future

BACKLOG_ITEMS = 8192
COMPACT_SHARDS = 256
COMPACT_EVERY_S = 120.0
ANSWER_LIMIT_S = 30.0
LOSS_LIMIT = 2
PARENT_LOOKS = 3
BLOCK_FAILURE_LIMIT = 3
_TICK_S = 0.2
_LOOK_EVERY_S = 2.0


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
        self._forget_nodes = forget_nodes
        self._told = False
        self._training: Callable[[TrainJob], Future[TrainReceipt]] | None = None
        self._training_words = ""
        self._trained = campaign.train is None
        self._interrupts = 0
        self._done: queue.SimpleQueue[tuple[Bundle, Future[Receipt]]] = queue.SimpleQueue()
        self._flying: dict[str, Bundle] = {}
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
        self._failed_blocks: dict[str, int] = {}
        self._forgiven_blocks: dict[str, int] = {}
        self.notes: list[str] = []

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
                digest = sources_digest(files, self.campaign.molecules)
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
                    self.stream = Stream(self.plan, folder, index, estimates)
                    self._loop(lock, apps)
                    self._train(lock)
                self._stop_process(self._compactor)
                self._compactor = None
                self._wait_process(self._compact(), "compaction")
                return self._summary()
        finally:
            for process in (self._reader, self._compactor):
                if process is not None and process.poll() is None:
                    process.kill()
                    process.wait()
            lock.release()

    # -- set-up -----------------------------------------------------------------------------

    @staticmethod
    def _python(module: str, *arguments: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A Ctrl-C at the terminal is for the driver, which then ends these in good order.
            process_group=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE"},
        )

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
        self._tolerate_lost_blocks()
        try:
            kernel = parsl.load(self.site.config)
        except Exception as exc:
            raise RunError(f"site {self.site.name!r} could not be started: {exc}") from exc
        try:
            pools = self.campaign.pools
            self._executors = {pool: kernel.executors[pool] for pool in pools}
            for executor in self._executors.values():
                if (client := getattr(executor, "command_client", None)) is not None:
                    # Parsl would wait for ever for the answer of an interchange that died.
                    client.run = functools.partial(client.run, timeout_s=ANSWER_LIMIT_S)

            def app(function: Callable[..., Any], pool: str) -> Any:
                return parsl.python_app(
                    function, data_flow_kernel=kernel, executors=[pool], cache=False
                )

            if self.campaign.train is not None:
                self._training = app(run_training, self.campaign.train.pool)
            yield {pool: app(run_bundle, pool) for pool in {s.pool for s in self.plan.stages}}
        finally:
            with contextlib.suppress(Exception):
                kernel.cleanup()
            parsl.clear()

    def _tolerate_lost_blocks(self) -> None:
        """Let a pool break down only when several blocks in a row fail with nothing done between.

        Parsl's own rule would end the run with the first block that is lost.
        """
        from parsl.jobs.error_handlers import simple_error_handler
        from parsl.jobs.errors import TooManyJobFailuresError
        from parsl.jobs.states import JobState

        def judge(executor: Any, blocks: dict[str, Any]) -> None:
            bad = (JobState.FAILED, JobState.MISSING)
            failed = [block for block in blocks.values() if block.state in bad]
            self._failed_blocks[executor.label] = len(failed)
            if len(failed) - self._forgiven_blocks.get(executor.label, 0) >= BLOCK_FAILURE_LIMIT:
                last = failed[-1]
                words = (last.stderr_summary or last.message or "no message").strip()
                executor.set_bad_state_and_fail_all(
                    TooManyJobFailuresError(
                        f"{BLOCK_FAILURE_LIMIT} blocks in a row failed, the last with exit status "
                        f"{last.exit_code}: {words}"
                    )
                )

        executors: list[Any] = list(self.site.config.executors)
        for executor in executors:
            if getattr(executor, "block_error_handler", None) is simple_error_handler:
                executor.block_error_handler = judge

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
        receipt = drive(self._training, job, tick)
        self._training_words = ""
        self._trained = receipt.finished
        self.notes.append(f"{receipt.words}; {receipt.output}")

    def _loop(self, lock: DriverLock, apps: dict[str, Any]) -> None:
        workers = self.site.pools()
        while True:
            self._beat(lock)
            self._absorb()
            self._check_reader()
            if not self.draining:
                self._refill()
                for pool, app in apps.items():
                    self._submit(pool, app, workers[pool])
            self._check_executors()
            self._maybe_compact()
            self.show(self._progress(workers))
            if not self._flying and (self.draining or self._finished()):
                return
            if not self._flying:
                time.sleep(0.05)

    def _finished(self) -> bool:
        """Whether nothing is left to submit, once nothing is under way."""
        if not self.stream.exhausted or self.stream.backlog():
            return False
        if not self._orphans:
            return True
        if self._parent_looks == PARENT_LOOKS:
            self.notes.append(
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
        while self.stream.backlog() < BACKLOG_ITEMS and self.stream.pull():
            pass
        if time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._looked = time.monotonic()
            self.stream.look()

    def _submit(self, pool: str, app: Any, workers: int) -> None:
        limit = workers * self.campaign.run.window
        flying = sum(1 for bundle in self._flying.values() if bundle.stage.pool == pool)
        while flying < limit:
            taken = self.stream.take(pool, self.campaign.run.bundle_time, workers)
            if taken is None:
                return
            stage, items = taken
            self._serial += 1
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
            )
            self._flying[bundle.id] = bundle
            future = app(bundle)
            future.add_done_callback(lambda done, b=bundle: self._done.put((b, done)))
            flying += 1

    def _absorb(self) -> None:
        """Take in finished bundles; wait a moment for the first one."""
        try:
            # All that could be submitted was: only a finished bundle or a new chunk changes that.
            bundle, future = self._done.get(timeout=_TICK_S if self._flying else 0.0)
            while True:
                self._flying.pop(bundle.id)
                error = future.exception()
                if error is None:
                    self._settle(bundle, future.result())
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
        atoms = np.array([item.n_atoms for item in bundle.items], np.int64)
        self.stream.estimates[stage].learn(atoms[ok], wall[ok])
        for i, (item, code) in enumerate(zip(bundle.items, status.tolist(), strict=True)):
            if code == NOT_STARTED:
                self.stream.push(stage, item)
            elif code == NO_PARENT:
                self._orphans.append((stage, item))
            else:
                self._done_now += 1
                self.stream.finished(stage, item, code == 0, receipt.shards[where[i]])

    def _recover(self, bundle: Bundle, error: BaseException) -> None:
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
        self._lost += 1
        self.notes.append(f"{type(error).__name__}: {len(bundle.items)} items sent again")
        found = self._sealed(bundle)
        stage = bundle.stage.index
        rest: list[Item] = []
        for item in bundle.items:
            if item.key in found:
                status, path = found[item.key]
                self._done_now += 1
                self.stream.finished(stage, item, status == "ok", path)
            else:
                rest.append(item)
        if len(rest) == 1:
            item = rest[0]._replace(losses=rest[0].losses + 1)
            if item.losses >= LOSS_LIMIT:
                self._set_aside(bundle.stage, item, error)
            else:
                self.stream.again.append((stage, [item]))
        elif rest:
            # One of them may be what took the worker down: halves find it, and only it pays.
            half = len(rest) // 2
            self.stream.again.append((stage, rest[:half]))
            self.stream.again.append((stage, rest[half:]))

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

    def _set_aside(self, stage: StagePlan, item: Item, error: BaseException) -> None:
        record = task_record(
            item,
            stage,
            status="lost",
            message=f"its worker was lost {item.losses} times while it ran alone ({error})",
            attempts=item.losses,
            started_s=time.time(),
        )
        folder = self.store.path / "inbox" / self.run_id
        shard.seal(
            folder, f"aside-{item.key.hex()}", [from_records("tasks", [record])], self.store.name
        )
        self._done_now += 1
        self.stream.finished(stage.index, item, False, "")

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

    @staticmethod
    def _wait_process(process: subprocess.Popen[bytes], what: str) -> None:
        _, error = process.communicate()
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
        estimates = self.stream.estimates
        waiting_s = sum(c.waiting * e.mean_s for c, e in zip(counts, estimates, strict=True))
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
            notes=[*self.notes[-3:], *([self._training_words] if self._training_words else [])],
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
            notes=self.notes,
        )
