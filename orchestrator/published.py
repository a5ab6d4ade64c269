"""What the study that a campaign repeats has published, to be shown beside what was found.

Rothchild et al., Chem. Sci. 2024, 15, 13506; Rothchild, UCB/EECS-2023-222. QM9 is there at
B3LYP/6-31G(2df,p), GEOM-DRUGS at GFN2-xTB. Energies are in kcal/mol.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class Published:
    """The study's numbers on one set of molecules.

    ``step_reduction``: median share of relaxation steps saved, by the number n of diffusion steps
    (None: n not told apart). ``mmff`` and ``diffused``: mean energy above the relaxed minimum of
    the MMFF geometry and of the diffused one. ``training``: median share of steps saved after so
    many epochs. ``factors``: 25th and 75th percentile of how many times faster, in words.
    """

    where: str
    mmff: float
    diffused: float
    step_reduction: dict[int | None, float]
    training: dict[int, float] = field(default_factory=dict)
    factors: str = ""

    def reduction(self, n: int | None) -> float | None:
        """Return the published median step reduction for n diffusion steps, if there is one."""
        if n is None:
            return None
        return self.step_reduction.get(n, self.step_reduction.get(None))

    @property
    def ratio(self) -> float:
        """How many times lower diffusion starts than MMFF."""
        return self.mmff / self.diffused


QM9: Final = Published(
    where="QM9, DFT",
    mmff=10.0,
    diffused=1.0,
    step_reduction={20: 0.40, 50: 0.57},
    training={50: 0.0, 100: 0.04},
    factors="nearly 2x to at least 4x",
)
DRUGS: Final = Published(
    where="DRUGS, GFN2-xTB", mmff=14.3, diffused=8.3, step_reduction={None: 0.07}
)

# The diffusion steps from which on all elements are final, in generation.
ELEMENTS_FINAL: Final = 50


def nearest(files: Iterable[str], models: Iterable[str]) -> Published:
    """Return the published set nearest to a campaign, from its molecule files and its models."""
    paths = [Path(file) for file in files]
    # GEOM's own files lie in a folder of that name.
    drugs = bool(paths) and all("drug" in f"{p.parent.name}/{p.name}".lower() for p in paths)
    return DRUGS if drugs or any("drug" in model.lower() for model in models) else QM9


# Temperature in K and diffusion step n whose chains have the same energy distributions.
MATCHED: Final = ((20.0, 4), (70.0, 14), (120.0, 20), (300.0, 30))
# K: the factor of T = mu n² nearest to those pairs, by least squares.
MU: Final = sum(t * n**2 for t, n in MATCHED) / sum(n**4 for _, n in MATCHED)
