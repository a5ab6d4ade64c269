"""Stores of chains: harmonic molecules, whose energies are known exactly at every temperature."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.signal import lfilter

from kernels.units import BOLTZMANN_EV_PER_K
from orchestrator.compact import compact
from orchestrator.store import Store
from tests.orchestrator.store_fixtures import STARTED, Records, key, new_store

LEVEL, PROGRAM, MODEL = "GFN2-xTB", "tblite 0.8.0", "qm9-edm"
DIGEST = "0123456789abcdef" * 4
MU = 0.33

# Ten small flexible molecules.
MOLECULES = (
    "CCO", "COC", "CCCO", "CCOC", "CC(O)CO", "CCN", "COCC", "CC(C)O", "OCCO", "CCCN",
)  # fmt: skip


def harmonic_energies(modes: int, temperature: float, steps: int, memory: float, seed: int) -> Any:
    """Return energies (steps + 1,) in eV of so many oscillators, from their minimum on.

    Each coordinate is an autoregressive series that remembers the share ``memory`` of itself a
    step: the energy's autocorrelation time is (1 + memory²)/(1 - memory²) steps.
    """
    noise = np.random.default_rng(seed).standard_normal((modes, steps)) * np.sqrt(1 - memory**2)
    coordinates = lfilter([1.0], [1.0, -memory], noise, axis=1)
    energies = 0.5 * BOLTZMANN_EV_PER_K * temperature * (coordinates**2).sum(axis=0)
    return np.concatenate([[0.0], energies])


class Chains:
    """Rows of a study with chains; the minimum of every molecule is at -100 eV."""

    def __init__(self, *, steps: int = 4000, burn_in: int = 400, memory: float = 0.9) -> None:
        self.records = Records()
        self.records.tables |= {"chains": [], "single_points": []}
        self.steps, self.burn_in, self.memory = steps, burn_in, memory
        self._clock = STARTED

    def molecule(self, name: str, smiles: str = "CCO") -> bytes:
        """Add a relaxed molecule; return the key of the relaxation."""
        self._clock += 10.0
        return self.records.relaxed(name, smiles, started_s=self._clock)

    def row(self, table: str, row_key: bytes) -> dict[str, Any]:
        """Return the row of a key, to be changed."""
        return next(row for row in self.records.tables[table] if row["key"] == row_key)

    def chain(
        self,
        parent: bytes,
        *,
        kind: str = "metropolis",
        stage: str = "",
        temperature: float = np.nan,
        n: int = 0,
        repeat: int = 0,
        save_every: int = 20,
        factor: float = 1.0,
        rest_eV: float = 0.0,
        moved: float = 0.0,
        every: int = 1,
        energies: Any = None,
        points: bool = True,
        memory: float | None = None,
        **changes: Any,
    ) -> bytes:
        """Add a chain; return its key.

        ``factor`` multiplies the harmonic energy. Diffusion chains are at the temperature MU n², at
        ``rest_eV`` above the minimum, their first atom ``moved`` by so many Å, with an energy of
        every ``every``-th frame.
        """
        about = self.row("relaxations", parent)
        numbers, start = about["numbers"], np.array(about["positions"])
        diffused = kind == "diffusion"
        hot = MU * n**2 if diffused else temperature
        stage = stage or kind.replace(" ", "_")
        stage += f"-{n}" if diffused else f"-{temperature:g}K" if kind != "gaussian" else ""
        stage += f"-r{repeat + 1}" if repeat else ""
        mine = key("chain", stage, parent, kind, changes.get("step_size_A"))
        seed = int.from_bytes(mine[:4], "big")
        if energies is None:
            energies = factor * harmonic_energies(
                3 * len(numbers) - 6,
                0.0 if kind == "gaussian" else hot,
                self.steps,
                self.memory if memory is None else memory,
                seed,
            )
        energies = np.asarray(energies) - 100.0
        n_frames = (len(energies) - 1) // save_every + 1
        rng = np.random.default_rng(seed + 1)
        width = 0.004 * np.sqrt(hot if np.isfinite(hot) else 0.0)
        shape = start.copy()
        shape[0] += [moved, 0.0, 0.0]
        frames = shape + width * rng.standard_normal((n_frames, *start.shape))
        frames[0] = start
        _turn(numbers, frames, 0.05 * np.sqrt(max(hot, 0.0)) * rng.standard_normal(n_frames))
        acceptance = np.nan if kind in ("diffusion", "gaussian") else 0.3
        self.records.tables["chains"].append(
            {
                "key": mine,
                "mol_key": about["mol_key"],
                "parent_key": parent,
                "task_key": mine,
                "stage": stage,
                "conformer": 0,
                "kind": kind,
                "level": "" if diffused else LEVEL,
                "program": "" if diffused else PROGRAM,
                "model": MODEL if "diffusion" in kind else "",
                "model_digest": DIGEST if "diffusion" in kind else "",
                "temperature_K": temperature,
                "n": n,
                "repeat": repeat,
                "n_atoms": len(numbers),
                "n_steps": len(energies) - 1,
                "burn_in": 0 if kind == "gaussian" else self.burn_in,
                "save_every": save_every,
                "step_size_A": np.nan if diffused else 0.01,
                "acceptance": acceptance,
                "swap_acceptance": 0.6 if kind == "replica exchange" else np.nan,
                "n_evaluations": 0 if diffused else len(energies),
                "diverged": 0,
                "divergence": "",
                "energy_eV": [] if diffused else energies,
                "numbers": numbers,
                "positions": frames.reshape(-1, 3),
                "cpu_s": 1.0,
                "wall_s": 1.0,
            }
            | changes
        )
        self._clock += 1.0
        self.records.task(
            stage, mine, mol_key=about["mol_key"], parent_key=parent, started_s=self._clock
        )
        if diffused and points:
            along = energies[::save_every] + rest_eV
            along[0] = -100.0
            along[np.arange(len(along)) % every != 0] = np.nan
            self.points(mine, along)
        return mine

    def exchange(
        self,
        parent: bytes,
        temperatures: Any,
        accepted: Any,
        *,
        round_trips: int = 0,
        efficiency: float = 0.9,
        **changes: Any,
    ) -> None:
        """Add a replica exchange whose neighbours took so many of 100 swaps."""
        for at, temperature in enumerate(temperatures):
            last = at == len(temperatures) - 1
            mine = self.chain(parent, kind="replica exchange", temperature=temperature, **changes)
            about = self.row("chains", mine)
            self.records.tables.setdefault("exchanges", []).append(
                {name: about[name] for name in ("key", "mol_key", "parent_key", "task_key")}
                | {
                    "stage": about["stage"],
                    "conformer": 0,
                    "temperature_K": temperature,
                    "next_temperature_K": np.nan if last else temperatures[at + 1],
                    "swaps_tried": 0 if last else 100,
                    "swaps_accepted": 0 if last else accepted[at],
                    "round_trips": round_trips if at == 0 else 0,
                    "n_processes": 4,
                    "efficiency": efficiency,
                }
            )

    def points(self, chain: bytes, energies: Any, *, level: str = LEVEL) -> bytes:
        """Add the energies (F,) in eV of a chain's frames."""
        about = self.row("chains", chain)
        mine = key("points", chain, level)
        self.records.tables["single_points"].append(
            {
                "key": mine,
                "mol_key": about["mol_key"],
                "parent_key": chain,
                "stage": f"energies-{about['n']}",
                "conformer": 0,
                "level": level,
                "program": PROGRAM,
                "n_atoms": about["n_atoms"],
                "energy_eV": energies,
                "fmax_eV_per_A": np.full(len(energies), np.nan),
                "forces": np.zeros((0, 3)),
                "line_energy_eV": [],
                "cpu_s": 1.0,
            }
        )
        return mine

    def ladders(
        self, parent: bytes, temperatures: Any, ns: Any, *, repeats: int = 1, **changes: Any
    ) -> None:
        """Add both ladders of a molecule."""
        for repeat in range(repeats):
            for temperature in temperatures:
                self.chain(parent, temperature=temperature, repeat=repeat)
            for n in ns:
                self.chain(parent, kind="diffusion", n=n, repeat=repeat, save_every=4, **changes)

    def gaussian(self, parent: bytes) -> bytes:
        """Add a reference chain that diverges after 300 steps."""
        energies = 2.0 * (np.arange(301) / 300.0) ** 1.5
        return self.chain(
            parent, kind="gaussian", energies=energies, diverged=1,
            divergence="2.0 eV above the start",
        )  # fmt: skip

    def store(self, path: Any, *, compacted: bool = False) -> Store:
        """Write the rows as a store."""
        store = new_store(path)
        self.records.seal(store)
        if compacted:
            compact(store)
        return store


def _turn(numbers: Any, frames: Any, angles: Any) -> None:
    """Turn a frame's first rotatable bond by angles (F,) in degrees, in place."""
    from kernels.connectivity import bonds
    from orchestrator.torsions import rotatable

    torsions = rotatable(np.array(numbers, np.uint8), frames[0])
    if not torsions:
        return
    _, b, c, _ = torsions[0].atoms
    pairs = bonds(np.array(numbers, np.uint8), frames[0]).tolist()
    side, open_ = {c}, [c]
    while open_:
        at = open_.pop()
        for i, j in pairs:
            for here, there in ((i, j), (j, i)):
                if here == at and there not in side and {here, there} != {b, c}:
                    side.add(there)
                    open_.append(there)
    moving = sorted(side)
    axis = frames[:, c] - frames[:, b]
    axis = axis / np.linalg.norm(axis, axis=1, keepdims=True)
    turn = np.radians(angles)[:, None, None]
    arms = frames[:, moving] - frames[:, c][:, None]
    along = (arms @ axis[:, :, None]) * axis[:, None]
    frames[:, moving] = (
        frames[:, c][:, None]
        + along
        + np.cos(turn) * (arms - along)
        + np.sin(turn) * np.cross(np.broadcast_to(axis[:, None], arms.shape), arms)
    )


def published_study(
    molecules: int = 10, *, steps: int = 4000, full: bool = False, repeats: int = 1
) -> Chains:
    """Return harmonic molecules on a few of the published rungs, or on all of them."""
    study = Chains(steps=steps)
    temperatures = (10, 20, 70, 120, 300)
    ns: tuple[int, ...] = (1, 4, 14, 20, 30)
    if full:
        temperatures = (
            10, 20, 30, 40, 50, 70, 90, 100, 120, 150, 180, 200, 230, 260, 300, 330, 360, 400,
        )  # fmt: skip
        ns = (1, 2, 4, 6, 8, 11, 14, 17, 20, 24, 27, 30, 35, 40)
    for at in range(molecules):
        parent = study.molecule(f"molecule {at}", MOLECULES[at % len(MOLECULES)])
        study.ladders(parent, temperatures, ns, repeats=repeats, rest_eV=0.03)
    return study
