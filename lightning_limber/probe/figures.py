"""Figures of the probe's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lightning_limber.probe.palette import COLOURS, PAPER_NAME, Panel, ordered_groups, published_curves
from lightning_limber.probe.patches import PatchMap
from lightning_limber.probe.tables import History, Row
from lightning_limber.utils.figures import as_written, new_figure, wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float], list[float], list[float]]
"""Layers, values, lower and upper ends of their intervals."""
COLUMNS = 4
PANEL_WIDTH = 4.2
"""Inches; small ones, in which text is large in a thumbnail too."""


def curve(rows: list[Row], group: str, metric: str) -> Curve | None:
    """One metric of one group by layer."""
    found = [row for row in rows if (row.group, row.metric) == (group, metric) and row.layer is not None]
    if not found:
        return None
    return (
        [cast(int, row.layer) for row in found],
        [row.value for row in found],
        [row.low for row in found],
        [row.high for row in found],
    )


def panel_figure(
    history: History, epoch: int, panel: Panel, of: str, control: str, published: bool = False
) -> Figure | None:
    """One metric by layer: groups and controls with their 95 % intervals, and chance levels; None without a
    row of it.

    Args:
        history: Rows of all probed epochs.
        epoch: The one to draw.
        panel: How the metric is drawn.
        of: What was probed, in a few words.
        control: Name of the adapter of epoch 0, which is drawn beside later epochs.
        published: Also draw the curves of Venhoff et al., by relative depth.
    """
    from matplotlib.ticker import MaxNLocator

    if not any(row.metric == panel.metric and row.layer is not None for row in history[epoch]):
        return None
    figure = new_figure(PANEL_WIDTH, 3.0, dpi=140)
    axis = figure.subplots()
    _draw_panel(axis, history, epoch, panel, control, published)
    axis.set_title(panel.label, fontsize=_size(panel.label), loc="left")
    axis.set_xlabel(f"layer of the LLM; {of}", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    columns = 1 if published else 3
    below = 0.55 + 0.17 * -(
        -len(axis.get_legend_handles_labels()[1]) // columns
    )  # Inches, with the legend.
    height = below + 2.6
    figure.set_size_inches(PANEL_WIDTH, height)
    figure.subplots_adjust(left=0.14, right=0.97, top=1 - 0.3 / height, bottom=below / height)
    tight = {"columnspacing": 1, "handlelength": 1.6, "handletextpad": 0.5, "labelspacing": 0.25}
    figure.legend(loc="lower center", ncols=columns, fontsize=8.5, frameon=False, **tight)
    return as_written(figure)


def _draw_panel(
    axis: Any, history: History, epoch: int, panel: Panel, control: str, published: bool
) -> None:
    now, start = history[epoch], history.get(0) if epoch else None
    for group, colour in ordered_groups(row.group for row in now).items():
        _draw(axis, curve(now, group, panel.metric), colour, group)
    if start is not None:
        _draw(axis, curve(start, "image", panel.metric), COLOURS["control"], f"image, {control}", "--")
    _draw(axis, curve(now, "image", f"{panel.metric}_chance"), COLOURS["image"], "image, chance", ":")
    if panel.also:
        _draw(axis, curve(now, "image", panel.also[0]), "black", panel.also[1], "-.")
    if published:
        _draw_published(axis, panel.metric, [row.layer for row in now if row.layer is not None])
    if panel.log and any(line.get_ydata().max() > 0 for line in axis.lines):
        _log_scale(axis)
    if panel.limits:
        axis.set_ylim(*panel.limits)


def _size(title: str) -> float:
    """Points in which a title fits over a figure of four inches."""
    return min(11, 500 / len(title))


def probe_figure(
    history: History,
    epoch: int,
    panels: Sequence[Panel],
    title: str,
    control: str,
    published: bool = False,
) -> Figure:
    """Every metric in a figure, each as in `panel_figure`; those without a row are left out."""
    by_layer = {row.metric for row in history[epoch] if row.layer is not None}
    panels = [panel for panel in panels if panel.metric in by_layer]
    columns = min(COLUMNS, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    height = 0.77 + 1.265 + 2.99 * rows  # Inches of title, legend and panels.
    figure = new_figure(4 * columns, height)
    figure.subplots_adjust(
        *(0.14 / columns, 1.265 / height, 1 - 0.04 / columns, 1 - 0.77 / height), hspace=0.36, wspace=0.17
    )
    axes = np.atleast_1d(figure.subplots(rows, columns)).flat
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, history, epoch, panel, control, published)
        axis.set_title(panel.label, fontsize=11)
        axis.set_xlabel("layer of the LLM (residual stream behind it)")
        axis.grid(alpha=0.25)
    labels: dict[str, Any] = {}
    for axis in list(figure.axes):
        if not axis.lines:
            axis.remove()
        handles, names = axis.get_legend_handles_labels()
        labels = {**dict(zip(names, handles, strict=True)), **labels}
    figure.legend(labels.values(), labels, loc="lower center", ncols=columns, frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    return as_written(figure)


def _log_scale(axis: Any) -> None:
    axis.set_yscale("log")
    _plain_numbers(axis.yaxis)


def _plain_numbers(axis: Any) -> None:
    """Those of a logarithmic axis, at 1, 2 and 5."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def _draw(axis: Any, found: Curve | None, colour: str, label: str, style: str = "-") -> None:
    if found is None:
        return
    layers, values, low, high = found
    axis.plot(layers, values, style, color=colour, marker="o" if style == "-" else None, ms=3, label=label)
    axis.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)


def _draw_published(axis: Any, metric: str, layers: list[int]) -> None:
    """The paper's curves, stretched over the layers that are probed here."""
    paper = published_curves()
    depth = np.array(paper["layers"]) / max(paper["layers"]) * max(layers)
    for group, values in paper["curves"].get(metric, {}).items():
        label = f"{paper['legend'][group]}, {PAPER_NAME}"  # Its groups are other tokens than ours.
        axis.plot(depth, values, ":", color=COLOURS[group], lw=1, alpha=0.9, label=label)


def heatmap_figure(history: History, panel: Panel) -> Figure | None:
    """One metric of image tokens, layer by epoch, over the epochs that have it; None without any."""
    by_epoch = {epoch: curve(history[epoch], "image", panel.metric) for epoch in sorted(history)}
    curves = {epoch: found for epoch, found in by_epoch.items() if found is not None}
    if not curves:
        return None
    layers = next(iter(curves.values()))[0]
    table = np.array([values for _, values, _, _ in curves.values()]).T
    figure, axis = _map(table, panel.label, *(panel.limits or (None, None)))
    _ticks(axis.xaxis, list(curves))
    _ticks(axis.yaxis, layers)
    axis.set_xlabel("epoch (0: before training)")
    axis.set_ylabel("layer of the LLM")
    return as_written(figure)


NUMBERS = 12
"""Where there are more layers, the cells of a matrix are too small for numbers."""


def matrix_figure(layers: list[int], metric: str, values: list[list[float]], of: str) -> Figure:
    """Image tokens of each layer (rows) through the SAE of each layer (columns)."""
    from matplotlib.colors import LogNorm

    table = np.maximum(np.array(values), 1e-3)
    title = "fvu (box: the SAE that explains most)" if metric == "fvu" else metric
    figure, axis = _map(table, title, norm=LogNorm())
    if len(layers) <= NUMBERS:
        dark = np.log(table) < np.quantile(np.log([table.min(), table.max()]), 0.6)
        for (i, j), value in np.ndenumerate(np.array(values)):
            colour = "w" if dark[i, j] else "k"
            axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
    for i, j in enumerate(table.argmin(1) if metric == "fvu" else ()):
        axis.add_patch(_box(j, i))
    _ticks(axis.xaxis, layers)
    _ticks(axis.yaxis, layers)
    axis.set_xlabel(f"layer of the SAE; {of}", fontsize=9)
    axis.set_ylabel("layer of the image tokens")
    return as_written(figure)


def _map(table: np.ndarray, title: str, low: Any = None, high: Any = None, norm: Any = None) -> Any:
    """A figure of a table [rows, columns] in colours, the first row below, and its axis."""
    figure = new_figure(PANEL_WIDTH, 3.4, dpi=140)
    figure.subplots_adjust(left=0.14, right=0.98, top=0.91, bottom=0.15)
    axis = figure.subplots()
    image = axis.imshow(
        table, aspect="auto", origin="lower", cmap="viridis", vmin=low, vmax=high, norm=norm
    )
    axis.set_title(title, fontsize=_size(title), loc="left")
    bar = figure.colorbar(image, ax=axis, pad=0.03)
    if norm is not None:
        _plain_numbers(bar.ax.yaxis)
    return figure, axis


def _ticks(axis: Any, names: Sequence[int]) -> None:
    """A number at each place, or at every second, third, ... where they would run into each other."""
    places = range(0, len(names), 1 + len(names) // 14)
    axis.set_ticks(places, [str(names[place]) for place in places])


def _box(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#D55E00", lw=2)


def patch_figure(
    images: list[torch.Tensor],
    captions: list[str],
    maps: list[list[PatchMap]],
    layer: int,
    rows: Sequence[Row] = (),
) -> Figure:
    """Where latents fire whose descriptions match the caption: an image a row, a latent a column.

    Args:
        images: [3, H, W] in 0..1, as the encoder sees them.
        captions: One caption of each image.
        maps: From `matching_latents`, over a square grid of patches.
        layer: Layer of the LLM.
        rows: Of the same probe; its `match` at the layer and what chance gives stand beside the pictures.
    """
    columns = 1 + max([1, *map(len, maps)])
    height = 0.5 + 3.5 * max(1, len(images))  # Inches, of which the title takes half of one.
    figure = new_figure(3.4 * columns, height)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 1.25 / height, bottom=0.01, hspace=0.3)
    axes = np.atleast_2d(figure.subplots(max(1, len(images)), columns))[: len(images)]
    for row, image, caption, found in zip(axes, images, captions, maps, strict=True):
        for axis in row:
            axis.axis("off")
        pixels = image.permute(1, 2, 0).numpy()
        row[0].imshow(pixels)
        row[0].set_title(wrap(caption, 44), fontsize=8.5, loc="left")
        if not found:
            row[1].text(0, 0.5, "No latent that fires\nmatches the caption.", fontsize=9)
        for axis, patches in zip(row[1:], found, strict=False):
            height, width = pixels.shape[:2]
            grey = pixels.mean(-1)
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
            grid = patches.activation.view(math.isqrt(len(patches.activation)), -1).numpy()
            axis.imshow(
                grid, cmap="viridis", alpha=0.65, extent=(-0.5, width - 0.5, height - 0.5, -0.5), vmin=0
            )
            title = f"latent {patches.latent} (up to {grid.max():.2g}): {patches.description}"
            axis.set_title(wrap(title, 44), fontsize=8.5, loc="left")
    title = f"Patches that fire latents whose descriptions match the caption, layer {layer}"
    said = {row.metric: row for row in rows if (row.group, row.layer) == ("image", layer)}
    if "match" in said:
        shares = (said["match"], said["match_chance"])
        texts = (f"{row.metric} {row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in shares)
        title += f"\nof all probed images: {', '.join(texts)}"
    figure.suptitle(title, x=0.01, y=1 - 0.1 / height, ha="left", va="top")
    return as_written(figure)
