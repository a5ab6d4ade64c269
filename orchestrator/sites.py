"""Loading a site: from its name in `site_configs`, or from a user's own Python file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import shlex
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from orchestrator.errors import SiteError

if TYPE_CHECKING:
    from parsl.config import Config


_POOL_COMMAND = "process_worker_pool.py "


@dataclass(frozen=True, slots=True)
class Site:
    """A machine to run on: its name and its Parsl configuration."""

    name: str
    config: Config

    def pools(self) -> dict[str, int]:
        """Return the site's pools with the number of workers that each can have at most."""
        return {e.label: _workers(e) for e in self.config.executors}

    def require_pools(self, wanted: set[str]) -> None:
        """Raise SiteError where a stage asks for a pool that the site does not have."""
        missing = sorted(wanted - set(self.pools()))
        if missing:
            raise SiteError(
                f"site {self.name!r} has no pool {missing[0]!r}; its pools are "
                f"{', '.join(sorted(self.pools()))}: name one of these as `pool` of the stage, or "
                f"add an executor labelled {missing[0]!r} to the site"
            )


def _workers(executor: Any) -> int:
    provider = executor.provider
    limit = executor.max_workers_per_node
    per_node = int(executor.workers_per_node if limit == float("inf") else limit)
    return max(1, per_node * int(provider.nodes_per_block) * max(1, int(provider.max_blocks)))


def known_sites() -> list[str]:
    """Return the names of the sites that come with Basin."""
    import site_configs

    return sorted(module.name for module in pkgutil.iter_modules(site_configs.__path__))


def _module(name: str) -> ModuleType:
    if name in known_sites():
        return importlib.import_module(f"site_configs.{name}")
    path = Path(name)
    if not path.suffix == ".py":
        raise SiteError(
            f"--site {name}: no such site; known are {', '.join(known_sites())}, or give the "
            "path of a Python file of your own (ending in .py)"
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

    The module defines ``config`` (a parsl.Config) or ``make_config()`` returning one; where the
    latter takes ``workers``, it is given the number that the user asked for.
    Raises SiteError when the site is missing or broken.
    """
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor

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
        # Here already, so that `basin plan` prints what will be submitted.
        if executor.launch_cmd.startswith(_POOL_COMMAND):
            arguments = executor.launch_cmd.removeprefix(_POOL_COMMAND)
            executor.launch_cmd = f"python3 -m orchestrator.worker_pool {arguments}"
    return Site(name, config)


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
