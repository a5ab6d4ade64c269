"""One driver per store: the second is refused by name, the first does not notice."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import lock
from orchestrator.campaign import load_campaign
from orchestrator.errors import StoreLockedError
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

STAGES = '[[stages]]\nkernel = "rehearse"\nseconds = 0.2\n'


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store", "locks")


def test_a_second_run_is_refused_and_the_first_is_unharmed(tmp_path: Path) -> None:
    smiles = ["C" * n for n in range(1, 13)]
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
        assert first.end()["done_now"] == 12
    assert [(c.ok, c.waiting) for c in standing_of(campaign).counts] == [(12, 0)]
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
