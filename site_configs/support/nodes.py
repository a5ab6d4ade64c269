"""What the batch system says of a pool's nodes, where the user left it out."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from site_configs.support.scheduler import run
from site_configs.support.settings import PoolSettings

_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class NodeKind:
    """A node of a partition: physical cores, hardware threads of each, memory (bytes)."""

    cores: int
    threads_per_core: int
    memory: int


def slurm_nodes(pool: PoolSettings) -> NodeKind | None:
    """The partition's smallest node, from sinfo; None where it does not answer or knows none."""
    where = f" --partition={pool.partition}" if pool.partition else ""
    where += f" --clusters={pool.clusters}" if pool.clusters else ""
    status, out, _ = run(f"sinfo --noheader --exact{where} --format='%c|%X|%Y|%m|%P'", _LIMIT_S)
    if status:
        return None
    kinds = []
    for line in out.splitlines():
        fields = [re.sub(r"\+$", "", field) for field in line.split("|")]
        if len(fields) != 5 or not all(field.strip().isdecimal() for field in fields[:4]):
            continue
        if not pool.partition and not fields[4].strip().endswith("*"):
            continue  # not the default partition
        cpus, sockets, cores, megabytes = (int(field) for field in fields[:4])
        # Where CPUs are configured by hand they, not the board, are what a job can have.
        physical = min(cpus, sockets * cores)
        kinds.append(NodeKind(physical, max(1, cpus // physical), megabytes * 2**20))
    return min(kinds, key=lambda kind: (kind.cores, kind.memory), default=None)


def pbs_nodes(pool: PoolSettings) -> NodeKind | None:
    """From pbsnodes, over all nodes; None where it does not answer."""
    status, out, _ = run("pbsnodes -a -F json", _LIMIT_S)
    if status:
        return None
    try:
        nodes = json.loads(out, strict=False).get("nodes", {}).values()
    except ValueError:
        return None
    kinds = [
        NodeKind(int(resources["ncpus"]), 1, _bytes(str(resources.get("mem", ""))))
        for node in nodes
        if (resources := node.get("resources_available", {})).get("ncpus")
        and (not pool.queue or pool.queue in str(resources.get("Qlist", pool.queue)).split(","))
    ]
    if not kinds:
        return None
    # Of a mixed cluster the commonest kind, which is what a queue without a name for it gives.
    cores = [kind.cores for kind in kinds]
    common = max(set(cores), key=lambda n: (cores.count(n), -n))
    return min((k for k in kinds if k.cores == common), key=lambda kind: kind.memory)


def _bytes(text: str) -> int:
    """A size as PBS writes it, such as "24684092kb"."""
    match = re.fullmatch(r"(\d+)([kmgt]?)b", text.lower())
    return int(match[1]) * 2 ** (10 * " kmgt".index(match[2] or " ")) if match else 0
