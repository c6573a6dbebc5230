"""`detectors`: share of the images' attributes (a red object, a star) that some latent detects.

Only where the truth of each image is known. `detectors_same` asks the latents that detect the word in text.
Chance: the truth of other images, in one random pairing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_limber.probe import words
from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel

MIN_IMAGES = 5
"""An attribute is left out where fewer images of a half have it, or lack it: no AUROC worth the name."""


def auroc(activation_sum: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve of every latent for every attribute: [A, K]; ties count half.

    Args:
        activation_sum: [I, K].
        labels: [A, I] bool; an attribute that all or none of the images have gives NaN.
    """
    columns = activation_sum.float().T.contiguous()  # [K, I]
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
    activation_sum: Tensor, labels: Tensor, weights: Tensor, chosen_by: Tensor | None = None
) -> Detection:
    """Selects each attribute's best latent on one half of the images, scores it on the other, and swaps.

    Selecting and scoring on the same images overfits. The halves are even and odd rows.

    Args:
        activation_sum: [I, K] on the tokens to be scored.
        labels: [A, I] bool, with positives and negatives in both halves.
        weights: [1 + R, I].
        chosen_by: [I, K] on the tokens that choose the latents, when these are others. With activations on
            the captions' tokens, read without the image, the result is the paper's claim in one number: a
            latent that means "red" in text fires on red things.
    """
    chosen_by = activation_sum if chosen_by is None else chosen_by
    half = halves(len(activation_sum))
    scores = torch.empty(labels.shape)
    for chosen_on, scored_on in ((half, ~half), (~half, half)):
        best = auroc(chosen_by[chosen_on], labels[:, chosen_on]).nan_to_num(0).argmax(-1)  # [A]
        scores[:, scored_on] = activation_sum[scored_on][:, best].T.float()
    latent = auroc(chosen_by, labels).nan_to_num(0).argmax(-1)
    return Detection(latent, weighted_auroc(scores, labels, half, weights))


def halves(images: int) -> Tensor:
    """Bool [images]: every other image."""
    return torch.arange(images) % 2 == 0


class Detectors(ProbeMetric):
    """Shares of attributes that latents detect, their mean AUROC, and a table of the best latents."""

    name = "detectors"
    activation_sums = ("image", "text")
    panels = (
        Panel(
            "detectors",
            "detectors: attributes with a latent",
            also=("detectors_same", "image, by the latents that detect the word in text"),
        ),
    )

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        if data.images[0].attributes is None:
            return
        names, table = words.word_table([sorted(image.attributes or ()) for image in data.images])
        labels = table.T  # [A, I]
        half = halves(labels.shape[1])
        sides = torch.stack([side[:, part].sum(-1) for side in (labels, ~labels) for part in (half, ~half)])
        enough = (sides >= MIN_IMAGES).all(0)
        names, labels = [n for n, ok in zip(names, enough.tolist(), strict=True) if ok], labels[enough]
        if not names:
            return
        permuted = labels[:, data.permutations()[0]]  # One permutation: a whole search each.
        for hook, layer in data.layers.items():
            image, text = (data.stats[group, hook].activation_sum.float() for group in ("image", "text"))
            detections = {
                ("image", "detectors"): detectors(image, labels, data.weights),
                ("text", "detectors"): detectors(text, labels, data.weights),
                ("image", "detectors_same"): detectors(image, labels, data.weights, chosen_by=text),
                ("image", "detectors_chance"): detectors(image, permuted, data.weights[:1]),
                ("image", "detectors_same_chance"): detectors(
                    image, permuted, data.weights[:1], chosen_by=text
                ),
            }
            for (group, metric), detection in detections.items():
                reached = (detection.auroc >= data.probe.config.detector_auroc).double()
                for suffix, samples in (("", reached.mean(-1)), ("_auroc", detection.auroc.nanmean(-1))):
                    value = samples if len(samples) > 1 else float(samples[0])
                    yield Estimate(layer, group, metric + suffix, value)
            by_image, by_text, same = list(detections.values())[:3]
            known = data.probe.descriptions.get(hook)
            for i, name in enumerate(names):
                latents = {"latent": int(by_image.latent[i]), "text_latent": int(same.latent[i])}
                row = {
                    "layer": layer,
                    "attribute": name,
                    "latent": latents["latent"],
                    "auroc_image": float(by_image.auroc[0, i]),
                    "text_latent": latents["text_latent"],
                    "auroc_text": float(by_text.auroc[0, i]),
                    "text_latent_auroc_image": float(same.auroc[0, i]),
                    **{f"{k}_description": known.texts[v] if known else "" for k, v in latents.items()},
                }
                data.tables.setdefault("detectors", []).append(row)
