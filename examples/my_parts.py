"""Parts of your own, plugged in by their import path; no file of the project changes.

    export PYTHONPATH=examples
    lightning-limber fit --model.adapter my_parts.LearnedQueries --probe.metrics+=my_parts.StrongLatents

A command that starts from a checkpoint of it names the classes again; in Python, import this file first.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_limber.models.adapters import Adapter
from lightning_limber.probe.metrics import Panel, TokenMean, Tokens


class LearnedQueries(Adapter):
    """Learned queries that read the patches through a transformer.

    Args:
        vision_size: Width D_v of the encoder's features.
        llm_size: Width D_l of the LLM.
        queries: Number of image tokens.
        layers: Layers of the transformer.
        heads: Attention heads; D_v must divide by it.
        **shared: Settings that every adapter has.
    """

    def __init__(
        self,
        vision_size: int,
        llm_size: int,
        queries: int = 16,
        layers: int = 2,
        heads: int = 4,
        **shared: Any,
    ) -> None:
        super().__init__(vision_size, llm_size, **shared)
        self.queries = nn.Parameter(torch.randn(queries, vision_size) * vision_size**-0.5)
        layer = nn.TransformerDecoderLayer(vision_size, heads, 4 * vision_size, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(vision_size))
        self.project = nn.Linear(vision_size, llm_size)

    def forward(self, features: Tensor) -> Tensor:
        features = self.dropout(self.input_norm(features))  # [B, P, D_v]
        read = self.decoder(self.queries.expand(len(features), -1, -1), features)  # [B, queries, D_v]
        return self.project(read)  # [B, queries, D_l]


class StrongLatents(TokenMean):
    """Mean number of latents of a token whose activation exceeds `threshold`; 0 gives `l0`."""

    panels = (Panel("l0_strong", "l0_strong: strong latents per token", log=True, by_epoch=True),)

    def __init__(self, threshold: float = 1.0) -> None:
        self.threshold = threshold

    def per_token(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"l0_strong": (tokens.latents.to_dense() > self.threshold).sum(-1)}
