"""Small stores: RDKit geometries of real molecules, with made-up paths between them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem
from rdkit.Chem import AllChem, rdMolDescriptors

from orchestrator import shard
from orchestrator.columns import from_records
from orchestrator.schema import SCHEMA_VERSION
from orchestrator.store import Store

NO_KEY = bytes(16)
STARTED = 1_750_000_000.0

MOLECULES = {
    "ethanol": "CCO",
    "acetic acid": "CC(=O)O",
    "benzene": "c1ccccc1",
    "glycine zwitterion": "[NH3+]CC(=O)[O-]",
    "acetate": "CC(=O)[O-]",
}


def key(*parts: object) -> bytes:
    """Return a key made of anything that can be printed."""
    return hashlib.sha256(repr(parts).encode()).digest()[:16]


@dataclass
class Records:
    """Rows of the five tables, as mappings."""

    tables: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {
            name: [] for name in ("molecules", "geometries", "relaxations", "frames", "tasks")
        }
    )

    def task(self, stage: str, task_key: bytes, **changes: Any) -> None:
        """Add a row to the tasks table."""
        row = {
            "key": task_key,
            "mol_key": NO_KEY,
            "parent_key": NO_KEY,
            "stage": stage,
            "kernel": f"{stage} 1",
            "status": "ok",
            "message": "",
            "attempts": 1,
            "ladder": "",
            "conformer": 0,
            "seed": int.from_bytes(task_key[:8], "big"),
            "source": "",
            "line": -1,
            "host": "node1",
            "block": "local-0",
            "worker_pid": 100,
            "started_s": STARTED,
            "wall_s": 1.0,
            "cpu_s": 0.9,
        }
        self.tables["tasks"].append(row | changes)

    def molecule(self, name: str, smiles: str, line: int = 1) -> tuple[bytes, Chem.Mol]:
        """Add a molecule; return its key and its RDKit molecule with an embedded geometry."""
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        AllChem.EmbedMolecule(mol, randomSeed=7)
        mol_key = key("molecule", smiles, name)
        self.tables["molecules"].append(
            {
                "key": mol_key,
                "smiles": smiles,
                "name": name,
                "formula": rdMolDescriptors.CalcMolFormula(mol),
                "source": "some.smi",
                "line": line,
                "n_atoms": mol.GetNumAtoms(),
                "n_heavy": mol.GetNumHeavyAtoms(),
                "charge": Chem.GetFormalCharge(mol),
                "multiplicity": 1,
                "numbers": [a.GetAtomicNum() for a in mol.GetAtoms()],
            }
        )
        return mol_key, mol

    def relaxed(
        self,
        name: str,
        smiles: str,
        *,
        steps: int = 4,
        forces: bool = False,
        line: int = 1,
        stage: str = "gfn2",
        gain_eV: float = 0.5,
        changed: bool = False,
        started_s: float = STARTED,
        frame_energies: Sequence[float] | None = None,
    ) -> bytes:
        """Add a molecule that was embedded, MMFF-optimised and relaxed; return the last key."""
        mol_key, mol = self.molecule(name, smiles, line)
        numbers = [a.GetAtomicNum() for a in mol.GetAtoms()]
        start = mol.GetConformer().GetPositions()
        AllChem.MMFFOptimizeMolecule(mol, maxIters=2000)
        end = mol.GetConformer().GetPositions()
        embed, mmff, relax = (key(s, mol_key) for s in ("embed", "mmff", stage))
        common = {"mol_key": mol_key, "conformer": 0, "numbers": numbers}
        self.tables["geometries"] += [
            common | {
                "key": embed, "parent_key": NO_KEY, "stage": "embed", "method": "ETKDGv3",
                "energy_eV": np.nan, "initial_energy_eV": np.nan, "n_steps": 0, "positions": start,
            },
            common | {
                "key": mmff, "parent_key": embed, "stage": "mmff", "method": "MMFF94",
                "energy_eV": -1.0, "initial_energy_eV": 1.0, "n_steps": 30, "positions": end,
            },
        ]  # fmt: skip
        energies = (
            np.linspace(gain_eV, 0.0, steps + 1) - 100.0
            if frame_energies is None
            else np.array(frame_energies)
        )
        weights = np.linspace(0.0, 1.0, len(energies))[:, None, None]
        path = start + weights * (end - start)
        self.tables["relaxations"].append(
            common | {
                "key": relax, "parent_key": mmff, "stage": stage, "level": "GFN2-xTB",
                "program": "tblite 0.8.0", "optimizer": "BFGS", "n_atoms": len(numbers),
                "n_steps": steps, "n_evaluations": steps + 1,
                "initial_energy_eV": energies[0], "final_energy_eV": energies[-1],
                "fmax_eV_per_A": 0.02, "connectivity_changed": int(changed), "ladder": "",
                "cpu_s": 0.9, "wall_s": 1.0, "positions": end,
            }
        )  # fmt: skip
        self.tables["frames"].append(
            {
                "key": relax,
                "mol_key": mol_key,
                "energy_eV": energies,
                "fmax_eV_per_A": np.linspace(1.0, 0.02, len(energies)),
                "positions": path.reshape(-1, 3),
                "forces": 0.1 * path.reshape(-1, 3) if forces else np.zeros((0, 3)),
            }
        )
        for at, (task_stage, task_key, parent) in enumerate(
            (("embed", embed, NO_KEY), ("mmff", mmff, embed), (stage, relax, mmff))
        ):
            self.task(
                task_stage, task_key, mol_key=mol_key, parent_key=parent, started_s=started_s + at
            )
        return relax

    def bad_line(self, line: int, message: str) -> bytes:
        """Add the failure of an entry that could not be read."""
        task_key = key("entry", line)
        self.task(
            "molecules", task_key, status="input", message=message, source="some.smi", line=line,
            kernel="read", cpu_s=0.0, wall_s=0.0,
        )  # fmt: skip
        return task_key

    def seal(self, store: Store, name: str = "shard") -> Path:
        """Put the rows into the store's inbox as one shard."""
        folder = store.path / "inbox" / "run"
        folder.mkdir(exist_ok=True)
        rows = [from_records(table, records) for table, records in self.tables.items() if records]
        return shard.seal(folder, name, rows, store.name)[0]


def new_store(path: Path) -> Store:
    """Make an empty store, without asking which version of Basin is installed."""
    for folder in ("inbox", "segments", "manifest", "plan", "checkpoints", "control", "logs"):
        (path / folder).mkdir(parents=True)
    (path / "campaign.json").write_text(
        f'{{"campaign": "little", "schema_version": {SCHEMA_VERSION}, "basin": "0.1.0", '
        '"created_utc": "2025-06-15T12:00:00Z"}'
    )
    return Store(path)


def little_records(**changes: Any) -> Records:
    """Return five relaxed molecules and one bad line."""
    records = Records()
    for line, (name, smiles) in enumerate(MOLECULES.items(), 1):
        records.relaxed(
            name, smiles, line=line, steps=3 + line, gain_eV=0.1 * line,
            started_s=STARTED + 3 * line, **changes,
        )  # fmt: skip
    records.bad_line(6, "SMILES 'C(C' is not closed [C(C]")
    return records
