"""Ladders of chains, molecule by molecule, as they lie in a store.

A ladder is what one stage of a campaign made of a molecule: chains at several temperatures, or at
several diffusion steps n. Energies are in kcal/mol; those of a ladder are above its own zero, the
lowest energy that its first rung (lowest T, or lowest n) visited, so that the ladders of a molecule
share their minimum, as in Rothchild et al., Chem. Sci. 2024, 15, 13506.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kernels.units import BOLTZMANN_EV_PER_K, EV_TO_KCAL
from orchestrator.alignment import superpose
from orchestrator.chain_statistics import (
    Line,
    Moments,
    effective_samples,
    line,
    moments,
    r_hat,
)
from orchestrator.columns import Rows, key_bytes
from orchestrator.store import Snapshot, Store
from orchestrator.tables import Lookup, stream
from orchestrator.torsions import Torsion, dihedrals, rotatable

Floats = NDArray[np.float64]

METROPOLIS: Final = "metropolis"
EXCHANGE: Final = "replica exchange"
GUIDED: Final = "diffusion metropolis"
DIFFUSION: Final = "diffusion"
GAUSSIAN: Final = "gaussian"
# Kinds that sample the Boltzmann distribution; the first there is, is what n is mapped to.
THERMAL: Final = (METROPOLIS, EXCHANGE, GUIDED)

# kcal/(mol K).
BOLTZMANN: Final = BOLTZMANN_EV_PER_K * EV_TO_KCAL

# Frames of a chain that angles and mean geometries are made of.
_FRAMES: Final = 2000

_CHAINS = (
    "key", "mol_key", "task_key", "stage", "conformer", "kind", "level", "program", "model",
    "temperature_K", "n", "repeat", "n_atoms", "n_steps", "burn_in", "save_every", "step_size_A",
    "acceptance", "swap_acceptance", "n_evaluations", "diverged", "divergence", "energy_eV",
    "cpu_s",
)  # fmt: skip
_EXCHANGES = (
    "key", "next_temperature_K", "swaps_tried", "swaps_accepted", "round_trips", "n_processes",
    "efficiency",
)  # fmt: skip
_POINTS = ("key", "parent_key", "stage", "level", "program", "energy_eV")
_MOLECULES = ("key", "smiles", "name", "formula")
_TASKS = ("key", "started_s")

_REPEAT = re.compile(r"-r\d+$")


# --- results --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LadderName:
    """Which ladder, in all molecules: a stage's name without temperature, n and repetition."""

    kind: str
    level: str
    program: str
    model: str
    stage: str

    @property
    def thermal(self) -> bool:
        """Whether its chains have temperatures and sample the Boltzmann distribution."""
        return self.kind in THERMAL

    @property
    def rank(self) -> tuple[int, str, str, str, str]:
        """Where it comes among others: by kind, then by name."""
        kinds = (*THERMAL, DIFFUSION, GAUSSIAN)
        return kinds.index(self.kind), self.stage, self.level, self.model, self.program


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a chain of a replica exchange swapped with the next temperature, after the burn-in.

    ``next_temperature``: K, NaN at the end of the ladder. ``round_trips``: ways from the lowest
    temperature to the highest and back, of the walker that began here. ``processes``: of the
    whole ladder, and ``efficiency`` the share of their time that was spent in energies.
    """

    next_temperature: float
    tried: int
    accepted: int
    round_trips: int
    processes: int
    efficiency: float


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """One chain: ``energies`` (S,) after the burn-in in eV, each ``stride`` steps after the last.

    ``trace`` (L,): all of its energies in eV, the start's first, also ``stride`` steps apart.
    ``angles`` (T, F): dihedral angles in degrees of at most 2000 frames after the burn-in;
    ``mean_geometry`` (N, 3): their mean in Å, each laid onto the start; None without frames.
    ``exchange``: of a replica exchange's chain, where the store tells.
    """

    key: bytes
    temperature: float
    n: int
    repeat: int
    n_steps: int
    burn_in: int
    stride: int
    step_size: float
    acceptance: float
    swap_acceptance: float
    evaluations: int
    diverged: bool
    divergence: str
    cpu_s: float
    energies: Floats
    trace: Floats
    angles: Floats
    mean_geometry: Floats | None
    exchange: Exchange | None

    @property
    def rung(self) -> float:
        """Temperature in K, or the diffusion step where there is none."""
        return self.temperature if np.isfinite(self.temperature) else float(self.n)

    @property
    def counted_evaluations(self) -> float:
        """Energy evaluations after the burn-in."""
        kept = max(self.n_steps - self.burn_in, 0) / max(self.n_steps, 1)
        return self.evaluations * kept


@dataclass(frozen=True, slots=True, eq=False)
class Rung:
    """The chains of a molecule at one temperature, or one n; diverged ones are in no number.

    ``samples`` (S,) are all their energies after the burn-in, in kcal/mol above the ladder's zero,
    and ``above`` is what is to be added to them to have energies above the molecule's minimum.
    ``time`` is the autocorrelation time of the energy in steps; ``r_hat`` compares
    repeats, or the halves of a single chain.
    ``effective`` samples per energy evaluation after the burn-in: of the energy, and of the
    dihedral that is slowest (NaN: there is none).
    """

    value: float
    chains: tuple[Chain, ...]
    samples: Floats
    above: float
    found: Moments
    r_hat: float
    time: float
    effective_per_evaluation: float
    torsion_effective_per_evaluation: float

    @property
    def good(self) -> tuple[Chain, ...]:
        """The chains that did not diverge."""
        return tuple(chain for chain in self.chains if not chain.diverged)

    def average(self, name: str) -> float:
        """Return the mean of a number over the chains that have it; NaN where none does."""
        values = np.array([getattr(chain, name) for chain in self.good], float)
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """The rungs of one molecule, in order; ``zero_eV`` is the energy that they are above.

    ``fit`` is the mean energy as a line: in T, or in n² (``linear``: in n, to compare).
    """

    name: LadderName
    rungs: tuple[Rung, ...]
    zero_eV: float
    fit: Line | None
    linear: Line | None

    def column(self, name: str) -> Floats:
        """Return a number of `Moments` or of the rungs themselves, (R,)."""
        values = [getattr(r.found if name in Moments.__slots__ else r, name) for r in self.rungs]
        return np.array(values, float)


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A molecule's conformer with all its ladders.

    ``modes``: its vibrations, 3N - 6. ``ground_eV``: the minimum that chains started from, by level
    and program: the lowest energy of any start and of the coldest chains.
    """

    molecule: int
    name: str
    smiles: str
    n_atoms: int
    conformer: int
    torsions: tuple[Torsion, ...]
    ground_eV: dict[tuple[str, str], float]
    ladders: dict[LadderName, Ladder]
    gaussian: tuple[Chain, ...]

    @property
    def modes(self) -> int:
        """Number of vibrations."""
        return max(3 * self.n_atoms - 6, 1)

    @property
    def harmonic(self) -> float:
        """Mean potential energy of as many harmonic oscillators per kelvin, kcal/(mol K)."""
        return 0.5 * self.modes * BOLTZMANN


# --- from the store -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Shape:
    angles: Floats
    mean_geometry: Floats


@dataclass(slots=True)
class _Tables:
    chains: Rows
    kept: list[int]
    points: Rows
    points_of: dict[bytes, list[int]]
    molecules: Lookup
    exchanges: Lookup
    shapes: dict[bytes, _Shape]
    torsions: dict[bytes, tuple[Torsion, ...]]


def _gather(snapshot: Snapshot) -> _Tables | None:
    chains = snapshot.read("chains", _CHAINS)
    if not len(chains):
        return None
    kept = _latest(chains, Lookup(snapshot.read("tasks", _TASKS)))
    molecules = Lookup(snapshot.read("molecules", _MOLECULES))
    points = snapshot.read("single_points", _POINTS)
    points_of: dict[bytes, list[int]] = {}
    ours = Lookup(chains).find(points["parent_key"]) >= 0
    for row in np.flatnonzero(ours).tolist():
        points_of.setdefault(key_bytes(points["parent_key"][row]), []).append(row)
    exchanges = Lookup(snapshot.read("exchanges", _EXCHANGES))
    found = _Tables(chains, kept, points, points_of, molecules, exchanges, {}, {})
    _read_shapes(snapshot, found)
    return found


def _latest(chains: Rows, tasks: Lookup) -> list[int]:
    """Return the chains that count: of those with one stage and place the last started."""
    task = tasks.find(chains["task_key"])
    started = np.where(task >= 0, tasks.rows["started_s"][task], 0.0)
    newest: dict[tuple[Any, ...], int] = {}
    for row in np.argsort(started, kind="stable").tolist():
        temperature = float(chains["temperature_K"][row])
        place = (
            key_bytes(chains["mol_key"][row]), int(chains["conformer"][row]), chains["stage"][row],
            chains["kind"][row], temperature if np.isfinite(temperature) else None,
            int(chains["n"][row]), int(chains["repeat"][row]),
        )  # fmt: skip
        newest[place] = row
    return sorted(newest.values())


def _read_shapes(snapshot: Snapshot, tables: _Tables) -> None:
    """Read the frames, one chain at a time: all at once they are hundreds of megabytes."""
    chains = tables.chains
    wanted = {key_bytes(chains["key"][row]): row for row in tables.kept}
    smiles = tables.molecules.rows["smiles"].strings()
    for part in stream(snapshot, "chains", ("key", "mol_key", "numbers", "positions"), 1):
        key = key_bytes(part["key"][0])
        row = wanted.get(key)
        numbers = part["numbers"][0]
        if row is None or not len(part["positions"][0]):
            continue
        frames = part["positions"][0].reshape(-1, len(numbers), 3)
        mol_key = key_bytes(part["mol_key"][0])
        if mol_key not in tables.torsions:
            molecule = int(tables.molecules.find(part["mol_key"])[0])
            tables.torsions[mol_key] = tuple(
                rotatable(
                    numbers, frames[0].astype(float), smiles[molecule] if molecule >= 0 else ""
                )
            )
        every = max(int(chains["save_every"][row]), 1)
        first = int(chains["burn_in"][row]) // every + 1
        counted = frames[first:]
        if not len(counted) or not np.isfinite(counted).all():
            continue
        few = counted[:: max(1, -(-len(counted) // _FRAMES))].astype(float)
        tables.shapes[key] = _Shape(
            dihedrals(few, list(tables.torsions[mol_key])),
            superpose(few, frames[0].astype(float)).mean(axis=0),
        )


def _chains(tables: _Tables) -> Iterable[tuple[bytes, int, LadderName, Chain]]:
    """Yield molecule, conformer, ladder and chain of every chain and level of theory."""
    rows = tables.chains
    computed: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for row in tables.kept:
        for point in tables.points_of.get(key_bytes(rows["key"][row]), []):
            place = tables.points["level"][point], tables.points["program"][point]
            computed.setdefault((_stage(rows, row), rows["model"][row]), set()).add(place)
    for row in tables.kept:
        key = key_bytes(rows["key"][row])
        kind = rows["kind"][row]
        own = (rows["level"][row], rows["program"][row], rows["energy_eV"][row], 1)
        series = [own] if kind != DIFFUSION else []
        every = max(int(rows["save_every"][row]), 1)
        for point in tables.points_of.get(key, []) if kind == DIFFUSION else []:
            values = tables.points
            series.append(
                (
                    values["level"][point],
                    values["program"][point],
                    values["energy_eV"][point],
                    every,
                )
            )
        stage, model = _stage(rows, row), rows["model"][row]
        # Without energies a chain still has its frames. It waits in the ladders of those that have.
        waits = [(*at, np.zeros(0), every) for at in sorted(computed.get((stage, model), ()))]
        for level, program, energies, stride in series or waits or [("", "", np.zeros(0), every)]:
            name = LadderName(kind, level, program, model, stage)
            yield (
                key_bytes(rows["mol_key"][row]), int(rows["conformer"][row]), name,
                _chain(tables, row, key, energies, stride),
            )  # fmt: skip


def _chain(tables: _Tables, row: int, key: bytes, energies: Floats, stride: int) -> Chain:
    rows = tables.chains
    burn_in = int(rows["burn_in"][row])
    shape = tables.shapes.get(key)
    # Where only every k-th frame has an energy, the rest are NaN.
    there = np.flatnonzero(np.isfinite(energies))
    apart = int(np.median(np.diff(there))) if len(there) > 1 else 1
    return Chain(
        key=key,
        temperature=float(rows["temperature_K"][row]),
        n=int(rows["n"][row]),
        repeat=int(rows["repeat"][row]),
        n_steps=int(rows["n_steps"][row]),
        burn_in=burn_in,
        stride=stride * apart,
        step_size=float(rows["step_size_A"][row]),
        acceptance=float(rows["acceptance"][row]),
        swap_acceptance=float(rows["swap_acceptance"][row]),
        evaluations=int(rows["n_evaluations"][row]),
        diverged=bool(rows["diverged"][row]),
        divergence=bytes(rows["divergence"][row]).decode(),
        cpu_s=float(rows["cpu_s"][row]),
        energies=energies[there[there * stride > burn_in]],
        trace=energies[there],
        angles=shape.angles if shape else np.zeros((0, 0)),
        mean_geometry=shape.mean_geometry if shape else None,
        exchange=_exchange(tables, row),
    )


def _exchange(tables: _Tables, row: int) -> Exchange | None:
    at = int(tables.exchanges.find(tables.chains["key"][row : row + 1])[0])
    if at < 0:
        return None
    rows = tables.exchanges.rows
    return Exchange(
        next_temperature=float(rows["next_temperature_K"][at]),
        tried=int(rows["swaps_tried"][at]),
        accepted=int(rows["swaps_accepted"][at]),
        round_trips=int(rows["round_trips"][at]),
        processes=int(rows["n_processes"][at]),
        efficiency=float(rows["efficiency"][at]),
    )


def _stage(rows: Rows, row: int) -> str:
    """Return a stage's name without what tells apart the stages of one ladder."""
    stage: str = rows["stage"][row]
    stage = _REPEAT.sub("", stage)
    temperature, n = float(rows["temperature_K"][row]), int(rows["n"][row])
    for ending in (f"-{temperature:g}K", f"-{n}", f"-n{n}"):
        if stage.endswith(ending) and len(stage) > len(ending):
            return stage[: -len(ending)]
    return stage


# --- a molecule's ladders -------------------------------------------------------------------------


@dataclass(slots=True)
class _Draft:
    chains: dict[LadderName, list[Chain]] = field(default_factory=dict)
    gaussian: list[Chain] = field(default_factory=list)
    n_atoms: int = 0


def _lowest_rung(chains: Sequence[Chain]) -> list[Chain]:
    """Return the undiverged chains with energies at the lowest temperature or n."""
    usable = [chain for chain in chains if len(chain.energies) and not chain.diverged]
    lowest = min((chain.rung for chain in usable), default=0.0)
    return [chain for chain in usable if chain.rung == lowest]


def _ground(draft: _Draft) -> dict[tuple[str, str], float]:
    """Return the minimum that chains started from, in eV, by level and program."""
    found: dict[tuple[str, str], float] = {}
    for name, chains in draft.chains.items():
        starts = [float(chain.trace[0]) for chain in chains if len(chain.trace)]
        cold = [float(c.energies.min()) for c in _lowest_rung(chains) if name.thermal]
        for energy in [*starts, *cold]:
            place = name.level, name.program
            found[place] = min(found.get(place, np.inf), energy)
    return found


def _ladder(name: LadderName, chains: Sequence[Chain], ground: float) -> Ladder:
    lowest = _lowest_rung(chains)
    zero = min((float(chain.energies.min()) for chain in lowest), default=float("nan"))
    by_value: dict[float, list[Chain]] = {}
    for chain in sorted(chains, key=lambda c: (c.rung, c.repeat)):
        by_value.setdefault(chain.rung, []).append(chain)
    above = (zero - ground) * EV_TO_KCAL
    rungs = tuple(_rung(value, tuple(some), zero, above) for value, some in by_value.items())
    made = Ladder(name, rungs, zero, None, None)
    x, y, error = made.column("value"), made.column("mean"), made.column("error")
    # A chain that never moved has no error of its own.
    error = np.nan_to_num(error)
    if name.thermal:
        return Ladder(name, rungs, zero, line(x, y, error), None)
    return Ladder(name, rungs, zero, line(x**2, y, error), line(x, y, error))


def _rung(value: float, chains: tuple[Chain, ...], zero_eV: float, above: float) -> Rung:
    usable = [c for c in chains if len(c.energies) and not c.diverged]
    length = min((len(chain.energies) for chain in usable), default=0)
    table = np.array([(c.energies[:length] - zero_eV) * EV_TO_KCAL for c in usable]).reshape(
        len(usable), length
    )
    found = moments(table)
    evaluations = sum(chain.counted_evaluations for chain in usable)
    slow = _slowest(usable)
    return Rung(
        value=value,
        chains=chains,
        samples=table.reshape(-1),
        above=above,
        found=found,
        r_hat=r_hat(table),
        time=found.time * usable[0].stride if usable else float("nan"),
        effective_per_evaluation=found.effective / evaluations if evaluations else float("nan"),
        torsion_effective_per_evaluation=slow / evaluations if evaluations else float("nan"),
    )


def _slowest(chains: Sequence[Chain]) -> float:
    """Return the effective samples of the dihedral that has fewest; NaN where there is none.

    An angle is its sine and its cosine, which know no jump at 180 degrees.
    """
    length = min((chain.angles.shape[1] for chain in chains), default=0)
    if not length or not len(chains[0].angles):
        return float("nan")
    angles = np.radians([chain.angles[:, :length] for chain in chains])
    worth = [
        effective_samples(part(angles[:, at]))
        for at in range(angles.shape[1])
        for part in (np.cos, np.sin)
    ]
    known = [value for value in worth if np.isfinite(value)]
    return min(known, default=float("nan"))


def _subjects(tables: _Tables) -> list[Subject]:
    drafts: dict[tuple[bytes, int], _Draft] = {}
    atoms = dict(
        zip(
            (key_bytes(words) for words in tables.chains["mol_key"]),
            tables.chains["n_atoms"].tolist(),
            strict=True,
        )
    )
    for mol_key, conformer, name, chain in _chains(tables):
        draft = drafts.setdefault((mol_key, conformer), _Draft(n_atoms=atoms[mol_key]))
        if name.kind == GAUSSIAN:
            draft.gaussian.append(chain)
        else:
            draft.chains.setdefault(name, []).append(chain)
    known = tables.molecules.rows
    names, smiles, formulas = (known[c].strings() for c in ("name", "smiles", "formula"))
    several = len({mol for mol, _ in drafts}) < len(drafts)
    found: list[Subject] = []
    for (mol_key, conformer), draft in drafts.items():
        words = np.array([np.frombuffer(mol_key, ">u8").astype(np.uint64)])
        at = int(tables.molecules.find(words)[0])
        called = (names[at] or smiles[at] or formulas[at]) if at >= 0 else mol_key.hex()[:8]
        ground = _ground(draft)
        found.append(
            Subject(
                molecule=at if at >= 0 else -1 - len(found),
                name=f"{called}, conformer {conformer}" if several else called,
                smiles=smiles[at] if at >= 0 else "",
                n_atoms=draft.n_atoms,
                conformer=conformer,
                torsions=tables.torsions.get(mol_key, ()),
                ground_eV=ground,
                ladders={
                    name: _ladder(
                        name, chains, ground.get((name.level, name.program), float("nan"))
                    )
                    for name, chains in sorted(draft.chains.items(), key=lambda x: x[0].rank)
                },
                gaussian=tuple(draft.gaussian),
            )
        )
    return sorted(found, key=lambda subject: (subject.molecule, subject.conformer))


def read_subjects(store: Store) -> list[Subject]:
    """Return every molecule's conformer that has chains, with its ladders."""
    tables = store.consistent(_gather)
    return _subjects(tables) if tables is not None else []


def rung_of(ladder: Ladder, value: float) -> Rung | None:
    """Return a ladder's rung at a temperature or n; None where it has none."""
    return next((rung for rung in ladder.rungs if rung.value == value), None)


def angles_of(rung: Rung, torsions: int) -> Floats:
    """Return the dihedral angles (T, F) in degrees of all frames of a rung."""
    parts = [chain.angles for chain in rung.good if chain.angles.size]
    return np.concatenate(parts, axis=1) if parts else np.zeros((torsions, 0))


def single_rung(chain: Chain, ladder: Ladder | None = None) -> Rung:
    """Return the numbers of one chain by itself, of a ladder or above its own start."""
    if ladder is not None:
        return _rung(chain.rung, (chain,), ladder.zero_eV, ladder.rungs[0].above)
    return _rung(chain.rung, (chain,), float(chain.trace[0]) if len(chain.trace) else 0.0, 0.0)
