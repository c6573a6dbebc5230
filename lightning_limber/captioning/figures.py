"""Pictures with their captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_limber.utils.figures import as_written, new_figure, wrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def caption_figure(images: list[torch.Tensor], references: list[str], written: list[str]) -> Figure:
    """Pictures [3, H, W] in 0..1, as the encoder sees them, with both captions."""
    columns = 4
    rows = max(1, -(-len(images) // columns))
    figure = new_figure(15, 4.2 * rows)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.45 / (4.2 * rows), bottom=0.01, hspace=0.2)
    for axis, image, reference, caption in zip(
        np.atleast_1d(figure.subplots(rows, columns)).flat, images, references, written, strict=False
    ):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(f"true: {wrap(reference)}\nmodel: {wrap(caption)}", fontsize=8.5, loc="left")
    for axis in figure.axes:
        axis.axis("off")
    return as_written(figure)
