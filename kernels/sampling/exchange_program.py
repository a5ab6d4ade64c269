"""Replica exchange as a program: one process, or many under mpiexec.

By hand, from a geometry at its minimum (or with --relax); the same command again goes on with a
run that was stopped or killed, with any number of processes:

    mpiexec -n 18 python jobs/replica_exchange.py molecule.xyz --temperatures 10:400:18

writes molecule-exchange.npz (arrays by temperature) and molecule-exchange.extxyz (all frames), and
prints a table. With --request and --result it computes what a file asks for and nothing else, as
Basin's workers start it. Exit status 0: the result is there; 75: stopped in time and saved, to be
started again; 1: failed, with the reason in the result's `error_class` and `error`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kernels.errors import InputError, KernelError
from kernels.sampling.metropolis import Arrays
from kernels.sampling.replica_exchange import (
    Communicator,
    ExchangeSettings,
    SingleProcess,
    on_first,
    parallel_efficiency,
    request_arrays,
    run_exchange,
    write_npz,
)
from kernels.units import BOLTZMANN_EV_PER_K, EV_TO_KCAL

STOPPED: Final = 75

# Launchers tell their processes how many they are.
_SIZES: Final = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    given = _parser().parse_args(arguments)
    communicator = _communicator()
    try:
        return _run(given, communicator)
    except KernelError as error:
        # Raised by all processes together.
        if communicator.rank == 0:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            if given.result is not None:
                write_npz(given.result, _failure(error))
        return 1
    except BaseException:
        if communicator.size == 1:
            raise
        traceback.print_exc()
        sys.stderr.flush()
        # The others wait for this process, and would for ever.
        untyped: Any = communicator
        untyped.Abort(1)
        raise


def _run(given: argparse.Namespace, communicator: Communicator) -> int:
    begun = time.monotonic()
    told: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        told.append(number)

    # Batch systems ask with this signal before they kill.
    before = signal.signal(signal.SIGTERM, hear)

    def stop() -> bool:
        if told or (given.stop_file is not None and given.stop_file.exists()):
            return True
        return given.max_seconds is not None and time.monotonic() - begun > given.max_seconds

    try:
        request = on_first(communicator, lambda: _request(given))
        saved = given.saved or _beside(_output(given), ".state.npz")
        result = run_exchange(
            request, communicator, saved=saved, stop=stop, save_every_s=given.save_every_s
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    if result is None:
        if communicator.rank == 0:
            print(f"stopped; the same command goes on from {saved}", file=sys.stderr)
        return STOPPED
    if communicator.rank == 0:
        _write(given, result)
        saved.unlink(missing_ok=True)
    return 0


def _write(given: argparse.Namespace, result: Arrays) -> None:
    if given.result is not None:
        write_npz(given.result, result)
        return
    output = _output(given)
    write_npz(_beside(output, ".npz"), result)
    write_frames(_beside(output, ".extxyz"), result, given.save_every)
    print(table(result, given.burn_in))
    print(f"\nwrote {_beside(output, '.npz')} and {_beside(output, '.extxyz')}")


def table(result: Mapping[str, NDArray[Any]], burn_in: int) -> str:
    """Return what a ladder did as text; energies in kcal/mol above the lowest seen."""
    to_kcal = (result["energies"] - result["energies"].min()) * EV_TO_KCAL
    vibrations = 3 * len(result["numbers"]) - 6
    lines = [
        "   T (K)   mean E      sd   harmonic  accepted   swaps   step (Å)",
    ]
    for rung, temperature in enumerate(result["temperatures"]):
        kept = to_kcal[rung, burn_in + 1 :]
        harmonic = vibrations / 2 * BOLTZMANN_EV_PER_K * temperature * EV_TO_KCAL
        swaps = result["swap_acceptance"][rung]
        swapped = "–" if np.isnan(swaps) else f"{swaps:.3f}"
        lines.append(
            f"{temperature:8.1f} {kept.mean():8.3f} {kept.std():7.3f} {harmonic:10.3f} "
            f"{result['acceptance'][rung]:9.3f} {swapped:>7} "
            f"{result['step_size'][rung]:10.5f}"
        )
    seconds, processes = result["spent_s"][2], len(result["total_s"])
    trips = int(result["round_trips"].sum())
    lines += [
        "mean E and sd in kcal/mol above the lowest energy seen; harmonic: (3N-6)/2 k_B T;",
        "swaps: share of swaps with the next temperature that were accepted",
        f"{trips} round trip{'' if trips == 1 else 's'} between the lowest and the highest "
        "temperature, all walkers together",
        f"{seconds:.1f} s with {processes} process{'' if processes == 1 else 'es'}; parallel "
        f"efficiency {parallel_efficiency(result):.3f} (time in energies / time of all processes)",
    ]
    return "\n".join(lines)


def write_frames(path: Path, result: Mapping[str, NDArray[Any]], save_every: int) -> None:
    """Write all frames in extended XYZ, temperature by temperature; energies in eV."""
    from ase.data import chemical_symbols

    symbols = [chemical_symbols[number] for number in result["numbers"]]
    with path.open("w") as file:
        for rung, temperature in enumerate(result["temperatures"]):
            for number, frame in enumerate(result["frames"][rung]):
                step = number * save_every
                file.write(
                    f"{len(symbols)}\nProperties=species:S:1:pos:R:3 temperature={temperature:g} "
                    f"step={step} energy={result['energies'][rung, step]:.8f}\n"
                )
                for symbol, (x, y, z) in zip(symbols, frame.tolist(), strict=True):
                    file.write(f"{symbol} {x:.6f} {y:.6f} {z:.6f}\n")


def temperatures(text: str) -> tuple[float, ...]:
    """Read "10,20,40", or "10:400:18" for 18 temperatures in equal ratios; raises ValueError."""
    if ":" not in text:
        return tuple(float(part) for part in text.split(","))
    low, high, number = text.split(":")
    return tuple(float(t) for t in np.geomspace(float(low), float(high), int(number)))


def _request(given: argparse.Namespace) -> Arrays:
    if given.request is not None:
        try:
            with np.load(given.request, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise InputError(f"{given.request} is no request ({error})") from error
    from ase.io import read

    try:
        atoms: Any = read(given.molecule)
    except Exception as error:
        # ASE's readers raise whatever their parsing comes upon.
        raise InputError(f"{given.molecule} cannot be read as a geometry: {error}") from error
    numbers, positions = atoms.numbers.astype(np.uint8), atoms.positions
    calculator = {
        "level": given.level,
        "program": given.program,
        "charge": given.charge,
        "multiplicity": given.multiplicity,
    }
    if given.relax:
        from kernels.calculators import make_calculator
        from kernels.relaxation import RelaxSettings, relax

        tight = RelaxSettings(fmax=0.002, max_steps=2000)
        positions = relax(numbers, positions, make_calculator(**calculator), tight).positions
    settings = ExchangeSettings(
        temperatures=given.temperatures,
        steps=given.steps,
        burn_in=given.burn_in,
        save_every=given.save_every,
        swap_every=given.swap_every,
        step_size=given.step_size,
        tune=given.tune,
    )
    return request_arrays(numbers, positions, settings, given.seed, calculator)


def _failure(error: KernelError) -> Arrays:
    return {
        "error_class": np.frombuffer(type(error).__name__.encode(), dtype=np.uint8),
        "error": np.frombuffer(str(error).encode(), dtype=np.uint8),
    }


def _communicator() -> Communicator:
    started = max((int(os.environ.get(name, "1")) for name in _SIZES), default=1)
    try:
        from mpi4py import MPI
    except ImportError as error:
        if started > 1:
            sys.exit(
                f"{started} processes were started, but mpi4py cannot be loaded ({error}); "
                "pip install 'basin-orchestrator[mpi]'"
            )
        return SingleProcess()
    world: Communicator = MPI.COMM_WORLD
    if world.size == 1 and started > 1:
        sys.exit(
            f"{started} processes were started, but each finds itself alone: mpi4py and mpiexec "
            "belong to different MPI libraries; use the mpiexec of mpi4py's own"
        )
    return world


def _output(given: argparse.Namespace) -> Path:
    if given.result is not None:
        path: Path = given.result
        return path.with_suffix("")
    if given.output is not None:
        named: Path = given.output
        return named
    molecule: Path = given.molecule
    return Path(f"{molecule.stem}-exchange")


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="replica_exchange.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("molecule", nargs="?", type=Path, help="a geometry that ASE can read")
    what.add_argument("--request", type=Path, help="file that says what to compute")
    parser.add_argument("--result", type=Path, help="file for the result (with --request)")
    parser.add_argument("--saved", type=Path, help="file that the state is kept in meanwhile")
    parser.add_argument("--stop-file", type=Path, help="save and stop once this file exists")
    parser.add_argument("--max-seconds", type=float, help="save and stop after so long")
    parser.add_argument("--save-every-s", type=float, default=60.0, metavar="SECONDS",
                        help="save the state this often (default 60)")  # fmt: skip
    hand = parser.add_argument_group("what to compute, without --request")
    hand.add_argument("--temperatures", type=temperatures, default=temperatures("10:400:18"),
                      help="K: 10,20,40 or LOWEST:HIGHEST:NUMBER in equal ratios "
                      "(default 10:400:18)")  # fmt: skip
    hand.add_argument("--steps", type=int, default=24000, help="with burn-in (default 24000)")
    hand.add_argument("--burn-in", type=int, default=5000, help="default 5000")
    hand.add_argument("--save-every", type=int, default=10, help="steps between frames: 10")
    hand.add_argument("--swap-every", type=int, default=10, help="steps between swaps: 10")
    hand.add_argument("--step-size", type=float, default=0.0, help="Å; 0: as published (default)")
    hand.add_argument("--tune", action="store_true", help="adapt step sizes during burn-in")
    hand.add_argument("--seed", type=int, default=1, help="of the random numbers (default 1)")
    hand.add_argument("--level", default="GFN2-xTB", help="default GFN2-xTB")
    hand.add_argument("--program", help="default: the level's first")
    hand.add_argument("--charge", type=int, default=0)
    hand.add_argument("--multiplicity", type=int, default=1)
    hand.add_argument("--relax", action="store_true", help="start from the minimum nearby")
    hand.add_argument("--output", type=Path, help="start of the names of files written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
