"""`loss_recovered`: how much of what captions read in the picture passes through the SAE of a layer.

    (swapped - spliced) / (swapped - clean)

of the captions' cross-entropy, with the image tokens of a layer replaced by the SAE's x' (spliced) or by
another image's (swapped, see `use`). NaN where there is nothing to recover: where another image does less
than 0.1 nat of harm, or no certain harm. `harm_splice` is spliced - clean in nats per caption token; that
of group `text` splices the tokens of captions without an image: what the SAEs cost text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.metrics.use import by_image
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.statistics import interval

if TYPE_CHECKING:
    from lightning_limber.probe.intervention import Intervention

MIN_USE = 0.1
"""Nats per token: below it, a quotient of two small differences says nothing."""


class LossRecovered(ProbeMetric):
    """Harm of the SAE's reconstruction of image tokens, and its quotient with that of another image."""

    name = "loss_recovered"
    panels = (
        Panel(
            "loss_recovered",
            "loss recovered by the SAE's x', against another picture",
            limits=(-1, 1.1),
            by_epoch=True,
        ),
        Panel("harm_splice", "harm of the SAE's x' (nats a token)", by_epoch=True),
    )

    def __init__(self) -> None:
        self._text: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        """Losses of text by hook name and images, where they are the same at every probe."""

    def intervene(self, run: Intervention, hook: str) -> Tensor:
        """[B, 6] losses of each image, clean, spliced and swapped, its number of targets, and losses of its
        captions without an image, clean and spliced.
        """
        key = hook, tuple(run.batch.index)
        text = self._text.get(key) if run.known_text else None
        if text is None:
            text = run.spliced_text_losses(hook)
        if run.known_text:
            self._text[key] = text
        spliced = run.losses(hook, run.splice(hook, run.image_tokens(hook)))
        losses = [run.clean_losses, spliced, run.swapped_losses(hook), run.targets]
        return torch.cat([torch.stack(losses, dim=-1), text], dim=-1)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for hook, items in found.interventions.items():
            layer, sums = data.layers[hook], by_image(items)
            clean, spliced, swapped, targets, text, spliced_text = sums.unbind(-1)
            for metric, group, ratio in (
                ("harm_splice", "image", (spliced - clean, targets)),
                ("harm_splice", "text", (spliced_text - text, targets)),
                ("loss_recovered", "image", (swapped - spliced, swapped - clean)),
            ):
                data.add_ratio(metric, group, layer, *ratio, items)
            clean, spliced, swapped, targets, text, spliced_text = (
                data.bootstrap_weights(len(sums)) @ sums
            ).unbind(-1)
            yield Estimate(layer, "image", "harm_splice", (spliced - clean) / targets)
            yield Estimate(layer, "text", "harm_splice", (spliced_text - text) / targets)
            value, use = (swapped - spliced) / (swapped - clean), interval((swapped - clean) / targets)
            if use[0] < MIN_USE or use[1] <= 0:
                value = torch.full_like(value, torch.nan)
            yield Estimate(layer, "image", "loss_recovered", value)
