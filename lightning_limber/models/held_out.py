"""Loss and accuracy of held-out captions, as sums by image, with intervals over images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_limber.data.collate import Batch
from lightning_limber.utils.bootstrap import interval, resampled_sums

SUMS = ("loss", "tokens", "correct", "loss_shuffled", "tokens_shuffled")
RATIOS = {
    "loss": ("loss", "tokens"),
    "loss_shuffled": ("loss_shuffled", "tokens_shuffled"),
    "perplexity": ("loss", "tokens"),
    "accuracy": ("correct", "tokens"),
}
"""Which sum over which each metric is; perplexity is the exponential of its ratio."""


@dataclass
class HeldOutSums:
    """What one validation found on I images, in the order of the held-out set."""

    index: Tensor
    """[I] index of each image in the held-out set."""
    sums: Tensor
    """[I, 5] float64, in the order of `SUMS`: nats and numbers of labels."""

    def by_image(self) -> dict[str, Tensor]:
        """Numerator and denominator [I, 2] by metric; perplexity is made of the loss'."""
        return {
            name: self.sums[:, [SUMS.index(over) for over in ratio]]
            for name, ratio in RATIOS.items()
            if name != "perplexity"
        }

    @cached_property
    def scores(self) -> dict[str, tuple[float, float, float]]:
        """Each metric with its 95 % bootstrap interval over images: a mean over all labels."""
        sums = dict(zip(SUMS, resampled_sums(self.sums).unbind(-1), strict=True))  # [1 + R] each
        samples = {name: sums[over] / sums[under] for name, (over, under) in RATIOS.items()}
        samples["perplexity"] = samples["perplexity"].exp()
        return {name: interval(of_metric) for name, of_metric in samples.items()}


class HeldOut(Metric):
    """Streams validation batches into `HeldOutSums`, whatever the batches and processes.

    All of an image's labels must come in one batch, and every label must have an image.
    """

    full_state_update = False
    is_differentiable = False
    index: list[Tensor]
    sums: list[Tensor]

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for name in ("index", "sums"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, batch: Batch, losses: Tensor, correct: Tensor) -> None:
        """Adds B images.

        Args:
            batch: Has the labels of the images' own captions first, then those of another image's.
            losses: [n] cross-entropy of each label, in nats.
            correct: [n] whether each was predicted.
        """
        losses, own = losses.double(), batch.own_labels
        ones = torch.ones_like(losses)
        sums = losses.new_zeros(len(batch.index), len(SUMS))
        by_label = torch.stack([losses, ones, correct.double()], dim=-1)  # [n, 3]
        sums[:, :3].index_add_(0, batch.label_images[:own], by_label[:own])
        sums[:, 3:].index_add_(0, batch.label_images[own:], by_label[own:, :2])
        self.index.append(torch.as_tensor(batch.index, device=losses.device))
        self.sums.append(sums)

    def compute(self) -> HeldOutSums:
        """All images of all processes, on the CPU."""
        index, sums = (
            torch.cat(state).cpu() if isinstance(state, list) else state.cpu()
            for state in (self.index, self.sums)
        )
        order = index.argsort()
        return HeldOutSums(index[order], sums[order])


def in_words(scores: dict[str, tuple[float, float, float]]) -> str:
    """``loss 0.338 [0.31, 0.37], ...``; perplexity says the same as the loss."""
    return ", ".join(
        f"{name} {value:.3f} [{low:.3g}, {high:.3g}]"
        for name, (value, low, high) in scores.items()
        if name != "perplexity"
    )
