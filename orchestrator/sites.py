"""Loading a site: by its name in `site_configs`, or from a user's own TOML or Python file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import shlex
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from orchestrator.errors import SiteError, StoreError

if TYPE_CHECKING:
    from parsl.config import Config

    from site_configs.support.settings import DriverJob, PoolSettings, SiteSettings

_POOL_COMMAND = "process_worker_pool.py "
# Parsl writes paths into its scripts and commands without quotes.
_NOT_PLAIN = re.compile(r"[\s'\"`$\\;&|<>(){}]")


@dataclass(frozen=True, slots=True)
class Site:
    """A machine to run on: its name, its Parsl configuration, and what that was made from.

    ``settings`` is None where a Python file gives the configuration.
    """

    name: str
    config: Config
    settings: SiteSettings | None = None

    def pools(self) -> dict[str, int]:
        """Return the site's pools with the number of workers that each can have at most."""
        return {e.label: _workers(e) for e in self.config.executors}

    def workers_per_node(self) -> dict[str, int]:
        """Return, by pool, the workers on each node."""
        return {e.label: _workers_per_node(e) for e in self.config.executors}

    def nodes(self) -> dict[str, int]:
        """Return, by pool, the nodes that it can have at most."""
        return {e.label: _nodes(e) for e in self.config.executors}

    def walltime_s(self) -> dict[str, float | None]:
        """Return, by pool, the walltime of a block; None where it has none."""
        return {e.label: _walltime_s(e) for e in self.config.executors}

    def resource_specification(self, pool: str) -> dict[str, int | str]:
        """Return what each task of the pool asks of its executor; empty for plain workers."""
        executors: list[Any] = list(self.config.executors)
        found = [e for e in executors if e.label == pool]
        return dict(getattr(found[0], "resource_specification", {})) if found else {}

    @property
    def scheduler(self) -> str | None:
        """The batch system, "slurm" or "pbs"; None where there is none, or none is known."""
        return self.settings.scheduler if self.settings is not None else None

    @property
    def driver(self) -> DriverJob | None:
        """The batch job for the driver; None where there is no batch system."""
        if self.settings is None:
            return None
        from site_configs.support.pools import start_of_job

        driver = self.settings.driver
        return driver.model_copy(update={"worker_init": start_of_job(driver), "modules": ()})

    def require_pools(self, wanted: set[str]) -> None:
        """Raise SiteError where a stage asks for a pool that the site does not have."""
        missing = sorted(wanted - set(self.pools()))
        if missing:
            raise SiteError(
                f"site {self.name!r} has no pool {missing[0]!r}; its pools are "
                f"{', '.join(sorted(self.pools()))}: name one of these as `pool` of the stage, or "
                f"add an executor labelled {missing[0]!r} to the site"
            )


def _workers_per_node(executor: Any) -> int:
    limit = executor.max_workers_per_node
    return max(1, int(executor.workers_per_node if limit == float("inf") else limit))


def _nodes(executor: Any) -> int:
    provider = executor.provider
    return int(provider.nodes_per_block) * max(1, int(provider.max_blocks))


def _workers(executor: Any) -> int:
    if getattr(executor, "enable_mpi_mode", False):
        # These are so many in each block, whatever its nodes.
        return _workers_per_node(executor) * max(1, int(executor.provider.max_blocks))
    return _workers_per_node(executor) * _nodes(executor)


def _walltime_s(executor: Any) -> float | None:
    from site_configs.support.records import seconds_of

    provider = executor.provider
    if type(provider).__name__ == "LocalProvider":
        return None
    known = getattr(provider, "walltime_s", None)
    if known is not None:
        return float(known)
    try:
        return seconds_of(provider.walltime)
    except (AttributeError, TypeError, ValueError):
        return None


def known_sites() -> list[str]:
    """Return the names of the sites that come with Basin."""
    import site_configs

    found = pkgutil.iter_modules(site_configs.__path__)
    return sorted(module.name for module in found if not module.ispkg)


def _module(name: str) -> ModuleType:
    if name in known_sites():
        return importlib.import_module(f"site_configs.{name}")
    path = Path(name)
    if not path.suffix == ".py":
        raise SiteError(
            f"--site {name}: no such site; known are {', '.join(known_sites())}, or give the "
            "path of a file of your own: TOML (ending in .toml) or Python (.py)"
        )
    if not path.is_file():
        raise SiteError(f"--site {name}: there is no such file")
    # An absolute path, so that the lines of a traceback can be told from those of libraries.
    path = path.absolute()
    spec = importlib.util.spec_from_file_location(f"basin_site_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        raise _broken(path, exc) from exc
    return module


def _broken(path: Path | str, exc: BaseException) -> SiteError:
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if f.filename == str(path)]
    where = f"{path}, line {frames[-1].lineno}" if frames else str(path)
    if isinstance(exc, SyntaxError) and exc.filename == str(path):
        return SiteError(f"site file {path}, line {exc.lineno}: SyntaxError: {exc.msg}")
    return SiteError(f"site file {where}: {type(exc).__name__}: {exc}")


def load_site(name: str, *, workers: int | None = None) -> Site:
    """Load a site by name or path.

    A TOML file is a machine in a few lines (see `site_file`). A Python module defines ``config``
    (a parsl.Config) or ``make_config()`` returning one; where the latter takes ``workers``, it is
    given the number that the user asked for.
    Raises SiteError when the site is missing or broken.
    """
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor

    settings = _settings(name)
    if settings is not None:
        return _from_settings(name, settings, workers)
    module = _module(name)
    config = getattr(module, "config", None)
    make = getattr(module, "make_config", None)
    if config is None and callable(make):
        takes = inspect.signature(make).parameters
        if workers is not None and "workers" not in takes:
            raise SiteError(
                f"site {name!r}: its make_config takes no `workers`; set the number in the site"
            )
        try:
            # A default of the site's own stands where the user asked for no number.
            given = workers is not None or (
                "workers" in takes and takes["workers"].default is inspect.Parameter.empty
            )
            config = make(workers=workers) if given else make()
        except (Exception, SystemExit) as exc:
            raise _broken(module.__file__ or name, exc) from exc
    elif workers is not None:
        raise SiteError(f"site {name!r}: gives a finished config; set its workers there")
    if config is None:
        raise SiteError(
            f"site {name!r}: defines neither `config` (a parsl Config) nor `make_config()`"
        )
    if not isinstance(config, Config):
        raise SiteError(
            f"site {name!r}: its config is a {type(config).__name__}, not a parsl.config.Config"
        )
    executors: list[Any] = list(config.executors)
    for executor in executors:
        if not isinstance(executor, HighThroughputExecutor):
            raise SiteError(
                f"site {name!r}: pool {executor.label!r} is a {type(executor).__name__}; Basin "
                "runs on a parsl HighThroughputExecutor (or its MPIExecutor)"
            )
    return Site(_full_name(name), _with_own_pool(config))


def _full_name(name: str) -> str:
    """The name under which any process finds the site, wherever it was started."""
    return name if name in known_sites() else str(Path(name).absolute())


def _with_own_pool(config: Config) -> Config:
    """Have Basin's worker pool started; here already, so that `basin plan` prints what will be."""
    executors: list[Any] = list(config.executors)
    for executor in executors:
        if executor.launch_cmd.startswith(_POOL_COMMAND):
            arguments = executor.launch_cmd.removeprefix(_POOL_COMMAND)
            executor.launch_cmd = f"python3 -m orchestrator.worker_pool {arguments}"
    return config


def _settings(name: str) -> SiteSettings | None:
    """Settings of a known machine or of a TOML file; None for a site that is a Python program."""
    from orchestrator.site_file import from_environment, load_site_file

    if name in known_sites():
        base = getattr(importlib.import_module(f"site_configs.{name}"), "SETTINGS", None)
        return None if base is None else from_environment(name, base)
    if Path(name).suffix == ".toml":
        return load_site_file(Path(name))
    return None


def _from_settings(name: str, settings: SiteSettings, workers: int | None) -> Site:
    from site_configs.support.pools import make_config

    pools = {}
    for label, pool in settings.pools.items():
        if pool.cores_per_node is None:
            pool = _with_cores(name, settings.scheduler, label, pool)
        if workers is not None:
            pool = pool.model_copy(update={"workers_per_node": workers})
        pools[label] = pool
    settings = settings.model_copy(update={"pools": pools})
    return Site(_full_name(name), _with_own_pool(make_config(settings)), settings)


def _with_cores(name: str, scheduler: str, label: str, pool: PoolSettings) -> PoolSettings:
    """The pool with the cores that the scheduler says its nodes have."""
    from site_configs.support.nodes import pbs_nodes, slurm_nodes

    kind = slurm_nodes(pool) if scheduler == "slurm" else pbs_nodes(pool)
    if kind is None:
        program, where = (
            ("sinfo", pool.partition) if scheduler == "slurm" else ("pbsnodes", pool.queue)
        )
        of = f" of {where!r}" if where else ""
        raise SiteError(
            f"site {name!r}, pool {label!r}: {program} does not say how many cores a node{of} "
            "has here; write for example cores_per_node = 64 into the site file, or check the "
            f"{'partition' if scheduler == 'slurm' else 'queue'}"
        )
    known: dict[str, int] = {
        "cores_per_node": kind.cores,
        "threads_per_core": kind.threads_per_core,
    }
    if (
        pool.memory_per_node is None
        and not (pool.exclusive and scheduler == "slurm")
        and kind.memory
    ):
        # Some of a node's memory is the system's, whatever the scheduler says.
        wanted = kind.memory if pool.exclusive else 2 * 2**30 * kind.cores
        known["memory_per_node"] = min(wanted, int(0.95 * kind.memory))
    return pool.model_copy(update=known)


def require_plain_path(store: Path) -> None:
    """Raise StoreError where no worker could be started for a store because of its path."""
    if odd := _NOT_PLAIN.search(str(store)):
        raise StoreError(
            f"{store}: its path contains {odd[0]!r}, with which no worker can be started; name "
            "a folder without it as `store` of the campaign file, or with --store"
        )


def prepare(site: Site, run_dir: Path) -> None:
    """Make a site's configuration fit for a driver that may die at any moment."""
    folder = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if folder not in paths:
        os.environ["PATH"] = os.pathsep.join([folder, *paths])
    os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
    site.config.run_dir = str(run_dir)
    executors: list[Any] = list(site.config.executors)
    for executor in executors:
        if list(getattr(executor, "interchange_launch_cmd", [])) == ["interchange.py"]:
            executor.interchange_launch_cmd = [sys.executable, "-m", "orchestrator.interchange"]


def batch_scripts(site: Site) -> dict[str, str]:
    """Return, by pool, the batch script that Parsl would submit; nothing is submitted.

    The script ends with the command that would submit it, which may hold options of its own.
    Pools on the local machine have none. Raises SiteError where Parsl cannot make the script.
    """
    scripts: dict[str, str] = {}
    executors: list[Any] = list(site.config.executors)
    for executor in executors:
        provider = getattr(executor, "provider", None)
        if provider is None or not hasattr(provider, "execute_wait"):
            continue
        if type(provider).__name__ == "LocalProvider":
            continue
        with tempfile.TemporaryDirectory() as folder:
            provider.script_dir = folder
            executor.run_dir = "RUN_DIR"
            executor.worker_port = 0
            executor.logconf_path = None
            executor.initialize_scaling()
            submitted: list[str] = []

            def capture(command: str, *_: object, log: list[str] = submitted) -> Any:
                log.append(command)
                return 1, "", "not submitted"

            provider.execute_wait = capture
            try:
                provider.submit(executor.launch_cmd.format(block_id="0"), 1, "basin")
            except Exception as exc:
                # Nothing was submitted, so the provider finds no job id; the script is there.
                if not submitted:
                    raise SiteError(
                        f"site {site.name!r}, pool {executor.label!r}: its "
                        f"{type(provider).__name__} cannot make a batch script: "
                        f"{type(exc).__name__}: {exc}"
                    ) from exc
            files = [Path(word) for word in shlex.split(submitted[-1]) if Path(word).is_file()]
            script = files[-1].read_text().rstrip() if files else ""
            text = f"{script}\n# submitted with: {submitted[-1]}\n".lstrip()
            scripts[executor.label] = text.replace(folder, "RUN_DIR")
    return scripts
