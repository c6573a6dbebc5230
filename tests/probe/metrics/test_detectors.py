"""Planted detectors are found, and luck is not sold as a finding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_limber.probe.metrics.detectors import auroc, detectors, weighted_auroc
from lightning_limber.probe.statistics import bootstrap_weights


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def repeated(row: torch.Tensor) -> torch.Tensor:
    """Weights [I] as indices: each image as often as it was drawn."""
    return torch.arange(len(row)).repeat_interleave(row.long())


def by_pairs(scores, labels, half=None) -> float:
    """Share of pairs (one with the attribute, one without) that the score puts right; ties are half."""
    half = [0] * len(scores) if half is None else half
    won = [
        (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
        for i in range(len(scores))
        for j in range(len(scores))
        if labels[i] and not labels[j] and half[i] == half[j]
    ]
    return float(np.mean(won)) if won else float("nan")


def test_auroc_is_the_share_of_pairs():
    activations = (random(30, 6) * 5).int().bfloat16()  # Five values: many ties.
    activations[:, 5] = 0
    labels = random(4, 30, seed=1) < 0.3
    labels[2], labels[3] = False, True
    expected = [[by_pairs(activations[:, k], label) for k in range(6)] for label in labels]
    found = auroc(activations, labels)
    torch.testing.assert_close(found, torch.tensor(expected).double(), equal_nan=True)
    assert found[:2, 5].tolist() == [0.5, 0.5]
    assert found[2:].isnan().all()


def test_weighted_auroc_is_that_of_repeated_images():
    """Row by row; pairs across halves do not count."""
    scores = (random(3, 14) * 6).int().float()
    labels, half = random(3, 14, seed=1) < 0.4, torch.arange(14) % 2 == 0
    weights = bootstrap_weights(14, 12, 0)
    found = weighted_auroc(scores, labels, half, weights)
    for row, values in zip(weights, found, strict=True):
        at = repeated(row)
        expected = [by_pairs(scores[i, at], labels[i, at], half[at]) for i in range(3)]
        torch.testing.assert_close(values, torch.tensor(expected).double(), equal_nan=True)


def test_weighted_auroc_of_one_group_is_auroc():
    activations, labels = random(50, 1), random(2, 50, seed=1) < 0.3
    found = weighted_auroc(
        activations.T.expand(2, -1), labels, torch.ones(50).bool(), bootstrap_weights(50, 1, 0)
    )
    torch.testing.assert_close(found[0], auroc(activations, labels)[:, 0])


def test_planted_detectors_are_found():
    """Among thousands of noise latents, at any scale, in every bootstrap sample."""
    activations, labels = random(80, 3000), random(3, 80, seed=1) < 0.25
    for attribute, (latent, scale) in enumerate(((17, 1), (1234, 1e-3), (2999, 1e3))):
        activations[:, latent] = scale * (1 + random(80, seed=2)) * labels[attribute]
    found = detectors(activations, labels, bootstrap_weights(80, 20, 0))
    assert found.latent.tolist() == [17, 1234, 2999]
    assert (found.auroc == 1).all()


def noise(seed: int, latents: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Strengths as of SAE latents (most are 0) and attributes that have nothing to do with them."""
    activations = random(128, latents, seed=seed) * (random(128, latents, seed=seed + 50) < 0.3)
    return activations, random(20, 128, seed=seed + 100) < 0.2


def test_the_best_of_thousands_by_luck_is_no_detector():
    """Noise scores .5 (5 x 20 attributes: a standard error of .005); the best on the images that chose
    it scores .7, which is what the two halves are for.
    """
    found, lucky = [], []
    for seed in range(5):
        activations, labels = noise(seed)
        found.append(detectors(activations, labels, torch.ones(1, 128).double()).auroc)
        lucky.append(auroc(activations, labels).amax(-1))
    assert torch.cat(lucky, dim=-1).mean() > 0.68
    assert abs(float(torch.cat(found, dim=-1).mean()) - 0.5) < 0.02
    assert torch.cat(found, dim=-1).max() < 0.75


def test_each_half_is_scored_by_the_other_halfs_choice():
    """Latent 0 is best on even places, latent 1 on odd ones; each is off by one image elsewhere, and
    their scales are worlds apart. Scores of the two must not meet.
    """
    labels = (torch.arange(40) // 2 % 4 == 0)[None]  # 5 of 20 in each half.
    activations = labels[0, :, None] * torch.tensor([1.0, 1.0]) + torch.tensor([0.0, 1000.0])
    activations[1, 0], activations[0, 1] = -1, 999  # One with the attribute below all others.
    found = detectors(activations, labels, torch.ones(1, 40).double())
    assert float(found.auroc) == pytest.approx(4 / 5)


def test_same_latent_is_chosen_on_text_alone():
    """Latent 5 means the attribute in text; latent 9 does on image tokens, and is none of text's."""
    text, image, labels = random(60, 300), random(60, 300, seed=1), random(1, 60, seed=2) < 0.4
    text[:, 5], image[:, 9] = labels[0] * 1.0, labels[0] * 1.0
    weights = bootstrap_weights(60, 200, 0)
    found = detectors(image, labels, weights, chosen_by=text)
    assert found.latent.tolist() == [5]
    assert found.auroc.shape == (201, 1)
    assert abs(float(found.auroc[0]) - 0.5) < 0.25  # 3 standard errors
    image[:, 5] = labels[0] * (0.1 + image[:, 5])
    assert (detectors(image, labels, weights, chosen_by=text).auroc == 1).all()


def test_an_attribute_of_all_or_none_has_no_detector():
    activations, labels = random(20, 30), torch.zeros(2, 20, dtype=torch.bool)
    labels[1] = True
    weights = bootstrap_weights(20, 5, 0)
    for found in (
        detectors(activations, labels, weights),
        detectors(activations, labels, weights, chosen_by=activations),
    ):
        assert found.auroc.isnan().all()


def test_same_latent_by_luck_is_no_finding():
    """Latents that fire alike on an image and on its caption, and mean none of the attributes."""
    found = []
    for seed in range(5):
        activations, labels = noise(seed)
        found.append(
            detectors(activations, labels, torch.ones(1, 128).double(), chosen_by=activations).auroc
        )
    assert abs(float(torch.cat(found, dim=-1).mean()) - 0.5) < 0.02
