"""`convergence_layer`: where a group becomes like text, by a rule instead of by eye.

Venhoff et al. (arXiv 2506.11976) set their layer by hand; `TOLERANCES` holds the numbers under which the
rule finds it, or the layer before it, on their three curves. The rule is applied to image tokens and to
what stands in their place. Where a control converges too (`noise`, `words_long`, the untrained adapter),
the layer of image tokens says nothing about them and is NaN; a line in the log names the control.

`gap_closed` by layer is the share of the distance from noise to text that is closed: the mean `excess` over
noise of the logarithms of mse and l0, the two curves of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.metrics.excess import bootstrap_samples, excess
from lightning_limber.probe.statistics import Comparison

# Allowed image/text ratio of each metric, or its inverse. On the published curves mse and match give layer
# 18, which is where their authors put it by hand, and l0, which falls below text's there, gives 17; no
# tolerance gives 18. The others follow mse, as all of them are reconstruction errors, and cosine, bounded
# by 1, is held closer. A loss has no such ratio.
TOLERANCES = {
    "mse": 1.65,
    "l0": 1.4,
    "match": 0.65,
    "fvu": 1.65,
    "fvu_text": 1.65,
    "rel_error": 1.65,
    "cosine": 0.9,
}
PREFIX = "convergence_layer/"


def convergence_layer(
    layers: Sequence[int], image: Sequence[float], text: Sequence[float], tolerance: float
) -> int | None:
    """The first layer from which image/text stays within `tolerance` to the end.

    Args:
        layers: Layer numbers, ascending; need not be consecutive.
        image: The metric on image tokens at each of them.
        text: The metric on text tokens at each of them.
        tolerance: The largest ratio allowed, and its inverse the smallest; 0.5 is as 2.

    Returns:
        A member of `layers`; None if the last layer is already outside. A ratio that is NaN, is not above
        0, or has no text to compare with (0), is outside.
    """
    first = None
    for layer, x, y in reversed(list(zip(layers, image, text, strict=True))):
        ratio = x / y if y else math.nan
        # In ratios, not logarithms: the bound itself is inside.
        if not (ratio > 0 and max(ratio, 1 / ratio) <= max(tolerance, 1 / tolerance)):
            break
        first = layer
    return first


class Convergence(ProbeMetric):
    """Convergence layers of the metrics before it that have a tolerance, infinite where they never meet;
    and `gap_closed`.
    """

    name = "convergence"

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        untrained = {row.metric: row.value for row in data.start if row.group == "image"}
        for metric, tolerance in TOLERANCES.items():
            text = self._curve(data, "text", metric)
            curves = {group: self._curve(data, group, metric) for group in data.image_groups}
            layers = {
                group: self._layers(data, curve, text, tolerance)
                for group, curve in curves.items()
                if curve is not None and text is not None
            }
            first = {name: layers[name][0] for name in ("image", *data.controls) if name in layers}
            if PREFIX + metric in untrained:
                # NaN is one that converged, too.
                first["untrained"] = untrained[PREFIX + metric]
            reached = [
                name if math.isnan(at) else f"{name} {at:g}" for name, at in first.items() if at != math.inf
            ]
            if len(reached) > 1 and first.get("image", math.inf) != math.inf:
                data.notes.append(
                    f"convergence_layer/{metric} of image tokens is NaN, as controls converge too (group, "
                    f"layer): {', '.join(reached)}."
                )
                layers["image"] = (math.nan,) * 3
            for group, value in layers.items():
                yield Estimate(None, group, PREFIX + metric, value)
        yield from self._gap_closed(data)

    @staticmethod
    def _layers(
        data: Measurement, curve: Tensor, text: Tensor, tolerance: float
    ) -> tuple[float, float, float]:
        """The convergence layer and its interval."""
        layers = [
            convergence_layer(list(data.image_layers.values()), a, b, tolerance)
            for a, b in zip(curve.tolist(), text.tolist(), strict=True)
        ]
        value, *samples = [math.inf if layer is None else float(layer) for layer in layers]
        samples.sort()
        # Positions, not interpolation: halfway to infinity is no layer.
        low, high = (
            samples[int(share * (len(samples) - 1))] if samples else math.nan for share in (0.025, 0.975)
        )
        return value, low, high

    @staticmethod
    def _gap_closed(data: Measurement) -> Iterable[Estimate]:
        samples = bootstrap_samples(data, ("mse", "l0"))
        for group in data.image_groups if "noise" in data.groups else ():
            for layer in data.image_layers.values() if group != "noise" else ():
                shares = []
                for metric in ("mse", "l0"):
                    noise, own, text = (samples[layer, name, metric] for name in ("noise", group, "text"))
                    shares.append(excess(noise, own, text, logarithm=True))
                yield Estimate(layer, group, "gap_closed", torch.stack(shares).mean(0))

    @staticmethod
    def _curve(data: Measurement, group: str, metric: str) -> Tensor | None:
        """[1 + R, layers], or [1, layers] of a comparison; None where a layer lacks the metric."""
        key = (group, metric)
        found = {e.layer: e.value for e in data.estimates if (e.group, e.metric) == key}
        if not all(layer in found for layer in data.image_layers.values()):
            return None
        values = [found[layer] for layer in data.image_layers.values()]
        return torch.stack([_samples(value) for value in values], dim=-1)


def _samples(value: float | tuple[float, float, float] | Tensor | Comparison) -> Tensor:
    """Bootstrap samples [1 + R], or the value alone [1]."""
    if isinstance(value, Comparison):
        value = value.value
    if isinstance(value, tuple):
        value = value[0]
    return value if isinstance(value, Tensor) else torch.tensor([value], dtype=torch.float64)
