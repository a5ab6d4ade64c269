"""Calls of kernels by name: what a stage asks for, turned into the rows it leaves behind."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError, KernelError
from kernels.processes import stat
from orchestrator.child import family
from orchestrator.resident import release_code
from orchestrator.schema import STATUSES

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

    from kernels.diffusion.checkpoint import Model

# Pairs of atoms that share a batch: on a CPU few, so that a batch ends soon; a small network takes
# a third less time for 25 molecules together than for three. A generation has a thousand steps.
_CPU_PAIRS = {"diffuse": 8192, "generate": 2048}
_GPU_PAIRS = 1 << 20
# Environment of a pool whose workers may use more than one thread each for diffusion models.
TORCH_THREADS = "BASIN_TORCH_THREADS"


@dataclass(frozen=True, slots=True)
class Call:
    """What every item of a bundle has in common.

    ``model``: name or file of the diffusion model; ``gpu``: whether it may run on one;
    ``mpi_prefix``: what starts an MPI program on this bundle's nodes, empty where nothing does.
    """

    kernel: str
    settings: dict[str, Any]
    checkpoint_every: float
    model: str = ""
    gpu: bool = False
    memory_limit: int = 0
    mpi_prefix: str = ""


@dataclass(frozen=True, slots=True)
class Payload:
    """What one item brings: the molecule, and the geometry to start from where there is one.

    numbers (N,) uint8, positions (N, 3) float64 in Å; frames (F, N, 3) float32 in Å, the path to
    compute from its frame ``first`` on. ``settings``: its own, where they differ within a bundle.
    """

    smiles: str
    charge: int
    multiplicity: int
    seed: int
    conformer: int
    numbers: NDArray[np.uint8] | None
    positions: NDArray[np.float64] | None
    checkpoint: str
    frames: NDArray[np.float32] | None = None
    first: int = 0
    settings: dict[str, Any] | None = None


def batches(stage: Call, payloads: Sequence[Payload]) -> list[list[int]]:
    """Return which items run together: one by one, but for models' molecules.

    Those are of equal size, unless the model takes any; by size they are in any case, since what
    shares a batch is repeated alone where one of them fails.
    """
    if stage.kernel not in _BATCHED:
        return [[i] for i in range(len(payloads))]
    from kernels.diffusion.sizes import packed

    if stage.kernel == "diffusion_chain":
        # Frames go to files, so that only the network's own memory counts.
        return packed(_sizes(stage, payloads), _GPU_PAIRS, mixed=True)
    most = _GPU_PAIRS if stage.gpu else _CPU_PAIRS[stage.kernel]
    mixed = stage.kernel == "diffuse" and _takes_any_size(stage.model)
    return packed(_sizes(stage, payloads), most, mixed=mixed)


def _takes_any_size(model: str) -> bool:
    from kernels.diffusion.model_files import find, read_header

    try:
        return read_header(find(model)).architecture == "basin"
    except KernelError:
        return False  # `prepare` will say what is wrong


def _sizes(stage: Call, payloads: Sequence[Payload]) -> list[int]:
    """Return numbers of atoms, also of molecules that are still to be made."""
    if stage.kernel != "generate":
        return [len(p.numbers) for p in payloads if p.numbers is not None]
    from kernels.diffusion.model_files import find, read_header
    from kernels.diffusion.sizes import draw_size

    try:
        histogram = read_header(find(stage.model)).size_histogram
    except KernelError:
        return [1] * len(payloads)  # `prepare` will say what is wrong
    return [draw_size(histogram, payload.seed) for payload in payloads]


def prepare(stage: Call) -> None:
    """Load what all items need; raises KernelError where that is not what was planned."""
    if stage.model:
        load_model(stage.model, stage.settings["model"], stage.gpu)
    if stage.settings.get("program") == "gpu4pyscf":
        if not stage.gpu:
            # Its many workers would share, and fill, a GPU that their node has.
            raise InputError(
                'program "gpu4pyscf" does not run in pool "cpu", whose workers have no GPU of '
                'their own; name one that has as `pool` of the stage, such as "gpu"'
            )
        from kernels.gpu4pyscf_engine import require_gpu

        require_gpu()


def call(
    stage: Call, payloads: Sequence[Payload], stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Run a batch; return of each item status, rows by table, and the changed settings it took.

    ``weight`` is an item's share of the batch's time, 1 by default.
    """
    if stage.kernel in _BATCHED:
        return _BATCHED[stage.kernel](stage, payloads, stop)
    if stage.settings.get("program") not in _OUTSIDE:
        return [_KERNELS[stage.kernel](stage, payload, stop) for payload in payloads]
    outcomes = []
    for payload in payloads:
        before_s = cpu_outside_s()
        outcome = _KERNELS[stage.kernel](stage, payload, stop)
        outcome["cpu_elsewhere_s"] = cpu_outside_s() - before_s
        outcomes.append(outcome)
    return outcomes


# Programs that compute in processes of their own.
_OUTSIDE = frozenset({"psi4"})


def cpu_outside_s() -> float:
    """Return the CPU seconds of all processes that this one has started, as they started others."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for pid in family(os.getpid())[1:]:
        # Its own, and of its children that have ended.
        ticks += sum(map(int, stat(pid)[11:15]))
    return ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def done(rows: dict[str, Any], nbytes: int, ladder: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the outcome of an item that went well: a row, or a list of them, by table."""
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
    return done({"geometries": row}, 300 + made.positions.nbytes)


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
    return done({"geometries": row}, 300 + made.positions.nbytes)


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Save an open item's state; plain arrays, so that kernels need not know HDF5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def load_saved(path: Path) -> dict[str, NDArray[Any]] | None:
    """Return the saved state of an open item, if there is one."""
    try:
        with np.load(path) as saved:
            return dict(saved)
    except FileNotFoundError:
        return None


class _Clock:
    """The time of an item, that of its earlier runs included; saved and read with its state."""

    def __init__(self, program: str, saved: Mapping[str, NDArray[Any]] | None) -> None:
        self._outside = program in _OUTSIDE
        self._before = [float((saved or {}).get(name, 0.0)) for name in _SPENT]
        self._start = self._now()

    def _now(self) -> list[float]:
        outside_s = cpu_outside_s() if self._outside else 0.0
        return [time.process_time() + outside_s, time.perf_counter()]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return what the item has taken so far."""
        spent = np.array(self._before) + np.array(self._now()) - np.array(self._start)
        return {name: np.array(s) for name, s in zip(_SPENT, spent.tolist(), strict=True)}

    def before(self) -> dict[str, float]:
        """Return what it had taken before it was taken up again, as part of its outcome."""
        return dict(zip(("cpu_before_s", "wall_before_s"), self._before, strict=True))


_SPENT = ("spent_cpu_s", "spent_wall_s")


# Settings of a level that the calculator is made with.
ELECTRONIC = ("electronic_temperature", "density_fitting", "grid")
# Of a stage's memory limit what a DFT program is told to use; Python and buffers take the rest.
_DFT_MEMORY_SHARE = 0.6


def calculator_maker(
    wanted: dict[str, Any], payload: Payload, memory_limit: int = 0
) -> Callable[..., Calculator]:
    """Return what makes an item's calculator, with the changed settings of a rung.

    ``memory_limit`` (bytes): the stage's, of which a DFT program is given a share.
    """
    from kernels.calculators import DFT_LEVELS, make_calculator

    electronic = {k: wanted[k] for k in ELECTRONIC if k in wanted}
    if wanted["level"] in DFT_LEVELS and memory_limit:
        electronic["memory"] = int(_DFT_MEMORY_SHARE * memory_limit)

    def make(**changes: Any) -> Calculator:
        return make_calculator(
            wanted["level"],
            program=wanted["program"],
            charge=payload.charge,
            multiplicity=payload.multiplicity,
            smiles=payload.smiles,
            **{**electronic, **changes},
        )

    return make


def _relax(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    from kernels.calculators import ladder, program_version
    from kernels.connectivity import changes
    from kernels.relaxation import RelaxSettings, RelaxState, is_converged, relax_with_ladder

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
        initial_hessian=wanted.get("initial_hessian", "unit"),
        coordinates=wanted.get("coordinates", "cartesian"),
        coarse_until=wanted.get("coarse_until", 0.0),
    )
    path = Path(payload.checkpoint)
    arrays = load_saved(path)
    clock = _Clock(program, arrays)
    state = None if arrays is None else RelaxState.from_arrays(arrays)
    tried = () if arrays is None else tuple(str(name) for name in arrays["ladder"])
    start = payload.positions
    saved = time.monotonic()
    kept = state is not None
    finished = True

    def on_step(now: RelaxState, rungs: tuple[str, ...]) -> bool:
        nonlocal saved, kept, finished
        # A state that has just converged is a result; nothing is gained by saving it.
        finished = not stop() or is_converged(now, settings)
        if not finished or time.monotonic() - saved > stage.checkpoint_every:
            names = np.array(rungs, dtype=np.str_)
            save(path, {**now.to_arrays(), "ladder": names, **clock.to_arrays()})
            saved = time.monotonic()
            kept = True
        return finished

    relaxed, tried = relax_with_ladder(
        payload.numbers,
        start,
        calculator_maker(wanted, payload, stage.memory_limit),
        settings,
        ladder(level, program),
        state=state,
        tried=tried,
        on_step=on_step,
        smiles=payload.smiles,
        charge=payload.charge,
        multiplicity=payload.multiplicity,
    )
    if not finished:
        return {"status": "open", "message": "", "ladder": tried}
    energies, fmax, frames, forces = (
        relaxed.energies,
        relaxed.fmax,
        relaxed.frames,
        relaxed.frame_forces,
    )
    label = f"{program} {program_version(program)}"
    rows = {
        "relaxations": {
            "level": level,
            "program": label,
            "optimizer": wanted["optimizer"] + settings.variant,
            "n_atoms": len(payload.numbers),
            "n_steps": relaxed.steps,
            "n_evaluations": relaxed.n_evaluations,
            "initial_energy_eV": energies[0],
            "final_energy_eV": energies[-1],
            "fmax_eV_per_A": fmax[-1],
            "connectivity_changed": any(
                map(len, changes(payload.numbers, start, relaxed.positions))
            ),
            "numbers": payload.numbers,
            "positions": relaxed.positions,
        },
        "frames": {
            "energy_eV": energies,
            "fmax_eV_per_A": fmax,
            "positions": frames,
            "forces": np.zeros((0, 3)) if forces is None else forces,
        },
    }
    outcome = done(rows, 600 + 16 * len(fmax) + frames.nbytes, tried)
    return {**outcome, "checkpointed": kept, **clock.before()}


def failed(error: KernelError) -> dict[str, Any]:
    """Return the outcome of an item that did not, and took no time."""
    assert error.status in STATUSES
    return {"status": error.status, "message": str(error), "ladder": (), "weight": 0.0}


@lru_cache(maxsize=4)
def load_model(model: str, digest: str, gpu: bool) -> Model:
    """Return a model, kept for the next call; raises InputError where it is not the planned one."""
    # What ran here before does not add to the peak.
    release_code(Path(np.__file__).parents[1])
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"diffusion models need torch, which cannot be loaded ({error}); pip install torch"
        ) from error

    from kernels.diffusion.checkpoint import load

    release_code(Path(torch.__file__).parents[1])
    # Many workers share a machine; more threads only pay where one has cores to itself.
    torch.set_num_threads(int(os.environ.get(TORCH_THREADS, "1")))
    device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
    found = load(model, device)
    if found.digest != digest:
        raise InputError(
            f"model {model!r} has changed since the run was planned (SHA-256 {found.digest[:12]}, "
            f"planned {digest[:12]}); start the same command again to use the new file"
        )
    return found


def batch_limit(stage: Call, model: Model) -> int | None:
    """Return the bytes that a batch may take; None where they are a GPU's, or not limited."""
    # Half of it: the library and the weights need some, and so does the path.
    return stage.memory_limit // 2 if stage.memory_limit and model.device.type == "cpu" else None


def _diffuse(
    stage: Call, payloads: Sequence[Payload], stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    from kernels.connectivity import changes
    from kernels.diffusion.process import DiffuseSettings, Start, diffuse

    settings = stage.settings
    n, protocol = settings["n"], settings["protocol"]
    model = load_model(stage.model, settings["model"], stage.gpu)
    starts = []
    for payload in payloads:
        assert payload.numbers is not None
        assert payload.positions is not None
        starts.append(Start(payload.numbers, payload.positions, payload.seed, payload.smiles))
    results = diffuse(
        model,
        starts,
        DiffuseSettings(n=n, protocol=protocol),
        memory_limit=batch_limit(stage, model),
    )
    outcomes = []
    for start, made in zip(starts, results, strict=True):
        if isinstance(made, KernelError):
            outcomes.append(failed(made))
            continue
        end = made.frames[-1].astype(np.float64)
        changed = any(map(len, changes(start.numbers, start.positions, end)))
        rows = {
            "geometries": {
                "method": f"diffusion {model.name} n={n}",
                "energy_eV": np.nan,
                "initial_energy_eV": np.nan,
                "n_steps": n,
                "numbers": start.numbers,
                "positions": end,
            },
            "paths": {
                "model": model.name,
                "model_digest": model.digest,
                "n": n,
                "protocol": protocol,
                "changed_elements": made.changed_elements,
                "connectivity_changed": changed,
                "level": made.levels,
                "numbers": start.numbers,
                "positions": made.frames.reshape(-1, 3),
            },
        }
        outcomes.append(done(rows, 900 + made.frames.nbytes))
    return outcomes


def _generate(
    stage: Call, payloads: Sequence[Payload], stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    from kernels.diffusion.generation import GenerateSettings, generate

    model = load_model(stage.model, stage.settings["model"], stage.gpu)
    settings = GenerateSettings(save_every=stage.settings["save_every"])
    limit = batch_limit(stage, model)
    outcomes = []
    for made in generate(model, [p.seed for p in payloads], settings, memory_limit=limit):
        if isinstance(made, KernelError):
            outcomes.append(failed(made))
            continue
        steps = model.schedule.steps
        measured = made.convergence
        rows = {
            "geometries": {
                "method": f"diffusion {model.name} from noise",
                "energy_eV": np.nan,
                "initial_energy_eV": np.nan,
                "n_steps": steps,
                "numbers": made.numbers,
                "positions": made.frames[-1],
            },
            "paths": {
                "model": model.name,
                "model_digest": model.digest,
                "n": steps,
                "protocol": "generation",
                "changed_elements": 0,
                "connectivity_changed": False,
                "level": made.levels,
                "numbers": made.numbers,
                "positions": made.frames.reshape(-1, 3),
            },
            "generations": {
                "model": model.name,
                "n_atoms": len(made.numbers),
                "level": made.levels,
                "step_length_A": measured.step_length,
                "bond_deviation_A": measured.bond_deviation,
                "elements_final": measured.elements_final,
                "all_elements_final": measured.elements_final == 1,
                "bonds_final": measured.bonds_final,
                "all_bonds_final": measured.bonds_final == 1,
                "valid_bonds": measured.valid_bonds,
            },
        }
        nbytes = 1200 + made.frames.nbytes + 24 * len(made.levels)
        outcomes.append({**done(rows, nbytes), "weight": float(len(made.numbers) ** 2)})
    return outcomes


def _single_points(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    from kernels.calculators import ladder, program_version
    from kernels.single_points import SinglePoints, single_points

    assert payload.numbers is not None
    assert payload.positions is not None
    wanted = stage.settings
    level, program = wanted["level"], wanted["program"]
    path = payload.positions[None] if payload.frames is None else payload.frames
    chosen = np.arange(payload.first, len(path), wanted.get("every", 1))
    # Not copied where all are computed: a chain may have many.
    frames = path[payload.first :] if len(chosen) == len(path) else path[chosen]
    line = frames[:0]
    if wanted["line"] and len(frames) > 2:
        weights = np.linspace(0.0, 1.0, len(frames))[1:-1, None, None]
        first, last = frames[0].astype(float), frames[-1].astype(float)
        line = first + weights * (last - first)
    saved_as = Path(payload.checkpoint)
    saved = time.monotonic()
    finished = False
    arrays = load_saved(saved_as)
    clock = _Clock(program, arrays)
    kept = arrays is not None
    state = None if arrays is None else SinglePoints.from_arrays(arrays)

    def on_frame(now: SinglePoints) -> bool:
        nonlocal saved, kept, finished
        finished = now.done == len(now.energies)
        going_on = finished or not stop()
        if not going_on or (not finished and time.monotonic() - saved > stage.checkpoint_every):
            save(saved_as, {**now.to_arrays(), **clock.to_arrays()})
            saved = time.monotonic()
            kept = True
        return going_on

    points = single_points(
        payload.numbers,
        np.concatenate([frames, line]) if len(line) else frames,
        calculator_maker(wanted, payload, stage.memory_limit),
        ladder(level, program),
        state=state,
        on_frame=on_frame,
        keep_forces=wanted["save_forces"],
    )
    if not finished:
        return {"status": "open", "message": "", "ladder": points.ladder}
    n = len(frames)
    energies, fmax = np.full(len(path), np.nan), np.full(len(path), np.nan)
    energies[chosen], fmax[chosen] = points.energies[:n], points.fmax[:n]
    forces = np.zeros((0, 3))
    if wanted["save_forces"]:
        forces = np.full(path.shape, np.nan)
        forces[chosen] = points.forces[:n]
    ends = points.energies[[0, n - 1]]
    row = {
        "level": level,
        "program": f"{program} {program_version(program)}",
        "n_atoms": len(payload.numbers),
        "energy_eV": energies,
        "fmax_eV_per_A": fmax,
        "forces": forces.reshape(-1, 3),
        "line_energy_eV": np.concatenate([ends[:1], points.energies[n:], ends[1:]])
        if len(line)
        else np.zeros(0),
    }
    outcome = done({"single_points": row}, 400 + 24 * len(path), points.ladder)
    if points.problems:
        at, why = next(iter(points.problems.items()))
        where = f"frame {chosen[at]}" if at < n else f"point {at - n + 1} of the line"
        outcome["message"] = f"{len(points.problems)} of {len(points.energies)} without energy"
        outcome["message"] += f"; {where}: {why}"
    outcome["nbytes"] += forces.nbytes
    return {**outcome, "checkpointed": kept, **clock.before()}


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
    return done({}, 100)


_Single: TypeAlias = Callable[[Call, Payload, Callable[[], bool]], dict[str, Any]]
_Batch: TypeAlias = Callable[[Call, Sequence[Payload], Callable[[], bool]], list[dict[str, Any]]]


def _chain(stage: Call, payload: Payload, stop: Callable[[], bool]) -> dict[str, Any]:
    from orchestrator.chain_calls import KERNELS

    return KERNELS[stage.kernel](stage, payload, stop)


def _diffusion_chains(
    stage: Call, payloads: Sequence[Payload], stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    from orchestrator.chain_calls import diffusion_chains

    return diffusion_chains(stage, payloads, stop)


_KERNELS: dict[str, _Single] = {
    "embed": _embed,
    "mmff": _mmff,
    "relax": _relax,
    "single_points": _single_points,
    "metropolis": _chain,
    "gaussian_chain": _chain,
    "replica_exchange": _chain,
    "rehearse": _rehearse,
}

_BATCHED: dict[str, _Batch] = {
    "diffuse": _diffuse,
    "generate": _generate,
    "diffusion_chain": _diffusion_chains,
}
