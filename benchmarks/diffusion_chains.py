"""Diffusion chains in batches against one at a time; what diffusion moves save a Metropolis chain.

`speed`: chains of the 14 published n for each of 10 molecules of QM9, all together; one chain at a
time with the same code; and one at a time the published way, padded to 29 atoms. Networks are
Basin's qm9-edm (64 wide, 5 layers) and smaller ones with random weights, which cost what trained
ones cost. CPU time of all threads; the steps of the last two are few and scaled up.

`effective`: effective samples of the energy for a thousand GFN2-xTB evaluations after burn-in, of
chains with Gaussian moves and with moves of the model, on small flexible molecules of QM9.

    python -m benchmarks.diffusion_chains speed [--threads 1] [--steps 40] [--molecules 10]
    python -m benchmarks.diffusion_chains effective [--steps 4000] [--molecules 4]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import data_folder, table
from benchmarks.published_edm import PublishedEdm
from kernels.calculators import make_calculator
from kernels.connectivity import bonds
from kernels.diffusion.chains import ChainStart, diffusion_chains
from kernels.diffusion.checkpoint import Model, load
from kernels.diffusion.egnn import build, features
from kernels.diffusion.noise import centred_normal
from kernels.diffusion.published import renamed
from kernels.relaxation import RelaxSettings, relax
from kernels.sampling import metropolis
from kernels.sampling.diffusion_proposal import DiffusionProposal
from kernels.sampling.metropolis import ChainSettings, published_step_size

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
    for hidden, layers in ((32, 4), (16, 3)):
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


def speed(steps: int, molecules: int) -> None:
    """Print chain steps a second, three ways."""
    starts = [
        ChainStart(numbers, positions, seed=100 * row + n, n=n)
        for row, (numbers, positions) in enumerate(flexible(14, 22, molecules))
        for n in LEVELS
    ]
    # The one-at-a-time ways: one chain of each molecule, an n of its own each.
    sample = starts[:: len(LEVELS) + 1] if molecules > 1 else starts[:1]
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
        # The best of three turns, one way after the other.
        turns = [[cpu_seconds(way) for way in (together, alone, published)] for _ in range(3)]
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
        f"Steps of {len(starts)} diffusion chains, {np.mean(sizes):.1f} atoms on average",
        ["network", "together, 1/s", "one by one, 1/s", "published way, 1/s", "ratio", "ratio"],
        rows,
    )


def effective_samples(energies: NDArray[np.float64]) -> float:
    """Number of independent samples that a series is worth (Sokal's window of 6 times)."""
    series = energies - energies.mean()
    if not series.any():
        return 0.0
    spectrum = np.abs(np.fft.rfft(series, 2 * len(series))) ** 2
    correlation = np.fft.irfft(spectrum)[: len(series)]
    times = 1 + 2 * np.cumsum(correlation[1:] / correlation[0])
    window = next((at for at in range(len(times)) if at + 1 >= 6 * times[at]), len(times) - 1)
    return len(series) / max(float(times[window]), 1.0)


def effective(steps: int, molecules: int) -> None:
    """Print the effective samples of each kind of moves, per molecule and temperature."""
    model = load("qm9-edm")
    rows, gains = [], []
    kinds = {
        "gaussian": (False, None),
        "gaussian, tuned": (True, None),
        "reverse step": (False, "reverse step"),
        "shaped": (False, "shaped"),
        "shaped, tuned": (True, "shaped"),
    }
    for row, (numbers, given) in enumerate(flexible(9, 14, molecules)):
        calculator = make_calculator("GFN2-xTB")
        start = relax(numbers, given, calculator, RelaxSettings(fmax=0.003)).frames[-1]
        formula = "".join(
            f"{symbol}{count}"
            for symbol, number in (("C", 6), ("H", 1), ("N", 7), ("O", 8), ("F", 9))
            if (count := int((numbers == number).sum()))
        )
        for temperature in (300.0, 70.0):
            # The reverse step that is about as wide as the published Gaussian moves.
            widths = [model.schedule.reverse_step(n).noise for n in range(1, 60)]
            n = int(np.abs(np.array(widths) - 1.2 * published_step_size(temperature)).argmin()) + 1
            found = []
            for name, (tune, moves) in kinds.items():
                settings = ChainSettings(temperature, steps + steps // 4, steps // 4, tune=tune)
                proposal = (
                    DiffusionProposal(
                        model, numbers, n if moves == "reverse step" else 20, moves=moves
                    )
                    if moves
                    else None
                )
                began = time.process_time()
                state = metropolis.init(numbers, start, calculator, settings, proposal)
                metropolis.advance(
                    state, numbers, calculator, settings, row, until=settings.steps,
                    proposal=proposal,
                )  # fmt: skip
                spent = time.process_time() - began
                samples = effective_samples(state.energies[settings.burn_in + 1 :])
                found.append(1000 * samples / steps)
                above = np.mean(state.energies[settings.burn_in :]) - state.energies[0]
                # Of (3N-6)/2 k_B T, which harmonic motion has.
                share = above / ((1.5 * len(numbers) - 3) * metropolis.BOLTZMANN_EV_PER_K)
                rows.append(
                    [
                        formula, f"{temperature:g}", name, f"{state.acceptance:.2f}",
                        f"{state.step_size:.4f}", f"{share / temperature:.2f}",
                        f"{found[-1]:.1f}", f"{found[-1] / found[0]:.1f}",
                        f"{1000 * spent / settings.steps:.2f}",
                    ]
                )  # fmt: skip
                print(*rows[-1], sep="  ", flush=True)
            gains.append([value / found[0] for value in found])
    heads = ["molecule", "T, K", "moves", "acceptance", "step size, Å", "energy, of harmonic"]
    table("Effective samples", [*heads, "per 1000 evaluations", "ratio", "ms/step"], rows)
    means = np.exp(np.log(np.maximum(gains, 1e-3)).mean(axis=0))
    table(
        "Effective samples for an evaluation, geometric mean",
        ["moves", "ratio"],
        [[name, f"{mean:.1f}"] for name, mean in zip(kinds, means, strict=True)],
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "effective", "all"], nargs="?", default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: 40 for speed, 4000 for effective")
    parser.add_argument("--molecules", type=int, help="default: 10 for speed, 4 for effective")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.what != "effective":
        speed(options.steps or 40, options.molecules or 10)
    if options.what != "speed":
        effective(options.steps or 4000, options.molecules or 4)


if __name__ == "__main__":
    main()
