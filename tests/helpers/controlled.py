"""An adapter whose tokens pass norm control, with the LLM's embeddings for text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_limber.models.adapters import Linear
from lightning_limber.models.norm_control import NormControl


class Controlled(Linear):
    def __init__(self, vision_size: int, llm_size: int, norm: str = "moments", **shared: Any) -> None:
        super().__init__(vision_size, llm_size, **shared)
        self.control = NormControl(norm, llm_size)

    def bind(self, llm: Any) -> None:
        self.__dict__["llm"] = llm

    def forward(self, features: Tensor) -> Tensor:
        return self.control(super().forward(features))

    def calibrate(self, features: Tensor, token_norm: Tensor) -> None:
        words = self.llm.embed(torch.arange(self.llm.vocab_size)).detach()
        self.input_norm.measure(features)
        with torch.no_grad():
            tokens = super().forward(features)
        self.control.calibrate(float(token_norm), words.mean(0), words.T.cov(), tokens)
        self.calibrated.fill_(True)
