"""Calls of the kernels that make Markov chains; states are saved as they go, and taken up again."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels import errors
from kernels.errors import KernelError
from orchestrator.frame_file import SavedFrames, frames_path
from orchestrator.kernel_calls import (
    ELECTRONIC,
    Call,
    Payload,
    batch_limit,
    calculator_maker,
    done,
    failed,
    load_model,
    load_saved,
    save,
)

if TYPE_CHECKING:
    from kernels.diffusion.chains import ChainsState
    from kernels.sampling.metropolis import ChainSettings, ChainState, Proposal

Arrays = dict[str, NDArray[Any]]

# Steps of a chain are made in pieces of about this length (s): between two of them a stop is heard.
_PIECE_S = 0.2
_SPENT = "spent_s"
_OPEN = {"status": "open", "message": "", "ladder": ()}
_PR_SET_PDEATHSIG = 1
# Looked up here, since between fork and exec as little as possible should happen.
_C_LIBRARY = ctypes.CDLL(None)
# An MPI program that was told to stop saves its state, and is killed where it takes longer.
_STOP_LIMIT_S = 60.0


class _Clock:
    """CPU and wall time of an item, over all the processes that it was saved and taken up by."""

    def __init__(self, saved: Arrays | None, share: float = 1.0) -> None:
        """``saved``: state to go on from, whose times are taken out; ``share``: of a batch."""
        spent = saved.pop(_SPENT).tolist() if saved is not None else (0.0, 0.0)
        self.cpu_s: float
        self.wall_s: float
        self.cpu_s, self.wall_s = spent
        self._share = share
        self._began = time.process_time(), time.perf_counter()

    def arrays(self) -> Arrays:
        """Return the times until now, for a saved state."""
        cpu, wall = self._began
        now = time.process_time() - cpu, time.perf_counter() - wall
        spent = self.cpu_s + self._share * now[0], self.wall_s + self._share * now[1]
        return {_SPENT: np.array(spent)}


def _row(payload: Payload, clock: _Clock, **columns: Any) -> dict[str, Any]:
    """Return a row of the table chains; the worker adds keys, and the time of this call."""
    numbers = payload.numbers
    assert numbers is not None
    row = {
        "level": "",
        "program": "",
        "model": "",
        "model_digest": "",
        "temperature_K": np.nan,
        "n": 0,
        "repeat": 0,
        "n_atoms": len(numbers),
        "burn_in": 0,
        "step_size_A": np.nan,
        "acceptance": np.nan,
        "swap_acceptance": np.nan,
        "n_evaluations": 0,
        "diverged": False,
        "divergence": "",
        "energy_eV": np.zeros(0),
        "numbers": numbers,
        "cpu_s": clock.cpu_s,
        "wall_s": clock.wall_s,
    }
    assert columns.keys() <= row.keys() | {"kind", "n_steps", "save_every", "positions"}
    return {**row, **columns}


def _program(settings: dict[str, Any]) -> dict[str, str]:
    from kernels.calculators import program_version

    program = settings["program"]
    return {"level": settings["level"], "program": f"{program} {program_version(program)}"}


def _walk(
    stage: Call,
    payload: Payload,
    stop: Callable[[], bool],
    settings: ChainSettings,
    proposal: Proposal | None,
) -> tuple[ChainState, _Clock, bool] | None:
    """Make a chain's steps, from its saved state where there is one; None: stopped, and saved."""
    from kernels.sampling.metropolis import ChainState, advance, init

    numbers, positions = payload.numbers, payload.positions
    assert numbers is not None
    assert positions is not None
    path = Path(payload.checkpoint)
    calculator = calculator_maker(stage.settings, payload, stage.memory_limit)()
    arrays = load_saved(path)
    kept = arrays is not None
    clock = _Clock(arrays)
    if arrays is None:
        state = init(numbers, positions, calculator, settings, proposal)
    else:
        state = ChainState.from_arrays(arrays)
    saved = time.monotonic()
    piece = 1
    while state.step < settings.steps and not state.diverged:
        before, began = state.step, time.perf_counter()
        until = min(state.step + piece, settings.steps)
        advance(state, numbers, calculator, settings, payload.seed, until=until, proposal=proposal)
        if state.step >= settings.steps or state.diverged:
            break
        if stop() or time.monotonic() - saved > stage.checkpoint_every:
            save(path, {**state.to_arrays(), **clock.arrays()})
            saved = time.monotonic()
            kept = True
            if stop():
                return None
        took = (time.perf_counter() - began) / max(1, state.step - before)
        piece = max(1, min(2 * piece, round(_PIECE_S / max(took, 1e-9))))
    return state, clock, kept


def _metropolis(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    from kernels.sampling.metropolis import ChainSettings

    wanted = stage.settings
    settings = ChainSettings(
        temperature=wanted["temperature"],
        steps=wanted["steps"],
        burn_in=wanted["burn_in"],
        save_every=wanted["save_every"],
        step_size=wanted["step_size"],
        tune=wanted["tune"],
    )
    about: dict[str, Any] = {"kind": "metropolis", "temperature_K": settings.temperature}
    proposal: Proposal | None = None
    if wanted["proposal"] == "diffusion":
        from kernels.sampling.diffusion_proposal import DiffusionProposal

        assert payload.numbers is not None
        model = load_model(stage.model, wanted["model"], stage.gpu)
        proposal = DiffusionProposal(
            model,
            payload.numbers,
            wanted["n"],
            wanted["diffusion_share"],
            moves=wanted["diffusion_moves"],
        )
        about.update(
            kind="diffusion metropolis",
            n=wanted["n"],
            model=model.name,
            model_digest=model.digest,
        )
    return _chain(stage, payload, stop, settings, about, proposal)


def _gaussian_chain(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    from kernels.sampling.metropolis import ChainSettings

    wanted = stage.settings
    settings = ChainSettings(
        # Nothing is rejected, so that it plays no part.
        temperature=300.0,
        steps=wanted["steps"],
        burn_in=0,
        save_every=wanted["save_every"],
        step_size=wanted["step_size"],
        accept_all=True,
        max_energy=wanted["max_energy"],
    )
    return _chain(stage, payload, stop, settings, {"kind": "gaussian"})


def _chain(
    stage: Call,
    payload: Payload,
    stop: Callable[[], bool],
    settings: ChainSettings,
    about: dict[str, Any],
    proposal: Proposal | None = None,
) -> dict[str, Any]:
    found = _walk(stage, payload, stop, settings, proposal)
    if found is None:
        return dict(_OPEN)
    state, clock, kept = found
    energies = state.energies[: state.step + 1]
    frames = state.frames[: state.step // settings.save_every + 1]
    row = _row(
        payload,
        clock,
        **_program(stage.settings),
        **about,
        repeat=stage.settings.get("repeat", 0),
        n_steps=state.step,
        burn_in=settings.burn_in,
        save_every=settings.save_every,
        step_size_A=state.step_size,
        acceptance=np.nan if settings.accept_all else state.acceptance,
        n_evaluations=state.n_evaluations,
        diverged=bool(state.diverged),
        divergence=state.diverged,
        energy_eV=energies,
        positions=frames.reshape(-1, 3),
    )
    outcome = done({"chains": row}, 700 + energies.nbytes + frames.nbytes)
    return {**outcome, "checkpointed": kept}


# Replica exchange


def _replica_exchange(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    from kernels.sampling.replica_exchange import (
        SingleProcess,
        parallel_efficiency,
        run_exchange,
    )

    wanted = stage.settings
    path = Path(payload.checkpoint)
    request = _request(stage, payload)
    if stage.mpi_prefix:
        result = _by_mpi(stage, request, path, stop)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = run_exchange(
            request, SingleProcess(), saved=path, stop=stop, save_every_s=stage.checkpoint_every
        )
    if result is None:
        return dict(_OPEN)
    clock = _Clock(None)
    temperatures = wanted["temperatures"]
    # Of each chain, what its energies took, in all the parts that the ladder was computed in.
    compute_s, _, clock.wall_s = result["spent_s"].tolist()
    clock.cpu_s = compute_s / len(temperatures)
    rows = [
        _row(
            payload,
            clock,
            **_program(wanted),
            kind="replica exchange",
            temperature_K=temperature,
            repeat=wanted.get("repeat", 0),
            n_steps=wanted["steps"],
            burn_in=wanted["burn_in"],
            save_every=wanted["save_every"],
            step_size_A=float(result["step_size"][rung]),
            acceptance=float(result["acceptance"][rung]),
            swap_acceptance=float(result["swap_acceptance"][rung]),
            n_evaluations=int(result["n_evaluations"][rung]),
            energy_eV=result["energies"][rung],
            positions=result["frames"][rung].reshape(-1, 3),
        )
        for rung, temperature in enumerate(temperatures)
    ]
    swaps = [
        {
            "temperature_K": temperature,
            "next_temperature_K": higher,
            "swaps_tried": int(tried),
            "swaps_accepted": int(accepted),
            "round_trips": int(trips),
            "n_processes": len(result["total_s"]),
            "efficiency": parallel_efficiency(result),
        }
        for temperature, higher, tried, accepted, trips in zip(
            temperatures,
            [*temperatures[1:], np.nan],
            [*result["swaps_tried"], 0],
            [*result["swaps_accepted"], 0],
            result["round_trips"],
            strict=True,
        )
    ]
    nbytes = sum(900 + row["energy_eV"].nbytes + row["positions"].nbytes for row in rows)
    # The processes of an MPI program are none of this one's own.
    elsewhere = float(result["compute_s"].sum()) if stage.mpi_prefix else 0.0
    outcome = done({"chains": rows, "exchanges": swaps}, nbytes)
    return {**outcome, "checkpointed": path.exists(), "cpu_elsewhere_s": elsewhere}


def _request(stage: Call, payload: Payload) -> Arrays:
    """Return what a replica exchange has to know, as plain arrays for a file."""
    from kernels.sampling.replica_exchange import ExchangeSettings, request_arrays

    wanted = stage.settings
    assert payload.numbers is not None
    assert payload.positions is not None
    settings = ExchangeSettings(
        temperatures=tuple(wanted["temperatures"]),
        steps=wanted["steps"],
        burn_in=wanted["burn_in"],
        save_every=wanted["save_every"],
        swap_every=wanted["swap_every"],
        step_size=wanted["step_size"],
        tune=wanted["tune"],
    )
    calculator: dict[str, Any] = {
        "charge": payload.charge,
        "multiplicity": payload.multiplicity,
        "smiles": payload.smiles,
        **{name: wanted[name] for name in ("level", "program", *ELECTRONIC) if name in wanted},
    }
    return request_arrays(payload.numbers, payload.positions, settings, payload.seed, calculator)


def _die_with_parent() -> None:
    # Terminated, and not killed: what starts MPI programs then ends all of their processes.
    _C_LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _by_mpi(stage: Call, request: Arrays, state: Path, stop: Callable[[], bool]) -> Arrays | None:
    """Run the MPI program over the nodes of this bundle; None where it was stopped."""
    folder = state.with_suffix(".mpi")
    folder.mkdir(parents=True, exist_ok=True)
    asked, answer, halt = folder / "request.npz", folder / "result.npz", folder / "stop"
    for file in (answer, halt):
        file.unlink(missing_ok=True)
    save(asked, request)
    command = [
        *shlex.split(stage.mpi_prefix),
        *(sys.executable, "-m", "kernels.sampling.exchange_program"),
        *("--request", str(asked), "--result", str(answer), "--saved", str(state)),
        *("--stop-file", str(halt), "--save-every-s", f"{stage.checkpoint_every:g}"),
    ]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            told: float | None = None
            while process.poll() is None:
                if told is None and stop():
                    halt.touch()
                    told = time.monotonic()
                if told is not None and time.monotonic() - told > _STOP_LIMIT_S:
                    break
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PIECE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = load_saved(answer)
    if result is None and told is not None:
        return None
    if result is None:
        words = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(
            f"{command[0]} ended with exit status {process.returncode} and no result: "
            f"{words[-1] if words else 'no message'}"
        )
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    if "error" in result:
        kind = result["error_class"].tobytes().decode()
        raise getattr(errors, kind, KernelError)(result["error"].tobytes().decode())
    return result


KERNELS: dict[str, Callable[[Call, Payload, Callable[[], bool]], dict[str, Any]]] = {
    "metropolis": _metropolis,
    "gaussian_chain": _gaussian_chain,
    "replica_exchange": _replica_exchange,
}


# Chains of a diffusion model


class _Moment(NamedTuple):
    """A diffusion chain at some step: x (N, 3) as the network has it, and what goes with it."""

    step: int
    x: NDArray[np.float32]
    n_steps: int
    diverged: str
    n_frames: int


class _Saved:
    """One diffusion chain of a batch, and the files that it is saved in.

    The state of the save before is kept too: where a kill comes between those of two chains, all
    of them can go on from the same step, in the same company, and so with the same numbers.
    """

    def __init__(self, payload: Payload, share: float) -> None:
        assert payload.numbers is not None
        self.path = Path(payload.checkpoint)
        self.frames = SavedFrames(str(frames_path(self.path)), 0, len(payload.numbers))
        self.moments: list[_Moment] = []
        # Those that began together go on together; what is new begins together.
        self.company = ""
        arrays = load_saved(self.path)
        self.clock = _Clock(arrays, share)
        if arrays is not None:
            self.company = str(arrays["company"])
            self.moments = [
                _Moment(int(step), x, int(n_steps), str(diverged), int(n_frames))
                for step, x, n_steps, diverged, n_frames in zip(
                    *(arrays[name] for name in _Moment._fields), strict=True
                )
            ]

    def at(self, step: int) -> _Moment:
        """Return the state at a step for which there is one, and go on from there."""
        moment = next(m for m in self.moments if m.step == step)
        self.moments = [moment]
        self.frames = SavedFrames(self.frames.path, moment.n_frames, self.frames.n_atoms)
        return moment

    def save(self, moment: _Moment, company: str) -> None:
        """Save a state, after its frames."""
        self.frames.sync()
        self.moments = [*self.moments[-1:], moment]
        columns = zip(*self.moments, strict=True)
        save(
            self.path,
            {
                "company": np.array(company),
                **self.clock.arrays(),
                **{
                    name: np.array(column)
                    for name, column in zip(_Moment._fields, columns, strict=True)
                },
            },
        )


def company(path: Path) -> str:
    """Return what names the chains that a saved one ran together with; "" where there are none."""
    try:
        with np.load(path) as saved:
            return str(saved["company"]) if "company" in saved else ""
    except (OSError, ValueError, zipfile.BadZipFile):
        return ""


def _companies(chains: Sequence[_Saved]) -> list[tuple[int, list[int]]]:
    """Share chains out to batches that can go on together: step, and places.

    They are always in the same order, on which the rounding of a network's sums may depend.
    """
    by_company: dict[str, list[int]] = {}
    for place in sorted(range(len(chains)), key=lambda place: chains[place].path.name):
        by_company.setdefault(chains[place].company, []).append(place)
    made: list[tuple[int, list[int]]] = []
    for places in by_company.values():
        known = [{m.step for m in chains[place].moments} or {0} for place in places]
        common = set.intersection(*known)
        if common:
            made.append((max(common), places))
            continue
        by_step: dict[int, list[int]] = {}
        for place, steps in zip(places, known, strict=True):
            by_step.setdefault(max(steps), []).append(place)
        made += by_step.items()
    return made


def diffusion_chains(
    stage: Call, payloads: Sequence[Payload], stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Make chains of several n and molecules together; return the outcome of each."""
    chains = [_Saved(payload, 1 / len(payloads)) for payload in payloads]
    outcomes: list[dict[str, Any]] = [dict(_OPEN) for _ in payloads]
    for step, places in _companies(chains):
        if stop():
            break
        made = _together(
            stage, [payloads[p] for p in places], [chains[p] for p in places], step, stop
        )
        for place, outcome in zip(places, made, strict=True):
            outcomes[place] = outcome
    return outcomes


def _together(
    stage: Call,
    payloads: Sequence[Payload],
    chains: Sequence[_Saved],
    step: int,
    stop: Callable[[], bool],
) -> list[dict[str, Any]]:
    from kernels.diffusion import chains as kernel

    wanted = stage.settings
    model = load_model(stage.model, wanted["model"], stage.gpu)
    own = [payload.settings or wanted for payload in payloads]
    starts = []
    for payload, settings in zip(payloads, own, strict=True):
        assert payload.numbers is not None
        assert payload.positions is not None
        starts.append(
            kernel.ChainStart(
                payload.numbers, payload.positions, payload.seed, settings["n"], payload.smiles
            )
        )
    names = sorted(Path(payload.checkpoint).stem for payload in payloads)
    company = hashlib.sha256("".join(names).encode()).hexdigest()
    state = _restored(chains, step) if step else None
    saved = time.monotonic()
    kept = False

    def on_segment(now: ChainsState) -> bool:
        nonlocal saved, kept
        for chain, frames in zip(chains, now.take_frames(), strict=True):
            chain.frames = chain.frames.append(frames)
        finished = now.step >= wanted["steps"]
        going_on = finished or not stop()
        due = time.monotonic() - saved > stage.checkpoint_every
        if not going_on or (due and not finished):
            for place, chain in enumerate(chains):
                chain.save(
                    _Moment(
                        now.step,
                        now.x[place],
                        now.n_steps[place],
                        now.diverged[place],
                        chain.frames.count,
                    ),
                    company,
                )
            saved = time.monotonic()
            kept = True
        return going_on

    last = 0

    def watch(now: ChainsState) -> bool:
        nonlocal last
        last = now.step
        return on_segment(now)

    results = kernel.diffusion_chains(
        model,
        starts,
        steps=wanted["steps"],
        save_every=wanted["save_every"],
        state=state,
        on_segment=watch,
        memory_limit=batch_limit(stage, model),
    )
    outcomes = []
    for payload, settings, chain, made in zip(payloads, own, chains, results, strict=True):
        if isinstance(made, KernelError):
            outcomes.append(failed(made))
            continue
        if last < wanted["steps"]:
            outcomes.append(dict(_OPEN))
            continue
        row = _row(
            payload,
            chain.clock,
            kind="diffusion",
            model=model.name,
            model_digest=model.digest,
            n=settings["n"],
            repeat=settings.get("repeat", 0),
            n_steps=made.n_steps,
            burn_in=wanted["burn_in"],
            save_every=wanted["save_every"],
            diverged=bool(made.diverged),
            divergence=made.diverged,
            positions=chain.frames,
        )
        outcome = done({"chains": row}, 700 + chain.frames.nbytes)
        outcomes.append({**outcome, "checkpointed": True})
    return outcomes


def _restored(chains: Sequence[_Saved], step: int) -> ChainsState:
    """Return the state of a batch at a step that each of its chains was saved at."""
    from kernels.diffusion.chains import ChainsState

    moments = [chain.at(step) for chain in chains]
    sizes = [len(moment.x) for moment in moments]
    return ChainsState.from_arrays(
        {
            "step": np.array(step),
            "n_steps": np.array([moment.n_steps for moment in moments]),
            "diverged": np.array([moment.diverged for moment in moments], dtype=np.str_),
            "n_atoms": np.array(sizes),
            "n_frames": np.zeros(len(sizes), np.int64),
            "x": np.concatenate([moment.x for moment in moments]),
            "frames": np.zeros((0, 3), np.float32),
        }
    )
