"""What figures and the report need to draw metrics, without torch: panels, colours, published curves.

Colours are Okabe and Ito's, and Tol's where those are used up, safe for colour-blind readers; a group has
the same one everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_limber.assets import ASSETS
from lightning_limber.utils.files import write_text

COLOURS = {
    "image": "#D55E00",
    "caption": "#0072B2",
    "text": "#009E73",
    "noise": "#CC79A7",
    "words_long": "#E69F00",
    "words": "#F0E442",
    "told": "#56B4E9",
    "control": "#999999",
}
SPARE = ("#882255", "#332288", "#44AA99")
"""Colours of groups that a user adds."""
MARKERS = "osD^vP*X"
CONTROLS = ("noise", "words_long")
"""Groups of the image tokens' norms that say nothing: what is no better than they shows length alone."""
PAPER_NAME = "Venhoff et al., Gemma 2 2B"
PANELS_FILE = "probe_panels.json"


@dataclass(frozen=True)
class Panel:
    """How one metric is drawn, by layer: in TensorBoard's figures and charts, and in the report.

    Attributes:
        metric: Name of the metric in the table.
        label: Title of the panel.
        log: Draw the axis logarithmically.
        limits: Ends of the axis; None fits it to the curves.
        by_epoch: Also draw the metric of image tokens as a map of layer by epoch.
        also: Another metric of image tokens to draw beside it, and its label.
    """

    metric: str
    label: str
    log: bool = False
    limits: tuple[float, float] | None = None
    by_epoch: bool = False
    also: tuple[str, str] | None = None


def ordered_groups(groups: Iterable[str]) -> dict[str, str]:
    """Colours of the groups by name: those known here first, in their order, then others in theirs."""
    given = dict.fromkeys(groups)
    known = [name for name in COLOURS if name in given]
    others = [name for name in given if name not in COLOURS]
    spare = {name: SPARE[i % len(SPARE)] for i, name in enumerate(others)}
    return {name: COLOURS[name] for name in known} | spare


def design_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each design: of two with one colour the markers differ."""
    colours = [*(colour for name, colour in COLOURS.items() if name != "control"), *SPARE]
    return {
        name: (colours[i % len(colours)], MARKERS[i // len(colours) % len(MARKERS)])
        for i, name in enumerate(names)
    }


def write_panels(panels: Iterable[Panel], folder: Path) -> None:
    text = json.dumps([asdict(panel) for panel in panels], indent=1)
    write_text(folder / PANELS_FILE, text + "\n")


def read_panels(folder: Path) -> list[dict[str, Any]]:
    """The panels of a run as `write_panels` left them; of an older run, those that all runs had."""
    path = folder / PANELS_FILE
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    names = "fvu fvu_text mse cosine norm l0 shared loss_recovered match lens_hit knn detectors".split()
    return [asdict(Panel(name, name, log=name in ("fvu_text", "mse", "norm", "l0"))) for name in names]


def published_curves() -> dict[str, Any]:
    """Curves of Venhoff et al., ``curves[metric][group]`` [L], with their ``layers`` [L] and source."""
    return json.loads((ASSETS / "venhoff2025.json").read_text(encoding="utf-8"))
