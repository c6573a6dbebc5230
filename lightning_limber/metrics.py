"""Alignment of a group of tokens with an SAE's features at one layer: pure functions and a Metric.

For residual-stream vectors x [n, D] and their reconstructions x' by the SAE of that layer (on the raw
scale), with latents [n, K]:

    fvu         sum |x - x'|^2 / sum |x - mean|^2, the mean over all tokens of the group
    mse         mean over tokens and dimensions of (x - x')^2 (Venhoff et al., arXiv 2506.11976)
    cosine      mean of cos(x, x')
    norm_ratio  mean of |x'| / |x|
    norm        mean of |x|
    l0          mean number of active latents of a token; sparsity is l0 / K
    alive       share of latents that fire on at least one token of the group
    outliers    share of tokens left out because their norm is an outlier's (attention sinks)
    tokens      number of tokens counted

Everything is a quotient of sums. The sums are kept in float64 and added over batches and processes, so
no result depends on batch size, batch order or the number of processes (beyond float64 rounding), on
bfloat16 input, or on a mean that is large against the spread.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

SUMS = ("tokens", "outliers", "squares", "errors", "cosines", "norm_ratios", "norms", "actives")


def token_sums(x: Tensor, reconstruction: Tensor, latents: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """The float64 sums over one batch of tokens that all the metrics are quotients of.

    Args:
        x: [n, D] residual stream.
        reconstruction: [n, D] the SAE's output on the same scale.
        latents: [n, K] the SAE's latents; a latent is active where it is positive.
        keep: [n] false at tokens that are left out (only counted, as `outliers`).

    Returns:
        The scalars of `SUMS` by name, `total` [D] and `fired` [K].
    """
    weight = keep.double()
    x, reconstruction = x.double() * weight[:, None], reconstruction.double() * weight[:, None]
    active = (latents > 0) & keep[:, None]
    norm, norm_reconstruction = x.norm(dim=-1), reconstruction.norm(dim=-1)
    dots = (x * reconstruction).sum(-1)
    return {
        "tokens": weight.sum(),
        "outliers": (1 - weight).sum(),
        "squares": (norm**2).sum(),
        "errors": ((x - reconstruction) ** 2).sum(),
        # A zero vector has no direction: its cosine counts as 0.
        "cosines": (dots / (norm * norm_reconstruction).clamp_min(1e-300)).sum(),
        "norm_ratios": (norm_reconstruction / norm.clamp_min(1e-300)).sum(),
        "norms": norm.sum(),
        "actives": active.sum().double(),
        "total": x.sum(0),
        "fired": active.sum(0).double(),
    }


def alignment(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics as quotients of sums; NaN where the group has no token (or no variance, for fvu)."""
    tokens, total, fired = sums["tokens"], sums["total"], sums["fired"]
    variance = sums["squares"] - (total**2).sum() / tokens
    l0 = sums["actives"] / tokens
    return {
        "fvu": sums["errors"] / torch.where(variance > 0, variance, torch.nan),
        "mse": sums["errors"] / (tokens * len(total)),
        "cosine": sums["cosines"] / tokens,
        "norm_ratio": sums["norm_ratios"] / tokens,
        "norm": sums["norms"] / tokens,
        "l0": l0,
        "sparsity": l0 / len(fired),
        "alive": (fired > 0).double().mean(),
        "outliers": sums["outliers"] / (tokens + sums["outliers"]),
        "tokens": tokens,
    }


def shared_latents(fired: Tensor, other: Tensor) -> Tensor:
    """Jaccard index of the latents that fire in two groups: |both| / |either|.

    Args:
        fired: [K] number of tokens of the first group that each latent fires on.
        other: [K] the same for the second group.
    """
    both, either = (fired > 0) & (other > 0), (fired > 0) | (other > 0)
    return both.sum().double() / either.sum()


class SAEAlignment(Metric):
    """`alignment` of one group of tokens at one layer, streamed.

    Args:
        d_in: Width D of the residual stream.
        d_sae: Number of latents K.

    Example:
        >>> import torch
        >>> metric = SAEAlignment(d_in=2, d_sae=3)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> metric.update(x, x.mean(0).expand(2, 2), torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 5.0]]))
        >>> values = metric.compute()
        >>> [round(float(values[name]), 3) for name in ("fvu", "mse", "l0", "alive")]
        [1.0, 0.5, 1.5, 0.667]
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, d_in: int, d_sae: int, **kwargs) -> None:
        super().__init__(**kwargs)
        for name in SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("fired", torch.zeros(d_sae, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, x: Tensor, reconstruction: Tensor, latents: Tensor, keep: Tensor | None = None
    ) -> None:
        """Adds n tokens: x [n, D], reconstruction [n, D], latents [n, K]; n may be 0.

        Args:
            x: Residual stream.
            reconstruction: Of the SAE, on the same scale.
            latents: Of the SAE.
            keep: [n] false at tokens to leave out and count as outliers; None keeps all.
        """
        keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if keep is None else keep
        for name, value in token_sums(x, reconstruction, latents, keep).items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """All metrics as float64 scalars, and `fired` [K], the tokens that each latent fired on."""
        sums = {name: getattr(self, name) for name in (*SUMS, "total", "fired")}
        return alignment(sums) | {"fired": sums["fired"]}
