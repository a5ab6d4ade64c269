"""Energies and gradients by Psi4, for another process: run by Psi4's own interpreter.

`psi4_engine` starts it as `python -I psi4_worker.py SCRATCH [PATH]`, with SCRATCH a folder of its
own and PATH where `psi4` is imported from when the interpreter doesn't find it. One JSON object a
line comes in and one goes out. The process that is started keeps watch over a child that computes:
whichever of the three dies first, the child ends and SCRATCH is removed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import sys
from contextlib import suppress
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1
_POLL_MS = 1000
# Of the memory for density fitting.
_SPARE = 1.1


def main() -> None:
    """Split into the process that computes and the one that watches it."""
    scratch = sys.argv[1]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asker = os.getppid()
    watcher = os.getpid()
    ended, held = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != watcher:
            os._exit(1)
        os.close(ended)
        serve(scratch)
        return
    os.close(held)
    os.close(1)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: end(child))
    watch(child, ended, asker)
    _, status = os.waitpid(child, 0)
    # How the child ended is to be told, whoever asks for the end while its scratch goes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    shutil.rmtree(scratch, ignore_errors=True)
    killed = os.WIFSIGNALED(status)
    os._exit(128 + os.WTERMSIG(status) if killed else os.WEXITSTATUS(status))


def end(child: int) -> None:
    """Kill `child`, if it has not ended by itself meanwhile."""
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def watch(child: int, ended: int, asker: int) -> None:
    """Return when `child` has ended; kill it when nobody is left to ask it."""
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    # No events: only the closing of the other end is told, and nothing is read.
    poll.register(0, 0)
    while True:
        seen = {descriptor for descriptor, _ in poll.poll(_POLL_MS)}
        if ended in seen:
            return
        # The pipe stays open where the asker had forked; that it is gone shows all the same.
        if 0 in seen or os.getppid() != asker:
            end(child)
            return


def serve(scratch: str) -> None:
    """Answer requests from standard input until it ends."""
    # What Psi4 prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    log = os.open(os.path.join(scratch, "messages"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(scratch)
    sys.path.extend(sys.argv[2:])
    import psi4  # type: ignore[import-not-found]

    psi4.core.set_output_file(os.devnull, False)
    psi4.core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    psi4.core.IOManager.shared_object().set_default_path(scratch)
    ask_for_enough(psi4.core)
    send(answers, {"pid": os.getpid(), "version": psi4.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = compute(psi4, request)
        except Exception as error:
            answer = {
                "error": type(error).__name__,
                "message": str(getattr(error, "message", None) or error)[-2000:],
                "iterations": getattr(error, "iteration", 0),
            }
        psi4.core.clean()
        psi4.core.clean_variables()
        send(answers, {**answer, "id": request["id"], "resident": resident()})


def ask_for_enough(core: Any) -> None:
    """Have Psi4 keep more memory for density fitting than it estimates that it takes.

    It gives exactly that to the integrals, and what is left to the grid. For two of ten molecules
    of nine heavy atoms they take 0.1 % more, and Psi4 1.3.2 refuses, whatever memory is left.
    """
    estimate = core.JK.memory_estimate
    core.JK.memory_estimate = lambda jk: int(_SPARE * estimate(jk))


def compute(psi4: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return energy (Ha), gradient (Ha/bohr) if asked for, SCF iterations, occupied orbitals."""
    import numpy as np
    from psi4.driver.procrouting.proc import (  # type: ignore[import-not-found]
        run_scf_gradient,
        scf_wavefunction_factory,
    )

    core = psi4.core
    # Below its own least size Psi4 refuses to start.
    core.set_memory_bytes(max(request["memory"], 262_144_000))
    core.clean_options()
    start = request["orbitals"]
    options = dict(request["options"])
    if start:
        options["guess"] = "read"
    # Before Psi4 1.4 the SCF has no level shift, though the option of another module is accepted.
    if not core.option_exists_in_module("SCF", "LEVEL_SHIFT"):
        options.pop("level_shift", None)
    psi4.set_options(options)
    molecule = core.Molecule.from_arrays(
        elez=request["numbers"],
        geom=request["bohr"],
        units="Bohr",
        molecular_charge=request["charge"],
        molecular_multiplicity=request["multiplicity"],
        fix_com=True,
        fix_orientation=True,
        fix_symmetry="c1",
        name=f"m{request['id']}",
    )
    molecule.update_geometry()
    bare = core.Wavefunction.build(molecule, options["basis"])
    scf = scf_wavefunction_factory("b3lyp", bare, options["reference"].upper())
    if start:
        expected = [[scf.nso(), scf.nalpha()], [scf.nso(), scf.nbeta()]]
        alpha, beta = (np.array(part) for part in start)
        if [list(alpha.shape), list(beta.shape)] != expected:
            raise psi4.ValidationError(
                f"the orbitals to start from have shapes {alpha.shape} and {beta.shape}, those of "
                f"this molecule {expected[0]} and {expected[1]}"
            )
        scf.guess_Ca(core.Matrix.from_array(alpha))
        scf.guess_Cb(core.Matrix.from_array(beta))
    energy = scf.compute_energy()
    gradient = None
    if request["gradient"]:
        # Not `core.scfgrad`, which leaves out the effective core potentials.
        gradient = run_scf_gradient("scf", ref_wfn=scf).gradient().to_array().tolist()
    return {
        "energy": energy,
        "gradient": gradient,
        "iterations": scf.iteration_,
        "orbitals": [
            scf.Ca_subset("SO", "OCC").to_array().tolist(),
            scf.Cb_subset("SO", "OCC").to_array().tolist(),
        ],
    }


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def send(answers: TextIO, answer: dict[str, Any]) -> None:
    """Write one line."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
