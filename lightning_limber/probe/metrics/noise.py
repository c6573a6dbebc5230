"""The control group `noise`: Gaussian vectors of the image tokens' norms in the image's place.

Every metric that measures all groups measures it too. It costs a forward of the image positions, and their
SAEs.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.models.limber import Limber
from lightning_limber.probe.metrics.base import Group, ProbeMetric


def gaussian_like(tokens: Tensor, ids: list[str]) -> Tensor:
    """Gaussian directions with the norms of `tokens` [B, P, D]; an image's are a function of its name."""
    noise = []
    for name in ids:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise.append(torch.randn(tokens.shape[1:], generator=generator))
    directions = torch.stack(noise).to(tokens)
    return directions * (tokens.norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True))


def _fill(model: Limber, batch: Batch, image_tokens: Tensor) -> Tensor:
    return gaussian_like(image_tokens, batch.image_ids)


class Noise(ProbeMetric):
    """Adds the group `noise`; it has no number of its own."""

    name = "noise"
    groups = (Group("noise", "image", _fill),)
