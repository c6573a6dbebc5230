"""What all figures share."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure  # Not at start-up: --help does not draw.

    # Margins are given, not solved for: constrained layout took a second a figure.
    return Figure(figsize=(width, height))


def as_written(figure: Figure) -> Figure:
    """The figure with all of its text shown as it is: a `$` of a caption or a name begins no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def wrap(text: str, width: int = 52) -> str:
    """At most four lines of `width` characters."""
    return "\n".join(textwrap.wrap(text, width)[:4])
