"""Sums over a group's tokens at one layer, kept by image.

All reconstruction metrics (`metrics/geometry.py`) are quotients of sums. The sums are kept by image, in
float64, and put in the order of the held-out set before they are added: no result depends on batch size,
batch order or the number of processes (beyond rounding inside one image), on bfloat16 input, or on a mean
that is large against the spread. Sums by image are also what a bootstrap over images needs: they take 8 D
bytes an image, layer and group, and another 2 K each where the sums or the maxima of latents' activations
are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

SUMS = ("tokens", "outliers", "squares", "errors", "cosines", "norm_ratios", "norms", "actives")


@dataclass
class ImageStats:
    """Sums over one group's tokens at one layer, for I images in the order of the held-out set."""

    index: Tensor
    """[I] index of each image in the held-out set."""
    sums: Tensor
    """[I, 8] float64, in the order of `SUMS`."""
    total: Tensor
    """[I, D] float64: sum of x."""
    fires: Tensor
    """[K] bool: latents that fire on at least one image."""
    activation_sum: Tensor
    """[I, K] bfloat16: sum of each latent's activations; positive where it fires at all. [I, 0] where
    no metric needs it.
    """
    activation_max: Tensor
    """[I, K] bfloat16: each latent's largest activation. [I, 0] where no metric needs it."""

    def weighted(self, weights: Tensor) -> dict[str, Tensor]:
        """Weighted sums over images by name: weights [R, I] -> [R] each."""
        return dict(zip(SUMS, (weights @ self.sums).unbind(-1), strict=True))

    @property
    def means(self) -> Tensor:
        """[I, D] mean token of each image; NaN for an image without tokens."""
        return self.total / self.sums[:, :1]

    @property
    def mean(self) -> Tensor:
        """[D] mean over all tokens of all images."""
        return self.total.sum(0) / self.sums[:, 0].sum()


def active_latents(latents: Tensor) -> Tensor:
    """How many latents are active on each token: [n, K], dense or sparse COO -> [n] float64."""
    if not latents.is_sparse:
        return (latents > 0).sum(-1).double()
    token, _ = latents.indices()
    count = torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
    return count.index_add_(0, token, (latents.values() > 0).double())


def sum_by_image(values: Tensor, image_rows: Tensor, images: int, keep: Tensor | None = None) -> Tensor:
    """Sums values [n, C] of tokens over each of B images: [B, C]; asks nothing of the device.

    Args:
        values: [n, C].
        image_rows: [n] image of each token.
        images: B.
        keep: [n] false at tokens to leave out; None keeps all.
    """
    # An extra last row takes what is left out.
    rows = image_rows if keep is None else torch.where(keep, image_rows, images)
    return values.new_zeros(images + 1, values.shape[-1]).index_add_(0, rows, values)[:-1]


def _by_latent(
    latents: Tensor, image_rows: Tensor, images: int, keep: Tensor, largest: bool = False
) -> Tensor:
    """Sum (or maximum) over each image of each latent, [n, K] dense or sparse COO -> [B, K]."""
    rows, width = torch.where(keep, image_rows, images), latents.shape[1]
    found = torch.zeros(images + 1, width, device=latents.device)
    into, index, values = found, rows, latents
    if latents.is_sparse:
        token, latent = latents.indices()
        into, index, values = found.view(-1), rows[token] * width + latent, latents.values()
    if largest:
        index = index if latents.is_sparse else index[:, None].expand(-1, width)
        into.scatter_reduce_(0, index, values.float(), "amax")
    else:
        into.index_add_(0, index, values.float())
    return found[:-1]


class TokenStats(Metric):
    """Streams tokens of one group at one layer into `ImageStats`.

    All of an image's tokens must come in one call: one row is kept for each image of each call.

    Args:
        keep_activation_sum: Keep the activation sum of every latent by image.
        keep_activation_max: Keep the largest activation of every latent by image.
        kwargs: Passed on to `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_limber.probe.metrics.geometry import reconstruction_metrics
        >>> stats = TokenStats()
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> latents = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 5.0]])
        >>> stats.update(x, x.mean(0).expand(2, 2), latents, image_rows=torch.tensor([0, 1]), index=[0, 1])
        >>> values = reconstruction_metrics(stats.compute())
        >>> [round(float(values[name]), 3) for name in ("fvu", "mse", "l0", "alive")]
        [1.0, 0.5, 1.5, 0.667]
    """

    full_state_update = False
    is_differentiable = False
    index: list[Tensor]
    sums: list[Tensor]
    total: list[Tensor]
    fires: list[Tensor]
    activation_sum: list[Tensor]
    activation_max: list[Tensor]

    def __init__(
        self, keep_activation_sum: bool = True, keep_activation_max: bool = False, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.keep_activation_sum, self.keep_activation_max = keep_activation_sum, keep_activation_max
        for name in ("index", "sums", "total", "fires", "activation_sum", "activation_max"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        x: Tensor,
        reconstruction: Tensor,
        latents: Tensor,
        image_rows: Tensor,
        index: Tensor | list[int],
        keep: Tensor | None = None,
    ) -> None:
        """Adds n tokens of B images; n may be 0.

        Args:
            x: [n, D] residual stream.
            reconstruction: [n, D] of the SAE, on the same scale.
            latents: [n, K] of the SAE, dense or sparse COO, none negative; a latent is active where it is
                positive.
            image_rows: [n] which of the B images each token belongs to.
            index: [B] indices of these images in the held-out set.
            keep: [n] false at tokens to leave out and count as outliers; None keeps all.
        """
        index = torch.as_tensor(index, device=x.device)
        keep = torch.ones(len(x), dtype=torch.bool, device=x.device) if keep is None else keep
        x, reconstruction = x.double(), reconstruction.double()
        norm, norm_reconstruction = x.norm(dim=-1), reconstruction.norm(dim=-1)
        by_token = torch.stack(
            [
                torch.ones_like(norm),
                torch.zeros_like(norm),
                norm**2,
                ((x - reconstruction) ** 2).sum(-1),
                # A zero vector has no direction and no length to compare with: it counts as 0.
                (x * reconstruction).sum(-1) / (norm * norm_reconstruction).clamp_min(1e-300),
                torch.where(norm > 0, norm_reconstruction / norm, 0.0),
                norm,
                active_latents(latents),
            ],
            dim=-1,
        )  # [n, 8]
        # An outlier only increments `outliers`.
        outlier = by_token.new_tensor([name == "outliers" for name in SUMS])
        by_token = torch.where(keep[:, None], by_token, outlier)
        self.index.append(index)
        self.sums.append(sum_by_image(by_token, image_rows, len(index)))
        self.total.append(sum_by_image(x, image_rows, len(index), keep))
        activation_sum = _by_latent(latents, image_rows, len(index), keep)
        fires = (activation_sum > 0).any(0, keepdim=True)
        self.fires = [fires | self.fires[0]] if self.fires else [fires]
        none = activation_sum[:, :0].bfloat16()
        self.activation_sum.append(activation_sum.bfloat16() if self.keep_activation_sum else none)
        if self.keep_activation_max:
            none = _by_latent(latents, image_rows, len(index), keep, largest=True).bfloat16()
        self.activation_max.append(none)

    def compute(self) -> ImageStats:
        """All images' sums, on the CPU, in the order of the held-out set."""
        states = self.index, self.sums, self.total, self.activation_sum, self.activation_max, self.fires
        index, *by_image, fires = (
            torch.cat(state).cpu() if isinstance(state, list) else state.cpu() for state in states
        )
        order = index.argsort()
        sums, total, activation_sum, activation_max = (state[order] for state in by_image)
        return ImageStats(index[order], sums, total, fires.any(0), activation_sum, activation_max)
