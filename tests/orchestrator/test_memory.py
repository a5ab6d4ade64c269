"""A node's memory is shared out: what does not fit waits, in turn, and the dead hold nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest

from kernels.calculators import DFT
from orchestrator import block
from orchestrator.campaign import load_campaign
from orchestrator.memory import Share
from orchestrator.plan import Item, Plan
from orchestrator.worker import Bundle, memory_needed
from tests.orchestrator.run_fixtures import by_key, complete, store_of, write_campaign

WHOLE = 1000


def share(folder: Path, wanted: int) -> Share:
    return Share(wanted, path=folder / "memory", whole=WHOLE)


def comes(one: Share, looks: int = 1) -> bool:
    """Tell whether a share comes within so many looks; it no longer waits then."""
    word = chain(repeat(False, looks), repeat(True))
    return one.wait(lambda: next(word))


def test_what_does_not_fit_beside_the_others_waits(tmp_path: Path) -> None:
    first, second, third = (share(tmp_path, wanted) for wanted in (500, 300, 300))
    assert comes(first)
    assert comes(second)
    assert not comes(third), "1100 of 1000"
    first.end()
    assert comes(third)


def test_more_than_there_is_comes_alone(tmp_path: Path) -> None:
    small, huge = share(tmp_path, 1), share(tmp_path, 5000)
    assert comes(small)
    assert not comes(huge)
    small.end()
    assert comes(huge)


def test_small_shares_do_not_overtake_a_large_one_for_ever(tmp_path: Path) -> None:
    held, large, small = share(tmp_path, 500), share(tmp_path, 800), share(tmp_path, 10)
    assert comes(held)
    seen = []

    def look() -> bool:
        # While the large one waits, a small one that would fit waits behind it.
        if not seen:
            seen.append(comes(small))
            held.end()
        return False

    assert large.wait(look)
    assert seen == [False]


def test_what_a_dead_process_had_taken_is_free(tmp_path: Path) -> None:
    take = (
        "import os, pathlib, sys; from orchestrator.memory import Share\n"
        f"Share(900, path=pathlib.Path(sys.argv[1]), whole={WHOLE}).wait(bool)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", take, str(tmp_path / "memory")], check=False)
    assert json.loads((tmp_path / "memory").read_text())[0]["granted"]
    assert comes(share(tmp_path, 900))


def test_a_half_written_file_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "memory").write_text('[{"name": "x"')
    assert comes(share(tmp_path, 900))


def test_no_memory_is_no_wait(tmp_path: Path) -> None:
    assert comes(share(tmp_path, 0), looks=0)
    assert not (tmp_path / "memory").exists()


def test_only_dft_is_counted_by_its_largest_molecule(tmp_path: Path) -> None:
    stages = f'[[stages]]\nkernel = "embed"\n[[stages]]\nkernel = "relax"\nlevel = "{DFT}"\n'
    embed, relax = Plan(load_campaign(write_campaign(tmp_path, ["C"], stages=stages))).stages
    small, large = (
        Item(b"k", b"m", b"", 0, smiles, 0, 1, n) for smiles, n in (("O", 3), ("CCCCCCCCO", 30))
    )

    def needed(stage: object, *items: Item) -> int:
        bundle = Bundle("1", "r", "", "", stage, list(items), 60.0, 30.0, 2)  # type: ignore[arg-type]
        return memory_needed(bundle)

    assert needed(embed, large) == 0
    assert needed(relax, small) < 600e6
    assert needed(relax, small, large) == needed(relax, large) > 1.9e9


def test_memory_is_the_jobs_where_that_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    whole = block.memory()
    assert 10**8 < whole < 10**14
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "64")
    assert block.memory() == 64 * 2**20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")
    assert block.memory() == whole


@pytest.mark.slow
def test_dft_that_does_not_fit_together_runs_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Water and ammonia take 363 and 391 MB.
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "500")
    stages = (
        '[[stages]]\nkernel = "embed"\n'
        f'[[stages]]\nname = "dft"\nkernel = "single_points"\nlevel = "{DFT}"\ngrid = "coarse"\n'
    )
    campaign = write_campaign(tmp_path, ["O", "N"], stages=stages)
    summary = complete(campaign, workers=2)
    assert summary["complete"]
    assert any("1 can compute such ones at once" in note for note in summary["notes"])
    tasks = [t for t in by_key(store_of(campaign), "tasks").values() if t["stage"] == "dft"]
    began = [np.frombuffer(task["started_s"])[0] for task in tasks]
    ended = [b + np.frombuffer(t["wall_s"])[0] for b, t in zip(began, tasks, strict=True)]
    assert min(ended) <= max(began), "both ran at once"
