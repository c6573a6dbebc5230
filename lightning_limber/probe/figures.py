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


def probe_figure(
    history: History,
    epoch: int,
    panels: Sequence[Panel],
    title: str,
    control: str,
    published: bool = False,
) -> Figure:
    """Every metric by layer: groups and controls with their 95 % intervals, and chance levels.

    Args:
        history: Rows of all probed epochs.
        epoch: The one to draw.
        panels: How the metrics are drawn, in order; those without a row are left out.
        title: Title of the figure.
        control: Name of the adapter of epoch 0, which is drawn beside later epochs.
        published: Also draw the curves of Venhoff et al., by relative depth.
    """
    now, start = history[epoch], history.get(0) if epoch else None
    groups = ordered_groups(row.group for row in now)
    by_layer = {row.metric for row in now if row.layer is not None}
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
        for group, colour in groups.items():
            _draw(axis, curve(now, group, panel.metric), colour, group)
        if start is not None:
            _draw(axis, curve(start, "image", panel.metric), COLOURS["control"], f"image, {control}", "--")
        chance = curve(now, "image", f"{panel.metric}_chance")
        _draw(axis, chance, COLOURS["image"], "image, chance", ":")
        if panel.also:
            _draw(axis, curve(now, "image", panel.also[0]), "black", panel.also[1], "-.")
        if published:
            _draw_published(axis, panel.metric, [row.layer for row in now if row.layer is not None])
        if panel.log and any(line.get_ydata().max() > 0 for line in axis.lines):
            _log_scale(axis)
        if panel.limits:
            axis.set_ylim(*panel.limits)
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
    """Logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(NullFormatter())


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


def heatmap_figure(history: History, panels: Sequence[Panel], title: str) -> Figure | None:
    """Image tokens, layer by epoch, for the panels that ask for it; None without any.

    A metric is drawn over the epochs that have it.
    """
    found: list[tuple[Panel, dict[int, Curve]]] = []
    for panel in panels:
        by_epoch = {epoch: curve(history[epoch], "image", panel.metric) for epoch in sorted(history)}
        curves = {epoch: of_epoch for epoch, of_epoch in by_epoch.items() if of_epoch is not None}
        if panel.by_epoch and curves:
            found.append((panel, curves))
    if not found:
        return None
    figure = new_figure(4 * len(found), 4.2)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.83, bottom=0.13, wspace=0.25)
    axes = np.atleast_1d(figure.subplots(1, len(found)))
    for axis, (panel, curves) in zip(axes, found, strict=True):
        low, high = panel.limits or (None, None)
        layers = next(iter(curves.values()))[0]
        image = axis.imshow(
            np.array([values for _, values, _, _ in curves.values()]).T,
            aspect="auto",
            origin="lower",
            cmap="viridis",
            vmin=low,
            vmax=high,
        )
        axis.set_xticks(range(len(curves)), [str(epoch) for epoch in curves])
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axis.set_xlabel("epoch (0: before training)")
        axis.set_ylabel("layer of the LLM")
        axis.set_title(panel.label, fontsize=11)
        figure.colorbar(image, ax=axis)
    figure.suptitle(title, x=0.01, ha="left")
    return as_written(figure)


def matrix_figure(layers: list[int], tables: dict[str, list[list[float]]], title: str) -> Figure:
    """Image tokens of each layer (rows) through the SAE of each layer (columns), a table a panel."""
    figure = new_figure(7 * len(tables), 6.2)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.87, bottom=0.09, wspace=0.12)
    names = [str(layer) for layer in layers]
    axes = np.atleast_1d(figure.subplots(1, len(tables)))
    for axis, (metric, values) in zip(axes, tables.items(), strict=True):
        table = np.array(values)
        image = axis.imshow(
            np.log10(np.maximum(table, 1e-3)), cmap="viridis", origin="lower", aspect="auto"
        )
        middle = image.norm.vmin + 0.6 * (image.norm.vmax - image.norm.vmin)
        for (i, j), value in np.ndenumerate(table):
            dark = np.log10(max(value, 1e-3)) < middle
            axis.text(
                j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, color="w" if dark else "k"
            )
        label = metric
        if metric == "fvu":
            label = "fvu (box: the SAE that explains most)"
            for i, j in enumerate(table.argmin(1)):
                axis.add_patch(_box(j, i))
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("layer of the SAE")
        axis.set_ylabel("layer of the image tokens")
        axis.set_title(label, fontsize=11)
    figure.suptitle(title, x=0.01, ha="left")
    return as_written(figure)


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
