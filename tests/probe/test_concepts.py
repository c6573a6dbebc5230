"""Meaning: planted truth is found, chance is where it should be, and luck is not sold as a finding.

Counts over seeds are held against the binomial's 3 standard errors at fixed seeds: what is right passes,
and each bound says what it would catch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_limber.probe import concepts
from lightning_limber.probe.statistics import resamples


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def repeated(row: torch.Tensor) -> torch.Tensor:
    """Weights [I] as places: each image as often as it was drawn."""
    return torch.arange(len(row)).repeat_interleave(row.long())


# -- chance ---------------------------------------------------------------------------------------


def test_pairings():
    """Permutations, a function of the seed, in which every caption comes to every image alike."""
    pairs = concepts.pairings(20, 4000, seed=3)
    assert torch.equal(pairs.sort(dim=-1).values, torch.arange(20).expand(4000, -1))
    assert torch.equal(pairs, concepts.pairings(20, 4000, seed=3))
    assert not torch.equal(pairs, concepts.pairings(20, 4000, seed=4))
    counts = torch.nn.functional.one_hot(pairs, 20).sum(0)  # [image, caption], 200 of each
    assert (counts - 200).abs().max() < 5 * 200**0.5


def test_against_chance_by_hand():
    hits = random(12, 12)
    weights, pairs = resamples(12, 50, 0), concepts.pairings(12, 60, 0)
    found = concepts.against_chance(hits, weights, pairs)
    table = hits.double().numpy()
    own = [np.mean([table[i, i] for i in repeated(row)]) for row in weights]
    other = [np.mean([table[i, pair[i]] for i in range(12)]) for pair in pairs.tolist()]
    assert (found.value, found.low, found.high) == pytest.approx(
        (np.trace(table) / 12, *np.percentile(own[1:], [2.5, 97.5]))
    )
    assert (found.chance, found.chance_low, found.chance_high) == pytest.approx(
        (np.mean(other), *np.percentile(other, [2.5, 97.5]))
    )
    assert found.p == (1 + sum(value >= own[0] for value in other)) / 61


def test_a_tie_with_chance_is_no_finding():
    """Captions that are all alike: every pairing reaches the value, whatever the rounding."""
    hits = random(30, 1).expand(30, 30)
    found = concepts.against_chance(hits, resamples(30, 9, 0), concepts.pairings(30, 99, 0))
    assert found.p == 1
    assert found.value == pytest.approx(found.chance)


def test_range_and_p_of_what_is_chance():
    """Under chance p is uniform, and 95 of 100 values (not all) lie in the range.

    500 seeds: 3 standard errors of 95 % are 2.9 %; a 90 % range would cover 90 %. The bound of
    Kolmogorov and Smirnov is that of 1 %.
    """
    seeds, inside, p = 500, 0, []
    for seed in range(seeds):
        hits = random(40, 40, seed=seed) * random(40, 1, seed=seed + 9999)  # Some images hit with all.
        found = concepts.against_chance(hits, resamples(40, 2, seed), concepts.pairings(40, 399, seed))
        inside += found.chance_low <= found.value <= found.chance_high
        p.append(found.p)
    assert abs(inside / seeds - 0.95) < 0.029
    ranks = np.arange(seeds + 1) / seeds
    p = np.sort(p)
    assert max(np.abs(p - ranks[1:]).max(), np.abs(p - ranks[:-1]).max()) < 1.63 / seeds**0.5


# -- match ----------------------------------------------------------------------------------------


def planted(images: int = 60, words: int = 30, latents: int = 200, seed: int = 0):
    """Captions of one or two words [I, W]; latents [K, W] of which two in three have a word; strengths
    [I, K] where one latent of each of an image's words fires, above noise on others.
    """
    generator = torch.Generator().manual_seed(seed)
    captions = torch.zeros(images, words, dtype=torch.bool)
    agrees = torch.zeros(latents, words, dtype=torch.bool)
    word_of = torch.arange(latents) % (words + words // 2)
    agrees[word_of < words] = torch.nn.functional.one_hot(word_of[word_of < words], words).bool()
    strength = (torch.rand(images, latents, generator=generator) < 0.02).float()
    for i in range(images):
        for word in torch.randint(words, (1 + i % 2,), generator=generator):
            captions[i, word] = True
            strength[i, word] = 5
    return captions, agrees, strength


def match(captions, agrees, strength, seed: int = 0, count: int = 399) -> concepts.Against:
    images = len(captions)
    top = concepts.top_latents(strength, torch.zeros(strength.shape[1]), 3, max_image_share=0.3)
    hits = concepts.word_hits(top.float() @ agrees.float() > 0, captions)
    pairs = concepts.pairings(images, count, seed)
    return concepts.against_chance(hits, resamples(images, 50, seed), pairs)


def test_match_finds_what_was_planted():
    found = match(*planted())
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert found.chance_high < 0.5
    assert found.p == 1 / 400


def test_match_of_shuffled_captions_is_chance():
    """A share of 60 images is a coarse number, so ties make range and p a little careful: of 300
    shuffles 95 % or more are inside (3 standard errors: 3.8 %) and 5 % or less (3.8 %) have p of .05
    or less. Not all are, and not none: the range is not idle.
    """
    captions, agrees, strength = planted()
    seeds, inside, small = 300, 0, 0
    for seed in range(seeds):
        other = torch.randperm(60, generator=torch.Generator().manual_seed(10_000 + seed))
        found = match(captions[other], agrees, strength, seed)
        inside += found.chance_low <= found.value <= found.chance_high
        small += found.p <= 0.05
    assert 0.95 - 0.038 < inside / seeds < 0.995
    assert 0.01 < small / seeds < 0.05 + 0.038


def test_top_latents():
    strength = random(40, 25)
    strength[strength < 0.9] = 0
    strength[:, 3], strength[0, 4], strength[1:, 4] = 2, 2, 0
    strength[7] = 0
    density = random(25, seed=1) / 100
    density[4] = 0.005
    top = concepts.top_latents(strength, density, 2, max_image_share=0.1, max_text_density=0.005)
    expected = torch.zeros_like(top)
    for i in range(40):
        allowed = [k for k in range(25) if (strength[:, k] > 0).sum() <= 4 and density[k] <= 0.005]
        best = sorted((k for k in allowed if strength[i, k] > 0), key=lambda k: -strength[i, k])
        expected[i, best[:2]] = True
    assert torch.equal(top, expected)
    assert top[0, 4]  # A density of exactly the limit is allowed,
    assert not top[:, 3].any()  # what fires everywhere is not,
    assert not top[7].any()  # and what does not fire is nobody's top.
    assert concepts.top_latents(strength.bfloat16(), density, 99).sum(-1).max() <= 25


def test_words_of_and_word_hits():
    words, captions = concepts.words_of([["dog", "ball"], [], ["cat"], ["dog", "dog"]])
    assert words == ["ball", "cat", "dog"]
    assert captions.int().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    found = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    assert concepts.word_hits(found, captions).int().tolist() == [[1, 0, 0, 1], [0, 0, 1, 0]]
    # Many words at once is one hit.
    assert concepts.word_hits(torch.ones(1, 999), torch.ones(1, 999)).tolist() == [[True]]


# -- neighbours -----------------------------------------------------------------------------------


def clouds(seed: int = 0, images: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(images, d, generator=generator).double() for d in (8, 5))
    return a + 100, b - 30  # A common mean, as token means have.


def test_neighbours_by_hand():
    means, _ = clouds()
    x = (means - means.mean(0)).numpy()
    x /= np.linalg.norm(x, axis=1)[:, None]
    for i, near in enumerate(concepts.neighbours(means, 4)):
        cosines = {j: x[i] @ x[j] for j in range(40) if j != i}
        assert set(near.nonzero()[:, 0].tolist()) == set(sorted(cosines, key=cosines.get)[-4:])
    assert concepts.neighbours(means[:3], 10).sum(-1).tolist() == [2, 2, 2]


def test_knn_by_hand():
    """A random pairing is what one gets from the means in that order."""
    a, b = clouds()
    weights, pairs = resamples(40, 30, 0), concepts.pairings(40, 20, 0)
    found = concepts.mutual_knn(a, b, 5, weights, pairs)

    def overlap(second: torch.Tensor) -> torch.Tensor:
        return (concepts.neighbours(a, 5) & concepts.neighbours(second, 5)).sum(-1).double() / 5

    own = [float(overlap(b)[repeated(row)].mean()) for row in weights]
    other = [float(overlap(b[pair]).mean()) for pair in pairs]
    assert (found.value, found.low, found.high) == pytest.approx(
        (own[0], *np.percentile(own[1:], [2.5, 97.5]))
    )
    assert (found.chance, found.chance_low, found.chance_high) == pytest.approx(
        (np.mean(other), *np.percentile(other, [2.5, 97.5])), rel=1e-6
    )


def test_knn_of_one_space_turned_and_of_two():
    a, _ = clouds()
    turn, _ = torch.linalg.qr(random(8, 8).double())
    weights, pairs = resamples(40, 30, 0), concepts.pairings(40, 99, 0)
    same = concepts.mutual_knn(a, 7 * a @ turn + 3, 5, weights, pairs)
    assert (same.value, same.low, same.p) == (1, 1, 0.01)
    assert same.chance_high < 0.3
    # Of two that have nothing in common few are found: 3 standard errors of 5 % in 100 are 6.5 %.
    p = [concepts.mutual_knn(*clouds(seed), 5, weights, pairs).p for seed in range(100)]
    assert sum(value <= 0.05 for value in p) <= 11
    assert abs(np.mean(p) - 0.5) < 3 * 0.029


def test_knn_ties_with_chance():
    weights, pairs = resamples(10, 2, 0), torch.arange(10).expand(9, 10)
    assert all(concepts.mutual_knn(*clouds(s, 10), 3, weights, pairs).p == 1 for s in range(200))


# -- detectors ------------------------------------------------------------------------------------


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
    strength = (random(30, 6) * 5).int().bfloat16()  # Five values: many ties.
    strength[:, 5] = 0
    labels = random(4, 30, seed=1) < 0.3
    labels[2], labels[3] = False, True
    expected = [[by_pairs(strength[:, k], label) for k in range(6)] for label in labels]
    found = concepts.auroc(strength, labels)
    torch.testing.assert_close(found, torch.tensor(expected).double(), equal_nan=True)
    assert found[:2, 5].tolist() == [0.5, 0.5]
    assert found[2:].isnan().all()


def test_weighted_auroc_is_that_of_repeated_images():
    """Row by row; pairs across halves do not count."""
    scores = (random(3, 14) * 6).int().float()
    labels, half = random(3, 14, seed=1) < 0.4, torch.arange(14) % 2 == 0
    weights = resamples(14, 12, 0)
    found = concepts.weighted_auroc(scores, labels, half, weights)
    for row, values in zip(weights, found, strict=True):
        at = repeated(row)
        expected = [by_pairs(scores[i, at], labels[i, at], half[at]) for i in range(3)]
        torch.testing.assert_close(values, torch.tensor(expected).double(), equal_nan=True)


def test_weighted_auroc_of_one_group_is_auroc():
    strength, labels = random(50, 1), random(2, 50, seed=1) < 0.3
    found = concepts.weighted_auroc(
        strength.T.expand(2, -1), labels, torch.ones(50).bool(), resamples(50, 1, 0)
    )
    torch.testing.assert_close(found[0], concepts.auroc(strength, labels)[:, 0])


def test_planted_detectors_are_found():
    """Among thousands of noise latents, at any scale, in every bootstrap sample."""
    strength, labels = random(80, 3000), random(3, 80, seed=1) < 0.25
    for attribute, (latent, scale) in enumerate(((17, 1), (1234, 1e-3), (2999, 1e3))):
        strength[:, latent] = scale * (1 + random(80, seed=2)) * labels[attribute]
    found = concepts.detectors(strength, labels, resamples(80, 20, 0))
    assert found.latent.tolist() == [17, 1234, 2999]
    assert (found.auroc == 1).all()


def noise(seed: int, latents: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Strengths as of SAE latents (most are 0) and attributes that have nothing to do with them."""
    strength = random(128, latents, seed=seed) * (random(128, latents, seed=seed + 50) < 0.3)
    return strength, random(20, 128, seed=seed + 100) < 0.2


def test_the_best_of_thousands_by_luck_is_no_detector():
    """Noise scores .5 (5 x 20 attributes: a standard error of .005); the best on the images that chose
    it scores .7, which is what the two halves are for.
    """
    found, lucky = [], []
    for seed in range(5):
        strength, labels = noise(seed)
        found.append(concepts.detectors(strength, labels, torch.ones(1, 128).double()).auroc)
        lucky.append(concepts.auroc(strength, labels).amax(-1))
    assert torch.cat(lucky, dim=-1).mean() > 0.68
    assert abs(float(torch.cat(found, dim=-1).mean()) - 0.5) < 0.02
    assert torch.cat(found, dim=-1).max() < 0.75


def test_each_half_is_scored_by_the_other_halfs_choice():
    """Latent 0 is best on even places, latent 1 on odd ones; each is off by one image elsewhere, and
    their scales are worlds apart. Scores of the two must not meet.
    """
    labels = (torch.arange(40) // 2 % 4 == 0)[None]  # 5 of 20 in each half.
    strength = labels[0, :, None] * torch.tensor([1.0, 1.0]) + torch.tensor([0.0, 1000.0])
    strength[1, 0], strength[0, 1] = -1, 999  # One with the attribute below all others.
    found = concepts.detectors(strength, labels, torch.ones(1, 40).double())
    assert float(found.auroc) == pytest.approx(4 / 5)


def test_same_latent_is_chosen_on_text_alone():
    """Latent 5 means the attribute in text; latent 9 does on image tokens, and is none of text's."""
    text, image, labels = random(60, 300), random(60, 300, seed=1), random(1, 60, seed=2) < 0.4
    text[:, 5], image[:, 9] = labels[0] * 1.0, labels[0] * 1.0
    weights = resamples(60, 200, 0)
    found = concepts.detectors(image, labels, weights, chosen_by=text)
    assert found.latent.tolist() == [5]
    assert found.auroc.shape == (201, 1)
    assert abs(float(found.auroc[0]) - 0.5) < 0.25  # 3 standard errors
    image[:, 5] = labels[0] * (0.1 + image[:, 5])
    assert (concepts.detectors(image, labels, weights, chosen_by=text).auroc == 1).all()


def test_an_attribute_of_all_or_none_has_no_detector():
    strength, labels = random(20, 30), torch.zeros(2, 20, dtype=torch.bool)
    labels[1] = True
    weights = resamples(20, 5, 0)
    for found in (
        concepts.detectors(strength, labels, weights),
        concepts.detectors(strength, labels, weights, chosen_by=strength),
    ):
        assert found.auroc.isnan().all()


def test_same_latent_by_luck_is_no_finding():
    """Latents that fire alike on an image and on its caption, and mean none of the attributes."""
    found = []
    for seed in range(5):
        strength, labels = noise(seed)
        found.append(
            concepts.detectors(strength, labels, torch.ones(1, 128).double(), chosen_by=strength).auroc
        )
    assert abs(float(torch.cat(found, dim=-1).mean()) - 0.5) < 0.02
