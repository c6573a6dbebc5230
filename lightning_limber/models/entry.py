"""Where and at what scale image tokens enter the LLM (``model.entry``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_limber.models.adapters import Adapter
from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.models.norm_control import NormControl
from lightning_limber.models.text_moments import TextMoments


@dataclass(frozen=True)
class EntryConfig:
    """Where and at what scale image tokens enter the LLM; by default among the embeddings, as they are.

    Attributes:
        layer: Image tokens take their places at the entrance of this layer, counted from 0. The layers
            below see text alone (DeepInsert, arXiv 2504.19327; eP-ALM, arXiv 2303.11403). Their mean and
            scale are at first those of text there.
        norm: Length of the image tokens: ``none`` as the adapter makes them; ``fixed`` to that of text at
            the entry layer (Unseen Bias, arXiv 2512.08374); ``learned``, that times a trained factor;
            ``moments``, mean and covariance of text at the entry layer. See norm_control.py.
        inject: Layers, from `layer` on, at whose entrance a further adapter's output is added to the
            image's rows: of the same class and settings as ``model.adapter``, zero at first (DeepStack,
            arXiv 2406.04334).
        hold: Write the image's rows anew at the entrance of every layer from `layer` on: the image tokens
            times the norm of text there over that at `layer`. The LLM reads them and does not process them.
    """

    layer: int = 0
    norm: Literal["none", "fixed", "learned", "moments"] = "none"
    inject: list[int] = field(default_factory=list)
    hold: bool = False

    def __post_init__(self) -> None:
        if any(layer < self.layer for layer in self.inject) or len(set(self.inject)) < len(self.inject):
            raise ValueError(
                f"model.entry.inject={self.inject}: allowed are layers from model.entry.layer="
                f"{self.layer} on, each once."
            )

    def check(self, layers: int) -> None:
        """Checks the settings against the LLM's number of layers.

        Raises:
            ValueError: it has no such layer.
        """
        for name, given in (("layer", [self.layer]), ("inject", self.inject)):
            for layer in given:
                if layer >= layers:
                    raise ValueError(f"model.entry.{name}={layer}: the LLM has layers 0 to {layers - 1}.")


class Entry(nn.Module):
    """The trained and measured parts of `EntryConfig`; has none by default.

    Args:
        config: Settings.
        make_adapter: Makes a further adapter, for `EntryConfig.inject`.
        width: Width D_l of the LLM.
        layers: Number L of its layers.
    """

    def __init__(
        self, config: EntryConfig, make_adapter: Callable[[], Adapter], width: int, layers: int
    ) -> None:
        super().__init__()
        self.config = config
        self.norm = NormControl(config.norm, width)
        self.maps = nn.ModuleDict({str(layer): make_adapter() for layer in config.inject})
        self.mean: Tensor | None
        self.hold: Tensor | None
        self.calibrated: Tensor | None
        self.register_buffer("mean", torch.zeros(width) if config.layer else None)
        self.register_buffer("hold", torch.ones(layers) if config.hold else None)
        self.register_buffer("calibrated", None if config == EntryConfig() else torch.tensor(False))

    @property
    def is_calibrated(self) -> bool:
        """Whether nothing is left to measure."""
        return self.calibrated is None or bool(self.calibrated)

    @property
    def hooks(self) -> list[str]:
        """Places at which text's moments are needed to calibrate."""
        config = self.config
        last = len(self.hold) if self.hold is not None else config.layer + 1
        needed = bool(config.layer or config.hold or config.norm != "none")
        return [f"blocks.{layer}.hook_resid_pre" for layer in range(config.layer, last)] if needed else []

    @torch.no_grad()
    def calibrate(
        self, adapter: Adapter, features: Tensor, token_norm: Tensor, text: Mapping[str, TextMoments]
    ) -> None:
        """Scales a fresh adapter and what stands between it and the LLM, once, before the first step.

        At layer 0 image tokens get the mean norm of the LLM's token embeddings (`Adapter.calibrate`),
        behind it the mean of text and its mean distance from that.

        Args:
            adapter: The adapter; left alone where it is calibrated.
            features: [B, P_v, D_v] of training images.
            token_norm: Mean norm of the LLM's token embeddings, a scalar.
            text: Moments of text at `hooks`.
        """
        here = text.get(f"blocks.{self.config.layer}.hook_resid_pre")
        scale = token_norm
        if self.config.layer and here is not None:
            scale = here.variance.sqrt()
        if not adapter.calibrated:
            adapter.calibrate(features, scale)
        if self.calibrated is None or self.is_calibrated:
            return
        for added in self.maps.values():
            added.calibrate(features, scale)  # type: ignore[operator]
            added.silence(features)  # type: ignore[operator]
        if here is not None:
            tokens = adapter.evaluate(adapter, features)
            if self.mean is not None:
                self.mean.copy_(here.mean)
            norm = here.norm if self.config.layer else token_norm
            self.norm.calibrate(float(norm), here.mean, here.covariance, self._at_entry(tokens))
            if self.hold is not None:
                for name, moments in text.items():
                    self.hold[int(name.split(".")[1])] = moments.norm / here.norm
        self.calibrated.fill_(True)

    def forward(self, image_tokens: Tensor, features: Tensor) -> ImageTokens:
        """What enters, of the adapter's image tokens [B, P, D_l] of features [B, P_v, D_v]."""
        image_tokens = self._at_entry(image_tokens)
        added = {int(layer): added(features) for layer, added in self.maps.items()}
        return ImageTokens(self.norm(image_tokens), self.config.layer, added, self.hold)

    def _at_entry(self, image_tokens: Tensor) -> Tensor:
        return image_tokens if self.mean is None else image_tokens + self.mean
