"""The stream of ready tasks: pulled from the plan as room allows, handed out in bundles."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.calculators import DFT_LEVELS
from orchestrator import dft_cost, ingest
from orchestrator.columns import key_words
from orchestrator.key_index import ABSENT, KeyIndex
from orchestrator.plan import Item, Plan, Root, StagePlan, standing
from orchestrator.tally import tally

MAX_ITEMS = 2000
FIRST_S = 1.0
FIRST_ITEMS = 16
_MEASURED_ITEMS = 16
# Of a molecule that is still to be made.
_USUAL_ATOMS = 20
# Chains whose steps share the calls of a network, and how long (s) they are waited for.
MOST_TOGETHER = 256
_HOLD_S = 20.0
# Growth of cost with the number of atoms, and a first guess in seconds at 20 atoms (of each frame
# of a path, or step of a chain): measured for RDKit, GFN2-xTB and a network of 4 layers, replaced
# by what finished tasks say as soon as there are some.
_COST = {
    "embed": (2.6, 0.002),
    "mmff": (2.6, 0.003),
    "relax": (2.0, 0.2),
    "diffuse": (2.0, 0.005),
    "single_points": (2.0, 0.006),
    "generate": (0.0, 0.005),
    "metropolis": (2.0, 0.004),
    "gaussian_chain": (2.0, 0.004),
    "replica_exchange": (2.0, 0.004),
    "diffusion_chain": (2.0, 0.0015),
    "rehearse": (0.0, 0.001),
}


def _own(stage: int, item: Item) -> int:
    """Return the stage of an item from a bundle of ``stage``, which may hold those of others."""
    return item.stage if item.stage >= 0 else stage


class Estimate:
    """Seconds per item of one stage, learned from finished items by their size.

    An item's size is its number of atoms; where ``dft``, that of its basis
    functions. An item of size s takes ``rate`` s^p seconds, with p known of the kernel.
    """

    def __init__(
        self, kernel: str, frames: int = 1, level: str = "", initial_hessian: str = "unit"
    ) -> None:
        self.dft = level in DFT_LEVELS
        if self.dft:
            self._power, rate = dft_cost.item_s(kernel, level, initial_hessian)
        else:
            self._power, guess = _COST.get(kernel, (2.0, 1.0))
            rate = guess / _USUAL_ATOMS**self._power
        self._seconds = 0.0
        self._weight = 0.0
        self.rate = rate * frames
        self.items = 0

    def size(self, n_atoms: int, smiles: str = "") -> int:
        """Return the size of an item, that of a usual one where nothing is known of it."""
        n_atoms = n_atoms or _USUAL_ATOMS
        return dft_cost.n_functions(smiles, n_atoms) if self.dft else n_atoms

    def seconds(self, size: int) -> float:
        """Return the expected seconds of one item of that size."""
        return self.rate * self.weight(size or self.size(0))

    def weight(self, size: int) -> float:
        """Return what the seconds of an item of that size are ``rate`` times of."""
        return float(size**self._power)

    def seconds_of(self, item: Item) -> float:
        """Return the expected seconds of an item."""
        return self.seconds(self.size(item.n_atoms, item.smiles))

    def learn(self, sizes: NDArray[np.int64], wall_s: NDArray[np.float32]) -> None:
        """Take in finished items (K,); older ones slowly lose their weight."""
        if not len(sizes):
            return
        sizes = np.where(sizes > 0, sizes, self.size(0))
        decay = 0.5 ** (len(sizes) / 1000)
        self._seconds = self._seconds * decay + float(wall_s.sum())
        self._weight = self._weight * decay + float((sizes.astype(float) ** self._power).sum())
        self.items += len(sizes)
        self.rate = max(self._seconds / self._weight, 1e-9)

    @property
    def measured(self) -> bool:
        """Whether enough items have finished to believe the estimate."""
        return self.items >= _MEASURED_ITEMS


class Stream:
    """Ready items per stage, and the counts of all that has been pulled from the plan.

    ``company``: names those that a chain under way was computed together with, "" where it was not.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        index: KeyIndex,
        estimates: list[Estimate],
        company: Callable[[Item], str] = lambda item: "",
    ) -> None:
        n = len(plan.stages)
        self.plan = plan
        self.estimates = estimates
        self._folder = folder
        self._index = index
        self._chunks: list[ingest.Chunk] = []
        self._read = 0
        self._roots: list[Root] = []
        self._per_root = plan.tasks_per_root()
        # At most about as many items as a full chunk of single conformers gives.
        self._slice = max(1, ingest.CHUNK // max(self._per_root))
        self.plan_complete = False
        # Stages whose items run together share the queue of the first of them.
        self._queue = [s.index if s.leader < 0 else s.leader for s in plan.stages]
        self._arrived = [0.0] * n
        self._company = company
        self._companies: dict[bytes, str] = {}
        self._leaders = sorted({s.leader for s in plan.stages if s.leader >= 0})
        self.ready: list[deque[Item]] = [deque() for _ in range(n)]
        self.ready_s = [0.0] * n
        self.again: deque[tuple[int, list[Item]]] = deque()
        self._pulled = [0] * n
        self._roots_pulled = 0
        # Of the largest molecule so far, where a stage computes DFT.
        self.functions = 0
        self._weights = [0.0] * n
        self.ok = [0] * n
        self.failed = [0] * n
        self.upstream = [0] * n
        self.ok_before = 0
        # Of those that had failed before, by their code in `schema.STATUSES`.
        self.failures: Counter[int] = Counter()

    def look(self) -> None:
        """See how far the reading of the molecule files has come."""
        if not self.plan_complete:
            # Asked in this order: a chunk sealed after the look would else be missed.
            self.plan_complete = ingest.is_complete(self._folder)
            self._chunks = ingest.chunks(self._folder)

    @property
    def exhausted(self) -> bool:
        """Whether everything planned has been pulled."""
        return self.plan_complete and self._read == len(self._chunks) and not self._roots

    @property
    def entries(self) -> int:
        """Entries of the molecule files read so far."""
        return self._chunks[-1].stop if self._chunks else 0

    @property
    def bad_entries(self) -> int:
        """Entries read so far that could not be used."""
        return sum(chunk.bad for chunk in self._chunks)

    def planned(self, stage: int) -> int:
        """Return the number of a stage's tasks that are planned so far, pulled or not."""
        unpulled = len(self._roots) + sum(chunk.roots for chunk in self._chunks[self._read :])
        return self._pulled[stage] + unpulled * self._per_root[stage]

    def mean_s(self, stage: int) -> float:
        """Return the expected seconds of one of a stage's items, of the sizes planned so far."""
        if not self._roots_pulled:
            return self.estimates[stage].seconds(0)
        return self.estimates[stage].rate * self._weights[stage] / self._roots_pulled

    def pull(self) -> bool:
        """Take in some more of the plan, if there is any; tell whether there was."""
        if not self._roots:
            if self._read == len(self._chunks):
                self.look()
            if self._read == len(self._chunks):
                return False
            chunk = self._chunks[self._read]
            if not self._is_over(chunk):
                self._roots = ingest.read_roots(chunk, self.plan)
            self._read += 1
            if not self._roots:
                return True
        roots, self._roots = self._roots[: self._slice], self._roots[self._slice :]
        self._roots_pulled += len(roots)
        for s, estimate in enumerate(self.estimates):
            sizes = [estimate.size(root.n_atoms, root.smiles) for root in roots]
            self._weights[s] += sum(map(estimate.weight, sizes))
            if estimate.dft:
                self.functions = max(self.functions, *sizes)
        stand = standing(self.plan, roots, self._index)
        for s in range(len(self.plan.stages)):
            self._pulled[s] += stand.planned[s]
            self.ok[s] += stand.ok[s]
            self.failed[s] += stand.failed[s]
            self.upstream[s] += stand.upstream[s]
            for item in stand.ready[s]:
                self.push(s, item)
        self.ok_before += sum(stand.ok)
        self.failures += stand.failures
        return True

    def _is_over(self, chunk: ingest.Chunk) -> bool:
        """Tell whether nothing of a chunk is left to do; if so, count it without making items."""
        if not len(self._index):
            return False
        counts = tally(self.plan, ingest.read_origins(chunk, self.plan)[0], self._index)
        if (counts.finished < counts.planned).any():
            return False
        for s in range(len(self.plan.stages)):
            self._pulled[s] += int(counts.planned[s])
            self.ok[s] += int(counts.ok[s])
            self.failed[s] += int(counts.failed[s])
            self.upstream[s] += int(counts.upstream[s])
        self.ok_before += int(counts.ok.sum())
        self.failures += counts.failures
        return True

    def push(self, stage: int, item: Item) -> None:
        """Put one ready item in its stage's queue."""
        queue = self._queue[stage]
        self._arrived[queue] = time.monotonic()
        self.ready[queue].append(item)
        self.ready_s[queue] += self.estimates[queue].seconds_of(item)

    def finished(self, stage: int, item: Item, ok: bool, shard: str) -> None:
        """Count a finished item and release what was waiting for it."""
        stage = _own(stage, item)
        if not ok:
            self.failed[stage] += 1
            self._cut(stage, item.key, item.conformer)
            return
        self.ok[stage] += 1
        for child in self.plan.children[stage]:
            child_plan = self.plan.stages[child]
            key = child_plan.key(item.key, item.conformer)
            next_item = item._replace(
                key=key,
                parent_key=item.key,
                hint=shard,
                losses=0,
                suspected=0,
                cuts=0,
                waits=0,
                stage=child if child_plan.leader >= 0 else -1,
            )
            if self._index.get(*key_words(key)) == ABSENT:
                self.push(child, next_item)

    def reopen(self, stage: int, item: Item) -> None:
        """Take back a failure that has been counted, and have the item computed again."""
        stage = _own(stage, item)
        self.failed[stage] -= 1
        self._cut(stage, item.key, item.conformer, back=True)
        self.push(stage, item)

    def _cut(self, stage: int, key: bytes, conformer: int, *, back: bool = False) -> None:
        """Count what can never start after a failure; or, ``back``, what can after all."""
        one = -1 if back else 1
        for child in self.plan.children[stage]:
            child_key = self.plan.stages[child].key(key, conformer)
            # Known where the parent's row was lost to a damaged file, and its own was not.
            code = self._index.get(*key_words(child_key))
            if code == 0:
                self.ok[child] -= one
            elif code != ABSENT:
                self.failed[child] -= one
            self.upstream[child] += one
            self._cut(child, child_key, conformer, back=back)

    def backlog(self) -> int:
        """Return the number of items ready to run."""
        return sum(map(len, self.ready)) + sum(len(items) for _, items in self.again)

    def take(self, pool: str, target_s: float, workers: int) -> tuple[StagePlan, list[Item]] | None:
        """Return the next bundle for a pool, or None when nothing is ready for it.

        Later stages come first, so that molecules are finished before new ones are begun; a
        stage with less than a bundle's worth waits while another has more. What chains that run
        together still wait for goes before all.
        """
        for _ in range(len(self.again)):
            stage, items = self.again.popleft()
            if self.plan.stages[stage].pool == pool:
                return self.plan.stages[stage], items
            self.again.append((stage, items))
        mine = [
            s
            for s in self.plan.stages
            if s.pool == pool and self.ready[s.index] and not self._more_to_come(s)
        ]
        if not mine:
            return None
        before_chains = self._before_chains()
        mine.sort(key=lambda s: (s.index not in before_chains, -self.plan.depth[s.index]))
        full = [s for s in mine if self._enough(s.index, target_s) or s.index in before_chains]
        stage_plan = full[0] if full else max(mine, key=lambda s: self.ready_s[s.index])
        return stage_plan, self._cut_bundle(stage_plan.index, target_s, workers)

    def _before_chains(self) -> set[int]:
        """Return the stages that lead to chains that run together, while those are too few."""
        found: set[int] = set()
        for leader in self._leaders:
            if len(self.ready[leader]) < MOST_TOGETHER:
                for stage in self.plan.siblings(self.plan.stages[leader]):
                    parent = stage.parent
                    while parent >= 0:
                        found.add(parent)
                        parent = self.plan.stages[parent].parent
        return found

    def _more_to_come(self, stage: StagePlan) -> bool:
        """Tell whether chains wait for others that would share the calls of their network."""
        if stage.leader < 0 or len(self.ready[stage.index]) >= MOST_TOGETHER:
            return False
        if time.monotonic() - self._arrived[stage.index] > _HOLD_S:
            return False
        if not self.exhausted:
            return True
        parents = {other.parent for other in self.plan.siblings(stage)}
        return any(
            self.planned(p) > self.ok[p] + self.failed[p] + self.upstream[p]
            for p in parents
            if p >= 0
        )

    def _enough(self, stage: int, target_s: float) -> bool:
        return self.ready_s[stage] >= target_s or len(self.ready[stage]) >= MAX_ITEMS

    def _cut_bundle(self, stage: int, target_s: float, workers: int) -> list[Item]:
        estimate = self.estimates[stage]
        most = MAX_ITEMS
        if not estimate.measured:
            target_s = min(target_s, FIRST_S)
            # A first guess may be wrong by orders of magnitude: no worker is to get everything.
            most = max(1, min(FIRST_ITEMS, len(self.ready[stage]) // (2 * workers)))
        # Towards the end bundles shrink, so that all workers finish at about the same time.
        target_s = min(target_s, max(self.ready_s[stage] / (2 * workers), 0.2))
        if self.exhausted or self.plan.stages[stage].model:
            # Nothing more will come: the largest first, so that no worker ends on a long one. And
            # models compute molecules of equal size together.
            ordered = sorted(self.ready[stage], key=estimate.seconds_of, reverse=True)
            self.ready[stage] = deque(ordered)
        queue = self.ready[stage]
        if self.plan.stages[stage].leader >= 0:
            # What a worker can compute together goes to it together, whatever that takes.
            count = min(MOST_TOGETHER, -(-len(queue) // max(1, workers)))
            return self._cut_company(queue, count)
        items: list[Item] = []
        seconds = 0.0
        while queue and len(items) < most:
            cost = estimate.seconds_of(queue[0])
            if items and seconds + cost > target_s:
                break
            items.append(queue.popleft())
            seconds += cost
        # Pushed at older estimates, so the sum is only kept roughly; an empty queue resets it.
        self.ready_s[stage] = max(self.ready_s[stage] - seconds, 0.0) if queue else 0.0
        return items

    def _cut_company(self, queue: deque[Item], count: int) -> list[Item]:
        """Take chains that were under way together, however many; else so many that are new.

        In other company their sums would be rounded otherwise.
        """
        for item in queue:
            if item.key not in self._companies:
                self._companies[item.key] = self._company(item)
        first = self._companies[queue[0].key]
        taken = [item for item in queue if self._companies[item.key] == first]
        taken = taken if first else taken[:count]
        gone = {item.key for item in taken}
        left = [item for item in queue if item.key not in gone]
        queue.clear()
        queue.extend(left)
        for key in gone:
            # Asked again when they come back.
            del self._companies[key]
        return taken
