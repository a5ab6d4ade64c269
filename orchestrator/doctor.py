"""What works here: engines (by computing something with each), sites, the machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.calculators import DFT, program_version
from kernels.errors import InputError
from orchestrator import block, dft_cost
from orchestrator.memory import USABLE

if TYPE_CHECKING:
    from orchestrator.sites import Site

_ENGINE_LIMIT_S = 120
# Basis functions of nonane, C9H20.
_NINE_HEAVY = 352


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: ``state`` is `ok`, `missing` (optional) or `broken`."""

    what: str
    state: str
    detail: str


def _versions() -> list[Finding]:
    found = [
        Finding(
            "Python",
            "ok" if sys.version_info >= (3, 11) else "broken",
            f"{sys.version.split()[0]} at {sys.executable}",
        )
    ]
    for package in ("parsl", "rdkit", "ase", "h5py", "duckdb", "pyarrow"):
        try:
            found.append(Finding(package, "ok", version(package)))
        except PackageNotFoundError:
            found.append(Finding(package, "broken", "not installed; run `make` again"))
    return found


def _engine(what: str, package: str, extra: str, try_out: str) -> Finding:
    if importlib.util.find_spec(package) is None:
        if not extra:
            return Finding(what, "broken", "not installed; run `make` again")
        return Finding(what, "missing", f"optional: pip install 'basin-orchestrator[{extra}]'")
    return _tried(what, try_out)


def _tried(what: str, try_out: str) -> Finding:
    """Try an engine in a process of its own, since a broken one may take its process down."""
    import subprocess

    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", try_out],
            capture_output=True,
            text=True,
            timeout=_ENGINE_LIMIT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(what, "broken", f"no answer within {_ENGINE_LIMIT_S} s")
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"exit status {done.returncode}"
    state = "ok" if done.returncode == 0 else "broken"
    return Finding(what, state, f"{last} ({time.monotonic() - start:.1f} s with start-up)")


_WATER = (
    "import numpy as np\n"
    "from ase import Atoms\n"
    "from kernels.calculators import make_calculator, program_version\n"
    "atoms = Atoms('OH2', [(0, 0, 0.12), (0, 0.76, -0.47), (0, -0.76, -0.47)])\n"
    "atoms.calc = make_calculator('GFN2-xTB', program='{0}', charge=0, multiplicity=1)\n"
    "print(program_version('{0}') + ': GFN2-xTB energy of water %.4f eV'"
    " % atoms.get_potential_energy())\n"
)
_DFT_WATER = _WATER.replace("GFN2-xTB", DFT)
_MMFF = (
    "from kernels.embedding import embed\n"
    "from kernels.forcefield import minimise\n"
    "made = minimise('CCO', embed('CCO', seed=1, max_attempts=10).positions, max_steps=500)\n"
    "print('%s energy of ethanol %.4f eV' % (made.force_field, made.energy_eV))\n"
)


def _psi4() -> Finding:
    from kernels.psi4_engine import PYTHON_VARIABLE, find

    what = f"Psi4 ({DFT})"
    try:
        find()
    except InputError as error:
        broken = PYTHON_VARIABLE in os.environ
        return Finding(what, "broken" if broken else "missing", f"optional: {error}")
    return _tried(what, _DFT_WATER.format("psi4"))


_GPU_WATER = (
    "from kernels.gpu4pyscf_engine import require_gpu\nrequire_gpu()\n" + _DFT_WATER
).format("gpu4pyscf")


def _gpu4pyscf() -> Finding:
    what = f"gpu4pyscf ({DFT})"
    try:
        program_version("gpu4pyscf")
    except InputError as error:
        return Finding(what, "missing", f"optional, for GPUs: {error}")
    return _tried(what, _GPU_WATER)


def _sites() -> list[Finding]:
    from orchestrator.errors import SiteError
    from orchestrator.sites import known_sites, load_site

    try:
        found = [Finding("site local", "ok", _pools(load_site("local")))]
    except SiteError as exc:
        found = [Finding("site local", "broken", str(exc))]
    others = ", ".join(name for name in known_sites() if name != "local")
    return [*found, Finding("other sites", "ok", f"{others}; --site looks at one, or at a file")]


def _pools(site: Site) -> str:
    return ", ".join(f"pool {pool}: {n} workers" for pool, n in site.pools().items())


def _schedulers() -> list[Finding]:
    from orchestrator.scheduler import SCHEDULERS

    found = []
    for scheduler, what in zip(SCHEDULERS.values(), ("SLURM", "PBS"), strict=True):
        submits, looks, _ = scheduler.programs
        if not scheduler.found():
            detail = f"{', '.join(scheduler.programs)} are not all on PATH"
            found.append(Finding(what, "missing", detail))
            continue
        start = time.monotonic()
        if problem := scheduler.answers():
            # Many a machine has the programs and no cluster; a site that needs it is told below.
            found.append(Finding(what, "missing", f"{looks} gets no answer: {problem}"))
        else:
            took = time.monotonic() - start
            found.append(Finding(what, "ok", f"{submits} is here, {looks} answers in {took:.1f} s"))
    return found


def _site(name: str, folder: Path) -> list[Finding]:
    """Look at a site: its file, what its scheduler thinks of its jobs, where they would run."""
    from orchestrator.errors import BasinError
    from orchestrator.scheduler import SCHEDULERS
    from orchestrator.sites import batch_scripts, load_site

    what = f"site {Path(name).name}"
    try:
        site = load_site(name)
        scripts = batch_scripts(site)
    except BasinError as exc:
        return [Finding(what, "broken", str(exc))]
    found = [Finding(what, "ok", _pools(site))]
    if site.driver is None or site.scheduler is None:
        return found
    scheduler = SCHEDULERS[site.scheduler]
    if not scheduler.found():
        detail = f"{', '.join(scheduler.programs)} are not all on PATH here; try a login node"
        return [*found, Finding(f"{what}: scheduler", "broken", detail)]
    for pool, script in scripts.items():
        opinion = scheduler.opinion(script)
        if opinion is not None:
            state = "ok" if opinion.accepts else "broken"
            found.append(Finding(f"{what}: {pool}", state, opinion.words))
    found.append(_environment(what, site.driver.worker_init))
    kind = _file_system(folder)
    return [*found, Finding("file system here", "ok", f"{kind}; compute nodes must see it, too")]


def _environment(what: str, start_of_job: str) -> Finding:
    """Start Python as a job would: in a shell that knows nothing of this one."""
    import subprocess

    kept = {n: os.environ[n] for n in ("HOME", "USER", "LOGNAME", "SHELL") if n in os.environ}
    program = "import orchestrator.worker_pool, parsl, sys; print(sys.executable)"
    script = f'{start_of_job}\npython3 -c "{program}"\n'
    try:
        done = subprocess.run(
            ["bash", "-l", "-c", script],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=_ENGINE_LIMIT_S,
            env={**kept, "PATH": "/usr/local/bin:/usr/bin:/bin"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(f"{what}: workers", "broken", f"no Python within {_ENGINE_LIMIT_S} s")
    if done.returncode == 0:
        python = (done.stdout.strip().splitlines() or ["?"])[-1]
        return Finding(f"{what}: workers", "ok", f"a job's shell finds Basin: {python}")
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    detail = f"a job's shell does not find Basin ({last}); see modules and worker_init in the site"
    return Finding(f"{what}: workers", "broken", detail)


def _file_system(folder: Path) -> str:
    """Return the kind of file system that a folder is on, and where that is mounted."""
    best = ("", "unknown")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split()
            place = place.replace("\\040", " ")
            if len(place) >= len(best[0]) and folder.resolve().is_relative_to(place):
                best = (place, kind)
    return f"{best[1]} mounted at {best[0]}"


def _machine(folder: Path) -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    memory = block.memory()
    disk = shutil.disk_usage(folder)
    found = [Finding("machine", "ok", f"{cores} cores, {memory / 1e9:.0f} GB of memory")]
    needed = dft_cost.memory(_NINE_HEAVY, "pyscf")
    room = int(USABLE * memory / needed)
    found.append(
        Finding(
            "memory for DFT",
            "ok" if room else "broken",
            f"{room} of the largest molecules of QM9 fit at once, {needed / 1e9:.1f} GB each"
            + (f"; {cores} cores" if room < cores else ""),
        )
    )
    state = "ok" if disk.free > 2e9 else "broken"
    found.append(Finding("disk here", state, f"{disk.free / 1e9:.0f} GB free at {folder}"))
    link = folder / f".basin-doctor-{os.getpid()}"
    try:
        link.touch()
        os.link(link, f"{link}-2")
        os.unlink(f"{link}-2")
        found.append(Finding("hard links here", "ok", "a store can live here"))
    except OSError as exc:
        found.append(
            Finding("hard links here", "broken", f"{exc.strerror}: put the store elsewhere")
        )
    finally:
        with contextlib.suppress(OSError):
            link.unlink()
    return found


_DIFFUSION = """
import torch
torch.set_num_threads(1)
from kernels.diffusion.checkpoint import load, shipped
from kernels.diffusion.process import DiffuseSettings, Start, diffuse
from kernels.embedding import embed
made = embed("CCO", seed=1, max_attempts=50)
start = Start(made.numbers, made.positions, seed=1, smiles="CCO")
(path,) = diffuse(load("qm9-gfn2"), [start], DiffuseSettings(n=20))
if isinstance(path, Exception):
    raise path
length = sum((path.frames[-1][0] - path.frames[-1][1]) ** 2) ** 0.5
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
names = ", ".join(shipped())
print(f"torch {torch.__version__}, {device}; {names}: C-C of ethanol {length:.3f} Å")
"""


def examine(folder: Path, site: str | None = None) -> list[Finding]:
    """Look at versions, engines, sites (``site`` closely), and the file system at ``folder``."""
    return [
        *_versions(),
        _engine("RDKit (ETKDGv3, MMFF94)", "rdkit", "", _MMFF),
        _engine("tblite (GFN2-xTB)", "tblite", "", _WATER.format("tblite")),
        _engine("xtb-python (GFN2-xTB)", "xtb", "xtb", _WATER.format("xtb-python")),
        _engine(f"PySCF ({DFT})", "pyscf", "", _DFT_WATER.format("pyscf")),
        _psi4(),
        _gpu4pyscf(),
        _engine("diffusion models", "torch", "", _DIFFUSION),
        _engine("Sella", "sella", "sella", "import sella\nprint('imports')"),
        *_schedulers(),
        *_sites(),
        *(_site(site, folder) if site and site != "local" else []),
        *_machine(folder),
    ]
