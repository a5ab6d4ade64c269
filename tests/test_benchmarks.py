"""Benchmarks are run by hand; here they are only loaded, which tells when what they use is gone."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("[a-z]*.py")))
def test_a_benchmark_can_be_loaded(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")
