"""A training on paper: loss curves, one HTML page, and the model card."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from orchestrator.drawing import COLOURS, FAINT, INK, data_uri
from orchestrator.shard import write_whole
from orchestrator.show import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kernels.diffusion.egnn import ModelConfig

History = Sequence[Mapping[str, float]]

_VALIDATION, _TRAINING = COLOURS[:2]


def level_names(history: History) -> list[str]:
    """Names of the bins of noise levels in a history, such as "n=11-20"."""
    return [name for name in (history[-1] if history else {}) if name.startswith("n=")]


def level_words(name: str) -> str:
    """A bin of noise levels as a person would write it: 11–20."""
    return name.removeprefix("n=").replace("-", "–")


def loss_curves(history: History) -> Figure:
    """Training and validation loss, and the validation loss by noise level, against the step."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")
    style: dict[Any, Any] = {"font.size": 9.5, "axes.labelcolor": INK, "text.color": INK}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        whole, by_level = figure.subplots(1, 2)
        steps = [row["step"] for row in history]
        whole.plot(steps, [row["training"] for row in history], color=_TRAINING, lw=1.2)
        whole.plot(steps, [row["validation"] for row in history], color=_VALIDATION, lw=1.8)
        _name_line(whole, history, "training", "training", _TRAINING)
        _name_line(whole, history, "validation", "validation (average weights)", _VALIDATION)
        best = min(history, key=lambda row: row["validation"])
        whole.plot([best["step"]], [best["validation"]], "o", color=_VALIDATION, ms=5)
        names = level_names(history)
        colours = mpl.colormaps["viridis"]
        for at, name in enumerate(names):
            colour = colours(0.9 * at / max(1, len(names) - 1))
            values = [row.get(name, math.nan) for row in history]
            by_level.plot(steps, values, color=colour, lw=1.4, label=level_words(name))
        by_level.legend(
            title="noise level n",
            frameon=False,
            fontsize=8,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )
        whole.set_title("Loss", loc="left")
        by_level.set_title("Validation loss by noise level", loc="left")
        for axes in (whole, by_level):
            axes.set_xlabel("optimiser step")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(plain)
            # More than a decade needs no names between its powers of ten.
            low, high = axes.get_ylim()
            axes.yaxis.set_minor_formatter(plain if high < 20 * low else NullFormatter())
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(FAINT)
            axes.grid(axis="y", which="both", color="#e6eaee", linewidth=0.8)
            axes.set_axisbelow(True)
    return figure


def _name_line(axes: Any, history: History, column: str, text: str, colour: str) -> None:
    value = history[-1][column]
    if not math.isfinite(value):
        return
    axes.plot([], [], color=colour, label=f"{text}: {value:.4g}")
    axes.legend(frameon=False, fontsize=8)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160)
    return out.getvalue()


def _pairs(
    about: Mapping[str, Any], config: ModelConfig
) -> list[tuple[str, list[tuple[str, Any]]]]:
    data = about["data"]
    parts = data["parts"]
    of_data = [
        ("source", ", ".join(data["sources"])),
        *((f"{part} geometries", f"{parts.get(part, 0):,}") for part in _PARTS),
        ("elements", symbols(data["elements"])),
        ("atoms", f"{data['atoms'][0]} to {data['atoms'][1]}"),
        *((f"left out: {why}", f"{n:,}") for why, n in data["left_out"].items()),
    ]
    model = [(name, _word(name, value)) for name, value in asdict(config).items()]
    settings = list(about["training_settings"].items())
    return [("Data", of_data), ("Model", model), ("Training settings", settings)]


_PARTS: Final = ("training", "validation", "test")


def _word(name: str, value: Any) -> Any:
    return symbols(value) if name == "elements" else value


def symbols(elements: Sequence[int]) -> str:
    """Element symbols of atomic numbers, in one line."""
    from ase.data import chemical_symbols

    return " ".join(chemical_symbols[z] for z in elements)


def losses_by_level(history: History, step: float) -> list[tuple[str, float, float]]:
    """Noise levels, loss before training and loss at a step, per bin and over all ("all")."""
    first = history[0]
    found = next((row for row in history if row["step"] == step), history[-1])
    rows = [
        (level_words(name), first.get(name, math.nan), found.get(name, math.nan))
        for name in level_names(history)
    ]
    return [*rows, ("all, as trained", first["validation"], found["validation"])]


def _loss_words(history: History, step: float) -> list[list[str]]:
    return [
        [n, *(f"{loss:.4g}" if math.isfinite(loss) else "–" for loss in losses)]
        for n, *losses in losses_by_level(history, step)
    ]


def write_report(
    output: Path, about: Mapping[str, Any], config: ModelConfig, history: History
) -> Path:
    """Write `report.html` and `losses.png` into the output folder; returns the page."""
    import jinja2

    picture = _png(loss_curves(history))
    write_whole(output / "losses.png", picture)
    best = min(history, key=lambda row: row["validation"])
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orchestrator"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("training.html.jinja").render(
        name=about["name"],
        written=time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        picture=data_uri(picture, "image/png"),
        best=best,
        last=history[-1],
        first=history[0],
        levels=_loss_words(history, best["step"]),
        groups=_pairs(about, config),
        trained=duration(about["elapsed_s"]),
        machine=about["machine"],
        source=about["init_from"],
    )
    path = output / "report.html"
    write_whole(path, page.encode())
    return path


def write_card(
    path: Path,
    about: Mapping[str, Any],
    config: ModelConfig,
    history: History,
    best: Mapping[str, float],
    file_name: str,
) -> Path:
    """Write the model card of the best checkpoint as Markdown; returns its path."""
    name = about["name"]
    row = next((r for r in history if r["step"] == best["step"]), history[-1])
    lines = [
        f"# {name}",
        "",
        f"A diffusion model ({config.architecture}) of molecular ground states, trained by "
        f"`basin train {file_name}`; these are the average weights at step {best['step']:,.0f} "
        f"(epoch {best['epoch']:.1f}), the best of {len(history)} validations.",
        "",
        "## Use",
        "",
        "```toml",
        "[[stages]]",
        'name = "diffused"',
        'kernel = "diffuse"',
        f'model = "{name}"',
        "n = 20",
        "```",
        "",
        "Give the path of the `.safetensors` file as `model` where the model is not shipped. "
        f"It knows the elements {symbols(config.elements)}.",
    ]
    for title, pairs in _pairs(about, config):
        lines += ["", f"## {title}", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in pairs]
    lines += [
        "",
        "## Losses on the validation part",
        "",
        f"Validation loss {row['validation']:.5g}; training loss {row['training']:.5g}.",
        "",
        "| noise level n | before training | this checkpoint |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {a} | {b} |" for n, a, b in _loss_words(history, best["step"])]
    lines += [
        "",
        "## Training",
        "",
        f"{history[-1]['step']:,.0f} steps, {history[-1]['epoch']:.1f} epochs in "
        f"{duration(about['elapsed_s'])} on {about['machine']}.",
    ]
    if about["init_from"]:
        source = about["init_from"]
        lines.append(
            f"It started from the weights of {source['name']} (SHA-256 {source['digest']})."
        )
    write_whole(path, ("\n".join(lines) + "\n").encode())
    return path
