"""The training at the end of a campaign: through Parsl, past kills, and with nothing wrong left."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import train
from orchestrator.campaign import load_campaign
from orchestrator.errors import CampaignError
from orchestrator.run import Driver
from orchestrator.sites import load_site
from orchestrator.store import Store
from orchestrator.train_file import load_training

LIMIT_S = 110
SMILES = (
    "C CC CCC CCO CCCO CC(C)O CN CCN CC=O CCC=O COC C=C CC=C C#C CC#N C1CC1 OCCO CC(=O)O CF O N"
)
CAMPAIGN = """
name = "toy"
[molecules]
files = ["toy.smi"]
[[stages]]
kernel = "embed"
[[stages]]
name = "relaxed"
kernel = "relax"
level = "MMFF94"
[train]
file = "model.toml"
pool = "cpu"
"""
MODEL = """
name = "little"
[data]
source = "toy.basin"
[model]
hidden = 32
layers = 2
[training]
epochs = 200
batch = 16
learning_rate = 1e-3
[run]
save_every = 0.2
threads = 1
"""


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    lines = [f"{smiles} mol {i}" for i, smiles in enumerate(SMILES.split())]
    (tmp_path / "toy.smi").write_text("\n".join(lines))
    (tmp_path / "model.toml").write_text(MODEL)
    path = tmp_path / "toy.toml"
    path.write_text(CAMPAIGN)
    return path


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", "run", str(path), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT_S
    while not ready():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def folder(path: Path) -> Path | None:
    return next(iter(path.parent.glob("toy.basin/training/little-*")), None)


def epochs(path: Path) -> int:
    place = folder(path)
    if place is None or not (place / "history.csv").exists():
        return 0
    return len(list(csv.DictReader((place / "history.csv").read_text().splitlines())))


def weights(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(output / "state.pt", weights_only=True)["average"]
    return content


def trainer(path: Path) -> int:
    """The process that trains; 0 where there is none yet."""
    place = folder(path)
    try:
        return int(
            json.loads((place / "control" / "driver.json").read_text())["pid"] if place else 0
        )
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
def test_a_campaign_trains_its_model_past_kills(campaign: Path) -> None:
    process = start(campaign)
    wait_until(lambda: epochs(campaign) > 3, process)
    # The worker dies, and another one goes on.
    first = trainer(campaign)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: trainer(campaign) not in (0, first), process)
    second, reached = trainer(campaign), epochs(campaign)
    wait_until(lambda: epochs(campaign) > reached + 3, process)
    # The driver dies, and the next one goes on.
    process.kill()
    process.communicate()
    process = start(campaign)
    wait_until(lambda: trainer(campaign) not in (0, first, second), process)
    reached = epochs(campaign)
    wait_until(lambda: epochs(campaign) > reached + 3, process)
    # It is asked to stop, and does so in good order.
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 5, err
    assert epochs(campaign) < 201
    process = start(campaign)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    place = folder(campaign)
    assert place is not None
    assert "little: " in err
    assert epochs(campaign) == 201
    # All of that changed nothing.
    whole = load_training(campaign.parent / "model.toml").model_copy(
        update={"output": campaign.parent / "whole"}
    )
    train.train(whole)
    for name, tensor in weights(campaign.parent / "whole").items():
        assert torch.equal(tensor, weights(place)[name]), name
    tasks = Store(campaign.parent / "toy.basin").query(
        "SELECT status, kernel FROM tasks WHERE stage = 'train'"
    )
    assert tasks.to_pylist() == [{"status": "ok", "kernel": f"train 1 (torch {torch.__version__})"}]


def test_a_wrong_training_is_refused_before_anything_runs(campaign: Path) -> None:
    model = campaign.parent / "model.toml"
    site = load_site("local", workers=1)
    model.write_text(MODEL.replace("batch = 16", "bach = 16"))
    with pytest.raises(CampaignError, match=r'model\.toml:\d+: \[training\] bach.*"batch"'):
        Driver(load_campaign(campaign), site)
    assert not (campaign.parent / "toy.basin").exists()
    model.unlink()
    with pytest.raises(
        CampaignError, match=r'toy\.toml:\d+: \[train\] file = "model\.toml": there'
    ):
        load_campaign(campaign)
    campaign.write_text(CAMPAIGN.replace('file = "model.toml"', ""))
    with pytest.raises(CampaignError, match=r"\[train\] file is missing; write for example"):
        load_campaign(campaign)
