"""What a model learns from: geometries of a store or of files, split into their parts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import CampaignError, StoreError
from orchestrator.molecules import (
    GEOMETRY_FORMATS,
    file_format,
    match_files,
    read_archive,
    read_entries,
    split_of,
)
from orchestrator.toml_file import choose

if TYPE_CHECKING:
    from kernels.diffusion.training import TrainingSet
    from orchestrator.train_file import DataTable


class Around(NamedTuple):
    """The force field around a geometry, in float32.

    ``gradient`` (N, 3) in eV/Å; ``compliance`` (N, N, 3, 3) in Å²/eV, the inverse of its Hessian;
    ``displaced`` (N, 3) in Å, the force field's own minimum near by, or the geometry itself where
    that minimum is another conformer.
    """

    gradient: NDArray[np.float32]
    compliance: NDArray[np.float32]
    displaced: NDArray[np.float32]


class Geometry(NamedTuple):
    """One geometry to learn from.

    ``numbers`` (N,); ``positions`` (N, 3) in Å; ``smiles`` is "" where it is not known;
    ``force_field`` is what the force field says there, if that was asked for.
    """

    name: str
    numbers: NDArray[Any]
    positions: NDArray[Any]
    smiles: str = ""
    force_field: Around | None = None


@dataclass(slots=True)
class DataSummary:
    """What was read: geometries by part, those left out by reason, elements, and a checksum."""

    sources: list[str]
    parts: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    elements: list[int] = field(default_factory=list)
    atoms: tuple[int, int] = (0, 0)
    digest: str = ""

    def as_json(self) -> dict[str, Any]:
        """The summary in plain values."""
        return {
            "sources": self.sources,
            "parts": dict(self.parts),
            "left_out": {why: n for why, n in self.left_out.items() if n},
            "elements": self.elements,
            "atoms": list(self.atoms),
            "digest": self.digest,
        }


def read_data(
    data: DataTable,
    base: Path,
    elements: tuple[int, ...] | None = None,
    needs: Sequence[str] = (),
) -> tuple[TrainingSet, TrainingSet, DataSummary]:
    """The training and the validation part of a file's [data], and what they are.

    Paths are relative to ``base``. Geometries with elements other than ``elements`` (None: any)
    are left out. ``needs`` says what the objective looks at beside numbers and positions:
    "bonds", the matrix of bond orders, and "force_field", what `Around` holds.

    Raises CampaignError where a source cannot be used or a part is empty.
    """
    # Names alone: a checkpoint travels, and folders are nobody else's business.
    summary = DataSummary(sources=[Path(source).name for source in data.source])
    kinds = [_kind(source, base) for source in data.source]
    gathered: list[tuple[str, Geometry]] = []
    bonds = bool({"bonds", "force_field"} & set(needs))
    for source, (kind, paths) in zip(data.source, kinds, strict=True):
        found = (
            _from_store(data, paths[0], summary, bonds)
            if kind == "store"
            else (geometry for path in paths for geometry in _from_file(data, path, summary, bonds))
        )
        for geometry in found:
            if data.limit is not None and len(gathered) >= data.limit:
                break
            if elements is not None and not set(geometry.numbers.tolist()) <= set(elements):
                summary.left_out["an element that the model has not"] += 1
                continue
            gathered.append((split_of(geometry.name or geometry.smiles), geometry))
        if not gathered:
            why = "; ".join(f"{n:,} left out: {what}" for what, n in summary.left_out.items() if n)
            raise CampaignError(
                f"[data] source: {source}: holds no geometry to learn from"
                f"{f' ({why})' if why else ''}"
            )
    if len(data.source) > 1:
        gathered = _without_leaks(gathered, summary)
    parts: dict[str, list[Geometry]] = {"training": [], "validation": []}
    digest = hashlib.sha256()
    for part, geometry in gathered:
        if part in parts and "force_field" in needs:
            around = _around(geometry)
            if isinstance(around, str):
                summary.left_out[around] += 1
                continue
            geometry = geometry._replace(force_field=around)
        summary.parts[part] += 1
        if part in parts:
            parts[part].append(geometry)
            _update(digest, geometry)
    for part, members in parts.items():
        if not members:
            raise CampaignError(
                f"[data] source: no geometry belongs to the {part} part, of {len(gathered)} read; "
                "the part follows from the last number in a molecule's name: n % 10 = 0 is "
                "validation, 1 is test, the rest training"
            )
    everything = parts["training"] + parts["validation"]
    summary.elements = sorted({int(z) for g in everything for z in g.numbers})
    sizes = [len(g.numbers) for g in everything]
    summary.atoms = (min(sizes), max(sizes))
    summary.digest = digest.hexdigest()
    return _set(parts["training"], needs), _set(parts["validation"], needs), summary


def _without_leaks(
    gathered: list[tuple[str, Geometry]], summary: DataSummary
) -> list[tuple[str, Geometry]]:
    """Drop what would be learnt although another source keeps the molecule for a judgement.

    Names divide one source only; stereoisomers and tautomers count as one molecule here.
    """
    from kernels.graph import skeleton

    judged: dict[str, str] = {}
    names = [skeleton(g.smiles) if g.smiles else "" for _, g in gathered]
    for name, (part, _) in zip(names, gathered, strict=True):
        if name and part != "training":
            judged.setdefault(name, part)
    kept = []
    for name, (part, geometry) in zip(names, gathered, strict=True):
        if judged.get(name, part) == part:
            kept.append((part, geometry))
        else:
            summary.left_out["another geometry of it is kept for validation or test"] += 1
    return kept


# A minimum farther away than this (root mean square, Å) is another conformer's.
_SAME_CONFORMER: Final = 0.4


def _around(geometry: Geometry) -> Around | str:
    """What the force field says around a geometry, or why there is no such thing."""
    from kernels.diffusion.guide import SOFTEST
    from kernels.errors import InputError, KernelError
    from kernels.forcefield import Surface, compliance, minimise
    from orchestrator.alignment import superpose

    x = np.asarray(geometry.positions, np.float64)
    n_atoms = len(x)
    try:
        surface = Surface(geometry.smiles, x)
        inverse = compliance(surface.hessian(x), x, SOFTEST)
        displaced = minimise(geometry.smiles, x, max_steps=2000).positions
    except InputError:
        return "no force field has its parameters"
    except KernelError:
        return "the force field finds no minimum near by"
    displaced = superpose(displaced, x)
    if np.sqrt(((displaced - x) ** 2).sum(axis=1).mean()) > _SAME_CONFORMER:
        displaced = x
    pairs = inverse.reshape(n_atoms, 3, n_atoms, 3).transpose(0, 2, 1, 3)
    return Around(
        surface.gradient(x).astype(np.float32),
        pairs.astype(np.float32),
        displaced.astype(np.float32),
    )


def _update(digest: Any, geometry: Geometry) -> None:
    digest.update(geometry.name.encode() + b"\0")
    digest.update(np.ascontiguousarray(geometry.numbers, np.uint8).tobytes())
    digest.update(np.ascontiguousarray(geometry.positions, np.float32).tobytes())


def _set(members: list[Geometry], needs: Sequence[str]) -> TrainingSet:
    from kernels.diffusion.training import TrainingSet
    from kernels.graph import bond_orders

    extra: dict[str, list[NDArray[Any]]] = {}
    if "bonds" in needs:
        extra["bonds"] = [bond_orders(g.smiles) for g in members]
    if "force_field" in needs:
        found = [g.force_field for g in members if g.force_field is not None]
        for name in ("gradient", "compliance", "displaced"):
            extra[name] = [getattr(one, name) for one in found]
    return TrainingSet(
        [g.name for g in members],
        [g.numbers for g in members],
        [g.positions for g in members],
        extra,
    )


def _kind(source: str, base: Path) -> tuple[str, list[Path]]:
    """Whether a source is a store or files, and their paths."""
    try:
        paths = match_files(source, base)
    except ValueError as error:
        raise CampaignError(f'[data] source: "{source}": {error}') from None
    from orchestrator.molecules import expand

    folder = base / expand(source)
    if (folder / "campaign.json").is_file():
        return "store", [folder]
    if folder.is_dir():
        raise CampaignError(f'[data] source: "{source}": {folder} is a folder, but no Basin store')
    if not paths:
        raise CampaignError(f'[data] source: "{source}": there is no such file or store in {base}')
    for path in paths:
        if file_format(path.name) not in GEOMETRY_FORMATS:
            raise CampaignError(
                f'[data] source: "{source}": {path} holds no geometries; give a Basin store, or '
                f"files of {', '.join(GEOMETRY_FORMATS)}"
            )
    return "files", paths


def _from_file(
    data: DataTable, path: Path, summary: DataSummary, bonds: bool
) -> Iterator[Geometry]:
    from orchestrator.campaign import MoleculeSource

    source = MoleculeSource(files=(str(path),), charge=data.charge)
    if file_format(path.name) == ".npz" and not bonds:
        # Without the perception of bonds, which takes far longer than all the rest.
        for name, numbers, positions in read_archive(path):
            yield Geometry(name, numbers, positions)
        return
    for entry in read_entries([path], source):
        if entry.molecule is None or entry.positions is None:
            summary.left_out["a record that cannot be read"] += 1
        elif bonds and not entry.molecule.smiles:
            summary.left_out["bonds that cannot be perceived"] += 1
        else:
            yield Geometry(
                entry.name or f"{path.name} {entry.line}",
                entry.molecule.numbers,
                entry.positions,
                entry.molecule.smiles,
            )


def _from_store(
    data: DataTable, path: Path, summary: DataSummary, bonds: bool
) -> Iterator[Geometry]:
    from orchestrator.store import Store
    from orchestrator.tables import Lookup

    store = Store(path)
    names = ["key", "mol_key", "stage", "level", "connectivity_changed", "numbers", "positions"]
    rows = store.read("relaxations", names)
    stages = rows["stage"].strings()
    wanted = np.ones(len(rows), bool)
    if not len(rows):
        raise StoreError(f"{path}: holds no relaxation to learn from")
    if data.level is not None:
        wanted = rows["level"].equals(data.level)
        if not wanted.any():
            known = sorted(set(rows["level"].strings()))
            raise CampaignError(f'[data] level = "{data.level}": {choose(data.level, known)}')
    known = sorted({stage for stage, keep in zip(stages, wanted, strict=True) if keep})
    if data.stage is None and len(known) > 1:
        raise CampaignError(
            f"[data] stage is missing; {path} holds relaxations of the stages {', '.join(known)}"
        )
    stage = data.stage if data.stage is not None else known[0]
    if stage not in known:
        raise CampaignError(f'[data] stage = "{stage}": {choose(stage, known)}')
    wanted = wanted & rows["stage"].equals(stage)
    if not data.connectivity_changed:
        changed = rows["connectivity_changed"].astype(bool) & wanted
        summary.left_out["bonds that changed in the relaxation"] += int(changed.sum())
        wanted = wanted & ~changed
    # In the order of their keys, which does not depend on how the store came about.
    order = np.lexsort((rows["key"][:, 1], rows["key"][:, 0]))
    rows = rows.take(order[wanted[order]])
    molecules = Lookup(store.read("molecules", ["key", "name", "smiles"]))
    at = molecules.find(rows["mol_key"])
    called, smiles = molecules.rows["name"].strings(), molecules.rows["smiles"].strings()
    for row in range(len(rows)):
        molecule = int(at[row])
        text = smiles[molecule] if molecule >= 0 else ""
        if bonds and not text:
            summary.left_out["bonds that are not known"] += 1
            continue
        name = called[molecule] if molecule >= 0 else ""
        yield Geometry(name or text, rows["numbers"][row], rows["positions"][row], text)
