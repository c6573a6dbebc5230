"""The trained part: patch features [B, P, D_v] -> image tokens [B, P', D_l].

Three kinds: ``linear`` (LiMBeR, arXiv 2209.15162, section 3), ``mlp`` (LLaVA 1.5, arXiv 2310.03744:
two layers with a GELU between) and ``pixel_shuffle`` (nanoVLM: r x r neighbouring patches are
concatenated into one token, then projected).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AdapterConfig:
    """Which adapter.

    Attributes:
        kind: ``linear``, ``mlp`` or ``pixel_shuffle``.
        input_norm: What is done to the features first: ``none`` (LiMBeR), ``layer`` (LayerNorm per
            token) or ``channel`` (fixed mean and deviation of each channel, measured once on training
            images; it speeds up the first epochs and is still an affine map).
        dropout: Probability of dropping a feature (LiMBeR: 0.1).
        shuffle: Side r of the square of patches that ``pixel_shuffle`` merges.
    """

    kind: Literal["linear", "mlp", "pixel_shuffle"] = "linear"
    input_norm: Literal["none", "layer", "channel"] = "none"
    dropout: float = 0.0
    shuffle: int = 2


class ChannelNorm(nn.Module):
    """(x - mean) / deviation with constants per channel; the identity until they are measured."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def measure(self, features: Tensor) -> None:
        rows = features.flatten(0, 1).double()
        self.mean.copy_(rows.mean(0))
        # A channel that never moves carries nothing; do not blow it up.
        self.std.copy_(rows.std(0).clamp_min(1e-3 * rows.std(0).median()))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class PixelShuffle(nn.Module):
    """[B, h*w, D_v] -> [B, h*w/r^2, D_v*r^2]: r x r patches become one token, row by row."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        batch, patches, size = features.shape
        side, r = round(patches**0.5), self.factor
        if side * side != patches or side % r:
            raise ValueError(
                f"adapter.kind=pixel_shuffle needs a square patch grid whose side divides by "
                f"adapter.shuffle={r}; the encoder gives {patches} tokens. Set vision.keep_cls=false "
                "and choose vision.image_size, vision.pool or adapter.shuffle to fit."
            )
        grid = features.view(batch, side // r, r, side // r, r, size)
        return grid.transpose(2, 3).reshape(batch, patches // r**2, size * r**2)


class Adapter(nn.Module):
    """input norm -> dropout -> projection, with an output scaled to the LLM's token embeddings."""

    def __init__(self, config: AdapterConfig, vision_size: int, llm_size: int) -> None:
        super().__init__()
        norms = {"none": nn.Identity, "layer": nn.LayerNorm, "channel": ChannelNorm}
        if config.kind not in KINDS or config.input_norm not in norms:
            raise ValueError(
                f"adapter.kind={config.kind!r}, adapter.input_norm={config.input_norm!r}: allowed are "
                f"kind in {list(KINDS)} and input_norm in {list(norms)}."
            )
        self.input_norm = norms[config.input_norm](vision_size)
        self.dropout = nn.Dropout(config.dropout)
        self.project = KINDS[config.kind](config, vision_size, llm_size)
        self.calibrated: Tensor
        self.register_buffer("calibrated", torch.tensor(False))

    def forward(self, features: Tensor) -> Tensor:
        return self.project(self.dropout(self.input_norm(features)))

    @torch.no_grad()
    def calibrate(self, features: Tensor, token_norm: Tensor) -> None:
        """Sets the input statistics and scales the output layer, once, before the first step.

        After it the image tokens of `features` have the mean L2 norm of the LLM's own token
        embeddings, whatever scale either model works at: an adapter that starts 48 times too loud
        or too quiet (Gemma's embedding scale) would spend its training on that.

        Args:
            features: [B, P, D_v] of training images.
            token_norm: Mean norm of the LLM's token embeddings, a scalar.
        """
        if isinstance(self.input_norm, ChannelNorm):
            self.input_norm.measure(features)
        output = self.project(self.input_norm(features)).float()
        last = [module for module in self.project.modules() if isinstance(module, nn.Linear)][-1]
        last.weight.mul_(token_norm / output.norm(dim=-1).mean())
        self.calibrated.fill_(True)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


KINDS = {
    "linear": lambda config, vision_size, llm_size: _linear(vision_size, llm_size),
    "mlp": lambda config, vision_size, llm_size: nn.Sequential(
        _linear(vision_size, llm_size), nn.GELU(), _linear(llm_size, llm_size)
    ),
    "pixel_shuffle": lambda config, vision_size, llm_size: nn.Sequential(
        PixelShuffle(config.shuffle), _linear(vision_size * config.shuffle**2, llm_size)
    ),
}
