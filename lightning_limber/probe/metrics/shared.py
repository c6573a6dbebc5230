"""`shared`: Jaccard index of the latents that fire in a group and in text.

It has no interval: a bootstrap sample holds two thirds of the images, in which fewer latents fire.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel


def jaccard(fires: Tensor, other: Tensor) -> Tensor:
    """|both| / |either| of the latents that fire in two groups, bool [..., K] each -> [...]."""
    return (fires & other).sum(-1).double() / (fires | other).sum(-1)


class Shared(ProbeMetric):
    """Share of latents that fire in both of a group and text, among those that fire in either."""

    name = "shared"
    panels = (Panel("shared", "shared: latents also alive in text", by_epoch=True),)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for (group, hook), stats in data.stats.items():
            value = float(jaccard(stats.fires, data.stats["text", hook].fires))
            yield Estimate(data.layers[hook], group, "shared", value)
