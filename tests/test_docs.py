"""README and docs say what is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.schema import SCHEMA_VERSION, STATUSES, TABLES

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
        if line.startswith("basin ") and "doctor" not in line
    ]
    assert len(commands) == 8
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


@pytest.mark.parametrize(
    "page", ["README.md", "docs/diffusion.md", "docs/running.md", "docs/store.md"]
)
def test_files_named_in_the_docs_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in re.findall(
        r"`((?:docs|jobs|tests|kernels|orchestrator|site_configs)/[\w./]*)`", text
    ):
        assert (ROOT / name).exists(), name
