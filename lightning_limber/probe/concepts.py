"""Meaning beside geometry: do the features that image tokens light up belong to what the image shows?

Four measures at one layer, over I held-out images, each with the chance level that it must be read
against. Pure functions on what the probe collected; shapes: I images, K latents, W words, A attributes,
R bootstrap samples (rows of `metrics.resamples`).

    match      share of images for which the description of one of the top latents agrees with a word of
               the image's captions (Venhoff et al., arXiv 2506.11976, section 4, with a word list in
               place of a paid judge); chance: the captions of other images
    lens_hit   share of images where a content word of the captions is among the logit lens' top tokens
               at some image position (the baseline of the field); chance: the captions of other images
    knn        mutual nearest neighbours of image-token means and caption means (Huh et al., arXiv
               2405.07987, section 2.1), 0..1; chance: images and captions paired anew
    detectors  where the truth of each image is known: share of its attributes (a red object, a star)
               that some latent detects; chance: the truth of other images
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_limber.probe.statistics import interval


@dataclass(frozen=True)
class Against:
    """A share with its 95 % bootstrap interval over images, and what chance gives.

    Attributes:
        value, low, high: The share and its interval.
        chance, chance_low, chance_high: Mean and 95 % range over random pairings.
        p: Share of random pairings (the real one counted in) that reach the value.
    """

    value: float
    low: float
    high: float
    chance: float
    chance_low: float
    chance_high: float
    p: float


def pairings(images: int, count: int, seed: int) -> Tensor:
    """[count, images] random pairings of images with captions, permutations all."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, images, generator=generator).argsort(dim=-1)


def against_chance(hits: Tensor, weights: Tensor, pairs: Tensor) -> Against:
    """Share of images that hit with their own captions, against other images' captions.

    Args:
        hits: [I, I] how well image i hits with the captions of image j, 0..1.
        weights: [1 + R, I] bootstrap over images.
        pairs: [M, I] from `pairings`.
    """
    hits = hits.double()
    own = hits.diagonal()
    value, low, high = interval(weights @ own / weights.sum(-1))
    random = hits[torch.arange(len(hits)), pairs].mean(-1)  # [M]
    return Against(value, low, high, *_chance(value, random))


def _chance(value: float, random: Tensor) -> tuple[float, float, float, float]:
    low, high = random.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    p = (1 + int((random >= value - 1e-12).sum())) / (1 + len(random))
    return float(random.mean()), float(low), float(high), p


def top_latents(
    strength: Tensor,
    density: Tensor,
    count: int,
    max_image_share: float = 0.05,
    max_text_density: float = 0.005,
) -> Tensor:
    """Bool [I, K]: each image's strongest latents, common ones left out (as in Venhoff et al.).

    Args:
        strength: [I, K] sum of a latent's activations over the image's tokens.
        density: [K] share of text tokens that each latent fires on.
        count: How many an image.
        max_image_share: Latents that fire on a larger share of the images are dropped.
        max_text_density: So are latents that fire on a larger share of text tokens.
    """
    strength = strength.float()
    common = ((strength > 0).float().mean(0) > max_image_share) | (density > max_text_density)
    strength = strength.masked_fill(common, 0)
    values, index = strength.topk(min(count, strength.shape[1]), dim=-1)
    return torch.zeros_like(strength, dtype=torch.bool).scatter_(-1, index, values > 0)


def word_hits(found: Tensor, captions: Tensor) -> Tensor:
    """[I, W] words found for each image, [J, W] words of each caption -> [I, J] whether any agrees."""
    return found.float() @ captions.float().T > 0


def words_of(texts: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """Distinct words (in alphabetical order), and which text has which: bool [I, W]."""
    words = sorted({word for text in texts for word in text})
    place = {word: i for i, word in enumerate(words)}
    table = torch.zeros(len(texts), len(words), dtype=torch.bool)
    for row, text in enumerate(texts):
        table[row, [place[word] for word in text]] = True
    return words, table


def neighbours(means: Tensor, k: int) -> Tensor:
    """Bool [I, I]: the k nearest other images of each, by cosine.

    The common mean is taken off first: token means of a residual stream share most of their length.

    Args:
        means: [I, D].
        k: How many.
    """
    centred = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
    similarity = (centred @ centred.T).fill_diagonal_(-torch.inf)
    near = similarity.topk(min(k, len(means) - 1), dim=-1).indices
    return torch.zeros(len(means), len(means), dtype=torch.bool).scatter_(-1, near, True)


def mutual_knn(a: Tensor, b: Tensor, k: int, weights: Tensor, pairs: Tensor) -> Against:
    """Overlap of nearest neighbours in two spaces, mean over images; interval with neighbours fixed.

    Args:
        a: [I, D_a] image-token means.
        b: [I, D_b] caption means of the same images.
        k: Neighbours.
        weights: [1 + R, I] bootstrap over images.
        pairs: [M, I] random pairings.
    """
    near_a, near_b = neighbours(a, k), neighbours(b, k)
    own = (near_a & near_b).sum(-1).double() / near_a.sum(-1)  # [I]
    value, low, high = interval(weights @ own / weights.sum(-1))
    count = near_a.sum()
    random = torch.stack([(near_a & near_b[pair][:, pair]).sum() for pair in pairs]).double() / count
    return Against(value, low, high, *_chance(value, random))


def auroc(strength: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve of every latent for every attribute: [A, K]; ties count half.

    Args:
        strength: [I, K].
        labels: [A, I] bool; an attribute that all or none of the images have gives NaN.
    """
    columns = strength.float().T.contiguous()  # [K, I]
    ordered = columns.sort(dim=-1).values
    below = torch.searchsorted(ordered, columns, right=False)
    up_to = torch.searchsorted(ordered, columns, right=True)
    ranks = (below + up_to + 1).double() / 2  # [K, I] mean rank among equals, from 1
    positives = labels.double().sum(-1, keepdim=True)  # [A, 1]
    negatives = labels.shape[-1] - positives
    wins = labels.double() @ ranks.T - positives * (positives + 1) / 2
    return wins / torch.where(positives * negatives > 0, positives * negatives, torch.nan)


def weighted_auroc(scores: Tensor, labels: Tensor, half: Tensor, weights: Tensor) -> Tensor:
    """AUROC of one score for each attribute, in every bootstrap sample: [1 + R, A].

    Only pairs of images from the same half are compared, so that scores of two latents (one chosen for
    each half) are never held against each other.

    Args:
        scores: [A, I].
        labels: [A, I] bool.
        half: [I] bool.
        weights: [1 + R, I].
    """
    values = []
    same = half[:, None] == half[None, :]
    for score, label in zip(scores.float(), labels, strict=True):
        pair = (label[:, None] & ~label[None, :] & same).double()  # positive by negative
        wins = (score[:, None] > score[None, :]).double() + 0.5 * (score[:, None] == score[None, :])
        won = ((weights @ (wins * pair)) * weights).sum(-1)
        values.append(won / ((weights @ pair) * weights).sum(-1))
    return torch.stack(values, dim=-1)


@dataclass(frozen=True)
class Detection:
    """Latents as detectors of A attributes on the tokens of I images.

    Attributes:
        latent: [A] the latent with the best AUROC over all images (for a reader).
        auroc: [1 + R, A] AUROC on images that took no part in choosing the latent.
    """

    latent: Tensor
    auroc: Tensor


def detectors(
    strength: Tensor, labels: Tensor, weights: Tensor, chosen_by: Tensor | None = None
) -> Detection:
    """Finds each attribute's best latent on one half of the images and scores it on the other.

    Best of thousands on the images that chose it would be luck; here the two halves (even and odd
    places) take turns.

    Args:
        strength: [I, K] on the tokens to be scored.
        labels: [A, I] bool, with positives and negatives in both halves.
        weights: [1 + R, I].
        chosen_by: [I, K] on the tokens that choose the latents, when these are others. With strengths
            on the captions' tokens, read without the image, the result is the paper's claim in one
            number: a latent that means "red" in text fires on red things.
    """
    chosen_by = strength if chosen_by is None else chosen_by
    half = halves(len(strength))
    scores = torch.empty(labels.shape)
    for chosen_on, scored_on in ((half, ~half), (~half, half)):
        best = auroc(chosen_by[chosen_on], labels[:, chosen_on]).nan_to_num(0).argmax(-1)  # [A]
        scores[:, scored_on] = strength[scored_on][:, best].T.float()
    latent = auroc(chosen_by, labels).nan_to_num(0).argmax(-1)
    return Detection(latent, weighted_auroc(scores, labels, half, weights))


def halves(images: int) -> Tensor:
    """Bool [images]: every other image."""
    return torch.arange(images) % 2 == 0
