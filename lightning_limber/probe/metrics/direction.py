"""Reconstruction and sparsity of directions alone: every token at plain text's median norm at its layer.

A long vector wakes many latents and a short one few, whatever it means. With x~ = x m / |x|, m the median
norm of plain text, and x~' its reconstruction by the SAE:

    direction_l0   mean number of active latents of x~
    direction_fvu  mean of |x~ - x~'|^2 / variance of plain text at that layer
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_limber.probe.metrics.base import TokenMean, Tokens
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.token_stats import active_latents

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe


class Direction(TokenMean):
    """`direction_l0` and `direction_fvu` of every group but caption; runs the SAEs once more."""

    name = "direction"
    panels = (
        Panel("direction_l0", "direction_l0: l0 at text's norm", log=True),
        Panel("direction_fvu", "direction_fvu: fvu_text at text's norm", log=True),
    )

    def setup(self, probe: Probe) -> None:
        self.probe = probe

    def update(self, tokens: Tokens) -> dict[str, Tensor] | None:  # type: ignore[override]
        return None if tokens.group == "caption" else super().update(tokens)

    def per_token(self, tokens: Tokens) -> dict[str, Tensor]:
        text = self.probe.text[tokens.hook]
        norm = tokens.x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        x = tokens.x * (text.median_norm / norm)
        latents, reconstruction = self.probe.encode(tokens.hook, x)
        errors = (x.double() - reconstruction.double()).pow(2).sum(-1)
        return {"direction_l0": active_latents(latents), "direction_fvu": errors / text.variance}
