from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_limber.models.adapters.base import Adapter, linear


class Resampler(Adapter):
    """Learned queries that read the patches by cross-attention (Flamingo, arXiv 2204.14198, section 3.1.1).

    A picture of any number P of patches becomes Q tokens: the LLM's cost no longer depends on P. BLIP-2's
    Q-Former (arXiv 2301.12597) has the same purpose. A token is no place in the image, so there are no
    patch maps. It has 12 D_v^2 parameters a layer and needs more data than `Linear`.

    Args:
        vision_size: Width D_v of the encoder's features.
        llm_size: Width D_l of the LLM.
        queries: Number Q of image tokens (Flamingo: 64).
        layers: Layers of cross-attention and feed-forward (Flamingo: 6).
        heads: Attention heads; D_v must divide by it.
        **shared: Settings that every adapter has.

    Raises:
        ValueError: D_v does not divide by `heads`.
    """

    def __init__(
        self,
        vision_size: int,
        llm_size: int,
        queries: int = 16,
        layers: int = 2,
        heads: int = 8,
        **shared: Any,
    ) -> None:
        super().__init__(vision_size, llm_size, **shared)
        if vision_size % heads:
            raise ValueError(
                f"model.adapter.heads={heads} does not divide the encoder's width {vision_size}: choose a "
                "divisor of it."
            )
        perceiver = Perceiver(vision_size, queries, layers, heads)
        self.project = nn.Sequential(perceiver, linear(vision_size, llm_size))


class Perceiver(nn.Module):
    """[B, P, D_v] -> [B, Q, D_v]: learned queries, refined by each layer."""

    def __init__(self, size: int, queries: int, layers: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, size) * size**-0.5)
        self.layers = nn.ModuleList(PerceiverLayer(size, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(size)

    def forward(self, features: Tensor) -> Tensor:
        queries = self.queries.repeat(len(features), 1, 1)  # [B, Q, D_v]
        for layer in self.layers:
            queries = layer(queries, features)
        return self.norm(queries)


class PerceiverLayer(nn.Module):
    """The queries attend to the features and to each other, then a feed-forward net; both residual."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.query_norm, self.feature_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size)
        )

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        normed = self.query_norm(queries)  # [B, Q, D_v]
        read = torch.cat([self.feature_norm(features), normed], dim=1)  # [B, P + Q, D_v]
        queries = queries + self.attention(normed, read, read, need_weights=False)[0]
        return queries + self.feed_forward(queries)
