"""QM9 relaxations by diffusion, n = 50: Basin's batches against the published way of running EDM.

The published way takes one molecule at a time, pads it to 29 atoms, and concatenates the inputs of
every pair before the first layer. It is timed on a sample of the molecules and scaled by their
number: padded, they all cost the same. Both start from the same geometries and use the same noise,
and their results are compared. The network is the published 9 x 256 one with random weights, which
cost what trained ones cost.

Useful operations are those of the unpadded molecules with the first layer of each pair network
split into products per atom; the peak is that of a large float32 matrix product in the same run.
CPU time of all threads.

    python -m benchmarks.diffusion [--threads 1] [--molecules 256] [--sample 8] [--pairs 1024]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import data_folder, table
from benchmarks.published_edm import PublishedEdm
from kernels.diffusion.checkpoint import Model
from kernels.diffusion.egnn import ModelConfig, build, features
from kernels.diffusion.noise import centred_normal
from kernels.diffusion.process import DiffuseSettings, DiffusionPath, Start, diffuse
from kernels.diffusion.published import renamed
from kernels.diffusion.schedule import Schedule

LARGEST = 29
SETTINGS = DiffuseSettings(n=50, protocol="published")


def molecules(count: int) -> list[Start]:
    """Return validation molecules of QM9, evenly chosen."""
    data = np.load(data_folder() / "qm9" / "qm9_b3lyp_geometries.npz")
    rows = np.flatnonzero(data["gdb9_id"] % 10 == 0)
    sizes = data["num_atoms"]
    return [
        Start(
            data["numbers"][row, : sizes[row]],
            data["positions"][row, : sizes[row]].astype(np.float64),
            seed=int(row),
        )
        for row in rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    ]


def useful_operations(config: ModelConfig, n_atoms: int) -> int:
    """Return the multiplications and additions of one evaluation of EDM's network."""
    hidden = config.hidden
    # Second layer, the two distances, and the gate or length, per ordered pair of atoms.
    pair_network = 2 * hidden**2 + 4 * hidden + 2 * hidden
    # The two products of the split first layer, per atom.
    atom_part = 4 * hidden**2
    node_network = 4 * hidden**2 + 2 * hidden**2
    networks = config.inv_sublayers + 1
    block = n_atoms * (n_atoms - 1) * networks * pair_network
    block += n_atoms * (networks * atom_part + config.inv_sublayers * node_network)
    return config.layers * block + 4 * n_atoms * (config.n_features + 1) * hidden


def peak() -> float:
    """Return the matrix products' operations in a CPU second, at their best."""
    size = 2048
    one, other = torch.randn(size, size), torch.randn(size, size)
    best = min(cpu_seconds(lambda: one @ other)[0] for _ in range(6))
    return 2 * size**3 / best


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of all threads, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def published_way(
    network: PublishedEdm, schedule: Schedule, starts: Sequence[Start]
) -> list[NDArray[np.float32]]:
    """Relax one molecule after the other, padded; returns the last frame (N, 3) of each."""
    config = network.config
    found = []
    for start in starts:
        n_atoms = len(start.numbers)
        real = torch.zeros(1, LARGEST, 1)
        real[:, :n_atoms] = 1
        z = torch.zeros(1, LARGEST, 3 + config.n_features)
        centre = start.positions.mean(axis=0)
        z[0, :n_atoms, :3] = torch.from_numpy(start.positions - centre)
        z[0, :n_atoms, 3:] = features(torch.from_numpy(start.numbers.astype("i8")), config)
        for n in range(SETTINGS.n, -1, -1):
            step = schedule.reverse_step(n) if n else schedule.decode_step()
            level = torch.full((1,), n / schedule.steps)
            eps = torch.cat(network(z[..., :3], z[..., 3:], level, real), dim=2)
            noise = torch.zeros_like(z)
            drawn = centred_normal(start.seed, n, n_atoms, config.n_features)
            noise[0, :n_atoms] = torch.from_numpy(drawn)
            z = (step.keep * z - step.remove * eps + step.noise * noise) * real
        found.append((z[0, :n_atoms, :3].numpy() + centre).astype(np.float32))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--molecules", type=int, default=256)
    parser.add_argument("--sample", type=int, default=8, help="molecules run the published way")
    parser.add_argument("--pairs", type=int, help="pairs of atoms in a batch; default: Basin's own")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    config = ModelConfig()
    literal = PublishedEdm(config).eval()
    for name, parameter in literal.named_parameters():
        if name.endswith("coord_mlp.4.weight"):
            # As small as published models start with; else random weights throw the atoms about.
            parameter.data *= 0.01
    network = build(config).eval().requires_grad_(False)
    network.load_state_dict(renamed(literal.state_dict(), config, "benchmark"))
    schedule = Schedule(config.steps, config.precision)
    model = Model(config, network, schedule, name="random", digest="")

    starts = molecules(options.molecules)
    sample = starts[:: max(1, len(starts) // options.sample)][: options.sample]
    evaluations = SETTINGS.n + 1
    operations = {
        id(start): evaluations * useful_operations(config, len(start.numbers)) for start in starts
    }

    def basin(chosen: Sequence[Start], pairs: int | None) -> list[NDArray[np.float32]]:
        paths = diffuse(model, chosen, SETTINGS, batch_pairs=pairs)
        assert all(isinstance(path, DiffusionPath) for path in paths)
        return [path.frames[-1] for path in paths if isinstance(path, DiffusionPath)]

    with torch.inference_mode():
        basin(starts[:2], None)
        best = peak()
        slow, expected = cpu_seconds(lambda: published_way(literal, schedule, sample))
        single, found = cpu_seconds(lambda: basin(sample, 1))
        fast, _ = cpu_seconds(lambda: basin(starts, options.pairs))
        best = max(best, peak())
    difference = max(
        float(np.abs(one - other).max()) for one, other in zip(expected, found, strict=True)
    )

    per_molecule = slow / len(sample)
    rows = []
    for name, chosen, seconds in (
        ("published way", sample, slow),
        ("Basin, one molecule a batch", sample, single),
        ("Basin", starts, fast),
    ):
        rate = sum(operations[id(start)] for start in chosen) / seconds
        rows.append(
            [name, len(chosen), f"{seconds:.1f}", f"{seconds / len(chosen) * len(starts):.0f}",
             f"{1000 * seconds / len(chosen) / evaluations:.1f}", f"{rate / 1e9:.1f}",
             f"{100 * rate / best:.0f} %", f"{per_molecule * len(chosen) / seconds:.1f}"]
        )  # fmt: skip
    atoms = np.mean([len(start.numbers) for start in starts])
    table(
        f"{len(starts)} QM9 relaxations at n = {SETTINGS.n}, "
        f"EDM {config.layers} x {config.hidden}, torch threads: {options.threads}",
        ["", "molecules run", "CPU s", f"CPU s for {len(starts)}", "ms per evaluation",
         "useful GFLOP/s", "share of peak", "times faster"],
        rows,
    )  # fmt: skip
    print(
        f"\nMean size {atoms:.1f} atoms; rows with fewer molecules run are scaled by molecule.\n"
        f"Peak: {best / 1e9:.1f} GFLOP/s per CPU second of a float32 matrix product of side 2048.\n"
        f"Largest difference between the results: {difference:.1e} Å"
    )


if __name__ == "__main__":
    main()
