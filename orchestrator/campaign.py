"""The campaign file: what to compute, on which molecules, at which level, with which limits.

`load_campaign` reads the TOML and gives frozen models whose defaults are the published protocol,
or raises one `CampaignError` that lists every problem with its line, field, value and remedy.
`jobs/quickstart.toml` shows every field; `describe_fields` lists them for the documentation.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from kernels.diffusion import model_files
from kernels.errors import KernelError
from orchestrator.chain_stages import (
    DIFFUSION_STEPS,
    TEMPERATURES,
    ChainStage,
    DiffusionChainStage,
    GaussianChainStage,
    MetropolisStage,
    ReplicaExchangeStage,
)
from orchestrator.errors import CampaignError
from orchestrator.molecules import FORMATS, GEOMETRY_FORMATS, expand, file_format, match_files
from orchestrator.quantities import TEMPERATURE, Dimension, QuantityError, Seconds, parse_quantity
from orchestrator.stages import (
    DiffuseStage,
    EmbedStage,
    GenerateStage,
    MmffStage,
    Name,
    RehearseStage,
    RelaxStage,
    SinglePointsStage,
    StageBase,
    stem,
)
from orchestrator.toml_file import (
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
    flexible: bool = Field(
        default=False,
        description="Read only molecules without double and triple bonds and without rings, that "
        "have at most 15 branches in the SMILES with all hydrogens written out",
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


Stage: TypeAlias = (
    EmbedStage
    | MmffStage
    | RelaxStage
    | DiffuseStage
    | GenerateStage
    | SinglePointsStage
    | MetropolisStage
    | GaussianChainStage
    | ReplicaExchangeStage
    | DiffusionChainStage
    | RehearseStage
)

STAGES: Final[Mapping[str, type[Stage]]] = {
    "embed": EmbedStage,
    "mmff": MmffStage,
    "relax": RelaxStage,
    "diffuse": DiffuseStage,
    "generate": GenerateStage,
    "single_points": SinglePointsStage,
    "metropolis": MetropolisStage,
    "gaussian_chain": GaussianChainStage,
    "replica_exchange": ReplicaExchangeStage,
    "diffusion_chain": DiffusionChainStage,
    "rehearse": RehearseStage,
}
# What each begins with, where nothing else can be its origin.
_BEGINNINGS: Final[Mapping[str, str]] = {"embed": "the molecular graph", "generate": "noise"}
_CHAINS: Final = frozenset({"metropolis", "gaussian_chain", "replica_exchange", "diffusion_chain"})
# Nothing can start from their results, but single points from the frames of one chain.
_WITHOUT_GEOMETRIES: Final = frozenset({"single_points", *_CHAINS})
_ONE_CHAIN: Final = _CHAINS - {"replica_exchange"}
_WITH_MODELS: Final = frozenset({"diffuse", "generate", "diffusion_chain", "metropolis"})
_MOST_REPEATS: Final = 1000
_FROM_NOTHING: Final = frozenset({"generate", "rehearse"})
_NEED_GEOMETRIES: Final = frozenset({"mmff", "relax", "diffuse", "single_points", *_CHAINS})


class RunSettings(Table):
    """`[run]`: how the work is moved about; nothing here changes a result or its key."""

    bundle_time: Seconds = Field(
        default=10.0, gt=0, description="Estimated time of the items that travel together"
    )
    checkpoint_every: Seconds = Field(
        default=60.0,
        gt=0,
        description="Time between two saved states of a running relaxation or chain",
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
    pool: Name = Field(
        default="gpu", description="Pool of workers, as the site names them, that trains"
    )


class Campaign(Table):
    """One campaign file, read and checked."""

    name: Name = Field(description="Name of the campaign")
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

    A stage with a list of models, of n or of temperatures, or with repeats, becomes a stage for
    each, and so does every stage that starts from it. `with_models` false does not look for the
    models' files: enough for a reader.
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
        if not isinstance(earlier, dict) or _can_start(stage.get("kernel"), earlier.get("kernel"))
    ]
    if before and before[-1] and stage.get("kernel") not in _BEGINNINGS:
        filled.setdefault("from", before[-1])
    return filled


def _can_start(kernel: object, origin: object) -> bool:
    """Whether a stage can start from the results of another, by their kernels."""
    if origin in _ONE_CHAIN:
        return kernel == "single_points"
    return origin not in _WITHOUT_GEOMETRIES


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
        if len(set(map(stem, models))) < len(models) == len(set(map(str, models))):
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
        if at < index and _can_start(stage.get("kernel"), stages[at].get("kernel"))
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
        given = "chains" if stages[names[origin]].get("kernel") in _CHAINS else "energies"
        return f"this stage gives {given} and no geometry to start from; {choose('', fit)}"
    if origin in names:
        return f"a stage can only start from an earlier one: {either(fit)}"
    return f"no earlier stage has this name; {choose(origin, fit)}"


# Lists of models, of n and of temperatures, and repeats: a stage for each value, and for each that
# starts from one of those


@dataclass(frozen=True, slots=True)
class _Variant:
    """One stage out of one with lists: `suffix` is what its name has more than the file's.

    `values`: what it has of each of the lists, by field; of repeats, their number from 0.
    """

    name: str
    suffix: str
    from_: str | None
    values: dict[str, Any] = field(default_factory=dict)


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _written_out(stage: Mapping[str, Any], name: str) -> object:
    """A field that may be a list, with the default that is one."""
    defaults: dict[tuple[object, str], tuple[Any, ...]] = {
        ("metropolis", "temperatures"): TEMPERATURES,
        ("diffusion_chain", "n"): DIFFUSION_STEPS,
    }
    value = stage.get(name)
    if value is None and (stage.get("kernel"), name) in defaults:
        return list(defaults[stage.get("kernel"), name])
    return value


def _kelvins(value: object) -> str:
    """A temperature as part of a stage's name."""
    try:
        return f"{parse_quantity(value, TEMPERATURE):g}K"
    except QuantityError:
        return str(value)  # which is reported by itself


def _lists(stage: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Each field with a list of values, and what they add to the stage's name."""
    names: dict[str, Callable[[object], str]] = {"n": str, "model": stem}
    if stage.get("kernel") == "metropolis":
        names = {"temperatures": _kelvins, **names}
    for name, words in names.items():
        value = _written_out(stage, name)
        if isinstance(value, list):
            yield name, [(f"-{words(one)}", one) for one in value]
        elif value is not None:
            yield name, [("", value)]
    repeats = stage.get("repeats")
    if stage.get("kernel") not in _CHAINS or not isinstance(repeats, int):
        return
    # What is no such number is reported by itself.
    if 1 < repeats <= _MOST_REPEATS:
        yield "repeat", [(f"-r{k + 1}" if k else "", k) for k in range(repeats)]


def _combinations(stage: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every choice of one value from each list, and what it adds to the stage's name."""
    made: list[tuple[str, dict[str, Any]]] = [("", {})]
    for name, values in _lists(stage):
        made = [
            (suffix + more, {**chosen, name: value})
            for suffix, chosen in made
            for more, value in values
        ]
    return made


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
        variants = [
            _Variant(name + suffix + more, suffix + more, parent, values)
            for suffix, parent in chosen or [("", origin if isinstance(origin, str) else None)]
            for more, values in _combinations(fields)
        ]
        made.append(variants)
        for variant in variants:
            by_name.setdefault(variant.name, [variant])
        if [variant.name for variant in variants] != [name]:
            by_name[name] = variants
    return made


def _expand(campaign: Campaign, filled: Sequence[Any]) -> Campaign:
    """The campaign with a stage for each value of a list, and its models found."""
    stages: list[Stage] = []
    for stage, variants in zip(campaign.stages, _variants(filled), strict=True):
        for variant in variants:
            change: dict[str, Any] = {"name": variant.name, "from_": variant.from_}
            for name, value in variant.values.items():
                if name == "model":
                    change["model"] = (_model_place(str(value), campaign.path),)
                elif name == "temperatures":
                    change["temperatures"] = (parse_quantity(value, TEMPERATURE),)
                elif name == "n":
                    change["n"] = (value,)
            one: Stage = stage.model_copy(update=change)
            if isinstance(one, ChainStage):
                one = one.repeated(variant.values.get("repeat", 0))
            stages.append(one)
    return campaign.model_copy(update={"stages": tuple(stages)})


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
        if not isinstance(stage, dict) or stage.get("kernel") not in _WITH_MODELS:
            continue
        if stage["kernel"] == "metropolis" and not _proposes(index, stage, problems):
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
        for n in _as_list(_written_out(stage, "n")):
            short = [name for name, most in steps.items() if _is_count(n) and n > most]
            if short:
                problems.add_value(
                    ("stages", index, "n"),
                    n,
                    f"model {show(short[0])} has {steps[short[0]]} diffusion steps; give 1 to "
                    f"{steps[short[0]]} (20 to 50 relax a geometry)",
                )


def _proposes(index: int, stage: Mapping[str, Any], problems: _Problems) -> bool:
    """Whether a model makes proposals; what belongs to one stands there then, and only then."""
    wanted = stage.get("proposal") == "diffusion"
    required = {"model": '"qm9-edm"', "n": "20"}
    for name in (*required, "diffusion_share", "diffusion_moves"):
        location: Location = ("stages", index, name)
        if not wanted and name in stage:
            problems.add_value(
                location,
                stage[name],
                'belongs to proposal = "diffusion"; write that, or leave this line out',
            )
        elif wanted and name in required and stage.get(name) in (None, []):
            problems.add(
                location,
                f'{problems.field(location)} is missing; proposal = "diffusion" needs it, such as '
                f"{name} = {required[name]}",
            )
    return wanted


def _check_architecture(architecture: str, stage: Mapping[str, Any]) -> None:
    """Raises ValueError for a model that cannot do what the stage asks of it."""
    if architecture == "edm":
        return
    if stage["kernel"] == "generate":
        raise ValueError(
            f"is of architecture {architecture}, which begins with a geometry; molecules from "
            "noise need a model of architecture edm"
        )
    if stage["kernel"] not in ("diffuse", "diffusion_chain"):
        raise ValueError(
            f"is of architecture {architecture}, which predicts minima and no noise to propose "
            'moves with; choose a model of architecture edm, such as "qm9-edm"'
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
        for other in ("files", "split", "elements", "flexible", "every", "limit"):
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
        *_describe("stages.", StageBase),
    ]
    shared = set(StageBase.model_fields)
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
    float: "number",
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
