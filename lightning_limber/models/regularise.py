"""What the loss asks of image tokens beside captions (``model.regularise``): that the LLM's SAEs know them.

    L = mean over the caption tokens of (cross-entropy + weight * penalty of the caption's image)

The penalty of an image is a mean over `layers` l and over its tokens x_l there, in units of text at the
same layer, tau_l (median norm) and var_l (mean squared distance from the mean):

    error      |x_l - x'_l|^2 / var_l                                 (VISTA, arXiv 2605.24946)
    direction  the same of x_l at the length of text, tau_l x_l / |x_l|
    norm       |x_l|^2 / tau_l^2: no SAE, the control of `error`, which a shorter token lowers as well

x' is the SAE's reconstruction. SAEs are frozen and computed in float32; gradients pass through them.
Metrics of the same SAEs at the same layers say how well this was learnt and nothing more: judge by others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_limber.data.collate import Batch
from lightning_limber.models.llm import LLM
from lightning_limber.models.saes import load_saes, next_layer
from lightning_limber.models.text_moments import text_moments

KINDS = ("error", "direction", "norm")


@dataclass(frozen=True)
class RegulariseConfig:
    """What the loss asks of image tokens beside captions; nothing by default.

    Attributes:
        weight: Weight of the penalty, in nats per caption token; 0 loads no SAE and changes nothing.
        kind: ``error`` of the SAEs' reconstruction; ``direction``, the same at text's length; or ``norm``,
            the control without SAEs. See regularise.py.
        layers: Layers of the SAEs.
        sae_release: As `ProbeConfig.sae_release`.
        sae_id: As `ProbeConfig.sae_id`.
    """

    weight: float = 0.0
    kind: Literal["error", "direction", "norm"] = "error"
    layers: list[int] = field(default_factory=lambda: [6, 12])
    sae_release: str = "shipped:smollm2-135m-instruct"
    sae_id: str = "blocks.{layer}.hook_resid_post"


class Regulariser(nn.Module):
    """The penalty of the image tokens in a forward.

    Args:
        config: With a weight above 0.
        llm: The loaded LLM.
        entry_layer: Where image tokens enter it.

    Raises:
        FileNotFoundError: there are no such SAEs.
        ValueError: see `load_saes`; or image tokens enter behind one of the layers.
    """

    saes: list[Any]

    def __init__(self, config: RegulariseConfig, llm: LLM, entry_layer: int) -> None:
        super().__init__()
        self.config, self._found = config, dict[str, Tensor]()
        saes = load_saes(config.sae_release, config.sae_id, config.layers, llm)
        self.hooks = list(saes)
        # Straight into __dict__: frozen weights are no part of a checkpoint.
        self.__dict__["saes"] = list(saes.values())
        early = [hook for hook in self.hooks if 0 < entry_layer >= next_layer(hook)]
        if early:
            raise ValueError(
                f"model.regularise.layers={config.layers}: image tokens enter at layer {entry_layer} "
                f"(model.entry.layer), not before {', '.join(early)}."
            )
        self.norm: Tensor
        self.variance: Tensor
        self.calibrated: Tensor
        self.register_buffer("norm", torch.ones(len(self.hooks)))
        self.register_buffer("variance", torch.ones(len(self.hooks)))
        self.register_buffer("calibrated", torch.tensor(False))

    def _apply(self, fn: Any, recurse: bool = True) -> Regulariser:
        for sae in self.saes:
            sae._apply(fn)
        super()._apply(fn, recurse)
        return self

    @torch.no_grad()
    def calibrate(self, llm: LLM, texts: Iterable[str]) -> None:
        """Takes the yardsticks of text, once, before the first step."""
        for i, moments in enumerate(text_moments(llm, texts, self.hooks).values()):
            self.norm[i], self.variance[i] = moments.norm, moments.variance
        self.calibrated.fill_(True)

    @contextmanager
    def reading(self, llm: LLM, batch: Batch) -> Iterator[None]:
        """Keeps the penalties of the image tokens of the forward inside, for `penalty`."""

        def read(number: int, residual: Tensor) -> None:
            x = residual.flatten(0, 1).index_select(0, batch.image_positions)  # [s * P, D]
            with torch.autocast(x.device.type, enabled=False):
                self._found[self.hooks[number]] = self._penalty(number, x.float())

        with llm.residual_hooks({hook: partial(read, i) for i, hook in enumerate(self.hooks)}):
            yield

    def penalty(self, batch: Batch, image_tokens: int) -> Tensor:
        """The penalties of the batch's images, each as often as its captions have tokens: their sum.

        Args:
            batch: That of the forward in `reading`.
            image_tokens: Number P of image tokens of one image.
        """
        by_token = torch.stack([self._found.pop(hook) for hook in self.hooks]).mean(0)  # [s * P]
        images = batch.image_rows // image_tokens
        sums = by_token.new_zeros(len(batch.image_ids) + 1).index_add(0, images, by_token)
        counts = torch.zeros_like(sums).index_add(0, images, torch.ones_like(by_token))
        by_image = sums / counts.clamp_min(1)  # The last, 0, is that of text without an image.
        return by_image[batch.label_images].sum()

    def _penalty(self, number: int, x: Tensor) -> Tensor:
        """[n] of tokens [n, D]."""
        tau, variance = self.norm[number], self.variance[number]
        if self.config.kind == "norm":
            return (x / tau).square().sum(-1)
        if self.config.kind == "direction":
            x = tau * nn.functional.normalize(x, dim=-1)
        sae = self.saes[number]
        return (x - sae.decode(sae.encode(x))).square().sum(-1) / variance
