"""The pictures that TensorBoard shows. Colours are Okabe and Ito's, safe for colour-blind readers."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "image": "#D55E00",
    "caption": "#0072B2",
    "text": "#009E73",
    "untrained": "#999999",
}
LABELS = {
    "fvu": "fvu: unexplained variance",
    "mse": "mse",
    "cosine": "cosine(x, x')",
    "norm_ratio": "norm ratio |x'| / |x|",
    "norm": "norm |x|",
    "l0": "l0: active latents per token",
    "sparsity": "sparsity: l0 / d_sae",
    "alive": "alive: latents that fire",
    "shared": "shared: latents also alive in text",
    "outliers": "outliers: tokens left out",
}
LOG_SCALE = {"mse", "norm", "l0", "sparsity"}
DRAWN = ("fvu", "cosine", "norm_ratio", "mse", "l0", "alive", "shared", "norm")
Results = dict[str, dict[str, list[float]]]
"""group -> metric -> value by probed layer."""


def probe_figure(layers: list[int], now: Results, untrained: Results | None, title: str) -> Figure:
    """Every metric by layer: a line for each group, and the untrained adapter's image tokens."""
    figure = _figure(15, 7.2)
    axes = figure.subplots(2, 4).flat
    for axis, metric in zip(axes, DRAWN, strict=True):
        curves = {group: values[metric] for group, values in now.items() if metric in values}
        if untrained is not None:
            curves["untrained"] = untrained["image"][metric]
        for group, values in curves.items():
            label = "image, untrained adapter" if group == "untrained" else group
            style = "--" if group == "untrained" else "-"
            axis.plot(layers, values, style, color=COLOURS[group], marker="o", ms=3.5, label=label)
        if metric in LOG_SCALE:
            axis.set_yscale("log")
        axis.set_title(LABELS[metric], fontsize=11)
        axis.set_xlabel("layer of the LLM")
        axis.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def heatmap_figure(layers: list[int], history: dict[int, Results], title: str) -> Figure:
    """Image tokens, layer by epoch, for the metrics that show alignment at a glance."""
    epochs = sorted(history)
    metrics = ("fvu", "cosine", "l0", "shared")
    figure = _figure(15, 4.2)
    for axis, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        values = np.array([history[epoch]["image"][metric] for epoch in epochs]).T
        image = axis.imshow(values, aspect="auto", origin="lower", cmap="viridis")
        axis.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
        axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axis.set_xlabel("epoch (0: untrained)")
        axis.set_ylabel("layer of the LLM")
        axis.set_title(LABELS[metric], fontsize=11)
        figure.colorbar(image, ax=axis)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def caption_figure(images: list[torch.Tensor], references: list[str], written: list[str]) -> Figure:
    """Pictures [3, H, W] in 0..1, as the encoder sees them, with both captions."""
    columns = 4
    rows = -(-len(images) // columns)
    figure = _figure(15, 4.2 * rows)
    for axis, image, reference, caption in zip(
        np.atleast_1d(figure.subplots(rows, columns)).flat, images, references, written, strict=False
    ):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(f"true: {_wrap(reference)}\nmodel: {_wrap(caption)}", fontsize=8.5, loc="left")
    for axis in figure.axes:
        axis.axis("off")
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # Not at start-up: --help does not draw.

    return Figure(figsize=(width, height), layout="constrained")


def _wrap(text: str, width: int = 52) -> str:
    return "\n".join(textwrap.wrap(text, width)[:4])


def log_figure(trainer: Any, tag: str, figure: Figure) -> None:
    """Hands the figure to every logger that takes figures (TensorBoard does)."""
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_figure"):
            logger.experiment.add_figure(tag, figure, global_step=trainer.global_step)
