"""The tables of a store: names, columns, types and units, in shards and segments alike."""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA_VERSION = 1

STATUSES = (
    "ok",
    "input",
    "embed",
    "convergence",
    "not_finite",
    "timeout",
    "crash",
    "resource",
    "lost",
)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    ``kind`` is ``key`` (two u8 words of a SHA-256), ``scalar``, ``string``, ``category``
    (a string from a small set, held as codes) or ``ragged`` (a run of values per row).
    Ragged columns of one table that name the same ``pointer`` share their row pointer.
    """

    name: str
    kind: str
    long_name: str
    dtype: str = "u1"
    unit: str = ""
    pointer: str = ""
    width: int = 0
    raw: bool = False


def _key(name: str, long_name: str) -> Column:
    return Column(name, "key", long_name, dtype="<u8")


def _scalar(name: str, dtype: str, long_name: str, unit: str = "") -> Column:
    return Column(name, "scalar", long_name, dtype=dtype, unit=unit)


def _category(name: str, long_name: str) -> Column:
    return Column(name, "category", long_name, dtype="<u4")


def _string(name: str, long_name: str) -> Column:
    return Column(name, "string", long_name, pointer=name)


def _series(
    name: str, dtype: str, long_name: str, unit: str = "", pointer: str = "step", width: int = 0
) -> Column:
    return Column(name, "ragged", long_name, dtype, unit, pointer, width, raw=width == 3)


def _atoms(name: str, dtype: str, long_name: str, unit: str = "", width: int = 0) -> Column:
    return Column(name, "ragged", long_name, dtype, unit, "atom", width, raw=width == 3)


@dataclass(frozen=True, slots=True)
class TableSchema:
    """One table: its name and its columns, the first of which is the row's key."""

    name: str
    description: str
    columns: tuple[Column, ...]

    def column(self, name: str) -> Column:
        """Return the column of that name; ``KeyError`` when there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)


TABLES: dict[str, TableSchema] = {
    table.name: table
    for table in (
        TableSchema(
            "molecules",
            "One row per distinct molecule of the campaign.",
            (
                _key(
                    "key", "molecule: SHA-256 of canonical SMILES, elements, charge, multiplicity"
                ),
                _string("smiles", "canonical isomeric SMILES"),
                _string("name", "name given in the molecule file"),
                _string("formula", "molecular formula, Hill order"),
                _category("source", "file the molecule was first read from"),
                _scalar("line", "<i8", "line (or record) in that file, from 1"),
                _scalar("n_atoms", "<u2", "number of atoms, hydrogens included"),
                _scalar("n_heavy", "<u2", "number of atoms that are not hydrogen"),
                _scalar("charge", "i1", "total charge", "e"),
                _scalar("multiplicity", "u1", "spin multiplicity 2S+1"),
                _atoms("numbers", "u1", "atomic numbers"),
            ),
        ),
        TableSchema(
            "geometries",
            "One row per geometry of a cheap step: read from a file, embedded, MMFF-optimised, "
            "or made by a diffusion model.",
            (
                _key("key", "task that made the geometry"),
                _key("mol_key", "molecule"),
                _key("parent_key", "task the step started from (zero: none)"),
                _category("stage", "name of the campaign's stage"),
                _category(
                    "method",
                    "file, ETKDGv3, ETKDGv3 random coordinates, MMFF94, UFF, or a diffusion model",
                ),
                _scalar("conformer", "<u2", "conformer number, from 0"),
                _scalar("energy_eV", "<f8", "force-field energy (NaN where there is none)", "eV"),
                _scalar("initial_energy_eV", "<f8", "force-field energy before", "eV"),
                _scalar("n_steps", "<i4", "optimiser iterations"),
                _atoms("numbers", "u1", "atomic numbers"),
                _atoms("positions", "<f8", "positions", "angstrom", 3),
            ),
        ),
        TableSchema(
            "relaxations",
            "One row per finished relaxation on a level of theory.",
            (
                _key("key", "task of the relaxation"),
                _key("mol_key", "molecule"),
                _key("parent_key", "task whose geometry the relaxation started from"),
                _category("stage", "name of the campaign's stage"),
                _category("level", "level of theory"),
                _category("program", "program and version that gave energies and forces"),
                _category("optimizer", "optimiser"),
                _scalar("conformer", "<u2", "conformer number, from 0"),
                _scalar("n_atoms", "<u2", "number of atoms"),
                _scalar("n_steps", "<i4", "optimiser steps"),
                _scalar("n_evaluations", "<i4", "energy and force evaluations"),
                _scalar("initial_energy_eV", "<f8", "energy of the first frame", "eV"),
                _scalar("final_energy_eV", "<f8", "energy of the relaxed geometry", "eV"),
                _scalar("fmax_eV_per_A", "<f8", "largest atomic force at the end", "eV/angstrom"),
                _scalar(
                    "connectivity_changed", "u1", "1 where bonds at the end differ from the start"
                ),
                _category("ladder", "changed settings that it took (empty: none)"),
                _scalar("cpu_s", "<f8", "CPU time", "s"),
                _scalar("wall_s", "<f8", "wall time", "s"),
                _atoms("numbers", "u1", "atomic numbers"),
                _atoms("positions", "<f8", "relaxed positions", "angstrom", 3),
            ),
        ),
        TableSchema(
            "frames",
            "The path of each relaxation, frame 0 being the starting geometry.",
            (
                _key("key", "task of the relaxation"),
                _key("mol_key", "molecule"),
                Column("energy_eV", "ragged", "energy", "<f8", "eV", "step"),
                Column(
                    "fmax_eV_per_A", "ragged", "largest atomic force", "<f8", "eV/angstrom", "step"
                ),
                Column(
                    "positions",
                    "ragged",
                    "positions, frame after frame",
                    "<f4",
                    "angstrom",
                    "position",
                    3,
                    raw=True,
                ),
                Column(
                    "forces",
                    "ragged",
                    "forces, frame after frame (when saved)",
                    "<f4",
                    "eV/angstrom",
                    "force",
                    3,
                    raw=True,
                ),
            ),
        ),
        TableSchema(
            "paths",
            "The path of each diffusion, frame 0 being the starting geometry.",
            (
                _key("key", "task of the diffusion"),
                _key("mol_key", "molecule"),
                _key("parent_key", "task whose geometry it started from (zero: pure noise)"),
                _category("stage", "name of the campaign's stage"),
                _scalar("conformer", "<u2", "conformer number, from 0"),
                _category("model", "name of the diffusion model"),
                _category("model_digest", "SHA-256 of the model's file"),
                _scalar("n", "<i4", "diffusion steps"),
                _category("protocol", "published, deterministic or generation"),
                _scalar("changed_elements", "<u2", "atoms whose element the model would change"),
                _scalar(
                    "connectivity_changed", "u1", "1 where bonds at the end differ from the start"
                ),
                _series("level", "<i2", "diffusion step n of each frame", pointer="level"),
                _atoms("numbers", "u1", "atomic numbers"),
                _series(
                    "positions", "<f4", "positions, frame after frame", "angstrom", "position", 3
                ),
            ),
        ),
        TableSchema(
            "single_points",
            "Energies along a diffusion path or chain, frame by frame, or of one geometry.",
            (
                _key("key", "task of the single points"),
                _key("mol_key", "molecule"),
                _key("parent_key", "task whose path, chain or geometry was computed"),
                _category("stage", "name of the campaign's stage"),
                _scalar("conformer", "<u2", "conformer number, from 0"),
                _category("level", "level of theory"),
                _category("program", "program and version that gave energies and forces"),
                _scalar("n_atoms", "<u2", "number of atoms"),
                _series(
                    "energy_eV",
                    "<f8",
                    "energy of each frame (NaN: none found, or not asked for)",
                    "eV",
                ),
                _series("fmax_eV_per_A", "<f8", "largest atomic force", "eV/angstrom"),
                _series(
                    "forces",
                    "<f4",
                    "forces, frame after frame (when saved)",
                    "eV/angstrom",
                    "force",
                    3,
                ),
                _series(
                    "line_energy_eV",
                    "<f8",
                    "energies on the straight line between the first and the last of these frames "
                    "(when asked for)",
                    "eV",
                    "line",
                ),
                _scalar("cpu_s", "<f8", "CPU time of all frames together", "s"),
            ),
        ),
        TableSchema(
            "chains",
            "One row per Markov chain, of Metropolis, of a diffusion model, or the reference "
            "without acceptance.",
            (
                _key("key", "chain: its task's key, or one derived from it where a task made more"),
                _key("mol_key", "molecule"),
                _key("parent_key", "task whose geometry the chain started from"),
                _key("task_key", "task that made the chain"),
                _category("stage", "name of the campaign's stage"),
                _scalar("conformer", "<u2", "conformer number, from 0"),
                _category(
                    "kind",
                    "metropolis, diffusion metropolis, replica exchange, gaussian or diffusion",
                ),
                _category("level", "level of theory (empty: none)"),
                _category("program", "program and version that gave energies (empty: none)"),
                _category("model", "name of the diffusion model (empty: none)"),
                _category("model_digest", "SHA-256 of the model's file (empty: none)"),
                _scalar("temperature_K", "<f8", "temperature (NaN where there is none)", "K"),
                _scalar("n", "<i4", "diffusion step n of each move (0: none)"),
                _scalar("repeat", "<u2", "number of the repetition, from 0"),
                _scalar("n_atoms", "<u2", "number of atoms"),
                _scalar("n_steps", "<i8", "steps made; fewer than asked for where it diverged"),
                _scalar("burn_in", "<i8", "steps of them at the start that count for nothing"),
                _scalar("save_every", "<i4", "steps between two stored frames"),
                _scalar(
                    "step_size_A",
                    "<f8",
                    "standard deviation of each coordinate's move (NaN: the model's)",
                    "angstrom",
                ),
                _scalar(
                    "acceptance", "<f8", "share of moves taken after the burn-in (NaN: none)", "1"
                ),
                _scalar(
                    "swap_acceptance",
                    "<f8",
                    "share of swaps with the next higher temperature that were taken (NaN: none)",
                    "1",
                ),
                _scalar("n_evaluations", "<i8", "energy evaluations"),
                _scalar("diverged", "u1", "1 where the chain ended because it diverged"),
                _string("divergence", "why (empty: it did not)"),
                _series(
                    "energy_eV",
                    "<f8",
                    "energy after every step, of the start first (a diffusion chain's are in "
                    "single_points)",
                    "eV",
                ),
                _atoms("numbers", "u1", "atomic numbers"),
                _series(
                    "positions",
                    "<f4",
                    "positions at steps 0, save_every, 2 save_every ..., frame after frame",
                    "angstrom",
                    "position",
                    3,
                ),
                _scalar("cpu_s", "<f8", "CPU time", "s"),
                _scalar("wall_s", "<f8", "wall time", "s"),
            ),
        ),
        TableSchema(
            "exchanges",
            "One row per chain of a replica exchange: how it swapped with the next temperature.",
            (
                _key("key", "the chain's key"),
                _key("mol_key", "molecule"),
                _key("parent_key", "task whose geometry the chains started from"),
                _key("task_key", "task that made all chains of the ladder"),
                _category("stage", "name of the campaign's stage"),
                _scalar("conformer", "<u2", "conformer number, from 0"),
                _scalar("temperature_K", "<f8", "temperature", "K"),
                _scalar(
                    "next_temperature_K",
                    "<f8",
                    "the next higher one of the ladder (NaN: none)",
                    "K",
                ),
                _scalar("swaps_tried", "<i8", "swaps with it that were tried after the burn-in"),
                _scalar("swaps_accepted", "<i8", "swaps of them that were taken"),
                _scalar(
                    "round_trips",
                    "<i8",
                    "ways from the lowest temperature to the highest and back, of the walker that "
                    "began here (burn-in included)",
                ),
                _scalar("n_processes", "<i4", "processes that computed the ladder (at last)"),
                _scalar(
                    "efficiency",
                    "<f8",
                    "share of the time of all these processes that was spent in energies",
                    "1",
                ),
            ),
        ),
        TableSchema(
            "generations",
            "How each molecule made from noise settled, diffusion step by diffusion step.",
            (
                _key("key", "task of the generation"),
                _key("mol_key", "molecule"),
                _category("stage", "name of the campaign's stage"),
                _category("model", "name of the diffusion model"),
                _scalar("n_atoms", "<u2", "number of atoms"),
                _series("level", "<i2", "diffusion step n of each frame"),
                _series(
                    "step_length_A", "<f4", "mean move of an atom in the step to it", "angstrom"
                ),
                _series(
                    "bond_deviation_A",
                    "<f4",
                    "mean difference from their final distance, of the pairs bonded at the end",
                    "angstrom",
                ),
                _series(
                    "elements_final", "<f4", "share of atoms whose element is the final one", "1"
                ),
                _series("all_elements_final", "u1", "1 where all atoms have their final element"),
                _series(
                    "bonds_final", "<f4", "share of atoms with as many bonds as at the end", "1"
                ),
                _series("all_bonds_final", "u1", "1 where all atoms have as many as at the end"),
                _series("valid_bonds", "<f4", "share of atoms with a usual number of bonds", "1"),
            ),
        ),
        TableSchema(
            "tasks",
            "One row per finished task, whatever became of it.",
            (
                _key("key", "SHA-256 of what determines the result, first 16 bytes"),
                _key("mol_key", "molecule (zero: none, the input could not be read)"),
                _key("parent_key", "task it started from (zero: none)"),
                _category("stage", "name of the campaign's stage"),
                _category("kernel", "kernel, its version and its programs' versions"),
                _category("status", "ok, or the class of the failure"),
                _string("message", "what went wrong (empty: nothing)"),
                _scalar("attempts", "u1", "how often it was started"),
                _category("ladder", "changed settings that were tried, in order"),
                _scalar("conformer", "<u2", "conformer number, from 0"),
                _scalar("seed", "<u8", "seed of the random stream, derived from the key"),
                _category("source", "molecule file (rows of stage `molecules` only)"),
                _scalar(
                    "line", "<i8", "line in that file (rows of stage `molecules` only; else -1)"
                ),
                _category("host", "machine it ran on"),
                _category("block", "batch job it ran in"),
                _scalar("worker_pid", "<i4", "process that ran it"),
                _scalar("started_s", "<f8", "start, Unix time", "s"),
                _scalar("wall_s", "<f8", "wall time", "s"),
                _scalar("cpu_s", "<f8", "CPU time of the kernel", "s"),
            ),
        ),
    )
}
