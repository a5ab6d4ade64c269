"""Stores of studies with diffusion: what relaxations cost from MMFF and from diffused starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels.units import KCAL_TO_EV
from orchestrator.compact import compact
from orchestrator.store import Store
from tests.orchestrator.store_fixtures import NO_KEY, STARTED, Records, key, new_store

DIGEST = "0123456789abcdef" * 4


class Study:
    """Rows of a study; energies are given in kcal/mol, as the study reports them."""

    def __init__(self) -> None:
        self.records = Records()
        self._clock = STARTED
        for table in ("paths", "single_points", "generations"):
            self.records.tables[table] = []

    def molecule(
        self,
        name: str,
        steps: int = 20,
        *,
        start: float = 10.0,
        smiles: str = "CCO",
        stage: str = "gfn2",
        cpu_s: float = 2.0,
        changed: bool = False,
    ) -> bytes:
        """Add a molecule relaxed from its MMFF geometry; return the baseline's key."""
        self._clock += 10.0
        made = self.records.relaxed(
            name,
            smiles,
            steps=steps,
            gain_eV=start * KCAL_TO_EV,
            stage=stage,
            started_s=self._clock,
            changed=changed,
        )
        self._clock += 5.0
        self.records.tables["relaxations"][-1]["cpu_s"] = cpu_s
        return made

    def diffuse(
        self,
        baseline: bytes,
        *,
        n: int = 20,
        model: str = "qm9-gfn2",
        stage: str = "",
        cpu_s: float = 0.5,
        changed: bool = False,
        frames: np.ndarray[Any, Any] | None = None,
    ) -> bytes:
        """Add a diffusion path from the geometry the baseline started from; return its key.

        ``frames`` (F, N, 3) in Å; by default the molecule swells by 2 %.
        """
        stage = stage or f"diffused-{n}"
        about = self.row("relaxations", baseline)
        start = self.row("geometries", about["parent_key"])["positions"]
        if frames is None:
            frames = start * np.linspace(1.0, 1.02, n + 1)[:, None, None]
        mine = key(stage, model, n, baseline)
        common = {
            "key": mine,
            "mol_key": about["mol_key"],
            "parent_key": about["parent_key"],
            "stage": stage,
            "conformer": about["conformer"],
            "numbers": about["numbers"],
        }
        self.records.tables["geometries"].append(
            common
            | {
                "method": f"diffusion {model} n={n}",
                "energy_eV": np.nan,
                "initial_energy_eV": np.nan,
                "n_steps": n,
                "positions": frames[-1],
            }
        )
        self.records.tables["paths"].append(
            common
            | {
                "model": model,
                "model_digest": DIGEST,
                "n": n,
                "protocol": "deterministic",
                "changed_elements": 0,
                "connectivity_changed": int(changed),
                "level": np.arange(len(frames))[::-1],
                "positions": np.concatenate(list(frames)),
            }
        )
        self._task(stage, mine, common, "diffuse 1", cpu_s)
        return mine

    def relax(
        self,
        parent: bytes,
        baseline: bytes,
        steps: int,
        *,
        stage: str = "relaxed-20",
        start: float = 2.0,
        delta: float = 0.0,
        cpu_s: float = 1.0,
        changed: bool = False,
        level: str = "GFN2-xTB",
        kernel: str = "relax 1",
    ) -> bytes:
        """Add a relaxation from any geometry, ``delta`` below the baseline's; return its key."""
        mine = key(stage, parent, kernel)
        final = self.row("relaxations", baseline)["final_energy_eV"] - delta * KCAL_TO_EV
        row = self.row("relaxations", baseline) | {
            "key": mine,
            "parent_key": parent,
            "stage": stage,
            "level": level,
            "n_steps": steps,
            "n_evaluations": steps + 1,
            "initial_energy_eV": final + start * KCAL_TO_EV,
            "final_energy_eV": final,
            "connectivity_changed": int(changed),
            "cpu_s": cpu_s,
        }
        self.records.tables["relaxations"].append(row)
        self._task(stage, mine, row, kernel, cpu_s)
        return mine

    def arm(self, baseline: bytes, steps: int, *, n: int = 20, **changes: Any) -> bytes:
        """Add a diffusion and the relaxation from its end; return the relaxation's key."""
        path = self.diffuse(baseline, n=n)
        return self.relax(path, baseline, steps, stage=f"relaxed-{n}", **changes)

    def points(
        self,
        path: bytes,
        above: Sequence[float],
        *,
        minimum: bytes,
        forces: np.ndarray[Any, Any] | None = None,
        stage: str = "points",
    ) -> None:
        """Add single-point energies of a path's frames, ``above`` (F,) the minimum's energy."""
        about = self.row("paths", path)
        relaxed = self.row("relaxations", minimum)
        mine = key(stage, path)
        common = {"mol_key": about["mol_key"], "parent_key": path, "conformer": about["conformer"]}
        self.records.tables["single_points"].append(
            common
            | {
                "key": mine,
                "stage": stage,
                "level": relaxed["level"],
                "program": relaxed["program"],
                "n_atoms": len(about["numbers"]),
                "energy_eV": relaxed["final_energy_eV"] + np.array(above) * KCAL_TO_EV,
                "fmax_eV_per_A": np.full(len(above), 0.5),
                "forces": np.zeros((0, 3)) if forces is None else forces.reshape(-1, 3),
                "line_energy_eV": [],
                "cpu_s": 0.1,
            }
        )
        self._task(stage, mine, common, "single_points 1", 0.1)

    def generation(
        self,
        name: str,
        *,
        steps: int = 100,
        settled: int = 50,
        energies: Sequence[float] | None = None,
        line: Sequence[float] = (),
        stage: str = "generated",
        smiles: str = "CCO",
    ) -> bytes:
        """Add a molecule made from noise whose elements are final from ``settled`` on.

        ``energies``, one a frame from ``settled`` down to 0, and ``line`` are in kcal/mol above
        the last frame.
        """
        mol_key, mol = self.records.molecule(name, smiles)
        mine = key(stage, name)
        levels = np.arange(steps, -1, -1)
        final = levels <= settled
        self.records.tables["generations"].append(
            {
                "key": mine,
                "mol_key": mol_key,
                "stage": stage,
                "model": "qm9-gfn2",
                "n_atoms": mol.GetNumAtoms(),
                "level": levels,
                "step_length_A": np.where(levels == steps, 0.0, 0.001 * levels + 0.001),
                "bond_deviation_A": 0.01 * levels,
                "elements_final": np.where(final, 1.0, 0.5),
                "all_elements_final": final,
                "bonds_final": np.where(levels <= settled / 2, 1.0, 0.4),
                "all_bonds_final": levels <= settled / 2,
                "valid_bonds": np.where(final, 1.0, 0.3),
            }
        )
        common = {"mol_key": mol_key, "parent_key": NO_KEY}
        self._task(stage, mine, common, "generate 1", 5.0)
        if energies is not None:
            known = np.full(len(levels), np.nan)
            known[final] = -100.0 + np.array(energies) * KCAL_TO_EV
            points = key("points", mine)
            self.records.tables["single_points"].append(
                {
                    "key": points,
                    "mol_key": mol_key,
                    "parent_key": mine,
                    "stage": "points",
                    "conformer": 0,
                    "level": "GFN2-xTB",
                    "program": "tblite 0.8.0",
                    "n_atoms": mol.GetNumAtoms(),
                    "energy_eV": known,
                    "fmax_eV_per_A": np.where(final, 1.0, np.nan),
                    "forces": np.zeros((0, 3)),
                    "line_energy_eV": -100.0 + np.array(line) * KCAL_TO_EV,
                    "cpu_s": 0.5,
                }
            )
            parent = common | {"parent_key": mine}
            self._task("points", points, parent, "single_points 1", 0.5)
        return mine

    def store(self, path: Any, *, compacted: bool = True) -> Store:
        """Seal everything into a new store."""
        made = new_store(path)
        self.records.seal(made)
        if compacted:
            compact(made)
        return made

    def row(self, table: str, wanted: bytes) -> dict[str, Any]:
        return next(row for row in self.records.tables[table] if row["key"] == wanted)

    def _task(
        self, stage: str, mine: bytes, row: dict[str, Any], kernel: str, cpu_s: float
    ) -> None:
        self._clock += 1.0
        self.records.task(
            stage,
            mine,
            mol_key=row["mol_key"],
            parent_key=row["parent_key"],
            kernel=kernel,
            started_s=self._clock,
            cpu_s=cpu_s,
        )


def little_study(molecules: int = 12) -> Study:
    """Return a study of so many molecules with two arms: n = 20 halves the steps, 50 quarters them.

    Even molecules take 20 steps from MMFF, odd ones 40; each starts 10 kcal/mol above its minimum
    from MMFF, 2 kcal/mol from n = 20 and 1 kcal/mol from n = 50.
    """
    study = Study()
    for at in range(molecules):
        steps = 20 + 20 * (at % 2)
        baseline = study.molecule(f"molecule {at}", steps)
        study.arm(baseline, steps // 2)
        study.arm(baseline, steps // 4, n=50, start=1.0)
    return study
