"""`use`: how much of the picture is read from a layer on, in nats.

    (loss with another image's residual stream at the image positions) - (loss), in nats per caption token

Another image, with other captions, is a picture too: what it costs is the content, not an unnatural token.
Where `use` is 0, no later layer reads from the image positions what tells this picture from another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Items, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel

if TYPE_CHECKING:
    from lightning_limber.probe.intervention import Intervention


def by_image(items: Items) -> Tensor:
    """What `intervene` returned for each image [B, C], in the order of the images: [I, C]."""
    order = torch.tensor([i for index, _ in items for i in index]).argsort()
    return torch.cat([values for _, values in items])[order]


class Use(ProbeMetric):
    """Harm of another image's residual stream in place of the image's, in nats per caption token."""

    name = "use"
    panels = (Panel("use", "use: nats lost with another picture from here on", by_epoch=True),)

    def intervene(self, run: Intervention, hook: str) -> Tensor:
        """[B, 3] losses of each image, clean and swapped, and its number of targets."""
        return torch.stack([run.clean_losses, run.swapped_losses(hook), run.targets], dim=-1)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for hook, items in found.interventions.items():
            sums = by_image(items)
            layer, harm = data.layers[hook], sums[:, 1] - sums[:, 0]
            data.add_ratio("use", "image", layer, harm, sums[:, 2], items)
            clean, swapped, targets = (data.bootstrap_weights(len(sums)) @ sums).unbind(-1)
            yield Estimate(layer, "image", "use", (swapped - clean) / targets)
