"""A CPU encoder for SAEs that skips the latents that cannot fire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_limber.models.frozen import cpu_multiplies_bfloat16

FLOAT32_ERROR = 2.0**-12


"""Relative error of a sum of up to 4,096 float32 products, at most."""


class ScreenedEncoder:
    """`sae.encode` for a CPU: the same float32 latents [n, K] of tokens [n, D], as a sparse COO tensor.

    A latent fires where x . w + b exceeds its threshold (ReLU, JumpReLU), and few do. One product in
    bfloat16, where the CPU multiplies that faster, leaves out those that cannot; the others are computed in
    float32, and stored even where they turn out not to fire: as zeros. None is missed, since rounding x and
    w to x' and w' moves x . w by no more than

        (|x - x'| + r |x'|) |w|        (Cauchy-Schwarz; r is the largest |w - w'| / |w|)

    and whatever comes that near to its threshold is computed. This margin and the threshold are three more
    columns of the product: what may fire is positive.

    Args:
        sae: Of the kind `screens` says. Its `W_enc` is laid out anew in memory: latent by latent.
        dtype: Of the product; None: bfloat16 where that is faster.
    """

    def __init__(self, sae: Any, dtype: torch.dtype | None = None) -> None:
        self.sae = sae
        self.dtype = dtype or (torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32)
        weight = sae.W_enc.detach().T.contiguous()  # [K, D]
        sae.W_enc.data = weight.T
        # Nothing negative fires, whatever the threshold.
        self.threshold = getattr(sae, "threshold", torch.zeros_like(sae.b_enc)).detach().clamp_min(0)
        norm = weight.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        rounded = (weight / norm).to(self.dtype)
        self.weight_error = (weight / norm - rounded).norm(dim=-1).max() + FLOAT32_ERROR
        cutoff = ((self.threshold - sae.b_enc.detach())[:, None] / norm).clamp(-1e30, 1e30)  # [K, 1]
        cutoff -= FLOAT32_ERROR * cutoff.abs()
        # Of two parts of 8 bits each the rest is less than what was taken off.
        high = cutoff.to(self.dtype)
        low = (cutoff - high).to(self.dtype)
        self.weight = torch.cat([rounded, torch.ones_like(high), -high, -low], dim=1)  # [K, D + 3]

    @staticmethod
    def screens(sae: Any) -> bool:
        return sae.cfg.architecture() in ("standard", "jumprelu")

    def __call__(self, x: Tensor) -> Tensor:
        x = self.sae.process_sae_in(x)
        rounded = x.to(self.dtype)
        error = (x - rounded).norm(dim=-1, keepdim=True)  # [n, 1]
        margin = error + self.weight_error * x.norm(dim=-1, keepdim=True)
        margin = (margin * (1 + 2**-7)).to(self.dtype)  # Not below what it was.
        one = torch.ones_like(margin)
        above = nn.functional.linear(torch.cat([rounded, margin, one, one], dim=1), self.weight)  # [n, K]
        # A positive number's bits are a positive integer's, which are compared faster.
        bits = torch.int16 if self.dtype == torch.bfloat16 else torch.int32
        token, latent = (above.view(bits) > 0).nonzero().T.contiguous()  # [m] each
        first = nn.functional.pad(token.bincount(minlength=len(x)).cumsum(0), (1, 0))  # [n + 1]
        taken = torch.sparse_csr_tensor(
            first, latent, x.new_zeros(len(latent)), above.shape, check_invariants=False
        )
        before = torch.sparse.sampled_addmm(taken, x, self.sae.W_enc, beta=0.0).values()
        before += self.sae.b_enc[latent]
        value = torch.where(before > self.threshold[latent], before, 0.0)
        return torch.sparse_coo_tensor(
            torch.stack([token, latent]), value, above.shape, is_coalesced=True, check_invariants=False
        )


def make_encoder(sae: Any, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes latents [n, K] of float32 tokens [n, D] on `device`, as `sae.encode` does.

    On a CPU sparse COO where the SAE's architecture allows: there it is the decoder's rows of silent
    latents, and passes over [n, K] zeros, that take the time. A GPU multiplies faster than it could count.
    """
    if device.type == "cpu":
        if ScreenedEncoder.screens(sae):
            return ScreenedEncoder(sae)
        if sae.cfg.architecture() == "topk":
            sae.activation_fn.use_sparse_activations = True
            return lambda x: sae.encode(x).coalesce()  # SAELens leaves them in any order.
    return sae.encode
