"""The user's site file: a machine in a few lines of TOML, on top of a known one.

Values at the top hold for all pools, those in [pools.NAME] for that pool; `base` names the machine
whose values are the defaults. `load_site_file` gives the settings that `site_configs` works from,
or one SiteError that lists every problem with file, line, field, value and remedy.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from orchestrator.errors import CampaignError, SiteError
from orchestrator.quantities import MEMORY, TIME, parse_bytes, parse_quantity
from orchestrator.toml_file import (
    NAME_PATTERN,
    Location,
    Problems,
    Table,
    choose,
    keys_of,
    parse,
    read,
)
from site_configs.support.settings import (
    DriverJob,
    PoolSettings,
    Settings,
    SiteSettings,
    Unit,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

ENVIRONMENT: Final = (
    "account",
    "partition",
    "queue",
    "qos",
    "constraint",
    "walltime",
    "cores_per_node",
)

_OptionalSeconds: TypeAlias = Annotated[
    float | None,
    BeforeValidator(lambda value: value if value is None else parse_quantity(value, TIME)),
    TIME,
]
_OptionalBytes: TypeAlias = Annotated[
    int | None,
    BeforeValidator(lambda value: value if value is None else parse_bytes(value)),
    MEMORY,
]
_QUANTITIES: Final[Mapping[str, Any]] = {"s": _OptionalSeconds, "B": _OptionalBytes}


def _unit(info: FieldInfo) -> Unit | None:
    found = [part for part in info.metadata if isinstance(part, Unit)]
    if not found and "Unit(" in repr(info.annotation):  # inside `Bytes | None`
        found = [
            part
            for arm in getattr(info.annotation, "__args__", ())
            for part in getattr(arm, "__metadata__", ())
            if isinstance(part, Unit)
        ]
    return found[0] if found else None


def _partial(name: str, model: type[Settings], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Fields of a model as a file may have them: each may be left out, quantities have units."""
    fields: dict[str, Any] = {}
    for key, info in model.model_fields.items():
        if key in without:
            continue
        unit = _unit(info)
        annotation: Any = info.annotation
        bounds = [m for m in info.metadata if not isinstance(m, Unit)]
        if unit is not None:
            annotation = _QUANTITIES[unit.name]
        for bound in bounds:
            annotation = Annotated[annotation, bound] if unit is None else annotation
        ge = next((m.ge for m in bounds if hasattr(m, "ge")), None) if unit else None
        fields[key] = (
            annotation | None if unit is None else annotation,
            Field(default=None, description=info.description, ge=ge)
            if ge is not None
            else Field(default=None, description=info.description, **_strictness(info)),
        )
    return fields


def _strictness(info: FieldInfo) -> dict[str, Any]:
    # A TOML list is a tuple here.
    return {"strict": False} if "tuple" in repr(info.annotation) else {}


_SITE_ONLY: Final = ("scheduler", "driver", "pools")
_POOL_FIELDS: Final = _partial("pool", PoolSettings)

if TYPE_CHECKING:
    PoolTable: TypeAlias = Table
    DriverTable: TypeAlias = Table
    SiteTable: TypeAlias = Table
else:
    PoolTable = create_model("PoolTable", __base__=Table, **_POOL_FIELDS)
    DriverTable = create_model("DriverTable", __base__=Table, **_partial("driver", DriverJob))
    SiteTable = create_model(
        "SiteTable",
        __base__=Table,
        base=(str, Field(description="Known machine whose values are the defaults")),
        **_partial("site", SiteSettings, without=_SITE_ONLY),
        **_POOL_FIELDS,
        driver=(DriverTable | None, Field(default=None, description="The driver's batch job")),
        pools=(
            dict[Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$")], PoolTable] | None,
            Field(default=None, strict=False, description="The pools by name"),
        ),
    )


class _SiteProblems(Problems):
    """Knows that below [pools] stand tables of any name."""

    def field(self, location: Location) -> str:
        names = [str(part) for part in location if isinstance(part, str)]
        if names[:1] == ["pools"] and len(names) > 2:
            return f"[pools.{names[1]}] {'.'.join(names[2:])}"
        return super().field(location)

    def file_location(self, location: Location) -> Location:
        return tuple(part for part in location if part != "[key]")

    def model_of(self, location: Location) -> type[BaseModel] | None:
        if location[0] == "pools":
            return PoolTable
        return super().model_of(location)

    def valid_keys(self, table: Location) -> list[str]:
        return keys_of(PoolTable) if table[:1] == ("pools",) else super().valid_keys(table)

    def all_keys(self) -> Iterator[tuple[str, list[str]]]:
        # What a pool may have may also stand at the top, so only [driver] is a place of its own.
        yield "at the top of the file, above the first [table]", keys_of(SiteTable)


_REMEDIES: Final[Mapping[Location, str]] = {
    ("base",): 'is missing; write base = "slurm", base = "pbs" or the name of a known machine',
}


def machines() -> dict[str, SiteSettings]:
    """Settings of the known machines that have a batch system, by name."""
    from orchestrator.sites import known_sites

    found = {name: importlib.import_module(f"site_configs.{name}") for name in known_sites()}
    return {name: module.SETTINGS for name, module in found.items() if hasattr(module, "SETTINGS")}


def load_site_file(path: Path) -> SiteSettings:
    """The machine described in a TOML file; raises SiteError listing every problem found."""
    try:
        text = read(path, "a site file")
        raw = parse(text, path)
        problems = _SiteProblems(
            path, text, raw, SiteTable, {"driver": DriverTable, "pools": PoolTable}, _REMEDIES
        )
        table: Table | None = None
        try:
            table = SiteTable.model_validate(raw)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                problems.translate(detail)
        known = machines()
        base = raw.get("base")
        if isinstance(base, str) and base not in known:
            problems.add_value(("base",), base, f"is not a known machine; {choose(base, known)}")
            table = None
        if table is not None:
            settings = _merged(known[str(base)], _written(table), problems)
        problems.raise_if_any()
    except CampaignError as error:
        raise SiteError(str(error)) from None
    return settings


def from_environment(name: str, base: SiteSettings) -> SiteSettings:
    """A known machine with what BASIN_ACCOUNT, BASIN_PARTITION and the like say on top."""
    raw: dict[str, Any] = {"base": name}
    for key in ENVIRONMENT:
        if value := os.environ.get(f"BASIN_{key.upper()}", "").strip():
            raw[key] = int(value) if key == "cores_per_node" and value.isdecimal() else value
    if "queue" in raw and base.scheduler == "slurm":
        raw.setdefault("partition", raw.pop("queue"))
    if "partition" in raw and base.scheduler == "pbs":
        raw.setdefault("queue", raw.pop("partition"))
    path = Path("BASIN_… in the environment")
    problems = _SiteProblems(
        path, "", raw, SiteTable, {"driver": DriverTable, "pools": PoolTable}, _REMEDIES
    )
    try:
        try:
            settings = _merged(base, _written(SiteTable.model_validate(raw)), problems)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                problems.translate(detail)
        problems.raise_if_any()
    except CampaignError as error:
        raise SiteError(str(error)) from None
    return settings


def _written(table: Table) -> dict[str, Any]:
    """What the file says, quantities converted, and nothing that it leaves out."""
    return table.model_dump(exclude_unset=True, exclude_none=True)


def _merged(base: SiteSettings, said: dict[str, Any], problems: Problems) -> SiteSettings:
    pools: dict[str, Any] = said.pop("pools", {})
    driver: dict[str, Any] = said.pop("driver", {})
    said.pop("base")
    everywhere = {key: said.pop(key) for key in list(said) if key in PoolSettings.model_fields}
    # A generic machine has the pools that the file names; a known one keeps its own.
    generic = list(base.pools) == ["cpu"] and base.pools["cpu"] == PoolSettings()
    names = list(pools) if generic and pools else list(dict.fromkeys([*base.pools, *pools]))
    found: dict[str, PoolSettings] = {}
    for name in names:
        start = base.pools.get(name) or next(iter(base.pools.values()))
        # What stands for all pools is a default too: a machine's own value for one pool is
        # more particular only where the file does not speak.
        values = {**start.model_dump(), **everywhere, **pools.get(name, {})}
        found[name] = PoolSettings.model_validate(values)
        _check_pool(base.scheduler, name, found[name], pools.get(name, {}), problems)
    for key in ("account", "modules", "worker_init", "filesystems"):
        if key in everywhere:
            driver.setdefault(key, everywhere[key])
    return SiteSettings.model_validate(
        {
            **base.model_dump(exclude={"pools", "driver"}),
            **said,
            "pools": found,
            "driver": DriverJob.model_validate({**base.driver.model_dump(), **driver}),
        }
    )


_OTHERS: Final[Mapping[str, Mapping[str, str]]] = {
    "slurm": {
        "queue": 'SLURM calls it partition: write partition = "…"',
        "place": "SLURM has no such option; exclusive says whether nodes are shared",
        "select_options": "SLURM has no chunks; write constraint or scheduler_options",
        "filesystems": 'in SLURM it is an option: scheduler_options = ["--licenses=…"]',
    },
    "pbs": {
        "partition": 'PBS calls it queue: write queue = "…"',
        "qos": "PBS has no such option; write scheduler_options",
        "constraint": "PBS has no such option; write select_options",
        "gres": "PBS has no such option; write select_options",
        "clusters": "PBS has no such option",
    },
}


def _check_pool(
    scheduler: str, name: str, pool: PoolSettings, own: Mapping[str, Any], problems: Problems
) -> None:
    """Rules that the types do not tell."""

    def place(key: str) -> Location:
        return ("pools", name, key) if key in own else (key,)

    for key, words in _OTHERS[scheduler].items():
        value = getattr(pool, key)
        if value and value != "none":
            problems.add_value(place(key), value, words)
    if pool.launcher == "srun" and scheduler == "pbs":
        problems.add_value(place("launcher"), pool.launcher, "is SLURM's; write mpiexec")
    if pool.launcher == "single" and pool.nodes_per_block > 1 and name != "mpi":
        problems.add_value(
            place("launcher"),
            pool.launcher,
            f"starts workers on one of the {pool.nodes_per_block} nodes only; leave it out",
        )
    if name == "mpi" and pool.nodes_per_block % pool.nodes_per_task:
        problems.add_value(
            place("nodes_per_task"),
            pool.nodes_per_task,
            f"does not divide nodes_per_block = {pool.nodes_per_block}",
        )
    if pool.gpu_names and pool.gpus_per_node and len(pool.gpu_names) % pool.gpus_per_node:
        problems.add_value(
            place("gpu_names"),
            list(pool.gpu_names),
            f"are not as many, or a multiple of, gpus_per_node = {pool.gpus_per_node}",
        )
    if pool.cores_per_node and pool.threads_per_worker > pool.cores_per_node:
        problems.add_value(
            place("threads_per_worker"),
            pool.threads_per_worker,
            f"is more than cores_per_node = {pool.cores_per_node}",
        )
