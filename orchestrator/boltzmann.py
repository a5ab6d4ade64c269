"""What chains sampled: energies against temperature and against the diffusion step, and their map.

Energies are in kcal/mol and temperatures in K. Rothchild et al., Chem. Sci. 2024, 15, 13506, the
section on Boltzmann sampling. Only the store is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orchestrator.alignment import superpose
from orchestrator.bootstrap import Estimate, Statistic, estimate, mean
from orchestrator.chain_statistics import UNSETTLED
from orchestrator.errors import StoreError
from orchestrator.ladders import (
    BOLTZMANN,
    DIFFUSION,
    METROPOLIS,
    THERMAL,
    Chain,
    Exchange,
    Ladder,
    LadderName,
    Rung,
    Subject,
    angles_of,
    read_subjects,
    rung_of,
)
from orchestrator.published import MATCHED
from orchestrator.store import Store
from orchestrator.torsions import overlap

Floats = NDArray[np.float64]

# The model's minimum and that of the level of theory are one only if closer than this.
MAX_RMSD: Final = 0.3  # Å
MAX_REST: Final = 5.0  # kcal/mol

# K: above it anharmonicity is no error any more.
HARMONIC_BELOW: Final = 50.0

# Rungs pair with published ones only if within this factor.
_NEAR: Final = 1.6
_PAIRS: Final = 4


# --- results --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A molecule in both ladders: whether it counts, and what it says about the map.

    ``discarded``: why it is in no fit (empty: it is). ``rmsd``: Å between the mean geometries of
    the lowest n and of the lowest T; ``rest``: how far, in kcal/mol, the mean energy at the lowest
    n lies above the minimum. ``ns`` (R,) and ``temperatures`` (R,): at which temperature in
    K this molecule has the mean energy of each n, with the intercepts of both fits taken off;
    ``shared`` (R,): the same with the zero that both ladders share instead. ``mu`` and
    ``mu_error``: K per n², of this molecule alone.
    """

    subject: Subject
    discarded: str
    rmsd: float
    rest: float
    ns: Floats
    temperatures: Floats
    shared: Floats
    mu: float
    mu_error: float


@dataclass(frozen=True, slots=True, eq=False)
class Map:
    """The map from n to a temperature, T = mu n², over all molecules that count.

    ``mu_shared`` is mu with the zero of both ladders at their lowest energy, as published, and no
    other constant. ``temperatures`` (R,): mean over molecules of the temperature of each of ``ns``.
    """

    thermal: LadderName
    diffusion: LadderName
    matches: tuple[Match, ...]
    mu: Estimate
    mu_shared: Estimate
    ns: tuple[int, ...]
    temperatures: tuple[Estimate, ...]

    @property
    def kept(self) -> tuple[Match, ...]:
        """The molecules that count."""
        return tuple(match for match in self.matches if not match.discarded)

    def temperature(self, n: float) -> Estimate:
        """Return the temperature in K of a diffusion step n, with its interval."""
        return Estimate(*(bound * n * n for bound in (self.mu.value, self.mu.low, self.mu.high)))

    def step(self, temperature: float) -> Estimate:
        """Return the diffusion step of a temperature in K, with its interval."""
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds = [
                float(np.sqrt(np.float64(temperature) / bound))
                for bound in (self.mu.value, self.mu.high, self.mu.low)
            ]
        return Estimate(*bounds)


@dataclass(frozen=True, slots=True)
class Pace:
    """Effective samples per energy evaluation of a ladder over those of plain Metropolis.

    Geometric means over molecules and temperatures where both have settled, of the energy and of
    the slowest dihedral.
    """

    name: LadderName
    molecules: int
    energy: Estimate
    torsion: Estimate


@dataclass(frozen=True, slots=True, eq=False)
class Boltzmann:
    """All that a store says about its chains."""

    store: Store
    subjects: tuple[Subject, ...]
    ladders: tuple[LadderName, ...]
    maps: tuple[Map, ...]
    paces: tuple[Pace, ...]
    max_rmsd: float
    max_rest: float

    @property
    def thermal(self) -> LadderName | None:
        """The ladder of temperatures to speak of."""
        return self.maps[0].thermal if self.maps else _first_thermal(self.ladders)

    @property
    def diffusion(self) -> LadderName | None:
        """The ladder of diffusion steps to speak of."""
        if self.maps:
            return self.maps[0].diffusion
        return next((name for name in self.ladders if name.kind == DIFFUSION), None)

    def of(self, name: LadderName) -> list[tuple[Subject, Ladder]]:
        """Return the molecules that have a ladder, with it."""
        return [(s, s.ladders[name]) for s in self.subjects if name in s.ladders]


def _first_thermal(
    names: Sequence[LadderName], like: LadderName | None = None
) -> LadderName | None:
    for kind in THERMAL:
        for name in names:
            if name.kind == kind and (
                like is None or (name.level, name.program) == (like.level, like.program)
            ):
                return name
    return None


# --- the analysis ---------------------------------------------------------------------------


def analyse(
    store: Store,
    *,
    max_rmsd: float = MAX_RMSD,
    max_rest: float = MAX_REST,
    order: Sequence[str] = (),
) -> Boltzmann:
    """Analyse the chains of a store.

    A molecule is discarded from a map where the mean geometries at the lowest n and the lowest T
    differ by more than ``max_rmsd`` Å, or where the mean energy at the lowest n lies more than
    ``max_rest`` kcal/mol above the minimum. ``order`` gives the campaign's stages, where they are
    known; else ladders go by kind and name.

    Raises StoreError where no chain has finished.
    """
    subjects = read_subjects(store)
    if not subjects:
        raise StoreError(
            f"{store.path}: no chain has finished yet; a campaign has chains with a metropolis, "
            "replica_exchange or diffusion_chain stage"
        )
    place = {_bare(name): at for at, name in reversed(list(enumerate(order)))}
    names = sorted(
        {name for subject in subjects for name in subject.ladders},
        key=lambda name: (name.rank[0], place.get(name.stage, len(place)), name.rank),
    )
    maps = []
    for name in names:
        thermal = _first_thermal(names, name) if name.kind == DIFFUSION and name.level else None
        if thermal:
            maps.append(_map(subjects, thermal, name, max_rmsd, max_rest))
    return Boltzmann(
        store,
        tuple(subjects),
        tuple(names),
        tuple(maps),
        tuple(_paces(subjects, names)),
        max_rmsd,
        max_rest,
    )


def _bare(stage: str) -> str:
    return re.sub(r"-n?[\d.]+K?$", "", re.sub(r"-r\d+$", "", stage))


# --- the map ----------------------------------------------------------------------------------


def rmsd(one: Floats, other: Floats) -> float:
    """Return the root mean square distance in Å of two geometries (N, 3), laid on each other.

    All atoms count alike, and none is swapped with another.
    """
    return float(np.sqrt(((superpose(one, other) - other) ** 2).sum(axis=1).mean()))


def _mean_geometry(ladder: Ladder) -> Floats | None:
    for rung in ladder.rungs:
        for chain in rung.good:
            if chain.mean_geometry is not None:
                return chain.mean_geometry
    return None


def _match(
    subject: Subject, thermal: Ladder, diffused: Ladder, max_rmsd: float, max_rest: float
) -> Match:
    nan = float("nan")
    shapes = _mean_geometry(thermal), _mean_geometry(diffused)
    apart = rmsd(shapes[1], shapes[0]) if shapes[0] is not None and shapes[1] is not None else nan
    cold = next((rung for rung in diffused.rungs if rung.found.samples), None)
    rest = cold.found.mean + cold.above if cold else nan
    ns, energies = diffused.column("value"), diffused.column("mean")
    slope = thermal.fit.slope if thermal.fit else nan
    fit = diffused.fit
    reason = ""
    if not np.isfinite(rest):
        reason = "there is no undiverged diffusion chain with energies"
    elif apart > max_rmsd:
        reason = f"the minima differ by {apart:.2f} Å, more than {max_rmsd:g} Å"
    elif rest > max_rest:
        reason = f"the lowest n rests {rest:.1f} kcal/mol above the minimum, more than {max_rest:g}"
    elif thermal.fit is None:
        reason = "there are fewer than two temperatures"
    elif slope <= 0:
        reason = "the energy does not rise with the temperature"
    elif fit is None:
        reason = "there are fewer than two diffusion steps"
    mu = mu_error = nan
    temperatures = shared = np.full(len(ns), nan)
    if thermal.fit is not None and slope > 0:
        shared = (energies - thermal.fit.intercept) / slope
        if fit is not None:
            temperatures = (energies - fit.intercept) / slope
            mu = fit.slope / slope
            relative = (fit.slope_error / fit.slope) ** 2 + (thermal.fit.slope_error / slope) ** 2
            mu_error = abs(mu) * float(np.sqrt(relative))
    return Match(subject, reason, apart, rest, ns, temperatures, shared, mu, mu_error)


def _through_origin(products: Floats, squares: Floats, axis: int) -> Floats:
    found: Floats = products.sum(axis=axis) / squares.sum(axis=axis)
    return found


def _map(
    subjects: Sequence[Subject],
    thermal: LadderName,
    diffusion: LadderName,
    max_rmsd: float,
    max_rest: float,
) -> Map:
    matches = tuple(
        _match(s, s.ladders[thermal], s.ladders[diffusion], max_rmsd, max_rest)
        for s in subjects
        if thermal in s.ladders and diffusion in s.ladders
    )
    kept = [match for match in matches if not match.discarded]
    owner = np.array([match.subject.molecule for match in kept], np.intp)
    # Least squares over all molecules, each with an intercept of its own: one term a molecule.
    sums = []
    for match in kept:
        there = np.isfinite(match.temperatures)
        x = match.ns[there] ** 2
        dx = x - x.mean()
        sums.append(
            (
                float(dx @ match.temperatures[there]), float(dx @ dx),
                float(x @ match.shared[there]), float(x @ x),
            )
        )  # fmt: skip
    columns = np.array(sums).reshape(-1, 4).T.copy()
    found = estimate(
        owner,
        {
            "mu": Statistic(_through_origin, (columns[0], columns[1])),
            "shared": Statistic(_through_origin, (columns[2], columns[3])),
        },
    )
    ns = sorted({int(n) for match in kept for n in match.ns})
    temperatures = []
    for n in ns:
        values = [
            (match.subject.molecule, float(t))
            for match in kept
            for t in match.temperatures[match.ns == n]
            if np.isfinite(t)
        ]
        mine = np.array([m for m, _ in values], np.intp)
        temperatures.append(estimate(mine, {"t": mean(np.array([t for _, t in values]))})["t"])
    return Map(
        thermal, diffusion, matches, found["mu"], found["shared"], tuple(ns), tuple(temperatures)
    )


def matched(temperatures: Iterable[float], ns: Iterable[float]) -> list[tuple[float, float]]:
    """Return the pairs (T, n) to compare: the published ones, or the nearest rungs there are.

    Where there is only one of both ladders the other is NaN; where nothing is near a published
    pair, up to four rungs are taken evenly, and paired in their order.
    """
    nan = float("nan")
    hot, steps = sorted(set(temperatures)), sorted(set(ns))
    if not hot and not steps:
        return []
    if not hot or not steps:
        wanted = [t for t, _ in MATCHED] if hot else [float(n) for _, n in MATCHED]
        rungs = hot or steps
        near = [_near(rungs, value) for value in wanted]
        chosen = sorted({v for v in near if np.isfinite(v)})
        if len(chosen) < min(2, len(rungs)):
            chosen = _evenly(rungs)
        return [(value, nan) if hot else (nan, value) for value in chosen]
    pairs: list[tuple[float, float]] = []
    for temperature, n in MATCHED:
        pair = (_near(hot, temperature), _near(steps, float(n)))
        new = all(np.isfinite(pair)) and all(
            pair[0] != t and pair[1] != other for t, other in pairs
        )
        if new:
            pairs.append(pair)
    return pairs or list(zip(_evenly(hot), _evenly(steps), strict=False))


def _near(values: Sequence[float], wanted: float) -> float:
    nearest = min(values, key=lambda value: abs(np.log(value / wanted)))
    return nearest if abs(np.log(nearest / wanted)) <= np.log(_NEAR) else float("nan")


def _evenly(values: Sequence[float]) -> list[float]:
    at = np.unique(np.linspace(0, len(values) - 1, min(_PAIRS, len(values))).round().astype(int))
    return [values[i] for i in at.tolist()]


# --- what the chains say together -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Level:
    """One temperature, or one n, of a ladder over all its molecules; energies in kcal/mol.

    ``mean`` and ``deviation`` are above the ladder's zero. For temperatures ``ratio`` is the mean
    energy above the molecule's minimum over (3N - 6)/2 k_B T, ``within`` the share of molecules
    where the two are within three standard errors, ``worst`` the largest distance in them, and
    ``capacity`` the heat capacity from the variance over (3N - 6)/2 k_B. ``time`` and ``effective``
    are medians, ``r_hat`` is the largest; ``diverged`` counts chains, ``unsettled`` molecules whose
    chains still drift or disagree.
    """

    value: float
    molecules: int
    chains: int
    diverged: int
    mean: Estimate
    deviation: float
    above: float
    ratio: Estimate
    within: float
    worst: float
    capacity: Estimate
    time: float
    effective: float
    r_hat: float
    unsettled: int
    acceptance: float
    swap_acceptance: float


def levels(found: Boltzmann, name: LadderName) -> list[Level]:
    """Return the rungs of a ladder over all molecules, in order."""
    rows: dict[float, list[tuple[Subject, Rung]]] = {}
    for subject, ladder in found.of(name):
        for rung in ladder.rungs:
            rows.setdefault(rung.value, []).append((subject, rung))
    return [_level(value, rows[value], name.thermal) for value in sorted(rows)]


def deviations(subject: Subject, rung: Rung) -> tuple[float, float]:
    """Return the mean energy above the minimum over (3N - 6)/2 k_B T, and its standard error."""
    expected = subject.harmonic * rung.value
    return (rung.found.mean + rung.above) / expected, rung.found.error / expected


def capacity(subject: Subject, rung: Rung) -> float:
    """Return the heat capacity from the variance of the energy, over (3N - 6)/2 k_B."""
    return rung.found.variance / (BOLTZMANN * rung.value**2) / subject.harmonic


def _level(value: float, rows: Sequence[tuple[Subject, Rung]], thermal: bool) -> Level:
    usable = [(s, r) for s, r in rows if r.found.samples]
    owner = np.array([s.molecule for s, _ in usable], np.intp)

    def column(pick: Callable[[Subject, Rung], float], there: bool = True) -> Floats:
        return np.array([pick(s, r) if there else np.nan for s, r in usable], float)

    ratio = column(lambda s, r: deviations(s, r)[0], thermal)
    error = column(lambda s, r: deviations(s, r)[1], thermal)
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.abs(ratio - 1.0) / error
    spread = column(lambda s, r: r.found.deviation)
    many = estimate(
        owner,
        {
            "mean": mean(column(lambda s, r: r.found.mean)),
            "ratio": mean(ratio),
            "capacity": mean(column(capacity, thermal)),
        },
    )
    chains = [chain for _, rung in rows for chain in rung.chains]
    return Level(
        value=value,
        molecules=len(np.unique(owner)),
        chains=len(chains),
        diverged=sum(chain.diverged for chain in chains),
        mean=many["mean"],
        deviation=_mean(spread),
        above=_mean(column(lambda s, r: r.found.mean + r.above)),
        ratio=many["ratio"],
        within=_mean((off <= 3.0)[np.isfinite(off)].astype(float)),
        worst=_largest(off),
        capacity=many["capacity"],
        time=_median(column(lambda s, r: r.time)),
        effective=_median(column(lambda s, r: r.found.effective)),
        r_hat=_largest(column(lambda s, r: r.r_hat)),
        unsettled=int((column(lambda s, r: r.r_hat) > UNSETTLED).sum()),
        acceptance=_mean(column(lambda s, r: r.average("acceptance"))),
        swap_acceptance=_mean(column(lambda s, r: r.average("swap_acceptance"))),
    )


@dataclass(frozen=True, slots=True)
class Swaps:
    """Two neighbouring temperatures of a replica exchange, in K, over its molecules.

    ``accepted`` is the share of all ``tried`` swaps after the burn-in, ``least`` that of the
    molecule where it is smallest.
    """

    temperature: float
    next_temperature: float
    ladders: int
    tried: int
    accepted: float
    least: float


@dataclass(frozen=True, slots=True)
class Trips:
    """How the walkers of a replica exchange got about, and what its processes did meanwhile.

    ``round_trips``: ways from the lowest temperature to the highest and back, of all ``walkers``
    of all ``ladders`` in ``steps`` steps, and ``none`` of the ladders where there was none.
    ``processes``: fewest and most of a ladder; ``efficiency``: mean share of their time that was
    spent in energies.
    """

    ladders: int
    walkers: int
    steps: int
    round_trips: int
    none: int
    processes: tuple[int, int]
    efficiency: float


def exchange_of(found: Boltzmann, name: LadderName) -> tuple[list[Swaps], Trips] | None:
    """Return how the temperatures of a replica exchange swapped; None where nothing tells."""
    # Of each ladder of each molecule, and each repetition of it, the chains in order.
    runs: list[list[tuple[Chain, Exchange]]] = []
    for _, ladder in found.of(name):
        by_repeat: dict[int, list[tuple[Chain, Exchange]]] = {}
        for rung in ladder.rungs:
            for chain in rung.chains:
                if chain.exchange:
                    by_repeat.setdefault(chain.repeat, []).append((chain, chain.exchange))
        runs += by_repeat.values()
    if not runs:
        return None
    pairs: dict[tuple[float, float], list[Exchange]] = {}
    for run in runs:
        for chain, one in run:
            if one.tried:
                pairs.setdefault((chain.temperature, one.next_temperature), []).append(one)
    swaps = [
        Swaps(
            *pair,
            ladders=len(some),
            tried=sum(one.tried for one in some),
            accepted=sum(one.accepted for one in some) / sum(one.tried for one in some),
            least=min(one.accepted / one.tried for one in some),
        )
        for pair, some in sorted(pairs.items())
    ]
    trips = [sum(one.round_trips for _, one in run) for run in runs]
    numbers = [run[0][1].processes for run in runs]
    return swaps, Trips(
        ladders=len(runs),
        walkers=sum(map(len, runs)),
        steps=max(run[0][0].n_steps for run in runs),
        round_trips=sum(trips),
        none=trips.count(0),
        processes=(min(numbers), max(numbers)),
        efficiency=float(np.mean([run[0][1].efficiency for run in runs])),
    )


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _mean(values: Floats) -> float:
    there = _finite(values)
    return float(there.mean()) if len(there) else float("nan")


def _median(values: Floats) -> float:
    there = _finite(values)
    return float(np.median(there)) if len(there) else float("nan")


def _largest(values: Floats) -> float:
    there = _finite(values)
    return float(there.max()) if len(there) else float("nan")


def _geometric(logs: Floats, axis: int) -> Floats:
    found: Floats = np.exp(logs.mean(axis=axis))
    return found


def _paces(subjects: Sequence[Subject], names: Sequence[LadderName]) -> list[Pace]:
    """Compare the other thermal ladders with plain Metropolis of the same level and program."""
    found: list[Pace] = []
    for name in names:
        plain = _first_thermal(names, name)
        if not name.thermal or plain is None or plain == name or plain.kind != METROPOLIS:
            continue
        estimates, molecules = [], 0
        for column in ("effective_per_evaluation", "torsion_effective_per_evaluation"):
            owner, logs = [], []
            for subject in subjects:
                if name not in subject.ladders or plain not in subject.ladders:
                    continue
                for rung in subject.ladders[name].rungs:
                    other = rung_of(subject.ladders[plain], rung.value)
                    # A chain that still drifts has no number of effective samples to speak of.
                    if other is None or not max(rung.r_hat, other.r_hat) <= UNSETTLED:
                        continue
                    values = getattr(rung, column), getattr(other, column)
                    if all(np.isfinite(values)) and min(values) > 0:
                        owner.append(subject.molecule)
                        logs.append(float(np.log(values[0] / values[1])))
            statistic = Statistic(_geometric, (np.array(logs),))
            estimates.append(estimate(np.array(owner, np.intp), {"times": statistic})["times"])
            molecules = max(molecules, len(set(owner)))
        if molecules:
            found.append(Pace(name, molecules, *estimates))
    return found


def torsion_overlap(
    subject: Subject, thermal: LadderName, diffusion: LadderName, pair: tuple[float, float]
) -> Floats:
    """Return the share that each dihedral's distributions at T and at n have in common, (T,)."""
    rungs = (
        rung_of(subject.ladders[thermal], pair[0]) if thermal in subject.ladders else None,
        rung_of(subject.ladders[diffusion], pair[1]) if diffusion in subject.ladders else None,
    )
    angles = [angles_of(rung, len(subject.torsions)) for rung in rungs if rung is not None]
    if len(angles) < 2:
        return np.full(len(subject.torsions), np.nan)
    return np.array([overlap(one, other) for one, other in zip(*angles, strict=True)])
