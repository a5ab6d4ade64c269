"""The guard: a crash, a hang or a memory hog costs one item; its neighbours are done."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from orchestrator.errors import RunError
from orchestrator.guard import Guard, child_environment
from orchestrator.kernel_calls import Call, Payload

GOOD = ["C", "CC", "CCC", "CCCC"]


@pytest.fixture
def guard() -> Iterator[Guard]:
    guard = Guard()
    yield guard
    guard.close()


def run(
    guard: Guard,
    smiles: list[str],
    faults: dict[str, str],
    *,
    seconds: float = 0.0,
    time_limit: float = 30.0,
    memory_limit: int = 2_000_000_000,
    **options: object,
) -> dict[str, dict[str, object]]:
    stage = Call("rehearse", {"seconds": seconds, "busy": False, "faults": faults}, 60.0)
    payloads = [Payload(s, 0, 1, 0, 0, None, None, "") for s in smiles]
    done = guard.run(stage, payloads, time_limit=time_limit, memory_limit=memory_limit, **options)
    return {smiles[i]: outcome for i, outcome in done}


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("segfault", "crash", "SIGSEGV, 2 times"),
        ("exit", "crash", "exit status 3"),
        ("error", "crash", "RuntimeError: an error that no kernel class covers"),
    ],
)
def test_a_crash_costs_one_item(guard: Guard, fault: str, status: str, words: str) -> None:
    outcomes = run(guard, ["C", "CC", "bad", "CCC", "CCCC"], {"bad": fault})
    assert [outcomes[s]["status"] for s in GOOD] == ["ok"] * 4
    assert outcomes["bad"]["status"] == status
    assert words in str(outcomes["bad"]["message"])


def test_a_hanging_item_ends_at_its_time_limit(guard: Guard) -> None:
    outcomes = run(guard, ["C", "bad", "CC", "CCC", "CCCC"], {"bad": "hang"}, time_limit=1.0)
    assert [outcomes[s]["status"] for s in GOOD] == ["ok"] * 4
    assert outcomes["bad"]["status"] == "timeout"
    assert "time_limit" in str(outcomes["bad"]["message"])
    assert 1.0 <= float(str(outcomes["bad"]["wall_s"])) < 10.0


def test_a_memory_hog_gets_twice_the_memory_and_is_then_given_up(guard: Guard) -> None:
    outcomes = run(
        guard, ["C", "bad", "CC", "CCC", "CCCC"], {"bad": "memory"}, memory_limit=250_000_000
    )
    assert [outcomes[s]["status"] for s in GOOD] == ["ok"] * 4
    assert outcomes["bad"]["status"] == "resource"
    assert outcomes["bad"]["ladder"] == ("memory limit doubled",)
    assert outcomes["bad"]["attempts"] == 2


@pytest.mark.parametrize(
    ("fault", "status"),
    [("segfault", "crash"), ("exit", "crash"), ("error", "crash"), ("memory", "resource")],
)
def test_a_batch_that_breaks_down_costs_its_guilty_item_alone(
    guard: Guard, fault: str, status: str
) -> None:
    smiles = ["C", "CC", "CCC", "bad", "CCCC", "N"]
    outcomes = run(
        guard,
        smiles,
        {"bad": fault},
        memory_limit=250_000_000,
        batches=[[0, 1], [4, 3, 2], [5]],
    )
    assert [outcomes[s]["status"] for s in (*GOOD, "N")] == ["ok"] * 5
    assert outcomes["bad"]["status"] == status
    # What the batch went through is not charged to the others.
    assert [outcomes[s]["attempts"] for s in (*GOOD, "N")] == [1] * 5


def test_a_batch_has_its_items_time_limits_together(guard: Guard) -> None:
    slow = run(guard, GOOD, {}, seconds=0.4, time_limit=1.0, batches=[[0, 1, 2, 3]])
    assert [slow[s]["status"] for s in GOOD] == ["ok"] * 4
    assert guard.restarts == 0
    hanging = run(guard, ["C", "bad", "CC"], {"bad": "hang"}, time_limit=0.5, batches=[[0, 1, 2]])
    assert [hanging[s]["status"] for s in ("C", "CC")] == ["ok"] * 2
    assert hanging["bad"]["status"] == "timeout"


def test_time_of_a_batch_is_shared_out(guard: Guard) -> None:
    outcomes = run(guard, GOOD, {}, seconds=0.1, batches=[[0, 1, 2, 3]])
    walls = [float(str(outcomes[s]["wall_s"])) for s in GOOD]
    assert max(walls) == min(walls)
    assert 0.4 <= sum(walls) < 4.0


def test_a_stop_is_honoured_between_batches(guard: Guard) -> None:
    smiles = ["C" * (i + 1) for i in range(60)]
    batches = [list(range(at, at + 3)) for at in range(0, 60, 3)]
    done: list[int] = []
    stage = Call("rehearse", {"seconds": 0.05, "busy": False, "faults": {}}, 60.0)
    outcomes = guard.run(
        stage,
        [Payload(s, 0, 1, 0, 0, None, None, "") for s in smiles],
        time_limit=30.0,
        memory_limit=2_000_000_000,
        batches=batches,
        should_stop=lambda: len(done) >= 6,
    )
    for index, _ in outcomes:
        done.append(index)
    assert 6 <= len(done) < 60
    assert len(done) % 3 == 0


def test_a_child_killed_from_outside_is_replaced_and_every_item_still_ends(guard: Guard) -> None:
    killed: list[int] = []

    ended = threading.Event()

    def kill() -> None:
        while len(killed) < 3 and not ended.wait(0.4):
            # Not one that is dead and has no successor yet.
            if guard._child is not None and guard._child.process.pid not in killed:
                killed.append(guard._child.process.pid)
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    smiles = ["C" * (i + 1) for i in range(60)]
    outcomes = run(guard, smiles, {}, seconds=0.05)
    ended.set()
    killer.join()
    assert len(killed) == 3
    assert [outcomes[s]["status"] for s in smiles] == ["ok"] * 60


def test_a_stop_leaves_what_was_not_started_without_an_outcome(guard: Guard) -> None:
    began = time.monotonic()
    smiles = ["C" * (i + 1) for i in range(100)]
    outcomes = run(
        guard, smiles, {}, seconds=0.1, should_stop=lambda: time.monotonic() - began > 1.0
    )
    assert 0 < len(outcomes) < 100
    assert list(outcomes) == smiles[: len(outcomes)]


def test_the_child_goes_when_its_parent_is_killed(tmp_path: object) -> None:
    import subprocess
    import sys

    program = (
        "from orchestrator.guard import Guard\n"
        "from orchestrator.kernel_calls import Call, Payload\n"
        "guard = Guard()\n"
        "stage = Call('rehearse', {'seconds': 0.0, 'busy': False, 'faults': {'x': 'hang'}}, 60.0)\n"
        "items = [Payload(s, 0, 1, 0, 0, None, None, '') for s in ('C', 'x')]\n"
        "run = guard.run(stage, items, time_limit=600, memory_limit=10**10)\n"
        "next(run)\n"
        "print(guard._child.process.pid, flush=True)\n"
        "next(run)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        try:
            with open(f"/proc/{child}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail(f"child {child} outlives its parent")


def test_what_an_abandoned_batch_still_sends_is_no_result_of_the_next(guard: Guard) -> None:
    stage = Call("rehearse", {"seconds": 0.05, "busy": False, "faults": {}}, 60.0)
    items = [Payload("C" * n, 0, 1, 0, 0, None, None, "") for n in range(1, 40)]
    first = guard.run(stage, items, time_limit=30.0, memory_limit=2_000_000_000)
    assert next(first)[1]["status"] == "ok"
    # Left in the middle, as when a shard could not be written; `first` is still alive.
    outcomes = run(guard, ["N", "bad", "NN"], {"bad": "error"})
    assert [outcomes[s]["status"] for s in ("N", "bad", "NN")] == ["ok", "crash", "ok"]
    first.close()


def test_kernel_processes_that_cannot_start_are_not_started_for_ever(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.guard.sys.executable", "/bin/false")
    with pytest.raises(RunError, match=r"before they run anything \(exit status 1"):
        run(guard, ["C"], {})


def test_what_does_not_fit_into_the_block_is_not_begun(guard: Guard) -> None:
    needs = [0.0, 500.0, 0.0, 0.0]
    outcomes = run(guard, GOOD, {}, needs=needs, stop_at=time.time() + 100)
    assert [outcomes[s]["status"] for s in GOOD] == ["ok", "unfit", "ok", "ok"]


def test_the_end_of_a_block_breaks_off_what_does_not_stop(guard: Guard) -> None:
    run(guard, ["C"], {})  # the process is there
    now = time.time()
    outcomes = run(guard, ["C", "bad", "CC"], {"bad": "hang"}, stop_at=now + 0.5, cut_at=now + 1.0)
    assert {s: o["status"] for s, o in outcomes.items()} == {"C": "ok", "bad": "cut"}
    assert time.time() - now < 30.0
    # The next block's worker would be another one; this one's guard is still of use.
    assert run(guard, ["CC"], {})["CC"]["status"] == "ok"


def test_kernel_processes_have_the_pools_threads_and_the_jobs_devices() -> None:
    found = child_environment(
        {
            "BASIN_THREADS": "4",
            "OMP_NUM_THREADS": "64",
            "CUDA_VISIBLE_DEVICES": "0",
            "BASIN_BLOCK_DEVICES": "CUDA_VISIBLE_DEVICES=3",
        }
    )
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "4"
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert child_environment({})["OMP_NUM_THREADS"] == "1"
