"""Plan keys: what determines a result, and nothing else; and the count of what is planned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernels import embedding, forcefield
from kernels.diffusion import model_files
from kernels.graph import parse_smiles
from orchestrator import stages as stages_module
from orchestrator.campaign import load_campaign
from orchestrator.columns import key_array
from orchestrator.errors import CampaignError
from orchestrator.ingest import molecule_key
from orchestrator.key_index import KeyIndex
from orchestrator.plan import Plan, Root, standing
from orchestrator.schema import STATUSES
from tests.orchestrator.run_fixtures import write_campaign
from tests.orchestrator.tiny_models import write_model

EMBED = 'kernel = "embed"\n'
MMFF = 'kernel = "mmff"\n'
RELAX = 'name = "gfn2"\nkernel = "relax"\n'


def root(smiles: str) -> Root:
    molecule = parse_smiles(smiles)
    key = molecule_key(molecule)
    n = len(molecule.numbers)
    return Root(key, key, molecule.smiles, molecule.charge, molecule.multiplicity, n)


def plan(folder: Path, *stages: str, top: str = "", run: str = "") -> Plan:
    path = write_campaign(folder, ["C"], stages="".join(f"[[stages]]\n{s}\n" for s in stages))
    path.write_text(top + path.read_text() + run)
    return Plan(load_campaign(path))


def keys(made: Plan, smiles: str = "CCO", conformer: int = 0) -> list[bytes]:
    """Return the key of each stage for one conformer of a molecule."""
    return dict(made.chains(root(smiles)))[conformer]


def changed(one: list[bytes], other: list[bytes]) -> list[bool]:
    return [a != b for a, b in zip(one, other, strict=True)]


@pytest.fixture
def usual(tmp_path: Path) -> list[bytes]:
    return keys(plan(tmp_path, EMBED, MMFF, RELAX))


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        (0, "max_attempts = 51"),
        (1, "max_steps = 2001"),
        (2, 'level = "MMFF94"'),
        (2, 'program = "xtb-python"'),
        (2, 'optimizer = "LBFGS"'),
        (2, "fmax = 0.031"),
        (2, "max_steps = 501"),
        (2, "max_step_length = 0.19"),
        (2, "electronic_temperature = 301"),
        (2, "save_forces = true"),
    ],
)
def test_a_setting_changes_the_keys_of_its_stage_and_of_all_after_it(
    tmp_path: Path, usual: list[bytes], stage: int, line: str, require_engine: object
) -> None:
    if "xtb-python" in line:
        require_engine("xtb-python")  # type: ignore[operator]
    stages = [EMBED, MMFF, RELAX]
    stages[stage] += line
    made = keys(plan(tmp_path, *stages))
    assert changed(usual, made) == [s >= stage for s in range(3)]


def test_defaults_written_out_and_other_units_are_the_same_keys(
    tmp_path: Path, usual: list[bytes]
) -> None:
    written = RELAX + 'level = "GFN2-xTB"\nprogram = "tblite"\nfmax = "30 meV/Å"\nmax_steps = 500'
    assert keys(plan(tmp_path, EMBED + "max_attempts = 50", MMFF, written)) == usual


@pytest.mark.parametrize(
    "line",
    [
        'pool = "gpu"',
        'time_limit = "1 s"',
        'memory_limit = "1 GB"',
        'name = "other"',
    ],
)
def test_names_pools_and_limits_enter_no_key(tmp_path: Path, usual: list[bytes], line: str) -> None:
    stage = 'kernel = "relax"\n' + line
    assert keys(plan(tmp_path, EMBED, MMFF, stage)) == usual


def test_run_settings_and_names_of_the_campaign_enter_no_key(
    tmp_path: Path, usual: list[bytes]
) -> None:
    run = 'bundle_time = "3 s"\ncheckpoint_every = 1\nseal_every = 1\nwindow = 5\ncrash_limit = 7\n'
    path = write_campaign(
        tmp_path / "elsewhere",
        ["C"],
        name="elsewhere",
        stages="".join(f"[[stages]]\n{s}" for s in (EMBED, MMFF, RELAX)),
        run=run,
    )
    assert keys(Plan(load_campaign(path))) == usual


def test_the_seed_changes_every_key(tmp_path: Path, usual: list[bytes]) -> None:
    made = keys(plan(tmp_path, EMBED, MMFF, RELAX, top="seed = 1\n"))
    assert changed(usual, made) == [True] * 3


@pytest.mark.parametrize(
    ("program", "first"), [("rdkit", 0), ("tblite", 2)], ids=["rdkit", "tblite"]
)
def test_a_program_s_version_changes_the_keys_from_its_first_stage_on(
    tmp_path: Path,
    usual: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    first: int,
) -> None:
    installed = stages_module.installed_version

    def other(name: str, stage: str) -> str:
        return "999.9" if name == program else installed(name, stage)

    monkeypatch.setattr(stages_module, "installed_version", other)
    made = keys(plan(tmp_path, EMBED, MMFF, RELAX))
    assert changed(usual, made) == [s >= first for s in range(3)]


@pytest.mark.parametrize(("module", "first"), [(embedding, 0), (forcefield, 1)])
def test_a_kernel_s_version_changes_the_keys_from_its_stage_on(
    tmp_path: Path,
    usual: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    first: int,
) -> None:
    monkeypatch.setattr(module, "VERSION", 999)
    made = keys(plan(tmp_path, EMBED, MMFF, RELAX))
    assert changed(usual, made) == [s >= first for s in range(3)]


def test_a_stage_s_key_depends_on_where_it_starts_from(tmp_path: Path) -> None:
    both = plan(tmp_path, EMBED, MMFF, RELAX, 'name = "raw"\nkernel = "relax"\nfrom = "embed"\n')
    embed, mmff, after_mmff, after_embed = keys(both)
    assert len({embed, mmff, after_mmff, after_embed}) == 4
    assert both.children == [[1, 3], [2], [], []]
    assert both.depth == [0, 1, 2, 1]


def test_molecules_differ_and_spellings_do_not(usual: list[bytes], tmp_path: Path) -> None:
    made = plan(tmp_path, EMBED, MMFF, RELAX)
    assert keys(made, "OCC") == usual
    assert changed(usual, keys(made, "CCN")) == [True] * 3
    acid, acetate = keys(made, "CC(=O)O"), keys(made, "CC(=O)[O-]")
    assert changed(acid, acetate) == [True] * 3


def test_more_conformers_keep_the_first_ones(tmp_path: Path) -> None:
    two = dict(plan(tmp_path, EMBED + "conformers = 2", MMFF).chains(root("CCO")))
    five = dict(plan(tmp_path, EMBED + "conformers = 5", MMFF).chains(root("CCO")))
    assert {c: five[c] for c in two} == two
    assert len({key for chain in five.values() for key in chain}) == 10


def test_the_same_stage_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match="again: computes exactly what stage 'mmff' computes"):
        plan(tmp_path, EMBED, MMFF, 'name = "again"\nkernel = "mmff"\nfrom = "embed"\n')


# Stages with a diffusion model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "little.safetensors")


def diffuse(model: str = "little.safetensors", n: str = "20", *lines: str) -> str:
    return "\n".join([f'kernel = "diffuse"\nmodel = "{model}"\nn = {n}', *lines, ""])


def test_the_key_of_a_diffusion_holds_what_the_model_is_and_not_where(
    tmp_path: Path, model: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "copy.safetensors").write_bytes(model.read_bytes())
    one = plan(tmp_path, EMBED, diffuse(), RELAX)
    made = keys(one)
    copy = keys(plan(tmp_path, EMBED, diffuse("elsewhere/copy.safetensors"), RELAX))
    assert copy == made
    assert one.stages[1].settings["model"] == model_files.digest(model)
    assert one.stages[1].model == str(model)
    write_model(model, seed=1)
    assert changed(made, keys(plan(tmp_path, EMBED, diffuse(), RELAX))) == [False, True, True]


@pytest.mark.parametrize("line", ["n = 21", 'protocol = "published"'])
def test_settings_of_a_diffusion_enter_its_key(tmp_path: Path, model: Path, line: str) -> None:
    made = keys(plan(tmp_path, EMBED, diffuse(), RELAX))
    text = diffuse("little.safetensors", line.removeprefix("n = ")) if "n =" in line else None
    other = keys(plan(tmp_path, EMBED, text or diffuse("little.safetensors", "20", line), RELAX))
    assert changed(made, other) == [False, True, True]


def test_only_a_diffusion_with_noise_depends_on_the_seed(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "molecules.sdf"
    path.touch()
    for protocol, depends in (("deterministic", False), ("published", True)):
        stages = f"[[stages]]\n{diffuse('little.safetensors', '5', f'protocol = {protocol!r}')}"
        found = []
        for seed in (0, 1):
            file = write_campaign(tmp_path, stages=stages, files='["molecules.sdf"]')
            file.write_text(f"seed = {seed}\n" + file.read_text())
            found.append(keys(Plan(load_campaign(file))))
        assert (found[0] != found[1]) == depends


def test_single_points_follow_the_path_of_a_diffusion_only(tmp_path: Path, model: Path) -> None:
    points = 'name = "{0}"\nkernel = "single_points"\nfrom = "{1}"\n'
    made = plan(
        tmp_path,
        EMBED,
        diffuse(n="[5, 9]"),
        RELAX,
        points.format("along", "diffuse"),
        points.format("at", "embed"),
        points.format("end", "gfn2"),
    )
    found = {s.name: (s.along_path, s.frames) for s in made.stages if s.kernel == "single_points"}
    assert found == {
        "along-5": (True, 6), "along-9": (True, 10), "at": (False, 1), "end-5": (False, 1),
        "end-9": (False, 1),
    }  # fmt: skip
    assert made.tasks_per_root() == [1] * len(made.stages)


def test_standing_counts_every_planned_task_once(tmp_path: Path) -> None:
    made = plan(tmp_path, EMBED + "conformers = 2", MMFF, RELAX)
    roots = [root(s) for s in ("C", "CC", "CCC")]
    chains = {s: dict(made.chains(r)) for s, r in zip(("C", "CC", "CCC"), roots, strict=True)}
    ok, embed, timeout = (STATUSES.index(name) for name in ("ok", "embed", "timeout"))
    done = {
        chains["C"][0][0]: ok,
        chains["C"][0][1]: ok,
        chains["C"][0][2]: timeout,
        chains["C"][1][0]: ok,
        chains["CC"][0][0]: embed,
        chains["CC"][1][0]: ok,
        chains["CC"][1][1]: ok,
    }
    index = KeyIndex()
    index.extend(key_array(list(done)), np.array(list(done.values()), np.uint8))
    stand = standing(made, roots, index)
    assert stand.planned == [6, 6, 6]
    assert stand.ok == [3, 2, 0]
    assert stand.failed == [1, 0, 1]
    assert stand.upstream == [0, 1, 1]
    ready = [{(item.smiles, item.conformer) for item in items} for items in stand.ready]
    assert ready == [{("CCC", 0), ("CCC", 1)}, {("C", 1)}, {("CC", 1)}]
    (item,) = stand.ready[2]
    assert item.key == chains["CC"][1][2]
    assert item.parent_key == chains["CC"][1][1]


def test_a_child_kept_from_a_damaged_store_counts_once(tmp_path: Path) -> None:
    """The parent's row is lost, the child's is not: the parent alone runs again."""
    made = plan(tmp_path, EMBED, MMFF)
    (_, (embed, mmff)), *_ = made.chains(root("C"))
    index = KeyIndex()
    index.extend(key_array([mmff]), np.zeros(1, np.uint8))
    stand = standing(made, [root("C")], index)
    assert (stand.ok, stand.failed, stand.upstream) == ([0, 1], [0, 0], [0, 0])
    assert [item.key for item in stand.ready[0]] == [embed]
    assert not stand.ready[1]
