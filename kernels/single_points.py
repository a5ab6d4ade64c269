"""Energies and forces at given geometries of one molecule, such as the frames of a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kernels.calculators import Rung, evaluate
from kernels.errors import KernelError, NotFiniteError, ScfError

VERSION: Final = 1

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]

_SCF: Final = "scf_"
# Settings that change energies, so that one geometry of a path would not compare with the next.
_OTHER_SURFACE: Final = frozenset({"electronic_temperature", "grid"})


@dataclass(slots=True)
class SinglePoints:
    """What is known of the first `done` of F geometries of N atoms; the rest is NaN.

    energies (F,) in eV, fmax (F,) the largest atomic force in eV/Å, forces (F, N, 3) in eV/Å, or
    (0, N, 3) where they are not kept; NaN where no energy could be computed, for which `problems`
    holds the reasons by the number of the geometry. `ladder`: changed settings it took.
    """

    energies: Floats
    fmax: Floats
    forces: Floats
    done: int = 0
    problems: dict[int, str] = field(default_factory=dict)
    ladder: tuple[str, ...] = ()
    scf: Arrays = field(default_factory=dict)

    def to_arrays(self) -> Arrays:
        """Return all there is to save, as plain arrays."""
        return {
            "energies": self.energies,
            "fmax": self.fmax,
            "forces": self.forces,
            "done": np.array(self.done),
            "problem_at": np.array(list(self.problems), dtype=np.int64),
            "problems": np.array(list(self.problems.values()), dtype=np.str_),
            "ladder": np.array(self.ladder, dtype=np.str_),
            **{_SCF + name: array for name, array in self.scf.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> SinglePoints:
        """Return what `to_arrays` saved."""
        at, problems = arrays["problem_at"].tolist(), arrays["problems"].tolist()
        return cls(
            energies=np.array(arrays["energies"]),
            # States saved before it was kept by itself hold all forces.
            fmax=np.array(arrays["fmax"] if "fmax" in arrays else largest(arrays["forces"])),
            forces=np.array(arrays["forces"]),
            done=int(arrays["done"]),
            problems=dict(zip(at, problems, strict=True)),
            ladder=tuple(str(name) for name in arrays["ladder"]),
            scf={n.removeprefix(_SCF): a for n, a in arrays.items() if n.startswith(_SCF)},
        )


def largest(forces: NDArray[np.floating[Any]]) -> Floats:
    """Return the largest atomic force of each geometry, (F,), of forces (F, N, 3)."""
    found: Floats = np.sqrt(np.einsum("fij,fij->fi", forces, forces)).max(axis=1)
    return found


def init(frames: NDArray[np.floating[Any]], *, keep_forces: bool = True) -> SinglePoints:
    """Return the state before the first of the geometries (F, N, 3)."""
    nothing = np.full(len(frames), np.nan)
    shape = frames.shape if keep_forces else (0, *frames.shape[1:])
    return SinglePoints(nothing, nothing.copy(), np.full(shape, np.nan))


def single_points(
    numbers: NDArray[np.uint8],
    frames: NDArray[np.floating[Any]],
    make: Callable[..., Any],
    rungs: Sequence[Rung] = (),
    *,
    state: SinglePoints | None = None,
    on_frame: Callable[[SinglePoints], bool] = lambda state: True,
    keep_forces: bool = True,
) -> SinglePoints:
    """Compute energies and forces at geometries (F, N, 3) in Å of atoms `numbers` (N,).

    `make` gives a calculator, with the keywords of a rung where the plain one does not converge;
    rungs that would change the energy surface are not climbed. Each SCF starts from the charges of
    the geometry before. ``on_frame`` sees the state after every geometry; false ends the work
    there. Without ``keep_forces`` only the largest force of each geometry is kept: of the many
    frames of a chain they would take most of the memory. Raises InputError and ResourceError; any
    other failure is of its geometry alone, unless all fail: then the first of them is raised.
    """
    state = init(frames, keep_forces=keep_forces) if state is None else state
    if state.done == len(frames):
        return state
    calculator = make()
    if state.scf:
        calculator.load_scf(state.scf)
    first: KernelError | None = None
    for at in range(state.done, len(frames)):
        xyz = frames[at].astype(np.float64)
        try:
            state.energies[at], forces = _climb(calculator, numbers, xyz, make, rungs, state)
            state.fmax[at] = largest(forces[None])[0]
            if len(state.forces):
                state.forces[at] = forces
        except (NotFiniteError, ScfError) as error:
            first = first or error
            state.problems[at] = str(error)
            getattr(calculator, "reset_scf", lambda: None)()
        state.done = at + 1
        state.scf = getattr(calculator, "save_scf", dict)()
        if not on_frame(state):
            return state
    if first is not None and not np.isfinite(state.energies).any():
        if isinstance(first, ScfError):
            first.history = state.ladder
        raise first
    return state


def _climb(
    calculator: Any,
    numbers: NDArray[np.uint8],
    xyz: Floats,
    make: Callable[..., Any],
    rungs: Sequence[Rung],
    state: SinglePoints,
) -> tuple[float, Floats]:
    try:
        return evaluate(calculator, numbers, xyz)
    except ScfError as error:
        failure = error
    changes: dict[str, Any] = {}
    for rung in rungs:
        if rung.against != "ScfError" or not _OTHER_SURFACE.isdisjoint(rung.calculator):
            continue
        changes.update(rung.calculator)
        if rung.name not in state.ladder:
            state.ladder = (*state.ladder, rung.name)
        try:
            return evaluate(make(**changes), numbers, xyz)
        except ScfError as error:
            failure = error
    raise failure
