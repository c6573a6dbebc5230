"""Planted descriptions are found, and shuffled captions are chance.

Counts over seeds are held against the binomial's 3 standard errors at fixed seeds: what is right passes,
and each bound says what it would catch.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from parts import probe_batches, sae_probe

from lightning_limber.probe import words
from lightning_limber.probe.config import ProbeConfig
from lightning_limber.probe.explanations import Descriptions
from lightning_limber.probe.metrics import resolve_metric
from lightning_limber.probe.metrics.match import Match, top_latents
from lightning_limber.probe.passes import Probe
from lightning_limber.probe.statistics import Comparison, bootstrap_weights, compare_hits, permutations
from lightning_limber.probe.words import word_hits, word_table


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def planted(images: int = 60, words: int = 30, latents: int = 200, seed: int = 0):
    """Captions of one or two words [I, W]; latents [K, W] of which two in three have a word; strengths
    [I, K] where one latent of each of an image's words fires, above noise on others.
    """
    generator = torch.Generator().manual_seed(seed)
    captions = torch.zeros(images, words, dtype=torch.bool)
    agrees = torch.zeros(latents, words, dtype=torch.bool)
    word_of = torch.arange(latents) % (words + words // 2)
    agrees[word_of < words] = torch.nn.functional.one_hot(word_of[word_of < words], words).bool()
    activations = (torch.rand(images, latents, generator=generator) < 0.02).float()
    for i in range(images):
        for word in torch.randint(words, (1 + i % 2,), generator=generator):
            captions[i, word] = True
            activations[i, word] = 5
    return captions, agrees, activations


def match(captions, agrees, activations, seed: int = 0, count: int = 399) -> Comparison:
    images = len(captions)
    top = top_latents(activations, torch.zeros(activations.shape[1]), 3, max_image_share=0.3)
    hits = word_hits(top.float() @ agrees.float() > 0, captions)
    pairs = permutations(images, count, seed)
    return compare_hits(hits, bootstrap_weights(images, 50, seed), pairs)


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
    captions, agrees, activations = planted()
    seeds, inside, small = 300, 0, 0
    for seed in range(seeds):
        other = torch.randperm(60, generator=torch.Generator().manual_seed(10_000 + seed))
        found = match(captions[other], agrees, activations, seed)
        inside += found.chance_low <= found.value <= found.chance_high
        small += found.p <= 0.05
    assert 0.95 - 0.038 < inside / seeds < 0.995
    assert 0.01 < small / seeds < 0.05 + 0.038


def test_top_latents():
    activations = random(40, 25)
    activations[activations < 0.9] = 0
    activations[:, 3], activations[0, 4], activations[1:, 4] = 2, 2, 0
    activations[7] = 0
    density = random(25, seed=1) / 100
    density[4] = 0.005
    top = top_latents(activations, density, 2, max_image_share=0.1, max_text_density=0.005)
    expected = torch.zeros_like(top)
    for i in range(40):
        allowed = [k for k in range(25) if (activations[:, k] > 0).sum() <= 4 and density[k] <= 0.005]
        best = sorted((k for k in allowed if activations[i, k] > 0), key=lambda k: -activations[i, k])
        expected[i, best[:2]] = True
    assert torch.equal(top, expected)
    assert top[0, 4]  # A density of exactly the limit is allowed,
    assert not top[:, 3].any()  # what fires everywhere is not,
    assert not top[7].any()  # and what does not fire is nobody's top.
    assert top_latents(activations.bfloat16(), density, 99).sum(-1).max() <= 25


def test_latents_without_a_description_take_no_place():
    activations = torch.tensor([[9.0, 8, 7, 0], [0, 3, 0, 1]])
    described = torch.tensor([False, True, True, True])
    top = top_latents(activations, torch.zeros(4), 2, 1.0, described=described)
    assert top.int().tolist() == [[0, 1, 1, 0], [0, 1, 0, 1]]
    known = Descriptions(["", "a dog", "cats", "balls"], torch.zeros(4))
    assert torch.equal(known.described, described)


def test_strength_is_sum_or_max():
    for strength in ("sum", "max"):
        made = resolve_metric({"class_path": "match", "init_args": {"strength": strength}})
        assert made.strength == strength
    with pytest.raises(ValueError, match="match has strength='mean'; allowed are sum and max"):
        Match("mean")


@pytest.mark.parametrize("strength", ["sum", "max"])
def test_match_by_strength_against_a_second_computation(probed, strength):
    """The strongest latents of image tokens, one image at a time; maxima are kept where they are wanted."""
    model, given = probed.model, sae_probe(probed).probe
    texts = [f"references to {tiny.WORDS[1 + k % 16]}" if k % 3 else "" for k in range(64)]
    known = {name: Descriptions(texts, torch.zeros(64)) for name in given.saes}
    spec = {"class_path": "match", "init_args": {"strength": strength}}
    config = ProbeConfig(metrics=[spec], outlier_factor=1e9, max_image_share=0.7, bootstrap_samples=20)
    probe = Probe(model, given.saes, given.text, config, known)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in given.saes}
    said: list[set[str]] = []
    for batch in probe_batches(probed, 10):
        latents: dict[str, torch.Tensor] = {}
        probe.latents(model.image_tokens(batch), latents.__setitem__)
        for name, of_batch in latents.items():
            found[name] += list(of_batch.nan_to_num())
        said += [{words.stem(w) for w in words.content_words(captions[0])} for captions in batch.captions]
    rows = probe.run(probe_batches(probed, 10)).rows
    for name, images in found.items():
        strengths = [x.sum(0) if strength == "sum" else x.max(0).values for x in images]
        common = torch.stack([x > 0 for x in strengths]).double().mean(0) > 0.7
        hits = []
        for x, wanted in zip(strengths, said, strict=True):
            allowed = [k for k in range(64) if k % 3 and not common[k] and x[k] > 0]
            top = sorted(allowed, key=lambda k: -x[k].bfloat16())[:3]
            hits.append(any(words.stem(tiny.WORDS[1 + k % 16]) in wanted for k in top))
        [row] = [r for r in rows if (r.layer, r.group, r.metric) == (probe.layers[name], "image", "match")]
        assert row.value == sum(hits) / 10
    sums, maxima = (probe.metrics[2].activation_sums, probe.metrics[2].activation_maxima)
    assert (sums, maxima)[strength == "sum"] == ()
    assert set((sums, maxima)[strength == "max"]) == {"image", "text"}


def test_word_table_and_word_hits():
    words, captions = word_table([["dog", "ball"], [], ["cat"], ["dog", "dog"]])
    assert words == ["ball", "cat", "dog"]
    assert captions.int().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    found = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    assert word_hits(found, captions).int().tolist() == [[1, 0, 0, 1], [0, 0, 1, 0]]
    # Many words at once is one hit.
    assert word_hits(torch.ones(1, 999), torch.ones(1, 999)).tolist() == [[True]]
