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
    """The smallest node of a partition: physical cores, and hardware threads of each."""

    cores: int
    threads_per_core: int


def slurm_nodes(pool: PoolSettings) -> NodeKind | None:
    """From sinfo; None where it does not answer, or knows no such partition."""
    where = f" --partition={pool.partition}" if pool.partition else ""
    where += f" --clusters={pool.clusters}" if pool.clusters else ""
    status, out, _ = run(f"sinfo --noheader --exact{where} --format='%c|%X|%Y|%P'", _LIMIT_S)
    if status:
        return None
    kinds = []
    for line in out.splitlines():
        fields = [re.sub(r"\+$", "", field) for field in line.split("|")]
        if len(fields) != 4 or not all(field.strip().isdecimal() for field in fields[:3]):
            continue
        if not pool.partition and not fields[3].strip().endswith("*"):
            continue  # not the default partition
        cpus, sockets, cores = (int(field) for field in fields[:3])
        # Where CPUs are configured by hand they, not the board, are what a job can have.
        physical = min(cpus, sockets * cores)
        kinds.append(NodeKind(physical, max(1, cpus // physical)))
    return min(kinds, key=lambda kind: kind.cores, default=None)


def pbs_nodes(pool: PoolSettings) -> NodeKind | None:
    """From pbsnodes, over all nodes; None where it does not answer."""
    status, out, _ = run("pbsnodes -a -F json", _LIMIT_S)
    if status:
        return None
    try:
        nodes = json.loads(out, strict=False).get("nodes", {}).values()
    except ValueError:
        return None
    cores = [
        int(resources["ncpus"])
        for node in nodes
        if (resources := node.get("resources_available", {})).get("ncpus")
        and (not pool.queue or pool.queue in str(resources.get("Qlist", pool.queue)).split(","))
    ]
    # Of a mixed cluster the commonest kind, which is what a queue without a name for it gives.
    return NodeKind(max(set(cores), key=lambda n: (cores.count(n), -n)), 1) if cores else None
