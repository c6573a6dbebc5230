"""Detectors by explicit loops, planted ones, ties, and what chance gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_limber.probe.attributes import (
    HALVES,
    Attributes,
    centred_ranks,
    compare_best,
    pair_signs,
)
from lightning_limber.probe.metrics.detectors import detect
from lightning_limber.probe.statistics import bootstrap_weights

KINDS = {"shared": "image", "image": "image", "same": "image", "text": "text", "shared_text": "text"}
"""Scores, and the tokens on which their latents are scored."""


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def sparse(images: int, latents: int, seed: int) -> torch.Tensor:
    """Strengths as of SAE latents: most are 0."""
    fires = random(images, latents, seed=seed + 1000) < 0.3
    return (random(images, latents, seed=seed) * fires).bfloat16()


def attributes_of(labels: torch.Tensor, samples: int = 3, count: int = 100, seed: int = 0) -> Attributes:
    names = [f"attribute {i}" for i in range(len(labels))]
    return Attributes.make(names, labels, bootstrap_weights(labels.shape[1], samples, seed), count, seed)


# -- a second computation -------------------------------------------------------------------------


def by_pairs(scores, labels) -> float:
    """Share of pairs (one with the attribute, one without) that the score puts right; ties are half."""
    won = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    return float(np.mean(won)) if won else 0.0


def by_loops(image, text, of_image, of_text, drawn) -> dict[str, float]:
    """Every score of one attribute: of [I, K] twice, [I] labels for either, [I] times an image is drawn."""
    tokens = {"image": (image, of_image), "text": (text, of_text)}
    halves = [np.arange(len(image)) % 2 == side for side in (0, 1)]

    def aurocs(kind, half) -> list[float]:
        activations, labels = tokens[kind]
        return [by_pairs(activations[half, k], labels[half]) for k in range(activations.shape[1])]

    def best(values, among) -> list[int]:
        return [k for k in among if values[k] > max(values[j] for j in among) - 1e-9]

    won, pairs = dict.fromkeys(KINDS, 0.0), 0
    for chosen_on, scored_on in (halves, halves[::-1]):
        on_text, on_image = aurocs("text", chosen_on), aurocs("image", chosen_on)
        everything = range(len(on_text))
        of_text = best(on_text, everything)
        among = [k for k in everything if on_text[k] > 0.9 - 1e-9] or of_text
        chosen = {"image": best(on_image, everything), "shared": best(on_image, among)}
        chosen |= {"same": of_text, "text": of_text, "shared_text": chosen["shared"]}
        at = np.repeat(np.arange(len(image)), drawn * scored_on)
        count = tokens["image"][1][at].sum() * (~tokens["image"][1][at]).sum()
        for name, latents in chosen.items():
            activations, labels = tokens[KINDS[name]]
            won[name] += count * np.mean([by_pairs(activations[at, k], labels[at]) for k in latents])
        pairs += count
    return {name: value / pairs for name, value in won.items()}


def case(seed: int, images: int = 41, latents: int = 12) -> tuple:
    """Few values and few latents, so that ties are many; text tells the first two attributes."""
    labels = random(3, images, seed=seed) < 0.4
    image, text = ((random(images, latents, seed=seed + k) * 4).int().bfloat16() for k in (1, 2))
    text[:, 3], text[:, 5], text[:, 7] = 9 * labels[0], 9 * labels[0], 9 * labels[1]
    image[:, 5] += labels[0]
    return image, text, labels


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_explicit_loops(seed):
    """In every bootstrap sample, and under every permutation of image tokens' truth."""
    image, text, labels = case(seed)
    attributes = attributes_of(labels, samples=4, count=3)
    assert len(attributes.names) == 3
    found = detect(image, text, attributes).scores
    image, text = image.double().numpy(), text.double().numpy()
    weights = bootstrap_weights(len(image), 4, 0).int().numpy()
    for i, of_text in enumerate(labels.numpy()):
        for row, drawn in enumerate(weights):
            expected = by_loops(image, text, of_text, of_text, drawn)
            for name in KINDS:
                assert float(found[name].bootstrap[row, i]) == pytest.approx(expected[name], abs=1e-9)
        for draw in range(3):
            permuted = np.empty_like(of_text)
            for half, slots in zip(attributes.halves, HALVES, strict=True):
                permuted[slots] = half.labels[i, 1 + draw].numpy()
            expected = by_loops(image, text, permuted, of_text, weights[0])
            for name in ("shared", "image", "same"):
                assert float(found[name].permuted[draw, i]) == pytest.approx(expected[name], abs=1e-9)


def test_centred_ranks_sum_to_the_auroc():
    scores = (random(6, 30) * 5).int().bfloat16()  # Five values: many ties.
    scores[5] = 0
    labels = random(4, 30, seed=1) < 0.3
    pairs = (labels.sum(-1) * (~labels).sum(-1))[:, None]
    found = 0.5 + (labels.float() @ centred_ranks(scores).T) / pairs
    expected = [[by_pairs(row.numpy(), label.numpy()) for row in scores.float()] for label in labels]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found[:, 5].tolist() == [0.5] * 4


def test_permutations_stay_within_halves_and_attributes_together():
    labels = random(4, 61, seed=3) < 0.4
    labels[0], labels[1] = True, torch.arange(61) < 13  # All have it; enough do, in either half.
    attributes = attributes_of(labels, count=50)
    assert attributes.names == ["attribute 1", "attribute 2", "attribute 3"]
    for half, slots in zip(attributes.halves, HALVES, strict=True):
        truth = labels[1:, slots]
        assert half.labels.shape == (3, 51, truth.shape[1])
        assert torch.equal(half.labels[:, 0], truth)
        columns = sorted(map(tuple, truth.T.tolist()))
        for draw in range(51):  # Whole columns, in another order.
            assert sorted(map(tuple, half.labels[:, draw].T.tolist())) == columns
        assert not (half.labels[:, 1:] == truth[:, None]).all(-1).all(0).any()


@pytest.mark.parametrize(("images", "kept"), [(9, False), (10, True)])
def test_an_attribute_needs_five_with_and_five_without_in_each_half(images, kept):
    labels = torch.arange(40)[None] < images
    assert [bool(attributes_of(side).names) for side in (labels, ~labels)] == [kept, kept]


# -- planted truth --------------------------------------------------------------------------------


def test_planted_detectors_are_found():
    """Among thousands of noise latents, at any scale, in every bootstrap sample."""
    image, text, labels = sparse(80, 3000, 0), sparse(80, 3000, 1), random(3, 80, seed=1) < 0.3
    for attribute, (latent, scale) in enumerate(((17, 1), (1234, 1e-3), (2999, 1e3))):
        for activations in (image, text):
            activations[:, latent] = scale * (1 + random(80, seed=2)) * labels[attribute]
    found = detect(image, text, attributes_of(labels, samples=20))
    assert set(found.latents) == {"latent", "text_latent", "shared_latent"}
    assert all(latents == [17, 1234, 2999] for latents in found.latents.values())
    assert found.tied == [1, 1, 1]
    for name in ("shared", "image", "same"):
        comparison = found.scores[name].compare()
        assert (comparison.value, comparison.low, comparison.high) == (1, 1, 1)
        assert comparison.p == pytest.approx(1 / 101)
        assert 0.4 < comparison.chance_low < comparison.chance < comparison.chance_high < 0.65
        share = found.scores[name].compare_share(0.8)
        assert (share.value, share.p) == (1, pytest.approx(1 / 101))
    for name in ("text", "shared_text"):
        assert (found.scores[name].bootstrap == 1).all()


def test_a_shared_latent_is_found_among_many_that_tie_on_text():
    """39 latents spell the word; only one of them sees it, and a latent that no text knows sees it too."""
    image, text, labels = sparse(80, 400, 0), sparse(80, 400, 1), random(1, 80, seed=2) < 0.4
    text[:, 100:139] = labels[0, :, None] * (1 + random(80, 39, seed=3))
    image[:, 120] = image[:, 300] = labels[0] * 1.0
    found = detect(image, text, attributes_of(labels))
    assert (found.latents["shared_latent"], found.latents["text_latent"], found.tied) == (
        [120],
        [100],
        [39],
    )
    assert found.scores["shared"].compare().value == 1
    others = [by_pairs(image[:, k].float().numpy(), labels[0].numpy()) for k in range(100, 139)]
    assert float(found.scores["same"].mean[0]) == pytest.approx(np.mean(others), abs=0.03)
    assert float(found.scores["same"].mean[0]) < 0.6


def test_a_latent_is_shared_from_an_auroc_of_nine_tenths_on_text():
    """Of ten without the attribute, two (AUROC .9) or three (.85) in each half fire on text as well."""
    has = torch.arange(40) % 4 < 2
    order = torch.arange(40) // 4
    text = torch.stack([has, has | (order < 2), has | (order < 3)], dim=1).float()
    image = torch.stack([order == 0, has | (order == 9), has], dim=1).float()
    found = detect(image, text, attributes_of(has[None]))
    assert found.latents == {"latent": [2], "text_latent": [0], "shared_latent": [1]}
    scores = {name: float(found.scores[name].mean[0]) for name in KINDS}
    assert scores == pytest.approx({"shared": 0.95, "image": 1, "same": 0.5, "text": 1, "shared_text": 0.9})


def test_numbers_of_latents_do_not_matter():
    """Latents in another order: the same scores, ties and all."""
    image, text, labels = case(5, images=60, latents=40)
    text[:, :39] = 9 * labels[0, :, None] * torch.ones(39)  # 39 of 40 tie.
    attributes, order = attributes_of(labels, samples=10), torch.randperm(40)
    found, again = (detect(image[:, at], text[:, at], attributes) for at in (torch.arange(40), order))
    assert found.tied[0] == again.tied[0] == 39
    for name in KINDS:
        torch.testing.assert_close(found.scores[name].bootstrap, again.scores[name].bootstrap)
        torch.testing.assert_close(found.scores[name].permuted, again.scores[name].permuted)


def test_latents_that_never_fire_tell_nothing():
    labels = random(2, 50, seed=1) < 0.4
    found = detect(*torch.zeros(2, 50, 600).bfloat16(), attributes_of(labels, samples=5))
    for name in KINDS:
        assert (found.scores[name].bootstrap == 0.5).all()
        assert (found.scores[name].permuted == 0.5).all()
    assert found.scores["shared"].compare().p == 1


def test_an_attribute_that_a_sample_lacks_is_left_out_of_it():
    labels = torch.stack([torch.arange(40) < 10, torch.arange(40) % 3 == 0])
    attributes = attributes_of(labels, samples=1)
    for half in attributes.halves:
        half.weights[:, 1] = 1.0
        half.weights[half.labels[0, 0], 1] = 0.0  # No image with the first attribute is drawn.
    scores = detect(sparse(40, 20, 0), sparse(40, 20, 1), attributes).scores["image"]
    assert scores.bootstrap.isnan().tolist() == [[False, False], [True, False]]
    assert float(scores.mean[1]) == float(scores.bootstrap[1, 1])


# -- chance ---------------------------------------------------------------------------------------


def unrelated(seed: int, images: int = 64, latents: int = 150) -> tuple:
    """Image latents that know nothing; text latents of which several know each attribute."""
    labels = random(6, images, seed=seed + 500) < 0.35
    image, text = sparse(images, latents, 2 * seed), sparse(images, latents, 2 * seed + 1)
    for i, label in enumerate(labels):
        text[:, 10 * i : 10 * i + 10] = label[:, None] * (1 + random(images, 10, seed=seed))
    return image, text, labels


def test_luck_is_no_finding():
    """p of unrelated image tokens is uniform, though the best on the images that chose it scores .7."""
    p: dict[str, list[float]] = {"shared": [], "image": [], "same": []}
    means, lucky = [], []
    for seed in range(40):
        image, text, labels = unrelated(seed)
        attributes = attributes_of(labels, seed=seed)
        scores = detect(image, text, attributes).scores
        for name, found in p.items():
            found.append(scores[name].compare().p)
        means.append(float(scores["image"].mean[0]))
        ranks = centred_ranks(image[HALVES[0]].T)
        half = attributes.halves[0]
        lucky.append((0.5 + half.labels[:, 0].float() @ ranks.T / half.pairs[:, None]).amax(-1).mean())
    assert np.mean(lucky) > 0.7
    assert abs(np.mean(means) - 0.5) < 0.02
    for found in p.values():  # Uniform: mean .5 with a standard error of .046, a quarter in each quarter.
        assert abs(np.mean(found) - 0.5) < 0.14
        assert 2 <= sum(value <= 0.25 for value in found) <= 19
        assert 2 <= sum(value > 0.75 for value in found) <= 19


def test_the_best_of_many_layers_is_held_against_the_best_of_many_layers():
    """Its own layer's chance would call luck a finding; a real layer is still seen."""
    naive, best = [], []
    for seed in range(25):
        layers = [unrelated(100 * layer, latents=60) for layer in range(8)]
        labels = random(6, 64, seed=seed + 900) < 0.35
        attributes = attributes_of(labels, seed=seed)
        scores = [detect(image, text, attributes).scores["image"] for image, text, _ in layers]
        naive.append(max((one.compare() for one in scores), key=lambda found: found.value).p)
        best.append(compare_best(scores))
        assert best[-1].value == max(one.compare().value for one in scores)
    assert np.mean(naive) < 0.25
    assert abs(np.mean([found.p for found in best]) - 0.5) < 0.17
    image, text, _ = layers[3]
    image[:, 7] = labels[0] * 1.0
    image[:, 8] = labels[1] * 1.0
    scores[3] = detect(image, text, attributes).scores["image"]
    found = compare_best(scores)
    assert found.p < 0.02
    assert (found.low, found.high) == (scores[3].compare().low, scores[3].compare().high)


def test_each_half_is_scored_by_the_other_halfs_choice():
    """Latent 0 is best on even places, latent 1 on odd ones; each is off by one image elsewhere, and
    their scales are worlds apart. Scores of the two must not meet.
    """
    labels = (torch.arange(40) // 2 % 4 == 0)[None]  # 5 of 20 in each half.
    image = labels[0, :, None] * torch.tensor([1.0, 1.0]) + torch.tensor([0.0, 1000.0])
    image[1, 0], image[0, 1] = -1, 999  # One with the attribute below all others.
    found = detect(image, image, attributes_of(labels))
    assert float(found.scores["image"].mean[0]) == pytest.approx(4 / 5)


def test_pair_signs_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    has = torch.tensor([True, False, True, False])
    assert pair_signs(scores, has).tolist() == [[[1, 1], [1, 0]]]
