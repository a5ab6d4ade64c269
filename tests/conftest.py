"""What all tests share: skipping, with a reason, where an engine or a data set is absent."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cluster.slurm_cluster import SlurmCluster

# Before any numerical library is loaded: one thread per process, as in production.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Programs that came with the packages, mpiexec say, are found as in an activated environment.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

_MODULES = {
    "tblite": "tblite",
    "xtb-python": "xtb",
    "rdkit": "rdkit",
    "sella": "sella",
    "pyscf": "pyscf",
    "mpi": "mpi4py",
}
_PROGRAMS = {"mpi": "mpiexec"}

# Debian's package, where it is not named like the program.
_PACKAGES = {"h5dump": "hdf5-tools", "h5ls": "hdf5-tools"}


def engine_missing(name: str, reason: str) -> None:
    """Skip the test, or fail it when BASIN_REQUIRE_ENGINES (comma separated) names the engine."""
    required = {part.strip() for part in os.environ.get("BASIN_REQUIRE_ENGINES", "").split(",")}
    if name in required:
        pytest.fail(f"{reason} (BASIN_REQUIRE_ENGINES names {name})")
    pytest.skip(reason)


@pytest.fixture
def require_engine() -> Callable[[str], None]:
    """Return a function that skips the test unless the named engine is there.

    "xtb" is the command line program; other names are those of the campaign file.
    """

    def require(name: str) -> None:
        if name == "psi4":
            from kernels import psi4_engine
            from kernels.errors import InputError

            try:
                psi4_engine.find()
            except InputError as error:
                engine_missing(name, str(error))
            return
        if name in _MODULES:
            if importlib.util.find_spec(_MODULES[name]) is None:
                engine_missing(name, f"{_MODULES[name]} is not installed")
            if name not in _PROGRAMS:
                return
        program = _PROGRAMS.get(name, name)
        if shutil.which(program) is None:
            engine_missing(_PACKAGES.get(name, name), f"no program {program!r} on PATH")

    return require


@pytest.fixture
def shared_data() -> Path:
    """Return the folder of public data sets; BASIN_DATA, or ../shared/data beside the project."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BASIN_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set BASIN_DATA")
    return folder


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    from tests.cluster.slurm_cluster import SlurmCluster, missing

    if reason := missing():
        engine_missing("slurm", reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def slurm_cluster(
    _cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SlurmCluster]:
    """Return a real SLURM of three nodes, all idle, that SLURM's commands speak to meanwhile.

    Nothing of a test is left to the next one: jobs are cancelled, their processes killed, nodes
    and scheduler brought back.
    """
    monkeypatch.setenv("SLURM_CONF", str(_cluster.conf))
    _cluster.mend()
    try:
        yield _cluster
    finally:
        _cluster.mend()
