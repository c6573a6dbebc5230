"""Groups of words in the image's place: which words, of which norms, and where they are read."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.limber import Limber
from lightning_limber.models.vision import VisionConfig
from lightning_limber.probe.metrics import REGISTRY
from lightning_limber.probe.metrics.word_groups import content_tokens, random_words


@pytest.fixture(scope="module")
def model(models) -> Limber:
    vision = VisionConfig(str(models / "vision"), image_size=32, pool=2)
    made = Limber(vision=vision, llm=str(models / "llm"))
    made.configure_model()
    return made


def batch_of(model: Limber, places: list[int]):
    records = [SceneSet("val", 20, 112, 0)[i] for i in places]
    return model.collator()(records, [r.captions for r in records], places, for_probe=True)


def fill(model: Limber, name: str, batch, tokens: torch.Tensor) -> torch.Tensor:
    [group] = REGISTRY[name]().groups
    return group.fill(model, batch, tokens)


def test_random_words_are_a_function_of_the_name_and_never_special(model):
    names = [f"image {i}" for i in range(300)]
    drawn = random_words(model.llm, names, 20)
    assert torch.equal(drawn[[7, 3]], random_words(model.llm, [names[7], names[3]], 20))
    tokenizer = model.llm.tokenizer
    counts = drawn.flatten().bincount(minlength=len(tokenizer)).double()
    special = set(tokenizer.all_special_ids)
    assert {i for i, count in enumerate(counts.tolist()) if not count} == special
    others = counts[counts > 0]
    expected = drawn.numel() / len(others)
    assert float(((others - expected) ** 2 / expected).sum()) < len(others) + 4 * (2 * len(others)) ** 0.5


def test_content_words_of_captions(model):
    def said(*captions: str, count: int = 5) -> list[str]:
        return model.llm.tokenizer.convert_ids_to_tokens(content_tokens(model.llm, list(captions), count))

    assert said("a red cat on the red square .") == ["red", "cat", "square", "red", "cat"]
    assert said("a red cat", "a dog and a cat", count=4) == ["red", "cat", "dog", "red"]
    assert said("of the", count=3) == ["of", "the", "of"]
    assert said(count=2) == ["<eos>", "<eos>"]


def test_norms_and_directions(model):
    batch = batch_of(model, [0, 1, 2])
    tokens = torch.rand(3, 4, 32) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    found = {name: fill(model, name, batch, tokens) for name in ("noise", "words_long", "words", "told")}
    table = model.llm.embedding.weight
    for name in ("noise", "words_long"):
        torch.testing.assert_close(found[name].norm(dim=-1), tokens.norm(dim=-1))
    for name in ("words", "told"):
        assert all((table == row).all(-1).any() for row in found[name].flatten(0, 1))
    cosine = torch.cosine_similarity(found["words"], found["words_long"], dim=-1)
    torch.testing.assert_close(cosine, torch.ones(3, 4))
    # Whatever else is in the batch.
    alone = batch_of(model, [2])
    for name, whole in found.items():
        assert torch.equal(fill(model, name, alone, tokens[2:])[0], whole[2]), name


@torch.no_grad()
def test_without_captions_the_image_positions_are_the_same(model):
    """The short forward of a group in the image's place reads what a whole one would."""
    batch = batch_of(model, [0, 1, 2])
    tokens = model.image_tokens(batch).filled(partial(fill, model, "words_long", batch))
    found: list[torch.Tensor] = []
    for sequences in (batch, batch.without_captions):
        kept: dict[str, torch.Tensor] = {}
        hooks = {"blocks.2.hook_resid_post": partial(kept.__setitem__, "x")}
        with model.llm.residual_hooks(hooks):
            model.decode(sequences, tokens)
        found.append(kept["x"].flatten(0, 1)[sequences.groups["image"][0]])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
