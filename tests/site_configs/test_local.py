"""This machine as a site: how many workers it starts, and who says so."""

from __future__ import annotations

import os

import pytest

from orchestrator.errors import SiteError
from orchestrator.sites import batch_scripts, load_site


@pytest.fixture(autouse=True)
def _unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BASIN_WORKERS", raising=False)


def test_as_many_workers_as_cores() -> None:
    assert load_site("local").pools() == {"cpu": len(os.sched_getaffinity(0))}


def test_fewer_cores_allowed_fewer_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Under taskset, or in a batch job that was given a part of a node.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert load_site("local").pools() == {"cpu": 1}


def test_the_number_asked_for_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIN_WORKERS", "3")
    assert load_site("local").pools() == {"cpu": 3}
    assert load_site("local", workers=5).pools() == {"cpu": 5}
    monkeypatch.setenv("BASIN_WORKERS", " ")
    assert load_site("local").pools() == {"cpu": len(os.sched_getaffinity(0))}


@pytest.mark.parametrize("text", ["many", "-2", "0", "1.5", "2 4"])
def test_a_wrong_number_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("BASIN_WORKERS", text)
    with pytest.raises(SiteError, match="whole number of workers") as caught:
        load_site("local")
    assert f"BASIN_WORKERS={text!r}" in str(caught.value)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 64])
def test_parsl_starts_that_many(workers: int) -> None:
    (executor,) = load_site("local", workers=workers).config.executors
    cores = len(os.sched_getaffinity(0))
    # Parsl's own rule: no more workers than `cores_per_worker` lets fit.
    assert int(cores / executor.cores_per_worker + 1e-9) >= workers
    assert executor.max_workers_per_node == workers


def test_nothing_is_submitted() -> None:
    assert batch_scripts(load_site("local")) == {}
