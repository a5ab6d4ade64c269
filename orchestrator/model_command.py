"""The commands `basin model ...`: what models there are, what is in one, and one from elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.errors import CampaignError

if TYPE_CHECKING:
    from kernels.diffusion.checkpoint import Model

model_app = typer.Typer(
    name="model",
    help="List, show and import diffusion models.",
    no_args_is_help=True,
)

_JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def describe(model: Model, file: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, in plain values."""
    from dataclasses import asdict

    return {
        "name": model.name,
        "file": str(file),
        "digest": model.digest,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "config": asdict(model.config),
        "card": dict(model.card),
    }


def _load(name: str) -> dict[str, Any]:
    from kernels.diffusion import checkpoint
    from kernels.errors import InputError

    try:
        return describe(checkpoint.load(name), checkpoint.find(name))
    except InputError as exc:
        raise CampaignError(str(exc)) from None


@model_app.command("list")
def list_models(as_json: _JsonOption = False) -> None:
    """List the models that come with Basin."""
    from kernels.diffusion import checkpoint
    from orchestrator.train_report import symbols

    found = [_load(name) for name in checkpoint.shipped()]
    if as_json:
        print(json.dumps(found, default=str))
        return
    if not found:
        print("no model comes with this installation; `basin train` makes one", file=sys.stderr)
        return
    width = max(len(model["name"]) for model in found)
    for model in found:
        config = model["config"]
        print(
            f"{model['name']:<{width}}  {config['architecture']}, "
            f"{config['layers']} layers of {config['hidden']}, {model['parameters']:,} "
            f"parameters; {symbols(config['elements'])}"
        )


@model_app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Shipped model, or its file.")],
    as_json: _JsonOption = False,
) -> None:
    """Show a model's settings and where it comes from."""
    from orchestrator.train_report import symbols

    model = _load(name)
    if as_json:
        print(json.dumps(model, default=str))
        return
    print(f"{model['name']}: {model['parameters']:,} parameters")
    print(f"  file       {model['file']}\n  SHA-256    {model['digest']}")
    config = {**model["config"], "elements": symbols(model["config"]["elements"])}
    for title, table in (("config", config), ("card", model["card"])):
        print(f"{title}:")
        for line in _lines(table, "  "):
            print(line)
    card = Path(model["file"]).with_suffix(".md")
    if card.is_file():
        print(f"model card: {card}")


def _lines(table: dict[str, Any], indent: str) -> list[str]:
    width = max((len(key) for key in table), default=0)
    lines: list[str] = []
    for key, value in table.items():
        if isinstance(value, dict) and value and key != "size_histogram":
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        elif value not in (None, {}, []):
            lines.append(f"{indent}{key:<{width}}  {_words(value)}")
    return lines


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@model_app.command("import")
def import_model(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="EMA.npy [ARGS.pickle] OUT.safetensors",
            help="Published weights, their settings (default: beside them), file to write.",
        ),
    ],
    as_json: _JsonOption = False,
) -> None:
    """Turn a published EDM checkpoint into one of Basin's.

    Only tensors and plain values are read: a file that asks for anything else is refused, and
    nothing of it is run.
    """
    from kernels.diffusion import checkpoint, published
    from kernels.errors import InputError

    if len(files) not in (2, 3):
        raise typer.BadParameter(
            f"{len(files)} files given; give EMA.npy, ARGS.pickle (if it is not beside) and "
            "OUT.safetensors",
            param_hint="FILES",
        )
    target = files[-1]
    if target.exists():
        raise CampaignError(f"{target}: is there already; remove it, or give another name")
    try:
        config, weights, card = published.read(files[0], files[1] if len(files) == 3 else None)
        checkpoint.save(target, config, weights, card)
    except InputError as exc:
        raise CampaignError(str(exc)) from None
    model = _load(str(target))
    if as_json:
        print(json.dumps(model, default=str))
    else:
        print(
            f"{target}: {model['parameters']:,} parameters; `basin model show {target}` tells more"
        )
