"""Where image tokens enter the LLM: against a second computation, with caches, packed, and as gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch

from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.activations import contexts
from lightning_limber.models.entry import EntryConfig
from lightning_limber.models.generation import Decoding
from lightning_limber.models.image_tokens import ImageTokens, decode_text_first
from lightning_limber.models.limber import Limber
from lightning_limber.models.llm import LLM
from lightning_limber.models.text_moments import text_moments
from lightning_limber.models.vision import VisionConfig

TEXTS = ["a red circle left of a blue square on a white background ."] * 2 + [
    "a small green star above a large cross .",
    "describe the picture of a cat and a dog",
]
EVERYTHING = {"norm": "fixed", "inject": [1, 2], "hold": True}


def made(models, llm: str | None = None, **entry) -> Limber:
    """A calibrated model with random, not zero, further adapters."""
    vision = VisionConfig(str(models / "vision"), image_size=32, pool=2)
    torch.manual_seed(0)
    model = Limber(vision=vision, llm=llm or str(models / "llm"), entry=EntryConfig(**entry))
    model.configure_model()
    features = model.vision(pixels(model, 4))
    text = text_moments(model.llm, TEXTS, model.entry.hooks)
    model.entry.calibrate(model.adapter, features, torch.tensor(model.token_norm), text)
    return model.eval()


def wild(model: Limber) -> Limber:
    with torch.no_grad():
        for parameter in model.entry.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pixels(model: Limber, count: int) -> torch.Tensor:
    return torch.stack(
        [model.vision.transform(SceneSet("train", 100, 112, 0)[i].image) for i in range(count)]
    )


def batch_of(model: Limber, count: int = 3, captions: int = 1, **options):
    records = [SceneSet("train", 100, 112, 0)[i] for i in range(count)]
    chosen = [[record.captions[0], "a red cat ."][:captions] for record in records]
    return model.collator()(records, chosen, **options)


def two_stages(model: Limber, row: int, batch, tokens: ImageTokens) -> torch.Tensor:
    """Last hidden states [S, D] of one sequence: its text alone through the layers below, then all."""
    llm, layer, count = model.llm, tokens.layer, tokens.tokens.shape[1]
    ids = batch.input_ids[row]
    start = int(batch.image_positions.view(-1, count)[row, 0]) % len(ids)
    text = torch.cat([ids[:start], ids[start + count :]])[None]
    places = torch.cat([torch.arange(start), torch.arange(start + count, len(ids))])[None]
    # A jump of position ids without a mask is taken for the start of another packed text.
    length = text.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    kept: list[torch.Tensor] = []
    with llm.residual_hooks({f"blocks.{layer}.hook_resid_pre": kept.append}):
        llm.model.base_model(
            inputs_embeds=llm.embed(text), position_ids=places, attention_mask=mask, use_cache=False
        )
    [below] = kept
    whole = torch.cat([below[:, :start], tokens.tokens[row : row + 1], below[:, start:]], dim=1)
    return llm.decode(whole, first_layer=layer)[0]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt2", "gptneox", "gptj", "qwen3"])
def test_entering_is_what_two_stages_give(models, tmp_path, architecture):
    for layer, attention in ((1, "sdpa"), (2, "sdpa"), (1, "eager")):
        model = made(models, tiny.write_llm(tmp_path / architecture, architecture), layer=layer)
        if attention == "eager" or model.llm.model._supports_sdpa:
            model.llm.model.set_attn_implementation(attention)
        batch = batch_of(model)
        tokens = model.image_tokens(batch)
        hidden = model.decode(batch, tokens)
        for row in range(3):
            used = slice(0, int(batch.label_positions.max()) % hidden.shape[1] + 1)
            expected = two_stages(model, row, batch, tokens)
            torch.testing.assert_close(hidden[row, used], expected[used], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", [{"layer": 1}, {"layer": 2, "inject": [2]}, {"layer": 1, **EVERYTHING}])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("captions", [1, 2])
def test_text_first_is_the_same(models, tmp_path, monkeypatch, architecture, entry, captions):
    """In its values and gradients: plain rows, packed ones, and captions that share an image."""
    model = wild(made(models, tiny.write_llm(tmp_path / "llm", architecture), **entry))
    records = [SceneSet("train", 100, 112, 0)[i] for i in range(6)]
    chosen = [[record.captions[0], "a red cat ."][:captions] for record in records]
    records[4].image = None  # Of two rows with one image fewer.
    rows = []
    pairs = "lightning_limber.data.layout.fill_rows"
    monkeypatch.setattr(pairs, lambda n, *_: [range(i, min(i + 2, len(n))) for i in range(0, len(n), 2)])
    for options in ({}, {"share_prefix": True}, {"for_probe": True}):
        batch = model.collator()(records, chosen, **options)
        rows.append(tuple(batch.input_ids.shape))
        found = []
        for decode in (model.decode, partial(decode_text_first, model.llm)):
            model.zero_grad()
            losses, _ = model.target_losses(batch, decode(batch, model.image_tokens(batch)))
            losses.sum().backward()
            found.append([losses, *(p.grad for p in model.parameters() if p.grad is not None)])
        for whole, shorter in zip(*found, strict=True):
            torch.testing.assert_close(shorter, whole, rtol=1e-4, atol=1e-4)
    assert rows[0][0] == rows[2][0] / 2  # The first are packed.


@torch.no_grad()
def test_text_below_is_text_without_an_image(models):
    """The image changes nothing below its layer, and everything behind it."""
    model = made(models, layer=2)
    batch = batch_of(model)
    tokens = model.image_tokens(batch)
    kept: dict[str, list[torch.Tensor]] = {}
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    places = torch.ones(batch.input_ids.numel(), dtype=torch.bool).index_fill(
        0, batch.image_positions, False
    )
    for entering in (tokens, replace(tokens, tokens=7 * torch.randn_like(tokens.tokens))):
        hooks = {name: lambda x, n=name: kept.setdefault(n, []).append(x.flatten(0, 1)) for name in names}
        with model.llm.residual_hooks(hooks):
            model.decode(batch, entering)
    assert torch.equal(kept[names[0]][0][places], kept[names[0]][1][places])
    # Where they enter they stand: what layer 1 hands on is what layer 2 gets.
    assert torch.equal(kept[names[1]][0][places], kept[names[1]][1][places])
    rows = tokens.tokens.flatten(0, 1)[batch.image_rows]
    assert torch.equal(kept[names[1]][0][batch.image_positions], rows)
    assert not torch.allclose(kept[names[2]][0][places], kept[names[2]][1][places], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("entry", [{"layer": 1}, {"layer": 1, **EVERYTHING}, EVERYTHING, {"layer": 2}])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_cached_generation_is_recomputation(models, tmp_path, architecture, entry):
    model = wild(made(models, tiny.write_llm(tmp_path / "llm", architecture), **entry))
    tokens, compared = model.image_tokens(batch_of(model)), 0
    for attention in ("eager", "sdpa") if model.llm.model._supports_sdpa else ("eager",):
        model.llm.model.set_attn_implementation(attention)
        prompt = model.collator().prompt
        for beams in (1, 3):
            captions = model.generate(tokens, Decoding(6, num_beams=beams), log_probabilities=True)
            for row, caption in enumerate(captions):
                ids = model.llm.tokenizer(caption.text, add_special_tokens=False)["input_ids"]
                if caption.tokens != len(ids) or "<unk>" in caption.text:
                    continue  # An end token, or one that is not in the text.
                one = ImageTokens(
                    tokens.tokens[row : row + 1],
                    tokens.layer,
                    {layer: added[row : row + 1] for layer, added in tokens.added.items()},
                    tokens.hold,
                )
                opening = model.collator().opening(1)
                opening.input_ids = torch.cat([opening.input_ids, torch.tensor([ids])], 1)
                hidden = model.decode(opening, one)[0]
                before = len(prompt.prefix_ids) + model.num_image_tokens + len(prompt.generation_ids)
                logits = model.llm.logits(hidden[before - 1 : -1]).log_softmax(-1)
                total = logits.gather(1, torch.tensor(ids)[:, None]).double().sum().item()
                assert caption.log_probability == pytest.approx(total, abs=1e-3), (attention, beams)
                compared += 1
    assert compared


@torch.no_grad()
@pytest.mark.parametrize("entry", [{"layer": 1}, {"layer": 1, **EVERYTHING}, EVERYTHING])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_packed_rows_are_rows_of_their_own(models, monkeypatch, entry, share_prefix):
    model = wild(made(models, **entry))
    monkeypatch.setattr(
        "lightning_limber.data.layout.fill_rows", lambda lengths, *_: [[i] for i in range(len(lengths))]
    )
    plain = batch_of(model, 4, captions=2)
    monkeypatch.setattr(
        "lightning_limber.data.layout.fill_rows", lambda lengths, *_: [list(range(len(lengths)))]
    )
    packed = batch_of(model, 4, captions=2, share_prefix=share_prefix)
    assert (len(packed.input_ids), len(plain.input_ids)) == (1, 8)
    torch.testing.assert_close(model(packed)[1], model(plain)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gradients_reach_the_layers_behind_and_no_other(models, layer):
    model = made(models, layer=layer).train()
    batch, found = batch_of(model), {}

    def look(name, residual):
        found[name] = residual.requires_grad

    hooks = [f"blocks.{i}.hook_resid_pre" for i in range(3)]
    with model.llm.residual_hooks({name: partial(look, name) for name in hooks}):
        _, losses, _ = model(batch)
    losses.sum().backward()
    for name, has in found.items():
        assert has == (int(name.split(".")[1]) >= layer), name
    assert all(p.grad is not None and p.grad.any() for p in model.adapter.parameters())
    assert not any(p.grad is not None for p in model.llm.parameters())


def test_injection_is_nothing_at_first_and_learns(models):
    base, model = made(models), made(models, inject=[0, 2])
    assert torch.equal(base.adapter.project.weight, model.adapter.project.weight)
    batch = batch_of(base)
    assert torch.equal(base(batch)[1], model(batch)[1])
    model(batch)[1].sum().backward()
    for added in model.entry.maps.values():
        assert not added.project.weight.any()
        assert added.project.weight.grad.any()


@torch.no_grad()
def test_held_rows_stand_at_every_layer(models):
    model = made(models, layer=1, hold=True)
    batch, kept = batch_of(model), {}
    with model.llm.residual_hooks(
        {f"blocks.{i}.hook_resid_pre": partial(kept.__setitem__, i) for i in (1, 2)}
    ):
        tokens = model.image_tokens(batch)
        model.decode(batch, tokens)
    text = text_moments(model.llm, TEXTS, model.entry.hooks)
    ratio = text["blocks.2.hook_resid_pre"].norm / text["blocks.1.hook_resid_pre"].norm
    first, second = (kept[i].flatten(0, 1)[batch.image_positions] for i in (1, 2))
    torch.testing.assert_close(second, ratio * first)
    assert model.entry.hold.tolist() == pytest.approx([1, 1, ratio.item()])


@torch.no_grad()
@pytest.mark.parametrize("entry", [{}, {"layer": 1}, {"layer": 1, **EVERYTHING}, EVERYTHING])
def test_going_on_from_a_layer_is_the_whole_forward(models, entry):
    model = wild(made(models, **entry))
    batch = batch_of(model, for_probe=True)
    tokens, kept = model.image_tokens(batch), {}
    names = {f"blocks.{i}.hook_resid_{at}": i + (at == "post") for i in range(3) for at in ("pre", "post")}
    with model.llm.residual_hooks({name: partial(kept.__setitem__, name) for name in names}):
        whole = model.decode(batch, tokens)
    for name, layer in names.items():
        if layer >= model.entry.config.layer and layer < 3:
            torch.testing.assert_close(model.decode_from(layer, kept[name], batch, tokens), whole)


def test_image_tokens_begin_where_text_is(models):
    """Mean and scale of text at the entry layer, before the first step."""
    model = made(models, layer=2)
    with torch.no_grad():
        x = model.image_tokens(batch_of(model, 4)).tokens.flatten(0, 1)
    text = text_moments(model.llm, TEXTS, model.entry.hooks)["blocks.2.hook_resid_pre"]
    distance = (x - text.mean).norm(dim=-1).mean()
    assert distance.item() == pytest.approx(text.variance.sqrt().item(), rel=1e-4)


def test_moments_of_text(models):
    llm = LLM(str(models / "llm")).load()
    name = "blocks.2.hook_resid_pre"
    rows = []
    for ids in contexts(TEXTS, llm.tokenizer, 128):
        kept: list[torch.Tensor] = []
        with torch.no_grad(), llm.residual_hooks({name: kept.append}):
            llm.decode(llm.embed(torch.tensor([ids.tolist()])))
        rows.append(kept[0][0, 1:].double().numpy())
    x = np.concatenate(rows)
    found = text_moments(llm, TEXTS, [name])[name]
    assert found.norm.item() == pytest.approx(
        np.sort(np.linalg.norm(x, axis=1))[(len(x) - 1) // 2], rel=1e-4
    )
    np.testing.assert_allclose(found.mean.numpy(), x.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(x.T, bias=True), atol=1e-3)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"layer": 3}, "model.entry.layer=3: the LLM has layers 0 to 2"),
        ({"layer": 2, "inject": [1]}, r"inject=\[1\]: allowed are layers from model.entry.layer=2 on"),
        ({"inject": [3]}, "model.entry.inject=3: the LLM has layers 0 to 2"),
        ({"inject": [1, 1]}, "each once"),
    ],
)
def test_layers_that_are_not_there(models, entry, said):
    with pytest.raises(ValueError, match=said):
        made(models, **entry)


@torch.no_grad()
def test_nothing_enters_without_an_image(models):
    model = made(models, layer=1)
    sequences = batch_of(model, for_probe=True).without_image
    expected = model.llm.decode(model.llm.embed(sequences.input_ids))
    assert torch.equal(model.decode(sequences, None), expected)
