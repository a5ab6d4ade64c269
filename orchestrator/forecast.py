"""What a campaign would cost: tasks, bundles and core-hours, before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from orchestrator import ingest
from orchestrator.campaign import Campaign
from orchestrator.columns import Rows
from orchestrator.errors import StoreError
from orchestrator.key_index import KeyIndex
from orchestrator.plan import Plan, Root, standing
from orchestrator.sites import Site, batch_scripts
from orchestrator.store import Snapshot, Store
from orchestrator.stream import MAX_ITEMS, Estimate

_SAMPLE_ROWS = 20_000
_BAD_EXAMPLES = 5


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
    estimates = [Estimate(stage.kernel) for stage in plan.stages]
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
    for rows in snapshot.parts("tasks", ["mol_key", "kernel", "status", "wall_s"]):
        _learn(estimates, plan, rows.take(np.arange(min(len(rows), 4 * _SAMPLE_ROWS))), atoms)
        seen += len(rows)
        if seen >= 4 * _SAMPLE_ROWS:
            break
    return estimates


def _learn(estimates: list[Estimate], plan: Plan, rows: Rows, atoms: dict[bytes, int]) -> None:
    keys = rows["mol_key"].tobytes()
    n_atoms = np.array([atoms.get(keys[16 * i : 16 * i + 16], 0) for i in range(len(rows))])
    ok = rows["status"].equals("ok") & (n_atoms > 0)
    for stage in plan.stages:
        mine = ok & rows["kernel"].equals(stage.label)
        if mine.any():
            wall = rows["wall_s"][mine].astype(np.float32)
            estimates[stage.index].learn(n_atoms[mine].astype(np.int64), wall)


def _roots_of_files(campaign: Campaign, plan: Plan) -> tuple[list[Root], int, int, list[str]]:
    """Read the molecule files; return roots, number of entries, bad ones, and examples of those."""
    from orchestrator.molecules import find_files, read_entries

    files = find_files(campaign.molecules, campaign.path.parent)
    seen = KeyIndex()
    roots: list[Root] = []
    examples: list[str] = []
    entries = bad = 0
    for entry in read_entries(files, campaign.molecules):
        entries += 1
        molecule = entry.molecule
        flat = plan.from_files and entry.positions is None
        if molecule is None or flat:
            bad += 1
            if bad <= _BAD_EXAMPLES:
                why = entry.error or "no 3D geometry, and the first stage needs one"
                examples.append(f"{entry.source}, line {entry.line}: {why}")
            continue
        key = ingest.molecule_key(molecule)
        origin = key
        if plan.from_files and entry.positions is not None:
            origin = ingest.geometry_key(key, entry.positions)
        hi, lo = int.from_bytes(origin[:8], "big"), int.from_bytes(origin[8:], "big")
        if seen.add(hi, lo):
            n = len(molecule.numbers)
            charge, multiplicity = molecule.charge, molecule.multiplicity
            roots.append(Root(key, origin, molecule.smiles, charge, multiplicity, n))
    if bad > _BAD_EXAMPLES:
        examples.append(f"... and {bad - _BAD_EXAMPLES} more")
    return roots, entries, bad, examples


def _what(settings: dict[str, object], kernel: str) -> str:
    if kernel == "relax":
        return (
            f"{settings['level']}/{settings['program']}, {settings['optimizer']} to "
            f"{settings['fmax']:g} eV/Å"
        )
    return {"embed": "ETKDGv3", "mmff": "MMFF94, else UFF"}.get(kernel, kernel)


def forecast(campaign: Campaign, site: Site) -> Forecast:
    """Return what a campaign would take on a site; reads, and starts nothing."""
    plan = Plan(campaign)
    site.require_pools({stage.pool for stage in plan.stages})
    snapshot: Snapshot | None = None
    index = KeyIndex()
    try:
        snapshot = Store(campaign.store).snapshot()
        index = snapshot.task_index()
    except StoreError:
        if (campaign.store / "campaign.json").exists():
            raise
    roots, entries, bad, examples = _roots_of_files(campaign, plan)
    estimates = learned_estimates(snapshot, plan)
    stand = standing(plan, roots, index)
    workers = site.pools()
    stages: list[StageForecast] = []
    pool_s = dict.fromkeys(workers, 0.0)
    per_root = [stage.conformers if stage.parent < 0 else 0 for stage in plan.stages]
    for stage in plan.stages:
        if stage.parent >= 0:
            per_root[stage.index] = per_root[stage.parent]
        i = stage.index
        per_task = [estimates[i].seconds(root.n_atoms) for root in roots]
        full_s = sum(per_task) * per_root[i]
        done = stand.ok[i] + stand.failed[i] + stand.upstream[i]
        left_s = full_s * (1 - done / stand.planned[i]) if stand.planned[i] else 0.0
        left = stand.planned[i] - done
        pool_s[stage.pool] += left_s
        bundles = max(math.ceil(left_s / campaign.run.bundle_time), math.ceil(left / MAX_ITEMS))
        stages.append(
            StageForecast(
                stage.name,
                _what(stage.settings, stage.kernel),
                stage.pool,
                stand.planned[i],
                done,
                bundles,
                left_s / 3600,
            )
        )
    measured = any(estimate.measured for estimate in estimates)
    return Forecast(
        campaign=campaign.name,
        site=site.name,
        entries=entries,
        molecules=len({root.mol_key for root in roots}),
        duplicates=entries - bad - len(roots),
        bad=bad,
        stages=stages,
        core_hours=sum(pool_s.values()) / 3600,
        wall_s=max(s / workers[pool] for pool, s in pool_s.items()),
        workers=workers,
        estimates_from=(
            "finished tasks of this store" if measured else "figures measured on another machine"
        ),
        bad_examples=examples,
        batch_scripts=batch_scripts(site),
    )
