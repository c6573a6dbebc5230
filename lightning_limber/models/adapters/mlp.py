from __future__ import annotations

from typing import Any

from torch import nn

from lightning_limber.models.adapters.base import Adapter, linear


class MLP(Adapter):
    """Two layers with a GELU between: a token for each patch (LLaVA 1.5, arXiv 2310.03744)."""

    def __init__(self, vision_size: int, llm_size: int, **shared: Any) -> None:
        super().__init__(vision_size, llm_size, **shared)
        self.project = nn.Sequential(linear(vision_size, llm_size), nn.GELU(), linear(llm_size, llm_size))

    def token_grid(self, patch_grid: tuple[int, int]) -> tuple[int, int]:
        return patch_grid
