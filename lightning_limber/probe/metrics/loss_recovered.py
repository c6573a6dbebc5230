"""`loss_recovered`: how much of what captions need passes through the SAE of a layer.

    (ablated - spliced) / (ablated - clean), in nats

of the captions' cross-entropy, with image tokens replaced by the SAE's x' (spliced) or by the group's mean
(ablated) at that layer. NaN where the mean does no certain harm: there is nothing to recover.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.statistics import interval

if TYPE_CHECKING:
    from lightning_limber.probe.intervention import Intervention


class LossRecovered(ProbeMetric):
    """Loss recovered by the SAE's reconstruction, against the mean in place of image tokens."""

    name = "loss_recovered"
    # Where ablation does little harm, the quotient runs away.
    panels = (Panel("loss_recovered", "loss recovered by the SAE's x'", limits=(-0.5, 1.1), by_epoch=True),)

    def intervene(self, run: Intervention, hook: str) -> Tensor:
        """[B, 3] loss of each image: clean, spliced and ablated."""
        x = run.image_tokens(hook)
        losses = [run.clean_losses]
        for new in (run.probe.encode(hook, x.float())[1].to(x), run.stats["image", hook].mean.to(x)):
            losses.append(run.losses(hook, torch.where(run.keep(hook, x)[:, None], new, x)))
        return torch.stack(losses, dim=-1)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for hook, items in found.interventions.items():
            order = torch.tensor([i for index, _ in items for i in index]).argsort()
            table = torch.cat([losses for _, losses in items])[order]  # [I, 3]
            clean, spliced, ablated = (data.bootstrap_weights(len(table)) @ table).unbind(-1)
            value = (ablated - spliced) / (ablated - clean)
            by_image = torch.zeros(len(data.images), 2)
            by_image[: len(table)] = (table[:, 2:] - table[:, [1, 0]]).float()  # The first images.
            data.by_image["loss_recovered", "image", data.layers[hook]] = by_image
            if interval(ablated - clean)[1] <= 0:
                value = torch.full_like(value, torch.nan)
            yield Estimate(data.layers[hook], "image", "loss_recovered", value)
