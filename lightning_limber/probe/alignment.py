"""Alignment of a group of tokens with an SAE's features at one layer: sums by image, then quotients.

For residual-stream vectors x [n, D] and their reconstructions x' by the SAE of that layer (on the raw
scale), with latents [n, K]:

    fvu         sum |x - x'|^2 / sum |x - mean|^2, the mean over all tokens of the group
    fvu_text    sum |x - x'|^2 / (tokens x variance of general text at that layer): one yardstick for
                all groups and data sets (gate.py measures it)
    mse         mean over tokens and dimensions of (x - x')^2 (Venhoff et al., arXiv 2506.11976)
    rel_error   sum |x - x'|^2 / sum |x|^2
    cosine      mean of cos(x, x')
    norm_ratio  mean of |x'| / |x|
    norm        mean of |x|
    variance    mean of |x - mean|^2
    l0          mean number of active latents of a token; sparsity is l0 / K
    alive       share of latents that fire on at least one token of the group
    shared      Jaccard index of the group's latents that fire with another group's (`jaccard`)
    outliers    share of tokens left out because their norm is an outlier's (attention sinks)
    tokens      number of tokens counted

Everything is a quotient of sums. The sums are kept by image, in float64, and put in the order of the
held-out set before they are added: no result depends on batch size, batch order or the number of
processes (beyond rounding inside one image), on bfloat16 input, or on a mean that is large against the
spread. Sums by image are also what a bootstrap over images needs (`resamples`): metrics come with a 95 %
interval for 8 D bytes an image, layer and group, and another 2 K where the strengths of latents are wanted
by image. `alive` and `shared` have none: they count latents that fire at least once, and a resample, which
holds two thirds of the images, has fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

SUMS = ("tokens", "outliers", "squares", "errors", "cosines", "norm_ratios", "norms", "actives")


@dataclass
class ImageSums:
    """What one group of tokens adds up to at one layer, I images in the order of the held-out set."""

    image: Tensor
    """[I] place of each image in the held-out set."""
    sums: Tensor
    """[I, 8] float64, in the order of `SUMS`."""
    total: Tensor
    """[I, D] float64: sum of x."""
    fires: Tensor
    """[K] which latents fire on at least one image."""
    strength: Tensor
    """[I, K] bfloat16: sum of each latent's activations; positive where it fires at all. [I, 0] where
    strengths are not kept.
    """

    def rows(self, weights: Tensor) -> dict[str, Tensor]:
        """Weighted sums over images by name: weights [R, I] -> [R] each."""
        return dict(zip(SUMS, (weights @ self.sums).unbind(-1), strict=True))

    @property
    def means(self) -> Tensor:
        """[I, D] mean token of each image; NaN for an image without tokens."""
        return self.total / self.sums[:, :1]


UNIONS = ("alive", "shared")


"""Metrics of a union over images, which a bootstrap cannot resample."""


def alignment(
    group: ImageSums, weights: Tensor | None = None, text_variance: float = float("nan")
) -> dict[str, Tensor]:
    """The metrics of a group of tokens for each row of weights over images, [R] each.

    Args:
        group: Its sums by image.
        weights: [R, I], from `resamples`; None is one row of ones.
        text_variance: Mean of |x - mean|^2 of general text at that layer, for `fvu_text`.

    Returns:
        Metrics by name. NaN where the group has no token (or no variance, for `fvu`).
    """
    if weights is None:
        weights = group.sums.new_ones(1, len(group.sums))
    of = group.rows(weights)
    tokens, total = of["tokens"], weights @ group.total  # [R], [R, D]
    variance = of["squares"] - torch.linalg.vecdot(total, total) / tokens
    # A group that does not vary has no FVU; what is left there is rounding.
    variance = torch.where(variance > 1e-12 * of["squares"], variance, torch.nan)
    l0 = of["actives"] / tokens
    return {
        "fvu": of["errors"] / variance,
        "fvu_text": of["errors"] / (tokens * text_variance),
        "mse": of["errors"] / (tokens * total.shape[-1]),
        "rel_error": of["errors"] / of["squares"],
        "cosine": of["cosines"] / tokens,
        "norm_ratio": of["norm_ratios"] / tokens,
        "norm": of["norms"] / tokens,
        "variance": variance / tokens,
        "l0": l0,
        "sparsity": l0 / group.fires.numel(),
        "alive": group.fires.double().mean().expand_as(l0),
        "outliers": of["outliers"] / (tokens + of["outliers"]),
        "tokens": tokens,
    }


def jaccard(fires: Tensor, other: Tensor) -> Tensor:
    """Jaccard index of the latents that fire in two groups: |both| / |either|, [..., K] each -> [...]."""
    return (fires & other).sum(-1).double() / (fires | other).sum(-1)


def active_latents(latents: Tensor) -> Tensor:
    """How many latents are active on each token: [n, K], dense or sparse COO -> [n] float64."""
    if not latents.is_sparse:
        return (latents > 0).sum(-1).double()
    token, _ = latents.indices()
    count = torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
    return count.index_add_(0, token, (latents.values() > 0).double())


class SAEAlignment(Metric):
    """Streams tokens of one group at one layer into `ImageSums`; `alignment` makes metrics of them.

    An image's tokens must come in one call: what is kept is a row for each image of each call.

    Args:
        keep_strength: Keep the strengths of latents by image, which only metrics of meaning need.
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = SAEAlignment()
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> latents = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 5.0]])
        >>> metric.update(x, x.mean(0).expand(2, 2), latents, row=torch.tensor([0, 1]), image=[0, 1])
        >>> values = alignment(metric.compute())
        >>> [round(float(values[name]), 3) for name in ("fvu", "mse", "l0", "alive")]
        [1.0, 0.5, 1.5, 0.667]
    """

    full_state_update = False
    is_differentiable = False
    image: list[Tensor]
    sums: list[Tensor]
    total: list[Tensor]
    fires: list[Tensor]
    strength: list[Tensor]

    def __init__(self, keep_strength: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.keep_strength = keep_strength
        for name in ("image", "sums", "total", "fires", "strength"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        x: Tensor,
        reconstruction: Tensor,
        latents: Tensor,
        row: Tensor,
        image: Tensor | list[int],
        keep: Tensor | None = None,
    ) -> None:
        """Adds n tokens of B images; n may be 0.

        Args:
            x: [n, D] residual stream.
            reconstruction: [n, D] of the SAE, on the same scale.
            latents: [n, K] of the SAE, dense or sparse COO, none negative; a latent is active where it is
                positive.
            row: [n] which of the B images each token belongs to.
            image: [B] places of these images in the held-out set.
            keep: [n] false at tokens to leave out and count as outliers; None keeps all.
        """
        image = torch.as_tensor(image, device=x.device)
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
        # Of a token that is left out it is known that it was, and no more.
        outlier = by_token.new_tensor([name == "outliers" for name in SUMS])
        by_token = torch.where(keep[:, None], by_token, outlier)

        def by_image(values: Tensor, row: Tensor) -> Tensor:
            return values.new_zeros(len(image) + 1, values.shape[-1]).index_add_(0, row, values)[:-1]

        kept_row = torch.where(keep, row, len(image))  # The last row takes what is left out.
        self.image.append(image)
        self.sums.append(by_image(by_token, row))
        self.total.append(by_image(x, kept_row))
        if latents.is_sparse:
            token, latent = latents.indices()
            strength = torch.zeros(len(image) + 1, latents.shape[1], device=x.device)
            place = kept_row[token] * latents.shape[1] + latent
            strength = strength.view(-1).index_add_(0, place, latents.values()).view_as(strength)[:-1]
        else:
            strength = by_image(latents.float(), kept_row)
        fires = (strength > 0).any(0, keepdim=True)
        self.fires = [fires | self.fires[0]] if self.fires else [fires]
        self.strength.append(strength.bfloat16() if self.keep_strength else strength[:, :0])

    def compute(self) -> ImageSums:
        """All images' sums, on the CPU, in the order of the held-out set."""
        image, sums, total, fires, strength = (
            torch.cat(state).cpu() if isinstance(state, list) else state.cpu()
            for state in (self.image, self.sums, self.total, self.fires, self.strength)
        )
        order = image.argsort()
        return ImageSums(image[order], sums[order], total[order], fires.any(0), strength[order])
