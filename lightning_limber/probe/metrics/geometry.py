"""Reconstruction and sparsity of a group's tokens by the SAE of each layer.

For residual-stream vectors x [n, D] and their reconstructions x' by the SAE of that layer (on the raw
scale), with latents [n, K]:

    fvu         sum |x - x'|^2 / sum |x - mean|^2, the mean over all tokens of the group
    fvu_text    sum |x - x'|^2 / (tokens * variance of plain text at that layer): one yardstick for
                all groups and data sets (sanity_check.py measures it)
    mse         mean over tokens and dimensions of (x - x')^2 (Venhoff et al., arXiv 2506.11976)
    rel_error   sum |x - x'|^2 / sum |x|^2
    cosine      mean of cos(x, x')
    norm_ratio  mean of |x'| / |x|
    norm        mean of |x|; norm_p10, norm_p50 and norm_p90 are quantiles over all tokens
    variance    mean of |x - mean|^2
    l0          mean number of active latents per token; sparsity is l0 / K
    alive       share of latents that fire on at least one token of the group
    outliers    share of tokens left out as attention sinks
    tokens      number of tokens counted

`alive` has no interval: it counts latents that fire at least once, and a bootstrap sample, which holds two
thirds of the images, has fewer. Nor have the quantiles.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric, Tokens
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.token_stats import SUMS, ImageStats

QUANTILES = (10, 50, 90)
"""Of the norm, in percent."""


def reconstruction_metrics(
    stats: ImageStats, weights: Tensor | None = None, text_variance: float = float("nan")
) -> dict[str, Tensor]:
    """The metrics above for each row of weights over images, [R] each.

    Args:
        stats: The group's sums by image.
        weights: [R, I], from `bootstrap_weights`; None is one row of ones.
        text_variance: Mean of |x - mean|^2 of plain text at that layer, for `fvu_text`.

    Returns:
        Metrics by name. NaN where the group has no token (or no variance, for `fvu`).
    """
    if weights is None:
        weights = stats.sums.new_ones(1, len(stats.sums))
    sums = stats.weighted(weights)
    tokens, total = sums["tokens"], weights @ stats.total  # [R], [R, D]
    variance = sums["squares"] - torch.linalg.vecdot(total, total) / tokens
    # A group that does not vary has no FVU; what is left there is rounding.
    variance = torch.where(variance > 1e-12 * sums["squares"], variance, torch.nan)
    l0 = sums["actives"] / tokens
    return {
        "fvu": sums["errors"] / variance,
        "fvu_text": sums["errors"] / (tokens * text_variance),
        "mse": sums["errors"] / (tokens * total.shape[-1]),
        "rel_error": sums["errors"] / sums["squares"],
        "cosine": sums["cosines"] / tokens,
        "norm_ratio": sums["norm_ratios"] / tokens,
        "norm": sums["norms"] / tokens,
        "variance": variance / tokens,
        "l0": l0,
        "sparsity": l0 / stats.fires.numel(),
        "alive": stats.fires.double().mean().expand_as(l0),
        "outliers": sums["outliers"] / (tokens + sums["outliers"]),
        "tokens": tokens,
    }


def ratios_by_image(
    stats: ImageStats, text_variance: float = float("nan")
) -> dict[str, tuple[Tensor, Tensor]]:
    """Numerator and denominator [I] float64 by metric; their sums' quotient is the metric above.

    The mean of `fvu` and `variance` is held fixed, at that of all images: bootstrap samples by
    `reconstruction_metrics` have each their own, which makes a variance smaller by 1 / I or so.
    """
    sums = dict(zip(SUMS, stats.sums.unbind(-1), strict=True))  # [I] each
    tokens, errors, mean = sums["tokens"], sums["errors"], stats.mean
    deviations = sums["squares"] - 2 * stats.total @ mean + tokens * mean.dot(mean)
    return {
        "fvu": (errors, deviations),
        "fvu_text": (errors / text_variance, tokens),
        "mse": (errors / len(mean), tokens),
        "rel_error": (errors, sums["squares"]),
        "cosine": (sums["cosines"], tokens),
        "norm_ratio": (sums["norm_ratios"], tokens),
        "norm": (sums["norms"], tokens),
        "variance": (deviations, tokens),
        "l0": (sums["actives"], tokens),
        "outliers": (sums["outliers"], tokens + sums["outliers"]),
    }


class Geometry(ProbeMetric):
    """Reconstruction and sparsity; see this file's head."""

    name = "geometry"
    panels = (
        Panel("fvu", "fvu: unexplained variance", by_epoch=True),
        Panel("fvu_text", "fvu_text: error / variance of plain text", log=True),
        Panel("mse", "mse", log=True),
        Panel("cosine", "cosine(x, x')", by_epoch=True),
        Panel("norm", "norm |x|", log=True),
        Panel("l0", "l0: active latents per token", log=True),
    )

    def update(self, tokens: Tokens) -> Tensor:
        """[n] norms; NaN at tokens that are not counted."""
        return tokens.x.norm(dim=-1).masked_fill(~tokens.keep, torch.nan)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for (group, hook), stats in data.stats.items():
            layer, variance = data.layers[hook], data.probe.text[hook].variance
            for metric, ratio in ratios_by_image(stats, variance).items():
                data.add_ratio(metric, group, layer, *ratio)
            metrics = reconstruction_metrics(stats, data.weights, variance)
            for metric, samples in metrics.items():
                value = float(samples[0]) if metric == "alive" else samples
                yield Estimate(data.layers[hook], group, metric, value)
            norms = torch.cat([norm for _, norm in found.updates[group, hook]])
            counted = norms[~norms.isnan()].double().numpy()
            for percent in QUANTILES if len(counted) else ():
                value = float(np.percentile(counted, percent))
                yield Estimate(data.layers[hook], group, f"norm_p{percent}", value)
