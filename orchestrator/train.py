"""A training from its file to its checkpoints: starts it, or goes on with it.

Everything lies in the output folder: `state.pt` (all that is needed to go on), `best.safetensors`
(the average weights of the best validation so far), `NAME-step-000123.safetensors` (kept along
the way), `history.csv`, `report.html` and `NAME.md`, the model card. With several devices the
command starts one process for each and only watches over them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kernels.errors import InputError, KernelError, NotFiniteError
from orchestrator.child import die_with_parent
from orchestrator.csv_file import write_csv
from orchestrator.errors import CampaignError, RunError
from orchestrator.lock import DriverLock, named
from orchestrator.train_file import TrainFile

if TYPE_CHECKING:
    from kernels.diffusion.training import TrainingSet, TrainState

_RATE_OVER_S: Final = 30.0
_WATCH_EVERY_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """How a training stands; losses are NaN as long as there is none."""

    name: str
    epoch: float
    epochs: int | None
    step: int
    loss: float
    validation: float
    best: float
    molecules_per_s: float
    elapsed_s: float
    left_s: float | None
    learning_rate: float


@dataclass(slots=True)
class TrainSummary:
    """What a run of the command came to."""

    name: str
    output: str
    finished: bool
    resumed_at: int
    step: int
    epoch: float
    elapsed_s: float
    validation: float
    best: dict[str, float]
    checkpoints: list[str] = field(default_factory=list)
    report: str = ""
    card: str = ""


class _TrainingLock(DriverLock):
    """Holds an output folder for one training."""

    @staticmethod
    def _refusal(store: Path, holder: dict[str, Any]) -> str:
        return (
            f"{store}: another `basin train` is working in this folder ({named(holder)}); stop it "
            "with Ctrl-C there before starting another, or write another output in the training "
            "file"
        )


def state_path(output: Path) -> Path:
    """The file that a training goes on from."""
    return output / "state.pt"


def best_path(output: Path) -> Path:
    """The checkpoint of the best validation so far."""
    return output / "best.safetensors"


def train(
    file: TrainFile,
    *,
    max_time_s: float | None = None,
    show: Callable[[TrainProgress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainSummary:
    """Train as the file says, from the beginning or from where the last run stopped.

    ``max_time_s`` ends this run, to be gone on with; ``stop`` is asked at every step. Raises
    CampaignError where the file or its data cannot be used, StoreLockedError where another
    training works in the output folder, RunError where the loss is not finite any more.
    """
    output = file.output
    try:
        (output / "control").mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CampaignError(
            f"{output}: cannot make the output folder: {exc.strerror}; choose another with "
            "output = ... in the training file"
        ) from exc
    lock = _TrainingLock(output, f"train-{os.getpid()}")
    try:
        devices = file.run.devices
        if devices == 1:
            return _process(file, max_time_s, show, stop, lock.beat)
        return _several(file, max_time_s, show, stop, lock.beat)
    finally:
        lock.release()


def _process(
    file: TrainFile,
    max_time_s: float | None,
    show: Callable[[TrainProgress], None] | None,
    stop: Callable[[], bool],
    beat: Callable[[], None],
    rank: int = 0,
) -> TrainSummary:
    try:
        return _Run(file, rank).go(max_time_s, show, stop, beat)
    except NotFiniteError as exc:
        raise RunError(
            f"{exc}. The last good state is kept in {file.output}; the same command goes on from it"
        ) from None
    except InputError as exc:
        raise CampaignError(f"{file.path}: {exc}") from None
    except KernelError as exc:
        raise RunError(f"{file.path}: {exc}") from None


# One process of a training


class _Run:
    """One process's part in a training; the first one (rank 0) does all the writing."""

    def __init__(self, file: TrainFile, rank: int) -> None:
        import torch

        from kernels.diffusion import training
        from orchestrator.training_data import read_data

        self.file = file
        self.rank = rank
        self.settings = file.settings()
        if file.run.threads is not None or file.run.devices > 1:
            share = max(1, (os.cpu_count() or 1) // file.run.devices)
            torch.set_num_threads(file.run.threads or share)
        self.device = _device(file, rank)
        try:
            data, judged, self.summary = read_data(
                file.data,
                file.path.parent,
                file.elements,
                training.NEEDS[self.settings.objective],
            )
        except CampaignError as exc:
            raise CampaignError(f"{file.path}: {exc}") from None
        sizes = {n: len(group["numbers"]) for n, group in data.groups.items()}
        self.config = file.config(self.summary.elements, sizes)
        if data.nbytes < _KEPT_ON_DEVICE:
            data.to(self.device)
            judged.to(self.device)
        self.data: TrainingSet = data
        self.judged: TrainingSet = judged
        steps = data.steps(self.settings.batch, self.settings.pieces)
        self.resumed_at = -1
        self.source: dict[str, str] = {}
        path = state_path(file.output)
        if path.exists():
            self.state, about = training.state_from_file(
                path, self.config, self.settings, steps, device=self.device
            )
            if about["data"] != self.summary.digest:
                raise InputError(
                    f"{path}: this training was begun with other data; write another output, or "
                    "remove the folder"
                )
            self.resumed_at = self.state.step
            self.source = about["init_from"]
        else:
            self.state = self._begin(steps)

    def _begin(self, steps: int) -> TrainState:
        from kernels.diffusion import training

        weights = None
        if self.file.first_weights is not None:
            from kernels.diffusion import checkpoint

            model = checkpoint.load(self.file.first_weights)
            weights = model.network.state_dict()
            self.source = {"name": model.name, "digest": model.digest}
        return training.init(self.config, self.settings, steps, device=self.device, weights=weights)

    def go(
        self,
        max_time_s: float | None,
        show: Callable[[TrainProgress], None] | None,
        stop: Callable[[], bool],
        beat: Callable[[], None],
    ) -> TrainSummary:
        """Train to the end, to the time limit or until asked to stop."""
        from kernels.diffusion import training

        state, settings = self.state, self.settings
        begun = saved = time.monotonic()
        speed = _Speed()
        order: list[list[training.Piece]] = []
        order_of = -1
        loss = float("nan")
        if state.step == 0 and not state.history:
            self._validate(loss)
            self._save()
        every = max(1, round(settings.validation_every * state.steps_per_epoch))
        keep = settings.checkpoint_every
        kept_every = max(1, round(keep * state.steps_per_epoch)) if keep is not None else None
        stopping = False
        before = time.monotonic()
        while not state.finished and not stopping:
            epoch, at = divmod(state.step, state.steps_per_epoch)
            if epoch != order_of:
                order = self.data.epoch(settings.batch, settings.pieces, settings.seed, epoch)
                order_of = epoch
            loss = training.step(state, self.data, order[at])
            speed.add(time.monotonic(), sum(len(piece.rows) for piece in order[at]))
            due = state.step % every == 0
            if due:
                self._validate(speed.rate())
            if kept_every is not None and state.step % kept_every == 0:
                self._keep(self._checkpoint_path(state.step))
            now = time.monotonic()
            state.elapsed_s += now - before
            before = now
            late = max_time_s is not None and now - begun >= max_time_s
            # The last word of each turn, so that all processes leave the loop together.
            stopping = training.agree(state, stop() or late)
            if due or now - saved >= self.file.run.save_every:
                self._save()
                saved = now
            beat()
            if show is not None:
                show(self._progress(loss, speed.rate()))
        if state.finished and state.history[-1]["step"] != state.step:
            self._validate(speed.rate())
        self._save()
        return self._end()

    def _validate(self, rate: float) -> None:
        from kernels.diffusion import training

        state = self.state
        found = training.validate(state, self.judged)
        total, count = state.losses
        state.history.append(
            {
                "step": state.step,
                "epoch": state.epochs,
                "elapsed_s": state.elapsed_s,
                "learning_rate": training.learning_rate(state),
                "molecules_per_s": rate,
                "training": total / count if count else float("nan"),
                "validation": found.loss,
                **{f"n={b.first}-{b.last}": b.loss for b in found.levels},
            }
        )
        state.losses = [0.0, 0.0]
        if not state.best or found.loss < state.best["validation"]:
            state.best = {"step": state.step, "validation": found.loss, "epoch": state.epochs}
            # Before the state that knows of it: a kill in between makes it once more.
            self._keep(best_path(self.file.output))

    def _checkpoint_path(self, step: int) -> Path:
        return self.file.output / f"{self.file.name}-step-{step:06d}.safetensors"

    def _keep(self, path: Path) -> None:
        if self.rank != 0:
            return
        from kernels.diffusion import checkpoint, training

        checkpoint.save(path, self.config, training.weights(self.state.average), self.about())

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of how it came about."""
        state = self.state
        row = state.history[-1] if state.history else {}
        return {
            "name": self.file.name,
            "step": state.step,
            "epoch": round(state.epochs, 3),
            "validation": row.get("validation"),
            "training_settings": asdict(self.settings),
            "data": self.summary.as_json(),
            "init_from": self.source,
            "elapsed_s": round(state.elapsed_s, 1),
            "machine": machine(self.device),
            "made_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _save(self) -> None:
        if self.rank != 0:
            return
        from kernels.diffusion import training

        about = {"data": self.summary.digest, "init_from": self.source}
        training.state_to_file(self.state, state_path(self.file.output), about)
        write_history(self.state.history, self.file.output / "history.csv")

    def _progress(self, loss: float, rate: float) -> TrainProgress:
        from kernels.diffusion import training

        state = self.state
        total, count = state.losses
        part = state.progress
        left = None
        if part > 0.001:
            left = state.elapsed_s * (1 - part) / part
        return TrainProgress(
            name=self.file.name,
            epoch=state.epochs,
            epochs=self.settings.epochs,
            step=state.step,
            loss=total / count if count else loss,
            validation=state.history[-1]["validation"],
            best=state.best["validation"],
            molecules_per_s=rate,
            elapsed_s=state.elapsed_s,
            left_s=left,
            learning_rate=training.learning_rate(state),
        )

    def _end(self) -> TrainSummary:
        state, output = self.state, self.file.output
        summary = TrainSummary(
            name=self.file.name,
            output=str(output),
            finished=state.finished,
            resumed_at=self.resumed_at,
            step=state.step,
            epoch=state.epochs,
            elapsed_s=state.elapsed_s,
            validation=state.history[-1]["validation"],
            best=state.best,
            checkpoints=[str(path) for path in sorted(output.glob("*.safetensors"))],
        )
        if self.rank == 0:
            from orchestrator.train_report import write_card, write_report

            summary.report = str(write_report(output, self.about(), self.config, state.history))
            summary.card = str(
                write_card(
                    output / f"{self.file.name}.md",
                    self.about(),
                    self.config,
                    state.history,
                    state.best,
                    str(self.file.path.name),
                )
            )
        return summary


# Small enough to lie on the device as a whole, beside a large network.
_KEPT_ON_DEVICE: Final = 4_000_000_000


class _Speed:
    """Molecules per second over the last half minute."""

    def __init__(self) -> None:
        self._times: list[tuple[float, int]] = []

    def add(self, now: float, molecules: int) -> None:
        """Count the molecules of a step that ended now."""
        self._times.append((now, molecules))
        while now - self._times[0][0] > _RATE_OVER_S and len(self._times) > 2:
            self._times.pop(0)

    def rate(self) -> float:
        """The speed, 0 as long as it is not known."""
        if len(self._times) < 2:
            return 0.0
        span = self._times[-1][0] - self._times[0][0]
        return sum(n for _, n in self._times[1:]) / span if span > 0 else 0.0


def _device(file: TrainFile, rank: int) -> Any:
    import torch

    wanted = file.run.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        count = torch.cuda.device_count()
        if count < file.run.devices:
            raise CampaignError(
                f"{file.path}: [run] devices = {file.run.devices}: this machine has {count} CUDA "
                'devices that torch can use; write fewer, or device = "cpu"'
            )
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    return torch.device("cpu")


def machine(device: Any) -> str:
    """What a training ran on, in words."""
    import torch

    if getattr(device, "type", "") == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{torch.get_num_threads()} threads of {model}, torch {torch.__version__}"


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write the losses of each validation as a table."""
    write_csv(path, list(dict.fromkeys(name for row in history for name in row)), history)


# Stopping


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C and SIGTERM ask for a stop; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Several processes


def _several(
    file: TrainFile,
    max_time_s: float | None,
    show: Callable[[TrainProgress], None] | None,
    stop: Callable[[], bool],
    beat: Callable[[], None],
) -> TrainSummary:
    context = multiprocessing.get_context("spawn")
    asked = context.Event()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, readers = [], []
    for rank in range(file.run.devices):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(
            target=_member, args=(file, rank, port, max_time_s, asked, writer), daemon=True
        )
        process.start()
        writer.close()
        processes.append(process)
        readers.append(reader)
    try:
        return _watch(processes, readers, asked, show, stop, beat)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _watch(
    processes: list[Any],
    readers: list[Any],
    asked: Any,
    show: Callable[[TrainProgress], None] | None,
    stop: Callable[[], bool],
    beat: Callable[[], None],
) -> TrainSummary:
    from multiprocessing.connection import wait

    open_readers = list(readers)
    while open_readers:
        if stop():
            asked.set()
        beat()
        ready: list[Any] = wait(open_readers, _WATCH_EVERY_S)
        for reader in ready:
            try:
                kind, content = reader.recv()
            except EOFError:
                open_readers.remove(reader)
                process = processes[readers.index(reader)]
                process.join()
                if process.exitcode != 0:
                    raise RunError(
                        f"process {process.pid} of the training ended with exit status "
                        f"{process.exitcode}; the last saved state is kept, the same command "
                        "goes on from it"
                    ) from None
                continue
            if kind == "progress" and show is not None:
                show(content)
            elif kind == "error":
                raise content
            elif kind == "end":
                summary: TrainSummary = content
    return summary


def _member(
    file: TrainFile, rank: int, port: int, max_time_s: float | None, asked: Any, writer: Any
) -> None:
    """One of several processes; only the first one speaks, unless something goes wrong."""
    import torch.distributed

    from orchestrator.errors import BasinError

    die_with_parent()
    # Both come to the whole group of processes; the one that watches passes the wish on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    last = 0.0

    def show(progress: TrainProgress) -> None:
        nonlocal last
        if time.monotonic() - last > _WATCH_EVERY_S:
            last = time.monotonic()
            writer.send(("progress", progress))

    try:
        backend = "nccl" if _device(file, rank).type == "cuda" else "gloo"
        torch.distributed.init_process_group(
            backend,
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=file.run.devices,
        )
        summary = _process(
            file, max_time_s, show if rank == 0 else None, asked.is_set, lambda: None, rank
        )
    except BasinError as exc:
        writer.send(("error", exc))
        return
    if rank == 0:
        writer.send(("end", summary))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
