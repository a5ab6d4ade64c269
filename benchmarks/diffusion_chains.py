"""Diffusion chains in batches against one at a time; what diffusion moves save a Metropolis chain.

`speed`: chains of the 14 published n for each of 10 molecules of QM9, all together; one chain at a
time with the same code; and one at a time the published way, padded to 29 atoms. Molecules are
those of jobs/qm9_boltzmann.toml, and flexible ones of two ranges of sizes. Networks are Basin's
qm9-edm (64 wide, 5 layers) and smaller ones with random weights, which cost what trained ones cost.
CPU time of all threads; the last two ways make one chain of each molecule.

`effective`: how many GFN2-xTB evaluations an independent sample of the energy takes, with Gaussian
moves and with moves of the model, on flexible molecules of QM9. Plain chains decorrelate over
thousands of evaluations, along soft motions over tens of thousands, which runs of 10 000 steps do
not see: their autocorrelation times come out far too short. So one move of each kind is tried from
each of some geometries at equilibrium, and tells how fast every normal mode decorrelates at first;
for reversible chains that bounds the autocorrelation time from below (the spectrum's convexity).
The energy's, which is the sum of the modes', is then the mean over the modes of
2 sigma_i² / <a dq_i²>, with the chance of acceptance a and the harmonic spread sigma_i.

    python -m benchmarks.diffusion_chains speed [--threads 1] [--steps 64]
    python -m benchmarks.diffusion_chains effective [--steps 1600] [--molecules 4]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import ROOT, data_folder, table
from benchmarks.published_edm import PublishedEdm
from kernels.calculators import evaluate, make_calculator
from kernels.connectivity import bonds
from kernels.diffusion.chains import ChainStart, diffusion_chains
from kernels.diffusion.checkpoint import Model, load
from kernels.diffusion.egnn import build, features
from kernels.diffusion.noise import centred_normal
from kernels.diffusion.published import renamed
from kernels.errors import KernelError
from kernels.relaxation import RelaxSettings, relax
from kernels.sampling import metropolis
from kernels.sampling.diffusion_proposal import DiffusionProposal
from kernels.sampling.metropolis import (
    ChainSettings,
    GaussianProposal,
    Proposal,
    published_step_size,
)
from kernels.units import BOLTZMANN_EV_PER_K

LARGEST = 29
LEVELS = (1, 2, 4, 6, 8, 11, 14, 17, 20, 24, 27, 30, 35, 40)
VALENCES = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}


def flexible(smallest: int, largest: int, count: int) -> list[tuple[Any, Any]]:
    """Return numbers and positions of chains of single bonds of QM9, by their number of atoms."""
    data = np.load(data_folder() / "qm9" / "qm9_b3lyp_geometries.npz")
    found = []
    for z, x, size in zip(data["numbers"], data["positions"], data["num_atoms"], strict=True):
        if not smallest <= size <= largest:
            continue
        numbers, positions = z[:size], x[:size].astype(np.float64)
        pairs = bonds(numbers, positions)
        usual = [VALENCES[number] for number in numbers.tolist()]
        if len(pairs) == size - 1 and (np.bincount(pairs.ravel()) == usual).all():
            found.append((numbers, positions))
    return [found[at] for at in np.linspace(0, len(found) - 1, count).astype(int)]


def protocol() -> list[tuple[Any, Any]]:
    """Return numbers and positions of the molecules of the published protocol's campaign."""
    from orchestrator.campaign import load_campaign
    from orchestrator.molecules import find_files, read_entries

    path = ROOT / "jobs" / "qm9_boltzmann.toml"
    source = load_campaign(path, with_models=False).molecules
    entries = read_entries(find_files(source, path.parent), source)
    return [(e.molecule.numbers, e.positions) for e in entries if e.molecule is not None]


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def published_way(network: PublishedEdm, model: Model, start: ChainStart, steps: int) -> None:
    """One chain, padded, with noise for the features too, recorded step by step."""
    config, size = network.config, len(start.numbers)
    real = torch.zeros(1, LARGEST, 1)
    real[:, :size] = 1
    z = torch.zeros(1, LARGEST, 3 + config.n_features)
    z[0, :size, :3] = torch.from_numpy(start.positions - start.positions.mean(axis=0))
    clean = features(torch.from_numpy(start.numbers.astype("i8")), config)
    level = torch.full((1,), start.n / model.schedule.steps)
    frames = []
    with torch.inference_mode():
        for step in range(steps):
            z[0, :size, 3:] = clean
            eps = torch.cat(network(z[..., :3], z[..., 3:], level, real), dim=2)
            keep, remove, width = model.schedule.reverse_step(start.n)
            noise = torch.zeros_like(z)
            drawn = centred_normal(start.seed, step, size, config.n_features)
            noise[0, :size] = torch.from_numpy(drawn)
            z = (keep * z - remove * eps + width * noise) * real
            frames.append(z[0, :size, :3].numpy().copy())


def networks() -> list[tuple[str, Model, PublishedEdm]]:
    """Return models by name, each with the published network of its size."""
    trained = load("qm9-edm")
    made = [("qm9-edm", trained, PublishedEdm(trained.config).eval())]
    for hidden, layers in ((32, 4), (16, 3), (16, 2)):
        config = replace(trained.config, hidden=hidden, layers=layers)
        literal = PublishedEdm(config).eval()
        for name, parameter in literal.named_parameters():
            if name.endswith("coord_mlp.4.weight"):
                # As small as published models start with; else random weights throw atoms about.
                parameter.data *= 0.01
        network = build(config).eval().requires_grad_(False)
        network.load_state_dict(renamed(literal.state_dict(), config, "benchmark"))
        model = replace(trained, config=config, network=network, name="random")
        made.append((f"{hidden} wide, {layers} layers", model, literal))
    return made


def speed(steps: int) -> None:
    """Print chain steps a second, three ways."""
    for name, molecules in (
        ("of 9 to 15 atoms", flexible(9, 15, 10)),
        ("of 14 to 22 atoms", flexible(14, 22, 10)),
        ("of jobs/qm9_boltzmann.toml", protocol()),
    ):
        speed_of(name, molecules, steps)


def speed_of(molecules: str, given: Sequence[tuple[Any, Any]], steps: int) -> None:
    """Print chain steps a second of some molecules, three ways."""
    starts = [
        ChainStart(numbers, positions, seed=100 * row + n, n=n)
        for row, (numbers, positions) in enumerate(given)
        for n in LEVELS
    ]
    # The one-at-a-time ways: one chain of each molecule, an n of its own each.
    sample = starts[:: len(LEVELS) + 1]
    rows = []
    for name, model, literal in networks():

        def together(model: Model = model) -> None:
            diffusion_chains(model, starts, steps=steps)

        def alone(model: Model = model) -> None:
            for start in sample:
                diffusion_chains(model, [start], steps=steps)

        def published(model: Model = model, literal: PublishedEdm = literal) -> None:
            for start in sample:
                published_way(literal, model, start, steps)

        diffusion_chains(model, starts, steps=2)
        # The better of two turns, one way after the other.
        turns = [[cpu_seconds(way) for way in (together, alone, published)] for _ in range(2)]
        batched, single, usual = np.min(turns, axis=0)
        rates = [
            len(starts) * steps / batched, len(sample) * steps / single, len(sample) * steps / usual
        ]  # fmt: skip
        rows.append(
            [
                name,
                *(f"{rate:,.0f}" for rate in rates),
                f"{rates[0] / rates[1]:.1f}",
                f"{rates[0] / rates[2]:.1f}",
            ]
        )
    sizes = [len(start.numbers) for start in starts]
    table(
        f"Steps of {len(starts)} diffusion chains of ten molecules {molecules}, "
        f"{np.mean(sizes):.1f} on average",
        ["network", "together, 1/s", "one by one, 1/s", "published way, 1/s", "ratio", "ratio"],
        rows,
    )


def harmonic_modes(
    numbers: Any, minimum: NDArray[np.float64], calculator: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return curvatures (3N-6,) in eV/Å² and directions (3N, 3N-6) of the modes at a minimum."""
    delta, rows = 0.005, []
    for move in np.eye(minimum.size).reshape(-1, *minimum.shape) * delta:
        up = evaluate(calculator, numbers, minimum + move)[1]
        down = evaluate(calculator, numbers, minimum - move)[1]
        rows.append((down - up).ravel() / (2 * delta))
    hessian = np.array(rows)
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    return values[6:], vectors[:, 6:]


def evaluations_per_sample(
    proposal: Proposal,
    step_size: float,
    samples: Sequence[tuple[NDArray[np.float64], float]],
    numbers: Any,
    start: NDArray[np.float64],
    calculator: Any,
    modes: tuple[NDArray[np.float64], NDArray[np.float64]],
    thermal_energy: float,
) -> tuple[float, float]:
    """Return the least autocorrelation time of the energy in moves, and the acceptance."""
    curvatures, directions = modes
    shape = {name: a for name, a in proposal.init(start).items() if name == "shape"}
    moved, accepted, tried = np.zeros(len(curvatures)), 0.0, 0
    for at, (positions, energy) in enumerate(samples):
        memory = shape or proposal.init(positions)
        for repeat in range(2):
            new, _, log_ratio = proposal.propose(positions, memory, at, repeat + 1, step_size)
            tried += 1
            try:
                after, _ = evaluate(calculator, numbers, new)
            except KernelError:
                continue
            chance = np.exp(min(0.0, (energy - after) / thermal_energy + log_ratio))
            accepted += chance
            moved += chance * (directions.T @ (new - positions).ravel()) ** 2
    return float((2 * thermal_energy / curvatures / (moved / tried)).mean()), accepted / tried


def effective(steps: int, molecules: int) -> None:
    """Print what each kind of moves takes for a sample, per molecule and temperature."""
    model = load("qm9-edm")
    widths = np.array([model.schedule.reverse_step(n).noise for n in range(1, 60)])
    rows = []
    gains: dict[str, list[float]] = {}
    for row, (numbers, given) in enumerate(flexible(15, 20, molecules)):
        calculator = make_calculator("GFN2-xTB")
        start = relax(numbers, given, calculator, RelaxSettings(fmax=0.003)).frames[-1]
        modes = harmonic_modes(numbers, start, calculator)
        formula = "".join(
            f"{symbol}{count if count > 1 else ''}"
            for symbol, number in (("C", 6), ("H", 1), ("N", 7), ("O", 8), ("F", 9))
            if (count := int((numbers == number).sum()))
        )
        for temperature in (300.0, 70.0):
            thermal_energy = BOLTZMANN_EV_PER_K * temperature
            published = published_step_size(temperature)
            # The reverse step that is about as wide as the published Gaussian moves.
            n = int(np.abs(widths - 1.2 * published).argmin()) + 1
            shaped = DiffusionProposal(model, numbers)
            settings = ChainSettings(temperature, steps, steps * 3 // 8, tune=True)
            state = metropolis.init(numbers, start, calculator, settings, shaped)
            metropolis.advance(
                state, numbers, calculator, settings, row, until=steps, proposal=shaped
            )
            frames = state.frames[len(state.frames) * 3 // 8 :].astype(np.float64)
            samples = [(x, evaluate(calculator, numbers, x)[0]) for x in frames]
            kinds: list[tuple[str, Proposal, float]] = [
                ("Gaussian, published step", GaussianProposal(), published),
                ("Gaussian, 1.4 x", GaussianProposal(), 1.4 * published),
                (
                    f"reverse step, n = {n}",
                    DiffusionProposal(model, numbers, n, 1.0, moves="reverse step"),
                    published,
                ),
                ("shaped, published step", DiffusionProposal(model, numbers, share=1.0), published),
                ("shaped, tuned", DiffusionProposal(model, numbers, share=1.0), state.step_size),
            ]
            first = 0.0
            for name, proposal, step_size in kinds:
                needed, acceptance = evaluations_per_sample(
                    proposal, step_size, samples, numbers, start, calculator, modes, thermal_energy
                )
                first = first or needed
                gains.setdefault(name.split(", n")[0], []).append(first / needed)
                rows.append(
                    [
                        formula, f"{temperature:g}", name, f"{step_size:.4f}", f"{acceptance:.2f}",
                        f"{needed:,.0f}", f"{first / needed:.1f}",
                    ]
                )  # fmt: skip
    table(
        "GFN2-xTB evaluations for an independent sample of the energy",
        ["molecule", "T, K", "moves", "step size, Å", "acceptance", "evaluations", "gain"],
        rows,
    )
    table(
        "Gain, geometric mean",
        ["moves", "gain", "least", "most"],
        [
            [name, f"{np.exp(np.log(all_).mean()):.1f}", f"{min(all_):.1f}", f"{max(all_):.1f}"]
            for name, all_ in gains.items()
        ],
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "effective", "all"], nargs="?", default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: 64 for speed, 1600 for effective")
    parser.add_argument("--molecules", type=int, help="of effective; default: 4")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.what != "effective":
        speed(options.steps or 64)
    if options.what != "speed":
        effective(options.steps or 1600, options.molecules or 4)


if __name__ == "__main__":
    main()
