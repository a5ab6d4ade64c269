"""A first three-dimensional geometry from a molecular graph: ETKDGv3 distance geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.errors import EmbedError, InputError
from kernels.graph import rdkit_molecule

VERSION = 1

# RDKit takes a C int and reads -1 as "not reproducible".
_SEED_RANGE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Embedding:
    """A conformer: `numbers` (N,) uint8, `positions` (N, 3) in Å.

    `random_coords` says that the usual start failed and random coordinates were used.
    """

    numbers: NDArray[np.uint8]
    positions: NDArray[np.float64]
    random_coords: bool


def embed(smiles: str, *, seed: int, max_attempts: int) -> Embedding:
    """Embed a molecule by ETKDGv3 (Wang et al., J. Chem. Inf. Model. 2020, 60, 2044).

    The same canonical SMILES, `seed` (any non-negative integer) and `max_attempts` give the same
    positions to the last bit. When `max_attempts` tries fail, as many follow from random
    coordinates. Raises EmbedError when those fail too, InputError for a bad SMILES or setting.
    """
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDistGeom

    if seed < 0:
        raise InputError(f"seed {seed} is negative; give 0 or more")
    if max_attempts < 1:
        raise InputError(f"max_attempts {max_attempts} is impossible; give 1 or more")
    mol = Chem.Mol(rdkit_molecule(smiles))
    # RDKit's stubs give every setting the type of the whole.
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = seed % _SEED_RANGE
    parameters.maxIterations = max_attempts
    parameters.numThreads = 1
    parameters.trackFailures = True
    for random_coords in (False, True):
        parameters.useRandomCoords = random_coords
        with rdBase.BlockLogs(), rdBase.CaptureErrorLog() as log:
            try:
                conformer_id = rdDistGeom.EmbedMolecule(mol, parameters)
            except (ValueError, RuntimeError) as error:
                reason = (log.messages or str(error)).strip().splitlines()[0]
                raise EmbedError(f"embedding {smiles!r}: RDKit stopped: {reason}") from error
        if conformer_id >= 0:
            positions = np.array(mol.GetConformer(conformer_id).GetPositions(), dtype=np.float64)
            if np.isfinite(positions).all():
                numbers = np.array([a.GetAtomicNum() for a in mol.GetAtoms()], dtype=np.uint8)
                return Embedding(numbers, positions, random_coords)
    raise EmbedError(
        f"embedding {smiles!r}: no geometry in 2 x {max_attempts} attempts with seed {seed}"
        f"{_main_obstacle(parameters)}; raise max_attempts or give a geometry"
    )


def _main_obstacle(parameters: Any) -> str:
    from rdkit.Chem import rdDistGeom

    counts = list(parameters.GetFailureCounts())
    if not any(counts):
        return ""
    worst = int(np.argmax(counts))
    name = rdDistGeom.EmbedFailureCauses.values.get(worst)
    return f" (most often: {str(name).replace('_', ' ').lower()})"
