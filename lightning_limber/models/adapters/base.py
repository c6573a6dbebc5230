"""What every adapter shares; to bring your own, see `Adapter` and examples/my_parts.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_limber.models.llm import LLM


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


NORMS = {"none": nn.Identity, "layer": nn.LayerNorm, "channel": ChannelNorm}


class Adapter(nn.Module):
    """Turns patch features [B, P, D_v] into image tokens [B, P', D_l]: input norm, dropout, `project`.

    An adapter of your own is a subclass: its constructor takes `vision_size` and `llm_size` first, then
    its own settings (plain values, which checkpoints store), and sets `project`, a module from
    [B, P, D_v] to [B, P', D_l] that ends with an ``nn.Linear``. Name it by its import path:
    ``--model.adapter my_adapters.Resampler --model.adapter.queries 16``.

    Args:
        vision_size: Width D_v of the encoder's features.
        llm_size: Width D_l of the LLM.
        input_norm: Normalisation of the features: ``none`` (LiMBeR), ``layer`` (LayerNorm per token) or
            ``channel`` (fixed mean and deviation of each channel, measured once on training images; it
            speeds up the first epochs and is still an affine map).
        dropout: Probability of dropping a feature (LiMBeR: 0.1).
    """

    project: nn.Module

    def __init__(
        self,
        vision_size: int,
        llm_size: int,
        input_norm: Literal["none", "layer", "channel"] = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if input_norm not in NORMS:
            raise ValueError(f"model.adapter.input_norm={input_norm!r}: allowed are {', '.join(NORMS)}.")
        self.llm_size = llm_size
        self.input_norm = NORMS[input_norm](vision_size)
        self.dropout = nn.Dropout(dropout)
        self.calibrated: Tensor
        self.register_buffer("calibrated", torch.tensor(False))

    def bind(self, llm: LLM) -> None:
        """Shows the adapter the frozen LLM that it feeds, once, before the first forward.

        Nothing is done here. An adapter that reads the LLM's weights keeps the reference in ``__dict__``:
        no checkpoint, optimiser or DDP bucket then holds them, and they move with the LLM.

        Args:
            llm: Loaded; for `plan`, without values.

        Raises:
            ValueError: the adapter's settings do not fit the LLM.
        """

    def forward(self, features: Tensor) -> Tensor:
        """Image tokens [B, P', D_l] of features [B, P, D_v]."""
        return self.project(self.dropout(self.input_norm(features)))

    def token_grid(self, patch_grid: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of the image tokens, for maps over the image.

        Args:
            patch_grid: Rows and columns of the encoder's patches.

        Returns:
            The grid of the last rows * columns tokens, row by row (a kept CLS token stands before them);
            None, as here, where a token is no place in the image.
        """
        return None

    @torch.no_grad()
    def count_tokens(self, features: Tensor) -> int:
        """The number P' of image tokens of features [B, P, D_v].

        Raises:
            ValueError: the output is not [B, P', D_l].
        """
        tokens = self.evaluate(self, features)
        if tokens.shape != (len(features), tokens.shape[1], self.llm_size):
            raise ValueError(
                f"model.adapter {type(self).__name__} turns features {list(features.shape)} into "
                f"{list(tokens.shape)}; image tokens must be [{len(features)}, P', {self.llm_size}]."
            )
        return tokens.shape[1]

    @torch.no_grad()
    def calibrate(self, features: Tensor, token_norm: Tensor) -> None:
        """Sets the input statistics and scales the output layer, once, before the first step.

        After it the image tokens of `features` have the mean L2 norm of the LLM's own token
        embeddings, whatever scale either model works at: an adapter that starts 48 times too loud
        or too quiet (Gemma's embedding scale) would spend its training on that.

        Args:
            features: [B, P, D_v] of training images.
            token_norm: Mean norm of the LLM's token embeddings, a scalar.

        Raises:
            ValueError: the last ``nn.Linear`` of `project` is not what scales the tokens.
        """
        if isinstance(self.input_norm, ChannelNorm):
            self.input_norm.measure(features)
        self._calibrate_output(features, token_norm)
        self.calibrated.fill_(True)

    def _calibrate_output(self, features: Tensor, token_norm: Tensor) -> None:
        scale = token_norm / self._mean_norm(features)
        for parameter in self.last_linear.parameters() if self.last_linear else ():
            parameter.mul_(scale)
        if not torch.isclose(self._mean_norm(features), token_norm, rtol=1e-2):
            raise ValueError(
                f"model.adapter {type(self).__name__}: scaling the last nn.Linear of `project` does not "
                "scale the image tokens. End `project` with an nn.Linear, or override `calibrate`."
            )

    @property
    def last_linear(self) -> nn.Linear | None:
        """The last ``nn.Linear`` of `project`."""
        layers = [module for module in self.project.modules() if isinstance(module, nn.Linear)]
        return layers[-1] if layers else None

    @torch.no_grad()
    def silence(self, features: Tensor) -> None:
        """Makes all image tokens zero until the output layer learns.

        Args:
            features: [B, P, D_v], any.

        Raises:
            ValueError: the last ``nn.Linear`` of `project` is not what makes the tokens.
        """
        for parameter in self.last_linear.parameters() if self.last_linear else ():
            parameter.zero_()
        if self._mean_norm(features):
            raise ValueError(
                f"model.entry.inject: model.adapter {type(self).__name__} does not end with an nn.Linear, "
                "which could be zero at first. Choose another adapter, or no injection."
            )

    def _mean_norm(self, features: Tensor) -> Tensor:
        return self.evaluate(self, features).float().norm(dim=-1).mean()

    def evaluate(self, compute: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        """What a method of this adapter makes of the features without dropout."""
        training = self.training
        self.eval()
        made = compute(features)
        self.train(training)
        return made


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose outputs have the scale of its inputs; no bias at first."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer
