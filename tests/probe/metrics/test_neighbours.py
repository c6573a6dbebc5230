"""The neighbour lens: against numpy, with planted truth, and which text tokens are in its bank."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from parts import probe_batches, sae_probe

from lightning_limber.models.image_tokens import embed_sequences
from lightning_limber.probe import words
from lightning_limber.probe.metrics import neighbours
from lightning_limber.probe.metrics.neighbours import Bank, Place, lift, spread, word_places
from lightning_limber.probe.passes import Probe
from lightning_limber.probe.statistics import bootstrap_weights, permutations

D, LAYERS, IMAGES, TOKENS, VOCABULARY = 24, 3, 60, 6, 30


def residuals(model, hooks, embeds) -> dict[str, np.ndarray]:
    kept: dict[str, torch.Tensor] = {}
    with (
        torch.no_grad(),
        model.llm.residual_hooks({name: partial(kept.__setitem__, name) for name in hooks}),
    ):
        model.llm.decode(embeds)
    return {name: x.double().numpy() for name, x in kept.items()}


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_against_numpy(probed):
    """Captions one at a time, words by the tokenizer's own splitting, sums by loops."""
    model, probe = probed.model, sae_probe(probed).probe
    hooks = list(probe.layers)
    bank: list[tuple[str, int, np.ndarray]] = []  # Word, layer and direction.
    for text in probed.datamodule.training_captions():
        pieces = model.llm.tokenizer.tokenize(text)
        content = words.content_words(text)
        ids = [1, *model.llm.tokenizer.convert_tokens_to_ids(pieces)]
        found = residuals(model, hooks, model.llm.embed(torch.tensor([ids])))
        for i, piece in enumerate(pieces):
            if i and piece in content:
                bank += [(piece, probe.layers[name], unit(x[0, 1 + i])) for name, x in found.items()]
    assert len(bank) > 100
    directions = np.stack([direction for _, _, direction in bank])
    nearest: dict[int, dict[int, list[int]]] = {layer: {} for layer in probe.layers.values()}
    said: dict[int, set[str]] = {}
    for batch in probe_batches(probed, 10):
        found = residuals(model, hooks, embed_sequences(model.llm, batch, model.image_tokens(batch)))
        for name, x in found.items():
            for row, index in enumerate(batch.index):
                said[index] = {words.stem(w) for w in words.content_words(batch.captions[row][0])}
                tokens = x[row, 1:5]
                kept = probe.keep(name, torch.from_numpy(tokens).float()).numpy()
                best = (unit(tokens[kept]) @ directions.T).argmax(-1)
                nearest[probe.layers[name]][index] = best.tolist()
    history = sae_probe(probed).history
    rows = {(r.layer, r.group, r.metric): r.value for r in history[max(history)]}
    for layer, by_image in nearest.items():
        own, other, layers = [], [], []
        for index, best in by_image.items():
            for place in best:
                stem = words.stem(bank[place][0])
                own.append(stem in said[index])
                other.append(np.mean([stem in said[j] for j in said if j != index]))
                layers.append(bank[place][1])
        assert 0 < np.mean(other) < 1
        value = rows[layer, "image", "neighbour_lift"]
        assert value == pytest.approx(np.mean(own) / np.mean(other), rel=1e-6)
        assert rows[layer, "image", "neighbour_layer"] == pytest.approx(np.mean(layers), rel=1e-6)
        assert rows[layer, "image", "neighbour_lift_chance"] == pytest.approx(1, abs=0.2)
    groups = {group for _, group, metric in rows if metric == "neighbour_lift"}
    assert groups == {"image", "noise", "words_long"}


def test_table_of_words(probed):
    """Counts of a layer's words are those of its tokens, and each has a caption in which it stands."""
    report = sae_probe(probed).probe.run(probe_batches(probed, 10))
    table = pd.DataFrame(report.tables["neighbours"])
    assert set(table.layer) == {0, 2}
    captions = set(probed.datamodule.training_captions())
    for _, of_layer in table.groupby("layer"):
        assert len(of_layer) <= neighbours.TABLE_WORDS
        assert of_layer.tokens.is_monotonic_decreasing
        assert of_layer.share.sum() <= 1 + 1e-9
        whole = (of_layer.tokens / of_layer.share).round().unique()
        assert len(whole) == 1
        assert whole[0] <= 10 * 4
    for row in table.itertuples():
        assert row.context in captions
        assert row.word in words.content_words(row.context)


# -- planted truth ----------------------------------------------------------------------------------


class World:
    """Words of random directions that differ by context and layer, and captions of three words."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        vocabulary = [f"word{i:02}" for i in range(VOCABULARY)]
        centres = self.normal(VOCABULARY, D)
        places = [Place(word, i, 1) for i, word in enumerate(vocabulary * 3)]
        # Layers share a common direction, which is most of their length.
        directions = {
            layer: unit_rows(
                centres.repeat(3, 1) + 0.3 * self.normal(3 * VOCABULARY, D) + 9 * self.normal(D)
            )
            for layer in (0, 4, 9)
        }
        self.bank = Bank.of(places, [f"text {i}" for i in range(3 * VOCABULARY)], directions)
        self.said = torch.zeros(IMAGES, VOCABULARY, dtype=torch.float64)
        drawn = torch.rand(IMAGES, VOCABULARY, generator=self.generator).argsort(-1)[:, :3]
        self.said.scatter_(1, drawn, 1)
        choice = torch.randint(3, (IMAGES, TOKENS), generator=self.generator)
        self.words = drawn.gather(1, choice)  # [I, P] a word of the own caption for each token.

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator)

    def own_tokens(self) -> torch.Tensor:
        """[I * P, D]: text tokens of the own captions' words, in some context and layer, at any length."""
        layer = torch.randint(LAYERS, (IMAGES * TOKENS,), generator=self.generator)
        context = torch.randint(3, (IMAGES * TOKENS,), generator=self.generator)
        x = self.bank.directions[layer, context * VOCABULARY + self.words.flatten()]
        return x * (0.1 + 50 * torch.rand(len(x), 1, generator=self.generator))

    def lift(self, x: torch.Tensor, said: torch.Tensor, seed: int = 0):
        places = self.bank.nearest(x)
        word = self.bank.word_of[places % len(self.bank.contexts)].view(IMAGES, TOKENS)
        counts = torch.zeros(IMAGES, VOCABULARY, dtype=torch.float64)
        counts.scatter_add_(1, word, torch.ones_like(word, dtype=torch.float64))
        weights = bootstrap_weights(IMAGES, 200, seed)
        return lift(counts @ said.T, counts.sum(-1), weights, permutations(IMAGES, 200, seed))


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nearest_token_is_found(dtype):
    """As float64 finds it among all layers at once; also where products are rounded to bfloat16, which
    could not tell cosines of nearly 1 apart.
    """
    world = World(0)
    x = world.own_tokens() + 0.02 * world.normal(IMAGES * TOKENS, D)
    context = torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16)
    with context:
        found = world.bank.nearest(x)
    flat = world.bank.directions.double().flatten(0, 1).numpy()
    cosines = unit(x.double().numpy()) @ flat.T
    best = cosines.argmax(-1)
    same = (found.numpy() == best).mean()
    assert same == 1 if dtype is torch.float32 else same > 0.98
    lost = cosines.max(-1) - np.take_along_axis(cosines, found.numpy()[:, None], -1)[:, 0]
    assert lost.max() < 1e-3


def test_the_nearest_words_are_found():
    """Each word where it is nearest, in the order of the cosines; the first is the nearest token."""
    world = World(0)
    x = world.normal(20, D)
    places, cosines = world.bank.nearest_words(x, 3)
    assert torch.equal(places[:, 0], world.bank.nearest(x))
    every = unit_rows(x) @ world.bank.directions.flatten(0, 1).T  # [n, L * T]
    word_of = world.bank.word_of.repeat(LAYERS)
    for row, (of_row, found) in enumerate(zip(every, places, strict=True)):
        best = {w: float(of_row[word_of == w].max()) for w in range(VOCABULARY)}
        expected = sorted(best, key=lambda w: best[w], reverse=True)[:3]
        assert word_of[found].tolist() == expected
        torch.testing.assert_close(of_row[found], torch.tensor([best[w] for w in expected]))
        torch.testing.assert_close(cosines[row], of_row[found])


def test_tokens_of_the_own_words_reach_the_ceiling():
    world = World(1)
    found = world.lift(world.own_tokens(), world.said)
    share = [
        float(world.said[j, world.words[i]].mean()) for i in range(IMAGES) for j in range(IMAGES) if i != j
    ]
    assert found.value == pytest.approx(1 / np.mean(share), rel=1e-6)
    assert found.low > 5
    assert found.p == 1 / 201


def test_shuffled_captions_and_random_vectors_have_no_lift():
    """Of 60 seeds at .95, three standard errors; the planted lift's intervals never hold 1."""
    held = {"shuffled": 0, "random": 0, "own": 0}
    for seed in range(60):
        world = World(seed)
        x, other = world.own_tokens(), torch.randperm(IMAGES, generator=world.generator)
        cases = {
            "shuffled": (x, world.said[other]),
            "random": (world.normal(IMAGES * TOKENS, D), world.said),
            "own": (x, world.said),
        }
        for name, (tokens, said) in cases.items():
            found = world.lift(tokens, said, seed)
            held[name] += found.low <= 1 <= found.high
    assert held["own"] == 0
    for name in ("shuffled", "random"):
        assert held[name] >= 60 * (0.95 - 0.085), held


def test_lift_against_loops():
    generator = torch.Generator().manual_seed(0)
    hits = torch.randint(5, (6, 6), generator=generator).double()
    tokens = torch.randint(5, 9, (6,), generator=generator).double()
    weights = bootstrap_weights(6, 20, 0)
    found = lift(hits, tokens, weights, permutations(6, 50, 0))
    samples = []
    for drawn in weights.numpy():
        images = [i for i, times in enumerate(drawn) for _ in range(int(times))]
        own = sum(hits[i, i] for i in images) / sum(tokens[i] for i in images)
        pairs = [(i, j) for i in images for j in images if i != j]
        other = sum(hits[i, j] for i, j in pairs) / sum(tokens[i] for i, _ in pairs)
        samples.append(float(own / other))
    low, high = np.quantile(samples[1:], [0.025, 0.975])
    assert (found.value, found.low, found.high) == pytest.approx((samples[0], low, high), rel=1e-6)


def test_no_lift_without_a_chance():
    """Words that no other caption has: nothing to divide by."""
    found = lift(
        torch.eye(4).double(), torch.ones(4).double(), bootstrap_weights(4, 9, 0), permutations(4, 9, 0)
    )
    assert math.isnan(found.value)
    assert math.isnan(found.p)


# -- the bank ---------------------------------------------------------------------------------------

TEXTS = [
    "Hundreds of red dogs' balls in front of a WOODEN house.",
    "the hundred-year-old man's umbrella, left of two unbelievable dogs",
    "dogs",
    "a dog and a dog and another dog",
]


@pytest.fixture(scope="module")
def pieces():
    """A byte-level BPE that splits most words into several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=275, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_words_last_token(pieces):
    """The text up to it ends with the word; no word is left out but one that is the first token."""
    ids, places = word_places(pieces, TEXTS)
    assert any(len(pieces(f" {place.word}")["input_ids"]) > 2 for place in places)
    for place in places:
        said = pieces.decode(ids[place.text][: place.token + 1]).lower()
        assert said.endswith(place.word), (said, place)
    found = [{place.word for place in places if place.text == i} for i in range(len(TEXTS))]
    assert found[0] == {"hundreds", "red", "dogs", "balls", "wooden", "house"}
    assert found[1] == {"hundred", "year", "old", "man", "umbrella", "left", "two", "unbelievable", "dogs"}
    assert found[3] == {"dog"}
    assert sum(place.text == 3 for place in places) == 3
    whole = word_places(pieces, ["a", "dogs"])[0][1]
    assert len(found[2]) == (len(whole) > 1)


def test_limits_of_the_bank(pieces, monkeypatch):
    """Rare words come before the second context of frequent ones."""
    texts = [" ".join(["a", *["dog"] * 30, "cat"])] * 2
    _, places = word_places(pieces, texts)
    count = [sum(place.word == word for place in places) for word in ("dog", "cat")]
    assert count == [neighbours.MAX_CONTEXTS, 2 if len(pieces(texts[0])["input_ids"]) <= 64 else 0]
    monkeypatch.setattr(neighbours, "MAX_TOKENS", 3)
    monkeypatch.setattr(neighbours, "MAX_TEXT_TOKENS", 999)
    _, places = word_places(pieces, texts)
    assert [place.word for place in places] == ["dog", "cat", "dog"]


def test_spread():
    assert spread(range(30), 8) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert spread("abc", 8) == ["a", "b", "c"]
    assert spread("abc", 1) == ["a"]
    assert spread("", 8) == []


def test_left_out_without_training_captions(probed):
    """As in Python, where images and captions are all there is."""
    given = sae_probe(probed).probe
    alone = Probe(probed.model, given.saes, given.text, given.config)
    report = alone.run(probe_batches(probed, 4))
    assert not [row for row in report.rows if row.metric.startswith("neighbour")]
    assert "neighbours" not in report.tables
    assert [row for row in report.rows if row.metric == "lens_hit"]
