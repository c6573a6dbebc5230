"""`convergence_layer`: where image tokens become like text, by a rule instead of by eye.

Venhoff et al. (arXiv 2506.11976) set their layer by hand; `TOLERANCES` holds the numbers under which the
rule finds it on all three of their curves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.statistics import Comparison

# Allowed image/text ratio of each metric. The first three give layer 18 on the published curves, which
# is where their authors put it by hand; the others follow mse, as all of them are reconstruction
# errors, and cosine, bounded by 1, is held closer. A loss has no such ratio.
TOLERANCES = {
    "mse": 1.65,
    "l0": 1.1,
    "match": 0.75,
    "fvu": 1.65,
    "fvu_text": 1.65,
    "rel_error": 1.65,
    "cosine": 0.9,
}


def convergence_layer(
    layers: Sequence[int], image: Sequence[float], text: Sequence[float], tolerance: float
) -> int | None:
    """The first layer from which image/text stays within `tolerance` to the end.

    Args:
        layers: Layer numbers, ascending; need not be consecutive.
        image: The metric on image tokens at each of them.
        text: The metric on text tokens at each of them.
        tolerance: Above 1: the largest ratio allowed (errors, counts). Below 1: the smallest
            (similarities, rates).

    Returns:
        A member of `layers`; None if the last layer is already outside. A ratio that is NaN, or has
        no text to compare with (0), is outside.
    """
    first = None
    for layer, x, y in reversed(list(zip(layers, image, text, strict=True))):
        ratio = x / y if y else math.nan
        if not (ratio <= tolerance if tolerance > 1 else ratio >= tolerance):
            break
        first = layer
    return first


class Convergence(ProbeMetric):
    """Convergence layers of the metrics before it that have a tolerance; infinite where they never meet."""

    name = "convergence"

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for metric, tolerance in TOLERANCES.items():
            image, text = (self._curve(data, group, metric) for group in ("image", "text"))
            if image is None or text is None:
                continue
            layers = [
                convergence_layer(list(data.layers.values()), a, b, tolerance)
                for a, b in zip(image.tolist(), text.tolist(), strict=True)
            ]
            value, *samples = [math.inf if layer is None else float(layer) for layer in layers]
            samples.sort()
            # Positions, not interpolation: halfway to infinity is no layer.
            ends = [
                samples[int(share * (len(samples) - 1))] if samples else math.nan
                for share in (0.025, 0.975)
            ]
            yield Estimate(None, "image", f"convergence_layer/{metric}", (value, ends[0], ends[1]))

    @staticmethod
    def _curve(data: Measurement, group: str, metric: str) -> Tensor | None:
        """[1 + R, layers], or [1, layers] of a comparison; None where a layer lacks the metric."""
        key = (group, metric)
        found = {e.layer: e.value for e in data.estimates if (e.group, e.metric) == key}
        if not all(layer in found for layer in data.layers.values()):
            return None
        values = [found[layer] for layer in data.layers.values()]
        return torch.stack([_samples(value) for value in values], dim=-1)


def _samples(value: float | tuple[float, float, float] | Tensor | Comparison) -> Tensor:
    """Bootstrap samples [1 + R], or the value alone [1]."""
    if isinstance(value, Comparison):
        value = value.value
    if isinstance(value, tuple):
        value = value[0]
    return value if isinstance(value, Tensor) else torch.tensor([value], dtype=torch.float64)
