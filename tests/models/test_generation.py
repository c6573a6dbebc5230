"""Written captions against the LLM's own probabilities, and the image tokens that they are written from."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import tiny
import torch

from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.adapters import MLP, Linear, PixelShuffle
from lightning_limber.models.generation import Caption, Decoding
from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.models.limber import Limber
from lightning_limber.models.vision import VisionConfig


def make(models: Path, llm: str | None = None, **settings) -> Limber:
    vision = VisionConfig(str(models / "vision"), image_size=32, pool=2)
    model = Limber(vision=vision, llm=llm or str(models / "llm"), max_caption_tokens=20, **settings)
    model.configure_model()
    return model


def pixels(model: Limber, count: int = 3) -> torch.Tensor:
    images = [SceneSet("val", 10, 112, 0)[i].image for i in range(count)]
    return torch.stack([model.vision.transform(image) for image in images])


@torch.no_grad()
def image_tokens(model: Limber, pixels: torch.Tensor) -> torch.Tensor:
    return model.adapter(model.vision(pixels))


def generate(model: Limber, pixels: torch.Tensor | None, decoding: Decoding) -> list[Caption]:
    tokens = None if pixels is None else ImageTokens(image_tokens(model, pixels))
    return model.generate(tokens, decoding, log_probabilities=True)


@torch.no_grad()
def own_log_probabilities(model: Limber, image: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """[n, V] of each of n tokens after [prefix | image | prompt text], by the LLM's own forward."""
    prompt, llm = model.collator().prompt, model.llm
    embed = lambda ids: llm.embed(torch.tensor(ids, dtype=torch.long))  # noqa: E731
    parts = [
        embed(prompt.prefix_ids),
        image_tokens(model, image[None])[0],
        embed([*prompt.generation_ids, *ids]),
    ]
    logits = llm.model(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(ids) - 1 : -1]
    return logits.double().log_softmax(-1)


def teacher_forced(model: Limber, image: torch.Tensor, ids: list[int]) -> float:
    return float(own_log_probabilities(model, image, ids)[torch.arange(len(ids)), ids].sum())


@pytest.fixture
def written(monkeypatch) -> list[torch.Tensor]:
    """The token ids of every batch that transformers' `generate` returns."""
    from transformers import GenerationMixin

    kept: list[torch.Tensor] = []
    original = GenerationMixin.generate

    def spy(*args, **kwargs):
        output = original(*args, **kwargs)
        if not isinstance(output, torch.Tensor):  # As the check at loading asks for.
            kept.append(output.sequences)
        return output

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    return kept


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "decoding",
    [Decoding(12), Decoding(12, num_beams=3), Decoding(12, temperature=1.5, top_p=0.9, seed=1)],
    ids=["greedy", "beams", "sampling"],
)
def test_log_probability_is_the_llms_own(models, tmp_path, written, decoding, architecture):
    model = make(models, tiny.write_llm(tmp_path, architecture))
    images = pixels(model)
    captions = generate(model, images, decoding)
    eos = model.llm.tokenizer.eos_token_id
    for image, caption, row in zip(images, captions, written[0].tolist(), strict=True):
        ids = row[: row.index(eos) + 1] if eos in row else row
        assert caption.tokens == len(ids)
        assert caption.text == model.llm.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert caption.log_probability == pytest.approx(teacher_forced(model, image, ids), abs=1e-4)


def test_a_caption_ends_at_its_end_token(models, written):
    """An LLM that says EOS with some probability: nothing behind the first one counts."""
    model = make(models)
    eos = model.llm.tokenizer.eos_token_id
    ends = set()
    for seed in range(6):
        captions = generate(model, pixels(model), Decoding(20, temperature=4.0, seed=seed))
        for image, caption, row in zip(pixels(model), captions, written[-1].tolist(), strict=True):
            ids = row[: caption.tokens]
            ends.add(eos in ids)
            assert eos not in ids[:-1]
            assert caption.log_probability == pytest.approx(teacher_forced(model, image, ids), abs=1e-4)
    assert True in ends


def test_greedy_is_the_likeliest_next_token_and_uses_a_cache(models, written):
    model = make(models)
    lengths = []
    hook = model.llm.layers[0].register_forward_hook(lambda _m, _a, output: lengths.append(output.shape[1]))
    generate(model, pixels(model, 1), Decoding(6))
    hook.remove()
    assert lengths[0] > 1
    assert set(lengths[1:]) == {1}  # One position a step: the rest is in the cache.
    row = written[0][0].tolist()
    assert len(lengths) == len(row)
    assert own_log_probabilities(model, pixels(model, 1)[0], row).argmax(-1).tolist() == row


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("{bos}{image}describe the picture {caption}{eos}", "<bos> describe the picture"),
        ("{image}{caption}{eos}", "<bos>"),  # Of which nothing would be left.
        ("{image}the {caption}{eos}", "the"),
    ],
)
def test_without_an_image_the_llm_goes_on_from_the_prompt(models, written, prompt, ids):
    """As transformers does from the same tokens."""
    model = make(models, prompt=prompt)
    [caption] = generate(model, None, Decoding(8))
    ids = torch.tensor([model.llm.tokenizer.convert_tokens_to_ids(ids.split())])
    expected = model.llm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        return_dict_in_generate=True,
    ).sequences[0, ids.shape[1] :]  # fmt: skip
    assert written[0][0].tolist() == expected.tolist()
    assert caption.tokens == len(expected)
    assert caption.text == model.generate(None, Decoding(8))[0].text


def test_beams_find_the_likeliest_of_all_captions(models):
    """With as many beams as there are tokens, two steps of beam search are exhaustive."""
    model = make(models)
    image = pixels(model, 1)
    size, eos = model.llm.vocab_size, model.llm.tokenizer.eos_token_id
    best = generate(model, image, Decoding(2, num_beams=size))[0].log_probability
    pairs = [list(pair) for pair in product(range(size), range(size)) if eos not in pair]
    prompt = model.collator().prompt
    with torch.no_grad():
        start = torch.cat(
            [model.llm.embed(torch.tensor(prompt.prefix_ids)), image_tokens(model, image)[0]]
        ).expand(len(pairs), -1, -1)
        embeds = torch.cat([start, model.llm.embed(torch.tensor(pairs))], dim=1)
        logits = model.llm.model(inputs_embeds=embeds).logits[:, -3:-1].log_softmax(-1)
    sums = logits.gather(2, torch.tensor(pairs)[:, :, None])[..., 0].sum(1)
    assert best == pytest.approx(float(sums.max()), abs=1e-4)


def test_sampling_follows_the_seed_and_leaves_the_process_alone(models):
    model = make(models)
    before = torch.get_rng_state()
    texts = [
        [c.text for c in generate(model, pixels(model), Decoding(10, temperature=3.0, seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.get_rng_state())


def test_top_p_draws_among_the_likeliest_only(models, written):
    model = make(models)
    generate(model, pixels(model), Decoding(6, temperature=1.0, top_p=1e-9))
    generate(model, pixels(model), Decoding(6))
    assert torch.equal(written[0], written[1])


def test_the_prompts_own_end_token_ends_a_caption(models, tmp_path):
    """As Gemma's <end_of_turn>, which is not its EOS."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} <turn>{% endfor %}"
    name = tiny.write_llm(tmp_path)
    chat = tmp_path / "chat_template.jinja"
    assert chat.is_file()
    chat.write_text(template)
    for prompt in (
        "{conversation}",
        [
            {"role": "user", "content": "{image}the picture"},
            {"role": "assistant", "content": "{caption}"},
        ],
    ):
        assert make(models, name, prompt=prompt).collator().prompt.end_ids == [2, 3]
    assert make(models).collator().prompt.end_ids == [2]
    assert make(models, prompt="{image}{caption} .").collator().prompt.end_ids == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"top_p": 0.5}, "set temperature"),
        ({"num_beams": 2, "temperature": 1.0}, "choose"),
    ],
)
def test_wrong_decoding(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


@pytest.mark.parametrize(
    ("vision", "adapter", "grid", "before"),
    [
        ({"keep_cls": True}, Linear, (4, 4), 1),
        ({"pool": 2}, MLP, (2, 2), 0),
        ({}, PixelShuffle, (2, 2), 0),
    ],
)
def test_grid_of_image_tokens(models, vision, adapter, grid, before):
    config = VisionConfig(str(models / "vision"), image_size=32, **vision)
    model = Limber(config, str(models / "llm"), adapter)
    model.configure_model()
    assert model.token_grid == grid
    assert image_tokens(model, pixels(model, 1)).shape[1] == before + grid[0] * grid[1]
