"""Bootstrap intervals over images, and permutation chance levels.

Shapes: I images, R bootstrap samples, M permutations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_limber.utils.bootstrap import bootstrap_weights, interval

__all__ = ["Comparison", "bootstrap_weights", "compare", "compare_hits", "interval", "permutations"]


def permutations(images: int, count: int, seed: int) -> Tensor:
    """[count, images] random permutations, each of which pairs images with captions anew."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, images, generator=generator).argsort(dim=-1)


@dataclass(frozen=True)
class Comparison:
    """A value with its 95 % bootstrap interval over images, and what chance gives.

    Attributes:
        value, low, high: The value and its interval.
        chance, chance_low, chance_high: Mean and 95 % range over random permutations.
        p: Share of permutations (the real pairing counted in) that reach the value.
    """

    value: float
    low: float
    high: float
    chance: float
    chance_low: float
    chance_high: float
    p: float


def compare(samples: Tensor, permuted: Tensor) -> Comparison:
    """Compares bootstrap samples [1 + R] of a metric with its values [M] under permutation."""
    value, low, high = interval(samples)
    ends = permuted.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    chance_low, chance_high = ends.tolist()
    p = (1 + int((permuted >= value - 1e-12).sum())) / (1 + len(permuted))
    return Comparison(value, low, high, float(permuted.mean()), chance_low, chance_high, p)


def compare_hits(hits: Tensor, weights: Tensor, permuted: Tensor) -> Comparison:
    """Share of images that hit with their own captions, against other images' captions.

    Args:
        hits: [I, I] how well image i hits with the captions of image j, 0..1.
        weights: [1 + R, I] from `bootstrap_weights`.
        permuted: [M, I] from `permutations`.
    """
    hits = hits.double()
    own = weights @ hits.diagonal() / weights.sum(-1)
    return compare(own, hits[torch.arange(len(hits)), permuted].mean(-1))
