from __future__ import annotations

from typing import Any

from lightning_limber.models.adapters.base import Adapter, linear


class Linear(Adapter):
    """One linear map: a token for each patch (LiMBeR, arXiv 2209.15162, section 3)."""

    def __init__(self, vision_size: int, llm_size: int, **shared: Any) -> None:
        super().__init__(vision_size, llm_size, **shared)
        self.project = linear(vision_size, llm_size)

    def token_grid(self, patch_grid: tuple[int, int]) -> tuple[int, int]:
        return patch_grid
