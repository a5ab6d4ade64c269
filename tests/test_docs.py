"""README and docs say what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.schema import SCHEMA_VERSION, STATUSES, TABLES
from orchestrator.site_file import load_site_file

ROOT = Path(__file__).resolve().parent.parent


def test_every_column_of_every_table_is_documented() -> None:
    text = (ROOT / "docs" / "store.md").read_text()
    for table in TABLES.values():
        section = re.search(rf"^### {table.name}\n(.*?)(?=^###|^SQL shows)", text, re.M | re.S)
        assert section is not None, table.name
        documented = re.findall(r"^\| `(\w+)` \|", section[1], re.M)
        assert documented == [column.name for column in table.columns]
    assert SCHEMA_VERSION == 1


def test_every_failure_class_is_documented() -> None:
    text = (ROOT / "docs" / "running.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(STATUSES) - {"ok"}


def _readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [body for name, body in fenced if name == language]


def test_the_campaign_in_the_readme_runs_and_answers(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(_readme_blocks("toml")[0])
    (tmp_path / "mine.smi").write_text("CCO ethanol\nCC(=O)[O-] acetate\n")
    commands = [
        line.split("#")[0].strip()
        for block in _readme_blocks("")
        for line in block.splitlines()
        # The campaign there makes no chains that `basin boltzmann` could tell of.
        if line.startswith("basin ") and not re.search("doctor|boltzmann", line)
    ]
    assert len(commands) == 12
    for command in commands:
        done = subprocess.run(
            command.replace("basin ", f"{sys.executable} -m orchestrator.cli ", 1),
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "mine.sdf").read_text().count("$$$$") == 4
    program = _readme_blocks("python")[0].replace("results/quickstart", "mine.basin")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)


def test_the_cluster_files_in_the_docs_are_read(tmp_path: Path) -> None:
    clusters = (ROOT / "docs" / "clusters.md").read_text()
    site, driver = re.findall(r"^```toml\n(.*?)^```$", clusters, re.M | re.S)
    for name, text in (("a", site), ("b", f"{site}\n{driver}"), ("c", _readme_blocks("toml")[1])):
        path = tmp_path / f"{name}.toml"
        lines = text.replace('base = "slurm"', "").splitlines()
        path.write_text("\n".join(['base = "slurm"', *lines]))
        settings = load_site_file(path)
        assert settings.pools["cpu"].partition == "standard"
        assert settings.pools["cpu"].account == "chem"
        assert settings.pools["cpu"].walltime == 4 * 3600


# What the guide to clusters quotes, as the program says it.
QUOTED = [
    "in the queue", "sbatch would refuse a block", "does not say how many cores a node",
    "blocks in a row failed", "a job's shell does not find Basin", "the interchange is gone",
    "could not be started", "was killed for memory", "broke it off", "with nothing saved",
    "crashed or ran out of memory there", "is working on this store", "Its last sign of life is",
    "no space left", "node-hours are used, of", "reached its walltime", "was cancelled",
    "was lost with its node", "to find one that is to blame", "is set aside", "may be left",
    "of a driver that died: cancelled, or gone already", "none charged",
    "with which no worker can be started",
]  # fmt: skip


@pytest.mark.parametrize("words", QUOTED)
def test_the_messages_in_the_guide_to_clusters_are_the_programs(words: str) -> None:
    flat = " ".join((ROOT / "docs" / "clusters.md").read_text().split())
    assert words in flat
    sources = [*(ROOT / "orchestrator").glob("*.py"), *(ROOT / "site_configs").rglob("*.py")]
    # A message may go over several lines of the source.
    texts = (re.sub(r'"\s*f?"', "", path.read_text()) for path in sources)
    said = re.escape(words).replace("working", "work(?:ing)?").replace("\\ ", r"[\s\S]{0,16}?")
    assert any(re.search(said, text) for text in texts), words


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "docs/chains.md", "docs/clusters.md", "docs/dft.md", "docs/diffusion.md"),
        *("docs/running.md", "docs/store.md"),
    ],
)
def test_files_named_in_the_docs_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in re.findall(
        r"`((?:docs|jobs|tests|kernels|orchestrator|site_configs)/[\w./]*)`", text
    ):
        assert (ROOT / name).exists(), name
