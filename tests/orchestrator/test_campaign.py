"""Campaign files: what the defaults mean, and what a person reads when something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.diffusion import model_files
from orchestrator.campaign import (
    Campaign,
    DiffuseStage,
    EmbedStage,
    RelaxStage,
    describe_fields,
    load_campaign,
)
from orchestrator.errors import CampaignError
from tests.orchestrator.tiny_models import write_model

ROOT = Path(__file__).parents[2]
HEAD = 'name = "first"\n[molecules]\nfiles = ["a.smi"]\n'
EMBED = '[[stages]]\nkernel = "embed"\n'
RELAX = '[[stages]]\nkernel = "relax"\n'

# Words of the validation library, which mean nothing to a person with a campaign file.
JARGON = re.compile(
    r"Input should|type=|input_value|pydantic|https?://|extra_forbidden|validation error|Field "
    r"required|Extra inputs|model_type|model_attr|union_tag|literal_error|traceback",
    re.IGNORECASE,
)


def load(folder: Path, text: str | bytes) -> Campaign:
    path = folder / "first.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_campaign(path)


def message_of(folder: Path, text: str | bytes) -> str:
    with pytest.raises(CampaignError) as error:
        load(folder, text)
    message = str(error.value)
    assert "first.toml" in message
    assert not JARGON.search(message), message
    return message


def relax_of(folder: Path, fields: str) -> RelaxStage:
    stage = load(folder, HEAD + EMBED + RELAX + fields).stages[1]
    assert isinstance(stage, RelaxStage)
    return stage


def test_quickstart_is_the_published_protocol() -> None:
    campaign = load_campaign(ROOT / "jobs" / "quickstart.toml")
    embed, mmff, gfn2, diffused, relaxed, hessian = campaign.stages
    assert (embed.from_, mmff.from_, gfn2.from_) == (None, "embed", "mmff")
    assert (diffused.from_, relaxed.from_) == ("mmff", "diffused")
    assert relaxed.settings() == gfn2.settings()
    assert hessian.settings() == {**gfn2.settings(), "initial_hessian": "force-field"}
    assert gfn2.settings() == {
        "level": "GFN2-xTB",
        "program": "tblite",
        "optimizer": "BFGS",
        "fmax": 0.03,
        "max_steps": 500,
        "max_step_length": 0.2,
        "electronic_temperature": 300.0,
        "save_forces": False,
    }
    assert set(gfn2.programs()) == {"tblite"}
    assert campaign.store == ROOT / "results" / "quickstart"


def test_the_examples_show_every_field_with_its_default() -> None:
    names = (
        *("quickstart.toml", "rehearsal.toml", "qm9_speedup.toml", "generation.toml"),
        *("qm9_boltzmann.toml", "boltzmann_small.toml", "qm9_dft_speedup.toml"),
    )
    text = "".join((ROOT / "jobs" / name).read_text(encoding="utf-8") for name in names)
    written = set(re.findall(r"^(?:# )?([a-z_]+) = ", text, re.MULTILINE))
    fields = describe_fields()
    assert {field.path.rsplit(".")[-1] for field in fields} == written
    uncommented = re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    for field in fields:
        assert field.description
        if re.fullmatch(r'".*"|\d+|true|false', field.default):
            name = field.path.rsplit(".")[-1]
            assert re.search(rf"^{name} = {re.escape(field.default)}\s", uncommented, re.MULTILINE)


def test_quickstart_loads_with_every_comment_switched_on(tmp_path: Path) -> None:
    text = (ROOT / "jobs" / "quickstart.toml").read_text(encoding="utf-8")
    every = re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    plain = load(tmp_path, text)
    full = load(tmp_path, every)
    assert [s.settings() for s in full.stages] == [s.settings() for s in plain.stages]
    assert full.run == plain.run


def test_units_and_defaults_do_not_change_the_settings(tmp_path: Path) -> None:
    plain = relax_of(tmp_path, "").settings()
    spelled = relax_of(
        tmp_path,
        'level = "GFN2-xTB"\nprogram = "tblite"\nfmax = "30 meV/Å"\nmax_step_length = "20 pm"\n'
        'electronic_temperature = 300\nname = "fine"\npool = "gpu"\ntime_limit = "3 h"\n',
    )
    assert spelled.settings() == plain
    assert repr(spelled.settings()) == repr(plain)  # 300 and 300.0 would hash apart
    assert spelled.time_limit == 10_800


def test_conformers_do_not_enter_the_settings(tmp_path: Path) -> None:
    one = load(tmp_path, HEAD + EMBED).stages[0]
    five = load(tmp_path, HEAD + EMBED + "conformers = 5\n").stages[0]
    assert isinstance(five, EmbedStage)
    assert five.conformers == 5
    assert one.settings() == five.settings()


def test_a_force_field_has_no_electronic_temperature(tmp_path: Path) -> None:
    settings = relax_of(tmp_path, 'level = "MMFF94"\n').settings()
    assert settings["program"] == "rdkit"
    assert "electronic_temperature" not in settings


def test_stages_branch_off_any_earlier_one(tmp_path: Path) -> None:
    text = HEAD + EMBED + '[[stages]]\nkernel = "mmff"\n' + RELAX
    text += '[[stages]]\nname = "raw"\nkernel = "relax"\nfrom = "embed"\n'
    campaign = load(tmp_path, text)
    assert [stage.from_ for stage in campaign.stages] == [None, "embed", "mmff", "embed"]
    assert campaign.stage("raw").name == "raw"
    with pytest.raises(CampaignError, match='did you mean "raw"'):
        campaign.stage("rw")


def test_store_is_beside_the_file_and_expands_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path, HEAD + EMBED).store == tmp_path / "first.basin"
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    store = load(tmp_path, 'store = "$SCRATCH/run"\n' + HEAD + EMBED).store
    assert store == Path("/scratch/me/run")


def test_campaigns_are_frozen(tmp_path: Path) -> None:
    campaign = load(tmp_path, HEAD + EMBED)
    with pytest.raises(Exception, match="frozen"):
        campaign.seed = 3


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + (HEAD + EMBED).replace("\n", "\r\n").encode()
    assert load(tmp_path, text).name == "first"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sed = 1\n" + HEAD + EMBED, [":1: sed = 1", "unknown key", 'did you mean "seed"']),
        (
            HEAD + EMBED + "conformer = 2\n",
            [":6:", "stage 1 (embed): conformer = 2", '"conformers"'],
        ),
        (HEAD + EMBED + "fmax = 0.1\n", ["fmax = 0.1", 'kernel = "relax"']),
        (HEAD + EMBED + "seed = 4\n", [":6:", "seed = 4", "top of the file"]),
        (HEAD + EMBED + "[run]\nbundletime = 4\n", ["[run] bundletime = 4", '"bundle_time"']),
        (HEAD + EMBED + '[[stages]]\nkernel = "rlax"\n', [":7:", '"rlax"', '"relax"']),
        (
            HEAD + '[[stages]]\nname = "q"\n',
            ["kernel is missing", '"embed", "mmff", "relax", ', ' or "rehearse"'],
        ),
        (HEAD + '[stages]\nkernel = "embed"\n', [":4:", "[[stages]]"]),
        (HEAD + '[[stage]]\nkernel = "embed"\n', [":4:", "[[stages]]"]),
        ('name = "x"\n[[molecules]]\nfiles = ["a.smi"]\n' + EMBED, ["write [molecules]"]),
        (HEAD, ["stages is missing", "[[stages]]"]),
        ("", ["name is missing", "molecules is missing", "stages is missing"]),
        (HEAD.replace("first", "my run") + EMBED, [':1: name = "my run"', "letters, digits"]),
        ("seed = -1\n" + HEAD + EMBED, ["seed = -1", "at least 0"]),
        (HEAD.replace('["a.smi"]', '"a.smi"') + EMBED, ['files = "a.smi"', "list", "["]),
        (HEAD.replace('"a.smi"', "") + EMBED, ["files = []", "is empty"]),
        (HEAD.replace("a.smi", "a.mol2") + EMBED, ['"a.mol2"', "no known format", ".sdf"]),
        ('store = "$NO_SUCH_PLACE/x"\n' + HEAD + EMBED, ["$NO_SUCH_PLACE", "not set"]),
        (HEAD + EMBED + "conformers = 0\n", ["conformers = 0", "at least 1"]),
        (HEAD + EMBED + 'max_attempts = "50"\n', ['"50"', "whole number, without quotes"]),
        (HEAD + EMBED + "memory_limit = 2\n", ["memory_limit = 2", "100 MB", '"2 GB"']),
        (HEAD + EMBED + 'time_limit = "10 m"\n', ['"10 m"', '"min"']),
        (HEAD + EMBED + RELAX + 'fmax = "0.03 Å"\n', [":8:", '"0.03 Å"', "length", '"0.03 eV/Å"']),
        (HEAD + EMBED + RELAX + "fmax = -0.1\n", ["fmax = -0.1", "more than 0 eV/Å"]),
        (HEAD + EMBED + RELAX + "fmax = nan\n", ["fmax = nan", "finite"]),
        (HEAD + EMBED + RELAX + "save_forces = 1\n", ["save_forces = 1", "true or false"]),
        (HEAD + EMBED + RELAX + 'optimizer = "bfgs"\n', ['"bfgs"', 'did you mean "BFGS"']),
        (HEAD + EMBED + RELAX + 'level = "GFN2"\n', ['level = "GFN2"', '"GFN2-xTB"']),
        (HEAD + EMBED + RELAX + 'program = "tblight"\n', ['"tblight"', 'did you mean "tblite"']),
        (HEAD + EMBED + RELAX + 'level = "MMFF94"\nprogram = "tblite"\n', ['there is "rdkit"']),
        (HEAD + EMBED + RELAX + RELAX, [":8:", "stage 3", "stage 2 (line 6)", '"relax-2"']),
        (HEAD + EMBED + RELAX + 'from = "embd"\n', ['from = "embd"', 'did you mean "embed"']),
        (HEAD + EMBED + RELAX + 'from = "relax"\n', ["earlier one", '"embed"']),
        (HEAD + EMBED + 'from = "mmff"\n', ['from = "mmff"', "leave the line out"]),
        (HEAD + RELAX, ['"a.smi"', "no geometry", 'kernel = "embed"', ".sdf"]),
        (HEAD + EMBED + "[run]\nwindow = 0\n", ["[run] window = 0", "at least 1"]),
        (HEAD + EMBED + "[run]\nseal_every = 10:00:00\n", ["seal_every = 10:00:00", "time"]),
        ('name = "x"\npath = "y"\n', ['path = "y"', "unknown key"]),
        ("name = 'x'\nmolecules = 4\nstages = [1]\n", ["molecules = 4", "must be a table"]),
    ],
)
def test_one_slip_one_clear_message(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = message_of(tmp_path, text)
    for part in parts:
        assert part in message


def test_one_slip_gives_one_problem(tmp_path: Path) -> None:
    for slip in ('nam = "x"\n' + HEAD.split("\n", 1)[1] + EMBED, HEAD + EMBED + "conformers = 0\n"):
        assert len(message_of(tmp_path, slip).splitlines()) == 1


def test_all_problems_are_listed_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "seed = -1\n" + HEAD + EMBED + "conformers = 0\n" + RELAX + 'fmax = "1 kg"\nform = "x"\n'
    first, *rest = message_of(tmp_path, text).splitlines()
    assert first.startswith("4 problems in ")
    lines = [int(re.search(r"first\.toml:(\d+):", line)[1]) for line in rest]  # type: ignore[index]
    assert lines == [1, 7, 10, 11]


@pytest.mark.parametrize(
    ("text", "position", "parts"),
    [
        ("name = quick\n", "1:8", ["quotes", "name = quick", "^"]),
        ('name = "x"\n[molecules\n', "2:11", ["]"]),
        ('name = "x\n', "1:10", ["closing quote"]),
        ('name = "x"\nname = "y"\n', "2:11", ["twice"]),
        ('store = "C:\\data"\n', "1:14", ["backslash"]),
        ('files = ["a",\n', "1:14", ["bracket"]),
        (HEAD + EMBED + "max_attempts = True\n", "6:16", ["true and false are lower case"]),
    ],
)
def test_toml_slips_give_line_and_column(
    tmp_path: Path, text: str, position: str, parts: list[str]
) -> None:
    message = message_of(tmp_path, text)
    assert f"first.toml:{position}:" in message
    for part in parts:
        assert part in message


def test_a_file_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    assert "first.toml:2: the file is not UTF-8" in message_of(tmp_path, b'# a\nname = "\xe9"\n')


def test_a_missing_file_lists_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").touch()
    (tmp_path / "another.toml").touch()
    with pytest.raises(CampaignError) as error:
        load_campaign(tmp_path / "quikstart.toml")
    message = str(error.value)
    assert "there is no such file" in message
    assert message.index("quickstart.toml") < message.index("another.toml")
    with pytest.raises(CampaignError, match=r"is a folder.*another\.toml"):
        load_campaign(tmp_path)


def test_a_wildcard_is_judged_by_the_files_it_finds(tmp_path: Path) -> None:
    # Names so long that the message cannot hold the whole path still end in the file's own.
    data = tmp_path / ("data" * 20)
    data.mkdir()
    (data / "a.smi").write_text("C\n")
    (data / "notes.txt").write_text("")
    message = message_of(tmp_path, HEAD.replace("a.smi", f"{data.name}/*") + RELAX)
    assert "a.smi" in message
    assert "notes.txt" in message
    assert load(tmp_path, HEAD.replace("a.smi", "*.sdf.gz") + RELAX).stages[0].from_ is None


# Diffusion models, and lists of what to do with them


MMFF = '[[stages]]\nkernel = "mmff"\n'


def diffused(fields: str) -> str:
    return HEAD + EMBED + MMFF + f'[[stages]]\nname = "diffused"\nkernel = "diffuse"\n{fields}\n'


def tree(campaign: Campaign) -> dict[str, str | None]:
    return {stage.name: stage.from_ for stage in campaign.stages}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("first", "second"):
        write_model(tmp_path / f"{name}.safetensors")
    return tmp_path


def test_plain_values_give_plain_names(models: Path) -> None:
    campaign = load(models, diffused('model = "first.safetensors"\nn = 20') + RELAX)
    assert tree(campaign) == {
        "embed": None, "mmff": "embed", "diffused": "mmff", "relax": "diffused",
    }  # fmt: skip
    stage = campaign.stage("diffused")
    assert isinstance(stage, DiffuseStage)
    assert (stage.n, stage.model) == ((20,), (str(models / "first.safetensors"),))
    assert stage.words() == "first, n = 20, deterministic"
    assert stage.memory_limit == 4_000_000_000


def test_a_list_becomes_a_stage_for_each_value_with_all_that_starts_from_it(models: Path) -> None:
    more = '[[stages]]\nname = "energies"\nkernel = "single_points"\n'
    text = diffused('model = "first.safetensors"\nn = [20, 50]') + RELAX + more
    again = '[[stages]]\nname = "again"\nkernel = "relax"\nfrom = "relax"\nfmax = 0.01\n'
    one = '[[stages]]\nname = "far"\nkernel = "single_points"\nfrom = "diffused-50"\nline = true\n'
    assert tree(load(models, text + again + one)) == {
        "embed": None, "mmff": "embed", "diffused-20": "mmff", "diffused-50": "mmff",
        "relax-20": "diffused-20", "relax-50": "diffused-50",
        "energies-20": "relax-20", "energies-50": "relax-50",
        "again-20": "relax-20", "again-50": "relax-50", "far": "diffused-50",
    }  # fmt: skip


def test_models_multiply_the_stages_too(models: Path) -> None:
    fields = 'model = ["first.safetensors", "second.safetensors"]\nn = [5, 9]'
    campaign = load(models, diffused(fields) + RELAX)
    assert [name for name in tree(campaign) if name.startswith("relax")] == [
        "relax-5-first", "relax-5-second", "relax-9-first", "relax-9-second",
    ]  # fmt: skip
    stage = campaign.stage("diffused-9-second")
    assert isinstance(stage, DiffuseStage)
    assert (stage.n, Path(stage.model[0]).stem) == ((9,), "second")


def test_nothing_starts_from_energies_by_default(models: Path) -> None:
    energies = '[[stages]]\nname = "energies"\nkernel = "single_points"\nfrom = "mmff"\n'
    campaign = load(models, HEAD + EMBED + MMFF + energies + RELAX)
    assert campaign.stage("relax").from_ == "mmff"


def test_a_shipped_model_goes_by_its_name(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "WEIGHTS", models)
    stage = load(models, diffused('model = "first"\nn = 20')).stage("diffused")
    assert isinstance(stage, DiffuseStage)
    # The file is elsewhere on another machine.
    assert stage.model == ("first",)
    assert stage.settings()["model"] == model_files.digest(models / "first.safetensors")
    message = message_of(models, diffused('model = "frist"\nn = 20'))
    assert ':11: stage 3 (diffused): model = "frist"' in message
    assert 'did you mean "first"?' in message


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ("n = 20", ["stage 3 (diffused): model is missing"]),
        ('model = "first.safetensors"', ["stage 3 (diffused): n is missing"]),
        ('model = "first.safetensors"\nn = []', [":12:", "n = []", "is empty", "[20, 50]"]),
        ("model = []\nn = 5", ["model = []", "is empty", ".safetensors"]),
        ('model = ""\nn = 5', ['model = ""', "is empty"]),
        ('model = "first.safetensors"\nn = 0', ["n = 0", "at least 1"]),
        ('model = "first.safetensors"\nn = "20"', ['n = "20"', "whole number, without quotes"]),
        ('model = "first.safetensors"\nn = 20.5', ["n = 20.5", "whole number"]),
        ('model = "first.safetensors"\nn = true', ["n = true", "whole number"]),
        (
            'model = "first.safetensors"\nn = [20, 101]',
            [":12:", "n = 101", '"first.safetensors" has 100 diffusion steps', "1 to 100"],
        ),
        ('model = "first.safetensors"\nn = [20, 20]', ["n = [20, 20]", "holds 20 twice"]),
        (
            'model = "first.safetensors"\nn = 5\nprotocol = "publisched"',
            [":13:", '"publisched"', 'did you mean "published"?'],
        ),
        (
            'model = "frist.safetensors"\nn = 5',
            [":11:", "there is no such file", "holds first.safetensors"],
        ),
        ('model = "notes.safetensors"\nn = 5', ["is no Basin checkpoint", "basin model import"]),
        ('model = ["first.safetensors", 7]\nn = 5', ["must be text in quotes"]),
        (
            'model = ["first.safetensors", "more/first.safetensors"]\nn = 5',
            ["have the same name", "rename one"],
        ),
        ('model = "$NO_SUCH_PLACE/a.safetensors"\nn = 5', ["$NO_SUCH_PLACE", "not set"]),
        (
            'model = "first.safetensors"\nn = 5\n' + RELAX + 'from = "diffuzed"',
            ['from = "diffuzed"', 'did you mean "diffused"'],
        ),
        (
            'model = "first.safetensors"\nn = 5\n[[stages]]\nname = "e"\nkernel = "single_points"\n'
            + RELAX
            + 'from = "e"',
            [":18:", 'from = "e"', "no geometry to start from", '"diffused"'],
        ),
        (
            'model = "first.safetensors"\nn = [5]\n'
            + RELAX
            + 'name = "diffused-5"\nfrom = "mmff"\n',
            ['name = "diffused-5"', "stage 3 (line 8) has this name too"],
        ),
        (
            'model = "first.safetensors"\nn = 5\n[[stages]]\nkernel = "single_points"\n'
            'level = "GFN2"\n',
            ['level = "GFN2"', 'did you mean "GFN2-xTB"?'],
        ),
    ],
)
def test_one_slip_with_a_model(models: Path, fields: str, parts: list[str]) -> None:
    (models / "notes.safetensors").write_bytes(b"not a model at all")
    (models / "more").mkdir()
    write_model(models / "more" / "first.safetensors", seed=1)
    message = message_of(models, diffused(fields))
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message


def test_readers_do_not_need_the_model(models: Path) -> None:
    text = diffused('model = "first.safetensors"\nn = 20')
    store = load(models, text).store
    (models / "first.safetensors").unlink()
    assert load_campaign(models / "first.toml", with_models=False).store == store
    with pytest.raises(CampaignError, match="no such file"):
        load_campaign(models / "first.toml")


def test_a_model_that_goes_after_loading_is_named(models: Path) -> None:
    stage = load(models, diffused('model = "first.safetensors"\nn = 20')).stage("diffused")
    (models / "first.safetensors").unlink()
    with pytest.raises(CampaignError, match=r'stage "diffused": model: .*first\.safetensors'):
        stage.settings()


def test_a_program_that_is_not_installed_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    stage = relax_of(tmp_path, 'program = "xtb-python"\n')
    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(CampaignError, match=r'stage "relax".*pip install'):
        stage.programs()


def test_loading_starts_no_heavy_library(tmp_path: Path) -> None:
    heavy = ["rdkit", "ase", "parsl", "tblite", "scipy", "pandas", "duckdb", "pyarrow", "torch"]
    text = diffused('model = "little.safetensors"\nn = 20') + RELAX
    (tmp_path / "first.toml").write_text(text)
    write_model(tmp_path / "little.safetensors")
    code = (
        "import sys, pathlib, orchestrator.campaign as c\n"
        "c.load_campaign(pathlib.Path('jobs/quickstart.toml'))\n"
        f"campaign = c.load_campaign(pathlib.Path({str(tmp_path / 'first.toml')!r}))\n"
        "[stage.settings() for stage in campaign.stages]\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_elements_are_named_by_their_symbols(tmp_path: Path) -> None:
    problem = 'elements = ["H", "c"]'
    text = f'name = "x"\n[molecules]\nfiles = ["a.smi"]\n{problem}\n[[stages]]\nkernel = "embed"\n'
    with pytest.raises(CampaignError, match=r'elements = .*"c" is not the symbol of an element'):
        load(tmp_path, text)
