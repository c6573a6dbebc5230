"""Bootstrap intervals over images."""

from __future__ import annotations

import torch
from torch import Tensor


def resamples(images: int, count: int, seed: int) -> Tensor:
    """Weights [1 + count, images] of a bootstrap over images: the first row is the sample itself.

    The other rows say how often each image is drawn when as many are drawn with replacement.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(images, (count, images), generator=generator)
    weights = torch.zeros(count, images, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    return torch.cat([torch.ones(1, images, dtype=torch.float64), weights])


def intervals(values: Tensor) -> list[tuple[float, float, float]]:
    """Values [M, 1 + R] of `resamples` -> (value, low, high): the sample's, and the 95 % percentiles."""
    ends = values[:, 1:].double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=1)
    return list(zip(values[:, 0].tolist(), *ends.tolist(), strict=True))


def interval(values: Tensor) -> tuple[float, float, float]:
    """`intervals` of one metric's values [1 + R]."""
    return intervals(values[None])[0]
