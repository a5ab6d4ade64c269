"""The training of a campaign: one task on its pool, once all that it learns from is there.

It lies in `training/NAME-KEY` of the store, KEY standing for the data, the model and whatever else
would make it another training; so a run that goes on with the same campaign goes on with the same
training, and new data begin a new one. The finished training is a row of `tasks`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orchestrator import child, shard
from orchestrator.columns import from_records, key_words
from orchestrator.errors import RunError
from orchestrator.plan import NO_KEY, Item, StagePlan, canonical
from orchestrator.schema import STATUSES
from orchestrator.worker import Control, task_record

if TYPE_CHECKING:
    from concurrent.futures import Future

    from orchestrator.train import TrainProgress
    from orchestrator.train_file import TrainFile

VERSION: Final = 1
STAGE: Final = "train"
# Lost workers in a row between which the training came no further.
LOSS_LIMIT: Final = 3

_SAY_EVERY_S: Final = 1.0
_TICK_S: Final = 0.2
_PATIENCE_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What a worker needs to know of a training."""

    file: str
    store: str
    campaign: str
    run_id: str


@dataclass(slots=True)
class TrainReceipt:
    """What became of a training; ``message`` is empty unless it failed."""

    finished: bool
    output: str
    words: str
    message: str = ""


def word_path(store: Path) -> Path:
    """The file in which a training says how it stands."""
    return store / "control" / "training.json"


def said(store: Path) -> dict[str, Any]:
    """What the present or last training of a store says of itself; may be empty."""
    try:
        word: dict[str, Any] = json.loads(word_path(store).read_text())
    except (OSError, ValueError):
        return {}
    return word


# In the worker


def run_training(job: TrainJob, **resources: object) -> TrainReceipt:
    """Train, or go on with it, in a Parsl worker; what it can say of an error is in the receipt.

    resources: what it asked of its executor, which Parsl hands on to what it calls; unused.
    """
    from kernels.errors import KernelError
    from orchestrator.errors import BasinError, StoreLockedError
    from orchestrator.show import training_line
    from orchestrator.train import train
    from orchestrator.train_file import load_training

    if "PARSL_WORKER_RANK" in os.environ:
        # Else it would go on for hours, unseen, after its manager's end.
        child.die_with_parent()
    store = Path(job.store)
    control = Control(store, job.run_id)
    last = 0.0

    def show(progress: TrainProgress) -> None:
        nonlocal last
        if time.monotonic() - last > _SAY_EVERY_S:
            last = time.monotonic()
            word = {"line": training_line(progress), **asdict(progress)}
            shard.write_whole(word_path(store), json.dumps(word).encode())

    try:
        file = load_training(Path(job.file))
        key, folder = _keys(file)
        output = store / "training" / f"{file.name}-{folder}"
        started, cpu = time.time(), time.process_time()
        place = file.model_copy(update={"output": output})
        while True:
            try:
                summary = train(place, show=show, stop=control.should_stop)
                break
            except StoreLockedError:
                # The worker of a driver that died stops when it hears of another one.
                if time.time() - started > _PATIENCE_S:
                    raise
                time.sleep(1.0)
        if summary.finished:
            _seal(job, key, file, started, time.process_time() - cpu)
    except (BasinError, KernelError) as exc:
        return TrainReceipt(False, "", "", str(exc))
    words = (
        f"{summary.name}: {summary.step:,} steps, {summary.epoch:.1f} epochs; best validation loss "
        f"{summary.best['validation']:.4g} at step {summary.best['step']:,.0f}"
    )
    state = "finished" if summary.finished else "stopped before its end"
    word = {"line": f"{words}; {state}", "step": summary.step}
    shard.write_whole(word_path(store), json.dumps(word).encode())
    return TrainReceipt(summary.finished, str(output), words)


def _keys(file: TrainFile) -> tuple[bytes, str]:
    """The key of the training's result, and the name of its folder."""
    from kernels.diffusion import model_files
    from kernels.diffusion.training import FIXED_SETTINGS
    from orchestrator.training_data import read_data

    # Geometries alone: what an objective needs beside them follows from them, and may take long.
    _, _, summary = read_data(file.data, file.path.parent, file.elements)
    settings = asdict(file.settings())
    source = None
    if file.first_weights is not None:
        source = model_files.digest(model_files.find(file.first_weights))
    same = {
        "kernel": STAGE,
        "version": VERSION,
        "config": file.model.model_dump(mode="json"),
        "data": summary.digest,
        "init_from": source,
        "settings": {name: settings[name] for name in FIXED_SETTINGS},
    }
    key = hashlib.sha256(canonical({**same, "settings": settings})).digest()[:16]
    return key, hashlib.sha256(canonical(same)).hexdigest()[:12]


def _seal(job: TrainJob, key: bytes, file: TrainFile, started_s: float, cpu_s: float) -> None:
    """Put the finished training into the store's tasks, once."""
    import torch

    from orchestrator.store import Store

    store = Store(job.store)
    if store.snapshot().task_index().get(*key_words(key)) == STATUSES.index("ok"):
        return
    item = Item(key, NO_KEY, NO_KEY, 0, "", 0, 0, 0)
    stage = StagePlan(
        index=-1, name=STAGE, kernel=STAGE, settings={}, digest=b"", parent=-1, conformers=1,
        label=f"{STAGE} {VERSION} (torch {torch.__version__})", pool="", time_limit=0.0,
        memory_limit=0,
    )  # fmt: skip
    record = task_record(item, stage, status="ok", message="", attempts=1, started_s=started_s)
    record.update(
        host=socket.gethostname(),
        worker_pid=os.getpid(),
        wall_s=time.time() - started_s,
        cpu_s=cpu_s,
        seed=file.settings().seed,
    )
    folder = store.path / "inbox" / job.run_id
    shard.seal(folder, f"train-{key.hex()}", [from_records("tasks", [record])], job.campaign)


# In the driver


def drive(
    submit: Callable[[TrainJob], Future[TrainReceipt]],
    job: TrainJob,
    tick: Callable[[str], None],
) -> TrainReceipt:
    """Have the training done by whatever worker there is, and say by ``tick`` how it stands.

    A lost worker's training goes on with another one. Raises RunError where it fails.
    """
    from concurrent.futures import wait

    from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost

    store = Path(job.store)
    word_path(store).unlink(missing_ok=True)  # an earlier training's
    losses, reached = 0, -1
    while True:
        future = submit(job)
        while not wait([future], timeout=_TICK_S).done:
            tick(str(said(store).get("line", "training begins")))
        error = future.exception()
        if error is None:
            receipt = future.result()
            if receipt.message:
                raise RunError(f"the training failed: {receipt.message}")
            return receipt
        if not isinstance(error, ManagerLost | WorkerLost):
            raise RunError(f"a worker could not train: {type(error).__name__}: {error}") from error
        step = int(said(store).get("step", 0))
        losses = 1 if step > reached else losses + 1
        reached = max(step, reached)
        if losses >= LOSS_LIMIT:
            raise RunError(
                f"the training lost its worker {losses} times at step {step:,} ({error}); logs are "
                f"in {store / 'logs' / job.run_id}"
            )
