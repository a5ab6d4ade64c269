"""Molecular graphs: from text or a geometry to a canonical SMILES and its order of atoms.

The order of atoms is fixed once, here: that of `Chem.AddHs(Chem.MolFromSmiles(smiles))` for the
canonical isomeric SMILES. Every geometry of a molecule follows it, whatever file it came from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kernels.errors import InputError

if TYPE_CHECKING:
    from rdkit import Chem

# RDKit's canonical SMILES of its own canonical SMILES differs now and then; it settles quickly.
_CANONICAL_ROUNDS = 5

# Bond perception tries bond-order assignments one after another; beyond this many it gives up.
_PERCEPTION_ITERATIONS = 100_000

_HEAVIEST_ELEMENT = 118

# Bonds that atoms have, where they have no charge; those that can have more are left out.
_VALENCES = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}

# Brackets in a flexible molecule's SMILES.
MOST_BRANCHES = 15


@dataclass(frozen=True, slots=True)
class Molecule:
    """A molecule as a graph with explicit hydrogens.

    `smiles` is the canonical isomeric SMILES, "" when only a geometry is known; `numbers` (N,)
    uint8 the atomic numbers; `formula` in Hill order, without the charge.
    """

    smiles: str
    numbers: NDArray[np.uint8]
    charge: int
    multiplicity: int
    formula: str
    n_heavy: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Molecule):
            return NotImplemented
        return (
            self.smiles == other.smiles
            and self.charge == other.charge
            and self.multiplicity == other.multiplicity
            and np.array_equal(self.numbers, other.numbers)
        )

    def __hash__(self) -> int:
        return hash((self.smiles, self.charge, self.multiplicity, self.numbers.tobytes()))


def parse_smiles(text: str) -> Molecule:
    """Read one SMILES into a canonical molecule.

    Raises InputError, with RDKit's own message, for empty text, a syntax or valence error, and
    dummy atoms. Atom-map numbers are dropped: they name atoms and do not change the molecule.
    """
    smiles = text.strip()
    if not smiles:
        raise InputError("SMILES is empty; give one molecule")
    if len(smiles.split()) > 1:
        # RDKit would read the first word and take the rest for a name, without a sign.
        raise InputError(f"SMILES {_short(smiles)!r}: contains blanks; give the SMILES alone")
    if "\0" in smiles:
        raise InputError("SMILES contains a NUL character; the file is not text")
    mol = _mol_from_smiles(smiles)
    if ":" in smiles:
        for atom in mol.GetAtoms():
            atom.SetAtomMapNum(0)
    canonical, mol = _settled(smiles, mol)
    if "*" in canonical:
        _refuse_dummies(_mol_from_smiles(smiles), f"SMILES {_short(smiles)!r}")
    return _molecule(canonical, mol)


def is_flexible(smiles: str) -> bool:
    """Whether a molecule is flexible as Rothchild et al. (2024) chose theirs.

    No double or triple bond, no ring, and at most 15 opening brackets in the SMILES. That number is
    read here as of the SMILES with all hydrogens written as atoms, as in "[H]OC([H])([H])[H]": no
    molecule of QM9 has as many brackets without them. False where there is no SMILES, and for a
    radical or carbene.
    """
    if not smiles:
        return False
    from rdkit import Chem

    mol = rdkit_molecule(smiles)
    if any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
        return False
    written = re.sub(r"\[[^]]*\]", "X", Chem.MolToSmiles(mol))
    return not re.search(r"[=#\d%:]", written) and written.count("(") <= MOST_BRANCHES


def may_be_flexible(numbers: ArrayLike) -> bool:
    """Whether atoms (N,), padded with zeros, can make a molecule that `is_flexible`, if neutral.

    Too few hydrogens for the others' valences mean a ring or a multiple bond. Quick, for files
    whose bonds are not known yet.
    """
    z = np.asarray(numbers)
    z = z[z > 0]
    if not np.isin(z, list(_VALENCES)).all():
        return True
    rings_and_bonds = 1 + sum(_VALENCES[int(number)] - 2 for number in z) / 2
    return rings_and_bonds <= 0


def from_rdkit(mol: Chem.Mol) -> tuple[Molecule, NDArray[np.float64]]:
    """Read an RDKit molecule that carries a 3D conformer.

    Returns the molecule and its positions (N, 3) in Å, reordered into the canonical order.
    Hydrogens the file left out are added with coordinates. Raises InputError when there is no
    three-dimensional geometry or the molecule cannot be sanitised.
    """
    from rdkit import Chem, rdBase

    if mol is None or mol.GetNumAtoms() == 0:
        raise InputError("record has no atoms; give a molecule")
    if mol.GetNumConformers() == 0:
        raise InputError("record has no coordinates; give a 3D structure")
    conformer = mol.GetConformer()
    xyz = np.asarray(conformer.GetPositions(), dtype=np.float64)
    if not np.isfinite(xyz).all():
        raise InputError("record has a NaN or infinite coordinate; repair the structure")
    if len(xyz) > 1 and not conformer.Is3D() and not xyz[:, 2].any():
        raise InputError(
            "record has flat (2D) coordinates; give a 3D structure, or the SMILES and an "
            "embed stage"
        )
    _refuse_dummies(mol, "record")
    with rdBase.BlockLogs(), rdBase.CaptureErrorLog() as log:
        try:
            full = Chem.Mol(mol)
            full.GetConformer().Set3D(True)
            for atom in full.GetAtoms():
                atom.SetAtomMapNum(0)
            Chem.SanitizeMol(full)
            full = Chem.AddHs(full, addCoords=True)
            Chem.AssignStereochemistryFrom3D(full)
            return _in_canonical_order(full)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"record: {_rdkit_message(log.messages) or error}") from error


def from_geometry(
    numbers: ArrayLike,
    positions: ArrayLike,
    *,
    charge: int = 0,
    multiplicity: int | None = None,
) -> tuple[Molecule, NDArray[np.float64]]:
    """Perceive the bonds of a bare geometry: numbers (N,), positions (N, 3) in Å.

    Returns the molecule and its positions (N, 3). When perception succeeds they are in the
    canonical order; when it fails `smiles` is "" and the given order is kept. `multiplicity`
    None means the lowest the electron count allows. Raises InputError for impossible input.
    """
    z = np.asarray(numbers)
    xyz = np.asarray(positions, dtype=np.float64)
    if z.ndim != 1 or z.size == 0:
        raise InputError(f"numbers have shape {z.shape}; give one atomic number per atom")
    if xyz.shape != (z.size, 3):
        raise InputError(f"positions have shape {xyz.shape}; expected ({z.size}, 3)")
    if not np.isfinite(xyz).all():
        raise InputError("positions contain NaN or infinity; repair the geometry")
    if z.min() < 1 or z.max() > _HEAVIEST_ELEMENT:
        bad = z[(z < 1) | (z > _HEAVIEST_ELEMENT)][0]
        raise InputError(f"atomic number {bad} is not an element; give 1 to {_HEAVIEST_ELEMENT}")
    z = z.astype(np.uint8)
    if multiplicity is None:
        multiplicity = _lowest_multiplicity(int(z.sum(dtype=np.int64)) - charge, 0)
    check_spin(z, charge, multiplicity)
    perceived = _perceive(z, xyz, charge)
    if perceived is not None:
        molecule, ordered = perceived
        return (
            Molecule(
                molecule.smiles,
                molecule.numbers,
                charge,
                multiplicity,
                molecule.formula,
                molecule.n_heavy,
            ),
            ordered,
        )
    bare = Molecule("", z, charge, multiplicity, _hill(z.tolist()), int((z > 1).sum()))
    return bare, xyz.copy()


def check_spin(numbers: NDArray[Any], charge: int, multiplicity: int) -> None:
    """Raise InputError unless `multiplicity` is possible for this electron count."""
    electrons = int(np.asarray(numbers, dtype=np.int64).sum()) - charge
    if electrons < 0:
        raise InputError(
            f"charge {charge:+d} leaves {electrons} electrons; give a charge of at most "
            f"{electrons + charge:+d}"
        )
    if multiplicity < 1:
        raise InputError(f"multiplicity {multiplicity} is impossible; give 1 or more")
    unpaired = multiplicity - 1
    if unpaired > electrons or (electrons - unpaired) % 2:
        possible = "odd" if electrons % 2 == 0 else "even"
        raise InputError(
            f"multiplicity {multiplicity} is impossible with {electrons} electrons "
            f"(charge {charge:+d}); give an {possible} one of at most {electrons + 1}"
        )


@lru_cache(maxsize=64)
def rdkit_molecule(smiles: str) -> Chem.Mol:
    """Build the RDKit molecule with explicit hydrogens, atoms in the canonical order.

    The object is shared between callers: copy it before adding a conformer. Raises InputError.
    """
    from rdkit import Chem

    return Chem.AddHs(_mol_from_smiles(smiles))


# Kinds of bonds in a matrix of bond orders; 0 stands for none.
_BOND_ORDERS: Mapping[str, int] = {"SINGLE": 1, "DOUBLE": 2, "TRIPLE": 3, "AROMATIC": 4}
_OTHER_BOND = 5


def bond_orders(smiles: str) -> NDArray[np.int64]:
    """Bond orders (N, N) of a molecule in the canonical order of its atoms.

    0 none, 1 single, 2 double, 3 triple, 4 aromatic, 5 any other.
    """
    molecule = rdkit_molecule(smiles)
    n_atoms = molecule.GetNumAtoms()
    orders = np.zeros((n_atoms, n_atoms), np.int64)
    for bond in molecule.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        orders[i, j] = orders[j, i] = _BOND_ORDERS.get(str(bond.GetBondType()), _OTHER_BOND)
    return orders


def skeleton(smiles: str) -> str:
    """Name what a molecule shares with its stereoisomers and tautomers: InChIKey's first block."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        key: str = Chem.MolToInchiKey(_mol_from_smiles(smiles))  # type: ignore[no-untyped-call]
    return key.split("-")[0]


def _mol_from_smiles(smiles: str) -> Chem.Mol:
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs(), rdBase.CaptureErrorLog() as log:
        mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        reason = _rdkit_message(log.messages) or "RDKit cannot read it"
        raise InputError(f"SMILES {_short(smiles)!r}: {reason}; correct the SMILES")
    if mol.GetNumAtoms() == 0:
        raise InputError(f"SMILES {_short(smiles)!r} has no atoms; give one molecule")
    return mol


def _molecule(canonical: str, mol: Chem.Mol) -> Molecule:
    """Describe the molecule of a canonical SMILES, parsed with or without explicit hydrogens."""
    from rdkit import Chem

    numbers = _numbers(canonical, mol)
    charge = Chem.GetFormalCharge(mol)
    radicals = 0
    if "[" in canonical:  # outside of brackets hydrogens fill every valence
        radicals = sum(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())
    if sum(numbers) < charge:
        raise InputError(
            f"SMILES {_short(canonical)!r}: charge {charge:+d} exceeds its electrons; "
            "correct the charge"
        )
    # Made of bytes it is read-only: a change in one place must not reach others that share it.
    shared = np.frombuffer(bytes(numbers), np.uint8)
    return Molecule(
        smiles=canonical,
        numbers=shared,
        charge=charge,
        multiplicity=_lowest_multiplicity(sum(numbers) - charge, radicals),
        formula=_hill(numbers),
        n_heavy=len(numbers) - numbers.count(1),
    )


_ATOM = re.compile(r"\[\d*([A-Z][a-z]?|[a-z]{1,2})[^\]]*\]|(Br|Cl|[BCNOFPSIbcnops])")


def _numbers(canonical: str, mol: Chem.Mol) -> list[int]:
    """Atomic numbers in the order of a canonical SMILES, implicit hydrogens last."""
    explicit: int = mol.GetNumAtoms()
    symbols = _symbols()
    # Read from the text, since asking every atom takes as long as parsing the molecule does.
    found = [symbols.get((a or b).capitalize(), 0) for a, b in _ATOM.findall(canonical)]
    if len(found) != explicit or 0 in found:
        found = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    return found + [1] * (mol.GetNumAtoms(onlyExplicit=False) - explicit)


@lru_cache(maxsize=1)
def _symbols() -> dict[str, int]:
    """Atomic numbers by element symbol."""
    from rdkit import Chem

    table = Chem.GetPeriodicTable()
    return {table.GetElementSymbol(number): number for number in range(1, _HEAVIEST_ELEMENT + 1)}


def _lowest_multiplicity(electrons: int, radicals: int) -> int:
    if radicals and (electrons - radicals) % 2 == 0 and radicals <= electrons:
        return radicals + 1
    return 1 if electrons % 2 == 0 else 2


def _settled(smiles: str, mol: Chem.Mol) -> tuple[str, Chem.Mol]:
    """Return the settled canonical SMILES of a molecule parsed from ``smiles``, and its parse."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        canonical = Chem.MolToSmiles(mol)
        for _ in range(_CANONICAL_ROUNDS):
            if canonical == smiles:
                break
            smiles = canonical
            mol = _mol_from_smiles(smiles)
            canonical = Chem.MolToSmiles(mol)
        else:
            mol = _mol_from_smiles(canonical)
    return canonical, mol


def _canonical_smiles(mol: Chem.Mol) -> tuple[str, list[int]]:
    """Return the settled canonical SMILES and, per atom of it, the index in `mol`."""
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        smiles = Chem.MolToSmiles(mol)
        order = _output_order(mol)
        for _ in range(_CANONICAL_ROUNDS):
            again = _mol_from_smiles(smiles)
            settled = Chem.MolToSmiles(again)
            if settled == smiles:
                break
            order = [order[i] for i in _output_order(again)]
            smiles = settled
    return smiles, order


def _output_order(mol: Chem.Mol) -> list[int]:
    # Set by MolToSmiles: the k-th atom written was atom order[k] of the molecule.
    return list(mol.GetPropsAsDict(True, True)["_smilesAtomOutputOrder"])


def _in_canonical_order(full: Chem.Mol) -> tuple[Molecule, NDArray[np.float64]]:
    """Reorder a molecule with explicit H and a conformer into the canonical order."""
    from rdkit import Chem

    xyz = np.asarray(full.GetConformer().GetPositions(), dtype=np.float64)
    for atom in full.GetAtoms():
        atom.SetIntProp("_given_index", atom.GetIdx())
    skeleton = Chem.RemoveHs(full)
    given = [atom.GetIntProp("_given_index") for atom in skeleton.GetAtoms()]
    smiles, order = _canonical_smiles(skeleton)
    reference = rdkit_molecule(smiles)
    permutation = [given[i] for i in order]
    written = set(permutation)
    for heavy in list(permutation):
        permutation += [
            neighbour.GetIdx()
            for neighbour in full.GetAtomWithIdx(heavy).GetNeighbors()
            if neighbour.GetAtomicNum() == 1 and neighbour.GetIdx() not in written
        ]
    if not _same_graph(reference, full, permutation):
        # A hydrogen that RemoveHs keeps but the SMILES parser folds away, or the reverse.
        permutation = list(full.GetSubstructMatch(reference, useChirality=True))
        if not _same_graph(reference, full, permutation):
            raise ValueError(f"its atoms do not match those of its SMILES {smiles!r}")
    return _molecule(smiles, reference), xyz[permutation]


def _same_graph(reference: Chem.Mol, mol: Chem.Mol, permutation: list[int]) -> bool:
    n_atoms = reference.GetNumAtoms()
    if sorted(permutation) != list(range(mol.GetNumAtoms())) or len(permutation) != n_atoms:
        return False
    if any(
        atom.GetAtomicNum() != mol.GetAtomWithIdx(permutation[atom.GetIdx()]).GetAtomicNum()
        for atom in reference.GetAtoms()
    ):
        return False
    return reference.GetNumBonds() == mol.GetNumBonds() and all(
        mol.GetBondBetweenAtoms(
            permutation[bond.GetBeginAtomIdx()], permutation[bond.GetEndAtomIdx()]
        )
        is not None
        for bond in reference.GetBonds()
    )


def _perceive(
    numbers: NDArray[np.uint8], positions: NDArray[np.float64], charge: int
) -> tuple[Molecule, NDArray[np.float64]] | None:
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdDetermineBonds

    with rdBase.BlockLogs():
        editable = Chem.RWMol()
        for number in numbers:
            atom = Chem.Atom(int(number))
            atom.SetNoImplicit(True)
            editable.AddAtom(atom)
        conformer = Chem.Conformer(len(numbers))
        conformer.SetPositions(np.ascontiguousarray(positions))
        conformer.Set3D(True)
        editable.AddConformer(conformer)
        skeleton = editable.GetMol()
        odd = bool((int(numbers.sum(dtype=np.int64)) - charge) % 2)
        try:
            rdDetermineBonds.DetermineConnectivity(skeleton)
            # Bond orders depend on the order of atoms; this one depends on the molecule alone.
            skeleton.UpdatePropertyCache(strict=False)
            ranks = list(Chem.CanonicalRankAtoms(skeleton))
            skeleton = Chem.RenumberAtoms(skeleton, [int(i) for i in np.argsort(ranks)])
        except (ValueError, RuntimeError):
            return None
        readings = []
        # An odd electron read with charges allowed would come out as a false pair of charges.
        for charged in (False,) if odd else (True, False):
            mol = Chem.Mol(skeleton)
            try:
                rdDetermineBonds.DetermineBondOrders(
                    mol,
                    charge=charge,
                    allowChargedFragments=charged,
                    maxIterations=_PERCEPTION_ITERATIONS,
                )
                Chem.SanitizeMol(mol)
            except (ValueError, RuntimeError):
                continue
            if _plausible(mol, charge, odd):
                readings.append((sum(abs(a.GetFormalCharge()) for a in mol.GetAtoms()), mol))
        if not readings:
            return None
        _, best = min(readings, key=lambda reading: reading[0])
        try:
            Chem.AssignStereochemistryFrom3D(best)
            return _in_canonical_order(best)
        except (ValueError, RuntimeError, InputError):
            return None


def _plausible(mol: Chem.Mol, charge: int, odd: bool) -> bool:
    """Tell a reading a chemist would write from one that only balances valences."""
    atoms = list(mol.GetAtoms())
    if sum(atom.GetFormalCharge() for atom in atoms) != charge:
        return False
    if sum(atom.GetNumRadicalElectrons() for atom in atoms) != int(odd):
        return False
    for atom in atoms:
        # [S+]= in place of a thiophene's or thioether's S, paired with some [O-] far away.
        if charge <= 0 and atom.GetFormalCharge() > 0 and atom.GetAtomicNum() in (8, 16, 34):
            orders = [bond.GetBondTypeAsDouble() for bond in atom.GetBonds()]
            if len(orders) < 3 and max(orders, default=0.0) == 2.0:
                return False
        # N([O-])[O-] in place of a nitro group.
        if atom.GetAtomicNum() == 7:
            oxides = [n for n in atom.GetNeighbors() if n.GetFormalCharge() == -1]
            if len(oxides) > 1:
                return False
    return True


def _refuse_dummies(mol: Chem.Mol, what: str) -> None:
    for atom in mol.GetAtoms():
        if atom.GetAtomicNum() == 0:
            raise InputError(
                f"{what}: atom {atom.GetIdx() + 1} ({atom.GetSymbol()!r}) is not an element; "
                "replace it by a real atom"
            )


def _hill(numbers: Sequence[int]) -> str:
    names = list(_symbols())
    counts = {names[number - 1]: n for number, n in Counter(numbers).items()}
    first = [symbol for symbol in ("C", "H") if symbol in counts] if "C" in counts else []
    symbols = first + sorted(symbol for symbol in counts if symbol not in first)
    return "".join(f"{symbol}{counts[symbol] if counts[symbol] > 1 else ''}" for symbol in symbols)


def _rdkit_message(messages: str) -> str:
    """Reduce RDKit's log to one line without time stamp or echo of the input."""
    lines = [line.split("] ", 1)[-1].strip() for line in messages.splitlines()]
    lines = [line.removeprefix("SMILES Parse Error: ") for line in lines if line]
    if not lines:
        return ""
    for line in lines:
        if line.startswith("check for mistakes around "):
            place = line.removeprefix("check for mistakes around ").rstrip(":")
            return f"syntax error around {place}"
    return _short(lines[0].split(" while parsing:")[0].split(" for input:")[0])


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
