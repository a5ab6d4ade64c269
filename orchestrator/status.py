"""How a campaign stands, and why a task is not done: answered from the store alone."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator import ingest, lock, manifest, progress
from orchestrator.campaign import Campaign
from orchestrator.columns import Rows, key_array, key_bytes
from orchestrator.counts import StageCounts
from orchestrator.errors import StoreError
from orchestrator.plan import Plan, Root
from orchestrator.schema import STATUSES
from orchestrator.store import Snapshot, Store
from orchestrator.tally import Tally, plan_digest, tally, with_task

# More than these take longer to count than one would wait for.
COUNTED_TASKS = 500_000
# A driver writes its progress every few seconds; a busy file system may take its time.
_DRIVER_WRITES_S = 60.0


@dataclass(slots=True)
class Standing:
    """How the planned tasks of a campaign stand in a store.

    ``as_of``: when the driver counted them (epoch, s), None where they were counted now;
    ``current``: whether nothing can have changed since.
    """

    counts: list[StageCounts]
    entries: int
    bad_entries: int
    plan_complete: bool
    failures: dict[str, int]
    problems: dict[str, str]
    as_of: float | None = None
    current: bool = True


def _digest(campaign: Campaign) -> str:
    from orchestrator.molecules import find_files, sources_digest

    files = find_files(campaign.molecules, campaign.path.parent)
    return sources_digest(files, campaign.molecules)


def current_plan_folder(campaign: Campaign, store: Store) -> Path:
    """Return the folder of the plan made from the campaign's present molecule files."""
    return ingest.plan_folder(store, _digest(campaign))


def stand(campaign: Campaign, store: Store, *, exact: bool = False) -> Standing:
    """Say how everything planned stands; nothing is changed.

    While a driver runs, and where nothing was sealed since the last one left, the driver's own
    counts are given; of more than `COUNTED_TASKS` tasks also those that a killed driver wrote last,
    some seconds before its end. Otherwise, or with ``exact``, all tasks are counted now.
    """
    plan = Plan(campaign)
    digest = _digest(campaign)
    if not exact and (told := _told_by_driver(store, plan, digest)) is not None:
        return told
    folder = ingest.plan_folder(store, digest)
    snapshot, index = store.consistent(lambda snapshot: (snapshot, snapshot.task_index()))
    total = Tally.of(plan)
    entries = bad = 0
    for chunk in ingest.chunks(folder):
        entries += chunk.stop - chunk.start
        bad += chunk.bad
        total += tally(plan, ingest.read_origins(chunk, plan)[0], index)
    columns = (total.planned, total.ok, total.failed, total.upstream)
    waiting = total.planned - total.finished
    counts = [
        StageCounts(stage.name, *(int(column[stage.index]) for column in (*columns, waiting)))
        for stage in plan.stages
    ]
    failures = {STATUSES[code]: count for code, count in total.failures.items()}
    if bad:
        failures["input"] = failures.get("input", 0) + bad
    return Standing(counts, entries, bad, ingest.is_complete(folder), failures, snapshot.problems)


def _told_by_driver(store: Store, plan: Plan, digest: str) -> Standing | None:
    """Return what the driver's progress says, where that is as good as counting."""
    last = progress.read(store.path)
    if last is None or last.digest != digest or last.plan != plan_digest(plan):
        return None
    if not last.entries:
        return None  # a driver that has not looked at its plan yet
    running = lock.is_running(store.path) and lock.who(store.path).get("run_id") == last.run_id
    current = running and time.time() - last.time_s < _DRIVER_WRITES_S
    current = current or (last.ended and _changed_s(store) <= last.time_s)
    if not current and sum(stage.planned for stage in last.stages) <= COUNTED_TASKS:
        return None
    return Standing(
        last.stages,
        last.entries,
        last.bad_entries,
        last.plan_complete,
        last.failures,
        dict(manifest.newest(store.path / "manifest").quarantine),
        last.time_s,
        current,
    )


def _changed_s(store: Store) -> float:
    """Return when the store last got a shard, a chunk of a plan, or a manifest (epoch, s)."""
    folders = [store.path / "manifest"]
    for name in ("inbox", "plan"):
        folders += [Path(entry.path) for entry in os.scandir(store.path / name) if entry.is_dir()]
    return max(folder.stat().st_mtime for folder in folders)


def _find_root(
    campaign: Campaign, store: Store, plan: Plan, what: str
) -> tuple[list[Root], bytes | None]:
    """Return the roots that a SMILES or a key (or the start of one) points at, and the key."""
    folder = current_plan_folder(campaign, store)
    wanted_key: bytes | None = None
    mol_keys: set[bytes] = set()
    text = what.strip().lower()
    if len(text) >= 6 and set(text) <= set("0123456789abcdef"):
        low, high = (key_array([bytes.fromhex((text + pad * 32)[:32])])[0] for pad in ("0", "f"))
        columns = {"tasks": ["key", "mol_key"], "chains": ["key", "mol_key", "task_key"]}
        for name in ("tasks", "chains", "molecules"):
            rows = store.read(name, columns.get(name, ["key"]))
            keys = rows["key"]
            hit = (keys[:, 0] >= low[0]) & (keys[:, 0] <= high[0])
            if len(text) > 16:
                hit &= (keys[:, 1] >= low[1]) & (keys[:, 1] <= high[1])
            for row in np.flatnonzero(hit).tolist():
                owner = rows["mol_key"][row] if name in columns else keys[row]
                if name in columns:
                    # Of the chains of a replica exchange, the task that made them all.
                    made = rows["task_key"] if name == "chains" else keys
                    wanted_key = key_bytes(made[row])
                mol_keys.add(key_bytes(owner))
        if not mol_keys and len(text) == 32:
            wanted_key = bytes.fromhex(text)
    if not mol_keys and wanted_key is None and plan.from_noise:
        # Molecules made from noise have a name and no SMILES.
        rows = store.read("molecules", ["key", "name"])
        named = [i for i, name in enumerate(rows["name"].strings()) if name == what.strip()]
        mol_keys.update(key_bytes(rows["key"][i]) for i in named)
    if not mol_keys and wanted_key is None:
        from kernels.errors import KernelError
        from kernels.graph import parse_smiles

        try:
            mol_keys.add(ingest.molecule_key(parse_smiles(what)))
        except KernelError as exc:
            raise StoreError(
                f"{what!r} is neither the key of a task or molecule in {store.path} nor a SMILES "
                f"({exc})"
            ) from exc
    owners = key_array(sorted(mol_keys))
    roots: list[Root] = []
    for chunk in ingest.chunks(folder):
        keys = ingest.read_molecule_keys(chunk)
        near = bool(np.isin(keys[:, 0], owners[:, 0]).any())
        # The key of a task that has no row yet is found only by making those of all tasks.
        if not near and not mol_keys and wanted_key is not None:
            near = bool(with_task(plan, ingest.read_origins(chunk, plan)[0], wanted_key).any())
        if not near:
            continue
        for root in ingest.read_roots(chunk, plan):
            keyed = wanted_key is not None and any(
                wanted_key in chain for _, chain in plan.chains(root)
            )
            if keyed or root.mol_key in mol_keys:
                roots.append(root)
    return roots, wanted_key


def explain(campaign: Campaign, store: Store, what: str) -> list[str]:
    """Say in words, stage by stage, what became of a molecule (SMILES) or a task (key)."""
    plan = Plan(campaign)
    lines = _input_failures(store, what)
    try:
        roots, wanted = _find_root(campaign, store, plan, what)
    except StoreError:
        if lines:
            return lines  # no SMILES, and that is why it failed
        raise
    if not roots and not lines:
        raise StoreError(
            f"{what!r}: no such molecule or task in campaign {campaign.name!r}; `basin query "
            '"SELECT key, name, smiles FROM molecules"` lists the molecules'
        )
    chains = [list(plan.chains(root)) for root in roots]
    keys = [key for chain in chains for _, made in chain for key in made if key]
    owners = [root.mol_key for root in roots]
    tasks = store.consistent(lambda snapshot: snapshot.pick("tasks", key_array(keys)))
    molecules = store.consistent(lambda snapshot: snapshot.pick("molecules", key_array(owners)))
    for root, chain in zip(roots, chains, strict=True):
        at = np.flatnonzero((molecules["key"] == key_array([root.mol_key])).all(axis=1))
        if len(at):
            m = molecules.take(at[:1])
            name, smiles = m["name"].strings()[0], m["smiles"].strings()[0]
            source = f"{m['source'].strings()[0]}, line {int(m['line'][0])}"
            made = "made from noise" if plan.from_noise else "no graph"
            lines.append(f"{name or smiles}: {smiles or made} ({source})")
        for conformer, keys in chain:
            if wanted is not None and wanted not in keys and wanted != root.mol_key:
                continue
            cut: dict[int, str] = {}
            for stage in plan.stages:
                key = keys[stage.index]
                label = f"  {stage.name}" + (f" (conformer {conformer})" if conformer else "")
                if not key:
                    continue
                row = _row(tasks, key)
                if row is not None:
                    status = row["status"].strings()[0]
                    lines.append(f"{label}: {_told(row)} [key {key.hex()}]")
                    if status != "ok":
                        cut[stage.index] = stage.name
                elif stage.parent in cut:
                    cut[stage.index] = cut[stage.parent]
                    lines.append(f"{label}: never started, since {cut[stage.index]!r} failed")
                else:
                    lines.append(f"{label}: waiting; `basin run` computes it [key {key.hex()}]")
    return lines


def _row(tasks: Rows, key: bytes) -> Rows | None:
    at = np.flatnonzero((tasks["key"] == key_array([key])).all(axis=1))
    return tasks.take(at[:1]) if len(at) else None


def _told(row: Rows) -> str:
    status = row["status"].strings()[0]
    message = row["message"].strings()[0]
    ladder = row["ladder"].strings()[0]
    text = "ok" if status == "ok" else f"failed ({status}): {message}"
    text += f"; {float(row['wall_s'][0]):.2f} s on {row['host'].strings()[0] or 'the driver'}"
    if int(row["attempts"][0]) > 1:
        text += f", attempt {int(row['attempts'][0])}"
    if ladder:
        text += f", with {ladder}"
    return text


def _input_failures(store: Store, what: str) -> list[str]:
    def found(snapshot: Snapshot) -> Rows:
        names = ["key", "stage", "status"]
        bad = [
            rows["key"][rows["status"].equals("input") & rows["stage"].equals(ingest.STAGE)]
            for rows in snapshot.parts("tasks", names)
        ]
        keys = np.concatenate(bad) if bad else np.zeros((0, 2), np.uint64)
        return snapshot.pick("tasks", keys)

    bad = store.consistent(found)
    lines = []
    for i, message in enumerate(bad["message"].strings()):
        # The line as it was read stands in brackets; its first word is the molecule.
        if any(f" [{what.strip()}{end}" in message for end in "], \t"):
            source = bad["source"].names[bad["source"].codes[i]]
            lines.append(f"{source}, line {int(bad['line'][i])}: input failure: {message}")
    return lines
