"""Checkpoints of the published EDM code: a torch state_dict beside a pickled Namespace.

Neither is trusted. The weights are read as tensors only, the settings by a reader that makes
nothing but plain values; anything else in either file is refused without being run.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.diffusion.egnn import DRUGS_ELEMENTS, QM9_ELEMENTS, ModelConfig
from kernels.diffusion.schedule import Schedule
from kernels.diffusion.sizes import QM9_SIZES
from kernels.errors import InputError

# Real settings take about a kilobyte; a larger file is something else.
_LARGEST_SETTINGS = 1_000_000

# Largest difference of gamma between a checkpoint (float32) and the schedule it says it has.
_GAMMA_TOLERANCE = 2e-3


def read(
    weights: str | Path, settings: str | Path | None = None
) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """Read a published pair: configuration, weights for `egnn.build`, and a first model card.

    `weights` is the state_dict (`generative_model_ema*.npy`), `settings` the `args.pickle`; None
    looks for one beside the weights. Sizes come from the weights themselves. Raises InputError
    for files that are not such a pair, hold anything but tensors and plain values, contradict
    each other, or use an option this network does not have.
    """
    weights = Path(weights)
    arguments = read_settings(settings_beside(weights) if settings is None else settings)
    state = _without_prefix(_read_tensors(weights))
    config = _configuration(weights, arguments, state)
    card = {
        "source": f"published EDM checkpoint {weights.name}",
        "data": str(arguments.get("dataset", "unknown")),
        "epoch": _plain(arguments.get("current_epoch")),
        "ema_decay": _plain(arguments.get("ema_decay")),
        "learning_rate": _plain(arguments.get("lr")),
        "batch": _plain(arguments.get("batch_size")),
    }
    return config, renamed(state, config, weights), card


def settings_beside(weights: str | Path) -> Path:
    """Return the settings file that belongs to a weights file; InputError when there is none."""
    weights = Path(weights)
    stem = weights.stem
    names = ["args.pickle"]
    if epoch := re.search(r"_(\d+)$", stem):
        names.insert(0, f"args_{epoch[1]}.pickle")
    if stem.endswith("_ema"):
        names.insert(0, f"{stem.removesuffix('_ema')}_args.pickle")
    for name in names:
        if (weights.parent / name).is_file():
            return weights.parent / name
    raise InputError(
        f"no settings beside {str(weights)!r} (looked for {', '.join(names)}); name the args.pickle"
    )


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a pickled argparse.Namespace as a dictionary, without running anything it holds.

    Raises InputError, naming it, for any other class or function that the file refers to.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(_LARGEST_SETTINGS + 1)
    except OSError as error:
        raise InputError(f"settings {str(path)!r} cannot be read: {error}") from error
    if len(content) > _LARGEST_SETTINGS:
        raise InputError(f"settings {str(path)!r} are too large for an args.pickle")
    reader = _SettingsReader(io.BytesIO(content))
    try:
        found = reader.load()
    except InputError as error:
        raise InputError(f"settings {str(path)!r}: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"settings {str(path)!r} are not a pickle: {error}") from error
    if not isinstance(found, reader.namespace):
        raise InputError(
            f"settings {str(path)!r} hold a {type(found).__name__}, not an argparse.Namespace"
        )
    return dict(vars(found))


class _SettingsReader(pickle.Unpickler):
    """A reader of pickles that knows one class, and makes a stand-in of even that one."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        # A class of this reader's own: a pickle can set attributes of a class it names.
        self.namespace = type("Namespace", (), {})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return self.namespace
        raise InputError(
            f"it refers to {module}.{name}, which published settings never need; refused unread"
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"weights {str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # a damaged archive can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"weights {str(path)!r} are not a state_dict of tensors alone: {reason}"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise InputError(f"weights {str(path)!r} are not a state_dict of tensors alone")
    return dict(found)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # Left by torch's DataParallel.
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _configuration(
    path: Path, arguments: Mapping[str, Any], state: Mapping[str, Tensor]
) -> ModelConfig:
    for name, wanted in (
        ("probabilistic_model", "diffusion"),
        ("model", "egnn_dynamics"),
        ("diffusion_noise_schedule", "polynomial_2"),
        ("aggregation_method", "sum"),
        ("sin_embedding", False),
        ("context_node_nf", 0),
    ):
        if (given := arguments.get(name, wanted)) != wanted:
            raise InputError(
                f"settings of {str(path)!r}: {name} = {given!r}; only {wanted!r} can be imported"
            )
    try:
        hidden, width = state["dynamics.egnn.embedding.weight"].shape
    except (KeyError, ValueError):
        raise InputError(
            f"weights {str(path)!r} have no dynamics.egnn.embedding: not a published EDM"
        ) from None
    charge_channel = _boolean(arguments, "include_charges", path)
    elements = _elements(arguments, path)
    n_features = len(elements) + int(charge_channel)
    # The noise level is one more input.
    if width != n_features + 1:
        raise InputError(
            f"weights {str(path)!r} take {width - 1} features, but the settings mean {n_features} "
            f"({len(elements)} elements, include_charges = {charge_channel})"
        )
    scaling = arguments.get("normalize_factors", [1, 4, 10])
    if not isinstance(scaling, list | tuple) or len(scaling) != 3:
        raise InputError(f"settings of {str(path)!r}: normalize_factors = {scaling!r}; expected 3")
    config = ModelConfig(
        elements=elements,
        charge_channel=charge_channel,
        steps=_steps(arguments, state, path),
        precision=_number(arguments, "diffusion_noise_precision", 1e-5, path),
        hidden=int(hidden),
        layers=_count(state, r"dynamics\.egnn\.e_block_(\d+)\."),
        inv_sublayers=_count(state, r"dynamics\.egnn\.e_block_0\.gcl_(\d+)\."),
        attention="dynamics.egnn.e_block_0.gcl_0.att_mlp.0.weight" in state,
        tanh=_boolean(arguments, "tanh", path),
        norm_constant=_number(arguments, "norm_constant", 1, path),
        normalization_factor=_number(arguments, "normalization_factor", 1, path),
        feature_scaling=tuple(
            _number({"normalize_factors": value}, "normalize_factors", 1, path) for value in scaling
        ),  # type: ignore[arg-type]
        size_histogram=QM9_SIZES if elements == QM9_ELEMENTS else {},
    )
    _check_schedule(config, state, path)
    return config


def _elements(arguments: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    dataset = arguments.get("dataset")
    layouts = {"qm9": QM9_ELEMENTS, "geom": DRUGS_ELEMENTS}
    known = layouts.get(str(dataset).split("_")[0])
    if known is None:
        raise InputError(
            f"settings of {str(path)!r}: the elements of data set {dataset!r} are unknown; "
            f"published models are of {' or '.join(layouts)}"
        )
    return known[1:] if _boolean(arguments, "remove_h", path) else known


def _steps(arguments: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> int:
    given = _number(arguments, "diffusion_steps", math.nan, path)
    gamma = state.get("gamma.gamma")
    if math.isnan(given) and gamma is None:
        raise InputError(f"settings of {str(path)!r} have no diffusion_steps")
    if gamma is None:
        return int(given)
    if not math.isnan(given) and given != len(gamma) - 1:
        raise InputError(
            f"settings of {str(path)!r}: diffusion_steps = {given:g}, but the weights were made "
            f"for {len(gamma) - 1}"
        )
    return len(gamma) - 1


def _check_schedule(config: ModelConfig, state: Mapping[str, Tensor], path: Path) -> None:
    gamma = state.get("gamma.gamma")
    if gamma is None:
        return
    expected = Schedule(config.steps, config.precision).gamma
    wrong = float(np.abs(gamma.double().numpy() - expected).max())
    if not wrong < _GAMMA_TOLERANCE:
        raise InputError(
            f"weights {str(path)!r}: the noise schedule differs from its settings "
            f"(precision {config.precision:g}) by {wrong:g} in gamma"
        )


def renamed(
    state: Mapping[str, Tensor], config: ModelConfig, path: str | Path
) -> dict[str, Tensor]:
    """Turn a published state_dict into that of this project's network; `path` is for messages.

    Raises InputError when a tensor is missing or one too many is there.
    """
    names = {"embedding": "embedding", "readout": "embedding_out"}
    for block in range(config.layers):
        here, there = f"blocks.{block}", f"e_block_{block}"
        for layer in range(config.inv_sublayers):
            ours, theirs = f"{here}.messages.{layer}", f"{there}.gcl_{layer}"
            names |= {
                f"{ours}.pairs.first": f"{theirs}.edge_mlp.0",
                f"{ours}.pairs.second": f"{theirs}.edge_mlp.2",
                f"{ours}.node_first": f"{theirs}.node_mlp.0",
                f"{ours}.node_second": f"{theirs}.node_mlp.2",
            }
            if config.attention:
                names[f"{ours}.gate"] = f"{theirs}.att_mlp.0"
        names |= {
            f"{here}.pairs.first": f"{there}.gcl_equiv.coord_mlp.0",
            f"{here}.pairs.second": f"{there}.gcl_equiv.coord_mlp.2",
            f"{here}.length": f"{there}.gcl_equiv.coord_mlp.4",
        }
    renamed, used = {}, {"buffer", "gamma.gamma"}
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            if kind == "bias" and ours.endswith(".length"):
                continue
            name = f"dynamics.egnn.{theirs}.{kind}"
            if name not in state:
                raise InputError(f"weights {str(path)!r} lack {name}")
            renamed[f"{ours}.{kind}"] = state[name].float()
            used.add(name)
    if unused := sorted(set(state) - used):
        raise InputError(
            f"weights {str(path)!r} hold {len(unused)} tensors that published EDM has not, "
            f"{unused[0]} first"
        )
    return renamed


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    return len(found)


def _number(arguments: Mapping[str, Any], name: str, default: float, path: Path) -> float:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"settings of {str(path)!r}: {name} = {value!r} is not a number")
    return float(value)


def _boolean(arguments: Mapping[str, Any], name: str, path: Path) -> bool:
    value = arguments.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"settings of {str(path)!r}: {name} = {value!r} is not true or false")
    return value


def _plain(value: Any) -> str | float | None:
    return value if isinstance(value, str | int | float) else None
