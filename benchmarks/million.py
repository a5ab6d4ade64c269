"""A million distinct molecules: two-fold substituted heterocycles, enumerated, nothing downloaded.

    python -m benchmarks.million TARGET.smi [COUNT]

No scaffold has a symmetry that exchanges its two places, no substituent holds a ring, and all
substituents differ; so two molecules of the list are never the same. They have 7 to 30 heavy
atoms and are written as they are put together, not canonically.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

SCAFFOLDS = (
    "n1c({a})cc({b})cc1",
    "n1c({a})c({b})ccc1",
    "n1c({a})ccc({b})c1",
    "n1cc({a})c({b})cc1",
    "n1c({a})nc({b})cc1",
    "n1cnc({a})c({b})c1",
    "n1nc({a})c({b})cc1",
    "n1nc({a})cc({b})c1",
    "o1c({a})c({b})cc1",
    "o1c({a})cc({b})c1",
    "s1c({a})c({b})cc1",
    "s1c({a})cc({b})c1",
    "o1c({a})nc({b})c1",
    "o1c({a})ncc1{b}",
    "s1c({a})nc({b})c1",
    "s1c({a})ncc1{b}",
    "o1nc({a})cc1{b}",
    "s1nc({a})cc1{b}",
    "n1(C)c({a})nc({b})c1",
    "n1(C)nc({a})cc1{b}",
    "c1cc2nc({a})cc({b})c2cc1",
    "c1cc2c({a})ncc({b})c2cc1",
    "c1cc2oc({a})c({b})c2cc1",
    "c1cc2sc({a})c({b})c2cc1",
    "c1cc2n(C)c({a})c({b})c2cc1",
)
_LINKS = (
    "", "C", "CC", "CCC", "CCCC", "C(C)", "CC(C)", "OCC", "OCCC", "NCC", "NCCC", "SCC",
    "C(=O)NCC", "CN(C)CC", "COCC",
)  # fmt: skip
_ENDS = (
    "C", "F", "Cl", "O", "N", "C#N", "C=C", "C#C", "C(N)=O", "C(=O)O", "C(F)(F)F",
    "S(C)(=O)=O", "C(=O)OC", "OC", "N(C)C", "C(C)C", "C(C)(C)C", "NC(C)=O",
)  # fmt: skip
SUBSTITUENTS = 200


def substituents() -> list[str]:
    """Return different groups without rings, as they follow the atom that they are bound to."""
    from rdkit import Chem

    found: dict[str, str] = {}
    for end, link in itertools.product(_ENDS, _LINKS):
        key = Chem.MolToSmiles(Chem.MolFromSmiles(f"*{link}{end}"))
        found.setdefault(key, link + end)
    return list(found.values())[:SUBSTITUENTS]


def molecules() -> Iterator[str]:
    """Yield the SMILES, scaffolds and sizes mixed."""
    groups = substituents()
    for b, a, scaffold in itertools.product(groups, groups, SCAFFOLDS):
        yield scaffold.format(a=a, b=b)


def write(path: Path, count: int) -> None:
    """Write the first ``count`` molecules, each with a name."""
    with path.open("w") as file:
        for number, smiles in enumerate(itertools.islice(molecules(), count), start=1):
            file.write(f"{smiles} m{number:07d}\n")


def main() -> None:
    """Write the list."""
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)


if __name__ == "__main__":
    main()
