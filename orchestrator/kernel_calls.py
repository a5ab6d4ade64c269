"""Calls of kernels by name: what a stage asks for, turned into the rows it leaves behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Call:
    """What every item of a bundle has in common."""

    kernel: str
    settings: dict[str, Any]
    checkpoint_every: float


@dataclass(frozen=True, slots=True)
class Payload:
    """What one item brings: the molecule, and the geometry to start from where there is one.

    numbers (N,) uint8, positions (N, 3) float64 in Å.
    """

    smiles: str
    charge: int
    multiplicity: int
    seed: int
    conformer: int
    numbers: NDArray[np.uint8] | None
    positions: NDArray[np.float64] | None
    checkpoint: str


def call(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    """Run one item; return status, rows by table, and the changed settings it took."""
    return _KERNELS[stage.kernel](stage, payload, stop)


def _done(
    rows: dict[str, dict[str, Any]], nbytes: int, ladder: tuple[str, ...] = ()
) -> dict[str, Any]:
    return {"status": "ok", "message": "", "ladder": ladder, "rows": rows, "nbytes": nbytes}


def _embed(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    from kernels.embedding import embed

    made = embed(
        payload.smiles,
        seed=payload.seed & 0x7FFFFFFF,
        max_attempts=stage.settings["max_attempts"],
    )
    row = {
        "method": "ETKDGv3 random coordinates" if made.random_coords else "ETKDGv3",
        "energy_eV": np.nan,
        "initial_energy_eV": np.nan,
        "n_steps": 0,
        "numbers": made.numbers,
        "positions": made.positions,
    }
    return _done({"geometries": row}, 300 + made.positions.nbytes)


def _mmff(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    from kernels.forcefield import minimise

    assert payload.positions is not None
    made = minimise(payload.smiles, payload.positions, max_steps=stage.settings["max_steps"])
    row = {
        "method": made.force_field,
        "energy_eV": made.energy_eV,
        "initial_energy_eV": made.initial_energy_eV,
        "n_steps": made.iterations,
        "numbers": payload.numbers,
        "positions": made.positions,
    }
    return _done({"geometries": row}, 300 + made.positions.nbytes)


def _save(path: Path, arrays: dict[str, Any]) -> None:
    """Save an open item's state; plain arrays, so that kernels need not know HDF5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def _load(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Return the saved state of an open relaxation and the rungs it was on, if there is one."""
    from kernels.relaxation import RelaxState

    try:
        with np.load(path) as saved:
            arrays = dict(saved)
    except FileNotFoundError:
        return None, ()
    tried = tuple(str(name) for name in arrays.pop("ladder"))
    return RelaxState.from_arrays(arrays), tried


def _relax(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    from kernels.calculators import ladder, make_calculator, program_version
    from kernels.connectivity import changes
    from kernels.relaxation import RelaxSettings, RelaxState, relax_with_ladder

    assert payload.numbers is not None
    assert payload.positions is not None
    wanted = stage.settings
    level, program = wanted["level"], wanted["program"]
    settings = RelaxSettings(
        optimizer=wanted["optimizer"],
        fmax=wanted["fmax"],
        max_steps=wanted["max_steps"],
        max_step_length=wanted["max_step_length"],
        save_forces=wanted["save_forces"],
    )
    electronic = {k: wanted[k] for k in ("electronic_temperature",) if k in wanted}
    path = Path(payload.checkpoint)
    state, tried = _load(path)
    start = payload.positions
    saved = time.monotonic()
    kept = state is not None
    finished = True

    def make(**changes: Any) -> Any:
        return make_calculator(
            level,
            program=program,
            charge=payload.charge,
            multiplicity=payload.multiplicity,
            smiles=payload.smiles,
            **{**electronic, **changes},
        )

    def on_step(now: RelaxState, rungs: tuple[str, ...]) -> bool:
        nonlocal saved, kept, finished
        # A state that has just converged is a result; nothing is gained by saving it.
        finished = not stop() or now.fmax[-1] < settings.fmax
        if not finished or time.monotonic() - saved > stage.checkpoint_every:
            _save(path, {**now.to_arrays(), "ladder": np.array(rungs, dtype=np.str_)})
            saved = time.monotonic()
            kept = True
        return finished

    done, tried = relax_with_ladder(
        payload.numbers,
        start,
        make,
        settings,
        ladder(level, program),
        state=state,
        tried=tried,
        on_step=on_step,
    )
    if not finished:
        return {"status": "open", "message": "", "ladder": tried}
    energies, fmax, frames, forces = done.energies, done.fmax, done.frames, done.frame_forces
    label = f"{program} {program_version(program)}"
    rows = {
        "relaxations": {
            "level": level,
            "program": label,
            "optimizer": wanted["optimizer"],
            "n_atoms": len(payload.numbers),
            "n_steps": done.steps,
            "n_evaluations": done.n_evaluations,
            "initial_energy_eV": energies[0],
            "final_energy_eV": energies[-1],
            "fmax_eV_per_A": fmax[-1],
            "connectivity_changed": any(map(len, changes(payload.numbers, start, done.positions))),
            "numbers": payload.numbers,
            "positions": done.positions,
        },
        "frames": {
            "energy_eV": energies,
            "fmax_eV_per_A": fmax,
            "positions": frames,
            "forces": np.zeros((0, 3)) if forces is None else forces,
        },
    }
    return {**_done(rows, 600 + 16 * len(fmax) + frames.nbytes, tried), "checkpointed": kept}


def _rehearse(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    """Stand in for a kernel of known cost, and for the ways in which one can go wrong."""
    fault = stage.settings["faults"].get(payload.smiles, "")
    seconds = stage.settings["seconds"]
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "exit":
        os._exit(3)
    elif fault == "hang":
        while True:
            time.sleep(1.0)
    elif fault == "memory":
        hoard = []
        while True:
            hoard.append(np.ones(1 << 23))
            time.sleep(0.01)
    elif fault == "error":
        raise RuntimeError("an error that no kernel class covers")
    if seconds and stage.settings["busy"]:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
    elif seconds:
        time.sleep(seconds)
    return _done({}, 100)


_KERNELS: dict[str, Callable[[Call, Payload, Callable[[], bool]], dict[str, Any]]] = {
    "embed": _embed,
    "mmff": _mmff,
    "relax": _relax,
    "rehearse": _rehearse,
}
