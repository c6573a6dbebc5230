"""Attributes of images (a red object, a star) as labels that a score is to tell: halves, AUROC, chance.

Images are split into even and odd rows. What is chosen or fitted on one half is scored on the other, and
the AUROC is over the pairs of both halves: within each half, never across, as the halves' scores come from
different latents or probes. Chance: the truth permuted within each half, all attributes together.

Shapes: A attributes, I images, n of them in a half, M permutations, R bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_limber.probe import words
from lightning_limber.probe.statistics import Comparison, compare, permutations

if TYPE_CHECKING:
    from lightning_limber.probe.metrics.base import Measurement

MIN_IMAGES = 5
"""An attribute is left out where fewer images of a half have it, or lack it: no AUROC worth the name."""
MAX_PERMUTATIONS = 100
HALVES = (slice(0, None, 2), slice(1, None, 2))
CROSSED = ((0, 1), (1, 0))
"""The half to choose on, and the half to score on."""


def centred_ranks(scores: Tensor) -> Tensor:
    """Half of (the number of scores below each, less the number above): [..., n] float32 -> [..., n].

    Summed over positives it is (AUROC - 1/2) x positives x negatives, ties counted half. Such sums are
    multiples of 1/2, and exact in float32 up to halves of 8,000 images: equal AUROCs are equal numbers.
    """
    scores = scores.float().contiguous()
    ordered = scores.sort(dim=-1).values
    below = torch.searchsorted(ordered, scores, out_int32=True)
    up_to = torch.searchsorted(ordered, scores, right=True, out_int32=True)
    return (below + up_to - scores.shape[-1]) / 2


def pair_signs(scores: Tensor, has: Tensor) -> Tensor:
    """1 where an image with the attribute scores higher than one without, -1 where lower, 0 where equal.

    Args:
        scores: [V, n] of V scores.
        has: [V, n] bool, as many in each row; or [n].

    Returns:
        [V, positives, negatives].
    """
    has = has.expand_as(scores)
    positive, negative = (scores[which].view(len(scores), -1) for which in (has, ~has))
    return (positive[:, :, None] - negative[:, None, :]).sign()


class Half(NamedTuple):
    """Images of one half.

    Attributes:
        labels: [A, 1 + M, n] bool: the truth, and M permutations of it.
        weights: [n, 1 + R] bootstrap weights.
    """

    labels: Tensor
    weights: Tensor

    @property
    def pairs(self) -> Tensor:
        """[A] float64: images with the attribute x images without."""
        positives = self.labels[:, 0].sum(-1).double()
        return positives * (self.labels.shape[-1] - positives)

    def weighted_margins(self, signs: Tensor, attribute: int) -> Tensor:
        """(AUROC - 1/2) x weight of the pairs, in every bootstrap sample.

        Args:
            signs: [V, positives, negatives] from `pair_signs`, of the true labels.
            attribute: Number of the attribute.

        Returns:
            [V, 1 + R].
        """
        has = self.labels[attribute, 0]
        by_negative = signs.double() @ self.weights[~has]  # [V, positives, 1 + R]
        return (by_negative * self.weights[has]).sum(1) / 2


@dataclass(frozen=True)
class Attributes:
    """A attributes of I images, in two halves.

    Args:
        names: Of the attributes.
        halves: Their labels, and the bootstrap weights.
    """

    names: list[str]
    halves: tuple[Half, Half]

    @classmethod
    def make(cls, names: list[str], labels: Tensor, weights: Tensor, count: int, seed: int) -> Attributes:
        """Splits and permutes labels; attributes that too few images of a half have or lack are left out.

        Args:
            names: Of the attributes.
            labels: [A, I] bool.
            weights: [1 + R, I] bootstrap weights.
            count: Number of permutations M.
            seed: Of the permutations.
        """
        parts = [labels[:, half] for half in HALVES]
        enough = torch.stack([side.sum(-1) >= MIN_IMAGES for part in parts for side in (part, ~part)]).all(
            0
        )
        halves = []
        for number, (half, part) in enumerate(zip(HALVES, parts, strict=True)):
            images = part.shape[1]
            orders = torch.cat([torch.arange(images)[None], permutations(images, count, seed + number)])
            halves.append(Half(part[enough][:, orders], weights[:, half].T.contiguous()))
        return cls([n for n, ok in zip(names, enough.tolist(), strict=True) if ok], (halves[0], halves[1]))

    @cached_property
    def pairs(self) -> Tensor:
        """[A] pairs of both halves."""
        return self.halves[0].pairs + self.halves[1].pairs

    @cached_property
    def weighted_pairs(self) -> Tensor:
        """[A, 1 + R] weight of the pairs of both halves in every bootstrap sample."""
        of_halves = []
        for labels, weights in self.halves:
            positive, negative = (side.double() @ weights for side in (labels[:, 0], ~labels[:, 0]))
            of_halves.append(positive * negative)
        return of_halves[0] + of_halves[1]

    def scores(self, margins: Tensor, weighted: Tensor) -> Scores:
        """AUROCs of sums over both halves.

        Args:
            margins: [A, 1 + M] (AUROC - 1/2) x pairs.
            weighted: [A, 1 + R] the same in bootstrap samples, see `Half.weighted_margins`.
        """
        bootstrap = 0.5 + weighted / self.weighted_pairs  # NaN where a sample has no pair.
        return Scores(bootstrap.T, (0.5 + margins / self.pairs[:, None]).T[1:])


class Scores(NamedTuple):
    """Held-out AUROC by attribute.

    Attributes:
        bootstrap: [1 + R, A], the value itself first.
        permuted: [M, A] by chance.
    """

    bootstrap: Tensor
    permuted: Tensor

    @property
    def mean(self) -> Tensor:
        """[1 + R] over the attributes that a bootstrap sample has."""
        return self.bootstrap.nanmean(-1)

    def compare(self) -> Comparison:
        """The mean over attributes against chance."""
        return compare(self.mean, self.permuted.mean(-1))

    def compare_share(self, limit: float) -> Comparison:
        """The share of attributes with an AUROC of at least `limit` against chance."""
        shares = ((auroc >= limit).double().mean(-1) for auroc in (self.bootstrap, self.permuted))
        return compare(*shares)


def compare_best(by_layer: Sequence[Scores]) -> Comparison:
    """The highest mean AUROC of all layers, against the highest of each permutation.

    All layers were given the same permutations. The interval is the best layer's own.
    """
    means = torch.stack([scores.mean for scores in by_layer])  # [L, 1 + R]
    permuted = torch.stack([scores.permuted.mean(-1) for scores in by_layer])  # [L, M]
    return compare(means[means[:, 0].argmax()], permuted.amax(0))


def read_attributes(data: Measurement) -> Attributes | None:
    """The attributes of the probed images; None where no truth is known, or none is frequent enough."""
    if data.images[0].attributes is None:
        return None
    names, table = words.word_table([sorted(image.attributes or ()) for image in data.images])
    config = data.probe.config
    count = min(MAX_PERMUTATIONS, config.bootstrap_samples)
    made = Attributes.make(names, table.T, data.weights, count, config.seed)
    return made if made.names else None
