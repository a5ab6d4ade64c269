"""Psi4 in its own process: energies, restarts, failures, and kills that leave nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from kernels import psi4_engine
from kernels.calculators import DftSettings, make_calculator, program_version
from kernels.embedding import embed
from kernels.errors import InputError, KernelError, ProgramError, ResourceError, ScfError
from kernels.psi4_engine import Psi4
from kernels.units import HARTREE_TO_EV

Molecule = tuple[NDArray[np.uint8], NDArray[np.float64]]


def molecule(numbers: list[int], positions: list[list[float]]) -> Molecule:
    return np.array(numbers, dtype=np.uint8), np.array(positions)


# Turned out of every plane, and off the origin: nothing may be reoriented or shifted.
WATER = molecule([8, 1, 1], [[1.1, 0.2, -0.3], [1.6, 0.9, 0.15], [0.3, 0.65, -0.7]])
METHANOL = molecule(
    [6, 8, 1, 1, 1, 1],
    [
        [-0.36, 0.0, 0.0],
        [1.05, 0.03, 0.1],
        [-0.7, 1.03, 0.0],
        [-0.77, -0.5, 0.88],
        [-0.72, -0.5, -0.92],
        [1.37, -0.85, 0.1],
    ],
)
OH = molecule([8, 1], [[0.0, 0.1, 0.0], [0.0, 0.3, 0.95]])
HYDROGEN_IODIDE = molecule([53, 1], [[0.0, 0.0, 0.1], [0.3, 0.2, 1.65]])
COARSE = DftSettings(grid="coarse")

# In hartree and in eV: repeated on one machine, whatever happened in between.
SAME = 1e-8 * HARTREE_TO_EV


@pytest.fixture(autouse=True)
def scratch(
    request: pytest.FixtureRequest,
    require_engine: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """Give each test a worker and a place for its scratch of its own; nothing may be left."""
    require_engine("psi4")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    psi4_engine._end_worker()
    yield tmp_path
    psi4_engine._end_worker()
    assert left(tmp_path) == ([], [])


def left(folder: Path) -> tuple[list[int], list[str]]:
    """Return the processes that compute in `folder`, and its scratch folders."""
    pids = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            pids.append(process.pid)
    return pids, [path.name for path in folder.glob("basin-psi4-*")]


def running() -> psi4_engine._Worker:
    assert psi4_engine._worker is not None
    return psi4_engine._worker


@pytest.mark.parametrize(
    ("what", "settings", "tolerance"),
    [
        (WATER, DftSettings(), 5e-4),
        pytest.param(WATER, DftSettings(grid="very fine"), 1e-4, marks=pytest.mark.slow),
        (HYDROGEN_IODIDE, DftSettings(basis="def2-SVP"), 2e-3),
    ],
)
def test_forces_are_the_slope_of_the_energy(
    what: Molecule, settings: DftSettings, tolerance: float
) -> None:
    # Only to the error of the grid: its weights move with the atoms, and Psi4's forces leave that
    # out. Of light atoms oxygen's are the worst.
    numbers, positions = what
    engine = Psi4(settings)
    energy, forces = engine.evaluate(numbers, positions)
    assert engine.energy(numbers, positions) == pytest.approx(energy, abs=SAME)
    step = 0.001 * np.eye(positions.size)[2].reshape(positions.shape)
    slope = (
        engine.energy(numbers, positions + step) - engine.energy(numbers, positions - step)
    ) / 0.002
    assert forces[0, 2] == pytest.approx(-slope, abs=tolerance)


def test_at_def2_svp_both_programs_have_the_same_energies(
    require_engine: Callable[[str], None],
) -> None:
    require_engine("pyscf")
    energies = [
        make_calculator("B3LYP/def2-SVP", program=program, density_fitting=False).energy(  # type: ignore[attr-defined]
            *HYDROGEN_IODIDE
        )
        for program in ("psi4", "pyscf")
    ]
    assert energies[0] == pytest.approx(energies[1], abs=1e-5 * HARTREE_TO_EV)


def test_density_fitting_changes_little() -> None:
    fitted = Psi4(COARSE).evaluate(*WATER)[0]
    exact = Psi4(DftSettings(grid="coarse", density_fitting=False)).evaluate(*WATER)[0]
    assert 1e-6 < abs(fitted - exact) / HARTREE_TO_EV < 60e-6


def test_a_relaxation_goes_on_in_another_process_as_it_would_have_here() -> None:
    numbers, positions = METHANOL
    moved = positions + 0.003 * np.sin(np.arange(positions.size)).reshape(positions.shape)
    engine = Psi4(COARSE)
    engine.evaluate(numbers, positions)
    cold = engine.iterations
    saved = engine.save_scf()
    energy, forces = engine.evaluate(numbers, moved)
    assert engine.iterations < cold

    assert all(array.dtype == np.float64 for array in saved.values())
    psi4_engine._end_worker()
    fresh = Psi4(COARSE)
    fresh.load_scf(saved)
    resumed, same_forces = fresh.evaluate(numbers, moved)
    assert fresh.iterations == engine.iterations
    assert resumed == pytest.approx(energy, abs=1e-11 * HARTREE_TO_EV)
    np.testing.assert_allclose(same_forces, forces, atol=1e-8)

    fresh.reset_scf()
    assert fresh.save_scf() == {}
    fresh.load_scf(saved)
    with pytest.raises(InputError, match="orbitals to start from"):
        fresh.evaluate(*WATER)


def test_a_radical_restarts_from_both_spins() -> None:
    engine = Psi4(DftSettings(multiplicity=2, grid="coarse"))
    energy, forces = engine.evaluate(*OH)
    cold = engine.iterations
    arrays = engine.save_scf()
    assert arrays["occupied_0"].shape[1] == arrays["occupied_1"].shape[1] + 1
    assert engine.evaluate(*OH)[0] == pytest.approx(energy, abs=SAME)
    assert engine.iterations < cold
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=5e-3)


def test_atoms_without_a_beta_electron() -> None:
    hydrogen = molecule([1], [[0.0, 0.0, 0.0]])
    engine = Psi4(DftSettings(multiplicity=2))
    first, _ = engine.evaluate(*hydrogen)
    assert first / HARTREE_TO_EV == pytest.approx(-0.5003, abs=1e-4)
    assert engine.evaluate(*hydrogen)[0] == pytest.approx(first, abs=SAME)


@pytest.mark.parametrize(
    "settings",
    [
        DftSettings(grid="coarse", guess="huckel"),
        DftSettings(grid="coarse", level_shift=0.3, damping=0.3, max_iterations=500),
        DftSettings(grid="coarse", second_order=True),
    ],
)
def test_other_ways_to_converge_end_in_the_same_state(settings: DftSettings) -> None:
    usual = Psi4(COARSE).evaluate(*WATER)[0]
    assert Psi4(settings).evaluate(*WATER)[0] == pytest.approx(usual, abs=SAME)


def test_molecules_of_all_sizes_in_turn_with_one_worker() -> None:
    engine = Psi4(COARSE)
    first, _ = engine.evaluate(*WATER)
    pid = running().pid
    engine.evaluate(*METHANOL)
    again, _ = engine.evaluate(*WATER)
    assert again == pytest.approx(first, abs=SAME)
    assert running().pid == pid


def test_memory_that_is_enough_is_not_too_little_by_a_hair() -> None:
    # For its integrals Psi4 itself asks for 0.1 % less than it then finds it needs.
    nitrile = embed("CC1(C)OCC1C#N", seed=1, max_attempts=50)
    assert nitrile.positions is not None
    # It has begun when it does not converge.
    with pytest.raises(ScfError, match="not converged in 1 iterations"):
        Psi4(DftSettings(memory=2_400_000_000, max_iterations=1)).energy(
            nitrile.numbers, nitrile.positions
        )


def test_failures_have_classes_and_remedies() -> None:
    with pytest.raises(ScfError, match=r"not converged in 2 iterations.*max_scf_iterations"):
        Psi4(DftSettings(max_iterations=2, grid="coarse")).evaluate(*WATER)
    pid = running().pid
    with pytest.raises(InputError, match="multiplicity 2 is impossible"):
        Psi4(DftSettings(multiplicity=2)).evaluate(*WATER)
    with pytest.raises(InputError, match="atomic number 17"):
        Psi4(COARSE).evaluate(*molecule([17, 1], [[0.0, 0, 0], [0, 0, 1.3]]))
    assert running().pid == pid


def test_an_unforeseen_failure_costs_the_worker_and_nothing_else() -> None:
    with pytest.raises(InputError, match=r"psi4: .*too close"):
        Psi4(COARSE).evaluate(*molecule([1, 1], [[0.0, 0, 0], [0, 0, 1e-6]]))
    assert psi4_engine._worker is None
    assert Psi4(COARSE).evaluate(*WATER)[0] < 0


def test_workers_are_replaced_without_a_trace_in_the_energies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers, positions = WATER
    path = [positions + 0.002 * i * np.eye(3) for i in range(5)]

    def energies() -> list[float]:
        engine = Psi4(COARSE)
        return [engine.evaluate(numbers, xyz)[0] for xyz in path]

    undisturbed = energies()
    monkeypatch.setattr(psi4_engine, "_CALLS_PER_WORKER", 2)
    assert energies() == pytest.approx(undisturbed, abs=1e-11 * HARTREE_TO_EV)
    assert running().calls == 1


def test_a_worker_that_was_killed_is_replaced() -> None:
    engine = Psi4(COARSE)
    first, _ = engine.evaluate(*WATER)
    engine.reset_scf()
    os.kill(running().pid, signal.SIGKILL)
    assert engine.evaluate(*WATER)[0] == first


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGKILL, ResourceError), (signal.SIGSEGV, ProgramError)]
)
def test_a_molecule_that_kills_every_worker_is_a_failure(
    number: signal.Signals, error: type[KernelError]
) -> None:
    ended = threading.Event()

    def kill_all() -> None:
        while not ended.wait(0.02):
            worker = psi4_engine._worker
            if worker is not None and worker.calls:
                # It may have died and been waited for meanwhile.
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, number)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(error, match="twice while it computed 6 atoms"):
            Psi4(COARSE).evaluate(*METHANOL)
    finally:
        ended.set()
        killer.join()


def test_a_request_broken_off_is_not_answered_later() -> None:
    class TimeLimit(Exception):
        pass

    def strike(*_: Any) -> None:
        raise TimeLimit

    engine = Psi4(COARSE)
    water, _ = engine.evaluate(*WATER)
    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeLimit):
            Psi4(COARSE).evaluate(*METHANOL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    engine.reset_scf()
    assert engine.evaluate(*WATER)[0] == pytest.approx(water, abs=SAME)


def _evaluate_in_a_fork(answers: Any) -> None:
    answers.put(Psi4(COARSE).evaluate(*WATER)[0])
    psi4_engine._end_worker()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_a_worker_of_its_own() -> None:
    engine = Psi4(COARSE)
    energy, _ = engine.evaluate(*WATER)
    pid = running().pid
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_evaluate_in_a_fork, args=(answers,))
    child.start()
    assert answers.get(timeout=60) == pytest.approx(energy, abs=SAME)
    child.join()
    engine.reset_scf()
    assert engine.evaluate(*WATER)[0] == pytest.approx(energy, abs=SAME)
    assert running().pid == pid


def test_an_interpreter_without_psi4_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("BASIN_PSI4_PYTHON", str(python))
    with pytest.raises(InputError, match=f"BASIN_PSI4_PYTHON={python} cannot import psi4"):
        psi4_engine.find()
    with pytest.raises(InputError, match="BASIN_PSI4_PYTHON"):
        Psi4(COARSE)


def test_the_interpreter_named_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = psi4_engine.find()
    assert program_version("psi4") == found.version
    python = tmp_path / "python3"
    path = f"PYTHONPATH={found.path} " if found.path else ""
    # As a program of a cluster's modules may be: a script that sets its environment first.
    python.write_text(f'#!/bin/sh\nshift\n{path}exec {found.python} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("BASIN_PSI4_PYTHON", str(python))
    assert psi4_engine.find() == psi4_engine.Installation(str(python), "", found.version)
    assert Psi4(COARSE).evaluate(*WATER)[0] < 0


# Kills. Whoever dies, the energies are those of an undisturbed run and nothing is left.

_ENDLESS = """
import sys, tempfile
import numpy as np
from kernels.calculators import DftSettings
from kernels.psi4_engine import Psi4
numbers = np.array(eval(sys.argv[1]), dtype=np.uint8)
positions = np.array(eval(sys.argv[2]))
engine = Psi4(DftSettings(grid="coarse"))
while True:
    engine.reset_scf()
    print(repr(float(engine.evaluate(numbers, positions)[0])), flush=True)
"""


def start_a_run(folder: Path, what: Molecule) -> subprocess.Popen[str]:
    numbers, positions = what
    return subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(numbers.tolist()), str(positions.tolist())],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until_nothing_is_left(folder: Path, *, but_folders: bool = False) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pids, folders = left(folder)
        if not pids and (but_folders or not folders):
            return
        time.sleep(0.02)
    pytest.fail(f"left behind: {left(folder)}")


def kill_a_part(folder: Path, delay: float, rng: random.Random) -> None:
    """Kill, after `delay` seconds, the process that computes or the one that watches it."""
    time.sleep(delay)
    while True:
        ours = psutil.Process().children(recursive=True)
        parts = [
            process
            for process in ours
            if process.is_running() and str(folder) in " ".join(_words(process))
        ]
        if parts:
            rng.choice(parts).kill()
            return
        time.sleep(0.01)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def undergo(kills: int, folder: Path, seed: int) -> None:
    """Kill a part of the engine while it computes, or the whole process, `kills` times."""
    rng = random.Random(seed)
    engine = Psi4(COARSE)
    molecules = (WATER, METHANOL)
    undisturbed = []
    seconds = []
    for what in molecules:
        begin = time.monotonic()
        undisturbed.append(engine.evaluate(*what)[0])
        seconds.append(time.monotonic() - begin)
    for kill in range(kills):
        # Methanol takes six times as long as water.
        which = int(kill % 5 == 4)
        if kill % 4 == 3:
            process = start_a_run(folder, molecules[which])
            assert process.stdout is not None
            time.sleep(rng.uniform(0.5, 1.5 + 2 * seconds[which]))
            process.kill()
            energies = [float(line) for line in process.stdout if line.endswith("\n")]
            process.stdout.close()
            process.wait()
        else:
            delay = rng.uniform(0, seconds[which])
            killer = threading.Thread(target=kill_a_part, args=(folder, delay, rng))
            killer.start()
            engine.reset_scf()
            energies = [engine.evaluate(*molecules[which])[0]]
            killer.join()
            psi4_engine._end_worker() if kill % 7 == 0 else None
        assert energies == pytest.approx([undisturbed[which]] * len(energies), abs=SAME)
    psi4_engine._end_worker()
    wait_until_nothing_is_left(folder)


def test_kills_at_random_leave_nothing_and_change_nothing(scratch: Path) -> None:
    undergo(4, scratch, seed=1)


@pytest.mark.slow
def test_a_hundred_kills_leave_nothing_and_change_nothing(scratch: Path) -> None:
    undergo(100, scratch, seed=2)


def test_what_a_killed_session_left_is_removed_by_the_next(scratch: Path) -> None:
    run = start_a_run(scratch, WATER)
    assert run.stdout is not None
    run.stdout.readline()
    processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    # All at once, as a batch system does: the watcher must not see the others die.
    for process in processes:
        process.suspend()
    for process in processes:
        process.kill()
    run.stdout.close()
    run.wait()
    wait_until_nothing_is_left(scratch, but_folders=True)
    assert len(left(scratch)[1]) == 1
    Psi4(COARSE).evaluate(*WATER)
    psi4_engine._end_worker()
    assert left(scratch) == ([], [])
