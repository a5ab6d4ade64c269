"""`basin train` and `basin model` as a user meets them: files, resuming, refusals."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import molecule

from kernels.graph import bond_orders
from orchestrator import train
from orchestrator.cli import main
from orchestrator.errors import CampaignError, RunError
from orchestrator.train import TrainSummary
from orchestrator.train_file import TrainFile, describe_training, load_training
from orchestrator.training_data import read_data
from tests.orchestrator.store_fixtures import Records, new_store

LIMIT_S = 110
KINDS = ("CH4", "NH3", "C2H6", "CH3CH2OH", "CH3CHO", "HCOOH", "CH3OH")
FILE = """
name = "toy"
[data]
source = "toy.npz"
[model]
hidden = 32
layers = 2
[training]
epochs = 4
batch = 32
learning_rate = 3e-3
"""


def write_archive(path: Path, count: int = 200) -> None:
    """An archive like QM9's: small molecules, shaken by 0.02 Å."""
    random = np.random.default_rng(1)
    numbers = np.zeros((count, 9), np.uint8)
    positions = np.zeros((count, 9, 3), np.float32)
    for row in range(count):
        atoms = molecule(KINDS[row % len(KINDS)])
        numbers[row, : len(atoms)] = atoms.numbers
        shaken = atoms.positions + random.normal(scale=0.02, size=(len(atoms), 3))
        positions[row, : len(atoms)] = shaken
    np.savez(path, gdb9_id=np.arange(1, count + 1), numbers=numbers, positions=positions)


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a training file, with changes, beside its data."""
    write_archive(tmp_path / "toy.npz")

    def write(name: str = "toy", **changes: str) -> Path:
        text = FILE.replace('"toy"', f'"{name}"')
        for before, after in changes.items():
            line = re.search(rf"^{before} = .*$", text, re.MULTILINE)
            text = text.replace(line[0], after) if line else f"{text}{after}\n"
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return path

    return write


def loaded(path: Path) -> TrainFile:
    return load_training(path)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli", "train", *map(str, words)]


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT_S
    while not ready():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def history(output: Path) -> list[dict[str, str]]:
    path = output / "history.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def saved(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(output / "state.pt", weights_only=True)
    return content


def difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The largest difference between the weights and averages of two saved trainings."""
    return max(
        float((first[part][name] - second[part][name]).abs().max())
        for part in ("network", "average")
        for name in first[part]
    )


def plain(path: Path) -> TrainSummary:
    return train.train(loaded(path))


def test_a_training_leaves_what_its_user_needs(
    toy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = toy(checkpoint_every="checkpoint_every = 2")
    output = path.parent / "toy.training"
    done = subprocess.run(
        command(path, "--json"), capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    end = json.loads(done.stdout.splitlines()[-1])
    assert end["finished"]
    steps = end["step"]
    names = {file.name for file in output.glob("*.safetensors")}
    assert names == {
        "best.safetensors",
        f"toy-step-{steps // 2:06d}.safetensors",
        f"toy-step-{steps:06d}.safetensors",
    }
    rows = history(output)
    assert [float(row["epoch"]) for row in rows] == [0, 1, 2, 3, 4]
    assert float(rows[-1]["validation"]) < 0.7 * float(rows[0]["validation"])
    card = (output / "toy.md").read_text()
    assert "| training geometries | 160 |" in card
    assert "| test geometries | 20 |" in card
    assert "H C N O" in card
    assert str(path.parent) not in card
    page = (output / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page

    sys.argv = ["basin", "model", "show", str(output / "best.safetensors"), "--json"]
    with pytest.raises(SystemExit):
        main()
    model = json.loads(capsys.readouterr().out)
    assert model["config"]["hidden"] == 32
    assert model["card"]["step"] == end["best"]["step"]
    assert model["card"]["data"]["parts"] == {"training": 160, "validation": 20, "test": 20}
    assert sum(model["config"]["size_histogram"].values()) == 160


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_very_same_weights(toy: Callable[..., Path]) -> None:
    whole, broken = toy("whole", epochs="epochs = 12"), toy("broken", epochs="epochs = 12")
    plain(whole)
    with broken.open("a") as file:
        file.write("[run]\nsave_every = 0.01\n")
    output = broken.parent / "broken.training"
    for rows in (3, 6):
        process = start(broken)
        wait_until(lambda rows=rows: len(history(output)) >= rows, process)
        process.kill()
        process.communicate()
        assert saved(output)["step"] < saved(whole.parent / "whole.training")["step"]
    summary = plain(broken)
    assert summary.resumed_at > 0
    assert summary.finished
    assert difference(saved(output), saved(whole.parent / "whole.training")) == 0.0
    columns = ("step", "validation", "training")
    for row, other in zip(history(output), history(whole.parent / "whole.training"), strict=True):
        assert [row[c] for c in columns] == [other[c] for c in columns]


def test_a_stop_saves_and_says_that_it_is_not_the_end(toy: Callable[..., Path]) -> None:
    path = toy(epochs="epochs = 100000")
    output = path.parent / "toy.training"
    process = start(path)
    wait_until(lambda: len(history(output)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 5, err
    assert "not finished: the same command goes on from here" in err
    step = saved(output)["step"]
    assert step > 0
    file = loaded(path)
    summary = train.train(file, stop=lambda: True)
    assert (summary.resumed_at, summary.step, summary.finished) == (step, step + 1, False)
    summary = train.train(file, max_time_s=1e-9)
    assert (summary.resumed_at, summary.step, summary.finished) == (step + 1, step + 2, False)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(toy: Callable[..., Path]) -> None:
    one, two = toy("one"), toy("two")
    plain(one)
    done = subprocess.run(
        command(two, "--devices", 2), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    alone, shared = saved(one.parent / "one.training"), saved(two.parent / "two.training")
    assert alone["step"] == shared["step"]
    assert difference(alone, shared) < 1e-4
    losses = [float(history(p.parent / f"{p.stem}.training")[-1]["training"]) for p in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_several_processes_stop_and_go_on_together(toy: Callable[..., Path]) -> None:
    path = toy(epochs="epochs = 100000")
    output = path.parent / "toy.training"
    process = start(path, "--devices", 2)
    wait_until(lambda: len(history(output)) >= 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 5, err
    step = saved(output)["step"]
    summary = train.train(loaded(path), stop=lambda: True)
    assert summary.resumed_at == step


def test_a_dead_process_ends_the_training_with_a_word(toy: Callable[..., Path]) -> None:
    path = toy(epochs="epochs = 100000")
    output = path.parent / "toy.training"
    process = start(path, "--devices", 2)
    wait_until(lambda: len(history(output)) >= 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    members = [
        int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    os.kill(members[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 4, err
    assert "the same command goes on" in err
    assert "Traceback" not in err.split("basin:")[-1]
    for pid in members:
        assert not Path(f"/proc/{pid}").exists()


def test_two_trainings_do_not_share_a_folder(toy: Callable[..., Path]) -> None:
    path = toy(epochs="epochs = 100000")
    process = start(path)
    output = path.parent / "toy.training"
    wait_until(lambda: len(history(output)) >= 1, process)
    second = subprocess.run(
        command(path), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    process.kill()
    process.communicate()
    assert second.returncode == 3
    assert (
        f"another `basin train` is working in this folder (process {process.pid}" in second.stderr
    )


def test_a_diverging_training_stops_and_keeps_the_last_good_state(
    toy: Callable[..., Path],
) -> None:
    path = toy(learning_rate="learning_rate = 1e30")
    with pytest.raises(RunError, match=r"step 2: the loss is (nan|inf).*lower learning_rate"):
        plain(path)
    output = path.parent / "toy.training"
    assert all(torch.isfinite(t).all() for t in saved(output)["network"].values())
    toy(learning_rate="learning_rate = 1e-3")
    assert plain(path).finished


def test_another_training_is_not_mixed_in(toy: Callable[..., Path]) -> None:
    plain(toy(epochs="epochs = 1"))
    with pytest.raises(CampaignError, match=r"toy\.toml: .*begun with batch = 32, not 16"):
        plain(toy(epochs="epochs = 1", batch="batch = 16"))
    write_archive(toy().parent / "toy.npz", count=199)
    with pytest.raises(CampaignError, match="with other data"):
        plain(toy())


def test_a_training_starts_from_the_weights_of_another(toy: Callable[..., Path]) -> None:
    first = plain(toy("first"))
    second = toy("second")
    second.write_text(f'init_from = "first.training/best.safetensors"\n{second.read_text()}')
    plain(second)
    rows = history(second.parent / "second.training")
    assert float(rows[0]["validation"]) == pytest.approx(first.best["validation"], rel=1e-6)
    card = (second.parent / "second.training" / "second.md").read_text()
    assert "It started from the weights of best (SHA-256 " in card


def test_a_store_gives_relaxed_geometries(tmp_path: Path) -> None:
    records = Records()
    smiles = ("CCO", "CC(=O)O", "c1ccccc1", "CC#N")
    for number in range(24):
        records.relaxed(f"gdb9 {number}", smiles[number % 4], changed=number == 5)
    store = new_store(tmp_path / "toy.basin")
    records.seal(store)
    path = tmp_path / "toy.toml"
    path.write_text(FILE.replace("toy.npz", "toy.basin"))
    file = loaded(path)
    data, judged, summary = read_data(file.data, tmp_path)
    # 1, 11 and 21 are the test part, 0, 10 and 20 the validation part, 5 changed its bonds.
    assert sorted(judged.names) == ["gdb9 0", "gdb9 10", "gdb9 20"]
    assert len(data) == 24 - 3 - 3 - 1
    assert summary.left_out == {"bonds that changed in the relaxation": 1}
    assert summary.elements == [1, 6, 7, 8]
    for field, what in (
        ('stage = "gfn"', r'stage = "gfn": did you mean "gfn2"\?'),
        ('level = "GFN1-xTB"', r'level = "GFN1-xTB": did you mean "GFN2-xTB"\?'),
    ):
        path.write_text(FILE.replace('source = "toy.npz"', f'source = "toy.basin"\n{field}'))
        with pytest.raises(CampaignError, match=what):
            read_data(loaded(path).data, tmp_path)


def test_bond_orders_are_those_of_the_graph() -> None:
    orders = bond_orders("C=O")
    assert orders.tolist() == [[0, 2, 1, 1], [2, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


def test_xyz_files_are_read_too(tmp_path: Path) -> None:
    from ase.io import write

    frames = [molecule(KINDS[i % len(KINDS)]) for i in range(20)]
    for number, frame in enumerate(frames):
        frame.info["name"] = f"toy {number}"
    write(tmp_path / "toy.extxyz", frames)
    path = tmp_path / "toy.toml"
    path.write_text(FILE.replace("toy.npz", "toy.extxyz"))
    data, judged, summary = read_data(loaded(path).data, tmp_path)
    assert len(data) + len(judged) + summary.parts["test"] == 20
    path.write_text(
        FILE.replace("toy.npz", "toy.extxyz").replace(
            "[model]", '[model]\nelements = ["H", "C", "O"]'
        )
    )
    file = loaded(path)
    assert file.elements == (1, 6, 8)
    _, _, summary = read_data(file.data, tmp_path, file.elements)
    assert summary.left_out == {"an element that the model has not": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = \n", r"bad\.toml:1:8: not valid TOML"),
        (
            FILE.replace("[data]\n", ""),
            r'bad\.toml:3: source = "toy\.npz": unknown key; belongs in',
        ),
        (
            FILE.replace("hidden", "hiden"),
            r'\[model\] hiden = 32: unknown key; did you mean "hidden"',
        ),
        (FILE.replace("epochs = 4", ""), r"\[training\] does not say when to stop; write epochs"),
        (FILE.replace("batch = 32", "batch = 0"), r"\[training\] batch = 0: must be at least 1"),
        (FILE.replace("batch = 32", 'batch = "8"'), r'batch = "8": must be a whole number'),
        (
            FILE.replace("epochs = 4", 'max_time = "4 parsec"'),
            r'\[training\] max_time = "4 parsec": has the unknown unit "parsec"',
        ),
        (
            FILE + 'objective = "edn"\n',
            r'\[training\] objective = "edn": is not an objective; did you mean "edm"',
        ),
        (
            FILE + 'objective = "force-field"\n',
            r"\[training\] objective = 'force-field' is for models of architecture 'basin'; this "
            "one is of architecture 'edm', for which write objective = 'edm'",
        ),
        (FILE + "seed = 1\n[run]\nbatch = 3\n", r"\[run\] batch = 3: unknown key; belongs in"),
        (FILE.replace("hidden = 32", 'elements = ["Xx"]'), r'elements = "Xx": is not an element'),
        (FILE.replace("hidden = 32", "hidden = 0"), r"\[model\]: model hidden = 0; give 1 or more"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(CampaignError, match=expected) as error:
        loaded(path)
    assert not re.search(r"pydantic|validation error|Input should|type=", str(error.value))


def test_missing_data_are_named(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    for source, what in (
        ("nothing.npz", "there is no such file or store"),
        (".", "is a folder, but no Basin store"),
        ("toy.toml", "holds no geometries; give a Basin store, or files of"),
    ):
        path.write_text(FILE.replace("toy.npz", source))
        with pytest.raises(CampaignError, match=rf"toy\.toml: \[data\] source.*{what}"):
            plain(path)


def test_a_set_without_a_validation_part_is_refused(tmp_path: Path) -> None:
    atoms = molecule("CH4")
    np.savez(
        tmp_path / "toy.npz",
        gdb9_id=[2, 3],
        numbers=np.stack([atoms.numbers] * 2),
        positions=np.stack([atoms.positions] * 2),
    )
    path = tmp_path / "toy.toml"
    path.write_text(FILE)
    with pytest.raises(CampaignError, match="no geometry belongs to the validation part, of 2"):
        plain(path)


def test_published_models_are_imported_and_shown(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared_data / "edm_checkpoint"
    weights, settings = next(folder.glob("*ema.npy")), next(folder.glob("*args.pickle"))
    target = tmp_path / "published.safetensors"

    def run(*words: object) -> str:
        sys.argv = ["basin", "model", *map(str, words)]
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    assert "746,892 parameters" in run("import", weights, settings, target)
    first = target.read_bytes()
    shown = run("show", target)
    assert "H C N O F" in shown
    assert re.search(r"steps +200", shown)
    target.unlink()
    run("import", weights, target)
    assert target.read_bytes() == first  # equal models have equal keys
    sys.argv = ["basin", "model", "import", str(weights), str(target)]
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "is there already" in capsys.readouterr().err


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()
    for key, words, meaning in describe_training():
        assert f"| `{key}` | {words} | {meaning} |" in text


def test_the_training_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()
    block = re.search(r"```toml\n(# my-model\.toml\n.*?)```", text, re.DOTALL)
    assert block is not None
    path = tmp_path / "my-model.toml"
    path.write_text(block[1])
    assert loaded(path).settings().max_level == 120


def test_the_command_starts_without_torch() -> None:
    program = (
        "import sys\nimport orchestrator.cli\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'safetensors'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_molecule_kept_for_judgement_is_not_learnt_from_another_source(tmp_path: Path) -> None:
    """Names divide one file; the same molecule under another name elsewhere is left out."""

    def frames(path: Path, members: list[tuple[str, str]]) -> None:
        from ase import Atoms
        from ase.io import write

        from kernels.embedding import embed

        made = [(embed(smiles, seed=1, max_attempts=50), name) for smiles, name in members]
        atoms = [Atoms(numbers=m.numbers, positions=m.positions) for m, _ in made]
        for one, (_, name) in zip(atoms, made, strict=True):
            one.info["name"] = name
        write(path, atoms, format="extxyz")

    frames(tmp_path / "a.xyz", [("CCO", "a10"), ("CCC", "a12"), ("CCN", "a11")])
    frames(tmp_path / "b.xyz", [("CCO", "b2"), ("CCN", "b3"), ("COC", "b4"), ("CCC", "b5")])
    (tmp_path / "t.toml").write_text(
        'name = "t"\n[data]\nsource = ["a.xyz", "b.xyz"]\n[training]\nepochs = 1\n'
    )
    file = load_training(tmp_path / "t.toml")
    training, validation, summary = read_data(file.data, tmp_path, needs=["bonds"])
    assert sorted(training.names) == ["a12", "b4", "b5"]
    assert validation.names == ["a10"]
    assert summary.left_out["another geometry of it is kept for validation or test"] == 2
