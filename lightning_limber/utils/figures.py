"""What all figures share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Line(NamedTuple):
    """A curve with its intervals: ``(x, value, low, high)`` of each point."""

    points: Sequence[tuple[float, float, float, float]]
    colour: str
    label: str
    style: str = "-"


class Level(NamedTuple):
    """A value to read the curves against."""

    value: float
    colour: str
    label: str


class Chart(NamedTuple):
    """One panel: curves over one axis, and levels."""

    title: str
    across: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()


def new_figure(width: float, height: float, dpi: int = 100) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure  # Not at start-up: --help does not draw.

    # Margins are given, not solved for: constrained layout took a second a figure.
    return Figure(figsize=(width, height), dpi=dpi)


def chart_figure(chart: Chart) -> Figure | None:
    """One panel that is legible as a thumbnail too; None without a curve."""
    if not any(line.points for line in chart.lines):
        return None
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(4.2, 3.0, dpi=180)
    figure.subplots_adjust(left=0.14, right=0.97, top=0.89, bottom=0.16)
    axis = figure.subplots()
    draw_chart(axis, chart)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))  # Steps, epochs, layers.
    return as_written(figure)


def draw_chart(axis: Any, chart: Chart) -> None:
    for points, colour, label, style in chart.lines:
        if points:
            xs, values, low, high = zip(*points, strict=True)
            marker = "o" if style == "-" and len(xs) < 60 else None
            axis.plot(xs, values, style, color=colour, marker=marker, ms=3, label=label)
            axis.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
    for value, colour, label in chart.levels:
        axis.axhline(value, color=colour, lw=1.5, label=label)
    axis.set_title(chart.title, fontsize=11, loc="left")
    axis.set_xlabel(chart.across)
    axis.grid(alpha=0.25)
    if count := len(axis.get_legend_handles_labels()[0]):
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.12 * count * (high - low))  # The legend hides no curve.
        axis.legend(loc="upper right", edgecolor="none", framealpha=0.8, fontsize=8.5, labelspacing=0.2)


def as_picture(figure: Figure) -> Any:
    """The figure as an RGB picture of PIL, of its size times its dpi."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.array(canvas.buffer_rgba())[..., :3].copy())


def as_written(figure: Figure) -> Figure:
    """The figure with all of its text shown as it is: a `$` of a caption or a name begins no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def wrap(text: str, width: int = 52) -> str:
    """At most four lines of `width` characters."""
    return "\n".join(textwrap.wrap(text, width)[:4])
