"""Placeholder until the branch `adapters` is merged."""

import torch
from torch import Tensor, nn


class NormControl(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind != "none":
            self.register_buffer("tau", torch.tensor(1.0))
        if kind == "learned":
            self.gain = nn.Parameter(torch.zeros(()))

    def calibrate(self, tau, mean, cov) -> None:
        if self.kind != "none":
            self.tau.copy_(torch.as_tensor(tau))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        x = self.tau * x / x.norm(dim=-1, keepdim=True)
        return self.gain.exp() * x if self.kind == "learned" else x
