"""Bootstrap intervals over images.

Shapes: I images, R bootstrap samples, C columns of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bootstrap_weights(images: int, count: int, seed: int) -> Tensor:
    """Weights [1 + count, images] of a bootstrap over images: the first row is the sample itself.

    The other rows say how often each image is drawn when as many are drawn with replacement.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(images, (count, images), generator=generator)
    weights = torch.zeros(count, images, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    return torch.cat([torch.ones(1, images, dtype=torch.float64), weights])


def resampled_sums(sums: Tensor, count: int = 1000, seed: int = 0) -> Tensor:
    """``bootstrap_weights(I, count, seed) @ sums`` of sums by image [I, C], for any number of images.

    One sample at a time: the weights of 40,000 images would take a gigabyte.
    """
    images, generator = len(sums), torch.Generator().manual_seed(seed)
    drawn = (torch.randint(images, (images,), generator=generator) for _ in range(count))
    return torch.stack([sums.sum(0), *(sums.index_select(0, rows).sum(0) for rows in drawn)])


def interval(samples: Tensor) -> tuple[float, float, float]:
    """Samples [1 + R] by `bootstrap_weights` -> (value, low, high): the first, and 95 % percentiles."""
    low, high = samples[1:].double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(samples[0]), low, high


def interval_tags(tag: str, score: tuple[float, float, float]) -> dict[str, float]:
    """The ends of a score's interval (value, low, high), by the tags under which loggers have them."""
    return {f"interval/{tag}/low": score[1], f"interval/{tag}/high": score[2]}
