from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_limber.models.adapters.base import Adapter, linear


class PixelShuffle(Adapter):
    """Concatenates squares of neighbouring patches, then projects each to one token (nanoVLM).

    Args:
        vision_size: Width D_v of the encoder's features.
        llm_size: Width D_l of the LLM.
        shuffle: Side r of the square of patches that become one token.
        **shared: Settings that every adapter has.
    """

    def __init__(self, vision_size: int, llm_size: int, shuffle: int = 2, **shared: Any) -> None:
        super().__init__(vision_size, llm_size, **shared)
        self.shuffle = shuffle
        merged = vision_size * shuffle**2
        self.project = nn.Sequential(MergePatches(shuffle), linear(merged, llm_size))

    def token_grid(self, patch_grid: tuple[int, int]) -> tuple[int, int]:
        return patch_grid[0] // self.shuffle, patch_grid[1] // self.shuffle


class MergePatches(nn.Module):
    """[B, h*w, D_v] -> [B, h*w/r^2, D_v*r^2]: r x r patches become one token, row by row."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        batch, patches, size = features.shape
        side, r = round(patches**0.5), self.factor
        if side * side != patches or side % r:
            raise ValueError(
                f"PixelShuffle needs a square patch grid whose side divides by model.adapter.shuffle={r}; "
                f"the encoder gives {patches} tokens. Set model.vision.keep_cls=false and choose "
                "model.vision.image_size, model.vision.pool or model.adapter.shuffle to fit."
            )
        grid = features.view(batch, side // r, r, side // r, r, size)
        return grid.transpose(2, 3).reshape(batch, patches // r**2, size * r**2)
