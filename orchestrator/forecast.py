"""What a campaign would cost: tasks, bundles and core-hours, before anything is started.

Every entry of the molecule files is read where there are not too many; where the store has read
them already, its plan is counted. Of more than that the entries are counted, and the rest is
estimated from a sample drawn at random over all of them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kernels.calculators import DFT_LEVELS
from orchestrator import block, dft_cost, ingest
from orchestrator.campaign import Campaign
from orchestrator.columns import Rows, key_array
from orchestrator.errors import StoreError
from orchestrator.key_index import KeyIndex
from orchestrator.memory import USABLE
from orchestrator.plan import Plan
from orchestrator.sites import Site, batch_scripts
from orchestrator.store import Snapshot, Store
from orchestrator.stream import MAX_ITEMS, Estimate
from orchestrator.tally import Tally, tally

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.molecules import Entry, Record

EXACT_ENTRIES = 250_000
SAMPLE = 50_000
_SAMPLE_ROWS = 20_000
_BAD_EXAMPLES = 5
_BATCH = 4096
# An idle block is given back after about so long.
_IDLE_S = 60.0
_95_PERCENT = 1.96


@dataclass(frozen=True, slots=True)
class StageForecast:
    """One stage: tasks planned, done already, and what the rest would take."""

    stage: str
    what: str
    pool: str
    tasks: int
    done: int
    bundles: int
    core_hours: float


@dataclass(frozen=True, slots=True)
class PoolForecast:
    """One pool: the nodes, workers and blocks that the rest can use at once, and for how long.

    ``blocks`` counts all that are submitted, one after another where a block's ``walltime_s``
    (None: no limit) ends first. ``node_hours`` are those of whole nodes, with the minute for which
    each block of a batch system is idle at its end.
    """

    pool: str
    nodes: int
    workers: int
    blocks: int
    walltime_s: float | None
    node_hours: float
    wall_s: float


@dataclass(slots=True)
class Forecast:
    """A campaign's plan in numbers.

    ``sampled``: entries that were looked at where not all were, 0 where all were; ``margins`` then
    holds the half widths of the 95 % intervals of bad, duplicates, molecules and core_hours.
    ``workers``: what the site has, by pool. ``warnings``: what will not go as wished, and why.
    """

    campaign: str
    site: str
    entries: int
    molecules: int
    duplicates: int
    bad: int
    stages: list[StageForecast]
    core_hours: float
    wall_s: float
    workers: dict[str, int]
    estimates_from: str
    bad_examples: list[str] = field(default_factory=list)
    batch_scripts: dict[str, str] = field(default_factory=dict)
    pools: list[PoolForecast] = field(default_factory=list)
    node_hours: float = 0.0
    sampled: int = 0
    margins: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def learned_estimates(snapshot: Snapshot | None, plan: Plan) -> list[Estimate]:
    """Return estimates per stage from a sample of the store's finished tasks."""
    estimates = [
        Estimate(
            stage.kernel,
            stage.computed,
            stage.settings.get("level", ""),
            stage.settings.get("initial_hessian", "unit"),
        )
        for stage in plan.stages
    ]
    for stage in plan.stages:
        if stage.leader >= 0:
            estimates[stage.index] = estimates[stage.leader]
    if snapshot is None:
        return estimates
    known: dict[bytes, tuple[int, str]] = {}
    # Basis functions follow from the SMILES, which are long to read.
    columns = ["key", "n_atoms", *(["smiles"] if _has_dft(plan) else [])]
    for rows in snapshot.parts("molecules", columns):
        rows = rows.take(np.arange(min(len(rows), _SAMPLE_ROWS)))
        keys = rows["key"].tobytes()
        smiles = rows["smiles"].strings() if "smiles" in columns else [""] * len(rows)
        found = zip(rows["n_atoms"].tolist(), smiles, strict=True)
        known.update((keys[16 * i : 16 * i + 16], molecule) for i, molecule in enumerate(found))
        if len(known) >= _SAMPLE_ROWS:
            break
    seen = 0
    for rows in snapshot.parts("tasks", ["mol_key", "stage", "kernel", "status", "wall_s"]):
        _learn(estimates, plan, rows.take(np.arange(min(len(rows), 4 * _SAMPLE_ROWS))), known)
        seen += len(rows)
        if seen >= 4 * _SAMPLE_ROWS:
            break
    return estimates


def _learn(
    estimates: list[Estimate], plan: Plan, rows: Rows, known: dict[bytes, tuple[int, str]]
) -> None:
    keys = rows["mol_key"].tobytes()
    molecules = [known.get(keys[16 * i : 16 * i + 16], (0, "")) for i in range(len(rows))]
    ok = rows["status"].equals("ok")
    if not plan.from_noise:
        ok &= np.array([n_atoms > 0 for n_atoms, _ in molecules], bool)
    for stage in plan.stages:
        mine = ok & rows["kernel"].equals(stage.label)
        # The same program on another level, or on paths of another length, tells less.
        own = mine & rows["stage"].equals(stage.name)
        mine = own if own.any() else mine
        if mine.any():
            wall = rows["wall_s"][mine].astype(np.float32)
            estimate = estimates[stage.index]
            sizes = [estimate.size(*molecules[i]) for i in np.flatnonzero(mine).tolist()]
            estimate.learn(np.array(sizes, np.int64), wall)


@dataclass(slots=True)
class _Read:
    """What the molecule files hold: numbers of entries, and seconds of work per stage (S,).

    ``functions``: basis functions of the largest molecule, where a stage computes DFT.
    """

    counts: Tally
    left_s: NDArray[np.float64]
    entries: int = 0
    bad: int = 0
    molecules: int = 0
    repeated: int = 0
    examples: list[str] = field(default_factory=list)
    sampled: int = 0
    margins: dict[str, float] = field(default_factory=dict)
    functions: int = 0


@dataclass(slots=True)
class _Understood:
    """Some entries: origins (K, 2), molecules (K, 2) and sizes (K, 2) of the good ones.

    A molecule's sizes are its atoms and its basis functions; without DFT nobody asks for those.
    """

    origins: NDArray[np.uint64]
    molecules: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    bad: list[str]


def _has_dft(plan: Plan) -> bool:
    return any(stage.settings.get("level") in DFT_LEVELS for stage in plan.stages)


def _sizes(molecules: Iterable[tuple[int, str]], plan: Plan) -> NDArray[np.int64]:
    """Return atoms and basis functions (K, 2) of molecules given by atoms and SMILES."""
    has_dft = _has_dft(plan)
    sizes = [(n, dft_cost.n_functions(s, n) if has_dft and n else 0) for n, s in molecules]
    return np.array(sizes, np.int64).reshape(-1, 2)


def _understood(entries: list[Entry], plan: Plan) -> _Understood:
    bad: list[str] = []
    molecules: list[bytes] = []
    origins: list[bytes] = []
    sizes: list[tuple[int, str]] = []
    for entry in entries:
        molecule = entry.molecule
        problem = str(entry.error) if molecule is None else ingest.unfit(entry, plan.from_files)
        if molecule is None or problem:
            bad.append(f"{entry.source}, line {entry.line}: {problem}")
            continue
        key = origin = ingest.molecule_key(molecule, entry.name)
        if plan.from_files and entry.positions is not None:
            origin = ingest.geometry_key(key, entry.positions)
        molecules.append(key)
        origins.append(origin)
        sizes.append((len(molecule.numbers), molecule.smiles))
    return _Understood(key_array(origins), key_array(molecules), _sizes(sizes, plan), bad)


class _Reckoner:
    """Adds up what is to be done for origins of tasks."""

    def __init__(self, plan: Plan, index: KeyIndex, estimates: list[Estimate]) -> None:
        self.plan = plan
        self._index = index
        self._estimates = estimates
        self._per_root = plan.tasks_per_root()

    def empty(self) -> _Read:
        return _Read(Tally.of(self.plan), np.zeros(len(self.plan.stages)))

    def add(
        self, read: _Read, origins: NDArray[np.uint64], sizes: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Count origins (K, 2) of molecules of sizes (K, 2) into ``read``.

        Return the seconds (K,) of each, done or not.
        """
        counts = tally(self.plan, origins, self._index)
        read.counts += counts
        seconds: NDArray[np.float64] = np.zeros(len(origins))
        read.functions = max(read.functions, int(sizes[:, 1].max(initial=0)))
        for s, estimate in enumerate(self._estimates):
            own, at = np.unique(sizes[:, int(estimate.dft)], return_inverse=True)
            each = np.array([estimate.seconds(n) for n in own.tolist()])[at] * self._per_root[s]
            seconds += each
            if counts.planned[s]:
                share = 1 - counts.finished[s] / counts.planned[s]
                read.left_s[s] += share * each.sum()
        return seconds


def _examples(read: _Read, found: list[str]) -> None:
    read.bad += len(found)
    read.examples += found[: max(0, _BAD_EXAMPLES - len(read.examples))]


def _from_store(folder: Path, reckoner: _Reckoner) -> _Read:
    """Count the plan that a run has made of the same files."""
    plan, read = reckoner.plan, reckoner.empty()
    seen = KeyIndex()
    for chunk in ingest.chunks(folder):
        read.entries += chunk.stop - chunk.start
        origins, n_atoms = ingest.read_origins(chunk, plan)
        if _has_dft(plan):
            roots = ingest.read_roots(chunk, plan)
            sizes = _sizes(((root.n_atoms, root.smiles) for root in roots), plan)
        else:
            sizes = np.stack([n_atoms, np.zeros_like(n_atoms)], axis=1)
        reckoner.add(read, origins, sizes)
        read.repeated += chunk.stop - chunk.start - chunk.bad - len(origins)
        molecules = ingest.read_molecule_keys(chunk) if plan.from_files else origins
        read.molecules += int(seen.add_all(molecules).sum()) if plan.from_files else len(origins)
        if chunk.bad:
            wanted = _BAD_EXAMPLES - len(read.examples)
            read.examples += ingest.bad_entries(chunk, wanted) if wanted > 0 else []
            read.bad += chunk.bad
    return read


def _from_entries(entries: Iterator[Entry], reckoner: _Reckoner) -> _Read:
    plan, read = reckoner.plan, reckoner.empty()
    seen = KeyIndex()
    for batch in iter(lambda: list(itertools.islice(entries, _BATCH)), []):
        found = _understood(batch, plan)
        _examples(read, found.bad)
        new = seen.add_all(found.molecules)
        read.molecules += int(new.sum())
        if plan.from_files:
            new = seen.add_all(found.origins)
        reckoner.add(read, found.origins[new], found.sizes[new])
        read.repeated += int((~new).sum())
        read.entries += len(batch)
    return read


def draw(records: Iterator[Record], size: int) -> tuple[int, list[Record]]:
    """Count records, and draw ``size`` of them at random, each as likely as any other.

    Li, ACM Trans. Math. Softw. 20, 481 (1994), algorithm L; always the same ones of a file.
    """
    dice = random.Random(0)
    drawn = list(itertools.islice(records, size))
    count = len(drawn)
    if count < size:
        return count, drawn
    weight = 1.0
    while True:
        weight *= math.exp(math.log(1.0 - dice.random()) / size)
        skip = int(math.log(1.0 - dice.random()) / math.log1p(-weight))
        for record in itertools.islice(records, skip + 1):
            count += 1
            last = record
            skip -= 1
        if skip >= 0:
            break
        drawn[dice.randrange(size)] = last
    drawn.sort(key=lambda record: (record.source, record.line))
    return count, drawn


def distinct(total: int, sample: int, seen: Counter[int]) -> tuple[float, float]:
    """Estimate how many kinds there are among ``total``, and half the 95 % interval's width.

    ``seen[k]`` kinds came k times in a sample drawn without replacement. The larger of two lower
    bounds is given: every pair of a kind counted as one repetition, exact where no kind comes more
    than twice; and that of Chao and Lin (Biometrics 68, 912, 2012), exact where all come equally
    often.
    """
    kinds = sum(seen.values())
    if sample < 2 or sample >= total:
        return float(kinds), 0.0
    share = sample / total
    pairs = sum(n * math.comb(times, 2) for times, n in seen.items())
    # With none found, three could still have been expected.
    spread = _95_PERCENT * math.sqrt(pairs) if pairs else 3.0
    each = math.comb(total, 2) / math.comb(sample, 2)

    def chao_lin(once: float, twice: float) -> float:
        unseen = 2 * twice * sample / (sample - 1) + share / (1 - share) * once
        return kinds + (once * once / unseen if unseen else 0.0)

    by_pairs, bound = total - pairs * each, chao_lin(seen[1], seen[2])
    if by_pairs >= bound:
        return by_pairs, spread * each
    by_once = bound - chao_lin(seen[1] + math.sqrt(max(seen[1], 1)), seen[2])
    by_twice = bound - chao_lin(seen[1], seen[2] + math.sqrt(max(seen[2], 1)))
    return bound, _95_PERCENT * math.hypot(by_once, by_twice)


def _kinds(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], Counter[int]]:
    """Return where each different key (K, 2) comes first, and how many come how often."""
    _, first, times = np.unique(keys, axis=0, return_index=True, return_counts=True)
    return np.sort(first), Counter(times.tolist())


def _from_sample(total: int, entries: list[Entry], reckoner: _Reckoner) -> _Read:
    """Estimate from entries drawn at random from ``total``."""
    plan, read = reckoner.plan, reckoner.empty()
    n = len(entries)
    found = _understood(entries, plan)
    _examples(read, found.bad)
    first, origins_seen = _kinds(found.origins)
    seconds = reckoner.add(read, found.origins[first], found.sizes[first])
    share_bad = read.bad / n
    good = total - round(total * share_bad)
    origins, origins_margin = distinct(good, len(found.origins), origins_seen)
    molecules, molecules_margin = distinct(good, len(found.origins), _kinds(found.molecules)[1])
    scale = origins / max(len(first), 1)
    read.counts.scale(scale)
    # What is left, of all that is planned, is known no better than that is.
    relative = origins_margin / max(origins, 1.0)
    if len(first) > 1 and seconds.any():
        relative += _95_PERCENT * float(np.std(seconds) / np.mean(seconds)) / math.sqrt(len(first))
    read.left_s *= scale
    read.entries, read.sampled = total, n
    read.bad = total - good
    read.molecules = round(molecules)
    read.repeated = good - round(origins)
    bad_margin = _95_PERCENT * math.sqrt(max(share_bad * (1 - share_bad), 1 / n) / n) * total
    read.margins = {
        "bad": bad_margin,
        "duplicates": origins_margin,
        "molecules": molecules_margin + bad_margin,
        "core_hours": relative * float(read.left_s.sum()) / 3600,
    }
    return read


def _read(campaign: Campaign, store: Store | None, reckoner: _Reckoner, *, exact: bool) -> _Read:
    from orchestrator.molecules import (
        find_files,
        is_picky,
        read_entries,
        read_records,
        sources_digest,
    )
    from orchestrator.reading import Reading, processes

    source = campaign.molecules
    files = find_files(source, campaign.path.parent)
    if store is not None:
        folder = ingest.plan_folder(store, sources_digest(files, source))
        if ingest.is_complete(folder):
            return _from_store(folder, reckoner)
    with Reading(processes()) as reading:
        # What a picky source takes is known only once it has been read.
        if files and not exact and not is_picky(source):
            records = itertools.islice(read_records(files, source), source.limit)
            total, drawn = draw(records, SAMPLE)
            if total > EXACT_ENTRIES:
                return _from_sample(total, list(reading.entries(iter(drawn))), reckoner)
        entries = read_entries(files, source, understand=reading.entries)
        return _from_entries(entries, reckoner)


def _pool(site: Site, pool: str, left_s: float, bundles: int) -> PoolForecast:
    """Reckon a pool's share, of which ``bundles`` at most can run at once."""
    nodes, per_node = site.nodes()[pool], site.workers_per_node()[pool]
    walltime = site.walltime_s()[pool]
    executor: Any = next(e for e in site.config.executors if e.label == pool)
    per_block = max(1, int(executor.provider.nodes_per_block))
    useful = math.ceil(bundles / (per_block * per_node))
    at_once = max(1, min(nodes // per_block, useful))
    workers = at_once * per_block * per_node
    if not bundles:
        return PoolForecast(pool, 0, 0, 0, walltime, 0.0, 0.0)
    wall_s = left_s / workers
    blocks = at_once * max(1, math.ceil(wall_s / walltime)) if walltime else at_once
    idle_s = blocks * per_block * _IDLE_S if walltime else 0.0
    node_s = at_once * per_block * wall_s + idle_s
    return PoolForecast(pool, at_once * per_block, workers, blocks, walltime, node_s / 3600, wall_s)


def _node_memory(site: Site, pool: str) -> int | None:
    """Return the bytes of memory of a pool's nodes; None where nobody says."""
    if site.settings is not None:
        return site.settings.pools[pool].memory
    executor: Any = next(e for e in site.config.executors if e.label == pool)
    local = type(executor.provider).__name__ == "LocalProvider"
    return block.memory() if local else None


def memory_warnings(plan: Plan, site: Site, functions: int) -> list[str]:
    """Say where DFT of a molecule of so many basis functions takes more memory than there is."""
    found: dict[str, str] = {}
    for stage in plan.stages:
        if stage.settings.get("level") not in DFT_LEVELS or not functions:
            continue
        needed = dft_cost.memory(functions, str(stage.settings["program"]))
        size = f"the largest molecule's {functions} basis functions take about {needed / 1e9:.1f}"
        if needed > stage.memory_limit:
            found[f"limit {stage.memory_limit}"] = (
                f"stage {stage.name!r}: {size} GB; its memory_limit is "
                f"{stage.memory_limit / 1e9:.1f} GB: raise it to {math.ceil(needed / 1e9)} GB"
            )
        workers, whole = site.workers_per_node()[stage.pool], _node_memory(site, stage.pool)
        room = workers if whole is None else max(1, int(USABLE * whole / needed))
        if whole is not None and room < workers:
            remedy = f"--workers {room}"
            if site.settings is not None:
                remedy = f"workers_per_node = {room} in [pools.{stage.pool}]"
            found.setdefault(
                f"pool {stage.pool}",
                f"stage {stage.name!r}: {size} GB each: of the {workers} workers on a node of pool "
                f"{stage.pool!r}, which has {whole / 1e9:.0f} GB, {room} can compute such ones at "
                f"once, and the others wait; {remedy} leaves no core idle",
            )
    return list(found.values())


def forecast(campaign: Campaign, site: Site, *, exact: bool = False) -> Forecast:
    """Return what a campaign would take on a site; reads, and starts nothing.

    ``exact`` has every entry read, however many there are.
    """
    plan = Plan(campaign)
    site.require_pools(campaign.pools)
    store: Store | None = None
    snapshot: Snapshot | None = None
    index = KeyIndex()
    try:
        store = Store(campaign.store)
        snapshot = store.snapshot()
        index = snapshot.task_index()
    except StoreError:
        if (campaign.store / "campaign.json").exists():
            raise
    estimates = learned_estimates(snapshot, plan)
    read = _read(campaign, store, _Reckoner(plan, index, estimates), exact=exact)
    if (more := read.bad - len(read.examples)) > 0:
        read.examples.append(f"... and {'about ' if read.sampled else ''}{more:,} more")
    stages: list[StageForecast] = []
    pool_s: defaultdict[str, float] = defaultdict(float)
    pool_bundles: Counter[str] = Counter()
    for i, stage in enumerate(plan.stages):
        left_s = float(read.left_s[i])
        planned, done = int(read.counts.planned[i]), int(read.counts.finished[i])
        by_time = math.ceil(left_s / campaign.run.bundle_time)
        bundles = max(by_time, math.ceil((planned - done) / MAX_ITEMS))
        # One chain or path is one item, however long it takes.
        bundles = min(bundles, planned - done)
        pool_s[stage.pool] += left_s
        pool_bundles[stage.pool] += bundles
        stages.append(
            StageForecast(
                stage=stage.name,
                what=stage.words,
                pool=stage.pool,
                tasks=planned,
                done=done,
                bundles=bundles,
                core_hours=left_s / 3600,
            )
        )
    pools = [_pool(site, pool, pool_s[pool], pool_bundles[pool]) for pool in sorted(pool_s)]
    measured = any(estimate.measured for estimate in estimates)
    return Forecast(
        campaign=campaign.name,
        site=site.name,
        entries=read.entries,
        molecules=read.molecules,
        duplicates=read.repeated,
        bad=read.bad,
        stages=stages,
        core_hours=sum(pool_s.values()) / 3600,
        wall_s=max((pool.wall_s for pool in pools), default=0.0),
        workers=site.pools(),
        estimates_from=(
            "finished tasks of this store" if measured else "figures measured on another machine"
        ),
        bad_examples=read.examples,
        batch_scripts=batch_scripts(site),
        pools=pools,
        node_hours=sum(pool.node_hours for pool in pools),
        sampled=read.sampled,
        margins=read.margins,
        warnings=memory_warnings(plan, site, read.functions),
    )
