"""`detectors_shared_auroc`: is there a latent that means an attribute in text and on image tokens alike?

AUROC of latents that tell which images have an attribute (a red object, a star), by the sum of their
activations over an image's tokens; mean over attributes. A latent is chosen on one half of the images and
scored on the other, and the halves are swapped:

    detectors_shared_auroc   among latents that tell the attribute from the captions' tokens, read without
                             the image, the one that tells it best from image tokens
    detectors_auroc          the best latent on the group's own tokens
    detectors_same_auroc     the best latent on text, scored on image tokens

``detectors_shared_text_auroc`` is how well the first tells the attribute from text. Where several latents
tie for the best, the score is the mean of theirs. ``detectors_shared``, ``detectors`` and
``detectors_same`` are the shares of attributes with an AUROC of at least `probe.detector_auroc`.

Chance: what is true of an image and said of it stays together, and is paired with the image tokens of
another image of the same half, 100 times. The whole search on image tokens is done again each time. What
is chosen on text stays the same then: were text's truth permuted too, few or no latents would pass as
detectors in text, and the null would be of another, shorter search. So p asks whether image tokens tell
anything to the latents that mean the attribute in text. ``*_max`` is the best layer, against the best
layer of every permutation.

Intervals are of the chosen latents: they do not contain the luck of the choice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_limber.probe.attributes import (
    CROSSED,
    HALVES,
    Attributes,
    Scores,
    centred_ranks,
    compare_best,
    pair_signs,
    read_attributes,
)
from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel

TEXT_AUROC = 0.9
"""From here a latent counts as one that tells an attribute from text."""
SCORES = ("shared", "image", "same", "text", "shared_text")
TIED_AT_ONCE = 256


def best_latents(margins: Tensor) -> Tensor:
    """[k] -> [T] which latents tie for the best."""
    return (margins == margins.amax()).nonzero().squeeze(-1)


def held_out(chosen_by: Tensor, scored: Tensor) -> Tensor:
    """Mean score [1 + M] of the latents that are best on the other half, row by row.

    Args:
        chosen_by: [1 + M, k] of k latents on the half that chooses.
        scored: [1 + M, k] on the half that scores.
    """
    best = chosen_by == chosen_by.amax(-1, keepdim=True)
    return (scored * best).sum(-1).double() / best.sum(-1)


def mean_pair_signs(ranks: Tensor, latents: Tensor, has: Tensor) -> Tensor:
    """Mean of `pair_signs` over latents [T] with ranks [K, n]: [positives, negatives] float64."""
    sums = [
        pair_signs(ranks[some], has).sum(0, dtype=torch.float64) for some in latents.split(TIED_AT_ONCE)
    ]
    return torch.stack(sums).sum(0) / len(latents)


def text_detectors(text_auroc: Tensor) -> Tensor:
    """[K] AUROC on text -> numbers of the latents that tell the attribute there; at least the best."""
    return (text_auroc >= text_auroc.amax().clamp_max(TEXT_AUROC)).nonzero().squeeze(-1)


@dataclass(frozen=True)
class Detection:
    """Latents as detectors of A attributes at one layer.

    Attributes:
        scores: By name, see `SCORES`; ``text`` and ``shared_text`` have no chance level.
        latents: For a reader, the latent of each attribute that is best over both halves, on image tokens
            (``latent``), on text (``text_latent``) and on image tokens among those that tell it from text
            (``shared_latent``); the lowest number among equals.
        tied: By attribute, how many latents tie with that of text.
    """

    scores: dict[str, Scores]
    latents: dict[str, list[int]]
    tied: list[int]


def detect(image: Tensor, text: Tensor, attributes: Attributes) -> Detection:
    """Searches one layer's latents for detectors.

    Args:
        image: [I, K] activation sums over image tokens.
        text: [I, K] activation sums over the captions' tokens, read without the image.
        attributes: Truth of the images.
    """
    image_ranks, text_ranks = ([centred_ranks(sums[half].T) for half in HALVES] for sums in (image, text))
    halves = attributes.halves
    draws, samples = halves[0].labels.shape[1], halves[0].weights.shape[1]
    margins = torch.zeros(len(SCORES), len(attributes.names), draws, dtype=torch.float64)
    weighted = torch.zeros(len(SCORES), len(attributes.names), samples, dtype=torch.float64)
    latents: dict[str, list[int]] = defaultdict(list)
    tied = []
    for i in range(len(attributes.names)):
        labels = [half.labels[i].float() for half in halves]  # [1 + M, n]
        # (AUROC - 1/2) x pairs of every latent on each half.
        on_image = [has @ ranks.T for has, ranks in zip(labels, image_ranks, strict=True)]  # [1 + M, K]
        on_text = [has[:1] @ ranks.T for has, ranks in zip(labels, text_ranks, strict=True)]  # [1, K]
        for chosen_on, scored_on in CROSSED:
            among = text_detectors(0.5 + on_text[chosen_on][0] / float(halves[chosen_on].pairs[i]))
            of_shared = among[best_latents(on_image[chosen_on][0, among])]
            of_image, of_text = best_latents(on_image[chosen_on][0]), best_latents(on_text[chosen_on][0])
            margins[:3, i] += torch.stack(
                [
                    held_out(on_image[chosen_on][:, among], on_image[scored_on][:, among]),
                    held_out(on_image[chosen_on], on_image[scored_on]),
                    on_image[scored_on][:, of_text].double().mean(-1),
                ]
            )
            has, ranks = halves[scored_on].labels[i, 0], (image_ranks[scored_on], text_ranks[scored_on])
            chosen = (
                *((ranks[0], of_shared), (ranks[0], of_image), (ranks[0], of_text)),
                *((ranks[1], of_text), (ranks[1], of_shared)),
            )
            signs = torch.stack([mean_pair_signs(*one, has) for one in chosen])
            weighted[:, i] += halves[scored_on].weighted_margins(signs, i)
        image_sum, text_sum = on_image[0][0] + on_image[1][0], on_text[0][0] + on_text[1][0]
        among = text_detectors(0.5 + text_sum / float(attributes.pairs[i]))
        latents["latent"].append(int(image_sum.argmax()))
        latents["text_latent"].append(int(text_sum.argmax()))
        latents["shared_latent"].append(int(among[image_sum[among].argmax()]))
        tied.append(int((text_sum == text_sum.amax()).sum()))
    scores = {name: attributes.scores(margins[k], weighted[k]) for k, name in enumerate(SCORES)}
    return Detection(scores, latents, tied)


class Detectors(ProbeMetric):
    """Mean AUROC of latents that detect attributes, against chance, and a table of the best latents."""

    name = "detectors"
    activation_sums = ("image", "text")
    panels = (
        Panel(
            "detectors_shared_auroc",
            "detectors: AUROC of latents that text shares",
            limits=(0.4, 1.0),
            also=("linear_probe_auroc", "image, linear probe of the mean token"),
        ),
    )

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        attributes = read_attributes(data)
        if attributes is None:
            return
        limit = data.probe.config.detector_auroc
        by_layer = defaultdict(list)
        for hook, layer in data.image_layers.items():
            image, text = (data.stats[group, hook].activation_sum for group in ("image", "text"))
            detection = detect(image, text, attributes)
            scores = detection.scores
            metrics = {"shared": "detectors_shared", "image": "detectors", "same": "detectors_same"}
            for name, metric in metrics.items():
                yield Estimate(layer, "image", f"{metric}_auroc", scores[name].compare())
                yield Estimate(layer, "image", metric, scores[name].compare_share(limit))
                if (layer, "image") not in data.without_tokens:
                    by_layer[f"{metric}_auroc_max"].append(scores[name])
            yield Estimate(layer, "image", "detectors_shared_text_auroc", scores["shared_text"].mean)
            yield Estimate(layer, "text", "detectors_auroc", scores["text"].mean)
            yield Estimate(
                layer, "text", "detectors", (scores["text"].bootstrap >= limit).double().mean(-1)
            )
            self._fill_table(data, hook, attributes.names, detection)
        for metric, of_layers in by_layer.items():
            yield Estimate(None, "image", metric, compare_best(of_layers))

    def _fill_table(self, data: Measurement, hook: str, names: list[str], detection: Detection) -> None:
        known = data.probe.descriptions.get(hook)
        auroc = {name: scores.bootstrap[0].tolist() for name, scores in detection.scores.items()}
        for i, name in enumerate(names):
            latents = {column: of_attributes[i] for column, of_attributes in detection.latents.items()}
            row = {
                "layer": data.layers[hook],
                "attribute": name,
                "latent": latents["latent"],
                "auroc_image": auroc["image"][i],
                "text_latent": latents["text_latent"],
                "text_latents_tied": detection.tied[i],
                "auroc_text": auroc["text"][i],
                "text_latent_auroc_image": auroc["same"][i],
                "shared_latent": latents["shared_latent"],
                "shared_latent_auroc_image": auroc["shared"][i],
                "shared_latent_auroc_text": auroc["shared_text"][i],
                **{f"{k}_description": known.texts[v] if known else "" for k, v in latents.items()},
            }
            data.tables.setdefault("detectors", []).append(row)
