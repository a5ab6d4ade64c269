"""The memory of a worker's kernel process in which PyTorch is loaded."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from kernels.diffusion import model_files
from kernels.embedding import embed
from orchestrator.guard import Guard
from orchestrator.kernel_calls import Call, Payload

MODELS = ("qm9-edm", "qm9-gfn2")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("model", MODELS)
def test_a_process_of_diffusion_chains_stays_below_280_MB(tmp_path: Path, model: str) -> None:
    """Wanted are 300 MB; a PyTorch that is built for GPUs takes more."""
    import torch

    if torch.version.cuda or torch.version.hip:
        pytest.skip("the libraries of GPUs alone take a GB")
    made = embed("CCOCC", seed=1, max_attempts=50)
    levels = (1, 2, 4, 6, 8, 11, 14, 17, 20, 24, 27, 30, 35, 40)
    payloads = [
        Payload(
            "CCOCC", 0, 1, n, 0, made.numbers, made.positions, str(tmp_path / f"{n:02d}.npz"),
            settings={"n": n},
        )
        for n in levels
    ]  # fmt: skip
    digest = model_files.digest(model_files.find(model))
    settings = {"model": digest, "n": 1, "steps": 40, "burn_in": 5, "save_every": 1}
    stage = Call("diffusion_chain", settings, 60.0, model, memory_limit=4_000_000_000)
    guard = Guard()
    try:
        done = dict(
            guard.run(
                stage, payloads, time_limit=600, memory_limit=10**9, batches=[range(len(payloads))]
            )
        )
        assert {outcome["status"] for outcome in done.values()} == {"ok"}
        assert guard._child is not None
        status = Path(f"/proc/{guard._child.process.pid}/status").read_text()
    finally:
        guard.close()
    peak = 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
    assert 100e6 < peak < 280e6, f"{peak / 1e6:.0f} MB"
