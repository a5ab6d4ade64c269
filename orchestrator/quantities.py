"""Numbers with units, as people write them in a campaign file.

A bare number is in the unit the field documents; a string carries its own, and is converted.
A unit of another dimension, or none that is known, is refused with examples of what fits.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BeforeValidator

from kernels.units import (
    BOHR_TO_ANGSTROM,
    HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM,
    HARTREE_TO_EV,
    KCAL_TO_EV,
)


@dataclass(frozen=True, slots=True)
class Dimension:
    """One kind of quantity: the unit it is kept in, and what each accepted unit is worth in it."""

    name: str
    unit: str
    units: Mapping[str, float]
    examples: tuple[str, ...]

    @property
    def article(self) -> str:
        """What goes before the name."""
        return "an" if self.name[0] in "aeiou" else "a"

    @property
    def expected(self) -> str:
        """What to write, for the end of an error message."""
        *most, last = self.examples
        return f"write {self.article} {self.name}, such as {', '.join(most)} or {last}"


class QuantityError(ValueError):
    """A value is not a number with a unit of the wanted dimension; the message says what is."""


def _spell(factor: float, *names: str) -> dict[str, float]:
    return dict.fromkeys(names, factor)


_ANGSTROMS: Final = ("Å", "Angstrom", "Ang", "A")


def _force(factor: float, *energies: str) -> dict[str, float]:
    return {
        form: factor
        for energy in energies
        for length in _ANGSTROMS
        for form in (f"{energy}/{length}", f"{energy}*{length}^-1", f"{energy}{length}^-1")
    }


def _hartree_per_bohr() -> dict[str, float]:
    names = (f"{e}/{b}" for e in ("Ha", "Eh", "Hartree") for b in ("bohr", "a0"))
    return dict.fromkeys((*names, "a.u.", "au"), HARTREE_PER_BOHR_TO_EV_PER_ANGSTROM)


TIME: Final = Dimension(
    "time",
    "s",
    {
        **_spell(1e-3, "ms"),
        **_spell(1.0, "s", "sec", "second", "seconds"),
        **_spell(60.0, "min", "mins", "minute", "minutes"),
        **_spell(3600.0, "h", "hr", "hrs", "hour", "hours"),
        **_spell(86400.0, "d", "day", "days"),
    },
    ("90", '"90 s"', '"10 min"', '"1.5 h"'),
)
MEMORY: Final = Dimension(
    "memory size",
    "B",
    {
        **_spell(1.0, "B", "byte", "bytes"),
        **_spell(1e3, "kB"),
        **_spell(1e6, "MB"),
        **_spell(1e9, "GB"),
        **_spell(1e12, "TB"),
        **_spell(2.0**10, "KiB"),
        **_spell(2.0**20, "MiB"),
        **_spell(2.0**30, "GiB"),
        **_spell(2.0**40, "TiB"),
    },
    ('"500 MB"', '"2 GB"', '"1.5 GiB"'),
)
FORCE: Final = Dimension(
    "force",
    "eV/Å",
    {
        **_force(1.0, "eV"),
        **_force(1e-3, "meV"),
        **_force(KCAL_TO_EV, "kcal/mol", "kcal*mol^-1"),
        **_force(KCAL_TO_EV / 4.184, "kJ/mol", "kJ*mol^-1"),
        **_hartree_per_bohr(),
    },
    ("0.03", '"0.03 eV/Å"', '"0.7 kcal/mol/Å"'),
)
LENGTH: Final = Dimension(
    "length",
    "Å",
    {
        **_spell(1.0, *_ANGSTROMS, "Angstroms"),
        **_spell(BOHR_TO_ANGSTROM, "bohr", "a0"),
        **_spell(10.0, "nm"),
        **_spell(0.01, "pm"),
    },
    ("0.2", '"0.2 Å"', '"0.4 bohr"'),
)
TEMPERATURE: Final = Dimension("temperature", "K", _spell(1.0, "K", "kelvin"), ("300", '"300 K"'))
ENERGY: Final = Dimension(
    "energy",
    "eV",
    {
        **_spell(1.0, "eV"),
        **_spell(1e-3, "meV"),
        **_spell(KCAL_TO_EV, "kcal/mol", "kcal*mol^-1"),
        **_spell(KCAL_TO_EV / 4.184, "kJ/mol", "kJ*mol^-1"),
        **_spell(HARTREE_TO_EV, "Ha", "Eh", "Hartree"),
    },
    ("2", '"2 eV"', '"50 kcal/mol"'),
)
DIMENSIONS: Final = (TIME, MEMORY, FORCE, LENGTH, TEMPERATURE, ENERGY)

# Real units of other dimensions, known only so that a message can say what was written.
_FOREIGN: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("eV", "meV", "kcal/mol", "kcal", "kJ/mol", "kJ", "Ha", "Eh", "Hartree", "Ry"), "an energy"
    ),
    **dict.fromkeys(("°C", "C", "°F"), "a temperature that is not in kelvin"),
}
_WITH_ARTICLE: Final[Mapping[str, str]] = {d.name: f"{d.article} {d.name}" for d in DIMENSIONS}

_NUMBER_AND_UNIT: Final = re.compile(
    r"\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*", re.DOTALL
)
_DECIMAL_COMMA: Final = re.compile(r"\s*[+-]?\d+,\d+\b")
_CLOCK: Final = re.compile(r"\s*(\d+-)?\d+(:\d+)+\s*")
# Unit letters that difflib would lead astray.
_MEANT: Final[Mapping[str, str]] = {"m": "min", "M": "MB"}


def parse_quantity(value: object, dimension: Dimension) -> float:
    """The value in the dimension's own unit: a number as it is, a string converted.

    Raises QuantityError for anything else, for an unknown or foreign unit, and for values that
    are not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise QuantityError(f"is not {dimension.article} {dimension.name}; {dimension.expected}")
    if isinstance(value, str):
        number, unit = _split(value, dimension)
        factor = _factor(unit, dimension)
        # Twelve digits, so that "57 pm" and 0.57 are one number, and one key.
        result = number if factor == 1.0 else float(f"{number * factor:.12g}")
    else:
        result = _to_float(value)
    if not math.isfinite(result):
        raise QuantityError(f"is not a finite number; {dimension.expected}")
    return result


def parse_bytes(value: object) -> int:
    """A memory size as a whole number of bytes; raises QuantityError."""
    return round(parse_quantity(value, MEMORY))


def format_seconds(seconds: float) -> str:
    """A time in the largest unit that writes it shortly, such as "10 min"."""
    return _shortest(seconds, (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)))


def format_bytes(size: float) -> str:
    """A memory size in the largest decimal unit that writes it shortly, such as "2 GB"."""
    return _shortest(size, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _shortest(value: float, units: tuple[tuple[str, float], ...]) -> str:
    for name, worth in units:
        if value >= worth:
            return f"{value / worth:.4g} {name}"
    return f"{value:.4g} {units[-1][0]}"


def _to_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # integers of a TOML file have no upper limit
        return math.inf


def _split(text: str, dimension: Dimension) -> tuple[float, str]:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if _DECIMAL_COMMA.match(text):
        with_point = text.strip().replace(",", ".", 1)
        raise QuantityError(f'has a decimal comma; write it with a point: "{with_point}"')
    if _CLOCK.fullmatch(text):
        raise QuantityError(f"is a clock time; {dimension.expected}")
    if match is None:
        raise QuantityError(f"does not start with a number; {dimension.expected}")
    return float(match[1]), match[2]


def _plain(unit: str) -> str:
    """One spelling for the ways to type a unit: Å has two code points, products have many signs."""
    unit = (
        unicodedata.normalize("NFKC", unit)
        .replace("\N{MINUS SIGN}", "-")
        .replace("ångström", "Angstrom")
    )
    unit = re.sub(r"[·⋅]|\*\*(?=-)", lambda m: "*" if m[0] != "**" else "^", unit)
    unit = re.sub(r"\s*([/*])\s*", r"\1", unit)
    unit = re.sub(r"/\(([^()/]+?)[ *]([^()/]+?)\)", r"/\1/\2", unit)
    unit = re.sub(r"\s+(?=\S)", "*", unit)
    return re.sub(r"(?<=[^\^*/])-1", "^-1", unit)


def _look_up(unit: str, dimension: Dimension) -> float | None:
    if unit in dimension.units:
        return dimension.units[unit]
    if re.search(r"\bM(?=eV|s$)", unit):  # mega, not milli: capitals matter here
        return None
    folded = unit.casefold()
    return next((f for name, f in dimension.units.items() if name.casefold() == folded), None)


def _factor(unit: str, dimension: Dimension) -> float:
    if not unit:
        return 1.0
    plain = _plain(unit)
    factor = _look_up(plain, dimension)
    if factor is not None:
        return factor
    other = _FOREIGN.get(plain) or next(
        (_WITH_ARTICLE[d.name] for d in DIMENSIONS if _look_up(plain, d) is not None), None
    )
    if other is not None:
        raise QuantityError(
            f"is {other}, and {_WITH_ARTICLE[dimension.name]} is needed; {dimension.expected}"
        )
    near = [_MEANT.get(plain, "")] if _MEANT.get(plain) in dimension.units else []
    near = near or difflib.get_close_matches(plain, dimension.units, n=1, cutoff=0.5)
    hint = f' (nearest: "{near[0]}")' if near else ""
    raise QuantityError(f'has the unknown unit "{unit}"{hint}; {dimension.expected}')


def _validator(dimension: Dimension) -> BeforeValidator:
    return BeforeValidator(lambda value: parse_quantity(value, dimension))


# The dimension rides along in the annotation, so that the field tables can print the unit.
Seconds = Annotated[float, _validator(TIME), TIME]
Bytes = Annotated[int, BeforeValidator(parse_bytes), MEMORY]
Force = Annotated[float, _validator(FORCE), FORCE]
Length = Annotated[float, _validator(LENGTH), LENGTH]
Temperature = Annotated[float, _validator(TEMPERATURE), TEMPERATURE]
Energy = Annotated[float, _validator(ENERGY), ENERGY]
