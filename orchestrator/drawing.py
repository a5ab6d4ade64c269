"""How figures and numbers look in the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final = (
    "#2f6690", "#d9812e", "#5b8e7d", "#8d6a9f", "#b5485d", "#4f9da6", "#a08a2f", "#6b7785",
)  # fmt: skip
INK: Final = "#1f2a33"
FAINT: Final = "#8a96a3"
DASHED: Final = (0, (4, 3))

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "basin",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure in a page: its data URI, and what is said below and instead of it."""

    source: str
    caption: str
    alt: str


@contextmanager
def style() -> Iterator[None]:
    """Draw in the report's style inside the block."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        yield


def plain_axes(axes: Any, *, grid: str = "y") -> None:
    """Take away from axes what does not tell anything."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=3, color=FAINT)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e6eaee", linewidth=0.8)


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure of that size in inches and its axes."""
    figure, (axes,) = new_panels(width, height, 1)
    return figure, axes


def new_panels(
    width: float, height: float, count: int, *, share: bool = True
) -> tuple[Figure, Any]:
    """Return a figure of that size in inches with ``count`` axes in a row, sharing y or not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, count, sharey=share, squeeze=False)[0]
    for axes in panels:
        plain_axes(axes)
    return figure, panels


def data_uri(data: bytes, kind: str = "image/svg+xml") -> str:
    """Return bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def svg(figure: Figure) -> str:
    """Return a figure as a data URI of an SVG picture."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, dpi=150, transparent=True)
    return data_uri(out.getvalue())


def number(value: float, digits: int = 1) -> str:
    """Return a number with a thousands separator (a thin space) and a true minus sign."""
    value = round(value, digits) + 0.0  # -0.0 has no sign to show
    return f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "\u2212")


def middle(value: float) -> str:
    """Return a median of whole numbers, which may lie between two of them."""
    return number(value, int(value % 1 != 0))


def count(n: int) -> str:
    """Return a whole number with thousands separators."""
    return number(n, 0)


def plural(n: int, one: str, many: str = "") -> str:
    """Return a number and what there are so many of."""
    return f"{count(n)} {one if n == 1 else many or one + 's'}"


def seconds(value: float) -> str:
    """Return a time in the unit that a person would use."""
    if abs(value) < 0.0995:
        return f"{number(1000 * value)} ms"
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if abs(value) < limit:
            digits = 2 if abs(value) / size < 10 else 1
            return f"{number(value / size, digits)} {unit}"
    return f"{number(value / 86400)} d"
