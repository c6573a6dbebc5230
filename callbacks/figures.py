"""The pictures that TensorBoard shows."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lightning_limber.probe.convergence import published_curves
from lightning_limber.probe.findings import PatchMap, Row
from lightning_limber.probe.palette import COLOURS, GROUPS, LOG_SCALE, PANELS, PAPER_NAME

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = dict[int, list[Row]]
"""Rows of each probed epoch."""
Curve = tuple[list[int], list[float], list[float], list[float]]
"""Layers, values, lower and upper ends of their intervals."""


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


def probe_figure(history: History, epoch: int, title: str, control: str, published: bool = False) -> Figure:
    """Every metric by layer: groups and controls with their 95 % intervals, and chance levels.

    Args:
        history: Rows of all probed epochs.
        epoch: The one to draw.
        title: Of the figure.
        control: What the adapter of epoch 0 is called, which is drawn beside later epochs.
        published: Also draw the curves of Venhoff et al., by relative depth.
    """
    now, start = history[epoch], history.get(0) if epoch else None
    figure = _figure(16, 11)
    figure.subplots_adjust(left=0.035, right=0.99, top=0.93, bottom=0.115, hspace=0.36, wspace=0.17)
    for axis, (metric, label) in zip(figure.subplots(3, 4).flat, PANELS.items(), strict=True):
        for group in GROUPS:
            _draw(axis, curve(now, group, metric), COLOURS[group], group)
        if start is not None:
            _draw(axis, curve(start, "image", metric), COLOURS["control"], f"image, {control}", "--")
        chance = curve(now, "image", f"{metric}_chance")
        _draw(axis, chance, COLOURS["image"], "image, chance (other images' captions)", ":")
        if metric == "detectors":
            same = curve(now, "image", "detectors_same")
            _draw(axis, same, "black", "image, by the latents that detect the word in text", "-.")
        if published:
            _draw_published(axis, metric, [row.layer for row in now if row.layer is not None])
        if metric in LOG_SCALE and any(line.get_ydata().max() > 0 for line in axis.lines):
            _log_scale(axis)
        if metric == "loss_recovered":
            axis.set_ylim(-0.5, 1.1)  # Where ablation does little harm, the quotient runs away.
        axis.set_title(label, fontsize=11)
        axis.set_xlabel("layer of the LLM (residual stream behind it)")
        axis.grid(alpha=0.25)
    labels: dict[str, Any] = {}
    for axis in figure.axes:
        handles, names = axis.get_legend_handles_labels()
        labels = {**dict(zip(names, handles, strict=True)), **labels}
    figure.legend(labels.values(), labels, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


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
        axis.plot(depth, values, ":", color=COLOURS[group], lw=1, alpha=0.9, label=f"{group}, {PAPER_NAME}")


def heatmap_figure(history: History, title: str) -> Figure:
    """Image tokens, layer by epoch, for the metrics that show alignment at a glance."""
    epochs = sorted(history)
    metrics = [
        m for m in ("fvu", "cosine", "shared", "loss_recovered") if curve(history[epochs[0]], "image", m)
    ]
    figure = _figure(4 * len(metrics), 4.2)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.83, bottom=0.13, wspace=0.25)
    axes = np.atleast_1d(figure.subplots(1, len(metrics)))
    for axis, metric in zip(axes, metrics, strict=True):
        curves = [cast(Curve, curve(history[epoch], "image", metric)) for epoch in epochs]
        # Where ablation does little harm, loss_recovered runs away.
        limits = (0.0, 1.0) if metric == "loss_recovered" else (None, None)
        image = axis.imshow(
            np.array([of[1] for of in curves]).T,
            aspect="auto",
            origin="lower",
            cmap="viridis",
            vmin=limits[0],
            vmax=limits[1],
        )
        axis.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
        axis.set_yticks(range(len(curves[0][0])), [str(layer) for layer in curves[0][0]])
        axis.set_xlabel("epoch (0: before training)")
        axis.set_ylabel("layer of the LLM")
        axis.set_title(PANELS[metric], fontsize=11)
        figure.colorbar(image, ax=axis)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def cross_layer_figure(layers: list[int], tables: dict[str, list[list[float]]], title: str) -> Figure:
    """Image tokens of each layer (rows) through the SAE of each layer (columns).

    Where in the LLM's depth does an image token look most like text? The darkest cell of its row.
    """
    figure = _figure(14, 6.2)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.87, bottom=0.09, wspace=0.12)
    names = [str(layer) for layer in layers]
    for axis, (metric, values) in zip(figure.subplots(1, 2), tables.items(), strict=True):
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
        best = table.argmin(1) if metric == "fvu" else None
        for i, j in enumerate(best if best is not None else []):
            axis.add_patch(_box(j, i))
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel("layer of the SAE")
        axis.set_ylabel("layer of the image tokens")
        axis.set_title(
            f"{metric} (box: the SAE that explains most)" if metric == "fvu" else metric, fontsize=11
        )
    figure.suptitle(f"Image tokens through the SAEs of other layers. {title}", x=0.01, ha="left")
    return figure


def _box(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#D55E00", lw=2)


def caption_figure(images: list[torch.Tensor], references: list[str], written: list[str]) -> Figure:
    """Pictures [3, H, W] in 0..1, as the encoder sees them, with both captions."""
    columns = 4
    rows = -(-len(images) // columns)
    figure = _figure(15, 4.2 * rows)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.45 / (4.2 * rows), bottom=0.01, hspace=0.2)
    for axis, image, reference, caption in zip(
        np.atleast_1d(figure.subplots(rows, columns)).flat, images, references, written, strict=False
    ):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(f"true: {_wrap(reference)}\nmodel: {_wrap(caption)}", fontsize=8.5, loc="left")
    for axis in figure.axes:
        axis.axis("off")
    return figure


def patch_figure(
    images: list[torch.Tensor], captions: list[str], maps: list[list[PatchMap]], layer: int
) -> Figure:
    """Where latents fire whose descriptions match the caption: an image a row, a latent a column.

    Args:
        images: [3, H, W] in 0..1, as the encoder sees them.
        captions: One of each.
        maps: From `Findings.matching`, over a square grid of patches.
        layer: Of the LLM.
    """
    columns = 1 + max(1, *(len(found) for found in maps))
    figure = _figure(3.4 * columns, 3.5 * len(images) + 0.4)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 1.1 / (3.5 * len(images)), bottom=0.01, hspace=0.3
    )
    axes = np.atleast_2d(figure.subplots(len(images), columns))
    for row, image, caption, found in zip(axes, images, captions, maps, strict=True):
        for axis in row:
            axis.axis("off")
        pixels = image.permute(1, 2, 0).numpy()
        row[0].imshow(pixels)
        row[0].set_title(_wrap(caption, 44), fontsize=8.5, loc="left")
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
            axis.set_title(_wrap(title, 44), fontsize=8.5, loc="left")
    title = f"Patches that fire latents whose descriptions match the caption, layer {layer}"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # Not at start-up: --help does not draw.

    # Margins are given, not solved for: constrained layout took a second a figure.
    return Figure(figsize=(width, height))


def _wrap(text: str, width: int = 52) -> str:
    return "\n".join(textwrap.wrap(text, width)[:4])


def log_figure(trainer: Any, tag: str, figure: Figure) -> None:
    """Hands the figure to every logger that takes figures (TensorBoard does)."""
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_figure"):
            logger.experiment.add_figure(tag, figure, global_step=trainer.global_step)
