"""Norm control: the length of image tokens, or their first two moments, set to those of text.

Notation: u [B, P, D] are the adapter's tokens and x [B, P, D] what enters the LLM; tau, mu and Sigma are
the norm, mean and covariance of text where they enter.

    none     x = u
    fixed    x = tau u / |u|
    learned  x = e^g tau u / |u|; the scalar g is trained, 0 at the start
    moments  x = mu + s R L^-1 (u - m); see `Moments`

The scale of the adapter's weights is then free: a step turns them less the longer they are, and those of a
calibrated adapter are short. So the learning rate that suits is another one than without norm control, and
weight decay bounds the length. A LayerNorm behind the projector that starts at text's norm (The Unseen
Bias, arXiv 2512.08374) is `learned` with a gain for each channel.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

KINDS = ("none", "fixed", "learned", "moments")
SHRINKAGE = 0.01
"""Share of a covariance that is replaced by its mean variance in every direction."""
MOMENTUM = 0.05
"""Weight of the newest batch in the running moments: the last 20 batches or so count."""


class NormControl(nn.Module):
    """Sets the norm or the moments of image tokens; see this file's head.

    Args:
        kind: ``none``, ``fixed``, ``learned`` or ``moments``.
        width: Width D of the LLM.

    Raises:
        ValueError: the kind is unknown.
    """

    def __init__(self, kind: Literal["none", "fixed", "learned", "moments"], width: int) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"model.entry.norm={kind!r}: allowed are {', '.join(KINDS)}.")
        self.kind = kind
        self.norm: Tensor
        if kind in ("fixed", "learned"):
            self.register_buffer("norm", torch.tensor(1.0))
        if kind == "learned":
            self.log_scale = nn.Parameter(torch.tensor(0.0))
        if kind == "moments":
            self.moments = Moments(width)

    @torch.no_grad()
    def calibrate(self, norm: float, mean: Tensor, covariance: Tensor, tokens: Tensor) -> None:
        """Takes the statistics of text, once, before the first step.

        Args:
            norm: Norm tau of text tokens.
            mean: Their mean mu [D].
            covariance: Their covariance Sigma [D, D].
            tokens: The calibrated adapter's tokens u [B, P, D] of training images, the same in every
                process; with `moments`, the first estimate of what it writes.
        """
        if self.kind == "moments":
            self.moments.calibrate(mean, covariance, tokens.flatten(0, 1))
        elif self.kind != "none":
            self.norm.fill_(norm)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens u [B, P, D] -> x [B, P, D]; but for ``none``, in float32 also under autocast."""
        if self.kind == "none":
            return tokens
        if self.kind == "moments":
            with torch.autocast(tokens.device.type, enabled=False):
                return self.moments(tokens.flatten(0, 1)).view(tokens.shape)
        scale = self.norm * self.log_scale.exp() if self.kind == "learned" else self.norm
        return scale * nn.functional.normalize(tokens.to(scale.dtype), dim=-1)


class Moments(nn.Module):
    """Gives tokens u [n, D] the mean and covariance of text: x = mu + s R L^-1 (u - m).

    m and S are running moments of u; S_ = L L^T and Sigma_ = R R^T are Cholesky factors of S and Sigma
    after shrinkage, (1 - a) S + a tr(S) / D I with a = 0.01, without which a linear adapter's S has no
    inverse (its rank is D_v at most). The scale s makes the total variance tr(Sigma) exactly. So x has
    text's mean and total variance, and text's covariance up to the shrinkage and the rank of S. Where S
    equals Sigma, x is u. (Whitening and colouring by Cholesky factors: arXiv 1806.00420. Between Gaussians
    this is the Knothe-Rosenblatt map. It depends on the order of the channels, which symmetric roots do
    not; they need eigenvectors.)

    Training: each batch moves the running E[u] and E[u u^T] by `MOMENTUM` (the first ones by 1/2, 1/3,
    ...), and the values are those of the running moments, this batch included: a batch of n < D tokens has
    no inverse covariance. The gradient takes R L^-1 for a constant, and mean and total variance for the
    batch's own (as Batch Renormalization does, arXiv 1702.03275): neither a shift nor longer tokens look
    useful, so the weights do not grow for them. It does not go through the covariance: a token's share in
    the inverse covariance of its own batch of n is about D / n, and where that is not small the gradient
    turns round and the loss rises.
    In several processes the moments are those of all tokens, and so is the gradient (all-reduces of D^2 and
    D numbers). Evaluation uses the running moments and changes nothing.

    A bias right before this changes nothing, so its gradient is rounding, of which Adam still makes whole
    steps; the running mean follows them late. Until such a bias is frozen, two runs that round differently
    (one process and two) part within a few steps.

    Cost: about 2 D^3 FLOPs at each call, also in evaluation; 2 D^2 numbers in a checkpoint.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.factor: Tensor
        self.running: Tensor
        self.batches: Tensor
        self.register_buffer("mean", torch.zeros(width))  # mu
        self.register_buffer("factor", torch.eye(width))  # R
        self.register_buffer("running", torch.eye(width + 1))  # [[E[u u^T], E[u]], [E[u^T], 1]]
        self.register_buffer("batches", torch.tensor(0.0))

    def calibrate(self, mean: Tensor, covariance: Tensor, tokens: Tensor) -> None:
        self.mean.copy_(mean)
        self.factor.copy_(torch.linalg.cholesky(_shrunk(covariance.to(self.factor))))
        self.running.copy_(_moments(tokens.to(self.running))[0])
        self.batches.fill_(1)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.running.dtype)
        if self.training:
            self._update(tokens)
        mean, weight, scale = self._map()
        coloured = (tokens - mean) @ weight  # [n, D]
        if self.training:
            sums = torch.cat([coloured, coloured.square().sum(-1, keepdim=True)], dim=-1).sum(0)
            sums = _all_reduce(torch.cat([sums, sums.new_tensor([len(tokens)])]))
            centre, square = sums[:-2] / sums[-1].clamp_min(1), sums[-2] / sums[-1].clamp_min(1)
            # One token is its own mean.
            variance = (square - centre.square().sum()).clamp_min(torch.finfo(square.dtype).tiny)
            # Values stay; the gradient is that of the batch's own mean and variance.
            coloured = coloured - (centre - centre.detach())
            scale = scale * (variance.detach() / variance).sqrt()
        return self.mean + scale * coloured

    @torch.no_grad()
    def _map(self) -> tuple[Tensor, Tensor, Tensor]:
        """m [D], (R L^-1)^T [D, D] and s of the running moments."""
        mean = self.running[-1, :-1]
        covariance = self.running[:-1, :-1] - mean.outer(mean)  # S
        # Unchecked, or the host would wait: what is no number reaches the loss, which is checked.
        factor = torch.linalg.cholesky_ex(_shrunk(covariance)).L
        weight = torch.linalg.solve_triangular(factor.mT, self.factor.mT, upper=True)
        # tr(Sigma), and what `weight` makes of S: it would make tr(Sigma) of S_, but I is no part of u.
        variance = self.factor.square().sum()
        added = SHRINKAGE * covariance.diagonal().mean() * weight.square().sum()
        made = (variance - added) / (1 - SHRINKAGE)
        return mean, weight, (variance / made).sqrt()

    @torch.no_grad()
    def _update(self, tokens: Tensor) -> None:
        batch, count = _moments(tokens)
        rate = (1 / (self.batches + 1)).clamp_min(MOMENTUM)
        # A step in which no process has an image says nothing.
        self.running.lerp_(batch, rate * (count > 0))
        self.batches += count > 0


def _moments(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """E [u, 1] [u, 1]^T, [D + 1, D + 1], over the tokens [n, D] of all processes, and their number."""
    extended = torch.cat([tokens, tokens.new_ones(len(tokens), 1)], dim=-1)
    sums = _all_reduce(extended.mT @ extended)
    count = sums[-1, -1]
    return sums / count.clamp_min(1), count


def _shrunk(covariance: Tensor) -> Tensor:
    mean_variance = covariance.diagonal().mean()
    identity = torch.eye(len(covariance)).to(covariance)
    return torch.lerp(covariance, mean_variance * identity, SHRINKAGE)


def _all_reduce(tensor: Tensor) -> Tensor:
    together = distributed.is_available() and distributed.is_initialized()
    return _AllReduce.apply(tensor) if together else tensor


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_context: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return _AllReduce.apply(gradient)
