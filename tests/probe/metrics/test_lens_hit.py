"""`lens_hit` against a second computation."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from parts import probe_batches, values

from lightning_limber.models.image_tokens import embed_sequences
from lightning_limber.probe import words
from lightning_limber.probe.metrics.lens_hit import weighted_hits, whole_words


def test_lens_hit_against_a_second_computation(probed):
    """A word of the caption among the top tokens at some image position, from the model's own parts."""
    cli = probed
    model = cli.model
    base = model.llm.model.base_model
    hits = {0: [], 2: []}
    with torch.no_grad():
        for batch in probe_batches(cli, 10):
            kept = {}
            embeds = embed_sequences(model.llm, batch, model.image_tokens(batch))
            hooks = {f"blocks.{i}.hook_resid_post": partial(kept.__setitem__, i) for i in hits}
            with model.llm.residual_hooks(hooks):
                model.llm.decode(embeds)
            for layer, found in hits.items():
                logits = model.llm.model.lm_head(base.norm(kept[layer][:, 1:5]))
                top = logits.topk(2, dim=-1).indices.flatten(1)
                for ids, captions in zip(top, batch.captions, strict=True):
                    said = {words.stem(t) for t in model.llm.tokenizer.convert_ids_to_tokens(ids.tolist())}
                    wanted = {words.stem(w) for w in words.content_words(captions[0])}
                    found.append(bool(said & wanted))
    for layer, got in zip(hits, values(cli, 1, "image", "lens_hit"), strict=True):
        assert got == sum(hits[layer]) / 10
    assert any(hits[0] + hits[2])


@pytest.mark.parametrize("space", ["\u0120", "\u2581", ""])
def test_whole_words(space):
    """The "red" of "hundred" is none, where the vocabulary says what begins a word."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [f"{space}hund", "red", f"{space}red", f"{space}Dogs", f"{space}a", f"{space}t-", "s", "12"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="s"))
    if space:
        tokenizer.decoder = decoders.ByteLevel() if space == "\u0120" else decoders.Metaspace()
    found = whole_words(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 999)
    assert sorted(found.values()) == ["dog", "hund", "red"]
    assert vocabulary[f"{space}red"] in found


def test_weighted_hits_against_numpy():
    """A word that all captions have weighs nothing, rare ones weigh most."""
    generator = np.random.default_rng(0)
    captions = generator.random((12, 9)) < np.linspace(0.1, 0.9, 9)
    captions[:, 8] = True
    captions[5] = np.arange(9) == 8
    captions[:, 0] = np.arange(12) == 3
    found = generator.random((12, 9)) < 0.4
    weight = np.log(12 / captions.sum(0))
    expected = np.zeros((12, 12))
    for i in range(12):
        for j in range(12):
            whole = weight[captions[j]].sum()
            expected[i, j] = weight[captions[j] & found[i]].sum() / whole if whole else 0
    assert weight[8] == 0
    assert not expected[:, 5].any()
    got = weighted_hits(torch.from_numpy(found), torch.from_numpy(captions)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)


def test_weighted_is_at_most_whether_any_word_is_hit(probed):
    plain, weighted = (values(probed, 1, "image", name) for name in ("lens_hit", "lens_hit_weighted"))
    assert len(weighted) == 2
    assert all(0 <= w <= p for w, p in zip(weighted, plain, strict=True))
    assert any(weighted)
