"""The kinds of stages of a campaign file: their fields, and what of them determines a result."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from kernels import calculators
from kernels.diffusion import GENERATION_VERSION, PROCESS_VERSION, model_files
from kernels.errors import KernelError
from kernels.relaxation import HESSIAN_OPTIMIZERS, RelaxSettings
from orchestrator.errors import CampaignError
from orchestrator.quantities import Bytes, Force, Length, Seconds, Temperature
from orchestrator.toml_file import NAME_PATTERN, Table, choose, default, show

Setting: TypeAlias = str | int | float | bool | dict[str, str] | list[float]

# Stands for the program not written in the file until the level is known.
_FIRST_PROGRAM: Final = "\0"

Name: TypeAlias = Annotated[str, Field(pattern=rf"^{NAME_PATTERN}$", max_length=100)]


def as_tuple(value: object) -> object:
    """A list as the tuple that frozen fields hold, and a single value as one of length 1."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# One value, or a list of them, each of which gives a stage of its own.
Models: TypeAlias = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple)
]
Counts: TypeAlias = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(as_tuple)]


class StageBase(Table):
    """What all stages share."""

    name: Name = Field(
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
    pool: Name = Field(
        default="cpu", description="Pool of workers, as the site names them, that runs the stage"
    )
    time_limit: Seconds = Field(
        default=600.0,
        gt=0,
        json_schema_extra=default("10 min; 6 h for chains and for DFT"),
        description="Time after which one item is stopped and recorded",
    )
    memory_limit: Bytes = Field(
        default=2_000_000_000,
        ge=100_000_000,
        json_schema_extra=default("2 GB; 4 GB for DFT, and where a diffusion model is at work"),
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

    @property
    def computed(self) -> int:
        """Geometries that one item computes, to which its time is proportional."""
        return self.frames


# What an item at this level may take where the file does not say: s, bytes.
_DFT_LIMITS: Final = {"time_limit": 6 * 3600.0, "memory_limit": 4_000_000_000}

_LEVELS_WITHOUT_SCF: Final = frozenset({"MMFF94"})


class EmbedStage(StageBase):
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
        return {"rdkit": installed_version("rdkit", self.name)}

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.embedding`."""
        from kernels.embedding import VERSION

        return VERSION

    def words(self) -> str:
        """The method."""
        return "ETKDGv3"


class MmffStage(StageBase):
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
        return {"rdkit": installed_version("rdkit", self.name)}

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.forcefield`."""
        from kernels.forcefield import VERSION

        return VERSION

    def words(self) -> str:
        """The force fields."""
        return "MMFF94, else UFF"


class EnergyStage(StageBase):
    """What stages at a level of theory share."""

    level: str = Field(default="GFN2-xTB", description="Level of theory")
    program: str = Field(
        default=_FIRST_PROGRAM,
        json_schema_extra=default("the level's first: tblite for GFN2-xTB, pyscf for DFT"),
        description="Program that computes the level; never mixed inside a study, since programs "
        "differ in the last digits",
    )
    electronic_temperature: Temperature = Field(
        default=300.0,
        gt=0,
        le=20_000,
        description="Electronic temperature of the SCF; DFT has none, and MMFF94 ignores it",
    )
    density_fitting: bool = Field(
        default=True,
        description="DFT: Coulomb and exchange by density fitting, several times faster",
    )
    grid: Literal["fine", "coarse", "very fine"] = Field(
        default="fine",
        description="DFT: integration grid, 75 radial shells of 302 points, 50 of 194 or 99 of 590",
    )

    @model_validator(mode="before")
    @classmethod
    def _dft_takes_longer(cls, written: Any) -> Any:
        if isinstance(written, dict) and written.get("level") in calculators.DFT_LEVELS:
            return {**_DFT_LIMITS, **written}
        return written

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

    @field_validator("electronic_temperature")
    @classmethod
    def _has_a_temperature(cls, value: float, info: ValidationInfo) -> float:
        level = info.data.get("level")
        if level in calculators.DFT_LEVELS and value != 300.0:
            raise ValueError(f"has no meaning at {level}; leave it out")
        return value

    @field_validator("density_fitting", "grid")
    @classmethod
    def _is_dft(cls, value: Any, info: ValidationInfo) -> Any:
        level = info.data.get("level", calculators.DFT)
        if level not in calculators.DFT_LEVELS and value not in (True, "fine"):
            raise ValueError(
                f"belongs to {' and '.join(calculators.DFT_LEVELS)}, not to {level}; leave it out"
            )
        return value

    def settings(self) -> dict[str, Setting]:
        """What determines energies, with every default filled in.

        Units: electronic_temperature K. DFT has that not, but a grid and density fitting.
        """
        settings: dict[str, Setting] = {
            "level": self.level,
            "program": self.program,
        }
        if self.level in calculators.DFT_LEVELS:
            settings["density_fitting"] = self.density_fitting
            settings["grid"] = self.grid
        elif self.level not in _LEVELS_WITHOUT_SCF:
            settings["electronic_temperature"] = float(self.electronic_temperature)
        return settings

    def programs(self) -> dict[str, str]:
        """The program of the level and its version."""
        return {self.program: installed_version(self.program, self.name)}


class LevelStage(EnergyStage):
    """What stages share that compute forces too, and may store them."""

    save_forces: bool = Field(
        default=False, description="Also store the forces of every frame, in eV/Å"
    )

    def settings(self) -> dict[str, Setting]:
        """What determines energies and forces, and whether the latter are stored."""
        return {**super().settings(), "save_forces": self.save_forces}


class RelaxStage(LevelStage):
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
    initial_hessian: Literal["unit", "force-field", "gfn2"] = Field(
        default="unit",
        json_schema_extra=default("unit; gfn2 for DFT"),
        description="Where BFGS or Sella starts from: unit, as ASE and the published protocol, or "
        "the Hessian of the force field or of GFN2-xTB, which need far fewer steps",
    )
    coordinates: Literal["cartesian", "internal"] = Field(
        default="cartesian",
        description="Coordinates of Sella's steps; internal ones suit flexible molecules",
    )
    coarse_until: Force = Field(
        default=0.0,
        ge=0,
        le=10.0,
        description="DFT: the grid is coarse until no atom feels a larger force, and then fine; "
        "0 for fine from the start",
    )

    @model_validator(mode="before")
    @classmethod
    def _dft_starts_from_gfn2(cls, written: Any) -> Any:
        if (
            isinstance(written, dict)
            and written.get("level") in calculators.DFT_LEVELS
            and written.get("optimizer", "BFGS") in HESSIAN_OPTIMIZERS
        ):
            return {"initial_hessian": "gfn2", **written}
        return written

    @field_validator("initial_hessian")
    @classmethod
    def _needs_a_hessian(cls, hessian: str, info: ValidationInfo) -> str:
        optimizer = info.data.get("optimizer", "BFGS")
        if hessian != "unit" and optimizer not in HESSIAN_OPTIMIZERS:
            raise ValueError(
                f'needs optimizer = "BFGS" or "Sella"; {optimizer} keeps no Hessian that could '
                "be given"
            )
        return hessian

    @field_validator("coordinates")
    @classmethod
    def _needs_sella(cls, coordinates: str, info: ValidationInfo) -> str:
        optimizer = info.data.get("optimizer", "BFGS")
        if coordinates != "cartesian" and optimizer != "Sella":
            raise ValueError(f'needs optimizer = "Sella"; {optimizer} has cartesian ones only')
        return coordinates

    @field_validator("coarse_until")
    @classmethod
    def _has_a_finer_grid(cls, force: float, info: ValidationInfo) -> float:
        level, grid = info.data.get("level", calculators.DFT), info.data.get("grid", "fine")
        if force and (level not in calculators.DFT_LEVELS or grid != "fine"):
            raise ValueError(
                f'belongs to {" and ".join(calculators.DFT_LEVELS)} with grid = "fine", not to '
                f'{level} with grid = "{grid}"; leave it out'
            )
        return force

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
        if self.coordinates != "cartesian":
            settings["coordinates"] = self.coordinates
        if self.coarse_until:
            settings["coarse_until"] = float(self.coarse_until)
        return settings

    def programs(self) -> dict[str, str]:
        """The program of the level, and Sella where it is the optimizer, with their versions."""
        versions = super().programs()
        if self.initial_hessian == "force-field":
            versions["rdkit"] = installed_version("rdkit", self.name)
        if self.initial_hessian == "gfn2":
            versions["tblite"] = installed_version("tblite", self.name)
        if self.optimizer == "Sella":
            versions["sella"] = installed_version("sella", self.name)
        return versions

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.relaxation`."""
        from kernels.relaxation import VERSION

        return VERSION

    def words(self) -> str:
        """Level, program, optimizer and where it ends."""
        variant = RelaxSettings(
            optimizer=self.optimizer,
            initial_hessian=self.initial_hessian,
            coordinates=self.coordinates,
            coarse_until=self.coarse_until,
        ).variant
        return f"{self.level}/{self.program}, {self.optimizer} to {self.fmax:g} eV/Å{variant}"


class ModelStage(StageBase):
    """What stages share that run a diffusion model."""

    memory_limit: Bytes = Field(
        default=4_000_000_000,
        ge=500_000_000,
        description="Memory that a batch of items may use before its items are run alone",
    )
    model: Models = Field(
        min_length=1,
        examples=['["first.safetensors", "second.safetensors"]'],
        description="Diffusion model: the name of a shipped one, or a .safetensors file, relative "
        "to the campaign file; a list gives a stage for each, named with the file's stem",
    )

    @field_validator("model")
    @classmethod
    def _no_model_twice(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return no_repeats(values)

    @property
    def model_name(self) -> str:
        """The model's name: the shipped one's, or the file's stem."""
        return stem(self.model[0])

    def model_digest(self) -> str:
        """SHA-256 of the model file; raises CampaignError where it cannot be read."""
        return model_digest(self.model[0], self.name)

    def programs(self) -> dict[str, str]:
        """None: the model's file stands for what computes, whatever torch runs it."""
        return {}


class DiffuseStage(ModelStage):
    """`kernel = "diffuse"`: the last n steps of a diffusion model's process, from a geometry."""

    kernel: Literal["diffuse"]
    n: Counts = Field(
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
        return no_repeats(values)

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


class GenerateStage(ModelStage):
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


class SinglePointsStage(LevelStage):
    """`kernel = "single_points"`: energies of the frames of a path or chain, or of a geometry."""

    kernel: Literal["single_points"]
    line: bool = Field(
        default=False,
        description="Also compute the energies on the straight line from the first of the frames "
        "to the last, at as many points",
    )
    every: int = Field(
        default=1,
        ge=1,
        le=1_000_000,
        description="Compute only the first of so many frames, and of the next ...",
    )

    def settings(self) -> dict[str, Setting]:
        """What determines the energies."""
        settings = {**super().settings(), "line": self.line}
        # Left out otherwise, so that results from before there was a choice keep their keys.
        return settings if self.every == 1 else {**settings, "every": self.every}

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.single_points`."""
        from kernels.single_points import VERSION

        return VERSION

    def words(self) -> str:
        """Level and program."""
        which = "every frame" if self.every == 1 else f"one frame of {self.every}"
        return f"{self.level}/{self.program}, {which}"


class RehearseStage(StageBase):
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


def no_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values; raises ValueError where one of them comes twice."""
    twice = [value for at, value in enumerate(values) if value in values[:at]]
    if twice:
        raise ValueError(f"holds {show(twice[0])} twice; keep one")
    return values


def stem(model: object) -> str:
    """A model's name as part of a stage's: its file's stem, in the letters that names have."""
    name = Path(str(model)).name.removesuffix(model_files.SUFFIX)
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def model_digest(model: str, stage: str) -> str:
    """SHA-256 of a model's file; raises CampaignError, naming the stage, where there is none."""
    try:
        file = model_files.find(model)
        status = file.stat()
        return _digest_of(str(file), status.st_mtime_ns, status.st_size)
    except (KernelError, OSError) as error:
        raise CampaignError(f'stage "{stage}": model: {error}') from None


@lru_cache(maxsize=64)
def _digest_of(file: str, modified_ns: int, size: int) -> str:
    return model_files.digest(file)


def installed_version(program: str, stage: str) -> str:
    """The program's installed version; raises CampaignError, naming the stage, where it is none."""
    try:
        return calculators.program_version(program)
    except KernelError as error:
        raise CampaignError(f'stage "{stage}": {error}') from None
