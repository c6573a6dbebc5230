"""Image tokens that are convex combinations of the LLM's own token embeddings."""

from __future__ import annotations

import pytest
import tiny
import torch

from lightning_limber.models.adapters import Vocabulary, vocabulary
from lightning_limber.models.llm import LLM

SPECIAL = 4
"""Tokens before the words in the tiny vocabulary."""


@pytest.fixture
def llm(models) -> LLM:
    return LLM(str(models / "llm")).load()


@pytest.fixture
def features() -> torch.Tensor:
    torch.manual_seed(0)
    return 50 * torch.randn(4, 16, 24) + 7


def make(llm: LLM, features: torch.Tensor, **settings) -> Vocabulary:
    torch.manual_seed(0)
    adapter = Vocabulary(24, 32, **{"perplexity": 10, **settings})
    adapter.bind(llm)
    adapter.calibrate(features, torch.tensor(3.2))
    return adapter


def mean_perplexity(adapter: Vocabulary, features: torch.Tensor) -> float:
    p = adapter.eval().probabilities(features).double()
    return torch.special.entr(p).sum(-1).mean().exp().item()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "gptj"])
@pytest.mark.parametrize("words", ["all", "whole"])
def test_tokens_are_in_the_hull_of_the_embeddings(tmp_path, features, architecture, words):
    """Tied and untied heads, embeddings that the model scales: x is p times what the first layer sees."""
    llm = LLM(tiny.write_llm(tmp_path, architecture)).load()
    adapter = make(llm, features, words=words)
    p = adapter.probabilities(features)
    ids = torch.arange(llm.vocab_size)
    if words == "whole":
        ids = torch.tensor([i for i in ids.tolist() if llm.tokenizer.decode([i]).isalpha()])
        assert ids.min() >= SPECIAL
        assert len(ids) < llm.vocab_size
    assert p.shape == (4, 16, len(ids))
    assert p.min() >= 0
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 16))
    torch.testing.assert_close(adapter(features), p @ llm.embed(ids), rtol=1e-4, atol=1e-4)
    # And p is the LM head's own choice, but for its bias.
    hidden = adapter.project(features)
    logits = llm.logits(hidden) - llm.logits(torch.zeros_like(hidden))
    expected = (logits[..., ids] / adapter.temperature).softmax(-1)
    torch.testing.assert_close(p, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("settings", [{}, {"input_norm": "channel", "dropout": 0.5}, {"perplexity": 3}])
def test_the_temperature_sets_the_perplexity(llm, features, scale, settings):
    with torch.no_grad():
        llm.embedding.weight.mul_(scale)  # Of logits, too.
    adapter = make(llm, features, **settings)
    assert adapter.calibrated
    assert adapter.training
    assert mean_perplexity(adapter, features) == pytest.approx(settings.get("perplexity", 10), rel=2e-3)


def test_a_part_of_the_tokens_sets_the_temperature(llm, features, monkeypatch):
    monkeypatch.setattr(vocabulary, "CALIBRATION_TOKENS", 10)
    adapter = make(llm, features)
    part = features.flatten(0, 1)[::7][None]
    assert mean_perplexity(adapter, part) == pytest.approx(10, rel=2e-3)


def test_only_the_map_and_the_norm_are_trained(llm, features):
    adapter = make(llm, features, words="whole")
    names = {f"project.{layer}.{name}" for layer in (0, 1) for name in ("weight", "bias")}
    assert dict(adapter.named_parameters()).keys() == names
    assert adapter.state_dict().keys() == names | {"calibrated", "temperature"}
    before = [p.clone() for p in llm.parameters()]
    adapter(features).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    torch.optim.SGD(adapter.parameters(), 0.1).step()
    assert all(p.grad is None for p in llm.parameters())
    assert all(map(torch.equal, llm.parameters(), before))
    assert adapter(features[:0]).shape == (0, 16, 32)


@pytest.mark.parametrize("words", ["all", "whole"])
def test_words_of_a_patch(llm, features, words):
    adapter = make(llm, features, words=words, dropout=0.5)
    found = adapter.words(features, count=3)
    assert adapter.training
    assert [len(found), len(found[0]), len(found[0][0])] == [4, 16, 3]
    p = adapter.eval().probabilities(features)[2, 5].tolist()
    names = [llm.tokenizer.decode([i]) for i in range(llm.vocab_size)]
    names = [name for name in names if name.isalpha()] if words == "whole" else names
    expected = sorted(zip(names, p, strict=True), key=lambda pair: -pair[1])[:3]
    assert [name for name, _ in found[2][5]] == [name for name, _ in expected]
    assert [weight for _, weight in found[2][5]] == pytest.approx([weight for _, weight in expected])


def test_whole_words_are_the_first(llm, features, monkeypatch):
    monkeypatch.setattr(vocabulary, "WHOLE_WORDS", 12)
    adapter = make(llm, features, words="whole")
    assert {word for image in adapter.words(features, 12) for token in image for word, _ in token} == {
        *tiny.WORDS[:12]
    }


@pytest.mark.parametrize(
    ("words", "count"), [("all", SPECIAL + len(tiny.WORDS)), ("whole", len(tiny.WORDS) - 1)]
)
def test_more_words_than_there_are(llm, words, count):
    adapter = Vocabulary(24, 32, words=words)
    with pytest.raises(ValueError, match=rf"perplexity=50: .* below the {count} words of .*llm"):
        adapter.bind(llm)


def test_wrong_words():
    with pytest.raises(ValueError, match="words='some': allowed are all, whole"):
        Vocabulary(24, 32, words="some")
