"""A worker pool ends where Parsl's manager would wait for ever, and says why it cannot start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def pool_command(port: int, fake: Path) -> tuple[list[str], dict[str, str]]:
    """Return a pool with a stand-in for a manager that is stuck, as one is in `recv`."""
    fake.mkdir()
    script = fake / "process_worker_pool.py"
    script.write_text("import time\nprint('stuck', flush=True)\ntime.sleep(600)\n")
    script.chmod(0o755)
    arguments = ["-a", "127.0.0.1", "-p", "0", f"--port={port}", "--hb_threshold=1"]
    path = f"{fake}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "orchestrator.worker_pool", *arguments]
    return command, {**os.environ, "PATH": path}


def test_a_stuck_manager_ends_with_its_interchange(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as interchange:
        interchange.settimeout(30)
        command, environment = pool_command(interchange.getsockname()[1], tmp_path / "bin")
        pool = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert pool.stdout is not None
        assert pool.stdout.readline() == "stuck\n"
        for _ in range(8):
            interchange.accept()[0].close()
        assert pool.poll() is None, "it ended although its interchange answered"
    _, error = pool.communicate(timeout=30)
    assert pool.returncode == 1
    assert "the interchange is gone" in error


def test_a_folder_for_temporary_files_with_too_long_a_name_is_named(tmp_path: Path) -> None:
    longest = tmp_path / ("t" * 100)
    longest.mkdir()
    command, environment = pool_command(1, tmp_path / "bin")
    done = subprocess.run(
        command,
        env={**environment, "TMPDIR": str(longest)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert str(longest) in done.stderr
    assert "set one of at most 75" in done.stderr
    assert "stuck" not in done.stdout
