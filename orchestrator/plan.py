"""The plan: a campaign's stages as tasks, each with the key of what determines its result."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.campaign import Campaign, Stage
from orchestrator.columns import key_array
from orchestrator.errors import CampaignError
from orchestrator.key_index import KeyIndex

NO_KEY = bytes(16)
# Kernels that make molecules or geometries instead of starting from one.
FROM_NO_GEOMETRY = frozenset({"embed", "generate", "rehearse"})
# Kernels that leave many geometries, and the table they are in.
PATH_TABLES = {
    "diffuse": "paths",
    "generate": "paths",
    "metropolis": "chains",
    "gaussian_chain": "chains",
    "diffusion_chain": "chains",
}
_RANDOM = frozenset(
    {
        *("embed", "generate", "metropolis", "gaussian_chain", "diffusion_chain"),
        "replica_exchange",
    }
)


def canonical(value: Mapping[str, Any]) -> bytes:
    """Return JSON with sorted keys and no spaces: equal settings give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def chain_key(task: bytes, rung: int) -> bytes:
    """Return the 16-byte key of one of the chains (from 0) of a task that makes several."""
    return hashlib.sha256(task + b"rung" + rung.to_bytes(4, "little")).digest()[:16]


class Item(NamedTuple):
    """One task on its way to a worker; ``hint`` is the shard that holds its parent's result.

    ``losses``: workers that died while it ran alone; ``suspected``: worker pools that died while
    it was there with others; ``cuts``: blocks that ended while it ran, and left nothing of it;
    ``waits``: times that too little was left of a block to begin it;
    ``stage``: its stage, where bundles mix those of several stages, else -1.
    """

    key: bytes
    mol_key: bytes
    parent_key: bytes
    conformer: int
    smiles: str
    charge: int
    multiplicity: int
    n_atoms: int
    hint: str = ""
    losses: int = 0
    suspected: int = 0
    cuts: int = 0
    waits: int = 0
    stage: int = -1


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: the part of its tasks' keys that they share, and how they are run.

    ``model``: name or file of the diffusion model, whose digest stands in the settings; ``frames``:
    geometries that one task leaves behind, and ``computed`` that it computes; ``along_path``:
    whether it starts from a path or chain, which is in ``path_table``, and ``settled_only`` from
    that part alone where no element changes any more; ``leader``: the first of the stages whose
    items run together with this one's, -1 where there are none.
    """

    index: int
    name: str
    kernel: str
    settings: dict[str, Any]
    label: str
    digest: bytes
    parent: int
    conformers: int
    pool: str
    time_limit: float
    memory_limit: int
    words: str = ""
    model: str = ""
    frames: int = 1
    along_path: bool = False
    settled_only: bool = False
    computed: int = 1
    path_table: str = ""
    leader: int = -1

    def key(self, origin: bytes, conformer: int) -> bytes:
        """Return the 16-byte key of the task that starts from ``origin``.

        ``origin`` is the parent task's key, or the molecule's where the stage has no parent;
        both stand for all that went before.
        """
        head = self.digest + origin
        if self.parent < 0:
            head += conformer.to_bytes(4, "little")
        return hashlib.sha256(head).digest()[:16]


def _stage_plan(
    campaign: Campaign, index: int, stage: Stage, parent: int, before: StagePlan | None
) -> StagePlan:
    settings = stage.settings()
    if stage.kernel in _RANDOM or settings.get("protocol") == "published":
        settings = {**settings, "seed": campaign.seed}
    programs = stage.programs()
    determines = {
        "kernel": stage.kernel,
        "version": stage.kernel_version,
        "settings": settings,
        "programs": programs,
    }
    model = next(iter(getattr(stage, "model", ())), "")
    label = f"{stage.kernel} {stage.kernel_version}"
    if programs:
        label += f" ({', '.join(f'{name} {version}' for name, version in programs.items())})"
    elif model:
        label += f" ({stage.words()})"
    path_table = PATH_TABLES.get(before.kernel, "") if before is not None else ""
    along_path = stage.kernel == "single_points" and path_table != ""
    frames = before.frames if along_path and before else stage.frames
    return StagePlan(
        index=index,
        name=stage.name,
        kernel=stage.kernel,
        settings=settings,
        label=label,
        digest=hashlib.sha256(canonical(determines)).digest(),
        parent=parent,
        conformers=int(getattr(stage, "conformers", 1)),
        pool=stage.pool,
        time_limit=stage.time_limit,
        memory_limit=stage.memory_limit,
        words=stage.words(),
        model=model,
        frames=frames,
        along_path=along_path,
        settled_only=along_path and before is not None and before.kernel == "generate",
        computed=-(-frames // getattr(stage, "every", 1)) if along_path else stage.computed,
        path_table=path_table if along_path else "",
    )


def _run_together(stages: list[StagePlan]) -> list[StagePlan]:
    """Return the stages, those of them led whose chains can share the calls of a network."""
    leaders: dict[bytes, int] = {}
    made: list[StagePlan] = []
    for stage in stages:
        if stage.kernel == "diffusion_chain":
            alike = {k: v for k, v in stage.settings.items() if k not in ("n", "repeat")}
            limits = {"pool": stage.pool, "time": stage.time_limit, "memory": stage.memory_limit}
            leader = leaders.setdefault(canonical({**alike, **limits}), stage.index)
            stage = replace(stage, leader=leader)
        made.append(stage)
    return made


@dataclass(frozen=True, slots=True)
class Root:
    """Where the tasks of a molecule start: its graph, or one geometry of it from a file."""

    mol_key: bytes
    origin: bytes
    smiles: str
    charge: int
    multiplicity: int
    n_atoms: int


class Plan:
    """All stages in the order they depend on each other."""

    def __init__(self, campaign: Campaign) -> None:
        names: dict[str, int] = {}
        self.stages: list[StagePlan] = []
        for index, stage in enumerate(campaign.stages):
            parent = names[stage.from_] if stage.from_ is not None else -1
            before = self.stages[parent] if parent >= 0 else None
            plan = _stage_plan(campaign, index, stage, parent, before)
            for other in self.stages:
                if (other.digest, other.parent) == (plan.digest, plan.parent):
                    raise CampaignError(
                        f"{campaign.path}: stages: {plan.name}: computes exactly what stage "
                        f"{other.name!r} computes; remove one of them or change a setting"
                    )
            names[stage.name] = index
            self.stages.append(plan)
        self.stages = _run_together(self.stages)
        self.children = [
            [child.index for child in self.stages if child.parent == parent.index]
            for parent in self.stages
        ]
        self.depth: list[int] = []
        for plan in self.stages:
            self.depth.append(self.depth[plan.parent] + 1 if plan.parent >= 0 else 0)

    def siblings(self, stage: StagePlan) -> tuple[StagePlan, ...]:
        """Return the stages whose items share bundles with this one's, itself included."""
        if stage.leader < 0:
            return ()
        return tuple(other for other in self.stages if other.leader == stage.leader)

    @property
    def from_files(self) -> bool:
        """Whether molecules bring their geometry instead of being embedded."""
        return all(s.kernel not in FROM_NO_GEOMETRY for s in self.stages if s.parent < 0)

    @property
    def from_noise(self) -> bool:
        """Whether molecules are not known before they are made."""
        return any(s.kernel == "generate" for s in self.stages)

    def chains(self, root: Root) -> Iterator[tuple[int, list[bytes]]]:
        """Yield (conformer, the key of each stage) for everything planned for one root."""
        conformers = max((s.conformers for s in self.stages if s.parent < 0), default=1)
        for conformer in range(conformers):
            keys: list[bytes] = []
            for stage in self.stages:
                origin = root.origin if stage.parent < 0 else keys[stage.parent]
                keys.append(stage.key(origin, conformer) if origin else b"")
                if stage.parent < 0 and conformer >= stage.conformers:
                    keys[-1] = b""
            yield conformer, keys

    def tasks_per_root(self) -> list[int]:
        """Return how many tasks of each stage one molecule (or geometry) gives."""
        per: list[int] = []
        for stage in self.stages:
            per.append(stage.conformers if stage.parent < 0 else per[stage.parent])
        return per


@dataclass(slots=True)
class Standing:
    """How the planned tasks of some roots stand: per stage ok, failed, cut off, and what to do.

    ``failures`` counts the failed ones by their code in `schema.STATUSES`.
    """

    ok: list[int]
    failed: list[int]
    upstream: list[int]
    planned: list[int]
    ready: list[list[Item]]
    failures: Counter[int] = field(default_factory=Counter)


def standing(plan: Plan, roots: list[Root], index: KeyIndex) -> Standing:
    """Compare what is planned for some roots with the finished tasks of the store."""
    n = len(plan.stages)
    result = Standing([0] * n, [0] * n, [0] * n, [0] * n, [[] for _ in range(n)])
    chains = [(root, c, keys) for root in roots for c, keys in plan.chains(root)]
    codes: list[NDArray[np.uint8]] = [
        index.lookup(key_array([keys[s] or NO_KEY for _, _, keys in chains])) for s in range(n)
    ]
    table = np.array(codes).T.tolist() if chains else []
    for (root, conformer, keys), code in zip(chains, table, strict=True):
        dead: list[bool] = []
        for stage in plan.stages:
            s = stage.index
            if not keys[s]:
                dead.append(True)
                continue
            result.planned[s] += 1
            cut = stage.parent >= 0 and dead[stage.parent]
            dead.append(cut or code[s] not in (0, 255))
            if cut:
                result.upstream[s] += 1
            elif code[s] == 0:
                result.ok[s] += 1
            elif code[s] != 255:
                result.failed[s] += 1
                result.failures[code[s]] += 1
            elif stage.parent < 0 or code[stage.parent] == 0:
                parent_key = root.origin if stage.parent < 0 else keys[stage.parent]
                result.ready[s].append(
                    Item(
                        keys[s],
                        root.mol_key,
                        parent_key,
                        conformer,
                        root.smiles,
                        root.charge,
                        root.multiplicity,
                        root.n_atoms,
                        stage=s if stage.leader >= 0 else -1,
                    )
                )
    return result
