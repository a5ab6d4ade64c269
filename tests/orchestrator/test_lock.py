"""One driver per store: the second is refused by name, the first does not notice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import lock
from orchestrator.campaign import load_campaign
from orchestrator.errors import StoreError, StoreLockedError
from orchestrator.lock import DriverLock
from orchestrator.store import Store
from tests.orchestrator.run_fixtures import (
    assert_same_rows,
    complete,
    running,
    standing_of,
    store_of,
    until,
    write_campaign,
)

STAGES = '[[stages]]\nkernel = "rehearse"\nseconds = 2\n'


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store", "locks")


@pytest.mark.slow
def test_a_second_run_is_refused_and_the_first_is_unharmed(tmp_path: Path) -> None:
    smiles = ["C" * n for n in range(1, 6)]
    campaign = write_campaign(tmp_path, smiles, stages=STAGES)
    with running(campaign) as first:
        until(first.children)
        with running(campaign) as second:
            assert second.wait(30) == 3
            message = second.output()
            assert f"process {first.process.pid} on {socket.gethostname()}" in message
            assert "basin status" in message
            second.assert_gone()
        assert lock.is_running(load_campaign(campaign).store)
        assert first.wait() == 0, first.output()
        assert first.end()["done_now"] == 5
    assert [(c.ok, c.waiting) for c in standing_of(campaign).counts] == [(5, 0)]
    alone = write_campaign(tmp_path / "alone", smiles, stages=STAGES)
    complete(alone)
    assert_same_rows(store_of(campaign), store_of(alone))


def test_a_lock_names_its_holder_and_goes_with_it(store: Store) -> None:
    held = DriverLock(store.path, "first")
    assert lock.is_running(store.path)
    assert lock.who(store.path)["run_id"] == "first"
    with pytest.raises(StoreLockedError, match=rf"process {os.getpid()} on "):
        DriverLock(store.path, "second")
    assert lock.who(store.path)["run_id"] == "first"
    held.release()
    assert not lock.is_running(store.path)
    DriverLock(store.path, "second").release()


def test_a_killed_holder_holds_nothing(store: Store) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from orchestrator.lock import DriverLock\n"
        "held = DriverLock(Path(sys.argv[1]), 'killed')\n"
        "print('held', flush=True)\n"
        "time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(store.path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreLockedError, match=f"process {holder.pid}"):
        DriverLock(store.path, "early")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert not lock.is_running(store.path)
    later = DriverLock(store.path, "later")
    assert lock.who(store.path)["run_id"] == "later"
    later.release()


def test_looking_does_not_keep_a_driver_out(store: Store) -> None:
    assert not lock.is_running(store.path)
    held = DriverLock(store.path, "first")
    assert lock.is_running(store.path)
    assert lock.is_running(store.path)
    held.release()


# --- hosts that flock does not reach ----------------------------------------------------------


@contextmanager
def held_elsewhere(store: Store, beat_s: float = 0.05) -> Iterator[subprocess.Popen[str]]:
    """A driver's lock held by a process that takes itself for another host's.

    Its lock file is put aside, so that its flock is met no more than one on another node of a
    file system that locks each node for itself.
    """
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from orchestrator import lock\n"
        "lock.boot_id = lambda: 'another machine'\n"
        "lock.socket.gethostname = lambda: 'node7'\n"
        f"lock.BEAT_S = {beat_s}\n"
        "held = lock.DriverLock(Path(sys.argv[1]), 'there')\n"
        "print('held', flush=True)\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        "        held.beat()\n"
        "        print(lock.stop_requested(Path(sys.argv[1]), 'there') or 'go on', flush=True)\n"
        "    except Exception as exc:\n"
        "        print(exc, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(store.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "held\n"
        (store.path / "control" / "lock").rename(store.path / "control" / "lock-there")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def ask(process: subprocess.Popen[str]) -> str:
    """Let the other host's driver look around; return what it finds."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("look\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def grow_old(store: Store, seconds: float) -> None:
    word = store.path / "control" / "driver.json"
    os.utime(word, (time.time() - seconds,) * 2)


def test_a_heartbeat_refuses_where_flock_does_not_reach(store: Store) -> None:
    with held_elsewhere(store) as there:
        (store.path / "control" / "lock").touch()
        assert lock.is_running(store.path)
        with pytest.raises(StoreLockedError, match=f"process {there.pid} on node7.*sign of life"):
            DriverLock(store.path, "second")
        assert ask(there) == "go on"
        # It beats on, however old its word was once.
        grow_old(store, 1000)
        until(lambda: lock.is_running(store.path))


def test_a_driver_that_died_with_its_host_holds_for_two_minutes(store: Store) -> None:
    with held_elsewhere(store):
        pass
    (store.path / "control" / "lock").touch()
    grow_old(store, lock.STALE_S - 20)
    assert lock.is_running(store.path)
    with pytest.raises(StoreLockedError, match=r"10. s old.*once that is 120 s"):
        DriverLock(store.path, "early")
    grow_old(store, lock.STALE_S + 1)
    assert not lock.is_running(store.path)
    DriverLock(store.path, "later").release()


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_a_clock_that_goes_otherwise_than_the_file_servers_does_not_mislead(
    store: Store, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + ahead_s)
    with held_elsewhere(store):
        (store.path / "control" / "lock").touch()
        assert lock.is_running(store.path)
    word = store.path / "control" / "driver.json"
    os.utime(word, (right() - lock.STALE_S - 1,) * 2)
    assert not lock.is_running(store.path)


def test_who_may_only_read_a_store_is_told_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    with held_elsewhere(store):
        pass
    (store.path / "control" / "lock").touch()
    monkeypatch.setattr(os, "utime", refuse)
    assert lock.is_running(store.path)
    monkeypatch.undo()
    grow_old(store, lock.STALE_S + 1)
    monkeypatch.setattr(os, "utime", refuse)
    assert not lock.is_running(store.path)


def test_a_driver_whose_store_was_taken_says_so_and_leaves_it(store: Store) -> None:
    # Its heart beats too late, as that of a suspended process does.
    with held_elsewhere(store, beat_s=1.0) as there:
        grow_old(store, 1000)
        here = DriverLock(store.path, "here")
        try:
            until(lambda: "another one has taken the store" in ask(there), every=0.2)
            assert lock.who(store.path)["run_id"] == "here"
            here.beat()
        finally:
            here.release()


# --- the user's word to the driver ------------------------------------------------------------


def test_a_stop_is_heard_elsewhere_and_by_one_driver_alone(store: Store) -> None:
    with pytest.raises(StoreError, match="no `basin run` is working"):
        lock.request_stop(store.path, now=False)
    with held_elsewhere(store) as there:
        lock.request_stop(store.path, now=False)
        assert ask(there) == "drain"
        lock.request_stop(store.path, now=True)
        assert ask(there) == "now"
    grow_old(store, 1000)
    later = DriverLock(store.path, "later")
    try:
        assert lock.stop_requested(store.path, "later") == ""
        assert json.loads((store.path / "control" / "stop.json").read_text())["stop"] == ""
        (store.path / "control" / "stop.json").write_text("{")
        assert lock.stop_requested(store.path, "later") == ""
    finally:
        later.release()
