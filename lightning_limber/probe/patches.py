"""Where on an image latents fire whose descriptions agree with its captions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.probe import words
from lightning_limber.probe.explanations import Descriptions

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe


class PatchMap(NamedTuple):
    """Where on an image a latent fires."""

    latent: int
    description: str
    activation: Tensor
    """[P], in the order of the image tokens."""


def matching_latents(
    known: Descriptions,
    latents: Tensor,
    captions: list[list[str]],
    max_text_density: float,
    count: int = 3,
) -> list[list[PatchMap]]:
    """For each image the strongest latents whose descriptions agree with a word of its captions.

    As in `match`, latents that fire on much of plain text are left out; those common to many images are
    not, as these may be too few to tell.

    Args:
        known: Descriptions of the layer's latents.
        latents: [B, P, K].
        captions: Captions of each image.
        max_text_density: Largest share of text tokens that a latent may fire on.
        count: Most latents per image.
    """
    said = [{word for text in texts for word in words.content_words(text)} for texts in captions]
    vocabulary, table = words.word_table([sorted(found) for found in said])
    agrees = torch.from_numpy(words.agreement(known.texts, vocabulary))  # [K, W]
    allowed = (known.density <= max_text_density)[:, None] & agrees
    maps = []
    for of_image, has in zip(latents.float().cpu(), table, strict=True):  # [P, K], [W]
        activation_sum = of_image.sum(0).masked_fill(~allowed[:, has].any(-1), 0)
        best = activation_sum.topk(min(count, len(activation_sum)))
        maps.append(
            [
                PatchMap(latent, known.texts[latent], of_image[:, latent])
                for latent, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                if value > 0
            ]
        )
    return maps


def patch_maps(probe: Probe, batch: Batch, layer: int) -> list[list[PatchMap]] | None:
    """`matching_latents` of a batch's images at one layer; None where tokens are no places in it."""
    grid = probe.model.token_grid
    if grid is None:
        return None
    hook = next(name for name, at in probe.layers.items() if at == layer)
    found: dict[str, Tensor] = {}
    probe.latents(probe.model.image_tokens(batch), found.__setitem__, [hook])
    latents = found[hook].nan_to_num()  # [B, P, K]
    known, limit = probe.descriptions[hook], probe.config.max_text_density
    return matching_latents(known, latents[:, -math.prod(grid) :], batch.captions, limit)
