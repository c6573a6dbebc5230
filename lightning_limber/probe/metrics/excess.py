"""`excess_{metric}_over_{control}`: how far a group is from a control of its norms, towards text.

    (control - group) / (control - text)      0: no nearer to text than the control; 1: as text

with logarithms of counts and errors. The controls are `noise` and `words_long` (`CONTROLS`): any long
vector comes nearer to text with depth, and only what lies beyond them is more than length. All three are of
the same images in each bootstrap sample. NaN where control and text cannot be told apart: there is no
distance to close. Costs nothing: it is made of other metrics.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.statistics import interval

LOGARITHM = {"l0": True, "fvu_text": True, "cosine": False, "direction_l0": True, "direction_fvu": True}
"""The metrics, and whether it is their logarithms that are compared."""


def excess(control: Tensor, group: Tensor, text: Tensor, logarithm: bool) -> Tensor:
    """Bootstrap samples [1 + R] of a metric in three groups -> samples of its excess."""
    if logarithm:
        control, group, text = control.log(), group.log(), text.log()
    gap = control - text
    _, low, high = interval(gap)
    return (control - group) / gap if low > 0 or high < 0 else torch.full_like(gap, torch.nan)


def bootstrap_samples(data: Measurement, metrics: Iterable[str]) -> dict[tuple[int, str, str], Tensor]:
    """Samples [1 + R] of the metrics before, by layer, group and metric."""
    wanted = set(metrics)
    return {
        (e.layer, e.group, e.metric): e.value
        for e in data.estimates
        if e.layer is not None and e.metric in wanted and isinstance(e.value, Tensor)
    }


class Excess(ProbeMetric):
    """What is more than length in the metrics before it, for all groups at image positions."""

    name = "excess"
    panels = tuple(
        Panel(
            f"excess_{metric}_over_noise",
            f"excess of {metric} over noise (0: none, 1: text)",
            limits=(-0.5, 1.1),
            also=(f"excess_{metric}_over_words_long", "image, excess over words_long"),
        )
        for metric in ("l0", "fvu_text", "cosine", "direction_l0")
    )

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        samples = bootstrap_samples(data, LOGARITHM)
        for (layer, group, metric), values in samples.items():
            text = samples.get((layer, "text", metric))
            for control in data.controls if group in data.image_groups else ():
                beside = samples.get((layer, control, metric))
                if text is not None and beside is not None and group != control:
                    value = excess(beside, values, text, LOGARITHM[metric])
                    yield Estimate(layer, group, f"excess_{metric}_over_{control}", value)
