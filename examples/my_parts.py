"""Parts of your own, plugged in by their import path; nothing else changes.

    export PYTHONPATH=examples
    python -m lightning_limber fit --model.adapter my_parts.Resampler --model.adapter.queries 16

Checkpoints store the class path and the settings. A command that starts from one (`--ckpt_path`) names the
class again, since a file's word is not enough to run code; in Python, import this file before `load(run)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_limber.models.adapters import Adapter


class Resampler(Adapter):
    """Learned queries that read the patches through a transformer: `queries` tokens for any image.

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
        read = ReadPatches(vision_size, queries, layers, heads)
        self.project = nn.Sequential(read, nn.Linear(vision_size, llm_size))


class ReadPatches(nn.Module):
    """[B, P, D_v] -> [B, queries, D_v]."""

    def __init__(self, size: int, queries: int, layers: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, size) * size**-0.5)
        layer = nn.TransformerDecoderLayer(size, heads, 4 * size, 0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(size))

    def forward(self, features: Tensor) -> Tensor:
        return self.decoder(self.queries.expand(len(features), -1, -1), features)
