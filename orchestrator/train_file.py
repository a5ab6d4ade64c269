"""The training file: what a model learns from, what it is made of, how it is trained.

`load_training` reads the TOML and gives a frozen model, or raises one `CampaignError` that lists
every problem with its line, field, value and remedy. The fields of [model] and [training] are
those of `kernels.diffusion.egnn.ModelConfig` and `kernels.diffusion.training.TrainSettings`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Literal,
    TypeAlias,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BeforeValidator, Field, ValidationError, create_model

from kernels.diffusion.egnn import ModelConfig
from kernels.diffusion.training import OBJECTIVES, TrainSettings, check
from kernels.errors import KernelError
from orchestrator.errors import CampaignError
from orchestrator.molecules import expand
from orchestrator.quantities import TIME, Seconds, parse_quantity
from orchestrator.toml_file import (
    NAME_PATTERN,
    Location,
    Problems,
    Table,
    choose,
    default,
    keys_of,
    parse,
    read,
    show,
)

_OptionalSeconds: TypeAlias = Annotated[
    float | None,
    BeforeValidator(lambda value: value if value is None else parse_quantity(value, TIME)),
    TIME,
]
_Name: TypeAlias = Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$", max_length=100)]

# Worked out from the data where the file leaves it open, and always.
_OPEN: Final = "elements"
_FROM_DATA: Final = "size_histogram"


class DataTable(Table):
    """`[data]`: the geometries to learn from."""

    source: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        strict=False,
        min_length=1,
        examples=['["my.basin"]'],
        description="Basin stores (their relaxations), or files or glob patterns of .npz, .sdf, "
        ".xyz, .extxyz; relative to the training file. A molecule's part follows from the last "
        "number n in its name: n % 10 = 0 is validation, 1 is test and never used, the rest "
        "training",
    )
    stage: str | None = Field(
        default=None,
        json_schema_extra=default("the only one"),
        description="Stage of a store whose relaxed geometries are learnt",
    )
    level: str | None = Field(
        default=None,
        json_schema_extra=default("any"),
        description="Only relaxations at this level of theory",
    )
    connectivity_changed: bool = Field(
        default=False, description="Also learn relaxations that changed the bonds"
    )
    charge: int = Field(
        default=0, ge=-20, le=20, description="Total charge of .xyz frames that state none"
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=default("all"),
        description="Use only the first so many geometries",
    )


class RunTable(Table):
    """`[run]`: on what the training runs; nothing here changes what is learnt."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the network is computed; auto: cuda where there is one"
    )
    devices: int = Field(
        default=1, ge=1, le=1024, description="Processes that share each step, one GPU each"
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=default("all cores, shared by the processes"),
        description="Threads of each process",
    )
    save_every: Seconds = Field(default=60.0, gt=0, description="Longest time that a kill can cost")


def _table_of(
    name: str, kind: type[Any], optional: Sequence[str] = (), without: Sequence[str] = ()
) -> type[Table]:
    """A table whose fields are those of a dataclass, of the types, defaults and bounds there.

    ``optional`` fields are None when they are left out, whatever their default.
    """
    hints = get_type_hints(kind)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in without:
            continue
        about = dict(field.metadata)
        hint, key = hints[field.name], field.name
        if about.pop("unit", "") == "s":
            hint, key = _OptionalSeconds, key.removesuffix("_s")
        start: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            start = field.default_factory()
        if field.name in optional:
            hint, start = hint | None, None
        elif start is dataclasses.MISSING:
            start = ...
        if get_origin(hint) is tuple or any(get_origin(p) is tuple for p in get_args(hint)):
            about["strict"] = False  # a TOML list is a tuple here
        fields[key] = (hint, Field(default=start, **about))
    table: type[Table] = create_model(
        name, __base__=Table, __doc__=kind.__doc__, __module__=__name__, **fields
    )
    return table


if TYPE_CHECKING:
    # Made while the program runs, of which a type checker knows nothing.
    TrainingTable: TypeAlias = Table
    ModelTable: TypeAlias = Table
else:
    TrainingTable = _table_of("TrainingTable", TrainSettings)
    ModelTable = _table_of("ModelTable", ModelConfig, optional=[_OPEN], without=[_FROM_DATA])


class TrainFile(Table):
    """One training file, read and checked."""

    name: _Name = Field(description="Name of the model; checkpoints are named after it")
    output: Path = Field(
        json_schema_extra=default("<name>.training beside the training file"),
        description="Folder of everything the training writes, relative to the training file",
    )
    init_from: str | None = Field(
        default=None,
        json_schema_extra=default("none"),
        description="Checkpoint whose weights the training starts from: a file or a shipped name",
    )
    data: DataTable = Field(description="The geometries to learn from")
    model: ModelTable = Field(description="What the network is made of")
    training: TrainingTable = Field(description="How it is trained")
    run: RunTable = Field(default=RunTable(), description="On what it runs")
    path: Path = Field(description="The training file itself", exclude=True)

    def settings(self) -> TrainSettings:
        """[training] as the kernel takes it."""
        written = self.training.model_dump()
        names = {
            f.name: f.name.removesuffix("_s") if f.metadata.get("unit") == "s" else f.name
            for f in dataclasses.fields(TrainSettings)
        }
        return TrainSettings(**{name: written[key] for name, key in names.items()})

    def config(self, elements: Sequence[int], sizes: Mapping[int, int]) -> ModelConfig:
        """[model] as the kernel takes it.

        ``elements`` serve where the file leaves them open; ``sizes``: how many training
        molecules have so many atoms. Raises InputError for impossible settings.
        """
        written = self.model.model_dump()
        if written[_OPEN] is None:
            written[_OPEN] = tuple(elements)
        return ModelConfig(**written, size_histogram=dict(sizes))

    @property
    def first_weights(self) -> str | None:
        """Model whose weights the training starts from: its file, or a shipped name."""
        if self.init_from is None:
            return None
        beside = self.path.parent / self.init_from
        return str(beside) if beside.is_file() else self.init_from

    @property
    def elements(self) -> tuple[int, ...] | None:
        """Elements that the file names, as atomic numbers."""
        written: tuple[int, ...] | None = getattr(self.model, _OPEN)
        return written


_TABLES: Final[Mapping[str, type[Table]]] = {
    "data": DataTable,
    "model": ModelTable,
    "training": TrainingTable,
    "run": RunTable,
}
_REMEDIES: Final[Mapping[Location, str]] = {
    ("name",): 'is missing; write for example name = "my-model" at the top of the file',
    ("data",): 'is missing; write a [data] table with source = "my.basin"',
    ("data", "source"): 'is missing; write for example source = "my.basin"',
    ("training",): 'is missing; write a [training] table with epochs = 100, or max_time = "1 h"',
}


def load_training(path: Path) -> TrainFile:
    """The training described in a TOML file, checked, with defaults filled in.

    Raises CampaignError listing every problem found, each with file, line, field, value, what is
    wrong and what to write.
    """
    path = Path(path)
    text = read(path, "a training file")
    raw = parse(text, path)
    problems = Problems(path, text, raw, TrainFile, _TABLES, _REMEDIES)
    filled = _fill_in(raw, path, problems)
    found: TrainFile | None = None
    try:
        found = TrainFile.model_validate(filled)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.translate(detail)
    _check(raw, problems)
    problems.raise_if_any()
    assert found is not None
    try:
        config = found.config(found.elements or (1,), {})
    except KernelError as error:
        raise CampaignError(f"{path}: [model]: {error}") from None
    try:
        check(config, found.settings())
    except KernelError as error:
        raise CampaignError(f"{path}: [training] {error}") from None
    return found


def _fill_in(raw: dict[str, Any], path: Path, problems: Problems) -> dict[str, Any]:
    """A copy of the file's content with the defaults that depend on the rest of it."""
    filled = dict(raw)
    if "path" in filled:
        problems.add_value(
            ("path",), filled["path"], f"unknown key; {choose('path', keys_of(TrainFile))}"
        )
    filled["path"] = path.resolve()
    filled.setdefault("model", {})
    problems.single_tables(filled)
    data, model, name = raw.get("data"), raw.get("model"), raw.get("name")
    if isinstance(data, dict) and isinstance(data.get("source"), str):
        filled["data"] = {**data, "source": [data["source"]]}
    if isinstance(model, dict) and isinstance(model.get(_OPEN), list):
        filled["model"] = {**model, _OPEN: _atomic_numbers(model[_OPEN], problems)}
    output = raw.get("output", f"{name}.training" if isinstance(name, str) else "unnamed.training")
    if isinstance(output, str):
        try:
            output = expand(output)
        except ValueError as error:
            problems.add_value(("output",), output, str(error))
        filled["output"] = Path(os.path.normpath(path.resolve().parent / output))
    return filled


def _atomic_numbers(elements: list[Any], problems: Problems) -> list[Any]:
    """Elements as atomic numbers, where they are written as symbols."""
    from ase.data import atomic_numbers

    found: list[Any] = []
    for element in elements:
        if isinstance(element, str) and element not in atomic_numbers:
            problems.add_value(("model", _OPEN), element, "is not an element's symbol")
        found.append(atomic_numbers.get(element, 1) if isinstance(element, str) else element)
    return found


def _check(raw: Mapping[str, Any], problems: Problems) -> None:
    """Rules that the types do not tell."""
    training = raw.get("training")
    if not isinstance(training, dict):
        return
    objective = training.get("objective")
    if isinstance(objective, str) and objective not in OBJECTIVES:
        problems.add_value(
            ("training", "objective"),
            objective,
            f"is not an objective; {choose(objective, OBJECTIVES)}",
        )
    if "epochs" not in training and "max_time" not in training:
        problems.add(
            ("training",),
            '[training] does not say when to stop; write epochs = 100, or max_time = "1 h"',
        )


def describe_training() -> list[tuple[str, str, str]]:
    """Key, default and meaning of every field of [training], as the documentation lists them."""
    rows = []
    for field in dataclasses.fields(TrainSettings):
        key = field.name.removesuffix("_s") if field.metadata.get("unit") else field.name
        words = "none" if field.default is None else show(field.default)
        rows.append((key, words, str(field.metadata["description"])))
    return rows
