"""`shared`: Jaccard index of the latents that fire in a group and in text.

Chance: latents that fire in the group independently of text, at the same shares a and b of all latents:
a b / (a + b - a b). Both have no interval: a bootstrap sample holds two thirds of the images, in which
fewer latents fire.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel


def jaccard(fires: Tensor, other: Tensor) -> Tensor:
    """|both| / |either| of the latents that fire in two groups, bool [..., K] each -> [...]."""
    return (fires & other).sum(-1).double() / (fires | other).sum(-1)


def jaccard_of_independent(fires: Tensor, other: Tensor) -> Tensor:
    """The index that independent sets of these sizes are to be expected to have, [..., K] -> [...]."""
    a, b = fires.double().mean(-1), other.double().mean(-1)
    return a * b / (a + b - a * b)


class Shared(ProbeMetric):
    """Share of latents that fire in both of a group and text, among those that fire in either."""

    name = "shared"
    panels = (Panel("shared", "shared: latents also alive in text", by_epoch=True),)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for (group, hook), stats in data.stats.items():
            text = data.stats["text", hook].fires
            yield Estimate(data.layers[hook], group, "shared", float(jaccard(stats.fires, text)))
            if group != "text":
                chance = float(jaccard_of_independent(stats.fires, text))
                yield Estimate(data.layers[hook], group, "shared_chance", chance)
