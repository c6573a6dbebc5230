"""`knn`: mutual nearest neighbours of image-token means and caption means, 0..1.

Huh et al., arXiv 2405.07987, section 2.1. Chance: images and captions paired anew.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.statistics import Comparison, compare

MAX_PERMUTATIONS = 200


def neighbours(means: Tensor, k: int) -> Tensor:
    """Bool [I, I]: the k nearest other images of each, by cosine.

    The common mean is taken off first: token means of a residual stream share most of their length.

    Args:
        means: [I, D].
        k: Number of neighbours.
    """
    centred = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
    similarity = (centred @ centred.T).fill_diagonal_(-torch.inf)
    near = similarity.topk(min(k, len(means) - 1), dim=-1).indices
    return torch.zeros(len(means), len(means), dtype=torch.bool).scatter_(-1, near, True)


def mutual_knn(a: Tensor, b: Tensor, k: int, weights: Tensor, permuted: Tensor) -> Comparison:
    """Overlap of nearest neighbours in two spaces, mean over images; interval with neighbours fixed.

    Args:
        a: [I, D_a] image-token means.
        b: [I, D_b] caption means of the same images.
        k: Number of neighbours.
        weights: [1 + R, I] bootstrap over images.
        permuted: [M, I] random permutations.
    """
    near_a, near_b = neighbours(a, k), neighbours(b, k)
    own = (near_a & near_b).sum(-1).double() / near_a.sum(-1)  # [I]
    count = near_a.sum()
    random = torch.stack([(near_a & near_b[order][:, order]).sum() for order in permuted]).double() / count
    return compare(weights @ own / weights.sum(-1), random)


class KNN(ProbeMetric):
    """Neighbours that images share with their captions, of every group at image positions."""

    name = "knn"
    panels = (Panel("knn", "knn: neighbours shared with text"),)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        groups = [name for name in data.groups if data.probe.groups[name].positions == "image"]
        for hook, layer in data.image_layers.items():
            for group in groups:
                image, text = (data.stats[name, hook].means for name in (group, "text"))
                # Only images that have tokens left in both groups.
                whole = ~(image.isnan().any(-1) | text.isnan().any(-1))
                images = int(whole.sum())
                comparison = Comparison(*[float("nan")] * 7)
                if images >= 3:
                    comparison = mutual_knn(
                        image[whole],
                        text[whole],
                        data.probe.config.knn,
                        data.bootstrap_weights(images),
                        data.permutations(images, at_most=MAX_PERMUTATIONS),
                    )
                yield Estimate(layer, group, "knn", comparison)
