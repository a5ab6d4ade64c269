"""Molecules from files: SMILES lists, CSV tables, SD files, (extended) XYZ, and NumPy archives.

Text files may be gzipped; they are read as streams, one record at a time, so that their size does
not matter. An archive is in memory as a whole. A record that cannot be read is an entry with an
error, numbered like the others, and the next one is read as if nothing had happened.
"""

from __future__ import annotations

import csv
import difflib
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias

from kernels.errors import InputError, KernelError
from orchestrator.errors import CampaignError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kernels.graph import Molecule
    from orchestrator.campaign import MoleculeSource

    Read: TypeAlias = tuple[Molecule, NDArray[np.float64] | None]

FORMATS: Final = (".smi", ".csv", ".sdf", ".xyz", ".extxyz", ".npz")
GEOMETRY_FORMATS: Final = (".sdf", ".xyz", ".extxyz", ".npz")

_TEXT_KEPT: Final = 500
# Longer than any molecule this is for; canonicalising a runaway line could take hours.
_LONGEST_SMILES: Final = 4_000
_LONGEST_LINE: Final = 1 << 20
_LONGEST_SDF_RECORD: Final = 4 << 20
_LONGEST_CSV_RECORD: Final = 64
_MOST_ATOMS: Final = 10_000
_SMI_HEADERS: Final = frozenset({"smiles", "smi", "canonical_smiles", "isomeric_smiles"})


@dataclass(slots=True)
class Entry:
    """One record of a file: a molecule, or the reason why there is none.

    `line` is the line of a .smi or .csv record and the record number of the other formats, both
    from 1. `text` is the raw record, cut to 500 characters. `positions` (N, 3) in Å, in the
    molecule's order of atoms, or None where the file has no three-dimensional geometry. Exactly
    one of `molecule` and `error` is set.
    """

    source: str
    line: int
    text: str
    name: str
    molecule: Molecule | None
    positions: NDArray[np.float64] | None
    error: KernelError | None


@dataclass(slots=True)
class Record:
    """One record as it stands in its file, told from its neighbours but not yet understood.

    Can be sent to another process. `read` makes the molecule of it, or raises KernelError.
    """

    source: str
    line: int
    text: str
    name: str
    read: Callable[[], Read]

    def entry(self) -> Entry:
        """Understand it: a molecule or an error."""
        molecule: Molecule | None = None
        positions: NDArray[np.float64] | None = None
        error: KernelError | None = None
        try:
            molecule, positions = self.read()
        except KernelError as failure:
            error = failure
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as failure:
            # What RDKit's bindings raise when an invariant of theirs breaks on odd input.
            error = InputError(f"cannot be read: {' '.join(str(failure).split())[:_TEXT_KEPT]}")
        return Entry(self.source, self.line, self.text, self.name, molecule, positions, error)


# Files


def file_format(name: str) -> str | None:
    """The format a file name promises, such as ".smi" for "a.SMI.gz"; None if it is unknown."""
    lowered = name.lower().removesuffix(".gz")
    return next((ending for ending in FORMATS if lowered.endswith(ending)), None)


def expand(text: str) -> str:
    """A path with ~ and $VARIABLES replaced; raises ValueError naming a variable that is unset."""
    expanded = os.path.expandvars(os.path.expanduser(text))
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset is not None:
        raise ValueError(f"uses {unset[0]}, which is not set in the environment; set it")
    return expanded


def match_files(pattern: str, base: Path) -> list[Path]:
    """Files that a name or a glob pattern, relative to `base`, stands for; sorted, may be empty."""
    expanded = expand(pattern)
    literal = base / expanded
    if literal.is_file():  # also names that hold a bracket or a star themselves
        return [literal]
    found = glob.glob(expanded, root_dir=base, recursive=True)
    return sorted(base / name for name in found if (base / name).is_file())


def find_files(source: MoleculeSource, base: Path) -> list[Path]:
    """All files of a campaign, sorted and without repeats; patterns are relative to `base`.

    Raises CampaignError when a pattern matches nothing or matches a file of no known format.
    """
    files: dict[Path, Path] = {}
    for pattern in source.files:
        try:
            matched = match_files(pattern, base)
        except ValueError as error:
            raise CampaignError(f'[molecules] files: "{pattern}": {error}') from None
        if not matched:
            raise CampaignError(
                f'[molecules] files: "{pattern}": no such file in {base}{_nearby(pattern, base)}'
            )
        for path in matched:
            if file_format(path.name) is None:
                raise CampaignError(
                    f'[molecules] files: "{pattern}": {path} is of no known format; use '
                    f"{', '.join(FORMATS)}, each also with .gz"
                )
            files.setdefault(path.resolve(), path)
    return sorted(files.values())


def _nearby(pattern: str, base: Path) -> str:
    folder = (base / expand(pattern)).parent
    if glob.has_magic(str(folder)):
        return ""
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and file_format(p.name))
    if not names:
        return f"; {folder} holds no molecule file at all"
    near = difflib.get_close_matches(Path(pattern).name, names, n=3, cutoff=0.4) or names[:5]
    return f"; {folder} holds {', '.join(near)}"


def sources_digest(files: Sequence[Path], source: MoleculeSource) -> str:
    """SHA-256, as hex, of the files' bytes and of the settings that change how they are read.

    Where the files lie does not matter. Raises CampaignError for one that cannot be read.
    """
    digest = hashlib.sha256()
    # Plans made before there were these fields keep their digest.
    new = {name for name in ("samples", "flexible") if not getattr(source, name)}
    settings = source.model_dump(exclude={"files", *new})
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        try:
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise _unreadable(path, error) from None
        digest.update(str(file_format(path.name)).encode() + content)
    return digest.hexdigest()


def _one_by_one(records: Iterator[Record]) -> Iterator[Entry]:
    return (record.entry() for record in records)


def read_entries(
    files: Sequence[Path],
    source: MoleculeSource,
    skip: int = 0,
    *,
    understand: Callable[[Iterator[Record]], Iterator[Entry]] = _one_by_one,
) -> Iterator[Entry]:
    """Every record of every file in order, up to the source's limit, in constant memory.

    The first ``skip`` records are passed over (they count towards the limit), which is quick.
    ``understand`` makes entries of records, in their order; `reading` has one for many cores.
    What would make a whole file useless (unreadable, no such column, UTF-16) raises
    CampaignError at once, before the first record; after that nothing stops the stream.
    Without files: as many records as the source asks for samples, of which nothing is known yet.
    """
    if source.samples is not None:
        return map(_sample, range(skip, source.samples))
    records = read_records(files, source)
    if is_picky(source):
        # Which records belong to a part is known only once they are understood.
        wanted = (entry for entry in understand(records) if _wanted(entry, source))
        return itertools.islice(itertools.islice(wanted, 0, None, source.every), skip, source.limit)
    return understand(itertools.islice(records, skip, source.limit))


def is_picky(source: MoleculeSource) -> bool:
    """Whether only some of the records are taken, by what they hold."""
    some = source.split is not None or bool(source.elements) or source.flexible
    return some or source.every > 1


def read_records(files: Sequence[Path], source: MoleculeSource) -> Iterator[Record]:
    """Every record of every file in order, not yet understood; raises like `read_entries`."""
    for path in files:
        _check_file(path, source)
    return itertools.chain.from_iterable(_read_file(path, source) for path in files)


def _sample(number: int) -> Entry:
    from kernels.graph import Molecule

    nothing: NDArray[np.uint8] = _no_atoms()
    molecule = Molecule("", nothing, charge=0, multiplicity=0, formula="", n_heavy=0)
    return Entry("[molecules] samples", number + 1, "", f"sample {number}", molecule, None, None)


@lru_cache(maxsize=1)
def _no_atoms() -> NDArray[np.uint8]:
    import numpy as np

    return np.zeros(0, np.uint8)


def split_of(name: str) -> str:
    """The part of a data set that a molecule belongs to, by the last whole number in its name.

    n % 10 == 0 is the validation part, n % 10 == 1 the test part, everything else for training.
    A name without a number counts by the CRC-32 of its text.
    """
    numbers = re.findall(r"\d+", name)
    number = int(numbers[-1]) if numbers else zlib.crc32(name.encode())
    return {0: "validation", 1: "test"}.get(number % 10, "training")


def _wanted(entry: Entry, source: MoleculeSource) -> bool:
    """Whether a record is of the part, the elements and the kind asked for; bad ones always are."""
    if entry.molecule is None:
        return True
    if source.split is not None and split_of(entry.name) != source.split:
        return False
    known = _elements()
    allowed = {known[symbol] for symbol in source.elements}
    if allowed and not allowed.issuperset(entry.molecule.numbers.tolist()):
        return False
    if not source.flexible:
        return True
    from kernels.graph import is_flexible

    return is_flexible(entry.molecule.smiles)


def _check_file(path: Path, source: MoleculeSource) -> None:
    if file_format(path.name) == ".npz":
        _open_archive(path)
        return
    with _Lines(path) as lines:
        first = lines.read()
        if lines.damage:
            raise CampaignError(f"{path}: {lines.damage}; get a sound copy of the file")
        if lines.is_utf16:
            raise CampaignError(f"{path}: is UTF-16 text; save it as UTF-8")
        if file_format(path.name) == ".csv":
            _csv_columns(first, path, source)


def _read_file(path: Path, source: MoleculeSource) -> Iterator[Record]:
    if file_format(path.name) == ".npz":
        yield from _read_archive(path, source)
        return
    with _Lines(path) as lines:
        match file_format(path.name):
            case ".smi":
                yield from _read_smi(lines)
            case ".csv":
                yield from _read_csv(lines, source)
            case ".sdf":
                yield from _read_sdf(lines)
            case _:
                yield from _read_xyz(lines, source)


def _unreadable(path: Path, error: OSError) -> CampaignError:
    return CampaignError(f"{path}: cannot be read: {error.strerror or error}")


class _Lines:
    """Lines of a text file, plain or gzipped, of bounded length, with a way to give some back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0  # of the line given last, from 1
        self.damage = ""  # why the file ends too early, if it does
        self.is_utf16 = False
        self._returned: list[str] = []
        try:
            gzipped = path.name.lower().endswith(".gz")
            self._stream: BinaryIO | gzip.GzipFile = (
                gzip.open(path, "rb") if gzipped else path.open("rb")  # noqa: SIM115, see __exit__
            )
        except OSError as error:
            raise _unreadable(path, error) from None

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self) -> str | None:
        """The next line without its end, bytes that are not UTF-8 replaced by U+FFFD; or None."""
        if self._returned:
            self.number += 1
            return self._returned.pop()
        try:
            raw = self._stream.readline(_LONGEST_LINE)
            rest = raw
            while len(rest) == _LONGEST_LINE and not rest.endswith(b"\n"):
                rest = self._stream.readline(_LONGEST_LINE)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            self.damage = f"its gzip data are damaged from here on ({error})"
            return None
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if not raw:
            return None
        if self.number == 0:
            self.is_utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        self.number += 1
        return raw.decode("utf-8", "replace").rstrip("\r\n")

    def give_back(self, *given: str) -> None:
        """Makes the lines given last come again."""
        self._returned.extend(reversed(given))
        self.number -= len(given)

    def peek(self) -> str | None:
        """The next line, which stays the next."""
        line = self.read()
        if line is not None:
            self.give_back(line)
        return line


def _record(path: Path, number: int, text: str, name: str, read: Callable[[], Read]) -> Record:
    kept_name = name if name.isprintable() else "".join(filter(str.isprintable, name))
    return Record(str(path), number, text[:_TEXT_KEPT], kept_name, read)


def _refuse(message: str) -> Read:
    raise InputError(message)


def _failure(lines: _Lines, number: int, text: str, name: str, message: str) -> Record:
    return _record(lines.path, number, text, name, partial(_refuse, message))


def _damage(lines: _Lines, number: int) -> Iterator[Record]:
    if lines.damage:
        yield _failure(lines, number, "", "", f"{lines.damage}; get a sound copy of the file")


def _from_smiles(smiles: str) -> Read:
    from kernels.graph import parse_smiles

    if "\ufffd" in smiles:
        raise InputError("SMILES holds bytes that are not UTF-8 text; repair the file")
    if len(smiles) > _LONGEST_SMILES:
        raise InputError(
            f"SMILES has {len(smiles)} characters, more than {_LONGEST_SMILES}; is a line end lost?"
        )
    return parse_smiles(smiles), None


# SMILES lists: SMILES, blanks, name


def _read_smi(lines: _Lines) -> Iterator[Record]:
    first = True
    while (line := lines.read()) is not None:
        words = line.split(None, 1)
        if not words or words[0].startswith("#"):
            continue
        smiles, name = words[0], words[1].strip() if len(words) > 1 else ""
        if first and smiles.casefold() in _SMI_HEADERS:
            first = False
            continue
        first = False
        if name.startswith("|"):
            message = "has a CXSMILES extension |...|, which is not read; write plain SMILES"
            yield _failure(lines, lines.number, line, "", message)
        else:
            yield _record(lines.path, lines.number, line, name, partial(_from_smiles, smiles))
    yield from _damage(lines, lines.number + 1)


# CSV tables


def _csv_columns(header: str | None, path: Path, source: MoleculeSource) -> tuple[str, int, int]:
    """Delimiter, column of the SMILES and column of the name (-1: none) in a table."""
    if header is None:
        raise CampaignError(f"{path}: is empty; its first line must name the columns")
    # Spreadsheets of many countries write semicolons.
    for delimiter in ",;\t":
        columns = _header_cells(header, delimiter, path)
        if source.smiles_column in columns:
            break
    else:
        raise _no_column(path, "smiles_column", source.smiles_column, header)
    if source.name_column in columns:
        name = columns.index(source.name_column)
    elif "name_column" in source.model_fields_set:
        raise _no_column(path, "name_column", source.name_column, header)
    else:
        name = -1
    return delimiter, columns.index(source.smiles_column), name


def _header_cells(header: str, delimiter: str, path: Path) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    except csv.Error as error:
        raise CampaignError(
            f"{path}:1: the line that names the columns cannot be read ({error}); "
            f"it starts with {header[:60]!r}"
        ) from None


def _no_column(path: Path, setting: str, wanted: str, header: str) -> CampaignError:
    delimiter = max(",;\t", key=header.count)
    columns = _header_cells(header, delimiter, path)
    shown = ", ".join(f'"{name[:40]}"' for name in columns[:20]) or "none"
    folded = {name.casefold(): name for name in columns}
    near = difflib.get_close_matches(wanted.casefold(), folded, n=1, cutoff=0.5)
    hint = f'; write {setting} = "{folded[near[0]]}"?' if near else f"; set {setting} to one"
    return CampaignError(
        f'{path}:1: [molecules] {setting} = "{wanted}": no such column; there is {shown}{hint}'
    )


def _read_csv(lines: _Lines, source: MoleculeSource) -> Iterator[Record]:
    delimiter, smiles_at, name_at = _csv_columns(lines.read(), lines.path, source)
    while (line := lines.read()) is not None:
        number = lines.number
        if not line.strip():
            continue
        if '"' in line:
            line, cells = _quoted_cells(line, lines, delimiter)
            if cells is None:
                message = 'a quotation mark is opened and not closed; add the missing "'
                yield _failure(lines, number, line, "", message)
                continue
        else:
            cells = line.split(delimiter)
        name = cells[name_at].strip() if 0 <= name_at < len(cells) else ""
        if smiles_at >= len(cells):
            message = (
                f"row has {len(cells)} cells and the SMILES is in column {smiles_at + 1}; "
                "complete the row"
            )
            yield _failure(lines, number, line, name, message)
            continue
        smiles = cells[smiles_at].strip()
        yield _record(lines.path, number, line, name, partial(_from_smiles, smiles))
    yield from _damage(lines, lines.number + 1)


def _quoted_cells(line: str, lines: _Lines, delimiter: str) -> tuple[str, list[str] | None]:
    """The cells of a record with quotes, which may go on over line ends, and its whole text.

    Without this bound a single stray quotation mark would swallow the rest of the file.
    """
    parts = [line]
    while True:
        try:
            record = [part + "\n" for part in parts]
            return "\n".join(parts), next(csv.reader(record, delimiter=delimiter, strict=True))
        except csv.Error as error:
            if "unexpected end of data" not in str(error):
                # Quotes inside a cell, as in 5"-ring: read as the csv module usually does.
                try:
                    return "\n".join(parts), next(csv.reader([line], delimiter=delimiter))
                except csv.Error:
                    break
        more = lines.read() if len(parts) < _LONGEST_CSV_RECORD else None
        if more is None:
            break
        parts.append(more)
    lines.give_back(*parts[1:])
    return line, None


# SD files: records end with $$$$


def _read_sdf(lines: _Lines) -> Iterator[Record]:
    for number in itertools.count(1):
        record: list[str] = []
        size = 0
        line = lines.read()
        while line is not None and not line.startswith("$$$$"):
            size += len(line) + 1
            if size <= _LONGEST_SDF_RECORD:
                record.append(line)
            line = lines.read()
        if line is None and not any(part.strip() for part in record):
            yield from _damage(lines, number)
            return
        text = "\n".join(record)
        name = record[0].strip() if record else ""
        if size > _LONGEST_SDF_RECORD:
            message = "record is larger than 4 MiB; is a line with $$$$ missing?"
            yield _failure(lines, number, text, name, message)
        elif line is None and lines.damage:
            yield from _damage(lines, number)
        else:
            yield _record(lines.path, number, text, name, partial(_from_mol_block, text))
        if line is None:
            return


def _from_mol_block(text: str) -> Read:
    from rdkit import Chem, rdBase

    from kernels.graph import from_rdkit, parse_smiles

    if "\0" in text:
        raise InputError("record contains a NUL character; the file is not text")
    ends = len(re.findall(r"^M  END", text, re.MULTILINE))
    if ends != 1:
        raise InputError(
            "record has no line 'M  END': it is cut short, or not a molecule block"
            if not ends
            else f"record holds {ends} molecules; put a line with $$$$ between them"
        )
    with rdBase.BlockLogs():
        mol = Chem.MolFromMolBlock(text, sanitize=True, removeHs=False)
        if mol is None:
            raise InputError(f"record: {_mol_block_reason(text)}; repair the molecule block")
        if mol.GetNumAtoms() and mol.GetNumConformers() and not mol.GetConformer().Is3D():
            return parse_smiles(Chem.MolToSmiles(Chem.RemoveHs(mol))), None
        return from_rdkit(mol)


def _mol_block_reason(text: str) -> str:
    """Why RDKit refuses a molecule block, which the supplier logs and the parser does not."""
    from rdkit import Chem, rdBase

    with rdBase.CaptureErrorLog() as log:
        supplier = Chem.SDMolSupplier()
        supplier.SetData(text, sanitize=True, removeHs=False)
        next(iter(supplier), None)
    lines = [line.split("] ", 1)[-1].removeprefix("ERROR: ") for line in log.messages.splitlines()]
    return next((line.strip()[:200] for line in lines if line.strip()), "RDKit cannot read it")


# XYZ and extended XYZ: frames of a count, a comment and as many atom lines


@dataclass(slots=True)
class _Frame:
    comment: str
    atoms: list[list[str]]


def _read_xyz(lines: _Lines, source: MoleculeSource) -> Iterator[Record]:
    number = 0
    while (line := lines.read()) is not None:
        if not line.strip():
            continue
        number += 1
        kept = [line]
        try:
            frame = _read_frame(line, lines, kept)
        except InputError as error:
            yield _failure(lines, number, "\n".join(kept), "", str(error))
            _skip_to_frame(lines)
            continue
        fields = _comment_fields(frame.comment)
        name = fields.get("name", "" if fields else frame.comment.strip())
        yield _record(
            lines.path, number, "\n".join(kept), name, partial(_from_frame, frame, fields, source)
        )
    yield from _damage(lines, number + 1)


def _read_frame(count_line: str, lines: _Lines, kept: list[str]) -> _Frame:
    """Reads one frame; `kept` collects its first lines. Raises InputError when it is malformed."""
    start = lines.number
    count = _count(count_line)
    if count is None or count > _MOST_ATOMS:
        raise InputError(
            f"line {start}: {count_line.strip()[:40]!r} is not an atom count from 1 to "
            f"{_MOST_ATOMS}; a frame is a count, a comment and one line per atom"
        )
    comment = lines.read()
    if comment is None:
        raise InputError(f"line {start}: the file ends after the atom count; complete the frame")
    kept.append(comment)
    atoms: list[list[str]] = []
    for _ in range(count):
        line = lines.read()
        if line is None or not _looks_like_atom(line):
            found = "the file ends" if line is None else f"{line.strip()[:40]!r} is not an atom"
            if line is not None:
                lines.give_back(line)
            raise InputError(
                f"line {lines.number + 1}: {found} after {len(atoms)} of {count} atoms; "
                "complete the frame or correct its count"
            )
        if len(kept) < _TEXT_KEPT // 4:
            kept.append(line)
        atoms.append(line.split())
    after = lines.peek()
    if after is not None and _looks_like_atom(after):
        raise InputError(
            f"line {lines.number + 1}: more atoms follow than the count {count} of line {start} "
            "says; correct the count"
        )
    return _Frame(comment, atoms)


def _count(line: str) -> int | None:
    text = line.strip()
    return (
        int(text)
        if text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text)
        else None
    )


def _looks_like_atom(line: str) -> bool:
    """Whether a line holds an element and at least three numbers, in whatever columns."""
    words = line.split()
    return len(words) >= 4 and sum(map(_is_number, words)) >= 3


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _skip_to_frame(lines: _Lines) -> None:
    """Goes to the next place that looks like a frame: a count, any line, an atom."""
    while (line := lines.read()) is not None:
        if _count(line) is None:
            continue
        comment, atom = lines.read(), lines.read()
        lines.give_back(*(given for given in (comment, atom) if given is not None))
        if atom is not None and _looks_like_atom(atom):
            lines.give_back(line)
            return


_FIELD: Final = re.compile(r"""([A-Za-z_][\w\-]*)\s*=\s*("[^"]*"|'[^']*'|\{[^}]*\}|\S+)""")


def _comment_fields(comment: str) -> dict[str, str]:
    return {key.casefold(): value.strip("\"'{}") for key, value in _FIELD.findall(comment)}


def _from_frame(frame: _Frame, fields: Mapping[str, str], source: MoleculeSource) -> Read:
    import numpy as np

    from kernels.graph import from_geometry

    _refuse_periodic(fields)
    charge = _whole_number(fields, ("charge", "total_charge"))
    multiplicity = _whole_number(fields, ("multiplicity", "spin_multiplicity", "spin"))
    if multiplicity == 0 and "spin" in fields:
        raise InputError(
            "spin=0 is no spin multiplicity; write multiplicity=1 for a closed shell, since 'spin' "
            "is read as 2S+1"
        )
    symbol_at, xyz_at = _atom_columns(fields.get("properties"))
    elements = _elements()
    numbers: list[int] = []
    positions: list[list[float]] = []
    for index, words in enumerate(frame.atoms, start=1):
        try:
            numbers.append(elements[words[symbol_at].capitalize()])
            positions.append([float(word) for word in words[xyz_at : xyz_at + 3]])
        except KeyError:
            raise InputError(f"atom {index}: {words[symbol_at]!r} is not an element") from None
        except (ValueError, IndexError):
            raise InputError(
                f"atom {index}: {' '.join(words)[:60]!r} has no three coordinates where the frame "
                "says they are"
            ) from None
        if len(positions[-1]) != 3:
            raise InputError(f"atom {index}: has fewer than three coordinates")
    return from_geometry(
        np.array(numbers, dtype=np.uint8),
        np.array(positions, dtype=np.float64),
        charge=source.charge if charge is None else charge,
        multiplicity=source.multiplicity if multiplicity is None else multiplicity,
    )


def _refuse_periodic(fields: Mapping[str, str]) -> None:
    # Like ASE: a lattice without a word on periodicity means a periodic cell.
    periodic = fields.get("pbc", "T" if "lattice" in fields else "F")
    if any(flag.casefold() in ("t", "true", "1") for flag in periodic.split()):
        raise InputError(
            "frame is periodic; molecules are computed alone in space: unwrap it and write "
            'pbc="F F F"'
        )


def _whole_number(fields: Mapping[str, str], keys: Sequence[str]) -> int | None:
    for key in keys:
        if key in fields:
            try:
                value = float(fields[key])
            except ValueError:
                value = float("nan")
            if not value.is_integer():
                raise InputError(f"{key}={fields[key][:40]} is not a whole number; correct it")
            return int(value)
    return None


def _atom_columns(properties: str | None) -> tuple[int, int]:
    """Columns of the element and of x in an atom line, from `Properties=species:S:1:pos:R:3`."""
    if properties is None:
        return 0, 1
    parts = properties.split(":")
    at = 0
    columns: dict[str, int] = {}
    for name, width in zip(parts[0::3], parts[2::3], strict=False):
        columns[name.casefold()] = at
        at += int(width) if width.isdigit() else 1
    symbol = next((columns[name] for name in ("species", "element", "z") if name in columns), None)
    xyz = next((columns[name] for name in ("pos", "positions") if name in columns), None)
    if symbol is None or xyz is None:
        raise InputError(
            f"Properties={properties[:80]} names no species or no pos; write "
            "Properties=species:S:1:pos:R:3"
        )
    return symbol, xyz


# NumPy archives: numbers (M, A) padded with zeros, positions (M, A, 3) in Å, and optional columns


# What zipfile and NumPy raise depends on where the damage is.
_ARCHIVE_DAMAGE: Final = (
    ValueError,
    EOFError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
_ARCHIVE_NAMES: Final = ("name", "gdb9_id", "id", "index")


def _open_archive(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an archive that are read; raises CampaignError for one that cannot be used."""
    import numpy as np

    try:
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name")
            wanted = {"numbers", "positions", "charge", "multiplicity", *_ARCHIVE_NAMES}
            arrays = {name: archive[name] for name in archive.files if name in wanted}
    except OSError as error:
        raise _unreadable(path, error) from None
    except _ARCHIVE_DAMAGE as error:
        raise CampaignError(
            f"{path}: is no NumPy archive of plain arrays ({error}); get a sound copy of the file"
        ) from None
    numbers, positions = arrays.get("numbers"), arrays.get("positions")
    if numbers is None or positions is None:
        raise CampaignError(
            f"{path}: holds no array {'numbers' if numbers is None else 'positions'!r}; it needs "
            "numbers (M, A), padded with zeros, and positions (M, A, 3) in Å"
        )
    if numbers.ndim != 2 or positions.shape != (*numbers.shape, 3):
        raise CampaignError(
            f"{path}: numbers {numbers.shape} and positions {positions.shape} do not fit; they "
            "must be (M, A), padded with zeros, and (M, A, 3)"
        )
    if numbers.dtype.kind not in "iu" or positions.dtype.kind != "f":
        raise CampaignError(
            f"{path}: numbers are {numbers.dtype} and positions {positions.dtype}; they must be "
            "whole and floating-point numbers"
        )
    for name, array in arrays.items():
        if array.shape[:1] != numbers.shape[:1]:
            raise CampaignError(f"{path}: {name} has {array.shape} entries, not {len(numbers)}")
    return arrays


def read_archive(path: Path) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.float64]]]:
    """Name, numbers (N,) and positions (N, 3) in Å of every record, bonds not looked at.

    Raises CampaignError for a file that is not such an archive, or has a broken record.
    """
    import numpy as np

    arrays = _open_archive(path)
    for row in range(len(arrays["numbers"])):
        try:
            numbers = _archive_numbers(arrays, row)
        except InputError as error:
            raise CampaignError(f"{path}: record {row + 1}: {error}") from None
        positions = arrays["positions"][row, : len(numbers)].astype(np.float64)
        yield _archive_name(arrays, row), numbers.astype(np.uint8), positions


def _archive_numbers(arrays: dict[str, NDArray[Any]], row: int) -> NDArray[Any]:
    """The atomic numbers (N,) of a record, without what fills it up."""
    import numpy as np

    numbers = arrays["numbers"][row]
    n = int(np.count_nonzero(numbers))
    if not numbers[:n].all() or (numbers < 0).any():
        raise InputError("numbers are not padded at the end with zeros; repair the record")
    found: NDArray[Any] = numbers[:n]
    return found


def _archive_name(arrays: dict[str, NDArray[Any]], row: int) -> str:
    label = next((name for name in _ARCHIVE_NAMES if name in arrays), "")
    given = str(arrays[label][row]) if label else str(row + 1)
    return given if label == "name" else f"{label.removesuffix('_id')} {given}".strip()


def _read_archive(path: Path, source: MoleculeSource) -> Iterator[Record]:
    from kernels.graph import may_be_flexible

    arrays = _open_archive(path)
    for row in range(len(arrays["numbers"])):
        name = _archive_name(arrays, row)
        if source.split is not None and split_of(name) != source.split:
            continue  # before the perception of its bonds, which takes a while
        if source.flexible and not may_be_flexible(arrays["numbers"][row]):
            continue
        one = {label: array[row : row + 1] for label, array in arrays.items()}
        yield _record(path, row + 1, name, name, partial(_from_archive, one, source))


def _from_archive(arrays: dict[str, NDArray[Any]], source: MoleculeSource) -> Read:
    """The molecule of an archive of one record."""
    import numpy as np

    from kernels.graph import from_geometry

    numbers = _archive_numbers(arrays, 0)
    charge = int(arrays["charge"][0]) if "charge" in arrays else source.charge
    multiplicity = (
        int(arrays["multiplicity"][0]) if "multiplicity" in arrays else source.multiplicity
    )
    return from_geometry(
        numbers,
        arrays["positions"][0, : len(numbers)].astype(np.float64),
        charge=charge,
        multiplicity=multiplicity,
    )


@lru_cache(maxsize=1)
def _elements() -> dict[str, int]:
    """Atomic numbers by symbol, and by the number itself written as text."""
    from rdkit import Chem

    table = Chem.GetPeriodicTable()
    by_symbol = {table.GetElementSymbol(number): number for number in range(1, 119)}
    return by_symbol | {str(number): number for number in range(1, 119)}
