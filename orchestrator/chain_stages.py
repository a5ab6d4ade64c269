"""The kinds of stages that make Markov chains: their fields, and what of them determines a chain.

The defaults are the published protocol: Rothchild et al., Chem. Sci. 15, 13506 (2024).
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, field_validator

from orchestrator.quantities import TEMPERATURE, Bytes, Energy, Length, Seconds, Temperature
from orchestrator.stages import (
    Counts,
    EnergyStage,
    Models,
    ModelStage,
    Setting,
    StageBase,
    as_tuple,
    model_digest,
    no_repeats,
    stem,
)
from orchestrator.toml_file import default

TEMPERATURES: Final = (
    10.0, 20.0, 30.0, 40.0, 50.0, 70.0, 90.0, 100.0, 120.0, 150.0, 180.0, 200.0, 230.0, 260.0,
    300.0, 330.0, 360.0, 400.0,
)  # fmt: skip
DIFFUSION_STEPS: Final = (1, 2, 4, 6, 8, 11, 14, 17, 20, 24, 27, 30, 35, 40)
# Share of a chain's steps that is burn-in, where nothing else is said.
_BURN_IN: Final = 5000 / 24_000
_DIFFUSION_BURN_IN: Final = 1000 / 20_000

_Temperatures: TypeAlias = Annotated[
    tuple[Annotated[Temperature, Field(gt=0, le=10_000)], ...],
    BeforeValidator(as_tuple),
    TEMPERATURE,
]


class ChainStage(StageBase):
    """What all stages share that make chains."""

    time_limit: Seconds = Field(
        default=21_600.0, gt=0, description="Time after which one item is stopped and recorded"
    )
    repeats: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Independent chains from the same start, each a stage of its own",
    )
    _repeat: int = PrivateAttr(default=0)

    @property
    def repeat(self) -> int:
        """Which of the repeats this stage is, from 0."""
        return self._repeat

    def repeated(self, repeat: int) -> Self:
        """The same stage as one of its repeats, counted from 0."""
        made = self.model_copy()
        made._repeat = repeat
        return made

    def _repeat_settings(self) -> dict[str, Setting]:
        # Left out of the first, so that it is found done by whoever asks for more later.
        return {"repeat": self.repeat} if self.repeat else {}


def _burn_in(value: int | None, info: ValidationInfo) -> int | None:
    steps = info.data.get("steps")
    if value is not None and steps is not None and value >= steps:
        raise ValueError(f"leaves nothing of steps = {steps}; give fewer, or more steps")
    return value


class _SampledStage(ChainStage, EnergyStage):
    """What stages share that sample the Boltzmann distribution at a level of theory."""

    temperatures: _Temperatures = Field(
        default=TEMPERATURES,
        min_length=1,
        examples=['[20, 70, 120, "300 K"]'],
        json_schema_extra=default("18 of them from 10 K to 400 K"),
        description="Temperatures; in a metropolis stage a list gives a stage for each, named "
        "with it",
    )
    steps: int = Field(
        default=24_000, ge=1, le=1_000_000_000, description="Steps of a chain, burn-in included"
    )
    burn_in: int | None = Field(
        default=None,
        ge=0,
        json_schema_extra=default("5000 of 24000 steps"),
        description="Steps at the start that count for nothing",
    )
    save_every: int = Field(
        default=10, ge=1, le=1_000_000_000, description="Steps between two frames that are stored"
    )
    step_size: Length = Field(
        default=0.0,
        ge=0,
        le=10.0,
        json_schema_extra=default("0.01 Å times the root of kT in kcal/mol"),
        description="Standard deviation of the move of each coordinate",
    )
    tune: bool = Field(
        default=False,
        description="Adapt the step size to the acceptance, during the burn-in alone",
    )

    @field_validator("temperatures")
    @classmethod
    def _no_temperature_twice(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        return no_repeats(values)

    @field_validator("burn_in")
    @classmethod
    def _burn_in_ends(cls, value: int | None, info: ValidationInfo) -> int | None:
        return _burn_in(value, info)

    @property
    def burned(self) -> int:
        """Steps of the burn-in, worked out where the file does not say."""
        return round(self.steps * _BURN_IN) if self.burn_in is None else self.burn_in

    @property
    def frames(self) -> int:
        """The start, and one of so many steps."""
        return self.steps // self.save_every + 1

    def settings(self) -> dict[str, Setting]:
        """What determines a chain. Units: temperature K, step_size Å (0: as published)."""
        return {
            **super().settings(),
            "steps": self.steps,
            "burn_in": self.burned,
            "save_every": self.save_every,
            "step_size": float(self.step_size),
            "tune": self.tune,
            **self._repeat_settings(),
        }


class MetropolisStage(_SampledStage):
    """`kernel = "metropolis"`: a Markov chain at a temperature, by Metropolis et al. (1953)."""

    kernel: Literal["metropolis"]
    proposal: Literal["gaussian", "diffusion"] = Field(
        default="gaussian",
        description="What moves are proposed: gaussian, or also reverse steps of a diffusion "
        "model, corrected so that the chain samples the same distribution",
    )
    model: Models = Field(
        default=(),
        json_schema_extra=default("none"),
        description="Diffusion model of such proposals; a list gives a stage for each",
    )
    n: Counts = Field(
        default=(),
        json_schema_extra=default("none"),
        description="Diffusion step of such proposals; a list gives a stage for each",
    )
    diffusion_share: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the proposals that the model makes; the others are gaussian",
    )
    diffusion_moves: Literal["shaped", "reverse step"] = Field(
        default="shaped",
        description="What the model makes: moves shaped by its curvature at the start, or reverse "
        "steps as they are",
    )

    @field_validator("model", "n")
    @classmethod
    def _nothing_twice(cls, values: tuple[int | str, ...]) -> tuple[int | str, ...]:
        return no_repeats(values)

    @property
    def diffusion(self) -> bool:
        """Whether a model takes part."""
        return self.proposal == "diffusion"

    def settings(self) -> dict[str, Setting]:
        """What determines a chain at one temperature."""
        settings = {
            **super().settings(),
            "temperature": float(self.temperatures[0]),
            "proposal": str(self.proposal),
        }
        if self.diffusion:
            from kernels.diffusion import PROPOSAL_VERSION

            settings["model"] = model_digest(self.model[0], self.name)
            settings["n"] = self.n[0]
            settings["diffusion_share"] = float(self.diffusion_share)
            settings["diffusion_moves"] = str(self.diffusion_moves)
            settings["proposal_version"] = PROPOSAL_VERSION
        return settings

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.sampling.metropolis`."""
        from kernels.sampling.metropolis import VERSION

        return VERSION

    def words(self) -> str:
        """Level, program, temperature, steps and proposal."""
        what = f", with {stem(self.model[0])} n = {self.n[0]}" if self.diffusion else ""
        return (
            f"{self.level}/{self.program}, {self.temperatures[0]:g} K, {self.steps:,} steps{what}"
        )

    @property
    def computed(self) -> int:
        """An energy for each step."""
        return self.steps


class ReplicaExchangeStage(_SampledStage):
    """`kernel = "replica_exchange"`: chains at all temperatures that swap their geometries."""

    kernel: Literal["replica_exchange"]
    swap_every: int = Field(
        default=10, ge=1, le=1_000_000, description="Steps between two attempts to swap"
    )

    @field_validator("temperatures")
    @classmethod
    def _two_at_least(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) < 2:
            raise ValueError("leaves nothing to swap with; give two or more")
        return tuple(sorted(values))

    def settings(self) -> dict[str, Setting]:
        """What determines the whole ladder."""
        return {
            **super().settings(),
            "temperatures": [float(t) for t in self.temperatures],
            "swap_every": self.swap_every,
        }

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.sampling.replica_exchange`."""
        from kernels.sampling.replica_exchange import VERSION

        return VERSION

    def words(self) -> str:
        """Level, program, temperatures and steps."""
        low, high = min(self.temperatures), max(self.temperatures)
        return (
            f"{self.level}/{self.program}, {len(self.temperatures)} temperatures from {low:g} to "
            f"{high:g} K, {self.steps:,} steps"
        )

    @property
    def computed(self) -> int:
        """An energy for each step at each temperature."""
        return self.steps * len(self.temperatures)


class GaussianChainStage(ChainStage, EnergyStage):
    """`kernel = "gaussian_chain"`: the reference; random moves are all taken, until it diverges."""

    kernel: Literal["gaussian_chain"]
    steps: int = Field(
        default=24_000, ge=1, le=1_000_000_000, description="Steps after which it ends in any case"
    )
    save_every: int = Field(
        default=10, ge=1, le=1_000_000_000, description="Steps between two frames that are stored"
    )
    step_size: Length = Field(
        default=0.01, gt=0, le=10.0, description="Standard deviation of the move of each coordinate"
    )
    max_energy: Energy = Field(
        default=2.0,
        gt=0,
        le=1e6,
        description="Energy above the start at which the chain has diverged, and ends",
    )

    def settings(self) -> dict[str, Setting]:
        """What determines the chain. Units: step_size Å, max_energy eV."""
        return {
            **super().settings(),
            "steps": self.steps,
            "save_every": self.save_every,
            "step_size": float(self.step_size),
            "max_energy": float(self.max_energy),
            **self._repeat_settings(),
        }

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.sampling.metropolis`."""
        from kernels.sampling.metropolis import VERSION

        return VERSION

    def words(self) -> str:
        """Level, program and moves."""
        return f"{self.level}/{self.program}, moves of {self.step_size:g} Å, all taken"

    @property
    def frames(self) -> int:
        """The start, and one of so many steps."""
        return self.steps // self.save_every + 1

    @property
    def computed(self) -> int:
        """An energy for each step, of which most are never made."""
        return min(self.steps, 1000)


class DiffusionChainStage(ChainStage, ModelStage):
    """`kernel = "diffusion_chain"`: the same reverse step of a diffusion model, again and again."""

    kernel: Literal["diffusion_chain"]
    memory_limit: Bytes = Field(
        default=4_000_000_000,
        ge=500_000_000,
        description="Memory that a batch of items may use before its items are run alone",
    )
    n: Counts = Field(
        default=DIFFUSION_STEPS,
        min_length=1,
        json_schema_extra=default("14 of them from 1 to 40"),
        description="Which step of the diffusion; a list gives a stage for each, named with it",
    )
    steps: int = Field(default=20_000, ge=1, le=1_000_000_000, description="Steps of a chain")
    burn_in: int | None = Field(
        default=None,
        ge=0,
        json_schema_extra=default("1000 of 20000 steps"),
        description="Steps at the start that count for nothing",
    )
    save_every: int = Field(
        default=1, ge=1, le=1_000_000_000, description="Steps between two frames that are stored"
    )

    @field_validator("n")
    @classmethod
    def _no_number_twice(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        return no_repeats(values)

    @field_validator("burn_in")
    @classmethod
    def _burn_in_ends(cls, value: int | None, info: ValidationInfo) -> int | None:
        return _burn_in(value, info)

    @property
    def burned(self) -> int:
        """Steps of the burn-in, worked out where the file does not say."""
        return round(self.steps * _DIFFUSION_BURN_IN) if self.burn_in is None else self.burn_in

    def settings(self) -> dict[str, Setting]:
        """What determines a chain: the model by its digest, and which step of it."""
        return {
            "model": self.model_digest(),
            "n": self.n[0],
            "steps": self.steps,
            "burn_in": self.burned,
            "save_every": self.save_every,
            **self._repeat_settings(),
        }

    @property
    def kernel_version(self) -> int:
        """Version of `kernels.diffusion.chains`."""
        from kernels.diffusion import CHAINS_VERSION

        return CHAINS_VERSION

    def words(self) -> str:
        """Model and step."""
        return f"{self.model_name}, n = {self.n[0]}, {self.steps:,} steps"

    @property
    def frames(self) -> int:
        """The start, and one of so many steps."""
        return self.steps // self.save_every + 1

    @property
    def computed(self) -> int:
        """A call of the network for each step."""
        return self.steps
