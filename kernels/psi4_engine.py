"""B3LYP by Psi4, run by Psi4's own interpreter: nothing of it is loaded here.

A worker (`psi4_worker`) is kept for the life of this process and shared by its engines. It forgets
everything between two geometries; the orbitals an SCF starts from travel with each request, so
that a worker can die, or be replaced before it has leaked too much memory, and no energy changes.

Psi4 cannot mix six d with seven f functions as QM9's basis does. Here d functions are five:
energies lie above QM9's, by an amount that is nearly the same along a relaxation (docs/dft.md).
"""

from __future__ import annotations

import atexit
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kernels import basis
from kernels.calculators import GRIDS, DftSettings
from kernels.dft_engine import DftEngine
from kernels.errors import InputError, KernelError, ProgramError, ResourceError, ScfError
from kernels.processes import started
from kernels.units import (
    BOHR_TO_ANGSTROM,
    HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM,
    HARTREE_TO_EV,
)

PYTHON_VARIABLE: Final = "BASIN_PSI4_PYTHON"

_WORKER: Final = Path(__file__).with_name("psi4_worker.py")
# Psi4 leaks some MB at each gradient; a new worker takes half a second.
_CALLS_PER_WORKER: Final = 50
_ENERGY_CONVERGENCE: Final = 1e-8
# Of the orbital gradient: forces are within 1e-4 eV/Å of converged ones, energies within 1 nHa.
_ORBITAL_CONVERGENCE: Final = 1e-6
# Above it each new density is damped; down to convergence it would cost iterations for nothing.
_DAMPED_ABOVE: Final = 1e-3
# A name that no file of Psi4's own basis sets has: the file is written to the worker's scratch.
_QM9_BASIS: Final = "basin-qm9"
# Weigend's universal fitting set, under the name that all versions of Psi4 know.
FITTING_BASIS: Final = "def2-qzvpp-jkfit"
_PREFIX: Final = "basin-psi4-"
# Left at once: else Psi4 writes its timings into the current folder, though it only was imported.
_PROBE: Final = (
    "import os, sys; sys.path.extend(sys.argv[1:]); import psi4; "
    "print(psi4.__version__, flush=True); os._exit(0)"
)
_SECONDS_TO_IMPORT: Final = 120.0
_SECONDS_TO_END: Final = 20.0


@dataclass(frozen=True, slots=True)
class Installation:
    """Psi4 as found: an interpreter, where it imports psi4 from ("" for its own), the version."""

    python: str
    path: str
    version: str


def find() -> Installation:
    """Find Psi4: BASIN_PSI4_PYTHON, Debian's package, or the `psi4` program on PATH, in this order.

    Raises InputError where there is none, or where BASIN_PSI4_PYTHON cannot import it.
    """
    return _find(os.environ.get(PYTHON_VARIABLE, ""), os.environ.get("PATH", ""))


@lru_cache(maxsize=8)
def _find(configured: str, search_path: str) -> Installation:
    program = shutil.which("psi4", path=search_path)
    beside = _paths_of(program)
    if configured:
        found = _ask_version(configured, ("", *beside))
        if found is None:
            raise InputError(
                f"{PYTHON_VARIABLE}={configured} cannot import psi4; name an interpreter that can, "
                f"or unset it"
            )
        return found
    debian = tuple(str(module.parent) for module in Path("/usr/lib").glob("*-linux-gnu/psi4"))
    candidates = [("/usr/bin/python3", ("", *debian))]
    candidates += [(python, ("", *beside)) for python in _interpreters_of(program)]
    for python, paths in candidates:
        found = _ask_version(python, paths)
        if found is not None:
            return found
    raise InputError(
        "program 'psi4' is not installed; on Debian: apt-get install psi4 libopenblas0-pthread; "
        "elsewhere: conda install -c conda-forge psi4, and put it on PATH or name its interpreter "
        f"in {PYTHON_VARIABLE}"
    )


def _interpreters_of(program: str | None) -> list[str]:
    if program is None:
        return []
    with open(program, "rb") as script:
        first = script.readline().decode(errors="replace").split()
    named = first[0][2:] if first and first[0].startswith("#!/") else ""
    if named.endswith("/env") and len(first) > 1:
        named = shutil.which(first[1]) or ""
    beside = [str(Path(program).resolve().with_name(name)) for name in ("python3", "python")]
    return list(dict.fromkeys(path for path in (named, *beside) if os.access(path, os.X_OK)))


def _paths_of(program: str | None) -> tuple[str, ...]:
    return () if program is None else (str(Path(program).resolve().parent.parent / "lib"),)


def _ask_version(python: str, paths: tuple[str, ...]) -> Installation | None:
    for path in paths:
        command = [python, "-I", "-c", _PROBE, *([path] if path else [])]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_SECONDS_TO_IMPORT,
                env=_environment(),
                cwd=tempfile.gettempdir(),
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode == 0 and done.stdout.strip():
            return Installation(python, path, done.stdout.split()[-1])
    return None


def _environment() -> dict[str, str]:
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, threads)}


class Psi4(DftEngine):
    """B3LYP by Psi4, with five d functions.

    Forces lack the change of the grid's weights with the geometry: against the slope of the
    energy they are off by up to 5e-4 eV/Å with grid "fine" (2e-3 where there is Cl, Br or I), 5e-5
    with "very fine" (1e-4).

    Before version 1.4 Psi4's SCF has no level shift: `level_shift` does nothing there, damping
    and the number of iterations do. Molecules without beta electrons (H, H2+) are computed
    without density fitting, in which Psi4 1.3.2 crashes on them.
    """

    def __init__(self, settings: DftSettings) -> None:
        super().__init__(settings)
        self.installation = find()

    def evaluate(
        self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64]]:
        answer = self._converged(numbers, positions, gradient=True)
        gradient = np.array(answer["gradient"], dtype=np.float64)
        return (
            float(answer["energy"]) * HARTREE_TO_EV,
            gradient * -HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM,
        )

    def energy(self, numbers: NDArray[np.uint8], positions: NDArray[np.float64]) -> float:
        return float(self._converged(numbers, positions, gradient=False)["energy"]) * HARTREE_TO_EV

    def _converged(
        self, numbers: NDArray[np.uint8], positions: NDArray[np.float64], *, gradient: bool
    ) -> dict[str, Any]:
        """Return the worker's answer, in hartree and bohr."""
        start = self._begin(numbers)
        answer = _ask(
            self.installation,
            {
                "numbers": numbers.tolist(),
                "bohr": (positions / BOHR_TO_ANGSTROM).tolist(),
                "charge": self.settings.charge,
                "multiplicity": self.settings.multiplicity,
                "memory": self.settings.memory,
                "options": self._options(numbers),
                "orbitals": [part.tolist() for part in start],
                "gradient": gradient,
            },
        )
        if "error" in answer:
            raise _failure(answer, self.settings)
        self.iterations = int(answer["iterations"])
        self._orbitals = tuple(np.array(part, dtype=np.float64) for part in answer["orbitals"])
        return answer

    def _options(self, numbers: NDArray[np.uint8]) -> dict[str, Any]:
        settings = self.settings
        radial, angular = GRIDS[settings.grid]
        electrons = int(numbers.sum(dtype=np.int64)) - settings.charge
        unpaired = settings.multiplicity - 1
        fitted = settings.density_fitting and electrons > unpaired
        return {
            "basis": _QM9_BASIS if settings.basis == basis.QM9 else settings.basis,
            "df_basis_scf": FITTING_BASIS,
            "reference": "uks" if unpaired else "rks",
            "scf_type": "df" if fitted else "pk",
            "dft_radial_points": radial,
            "dft_spherical_points": angular,
            # Not Psi4's default: on 302 points its forces, which leave out how the weights of the
            # grid move with the atoms, are wrong by half as much.
            "dft_nuclear_scheme": "becke",
            "guess": {"atomic": "sad", "huckel": "huckel"}[settings.guess],
            "maxiter": settings.max_iterations,
            "e_convergence": _ENERGY_CONVERGENCE,
            "d_convergence": _ORBITAL_CONVERGENCE,
            "damping_percentage": 100 * settings.damping,
            "damping_convergence": _DAMPED_ABOVE,
            "level_shift": settings.level_shift,
            "soscf": settings.second_order,
        }


def _failure(answer: dict[str, Any], settings: DftSettings) -> KernelError:
    name, text = str(answer["error"]), " ".join(str(answer["message"]).split())
    if name in ("SCFConvergenceError", "ConvergenceError"):
        return ScfError(
            f"psi4: SCF not converged in {answer['iterations']} iterations; raise "
            f"max_scf_iterations (now {settings.max_iterations}), or set scf_guess, scf_damping "
            f"or second_order"
        )
    if name == "MemoryError" or "bad_alloc" in text or "memory" in text.lower():
        return ResourceError(f"psi4: {text}; give more memory than {settings.memory / 1e9:.2g} GB")
    if name in ("ValidationError", "BasisSetNotFound"):
        return InputError(f"psi4: {text}")
    return ProgramError(f"psi4: {name}: {text}")


class _WorkerDied(Exception):
    """The worker ended before it had answered; its exit status and last words are attached.

    `fresh`: it had answered nothing before, so that it was not dying already when it was asked.
    """

    def __init__(self, status: int, messages: str, *, fresh: bool) -> None:
        super().__init__(messages)
        self.status = status
        self.fresh = fresh


class _Worker:
    """One running worker: started by its making, ended with its scratch folder by `close`."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.calls = 0
        self.resident = 0
        self._status: int | None = None
        self.scratch = Path(tempfile.mkdtemp(prefix=_folder_prefix()))
        try:
            text = basis.FILE.read_text()
            if not text.startswith("cartesian\n"):
                raise InputError(f"{basis.FILE}: the first line is not 'cartesian'")
            spherical = text.replace("cartesian", "spherical", 1)
            (self.scratch / f"{_QM9_BASIS}.gbs").write_text(spherical)
            paths = [installation.path] if installation.path else []
            self.process = subprocess.Popen(
                [installation.python, "-I", str(_WORKER), str(self.scratch), *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={
                    **_environment(),
                    "PSIPATH": str(self.scratch),
                    "PSI_SCRATCH": str(self.scratch),
                },
                # Not to be reached by a Ctrl-C meant for us: we may have states to save first.
                start_new_session=True,
            )
        except BaseException:
            shutil.rmtree(self.scratch, ignore_errors=True)
            raise
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests = self.process.stdin.fileno()
        self._answers = self.process.stdout.fileno()
        try:
            # Of the process that computes; the one started here watches it.
            self.pid = int(self._receive()["pid"])
        except BaseException:
            self.close()
            raise

    def ended(self) -> bool:
        """Whether it has died while nothing was asked of it."""
        # It speaks only when asked: anything to read is the end of the file.
        return bool(select.select([self._answers], [], [], 0)[0])

    def worn_out(self, memory: int) -> bool:
        """Whether it has leaked enough to be replaced."""
        return self.calls >= _CALLS_PER_WORKER or self.resident > memory // 2

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer; raises _WorkerDied."""
        self.calls += 1
        line = memoryview(json.dumps({**request, "id": self.calls}).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._requests, line) :]
        except BrokenPipeError:
            raise self._death() from None
        answer = self._receive()
        if answer["id"] != self.calls:
            raise ProgramError(
                f"psi4: the answer is to request {answer['id']}, not to {self.calls}"
            )
        self.resident = int(answer["resident"])
        return answer

    def _receive(self) -> dict[str, Any]:
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise self._death()
            parts.append(part)
        answer: dict[str, Any] = json.loads(b"".join(parts))
        return answer

    def _death(self) -> _WorkerDied:
        # Removed by the watcher, unless that is what was killed.
        try:
            messages = (self.scratch / "messages").read_text(errors="replace").strip()
        except OSError:
            messages = ""
        return _WorkerDied(self.close(), messages[-500:], fresh=self.calls <= 1)

    def close(self) -> int:
        """End the worker, remove its scratch folder and return its exit status."""
        if self._status is not None:
            return self._status
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.terminate()
        try:
            self._status = self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self._status = self.process.wait()
        finally:
            # The process that computes outlives a watcher that was killed by a moment.
            deadline = time.monotonic() + _SECONDS_TO_END
            while select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                if not os.read(self._answers, 1 << 20):
                    break
            self.process.stdout.close()
            shutil.rmtree(self.scratch, ignore_errors=True)
        return self._status

    def disown(self) -> None:
        """Let go of a worker that belongs to the process this one was forked from."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.returncode = 0


_worker: _Worker | None = None
_one_at_a_time = threading.Lock()


def _ask(installation: Installation, request: dict[str, Any]) -> dict[str, Any]:
    """Have `request` answered by the worker; where it dies, by a fresh one, and by a second."""
    deaths = 0
    with _one_at_a_time:
        while True:
            try:
                return _exchange(installation, request)
            except _WorkerDied as death:
                deaths += death.fresh
                if deaths == 2:
                    raise _crash(death, request) from None


def _exchange(installation: Installation, request: dict[str, Any]) -> dict[str, Any]:
    global _worker
    if _worker is not None and (
        _worker.ended()
        or _worker.worn_out(request["memory"])
        or _worker.installation != installation
    ):
        _end_worker()
    if _worker is None:
        _sweep()
        _worker = _Worker(installation)
    try:
        answer = _worker.ask(request)
    except BaseException:
        # Of a request broken off, a time limit say, the answer would be taken for the next one's.
        _end_worker()
        raise
    if answer.get("error", "SCFConvergenceError") != "SCFConvergenceError":
        _end_worker()
    return answer


def _end_worker() -> None:
    global _worker
    worker, _worker = _worker, None
    if worker is not None:
        worker.close()


def _after_fork() -> None:
    global _worker, _one_at_a_time
    _one_at_a_time = threading.Lock()
    worker, _worker = _worker, None
    if worker is not None:
        worker.disown()


atexit.register(_end_worker)
os.register_at_fork(after_in_child=_after_fork)


def _crash(death: _WorkerDied, request: dict[str, Any]) -> KernelError:
    number = death.status - 128 if death.status > 128 else -death.status
    size = f"{len(request['numbers'])} atoms"
    if number == signal.SIGKILL:
        return ResourceError(
            f"psi4 was killed twice while it computed {size}, probably for want of memory (it was "
            f"told to use {request['memory'] / 1e9:.2g} GB); give the task more or run fewer tasks"
        )
    try:
        how = f"was ended by {signal.Signals(number).name}"
    except ValueError:
        how = f"exited with status {death.status}"
    return ProgramError(f"psi4 {how} twice while it computed {size}; it said: {death}")


# Scratch folders: named so that one left by processes of this machine that are gone, all killed at
# once, can be told from one in use.


def _folder_prefix() -> str:
    return f"{_place()}{os.getpid()}-{started(os.getpid())}-"


def _place() -> str:
    # Process numbers mean something on one host only, and there in one container.
    return f"{_PREFIX}{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}-"


def _sweep() -> None:
    """Remove scratch folders whose process is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_place()}*"):
        try:
            pid, ticks, _ = folder.name.removeprefix(_place()).split("-", 2)
            gone = started(int(pid)) != int(ticks)
        except ValueError:
            continue
        if gone:
            shutil.rmtree(folder, ignore_errors=True)
