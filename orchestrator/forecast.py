"""What a campaign would cost: tasks, bundles and core-hours, before anything is started."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from orchestrator import ingest
from orchestrator.campaign import Campaign
from orchestrator.columns import Rows, key_words
from orchestrator.errors import StoreError
from orchestrator.key_index import KeyIndex
from orchestrator.plan import Plan, Root, standing
from orchestrator.sites import Site, batch_scripts
from orchestrator.store import Snapshot, Store
from orchestrator.stream import MAX_ITEMS, Estimate

_SAMPLE_ROWS = 20_000
_BAD_EXAMPLES = 5
_BATCH = 4096


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


@dataclass(slots=True)
class Forecast:
    """A campaign's plan in numbers."""

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


def learned_estimates(snapshot: Snapshot | None, plan: Plan) -> list[Estimate]:
    """Return estimates per stage from a sample of the store's finished tasks."""
    estimates = [Estimate(stage.kernel, stage.frames) for stage in plan.stages]
    if snapshot is None:
        return estimates
    atoms: dict[bytes, int] = {}
    for rows in snapshot.parts("molecules", ["key", "n_atoms"]):
        rows = rows.take(np.arange(min(len(rows), _SAMPLE_ROWS)))
        keys = rows["key"].tobytes()
        atoms.update(
            (keys[16 * i : 16 * i + 16], n) for i, n in enumerate(rows["n_atoms"].tolist())
        )
        if len(atoms) >= _SAMPLE_ROWS:
            break
    seen = 0
    for rows in snapshot.parts("tasks", ["mol_key", "stage", "kernel", "status", "wall_s"]):
        _learn(estimates, plan, rows.take(np.arange(min(len(rows), 4 * _SAMPLE_ROWS))), atoms)
        seen += len(rows)
        if seen >= 4 * _SAMPLE_ROWS:
            break
    return estimates


def _learn(estimates: list[Estimate], plan: Plan, rows: Rows, atoms: dict[bytes, int]) -> None:
    keys = rows["mol_key"].tobytes()
    n_atoms = np.array([atoms.get(keys[16 * i : 16 * i + 16], 0) for i in range(len(rows))])
    ok = rows["status"].equals("ok")
    if not plan.from_noise:
        ok &= n_atoms > 0
    for stage in plan.stages:
        mine = ok & rows["kernel"].equals(stage.label)
        # The same program on another level, or on paths of another length, tells less.
        own = mine & rows["stage"].equals(stage.name)
        mine = own if own.any() else mine
        if mine.any():
            wall = rows["wall_s"][mine].astype(np.float32)
            estimates[stage.index].learn(n_atoms[mine].astype(np.int64), wall)


@dataclass(slots=True)
class _Read:
    """What the molecule files were found to hold."""

    entries: int = 0
    bad: int = 0
    molecules: int = 0
    repeated: int = 0
    examples: list[str] = field(default_factory=list)


def _roots_of_files(campaign: Campaign, plan: Plan, read: _Read) -> Iterator[list[Root]]:
    """Read the molecule files; yield roots in lists, and count into ``read``."""
    from orchestrator.molecules import find_files, read_entries

    files = find_files(campaign.molecules, campaign.path.parent)
    seen = KeyIndex()
    roots: list[Root] = []
    for entry in read_entries(files, campaign.molecules):
        read.entries += 1
        molecule = entry.molecule
        problem = str(entry.error) if molecule is None else ingest.unfit(entry, plan.from_files)
        if molecule is None or problem:
            read.bad += 1
            if read.bad <= _BAD_EXAMPLES:
                read.examples.append(f"{entry.source}, line {entry.line}: {problem}")
            continue
        key = origin = ingest.molecule_key(molecule, entry.name)
        new = seen.add(*key_words(key))
        read.molecules += new
        if plan.from_files and entry.positions is not None:
            origin = ingest.geometry_key(key, entry.positions)
            new = seen.add(*key_words(origin))
        if not new:
            read.repeated += 1
            continue
        n = len(molecule.numbers)
        charge, multiplicity = molecule.charge, molecule.multiplicity
        roots.append(Root(key, origin, molecule.smiles, charge, multiplicity, n))
        if len(roots) == _BATCH:
            yield roots
            roots = []
    yield roots
    if read.bad > _BAD_EXAMPLES:
        read.examples.append(f"... and {read.bad - _BAD_EXAMPLES} more")


def forecast(campaign: Campaign, site: Site) -> Forecast:
    """Return what a campaign would take on a site; reads, and starts nothing."""
    plan = Plan(campaign)
    site.require_pools(campaign.pools)
    snapshot: Snapshot | None = None
    index = KeyIndex()
    try:
        snapshot = Store(campaign.store).snapshot()
        index = snapshot.task_index()
    except StoreError:
        if (campaign.store / "campaign.json").exists():
            raise
    estimates = learned_estimates(snapshot, plan)
    n = len(plan.stages)
    planned, done, left_s = [0] * n, [0] * n, [0.0] * n
    per_root = plan.tasks_per_root()
    read = _Read()
    for roots in _roots_of_files(campaign, plan, read):
        stand = standing(plan, roots, index)
        for i, estimate in enumerate(estimates):
            if not stand.planned[i]:
                continue
            finished = stand.ok[i] + stand.failed[i] + stand.upstream[i]
            share = 1 - finished / stand.planned[i]
            planned[i] += stand.planned[i]
            done[i] += finished
            left_s[i] += share * per_root[i] * sum(estimate.seconds(r.n_atoms) for r in roots)
    workers = site.pools()
    stages: list[StageForecast] = []
    pool_s = dict.fromkeys(workers, 0.0)
    for i, stage in enumerate(plan.stages):
        pool_s[stage.pool] += left_s[i]
        by_time = math.ceil(left_s[i] / campaign.run.bundle_time)
        stages.append(
            StageForecast(
                stage=stage.name,
                what=stage.words,
                pool=stage.pool,
                tasks=planned[i],
                done=done[i],
                bundles=max(by_time, math.ceil((planned[i] - done[i]) / MAX_ITEMS)),
                core_hours=left_s[i] / 3600,
            )
        )
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
        wall_s=max(s / workers[pool] for pool, s in pool_s.items()),
        workers=workers,
        estimates_from=(
            "finished tasks of this store" if measured else "figures measured on another machine"
        ),
        bad_examples=read.examples,
        batch_scripts=batch_scripts(site),
    )
