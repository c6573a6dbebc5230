"""`match`: share of images whose captions agree with the description of one of their top latents.

As in Venhoff et al. (arXiv 2506.11976, section 4), with a word list in place of a paid judge. Chance: the
captions of other images. A latent's strength on an image is the sum of its activations over the image's
tokens; with ``strength: max`` the largest of them, by which the paper's code ranks. Latents without a
description are nobody's top latents, as there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_limber.probe import words
from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.statistics import compare_hits

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe


def top_latents(
    strength: Tensor,
    density: Tensor,
    count: int,
    max_image_share: float = 0.05,
    max_text_density: float = 0.005,
    described: Tensor | None = None,
) -> Tensor:
    """Bool [I, K]: each image's strongest latents, common ones left out (as in Venhoff et al.).

    Args:
        strength: [I, K] sum or maximum of a latent's activations over the image's tokens.
        density: [K] share of text tokens that each latent fires on.
        count: Latents per image.
        max_image_share: Latents that fire on a larger share of the images are dropped.
        max_text_density: So are latents that fire on a larger share of text tokens.
        described: [K] false at latents to drop as well; None drops none.
    """
    strength = strength.float()
    dropped = ((strength > 0).float().mean(0) > max_image_share) | (density > max_text_density)
    if described is not None:
        dropped |= ~described
    strength = strength.masked_fill(dropped, 0)
    # Of equal ones the first, everywhere: in bfloat16 many are equal.
    values, index = (found[:, :count] for found in strength.sort(dim=-1, descending=True, stable=True))
    return torch.zeros_like(strength, dtype=torch.bool).scatter_(-1, index, values > 0)


class Match(ProbeMetric):
    """Agreement of latents' descriptions with captions, at layers that have descriptions.

    Args:
        strength: By what an image's latents are ranked: ``sum`` or ``max`` of their activations.
    """

    name = "match"
    panels = (Panel("match", "match: descriptions agree with caption"),)

    def __init__(self, strength: Literal["sum", "max"] = "sum") -> None:
        if strength not in ("sum", "max"):
            raise ValueError(f"probe.metrics: match has strength={strength!r}; allowed are sum and max.")
        self.strength = strength

    def setup(self, probe: Probe) -> None:
        # Captions are the truth here; every other group is asked.
        self.asked = [name for name in probe.groups if name != "caption"] if probe.descriptions else []
        needed = "activation_sums" if self.strength == "sum" else "activation_maxima"
        setattr(self, needed, tuple(self.asked))

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        config = data.probe.config
        vocabulary, captions = data.caption_words
        for hook, known in data.probe.descriptions.items():
            agrees = torch.from_numpy(words.agreement(known.texts, vocabulary))  # [K, W]
            for group in self.asked:
                if (group, hook) not in data.stats:
                    continue
                stats = data.stats[group, hook]
                top = top_latents(
                    stats.activation_sum if self.strength == "sum" else stats.activation_max,
                    known.density,
                    config.top_latents,
                    config.max_image_share,
                    config.max_text_density,
                    known.described,
                )
                hits = words.word_hits(top.float() @ agrees.float() > 0, captions)
                own = hits.diagonal()
                data.add_ratio("match", group, data.layers[hook], own, torch.ones_like(own))
                comparison = compare_hits(hits, data.weights, data.permutations())
                yield Estimate(data.layers[hook], group, "match", comparison)
