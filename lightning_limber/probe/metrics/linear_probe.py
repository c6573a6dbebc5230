"""`linear_probe_auroc`: how well a linear probe reads an image's attributes from its mean token.

The ceiling of `detectors`: what is there to be read, whether or not one latent reads it. A ridge regression
on the mean image token of one half of the images is scored on the other, and the halves are swapped; mean
AUROC over attributes. Chance: the truth permuted within each half, and everything done again, as for
`detectors`. The interval is of the fitted probes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_limber.probe.attributes import (
    CROSSED,
    HALVES,
    Attributes,
    Scores,
    compare_best,
    pair_signs,
    read_attributes,
)
from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric

PENALTIES = tuple(10.0**power for power in range(-6, 2))
"""Of the ridge regression, in units of the mean squared distance of an image from the mean."""


def ridge_scores(x: Tensor, new: Tensor, labels: Tensor) -> Tensor:
    """Ridge regression with an intercept, with the penalty that predicts left-out images best.

    One penalty for all attributes of a draw: the one with the least squared error on images that are left
    out in turn, which has a closed form. By the kernel of the n images, as n is less than D.

    Args:
        x: [n, D] float64 of the images that train.
        new: [m, D] of the images to score.
        labels: [A, draws, n] float64, 0 or 1.

    Returns:
        [A, draws, m]; without the intercept, which changes no order.
    """
    mean = x.mean(0)
    x, new = x - mean, new - mean
    values, vectors = torch.linalg.eigh(x @ x.T)
    values = values.clamp_min(0)
    target = labels - labels.mean(-1, keepdim=True)
    turned = target @ vectors  # [A, draws, n]
    # Images that are all alike have no distance: their scores are 0.
    penalties = values.mean().clamp_min(1e-200) * torch.tensor(PENALTIES, dtype=torch.float64)
    errors = []
    for penalty in penalties:
        kept = values / (values + penalty)
        residuals = target - (turned * kept) @ vectors.T
        leverage = vectors**2 @ kept + 1 / len(x)  # Diagonal of the matrix that maps labels to their fit.
        errors.append((residuals / (1 - leverage)).pow(2).mean((0, -1)))  # [draws]
    chosen = penalties[torch.stack(errors).argmin(0)]  # [draws]
    return turned / (values + chosen[:, None]) @ (new @ x.T @ vectors).T


def linear_probe(means: Tensor, attributes: Attributes) -> Scores:
    """Held-out AUROC of probes of mean tokens [I, D]; an image without a token, NaN, counts as the mean."""
    halves = [means[half].double() for half in HALVES]
    margins, weighted = [], []
    for fitted_on, scored_on in CROSSED:
        mean = halves[fitted_on].nanmean(0).nan_to_num(0)
        x, new = (torch.where(halves[i].isnan(), mean, halves[i]) for i in (fitted_on, scored_on))
        scores = ridge_scores(x, new, attributes.halves[fitted_on].labels.double())
        half = attributes.halves[scored_on]
        of_half = [pair_signs(*both) for both in zip(scores, half.labels, strict=True)]
        margins.append(torch.stack([signs.sum((1, 2)) / 2 for signs in of_half]))  # [A, 1 + M]
        weighted.append(torch.cat([half.weighted_margins(signs[:1], i) for i, signs in enumerate(of_half)]))
    return attributes.scores(margins[0] + margins[1], weighted[0] + weighted[1])


class LinearProbe(ProbeMetric):
    """Mean AUROC of linear probes of the image's mean token, against chance."""

    name = "linear_probe"

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        attributes = read_attributes(data)
        if attributes is None:
            return
        by_layer = []
        for hook, layer in data.image_layers.items():
            scores = linear_probe(data.stats["image", hook].means, attributes)
            if (layer, "image") not in data.without_tokens:
                by_layer.append(scores)
            yield Estimate(layer, "image", "linear_probe_auroc", scores.compare())
        if by_layer:
            yield Estimate(None, "image", "linear_probe_auroc_max", compare_best(by_layer))
