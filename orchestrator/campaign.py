"""The campaign file: what to compute, on which molecules, at which level, with which limits.

`load_campaign` reads the TOML and gives frozen models whose defaults are the published protocol,
or raises one `CampaignError` that lists every problem with its line, field, value and remedy.
`jobs/quickstart.toml` shows every field; `describe_fields` lists them for the documentation.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeAlias, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from kernels import calculators
from kernels.diffusion import GENERATION_VERSION, PROCESS_VERSION, model_files
from kernels.errors import KernelError
from orchestrator.errors import CampaignError
from orchestrator.molecules import FORMATS, GEOMETRY_FORMATS, expand, file_format, match_files
from orchestrator.quantities import (
    Bytes,
    Dimension,
    Force,
    Length,
    Seconds,
    Temperature,
)
from orchestrator.toml_file import (
    NAME_PATTERN,
    Location,
    Problems,
    Table,
    choose,
    default,
    dimension_of,
    either,
    in_units,
    key_of,
    keys_of,
    parse,
    read,
    show,
)

Setting: TypeAlias = str | int | float | bool | dict[str, str]

# Stands for the program not written in the file until the level is known.
_FIRST_PROGRAM: Final = "\0"

_Name: TypeAlias = Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$", max_length=100)]


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# One value, or a list of them, each of which gives a stage of its own.
_Models: TypeAlias = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_tuple)
]
_Counts: TypeAlias = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_tuple)]


class MoleculeSource(Table):
    """`[molecules]`: the files to read, and how."""

    files: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        strict=False,
        json_schema_extra=default("required, unless there are samples"),
        description="Files or glob patterns, relative to the campaign file: .smi, .csv, .sdf, "
        ".xyz, .extxyz, each of them also with .gz, and .npz with numbers and positions",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        json_schema_extra=default("none"),
        description="Instead of files: so many molecules are made from noise by a generate stage",
    )
    smiles_column: str = Field(
        default="smiles", min_length=1, description="Column of a .csv file that holds the SMILES"
    )
    name_column: str = Field(
        default="name",
        min_length=1,
        description="Column of a .csv file that holds the name; without such a column names are "
        "empty, unless it was asked for here",
    )
    charge: int = Field(
        default=0,
        ge=-20,
        le=20,
        description="Total charge of .xyz frames whose comment line has no charge= (in units of "
        "e); other formats carry their own",
    )
    multiplicity: int | None = Field(
        default=None,
        ge=1,
        le=20,
        json_schema_extra=default("the lowest possible: 1 or 2"),
        description="Spin multiplicity 2S+1 of .xyz frames whose comment line has no multiplicity=",
    )
    split: Literal["training", "validation", "test"] | None = Field(
        default=None,
        json_schema_extra=default("all"),
        description="Read only this part of a data set: by the last whole number n in the name, "
        "n % 10 = 0 is validation, 1 is test, the rest training",
    )
    elements: tuple[str, ...] = Field(
        default=(),
        strict=False,
        examples=['["H", "C", "N", "O"]'],
        json_schema_extra=default("all"),
        description="Read only molecules of these elements",
    )
    every: int = Field(
        default=1, ge=1, description="Read only the first of so many entries, and of the next ..."
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=default("all"),
        description="Read only the first so many entries, bad ones included",
    )

    @field_validator("elements")
    @classmethod
    def _known_elements(cls, elements: tuple[str, ...]) -> tuple[str, ...]:
        if not elements:
            return elements
        from ase.data import chemical_symbols

        for symbol in elements:
            if symbol not in chemical_symbols[1:]:
                raise ValueError(f'"{symbol}" is not the symbol of an element, such as "C" or "Cl"')
        return elements


class _StageBase(Table):
    name: _Name = Field(
        json_schema_extra=default("the kernel's name"),
        description="Name of the stage in tables and in `from`; unique in the file",
    )
    kernel: str = Field(description="What the stage computes")
    from_: str | None = Field(
        default=None,
        alias="from",
        json_schema_extra=default("the last stage before that makes geometries"),
        description="Name of an earlier stage whose geometries this one starts from; the first "
        "stage starts from the files, an embed stage from the molecular graph",
    )
    pool: _Name = Field(
        default="cpu", description="Pool of workers, as the site names them, that runs the stage"
    )
    time_limit: Seconds = Field(
        default=600.0, gt=0, description="Time after which one item is stopped and recorded"
    )
    memory_limit: Bytes = Field(
        default=2_000_000_000,
        ge=100_000_000,
        json_schema_extra=default("2 GB; 4 GB where a diffusion model is at work"),
        description="Memory that one item may use before it is stopped and recorded",
    )

    def settings(self) -> dict[str, Setting]:
        """Exactly what, beside the input, determines the result: this enters the task's key."""
        raise NotImplementedError

    def programs(self) -> dict[str, str]:
        """Programs that do the work and their installed versions, which enter the task's key.

        Raises CampaignError, with the command that installs it, for one that is missing.
        """
        raise NotImplementedError

    @property
    def kernel_version(self) -> int:
        """Version of the kernel's own code, which enters the task's key."""
        raise NotImplementedError

    def words(self) -> str:
        """What the stage does, in a few words for a person."""
        return self.kernel

    @property
    def frames(self) -> int:
        """Geometries that one item leaves behind."""
        return 1


class EmbedStage(_StageBase):
    """`kernel = "embed"`: three-dimensional geometries from the molecular graph (ETKDGv3)."""

    kernel: Literal["embed"]
    conformers: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="Geometries per molecule, each a task with a seed of its own",
    )
    max_attempts: int = Field(
        default=50,
        ge=1,
        le=100_000,
        description="Embedding attempts per geometry before it counts as failed",
    )

    def settings(self) -> dict[str, Setting]:
        """What determines one conformer.

        Their number is left out: asking for five later finds the first one done.
        """
        return {"max_attempts": self.max_attempts}

    def programs(self) -> dict[str, str]:
        """RDKit and its version."""
        return {"rdkit": _installed_version("rdkit", self.name)}

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.embedding`."""
        from kernels.embedding import VERSION

        return VERSION

    def words(self) -> str:
        """The method."""
        return "ETKDGv3"


class MmffStage(_StageBase):
    """`kernel = "mmff"`: force field minimisation, MMFF94 or, where it lacks parameters, UFF."""

    kernel: Literal["mmff"]
    max_steps: int = Field(
        default=2000,
        ge=1,
        le=10_000_000,
        description="Minimiser steps before the item counts as not converged",
    )

    def settings(self) -> dict[str, Setting]:
        """What determines the minimum found."""
        return {"max_steps": self.max_steps}

    def programs(self) -> dict[str, str]:
        """RDKit and its version."""
        return {"rdkit": _installed_version("rdkit", self.name)}

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.forcefield`."""
        from kernels.forcefield import VERSION

        return VERSION

    def words(self) -> str:
        """The force fields."""
        return "MMFF94, else UFF"


class _LevelStage(_StageBase):
    level: str = Field(default="GFN2-xTB", description="Level of theory")
    program: str = Field(
        default=_FIRST_PROGRAM,
        json_schema_extra=default("the level's first: tblite for GFN2-xTB"),
        description="Program that computes the level; never mixed inside a study, since programs "
        "differ in the last digits",
    )
    electronic_temperature: Temperature = Field(
        default=300.0,
        gt=0,
        le=20_000,
        description="Electronic temperature of the SCF; levels without an SCF ignore it",
    )
    save_forces: bool = Field(
        default=False, description="Also store the forces of every frame, in eV/Å"
    )

    @field_validator("level")
    @classmethod
    def _known_level(cls, level: str) -> str:
        if level not in calculators.levels():
            raise ValueError(f"is not a level of theory; {choose(level, calculators.levels())}")
        return level

    @field_validator("program", mode="before")
    @classmethod
    def _known_program(cls, program: object, info: ValidationInfo) -> object:
        programs = tuple(calculators.levels().get(info.data.get("level", ""), ()))
        if program == _FIRST_PROGRAM and programs:
            return programs[0]
        if isinstance(program, str) and programs and program not in programs:
            level = info.data["level"]
            raise ValueError(f"does not compute {level}; {choose(program, programs)}")
        return program

    def settings(self) -> dict[str, Setting]:
        """What determines energies and forces, with every default filled in.

        Units: electronic_temperature K.
        """
        settings: dict[str, Setting] = {
            "level": self.level,
            "program": self.program,
            "save_forces": self.save_forces,
        }
        if self.level not in _LEVELS_WITHOUT_SCF:
            settings["electronic_temperature"] = float(self.electronic_temperature)
        return settings

    def programs(self) -> dict[str, str]:
        """The program of the level and its version."""
        return {self.program: _installed_version(self.program, self.name)}


class RelaxStage(_LevelStage):
    """`kernel = "relax"`: relaxation at a level of theory with an ASE optimizer."""

    kernel: Literal["relax"]
    optimizer: Literal["BFGS", "LBFGS", "FIRE", "Sella"] = Field(
        default="BFGS", description="ASE optimizer; Sella searches a minimum here"
    )
    fmax: Force = Field(
        default=0.03,
        gt=0,
        le=1.0,
        description="The relaxation ends when no atom feels a larger force",
    )
    max_steps: int = Field(
        default=500,
        ge=1,
        le=10_000_000,
        description="Optimizer steps before the item counts as not converged",
    )
    max_step_length: Length = Field(
        default=0.2, gt=0, le=1.0, description="Longest move of an atom in one optimizer step"
    )
    initial_hessian: Literal["unit", "force-field"] = Field(
        default="unit",
        description="Where BFGS starts from: unit, as ASE and the published protocol, or the "
        "force field's Hessian, which needs far fewer steps",
    )

    @field_validator("initial_hessian")
    @classmethod
    def _needs_bfgs(cls, hessian: str, info: ValidationInfo) -> str:
        optimizer = info.data.get("optimizer", "BFGS")
        if hessian != "unit" and optimizer != "BFGS":
            raise ValueError(
                f'needs optimizer = "BFGS"; {optimizer} keeps no Hessian that could be given'
            )
        return hessian

    def settings(self) -> dict[str, Setting]:
        """What determines the relaxed geometry and the frames kept, with every default filled in.

        Units: fmax eV/Å, max_step_length Å, electronic_temperature K.
        """
        settings: dict[str, Setting] = {
            **super().settings(),
            "optimizer": self.optimizer,
            "fmax": float(self.fmax),
            "max_steps": self.max_steps,
            "max_step_length": float(self.max_step_length),
        }
        if self.initial_hessian != "unit":
            # Left out otherwise, so that results from before there was a choice keep their keys.
            settings["initial_hessian"] = self.initial_hessian
        return settings

    def programs(self) -> dict[str, str]:
        """The program of the level, and Sella where it is the optimizer, with their versions."""
        versions = super().programs()
        if self.initial_hessian == "force-field":
            versions["rdkit"] = _installed_version("rdkit", self.name)
        if self.optimizer == "Sella":
            versions["sella"] = _installed_version("sella", self.name)
        return versions

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.relaxation`."""
        from kernels.relaxation import VERSION

        return VERSION

    def words(self) -> str:
        """Level, program, optimizer and where it ends."""
        hessian = ", force field's Hessian" if self.initial_hessian != "unit" else ""
        return f"{self.level}/{self.program}, {self.optimizer} to {self.fmax:g} eV/Å{hessian}"


class _ModelStage(_StageBase):
    memory_limit: Bytes = Field(
        default=4_000_000_000,
        ge=500_000_000,
        description="Memory that a batch of items may use before its items are run alone",
    )
    model: _Models = Field(
        min_length=1,
        examples=['["first.safetensors", "second.safetensors"]'],
        description="Diffusion model: the name of a shipped one, or a .safetensors file, relative "
        "to the campaign file; a list gives a stage for each, named with the file's stem",
    )

    @field_validator("model")
    @classmethod
    def _no_model_twice(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _no_repeats(values)

    @property
    def model_name(self) -> str:
        """The model's name: the shipped one's, or the file's stem."""
        return _stem(self.model[0])

    def model_digest(self) -> str:
        """SHA-256 of the model file; raises CampaignError where it cannot be read."""
        return _model_digest(self.model[0], self.name)

    def programs(self) -> dict[str, str]:
        """None: the model's file stands for what computes, whatever torch runs it."""
        return {}


class DiffuseStage(_ModelStage):
    """`kernel = "diffuse"`: the last n steps of a diffusion model's process, from a geometry."""

    kernel: Literal["diffuse"]
    n: _Counts = Field(
        min_length=1,
        examples=["[20, 50]"],
        description="Diffusion steps; a list gives a stage for each number, named with it",
    )
    protocol: Literal["deterministic", "published"] = Field(
        default="deterministic",
        description="deterministic: no noise is added and elements are held; published: as in "
        "Rothchild et al. (2024), noise included",
    )

    @field_validator("n")
    @classmethod
    def _no_number_twice(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        return _no_repeats(values)

    def settings(self) -> dict[str, Setting]:
        """What determines a path: the model by its digest, n and the protocol."""
        return {"model": self.model_digest(), "n": self.n[0], "protocol": self.protocol}

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.diffusion.process`."""
        return PROCESS_VERSION

    def words(self) -> str:
        """Model, steps and protocol."""
        return f"{self.model_name}, n = {self.n[0]}, {self.protocol}"

    @property
    def frames(self) -> int:
        """The start, and one for each step."""
        return self.n[0] + 1


class GenerateStage(_ModelStage):
    """`kernel = "generate"`: molecules from pure noise, by the whole process of a model."""

    kernel: Literal["generate"]
    save_every: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="Diffusion steps between two frames that are stored; the last always is",
    )

    def settings(self) -> dict[str, Setting]:
        """What determines a molecule, and the frames kept: the model by its digest."""
        return {"model": self.model_digest(), "save_every": self.save_every}

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.diffusion.generation`."""
        return GENERATION_VERSION

    def words(self) -> str:
        """Model."""
        return f"{self.model_name}, from noise"

    @property
    def frames(self) -> int:
        """The noise, and what is kept of the steps."""
        return model_files.read_header(model_files.find(self.model[0])).steps // self.save_every + 1


class SinglePointsStage(_LevelStage):
    """`kernel = "single_points"`: energies of every frame of a diffusion path, or of a geometry."""

    kernel: Literal["single_points"]
    line: bool = Field(
        default=False,
        description="Also compute the energies on the straight line from the first of the frames "
        "to the last, at as many points",
    )

    def settings(self) -> dict[str, Setting]:
        """What determines the energies."""
        return {**super().settings(), "line": self.line}

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.single_points`."""
        from kernels.single_points import VERSION

        return VERSION

    def words(self) -> str:
        """Level and program."""
        return f"{self.level}/{self.program}, every frame"


class RehearseStage(_StageBase):
    """`kernel = "rehearse"`: no chemistry; time spent and faults made as asked.

    For trying out a site, a time limit or a campaign's size before the real stages run there.
    """

    kernel: Literal["rehearse"]
    conformers: int = Field(
        default=1, ge=1, le=10_000, description="Items per molecule, where the stage is the first"
    )
    seconds: Seconds = Field(default=0.0, ge=0, description="Time that each item takes")
    busy: bool = Field(default=False, description="Compute for that time, instead of sleeping")
    faults: dict[str, Literal["segfault", "exit", "hang", "memory", "error"]] = Field(
        default={},
        json_schema_extra=default("{}"),
        description="What goes wrong with which molecule, by canonical SMILES",
    )

    def settings(self) -> dict[str, Setting]:
        """Everything there is to set."""
        faults = {smiles: str(fault) for smiles, fault in self.faults.items()}
        return {"seconds": float(self.seconds), "busy": self.busy, "faults": faults}

    def programs(self) -> dict[str, str]:
        """None: nothing is computed."""
        return {}

    @property
    def kernel_version(self) -> int:
        """Version of the rehearsal."""
        return 1


Stage: TypeAlias = (
    EmbedStage
    | MmffStage
    | RelaxStage
    | DiffuseStage
    | GenerateStage
    | SinglePointsStage
    | RehearseStage
)

STAGES: Final[Mapping[str, type[Stage]]] = {
    "embed": EmbedStage,
    "mmff": MmffStage,
    "relax": RelaxStage,
    "diffuse": DiffuseStage,
    "generate": GenerateStage,
    "single_points": SinglePointsStage,
    "rehearse": RehearseStage,
}
# What each begins with, where nothing else can be its origin.
_BEGINNINGS: Final[Mapping[str, str]] = {"embed": "the molecular graph", "generate": "noise"}
# Nothing can start from their results.
_WITHOUT_GEOMETRIES: Final = frozenset({"single_points"})
_FROM_NOTHING: Final = frozenset({"generate", "rehearse"})
_NEED_GEOMETRIES: Final = frozenset({"mmff", "relax", "diffuse", "single_points"})
_LEVELS_WITHOUT_SCF: Final = frozenset({"MMFF94"})


class RunSettings(Table):
    """`[run]`: how the work is moved about; nothing here changes a result or its key."""

    bundle_time: Seconds = Field(
        default=10.0, gt=0, description="Estimated time of the items that travel together"
    )
    checkpoint_every: Seconds = Field(
        default=60.0, gt=0, description="Time between two saved states of a running relaxation"
    )
    seal_every: Seconds = Field(
        default=30.0, gt=0, description="Longest time a finished row waits to be on disk"
    )
    window: int = Field(default=2, ge=1, le=1000, description="Bundles queued per worker")
    crash_limit: int = Field(
        default=2, ge=1, le=100, description="Crashes after which an item is set aside for good"
    )


class TrainSettings(Table):
    """`[train]`: a model that learns from the finished campaign, as one task of a pool."""

    file: str = Field(
        min_length=1,
        description="Training file, relative to the campaign file; its data may be this store",
    )
    pool: _Name = Field(
        default="gpu", description="Pool of workers, as the site names them, that trains"
    )


class Campaign(Table):
    """One campaign file, read and checked."""

    name: _Name = Field(description="Name of the campaign")
    store: Path = Field(
        json_schema_extra=default("<name>.basin beside the campaign file"),
        description="Folder of the results, relative to the campaign file; ~ and $VARIABLES are "
        "expanded",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Root of all random streams; the same seed gives the same results",
    )
    molecules: MoleculeSource = Field(description="Where the molecules come from")
    stages: tuple[Annotated[Stage, Field(discriminator="kernel")], ...] = Field(
        strict=False, min_length=1, description="What is done to each molecule, in order"
    )
    run: RunSettings = Field(default=RunSettings(), description="How the work is moved about")
    train: TrainSettings | None = Field(
        default=None,
        json_schema_extra=default("none"),
        description="The model that is trained when all stages are done",
    )
    path: Path = Field(description="The campaign file itself", exclude=True)

    @property
    def training_file(self) -> Path:
        """The training file that [train] names; only where there is a [train]."""
        assert self.train is not None
        return Path(os.path.normpath(self.path.parent / expand(self.train.file)))

    @property
    def pools(self) -> set[str]:
        """Every pool that does some of the work."""
        pools = {stage.pool for stage in self.stages}
        return pools if self.train is None else pools | {self.train.pool}

    def stage(self, name: str) -> Stage:
        """The stage of that name; raises CampaignError naming the nearest."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise CampaignError(f'{self.path}: there is no stage "{name}"; {choose(name, names)}')


def load_campaign(path: Path, *, with_models: bool = True) -> Campaign:
    """The campaign in a TOML file, checked, with paths made absolute and defaults filled in.

    A stage with a list of models or of n becomes a stage for each, and so does every stage that
    starts from it. `with_models` false does not look for the models' files: enough for a reader.
    Raises CampaignError listing every problem found, each with file, line, field, value, what is
    wrong and what to write.
    """
    path = Path(path)
    text = read(path, "a campaign file")
    raw = parse(text, path)
    problems = _Problems(path, text, raw, Campaign, _TABLES, _remedies())
    filled = _fill_in(raw, path, problems)
    campaign: Campaign | None = None
    try:
        campaign = Campaign.model_validate(filled)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.translate(detail)
    _check_tree(raw, problems)
    _check_sources(raw, path, problems)
    _check_training(raw, path, problems)
    if with_models:
        _check_models(raw, path, problems)
    problems.raise_if_any()
    assert campaign is not None
    return _expand(campaign, filled["stages"])


class _Problems(Problems):
    """The problems of a campaign file, whose stages are of several kinds."""

    def field(self, location: Location) -> str:
        """A field as a person would call it: `[run] window`, `stage 2 (gfn2): fmax`."""
        if location[:1] == ("stages",) and len(location) > 1:
            names = [str(part) for part in location[1:] if isinstance(part, str)]
            return f"{self._stage(location)}: {'.'.join(names)}".rstrip(": ")
        return super().field(location)

    def _stage(self, location: Location) -> str:
        index = int(location[1])
        stages = self.raw.get("stages")
        stage = stages[index] if isinstance(stages, list) and index < len(stages) else {}
        name = _stage_name(stage)
        return f"stage {index + 1} ({name})" if name else f"stage {index + 1}"

    def translate(self, detail: Mapping[str, Any]) -> None:
        """One error of the validator, in plain words."""
        kind: str = detail["type"]
        location = self.file_location(detail["loc"])
        value: object = self.written(location, detail["input"])
        if kind == "union_tag_not_found":
            self.add(location, f"{self.field(location)}: kernel is missing; {_kernels()}")
        elif kind == "union_tag_invalid":
            kernel = value.get("kernel") if isinstance(value, dict) else value
            self.add_value(
                (*location, "kernel"), kernel, f"is not a kernel; {choose(str(kernel), STAGES)}"
            )
        elif kind == "too_short" and location == ("stages",) and not value:
            self.add(location, f"stages: there is none; {_kernels()}")
        else:
            super().translate(detail)

    def file_location(self, location: Location) -> Location:
        """The validator's location without the kernel it puts after a stage's number."""
        if location[:1] == ("stages",) and len(location) > 2 and location[2] in STAGES:
            return (*location[:2], *location[3:])
        return location

    def model_of(self, location: Location) -> type[BaseModel] | None:
        """The model of the table that holds a field, from the validator's location."""
        if location[0] == "stages" and len(location) > 1:
            return STAGES.get(str(location[2])) if len(location) > 3 else None
        return super().model_of(location)

    def valid_keys(self, table: Location) -> list[str]:
        """Keys that a table may have."""
        if table[:1] == ("stages",) and len(table) == 2:
            return keys_of(STAGES[self.raw["stages"][table[1]]["kernel"]])
        return super().valid_keys(table)

    def all_keys(self) -> Iterator[tuple[str, list[str]]]:
        """Every kind of table, in words, with its keys."""
        yield from super().all_keys()
        for kernel, model in STAGES.items():
            yield f'in a [[stages]] table with kernel = "{kernel}"', keys_of(model)


_TABLES: Final[Mapping[str, type[Table]]] = {
    "molecules": MoleculeSource,
    "run": RunSettings,
    "train": TrainSettings,
}


def _kernels() -> str:
    return f"write [[stages]] with kernel = {either(STAGES)}"


def _remedies() -> dict[Location, str]:
    return {
        ("name",): 'is missing; write for example name = "my-campaign" at the top of the file',
        ("molecules",): 'is missing; write a [molecules] table with files = ["my.smi"]',
        ("stages",): f"is missing; {_kernels()}",
        ("train", "file"): 'is missing; write for example file = "my-model.toml"',
    }


# What the file leaves out, and rules that span several fields


def _stage_name(stage: object) -> str:
    if not isinstance(stage, dict):
        return ""
    name = stage.get("name", stage.get("kernel"))
    return name if isinstance(name, str) else ""


def _fill_in(raw: dict[str, Any], path: Path, problems: _Problems) -> dict[str, Any]:
    """A copy of the file's content with the defaults that depend on the rest of it."""
    filled = dict(raw)
    if "path" in filled:
        problems.add_value(
            ("path",), filled["path"], f"unknown key; {choose('path', keys_of(Campaign))}"
        )
    filled["path"] = path.resolve()
    stages = raw.get("stages")
    if isinstance(stages, dict):
        problems.add(("stages",), "[stages]: write [[stages]], with two brackets on each side")
        stages = [stages]
    if isinstance(stages, list):
        filled["stages"] = [_fill_in_stage(stages, i) for i in range(len(stages))]
    problems.single_tables(filled)
    name = raw.get("name")
    store = raw.get("store", f"{name}.basin" if isinstance(name, str) else "unnamed.basin")
    if isinstance(store, str):
        filled["store"] = _store_path(store, path, problems)
    return filled


def _store_path(store: str, path: Path, problems: _Problems) -> Path:
    try:
        expanded = expand(store)
    except ValueError as error:
        problems.add_value(("store",), store, str(error))
        expanded = "unknown"
    if not store.strip():
        problems.add_value(("store",), store, "is empty; name a folder, or leave the line out")
    return Path(os.path.normpath(path.resolve().parent / expanded))


def _fill_in_stage(stages: Sequence[Any], index: int) -> Any:
    stage = stages[index]
    if not isinstance(stage, dict):
        return stage
    filled = dict(stage)
    if _stage_name(stage):
        filled.setdefault("name", _stage_name(stage))
    before = [
        _stage_name(earlier)
        for earlier in stages[:index]
        if not (isinstance(earlier, dict) and earlier.get("kernel") in _WITHOUT_GEOMETRIES)
    ]
    if before and before[-1] and stage.get("kernel") not in _BEGINNINGS:
        filled.setdefault("from", before[-1])
    return filled


def _check_tree(raw: Mapping[str, Any], problems: _Problems) -> None:
    """Names are unique, lists written out, and every stage starts from an earlier one."""
    stages = raw.get("stages")
    if not isinstance(stages, list):
        return
    seen: dict[str, int] = {}
    filled = [_fill_in_stage(stages, index) for index in range(len(stages))]
    made = _variants(filled)
    for index, stage in enumerate(stages):
        names = list(dict.fromkeys(variant.name for variant in made[index]))
        twice = [name for name in names if name in seen]
        if twice:
            first = seen[twice[0]]
            problems.add(
                ("stages", index),
                f'stage {index + 1}: name = "{twice[0]}": stage {first + 1} (line '
                f"{problems.line(('stages', first))}) has this name too; give one of them another, "
                f'such as name = "{_stage_name(stage)}-2"',
            )
        models = _as_list(stage.get("model")) if isinstance(stage, dict) else []
        # The same file twice is reported by itself.
        if len(set(map(_stem, models))) < len(models) == len(set(map(str, models))):
            problems.add_value(
                ("stages", index, "model"),
                models,
                "two of these files have the same name, after which the stages would be named; "
                "rename one",
            )
        seen.update((name, index) for name in names if name and name not in seen)
        origin = stage.get("from") if isinstance(stage, dict) else None
        if isinstance(origin, str):
            what = _wrong_origin(origin, stage, index, filled, made)
            if what:
                problems.add_value(("stages", index, "from"), origin, what)


def _wrong_origin(
    origin: str,
    stage: Mapping[str, Any],
    index: int,
    stages: Sequence[Any],
    made: Sequence[Sequence[_Variant]],
) -> str | None:
    names: dict[str, int] = {}
    for at, variants in enumerate(made):
        for name in (_stage_name(stages[at]), *(variant.name for variant in variants)):
            if name:
                names.setdefault(name, at)
    fit = [
        name
        for name, at in names.items()
        if at < index and stages[at].get("kernel") not in _WITHOUT_GEOMETRIES
    ]
    if (kernel := str(stage.get("kernel"))) in _BEGINNINGS:
        article = "an" if kernel == "embed" else "a"
        return (
            f"{article} {kernel} stage starts from {_BEGINNINGS[kernel]} alone; leave the line out"
        )
    if origin in fit:
        return None
    if not fit:
        return "the first stage starts from the files; leave the line out"
    if origin in names and names[origin] < index:
        return f"this stage gives energies and no geometry to start from; {choose('', fit)}"
    if origin in names:
        return f"a stage can only start from an earlier one: {either(fit)}"
    return f"no earlier stage has this name; {choose(origin, fit)}"


# Lists of models and of n: a stage for each value, and for each that starts from one of those


@dataclass(frozen=True, slots=True)
class _Variant:
    """One stage out of one with lists: `suffix` is what its name has more than the file's."""

    name: str
    suffix: str
    from_: str | None
    n: object
    model: object


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _stem(model: object) -> str:
    """A model's name as part of a stage's: its file's stem, in the letters that names have."""
    name = Path(str(model)).name.removesuffix(model_files.SUFFIX)
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def _variants(stages: Sequence[Any]) -> list[list[_Variant]]:
    """What becomes of each stage of the file, whose defaults are filled in."""
    made: list[list[_Variant]] = []
    by_name: dict[str, list[_Variant]] = {}
    for stage in stages:
        fields = stage if isinstance(stage, dict) else {}
        name, origin = _stage_name(stage), fields.get("from")
        # A parent named with its suffix is that one alone, and passes on no suffix.
        parents = by_name.get(origin, []) if isinstance(origin, str) else []
        chosen: list[tuple[str, str | None]] = [
            (v.suffix if origin != v.name else "", v.name) for v in parents
        ]
        variants = []
        for suffix, parent in chosen or [("", origin if isinstance(origin, str) else None)]:
            for n in _as_list(fields.get("n")):
                for model in _as_list(fields.get("model")):
                    more = f"-{n}" if isinstance(fields.get("n"), list) else ""
                    more += f"-{_stem(model)}" if isinstance(fields.get("model"), list) else ""
                    variants.append(_Variant(name + suffix + more, suffix + more, parent, n, model))
        made.append(variants)
        for variant in variants:
            by_name.setdefault(variant.name, [variant])
        if len(variants) != 1:
            by_name[name] = variants
    return made


def _expand(campaign: Campaign, filled: Sequence[Any]) -> Campaign:
    """The campaign with a stage for each value of a list, and its models found."""
    stages: list[Stage] = []
    for stage, variants in zip(campaign.stages, _variants(filled), strict=True):
        for variant in variants:
            change: dict[str, Any] = {"name": variant.name, "from_": variant.from_}
            if isinstance(stage, DiffuseStage):
                change["n"] = (variant.n,)
            if isinstance(stage, DiffuseStage | GenerateStage):
                change["model"] = (_model_place(str(variant.model), campaign.path),)
            stages.append(stage.model_copy(update=change))
    return campaign.model_copy(update={"stages": tuple(stages)})


def _no_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for at, value in enumerate(values) if value in values[:at]]
    if twice:
        raise ValueError(f"holds {show(twice[0])} twice; keep one")
    return values


# Diffusion models


def _model_place(model: str, path: Path) -> str:
    """A shipped model's name as it is, since every machine has it elsewhere; a file's full path."""
    if model in model_files.shipped():
        return model
    return os.path.normpath(path.resolve().parent / expand(model))


def _check_models(raw: Mapping[str, Any], path: Path, problems: _Problems) -> None:
    """Every model is there, can be read, and has as many steps as are asked of it."""
    stages = raw.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict) or stage.get("kernel") not in ("diffuse", "generate"):
            continue
        steps: dict[str, int] = {}
        for model in _as_list(stage.get("model")):
            if isinstance(model, str) and model:
                try:
                    header = _model_header(model, path)
                    _check_architecture(header.architecture, stage)
                    steps[model] = header.steps
                except ValueError as error:
                    problems.add_value(("stages", index, "model"), model, str(error))
        for n in _as_list(stage.get("n")):
            short = [name for name, most in steps.items() if _is_count(n) and n > most]
            if short:
                problems.add_value(
                    ("stages", index, "n"),
                    n,
                    f"model {show(short[0])} has {steps[short[0]]} diffusion steps; give 1 to "
                    f"{steps[short[0]]} (20 to 50 relax a geometry)",
                )


def _check_architecture(architecture: str, stage: Mapping[str, Any]) -> None:
    """Raises ValueError for a model that begins with geometries where it must begin with noise."""
    if architecture == "edm":
        return
    if stage["kernel"] == "generate":
        raise ValueError(
            f"is of architecture {architecture}, which begins with a geometry; molecules from "
            "noise need a model of architecture edm"
        )
    if stage.get("protocol") == "published":
        raise ValueError(
            f"is of architecture {architecture}, which predicts minima and no noise; leave "
            'protocol = "published" out, or choose a model of architecture edm'
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _model_header(model: str, path: Path) -> model_files.Header:
    """What a model's header says; raises ValueError with what to write instead."""
    shipped = model_files.shipped()
    try:
        place = _model_place(model, path)
        return model_files.read_header(model_files.find(place))
    except KernelError as error:
        if Path(place).exists():
            raise ValueError(str(error).removeprefix(f"model {place!r} ")) from None
    if model.endswith(model_files.SUFFIX) or os.sep in model:
        folder = Path(place).parent
        names = sorted(file.name for file in folder.glob(f"*{model_files.SUFFIX}"))
        near = difflib.get_close_matches(Path(place).name, names, n=3, cutoff=0.4) or names[:5]
        there = f"; {folder} holds {', '.join(near)}" if near else ""
        raise ValueError(f"there is no such file {place}{there}")
    if not shipped:
        raise ValueError(
            "this installation comes with no models; give the path of a .safetensors file, as "
            "`basin train` and `basin model import` write it"
        )
    raise ValueError(
        f"is no model that comes with Basin; {choose(model, shipped)} Or give the path of a "
        ".safetensors file"
    )


def _model_digest(model: str, stage: str) -> str:
    try:
        file = model_files.find(model)
        status = file.stat()
        return _digest_of(str(file), status.st_mtime_ns, status.st_size)
    except (KernelError, OSError) as error:
        raise CampaignError(f'stage "{stage}": model: {error}') from None


@lru_cache(maxsize=64)
def _digest_of(file: str, modified_ns: int, size: int) -> str:
    return model_files.digest(file)


def _check_training(raw: Mapping[str, Any], path: Path, problems: _Problems) -> None:
    """The training file is there; what it says is looked at when a run begins."""
    train = raw.get("train")
    file = train.get("file") if isinstance(train, dict) else None
    if not isinstance(file, str) or not file:
        return
    try:
        place = path.resolve().parent / expand(file)
    except ValueError as error:
        problems.add_value(("train", "file"), file, str(error))
        return
    if not place.is_file():
        problems.add_value(("train", "file"), file, f"there is no such file in {place.parent}")


def _check_sources(raw: Mapping[str, Any], path: Path, problems: _Problems) -> None:
    """Every named file has a known format, and one with geometries if no stage makes them."""
    source, stages = raw.get("molecules"), raw.get("stages")
    if not isinstance(source, dict):
        return
    _check_beginnings(source, stages, problems)
    files = source.get("files")
    if files == []:
        what = 'is empty; write for example ["first.smi", "second.smi"]'
        problems.add_value(("molecules", "files"), files, what)
    if not isinstance(files, list):
        return
    first = stages[0] if isinstance(stages, list) and stages else None
    kernel = first.get("kernel") if isinstance(first, dict) else None
    for pattern in files:
        if not isinstance(pattern, str) or not pattern:
            continue
        location: Location = ("molecules", "files")
        try:
            formats = _formats(pattern, path)
        except ValueError as error:
            problems.add_value(location, pattern, str(error))
            continue
        if unknown := [name for name, known in formats.items() if known is None]:
            problems.add_value(
                location,
                unknown[0],
                f"is of no known format; use {', '.join(FORMATS)}, each also with .gz",
            )
        flat = [n for n, known in formats.items() if known and known not in GEOMETRY_FORMATS]
        if flat and kernel in _NEED_GEOMETRIES:
            problems.add_value(
                location,
                flat[0],
                f'holds no geometry for {problems.field(("stages", 0))}, kernel "{kernel}", to '
                f'start from; put a [[stages]] with kernel = "embed" before it, or give '
                f"files of {', '.join(GEOMETRY_FORMATS)}",
            )


def _check_beginnings(source: Mapping[str, Any], stages: object, problems: _Problems) -> None:
    """Molecules come from files or from noise, and so do the stages that begin."""
    samples = source.get("samples")
    if samples is None:
        strangers = [key for key in source if key not in keys_of(MoleculeSource)]
        if "files" not in source and not difflib.get_close_matches("files", strangers, n=1):
            problems.add(
                ("molecules", "files"),
                '[molecules] files is missing; write for example files = ["my.smi"] (or samples = '
                "100, and a generate stage)",
            )
    else:
        for other in ("files", "split", "elements", "every", "limit"):
            if other in source:
                problems.add_value(
                    ("molecules", "samples"),
                    samples,
                    f"molecules made from noise are read from nowhere; leave {other} out",
                )
    for index, stage in enumerate(stages if isinstance(stages, list) else []):
        if not isinstance(stage, dict) or not _stage_name(stage):
            continue
        location: Location = ("stages", index, "kernel")
        kernel = stage.get("kernel")
        if kernel == "generate" and samples is None:
            problems.add_value(
                location,
                kernel,
                "makes molecules of its own; write samples = 100 in [molecules], instead of files",
            )
        begins = index == 0 or kernel in _BEGINNINGS
        if samples is not None and begins and kernel in STAGES and kernel not in _FROM_NOTHING:
            problems.add_value(
                location,
                kernel,
                'there are no molecules to begin with; put a [[stages]] with kernel = "generate" '
                "first, or give files instead of samples",
            )


def _formats(pattern: str, path: Path) -> dict[str, str | None]:
    """Format of what a pattern names; the files are looked at only if its ending is open."""
    known = file_format(pattern)
    if known is not None or not set("*?[") & set(Path(pattern).name):
        return {pattern: known}
    return {str(file): file_format(str(file)) for file in match_files(pattern, path.parent)}


# What is installed


def _installed_version(program: str, stage: str) -> str:
    try:
        return calculators.program_version(program)
    except KernelError as error:
        raise CampaignError(f'stage "{stage}": {error}') from None


# The table of fields


@dataclass(frozen=True, slots=True)
class FieldDescription:
    """One field of the campaign file, as the documentation lists it."""

    path: str
    type: str
    unit: str
    default: str
    description: str


def describe_fields() -> list[FieldDescription]:
    """Every field of the campaign file in its order, with type, unit, default and description.

    Fields that only one kernel has are written `stages[relax].fmax`.
    """
    fields = [
        *_describe("", Campaign, skip={"path", "molecules", "stages", "run", "train"}),
        *_describe("molecules.", MoleculeSource),
        *_describe("stages.", _StageBase),
    ]
    shared = set(_StageBase.model_fields)
    for kernel, model in STAGES.items():
        fields += _describe(f"stages[{kernel}].", model, skip=shared)
    return [*fields, *_describe("run.", RunSettings), *_describe("train.", TrainSettings)]


def _describe(
    prefix: str, model: type[Table], skip: Iterable[str] = ()
) -> Iterator[FieldDescription]:
    for name, info in model.model_fields.items():
        if name in skip:
            continue
        dimension = dimension_of(info)
        yield FieldDescription(
            path=prefix + key_of(name, info),
            type=either(STAGES) if name == "kernel" else _type_words(info, dimension),
            unit=dimension.unit if dimension else "",
            default=_default_words(info, dimension),
            description=info.description or "",
        )


def _type_words(info: FieldInfo, dimension: Dimension | None) -> str:
    if dimension is not None:
        return dimension.name
    return _annotation_words(info.annotation)


_TYPE_WORDS: Final[Mapping[Any, str]] = {
    str: "text",
    int: "whole number",
    bool: "true or false",
    Path: "path",
}


def _annotation_words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return either(get_args(annotation))
    if origin is Annotated:
        return _annotation_words(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return _annotation_words(next(a for a in get_args(annotation) if a is not type(None)))
    if origin is tuple:
        return f"list of {_annotation_words(get_args(annotation)[0])}"
    if origin is dict:
        return "table of names"
    return _TYPE_WORDS[annotation]


def _default_words(info: FieldInfo, dimension: Dimension | None) -> str:
    if isinstance(info.json_schema_extra, dict):
        return str(info.json_schema_extra["default"])
    if info.is_required():
        return "required"
    if dimension is not None:
        return in_units(info.default, dimension)
    return show(info.default)
