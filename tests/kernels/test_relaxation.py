import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from kernels.calculators import Rung, ladder, make_calculator
from kernels.connectivity import changes
from kernels.embedding import embed
from kernels.errors import (
    CollapsedError,
    ConvergenceError,
    InputError,
    NotFiniteError,
    ScfError,
    StepCapError,
)
from kernels.forcefield import minimise
from kernels.graph import parse_smiles
from kernels.relaxation import (
    RelaxSettings,
    RelaxState,
    init,
    is_converged,
    relax,
    relax_with_ladder,
    step,
)

MOLECULES = ["OCCO", "CC(=O)[O-]", "CC(C)Cc1ccccc1", "C[C@H](N)C(=O)O", "C[CH]C"]


@cache
def _geometry(text: str) -> tuple[Any, np.ndarray]:
    molecule = parse_smiles(text)
    start = embed(molecule.smiles, seed=1, max_attempts=50).positions
    positions = minimise(molecule.smiles, start, max_steps=5000).positions
    positions.flags.writeable = False
    return molecule, positions


def _calculator(molecule: Any, program: str | None = None, **settings: Any) -> Any:
    return make_calculator(
        "GFN2-xTB",
        program=program,
        charge=molecule.charge,
        multiplicity=molecule.multiplicity,
        **settings,
    )


def _run(text: str, program: str | None = None, **settings: Any) -> RelaxState:
    molecule, positions = _geometry(text)
    return relax(
        molecule.numbers, positions, _calculator(molecule, program), RelaxSettings(**settings)
    )


@pytest.mark.parametrize("text", MOLECULES)
@pytest.mark.parametrize("optimizer", ["BFGS", "LBFGS", "FIRE"])
def test_frames_are_those_of_ases_own_optimiser(text: str, optimizer: str) -> None:
    import ase.optimize
    from ase import Atoms

    molecule, positions = _geometry(text)
    ours = _run(text, optimizer=optimizer)
    atoms = Atoms(molecule.numbers, positions)
    atoms.calc = _calculator(molecule)
    theirs = getattr(ase.optimize, optimizer)(atoms, logfile=None, maxstep=0.2)
    energies: list[float] = []
    theirs.attach(lambda: energies.append(atoms.get_potential_energy()))
    theirs.run(fmax=0.03, steps=500)
    assert ours.steps == theirs.nsteps > 3
    assert ours.energies == pytest.approx(np.array(energies), abs=1e-9)
    assert ours.positions == pytest.approx(atoms.positions, abs=1e-6)


def test_a_hessian_with_negative_curvature_is_walked_like_ase() -> None:
    from ase import Atoms
    from ase.optimize import BFGS

    # Planar ammonia is a saddle; pushed a little, it leaves it through negative curvature.
    numbers = np.array([7, 1, 1, 1], dtype=np.uint8)
    angles = np.radians([0, 120, 240])
    planar = np.zeros((4, 3))
    planar[1:, 0], planar[1:, 1] = 1.02 * np.cos(angles), 1.02 * np.sin(angles)
    planar[0, 2] = 0.02
    lowest: list[float] = []

    def watch(state: RelaxState) -> bool:
        if state.memory:
            lowest.append(float(np.linalg.eigvalsh(state.memory["hessian"])[0]))
        return True

    ours = relax(
        numbers, planar, make_calculator("GFN2-xTB"), RelaxSettings(fmax=0.01), on_step=watch
    )
    assert min(lowest) < -0.1
    atoms = Atoms(numbers, planar)
    atoms.calc = make_calculator("GFN2-xTB")
    theirs = BFGS(atoms, logfile=None, maxstep=0.2)
    theirs.run(fmax=0.01, steps=500)
    assert ours.steps == theirs.nsteps
    assert ours.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    height = ours.positions[0, 2] - ours.positions[1:, 2].mean()
    assert abs(height) > 0.3


@pytest.mark.parametrize("text", MOLECULES)
def test_relaxed_forces_are_below_the_limit_by_tblites_own_calculator(text: str) -> None:
    from ase import Atoms
    from tblite.ase import TBLite

    molecule, positions = _geometry(text)
    done = _run(text, save_forces=True)
    atoms = Atoms(molecule.numbers, done.positions)
    atoms.calc = TBLite(
        method="GFN2-xTB",
        charge=molecule.charge,
        multiplicity=molecule.multiplicity,
        verbosity=0,
        accuracy=0.01,
    )
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 0.03
    assert atoms.get_potential_energy() == pytest.approx(done.energy, abs=1e-6)
    atoms.positions = positions
    assert atoms.get_potential_energy() == pytest.approx(done.energies[0], abs=1e-6)
    assert done.energy < done.energies[0]
    assert done.fmax[-1] < 0.03 <= done.fmax[:-1].min()
    assert done.frames.shape == (done.steps + 1, len(molecule.numbers), 3)
    assert np.array_equal(done.frames[0], positions)
    assert done.frame_forces is not None
    largest = np.linalg.norm(done.frame_forces, axis=2).max(axis=1)
    assert done.fmax == pytest.approx(largest, abs=1e-12)


def test_forces_of_frames_are_kept_only_on_request() -> None:
    assert _run("O").frame_forces is None


def _through_a_file(state: RelaxState) -> RelaxState:
    file = io.BytesIO()
    np.savez(file, **state.to_arrays())
    file.seek(0)
    with np.load(file) as arrays:
        return RelaxState.from_arrays(dict(arrays))


@pytest.mark.parametrize("program", ["tblite", "xtb-python"])
@pytest.mark.parametrize("optimizer", ["BFGS", "LBFGS", "FIRE"])
@pytest.mark.parametrize("stop_at", [0, 1, 6, 13])
def test_a_stopped_relaxation_goes_on_as_if_nothing_happened(
    program: str, optimizer: Any, stop_at: int, require_engine: Callable[[str], None]
) -> None:
    require_engine(program)
    text = "CC(=O)N"
    molecule, positions = _geometry(text)
    settings = RelaxSettings(optimizer=optimizer, fmax=0.005, save_forces=True)
    whole = relax(molecule.numbers, positions, _calculator(molecule, program), settings)
    assert whole.steps > 14
    stopped = relax(
        molecule.numbers,
        positions,
        _calculator(molecule, program),
        settings,
        on_step=lambda state: state.steps < stop_at,
    )
    assert stopped.steps == stop_at
    assert not is_converged(stopped, settings)
    again = _through_a_file(stopped)
    done = relax(molecule.numbers, positions, _calculator(molecule, program), settings, state=again)
    assert done.steps == whole.steps
    assert done.n_evaluations == whole.n_evaluations
    # To the last bit, which is far inside the 1e-9 eV the store promises.
    assert np.array_equal(done.energies, whole.energies)
    assert np.array_equal(done.frames, whole.frames)
    assert done.frame_forces is not None
    assert whole.frame_forces is not None
    assert np.array_equal(done.frame_forces, whole.frame_forces)


def test_a_start_without_the_saved_charges_would_not_do() -> None:
    """Show that what `to_arrays` keeps of the SCF is needed for the test above."""
    molecule, positions = _geometry("CC(=O)N")
    settings = RelaxSettings(fmax=0.005)
    state = init(molecule.numbers, positions, _calculator(molecule), settings)
    for _ in range(6):
        step(state, _calculator(molecule), settings)
    arrays = state.to_arrays()
    assert any(name.startswith("scf/") for name in arrays)
    bare = RelaxState.from_arrays({k: v for k, v in arrays.items() if not k.startswith("scf/")})
    full = RelaxState.from_arrays(arrays)
    calculator = _calculator(molecule)
    assert (
        step(full, calculator, settings).energy
        != step(bare, _calculator(molecule), settings).energy
    )


def test_stops_after_every_step_add_up_to_one_run() -> None:
    molecule, positions = _geometry("CC(=O)[O-]")
    settings = RelaxSettings()
    whole = _run("CC(=O)[O-]")
    state = init(molecule.numbers, positions, _calculator(molecule), settings)
    while not is_converged(state, settings):
        state = step(_through_a_file(state), _calculator(molecule), settings)
    assert np.array_equal(state.energies, whole.energies)


def test_a_state_is_saved_before_its_calculator_moves_on() -> None:
    molecule, positions = _geometry("O")
    calculator = _calculator(molecule)
    state = init(molecule.numbers, positions, calculator, RelaxSettings())
    calculator.evaluate(molecule.numbers, positions + 0.01)
    with pytest.raises(RuntimeError, match="save the state before"):
        state.to_arrays()


def test_what_a_calculator_did_before_does_not_matter() -> None:
    molecule, positions = _geometry("OCCO")
    calculator = _calculator(molecule)
    settings = RelaxSettings()
    first = relax(molecule.numbers, positions, calculator, settings)
    second = relax(molecule.numbers, positions, calculator, settings)
    assert np.array_equal(first.energies, second.energies)


def test_another_process_finds_the_same_bits() -> None:
    molecule, positions = _geometry("CC(C)Cc1ccccc1")
    here = _run("CC(C)Cc1ccccc1")
    program = (
        "import io, sys, hashlib, numpy as np\n"
        "from kernels.calculators import make_calculator\n"
        "from kernels.relaxation import RelaxSettings, relax\n"
        "data = np.load(io.BytesIO(sys.stdin.buffer.read()))\n"
        "done = relax(data['numbers'], data['positions'], make_calculator('GFN2-xTB'),"
        " RelaxSettings())\n"
        "digest = hashlib.sha256(done.energies.tobytes() + done.frames.tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    file = io.BytesIO()
    np.savez(file, numbers=molecule.numbers, positions=positions)
    other = subprocess.run(
        [sys.executable, "-c", program],
        input=file.getvalue(),
        capture_output=True,
        check=True,
    )
    digest = hashlib.sha256(here.energies.tobytes() + here.frames.tobytes()).hexdigest()
    assert other.stdout.decode().strip() == digest


def test_glycine_loses_its_charges_in_the_gas_phase() -> None:
    molecule, positions = _geometry("[NH3+]CC(=O)[O-]")
    done = _run("[NH3+]CC(=O)[O-]")
    broken, formed = changes(molecule.numbers, positions, done.positions)
    symbols = [sorted(int(molecule.numbers[i]) for i in pair) for pair in (*broken, *formed)]
    # One N-H bond goes, one O-H bond comes.
    assert symbols == [[1, 7], [1, 8]]


@pytest.mark.parametrize("text", ["CC(C)Cc1ccccc1", "CCC(C)C1C2CC1C2", "O=C1CC2(O)C3NC2C13"])
def test_ordinary_relaxation_keeps_its_bonds(text: str) -> None:
    molecule, positions = _geometry(text)
    done = _run(text)
    broken, formed = changes(molecule.numbers, positions, done.positions)
    assert len(broken) == len(formed) == 0


def test_step_cap_is_a_convergence_error() -> None:
    with pytest.raises(StepCapError, match="after 4 steps of BFGS"):
        _run("CC(C)Cc1ccccc1", max_steps=4)
    with pytest.raises(StepCapError, match="after 0 steps"):
        _run("CC(C)Cc1ccccc1", max_steps=0)


def test_no_atom_moves_farther_than_allowed() -> None:
    molecule, positions = _geometry("OCCO")
    rattled = positions + np.random.default_rng(0).normal(scale=0.15, size=positions.shape)
    for length in (0.1, 0.05):
        done = relax(
            molecule.numbers,
            rattled,
            _calculator(molecule),
            RelaxSettings(max_step_length=length),
        )
        longest = np.linalg.norm(np.diff(done.frames, axis=0), axis=2).max()
        assert longest == pytest.approx(length, abs=1e-9)


def test_the_force_field_is_a_surface_like_any_other() -> None:
    molecule, positions = _geometry("CCCCO")
    rattled = positions + np.random.default_rng(2).normal(scale=0.05, size=positions.shape)
    calculator = make_calculator("MMFF94", smiles=molecule.smiles)
    done = relax(molecule.numbers, rattled, calculator, RelaxSettings(fmax=0.001))
    least = minimise(molecule.smiles, rattled, max_steps=2000)
    assert done.energy == pytest.approx(least.energy_eV, abs=1e-4)


def test_any_ase_calculator_may_be_relaxed_and_resumed() -> None:
    from ase.build import molecule as build
    from ase.calculators.emt import EMT
    from ase.optimize import BFGS

    atoms = build("CH3CH2OH")
    settings = RelaxSettings(fmax=0.05)
    whole = relax(atoms.numbers, atoms.positions, EMT(), settings)
    part = relax(
        atoms.numbers, atoms.positions, EMT(), settings, on_step=lambda state: state.steps < 3
    )
    done = relax(atoms.numbers, atoms.positions, EMT(), settings, state=_through_a_file(part))
    atoms.calc = EMT()
    theirs = BFGS(atoms, logfile=None)
    theirs.run(fmax=0.05)
    assert whole.steps == theirs.nsteps > 3
    assert np.array_equal(done.energies, whole.energies)
    assert whole.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)


def _faulty(answer: Callable[[int, np.ndarray], tuple[float, np.ndarray]]) -> Any:
    """Make an ASE calculator whose n-th answer is given by a function."""
    from ase.calculators.calculator import Calculator, all_changes

    class Faulty(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012 - as ASE declares it
        calls = 0

        def calculate(self, atoms=None, properties=None, system_changes=all_changes) -> None:  # type: ignore[no-untyped-def]
            super().calculate(atoms, properties, system_changes)
            energy, forces = answer(self.calls, atoms.positions)
            self.calls += 1
            self.results = {"energy": energy, "forces": forces}

    return Faulty()


def test_nan_stops_a_relaxation_at_once() -> None:
    def soon_nan(call: int, positions: np.ndarray) -> tuple[float, np.ndarray]:
        return 1.0, np.full_like(positions, np.nan if call == 3 else 0.1 * (call + 1))

    calculator = _faulty(soon_nan)
    with pytest.raises(NotFiniteError, match="largest force component nan"):
        relax([8, 1], np.array([[0.0, 0, 0], [0, 0, 0.97]]), calculator, RelaxSettings())
    assert calculator.calls == 4


def test_atoms_pulled_into_each_other_stop_a_relaxation() -> None:
    def attraction(call: int, positions: np.ndarray) -> tuple[float, np.ndarray]:
        pull = 20.0 * (positions[1] - positions[0])
        return -float(pull @ pull), np.array([pull, -pull])

    with pytest.raises(CollapsedError, match="atoms 1 and 2"):
        relax([8, 1], np.array([[0.0, 0, 0], [0, 0, 0.97]]), _faulty(attraction), RelaxSettings())


def test_a_failed_step_leaves_the_state_as_it_was() -> None:
    molecule, positions = _geometry("OCCO")
    settings = RelaxSettings()
    state = init(molecule.numbers, positions, _calculator(molecule), settings)
    step(state, _calculator(molecule), settings)
    before = state.to_arrays()
    with pytest.raises(ScfError):
        step(state, _calculator(molecule, max_scf_iterations=1), settings)
    after = state.to_arrays()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_scf_failure_climbs_the_ladder_and_is_recorded() -> None:
    molecule, positions = _geometry("OCCO")
    settings = RelaxSettings()
    made: list[dict[str, Any]] = []

    def make(**changes: Any) -> Any:
        made.append(changes)
        return _calculator(molecule, **{"max_scf_iterations": 3, **changes})

    done, tried = relax_with_ladder(molecule.numbers, positions, make, settings, ladder("GFN2-xTB"))
    first = ladder("GFN2-xTB")[0]
    assert tried == (first.name,)
    assert made == [{}, dict(first.calculator)]
    # That rung changes the way, not the surface.
    assert done.energy == pytest.approx(_run("OCCO").energy, abs=1e-4)


def test_step_cap_climbs_past_the_rungs_for_the_scf() -> None:
    molecule, positions = _geometry("OCCO")
    # Far enough from the minimum for the length of steps to matter.
    rattled = positions + np.random.default_rng(0).normal(scale=0.1, size=positions.shape)

    def make(**changes: Any) -> Any:
        return _calculator(molecule, **changes)

    plain = relax(molecule.numbers, rattled, make(), RelaxSettings())
    settings = RelaxSettings(max_steps=plain.steps - 1)
    rungs = ladder("GFN2-xTB")
    done, tried = relax_with_ladder(molecule.numbers, rattled, make, settings, rungs)
    assert tried == (rungs[-1].name,)
    assert done.fmax[-1] < 0.03
    # The rung starts afresh, also when the first attempt was itself taken up from a file.
    part = relax(molecule.numbers, rattled, make(), settings, on_step=lambda state: state.steps < 5)
    again, _ = relax_with_ladder(
        molecule.numbers, rattled, make, settings, rungs, state=_through_a_file(part)
    )
    alone = relax(
        molecule.numbers,
        rattled,
        make(),
        RelaxSettings(max_steps=2 * settings.max_steps, max_step_length=0.05),
    )
    assert np.array_equal(done.energies, alone.energies)
    assert np.array_equal(again.energies, alone.energies)
    assert not np.array_equal(alone.energies[:5], plain.energies[:5])


def test_a_ladder_stopped_on_a_rung_goes_on_there() -> None:
    molecule, positions = _geometry("OCCO")

    def make(**changes: Any) -> Any:
        return _calculator(molecule, **{"max_scf_iterations": 3, **changes})

    rungs, settings = ladder("GFN2-xTB"), RelaxSettings()
    whole, _ = relax_with_ladder(molecule.numbers, positions, make, settings, rungs)
    saved: list[tuple[RelaxState, tuple[str, ...]]] = []

    def stop_at_five(state: RelaxState, tried: tuple[str, ...]) -> bool:
        if state.steps == 5:
            saved.append((_through_a_file(state), tried))
        return state.steps < 5

    relax_with_ladder(molecule.numbers, positions, make, settings, rungs, on_step=stop_at_five)
    ((part, tried),) = saved
    assert tried == (rungs[0].name,)
    assert not is_converged(part, settings)
    done, tried = relax_with_ladder(
        molecule.numbers,
        positions,
        make,
        settings,
        rungs,
        state=part,
        tried=tried,
    )
    assert tried == (rungs[0].name,)
    assert np.array_equal(done.energies, whole.energies)


def test_an_exhausted_ladder_says_what_was_tried() -> None:
    molecule, positions = _geometry("OCCO")
    rungs = (
        Rung("four iterations", "ScfError", calculator={"max_scf_iterations": 4}),
        Rung("five iterations", "ScfError", calculator={"max_scf_iterations": 5}),
    )
    with pytest.raises(ConvergenceError) as caught:
        relax_with_ladder(
            molecule.numbers,
            positions,
            lambda **changes: _calculator(molecule, **{"max_scf_iterations": 3, **changes}),
            RelaxSettings(),
            rungs,
        )
    assert caught.value.history == ("four iterations", "five iterations")


def test_a_bad_molecule_is_not_tried_twice() -> None:
    calls = 0

    def make(**changes: Any) -> Any:
        nonlocal calls
        calls += 1
        return make_calculator("GFN2-xTB", multiplicity=2, **changes)

    molecule, positions = _geometry("OCCO")
    with pytest.raises(InputError):
        relax_with_ladder(molecule.numbers, positions, make, RelaxSettings(), ladder("GFN2-xTB"))
    assert calls == 1


def test_sella_finds_the_minimum_not_a_saddle(require_engine: Callable[[str], None]) -> None:
    require_engine("sella")
    molecule, positions = _geometry("OCCO")
    settings = RelaxSettings(optimizer="Sella")
    done = relax(molecule.numbers, positions, _calculator(molecule), settings)
    assert done.energy == pytest.approx(_run("OCCO").energy, abs=2e-3)
    assert done.fmax[-1] < 0.03
    assert done.n_evaluations >= done.steps + 1
    part = relax(
        molecule.numbers,
        positions,
        _calculator(molecule),
        settings,
        on_step=lambda state: state.steps < 5,
    )
    resumed = relax(
        molecule.numbers,
        positions,
        _calculator(molecule),
        settings,
        state=_through_a_file(part),
    )
    assert np.array_equal(resumed.frames[:6], part.frames)
    assert resumed.energy == pytest.approx(done.energy, abs=1e-4)
    assert abs(resumed.steps - done.steps) <= 3


def test_sella_that_is_not_installed_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sella", None)
    with pytest.raises(InputError, match=r"pip install 'basin-orchestrator\[sella\]'"):
        _run("OCCO", optimizer="Sella")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optimizer": "GPMin"}, "choose from BFGS, LBFGS, FIRE, Sella"),
        ({"fmax": 0.0}, "fmax 0.0"),
        ({"fmax": float("nan")}, "fmax nan"),
        ({"max_steps": -1}, "max_steps -1"),
        ({"max_step_length": 3.0}, "max_step_length 3.0"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        RelaxSettings(**settings)


def test_a_state_of_another_optimiser_is_refused() -> None:
    molecule, positions = _geometry("O")
    state = init(molecule.numbers, positions, _calculator(molecule), RelaxSettings())
    with pytest.raises(InputError, match="used BFGS, the settings ask for FIRE"):
        step(state, _calculator(molecule), RelaxSettings(optimizer="FIRE"))


def test_a_damaged_state_is_refused() -> None:
    molecule, positions = _geometry("O")
    arrays = init(molecule.numbers, positions, _calculator(molecule), RelaxSettings()).to_arrays()
    del arrays["frames"]
    with pytest.raises(InputError, match="lacks 'frames'"):
        RelaxState.from_arrays(arrays)
