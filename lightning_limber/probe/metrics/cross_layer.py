"""`cross_layer`: image tokens of each layer through the SAE of every other layer, drawn as matrices.

Where in the LLM's depth does an image token look most like text? At the lowest fvu of its row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.metrics.geometry import reconstruction_metrics
from lightning_limber.probe.token_stats import active_latents

if TYPE_CHECKING:
    from lightning_limber.probe.intervention import Intervention


class CrossLayer(ProbeMetric):
    """Matrices ``fvu`` and ``l0``: [layer of the tokens][layer of the SAE]."""

    name = "cross_layer"

    def intervene(self, run: Intervention, hook: str) -> Tensor:
        """[L, 3] tokens of all layers through this layer's SAE: squared errors, active latents, tokens."""
        sums = []
        for other in run.probe.layers:
            x = run.image_tokens(other, once=True).float()
            latents, reconstruction = run.probe.encode(hook, x)
            errors = (x - reconstruction).double().pow(2).sum(-1)
            by_token = torch.stack([errors, active_latents(latents), torch.ones_like(errors)], dim=-1)
            sums.append(torch.where(run.keep(other, x)[:, None], by_token, 0.0).sum(0))
        return torch.stack(sums)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        columns = [torch.stack([table for _, table in items]) for items in found.interventions.values()]
        if columns:
            total = torch.stack(columns, dim=2).sum(0)  # [L, L, 3]
            chosen = {i for items in found.interventions.values() for index, _ in items for i in index}
            variance = []
            for hook in data.layers:
                stats = data.stats["image", hook]
                weights = torch.tensor([[float(i in chosen) for i in stats.index.tolist()]]).double()
                metrics = reconstruction_metrics(stats, weights)
                variance.append(metrics["variance"] * metrics["tokens"])
            data.matrices["cross_layer"] = {
                "fvu": (total[..., 0] / torch.cat(variance)[:, None]).tolist(),
                "l0": (total[..., 1] / total[..., 2]).tolist(),
            }
        return ()
