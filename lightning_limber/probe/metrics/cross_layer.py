"""`cross_layer`: image tokens of each layer through the SAE of every other layer, drawn as matrices.

Where in the LLM's depth does an image token look most like text? At the lowest fvu of its row. Beside it
stands the same of `noise`, where it is measured: what both show is the norm, not the picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import IMAGE, Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.metrics.geometry import reconstruction_metrics
from lightning_limber.probe.token_stats import active_latents

if TYPE_CHECKING:
    from lightning_limber.probe.intervention import Intervention
    from lightning_limber.probe.passes import Probe


class CrossLayer(ProbeMetric):
    """Matrices ``fvu`` and ``l0`` of each group: [layer of the tokens][layer of the SAE]."""

    name = "cross_layer"

    def setup(self, probe: Probe) -> None:
        self.controls = [name for name in ("noise",) if name in probe.groups]

    def intervene(self, run: Intervention, hook: str) -> Tensor:
        """[G, L, 3] tokens of all layers through this layer's SAE: squared errors, active latents, tokens;
        of image tokens and controls.
        """
        sums = []
        for group in ("image", *self.controls):
            for other in run.probe.hooks_of(IMAGE):
                image = group == "image"
                x = (run.image_tokens(other, once=True) if image else run.filled(group)[other]).float()
                latents, reconstruction = run.probe.encode(hook, x)
                errors = (x - reconstruction).double().pow(2).sum(-1)
                by_token = torch.stack([errors, active_latents(latents), torch.ones_like(errors)], dim=-1)
                sums.append(torch.where(run.keep(other, x)[:, None], by_token, 0.0).sum(0))
        return torch.stack(sums).unflatten(0, (1 + len(self.controls), -1))

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        columns = [torch.stack([table for _, table in items]) for items in found.interventions.values()]
        if columns:
            total = torch.stack(columns, dim=3).sum(0)  # [G, L, L, 3]
            chosen = {i for items in found.interventions.values() for index, _ in items for i in index}
            tables: dict[str, list[list[float]]] = {}
            for group, of_group in zip(("image", *self.controls), total, strict=True):
                variance = []
                for hook in data.image_layers:
                    stats = data.stats[group, hook]
                    weights = torch.tensor([[float(i in chosen) for i in stats.index.tolist()]]).double()
                    metrics = reconstruction_metrics(stats, weights)
                    variance.append(metrics["variance"] * metrics["tokens"])
                suffix = "" if group == "image" else f" of {group}"
                tables[f"fvu{suffix}"] = (of_group[..., 0] / torch.cat(variance)[:, None]).tolist()
                tables[f"l0{suffix}"] = (of_group[..., 1] / of_group[..., 2]).tolist()
            data.matrices["cross_layer"] = tables
        return ()
