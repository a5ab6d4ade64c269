"""The guard's price per item: empty kernels through it, and through pebble's process pool.

python -m benchmarks.guard [--items 5000]        (pebble is installed for this benchmark only)
"""

from __future__ import annotations

import argparse
import importlib.util
import time

from benchmarks.machine import table
from orchestrator.guard import Guard
from orchestrator.kernel_calls import Call, Payload


def nothing(payload: object) -> object:
    """Return what came in."""
    return payload


def by_guard(items: int) -> float:
    """Return items per second."""
    guard = Guard()
    stage = Call("rehearse", {"seconds": 0.0, "busy": False, "faults": {}}, 60.0)
    payloads = [Payload("C", 0, 1, 0, 0, None, None, "") for _ in range(items)]
    limits = {"time_limit": 60.0, "memory_limit": 10**10}
    list(guard.run(stage, payloads[:10], **limits))  # type: ignore[arg-type]
    start = time.perf_counter()
    assert len(list(guard.run(stage, payloads, **limits))) == items  # type: ignore[arg-type]
    elapsed = time.perf_counter() - start
    guard.close()
    return items / elapsed


def by_pebble(items: int) -> float:
    """Return items per second of pebble with a time limit for each."""
    from pebble import ProcessPool

    payloads = [Payload("C", 0, 1, 0, 0, None, None, "") for _ in range(items)]
    with ProcessPool(max_workers=1) as pool:
        pool.schedule(nothing, args=[payloads[0]], timeout=60).result()
        start = time.perf_counter()
        futures = [pool.schedule(nothing, args=[p], timeout=60) for p in payloads]
        for future in futures:
            future.result()
        return items / (time.perf_counter() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=5000)
    items = parser.parse_args().items
    ours = by_guard(items)
    rows = [["orchestrator.guard", f"{ours:,.0f}", f"{1e6 / ours:.0f}", "1.0"]]
    if importlib.util.find_spec("pebble") is not None:
        theirs = by_pebble(items)
        rows.append(
            [
                "pebble.ProcessPool, a time limit each",
                f"{theirs:,.0f}",
                f"{1e6 / theirs:.0f}",
                f"{ours / theirs:.1f}",
            ]
        )
    table("One guarded child, empty items", ["what", "items/s", "µs/item", "ratio"], rows)


if __name__ == "__main__":
    main()
