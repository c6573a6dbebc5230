"""`match`: share of images whose captions agree with the description of one of their top latents.

As in Venhoff et al. (arXiv 2506.11976, section 4), with a word list in place of a paid judge. Chance: the
captions of other images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_limber.probe import words
from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.statistics import compare_hits

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe


def top_latents(
    activation_sum: Tensor,
    density: Tensor,
    count: int,
    max_image_share: float = 0.05,
    max_text_density: float = 0.005,
) -> Tensor:
    """Bool [I, K]: each image's strongest latents, common ones left out (as in Venhoff et al.).

    Args:
        activation_sum: [I, K] sum of a latent's activations over the image's tokens.
        density: [K] share of text tokens that each latent fires on.
        count: Latents per image.
        max_image_share: Latents that fire on a larger share of the images are dropped.
        max_text_density: So are latents that fire on a larger share of text tokens.
    """
    activation_sum = activation_sum.float()
    common = ((activation_sum > 0).float().mean(0) > max_image_share) | (density > max_text_density)
    activation_sum = activation_sum.masked_fill(common, 0)
    values, index = activation_sum.topk(min(count, activation_sum.shape[1]), dim=-1)
    return torch.zeros_like(activation_sum, dtype=torch.bool).scatter_(-1, index, values > 0)


class Match(ProbeMetric):
    """Agreement of latents' descriptions with captions, at layers that have descriptions."""

    name = "match"
    panels = (Panel("match", "match: descriptions agree with caption"),)

    def setup(self, probe: Probe) -> None:
        # Captions are the truth here; every other group is asked.
        names = [name for name in probe.groups if name != "caption"]
        self.activation_sums = tuple(names) if probe.descriptions else ()

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        config = data.probe.config
        vocabulary, captions = data.caption_words
        for hook, known in data.probe.descriptions.items():
            agrees = torch.from_numpy(words.agreement(known.texts, vocabulary))  # [K, W]
            for group in self.activation_sums:
                top = top_latents(
                    data.stats[group, hook].activation_sum,
                    known.density,
                    config.top_latents,
                    config.max_image_share,
                    config.max_text_density,
                )
                hits = words.word_hits(top.float() @ agrees.float() > 0, captions)
                own = hits.diagonal()
                data.add_ratio("match", group, data.layers[hook], own, torch.ones_like(own))
                comparison = compare_hits(hits, data.weights, data.permutations())
                yield Estimate(data.layers[hook], group, "match", comparison)
