"""Numbers with units: physics against independent constants, and messages people can act on."""

from __future__ import annotations

import math

import pytest

from orchestrator.quantities import (
    FORCE,
    LENGTH,
    MEMORY,
    TEMPERATURE,
    TIME,
    Dimension,
    QuantityError,
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_quantity,
)


@pytest.mark.parametrize(
    ("text", "dimension", "expected"),
    [
        ("10 min", TIME, 600),
        ("1.5 h", TIME, 5400),
        ("2 days", TIME, 172_800),
        ("90", TIME, 90),
        (90, TIME, 90),
        ("2 GB", MEMORY, 2e9),
        ("2gb", MEMORY, 2e9),
        ("2 GiB", MEMORY, 2**31),
        ("1 KiB", MEMORY, 1024),
        ("0.03 eV/Å", FORCE, 0.03),
        ("30 meV/Å", FORCE, 0.03),
        ("0.03 eV/Angstrom", FORCE, 0.03),
        ("0.03 eV Å^-1", FORCE, 0.03),
        ("57 pm", LENGTH, 0.57),
        ("0.1 nm", LENGTH, 1.0),
        ("300 K", TEMPERATURE, 300),
    ],
)
def test_units_convert_exactly(text: object, dimension: Dimension, expected: float) -> None:
    assert parse_quantity(text, dimension) == expected


@pytest.mark.parametrize(
    ("text", "dimension", "codata"),
    [
        # CODATA 2018, not the constants of this package.
        ("1 Ha/bohr", FORCE, 51.42206747),
        ("1 kcal/mol/Å", FORCE, 4184 / 6.02214076e23 / 1.602176634e-19),
        ("1 kJ/mol/Å", FORCE, 1000 / 6.02214076e23 / 1.602176634e-19),
        ("1 bohr", LENGTH, 0.529177210903),
    ],
)
def test_conversions_agree_with_codata(text: str, dimension: Dimension, codata: float) -> None:
    assert parse_quantity(text, dimension) == pytest.approx(codata, rel=1e-6)


@pytest.mark.parametrize(
    "spelling",
    [
        "0.7 kcal/mol/Å",
        "0.7 kcal/mol/\N{ANGSTROM SIGN}",
        "0.7 kcal/mol/A\N{COMBINING RING ABOVE}",
        "0.7 kcal/(mol Å)",
        "0.7 kcal mol-1 Å-1",
        "0.7 kcal·mol⁻¹·Å⁻¹",
        "0.7kcal / mol / Angstrom",
    ],
)
def test_one_force_in_many_spellings(spelling: str) -> None:
    assert parse_quantity(spelling, FORCE) == parse_quantity("0.7 kcal/mol/A", FORCE)


@pytest.mark.parametrize(
    ("value", "dimension", "parts"),
    [
        ("0.03 Å", FORCE, ["is a length", "force", '"0.03 eV/Å"']),
        ("0.03 eV", FORCE, ["is an energy", "force"]),
        ("5 min", MEMORY, ["is a time", '"2 GB"']),
        ("25 °C", TEMPERATURE, ["not in kelvin", '"300 K"']),
        ("10 m", TIME, ['unknown unit "m"', '"min"']),
        ("2 G", MEMORY, ['"GB"']),
        ("30 MeV/Å", FORCE, ["unknown unit"]),
        ("0,03 eV/Å", FORCE, ["decimal comma", '"0.03 eV/Å"']),
        ("01:30:00", TIME, ["clock time", '"1.5 h"']),
        ("soon", TIME, ["does not start with a number", '"10 min"']),
        (True, TIME, ["is not a time"]),
        (None, LENGTH, ["is not a length"]),
        (math.nan, FORCE, ["not a finite number"]),
        ("1e999 s", TIME, ["not a finite number"]),
        (10**400, TIME, ["not a finite number"]),
    ],
)
def test_what_is_refused_says_what_to_write(
    value: object, dimension: Dimension, parts: list[str]
) -> None:
    with pytest.raises(QuantityError) as error:
        parse_quantity(value, dimension)
    for part in parts:
        assert part in str(error.value)


def test_memory_is_a_whole_number_of_bytes() -> None:
    assert parse_bytes("1.5 kB") == 1500
    assert isinstance(parse_bytes("1.5 kB"), int)


@pytest.mark.parametrize("seconds", [0.5, 45.0, 600.0, 5400.0, 172_800.0])
def test_a_written_time_reads_back(seconds: float) -> None:
    assert parse_quantity(format_seconds(seconds), TIME) == seconds


@pytest.mark.parametrize("size", [12, 1_500, 500_000_000, 2_000_000_000])
def test_a_written_size_reads_back(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size
