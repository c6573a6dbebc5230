"""`lens_hit` against a second computation."""

from __future__ import annotations

from functools import partial

import torch
from parts import probe_batches, values


def test_lens_hit_against_a_second_computation(probed):
    """A word of the caption among the top tokens at some image position, from the model's own parts."""
    from lightning_limber.probe import words

    cli = probed
    model = cli.model
    base = model.llm.model.base_model
    hits = {0: [], 2: []}
    with torch.no_grad():
        for batch in probe_batches(cli, 10):
            kept = {}
            embeds = model.embed_sequences(batch, model.image_tokens(batch))
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
