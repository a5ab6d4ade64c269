"""A TOML file read into pydantic models, every problem told in the words of the file.

A file's loader parses it with `parse`, lets its model validate the content and hands each of the
validator's findings to `Problems`, which names file, line, field, value and remedy.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from orchestrator.errors import CampaignError
from orchestrator.quantities import MEMORY, TIME, Dimension, format_bytes, format_seconds

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]*"

TOP: Final = "at the top of the file, above the first [table]"

_NEAR: Final = 8

Location: TypeAlias = tuple[str | int, ...]


class Table(BaseModel):
    """A table of a file."""

    # Strict, because a quoted "500" or a true where a number belongs is a slip worth reporting.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


def default(text: str) -> dict[str, Any]:
    """Marks a default that is worked out while loading, with the words the field table shows."""
    return {"default": text}


# Reading the file


def read(path: Path, what: str) -> str:
    """The file's text; raises CampaignError, with a remedy, where there is none.

    ``what`` is what the file should be, such as "a campaign file".
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise CampaignError(
            f"{path}:{line}: the file is not UTF-8 text (byte 0x{error.object[error.start]:02x}); "
            "save it as UTF-8"
        ) from None
    except FileNotFoundError:
        raise CampaignError(f"{path}: there is no such file{_nearby(path)}") from None
    except IsADirectoryError:
        raise CampaignError(
            f"{path}: is a folder, not {what}{_nearby(path / 'campaign.toml')}"
        ) from None
    except OSError as error:
        raise CampaignError(f"{path}: cannot be read: {error.strerror or error}") from None


def _nearby(path: Path) -> str:
    """The TOML files a person may have meant, for the end of a message."""
    folders = [path.parent, path.parent / "jobs", Path("jobs")]
    found: dict[Path, str] = {}
    for folder in folders:
        try:
            candidates = sorted(folder.glob("*.toml"))
        except OSError:
            continue
        for file in candidates:
            if file.name != "pyproject.toml":
                found.setdefault(file.resolve(), str(file))
    if not found:
        return "; no .toml file is near it either: check the folder you are in"
    near = sorted(
        found.values(),
        key=lambda name: -difflib.SequenceMatcher(None, Path(name).name, path.name).ratio(),
    )
    more = f" and {len(near) - _NEAR} more" if len(near) > _NEAR else ""
    return f"; near it: {', '.join(near[:_NEAR])}{more}"


_TOML_POSITION: Final = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)$")
_TOML_HINTS: Final = (
    ("Unescaped '\\'", "write the text in single quotes, or double each backslash"),
    ("Invalid value", 'text needs quotes: key = "text"; true and false are lower case'),
    ("Cannot overwrite", "the key appears twice in its table; keep one of them"),
    ("Cannot declare", "the table is declared twice; merge the two, or write [[stages]]"),
    ("Illegal character", "a text must end on its line; is a closing quote missing?"),
    ("Expected '=' after a key", 'a line is: key = value, [table], or "# comment"'),
    ("Unclosed array", "a closing ] or a comma is missing"),
    ("Invalid initial character", "a key is a plain word: letters, digits, _ and -"),
)


def parse(text: str, path: Path) -> dict[str, Any]:
    """The content of the file; raises CampaignError showing the place that is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
    position = _TOML_POSITION.search(message)
    lines = text.splitlines() or [""]
    if position is not None and position[1]:
        row, column = int(position[1]), int(position[2])
    else:
        row, column = len(lines), len(lines[-1]) + 1
    what = _TOML_POSITION.sub("", message)
    what = what[:1].lower() + what[1:]
    shown = lines[row - 1] if row <= len(lines) else ""
    hint = next((f"; {hint}" for start, hint in _TOML_HINTS if message.startswith(start)), "")
    if message.startswith("Invalid value") and not shown[column - 1 :].strip():
        hint = "; a value is missing here, or a bracket above is not closed"
    caret = re.sub(r"[^\t]", " ", shown[: column - 1]) + "^"
    raise CampaignError(
        f"{path}:{row}:{column}: not valid TOML: {what}{hint}\n    {shown}\n    {caret}"
    )


_TABLE_LINE: Final = re.compile(r"\s*(\[\[?)\s*([\w.\-]+)\s*\]")
_KEY_LINE: Final = re.compile(r"""\s*["']?([\w-]+(?:\s*\.\s*[\w-]+)*)["']?\s*=""")


def line_numbers(text: str) -> dict[Location, int]:
    """Line of every table and key, which the TOML parser does not tell."""
    lines: dict[Location, int] = {}
    table: Location = ()
    counts: dict[str, int] = {}
    inside = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not inside:
            if match := _TABLE_LINE.match(line):
                table = tuple(match[2].split("."))
                if match[1] == "[[":
                    counts[match[2]] = counts.get(match[2], -1) + 1
                    table = (*table, counts[match[2]])
                lines.setdefault(table, number)
            elif match := _KEY_LINE.match(line):
                keys = tuple(re.split(r"\s*\.\s*", match[1]))
                lines.setdefault((*table, *keys), number)
        for quotes in ('"""', "'''"):
            if line.count(quotes) % 2 and inside in ("", quotes):
                inside = "" if inside else quotes
    return lines


# Problems, gathered so that one run of the command shows all of them


@dataclass(frozen=True, slots=True)
class _Problem:
    line: int
    message: str


class Problems:
    """The problems of one file, each in the words of the file and not of the validator.

    ``top`` is the model of the whole file, ``tables`` the models of its [tables] by name,
    ``remedies`` what to write where something is missing. A file with further kinds of tables
    overrides the methods that say which model holds a field.
    """

    def __init__(
        self,
        path: Path,
        text: str,
        raw: dict[str, Any],
        top: type[BaseModel],
        tables: Mapping[str, type[BaseModel]],
        remedies: Mapping[Location, str],
    ) -> None:
        self.path = path
        self.raw = raw
        self.top = top
        self.tables = tables
        self._remedies = remedies
        self._lines = line_numbers(text)
        self._found: list[_Problem] = []

    def add(self, location: Location, message: str) -> None:
        """A problem whose message already names field and value; `location` gives its line."""
        problem = _Problem(self.line(location), message)
        if problem not in self._found:
            self._found.append(problem)

    def add_value(self, location: Location, value: object, what: str) -> None:
        """A problem of one field and its value."""
        self.add(location, f"{self.field(location)} = {show(value)}: {what}")

    def line(self, location: Location) -> int:
        """Line of a field, or of the innermost table around it that has one; 0 if none."""
        for length in range(len(location), 0, -1):
            for place in (location[:length], (*location[:length], 0)):
                if place in self._lines:
                    return self._lines[place]
        return 0

    def written(self, location: Location, otherwise: object) -> object:
        """A value as it stands in the file, before any conversion."""
        found: Any = self.raw
        for part in location:
            if isinstance(found, str):
                return otherwise  # one value where a list may stand
            try:
                found = found[part]
            except (KeyError, IndexError, TypeError):
                return otherwise
        return found

    def field(self, location: Location) -> str:
        """A field as a person would call it: `[run] window`."""
        names = [str(part) for part in location if isinstance(part, str)]
        if len(names) > 1 and names[0] in self.tables:
            return f"[{names[0]}] {'.'.join(names[1:])}"
        return ".".join(names)

    # What the file is made of

    def file_location(self, location: Location) -> Location:
        """Where the validator's location stands in the file."""
        return location

    def model_of(self, location: Location) -> type[BaseModel] | None:
        """The model of the table that holds a field, from the validator's location."""
        return self.top if len(location) == 1 else self.tables.get(str(location[0]))

    def valid_keys(self, table: Location) -> list[str]:
        """Keys that a table may have."""
        return keys_of(self.tables[str(table[0])]) if table else keys_of(self.top)

    def all_keys(self) -> Iterator[tuple[str, list[str]]]:
        """Every kind of table, in words, with its keys."""
        yield TOP, keys_of(self.top)
        for table, model in self.tables.items():
            yield f"in [{table}]", keys_of(model)

    # The validator's findings

    def translate(self, detail: Mapping[str, Any]) -> None:
        """One error of the validator, in plain words."""
        kind: str = detail["type"]
        location = self.file_location(detail["loc"])
        value: object = self.written(location, detail["input"])
        if kind == "missing":
            self._missing(location)
        elif kind == "extra_forbidden":
            self._unknown(location, value)
        elif kind == "too_short" and value != []:
            pass  # not short in the file: its members have problems of their own
        else:
            info = self._field_info(detail["loc"])
            self.add_value(
                location, value, _what_is_wrong(kind, detail.get("ctx", {}), value, info)
            )

    def _field_info(self, location: Location) -> FieldInfo | None:
        model = self.model_of(location)
        if model is None:
            return None
        names = [part for part in location if isinstance(part, str)]
        known = {key_of(name, info): info for name, info in model.model_fields.items()}
        return next((known[name] for name in names if name in known), None)

    def _missing(self, location: Location) -> None:
        table: object = self.written(location[:-1], {})
        strangers = (
            [key for key in table if key not in keys_of(self.top)]
            if isinstance(table, dict)
            else []
        )
        if difflib.get_close_matches(str(location[-1]), strangers, n=1):
            return  # its misspelling is reported already, with this name beside it
        what = self._remedies.get(location, "is missing; it has no default")
        self.add(location, f"{self.field(location)} {what}")

    def _unknown(self, location: Location, value: object) -> None:
        key = str(location[-1])
        if location == ("stage",):
            what = "write [[stages]]"
        elif elsewhere := [place for place, keys in self.all_keys() if key in keys]:
            what = f"belongs {' or '.join(elsewhere)}, not here"
            if elsewhere == [TOP]:
                what += "; in TOML a line belongs to the last [table] above it"
        else:
            what = choose(key, self.valid_keys(location[:-1]))
        self.add_value(location, value, f"unknown key; {what}")

    def single_tables(self, filled: dict[str, Any]) -> None:
        """Report [[table]] where [table] is meant, and go on with its first."""
        for table in self.tables:
            written = self.raw.get(table)
            if isinstance(written, list):
                self.add((table, 0), f"[[{table}]]: write [{table}], with one bracket on each side")
                filled[table] = written[0] if written else {}

    def raise_if_any(self) -> None:
        """Raises one CampaignError with all problems in the order of the file."""
        if not self._found:
            return
        lines = [
            f"{self.path}:{p.line}: {p.message}" if p.line else f"{self.path}: {p.message}"
            for p in sorted(self._found, key=lambda p: p.line)
        ]
        if len(lines) > 1:
            lines.insert(0, f"{len(lines)} problems in {self.path}")
        raise CampaignError("\n".join(lines))


# Words


def key_of(name: str, info: FieldInfo) -> str:
    """The key that a field has in the file."""
    return info.alias or name


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys that a table may have."""
    return [key_of(name, info) for name, info in model.model_fields.items() if not info.exclude]


def either(names: Iterable[str]) -> str:
    """Names to choose from, in quotes: "a", "b" or "c"."""
    *most, last = [f'"{name}"' for name in dict.fromkeys(names)]
    return f"{', '.join(most)} or {last}" if most else last


def choose(word: str, names: Iterable[str]) -> str:
    """The nearest valid name if one is near, then what there is to choose from."""
    by_folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    if near:
        return f'did you mean "{by_folded[near[0]]}"?'
    return f"there is {either(by_folded.values())}"


def show(value: object) -> str:
    """A value as the file would write it, short enough for one line: the end of a path stays."""
    if isinstance(value, Path):
        value = str(value)
    try:
        text = repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 80 else f"{text[:28]}...{text[-49:]}"


_WRONG_TYPE: Final[Mapping[str, str]] = {
    "int_type": "must be a whole number, without quotes",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number, without quotes",
    "finite_number": "must be a finite number",
    "string_type": 'must be text in quotes, such as "text"',
    "bool_type": "must be true or false, without quotes",
    "path_type": 'must be text in quotes, such as "results/first"',
    "is_instance_of": 'must be text in quotes, such as "results/first"',
    "tuple_type": 'must be a list, such as ["first.smi", "second.smi"]',
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "dict_type": "must be a table",
}
_BOUNDS: Final[Mapping[str, tuple[str, str]]] = {
    "greater_than": ("gt", "must be more than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}


def _what_is_wrong(
    kind: str, context: Mapping[str, Any], value: object, info: FieldInfo | None
) -> str:
    dimension = dimension_of(info)
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{words} {in_units(context[key], dimension)}{_bare_unit(value, dimension)}"
    if kind == "literal_error" and info is not None:
        return f"is none of the choices; {choose(str(value), _choices(info.annotation))}"
    if kind == "string_pattern_mismatch":
        return "may hold letters, digits and . _ - only, and starts with a letter or a digit"
    if kind == "string_too_long":
        return f"is longer than {context['max_length']} characters"
    if kind == "too_short":
        example = info.examples[0] if info is not None and info.examples else ""
        return f"is empty; write for example {example}"
    if kind == "string_too_short":
        return "is empty; write a text between the quotes"
    return _WRONG_TYPE.get(kind, "cannot be used here")


def _choices(annotation: Any) -> list[str]:
    parts = get_args(annotation)
    words = [part for part in parts if isinstance(part, str)]
    return words + [word for part in parts if not isinstance(part, str) for word in _choices(part)]


def dimension_of(info: FieldInfo | None) -> Dimension | None:
    """The physical dimension of a field, if it has one."""
    metadata = info.metadata if info is not None else ()
    return next((m for m in metadata if isinstance(m, Dimension)), None)


def in_units(value: float, dimension: Dimension | None) -> str:
    """A number with the unit that a person would write."""
    if dimension is None:
        return str(value)
    if dimension is MEMORY:
        return format_bytes(value)
    if dimension is TIME and value > 0:
        return format_seconds(value)
    return f"{value:g} {dimension.unit}"


def _bare_unit(value: object, dimension: Dimension | None) -> str:
    if dimension is None or isinstance(value, str):
        return ""
    return f"; a bare number is in {dimension.unit}: {dimension.expected}"
