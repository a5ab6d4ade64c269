"""The progress file says the same to whoever reads it, and nothing where it is unusable."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator import progress
from orchestrator.counts import StageCounts


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    written = progress.ProgressFile(
        run_id="r1",
        stages=[StageCounts("gfn2", 10, 5, 1, 0, 4)],
        blocks=[{"pool": "cpu", "job_id": "4711", "state": "running"}],
        bad_nodes={"n1": "crashes"},
        node_hours=1.5,
    )
    progress.write(tmp_path, written)
    assert progress.read(tmp_path) == written


@pytest.mark.parametrize("content", [None, "", "[]", '{"stages": [{"no": 1}]}', '{"run_id'])
def test_an_unusable_file_says_nothing(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "control").mkdir()
    if content is not None:
        progress.progress_path(tmp_path).write_text(content)
    assert progress.read(tmp_path) is None


def test_a_field_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    progress.progress_path(tmp_path).write_text('{"run_id": "r1", "unheard_of": 1}')
    found = progress.read(tmp_path)
    assert found is not None
    assert found.run_id == "r1"
