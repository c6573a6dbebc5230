"""The frozen head's loss against torch's cross-entropy over the whole logits."""

from __future__ import annotations

import pytest
import tiny
import torch

from lightning_limber.models import head_loss as losses
from lightning_limber.models.head_loss import FrozenHeadLoss
from lightning_limber.models.llm import LLM


def reference(hidden, weight, bias, targets, softcap):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(
        -1
    ) == targets


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_and_gradient_are_those_of_the_whole_logits(rows_at_a_time, with_bias, softcap, monkeypatch):
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 4 * 50 * rows_at_a_time)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=generator)
    bias = torch.randn(50, generator=generator) if with_bias else None
    targets = torch.randint(50, (10,), generator=generator)
    start = torch.randn(10, 16, generator=generator)
    targets[::2] = torch.nn.functional.linear(start, weight, bias).argmax(-1)[::2]
    outer = torch.rand(10, generator=generator)
    found = []
    for fn in (FrozenHeadLoss.apply, reference):
        hidden = start.clone().requires_grad_()
        loss, correct = fn(hidden, weight, bias, targets, softcap)
        (loss * outer).sum().backward()
        found.append((loss.detach(), correct, hidden.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert 0 < found[0][1].sum() < 10


def test_bf16_weights_round_as_autocast_does():
    generator = torch.Generator().manual_seed(0)
    weight, start = torch.randn(400, 32, generator=generator), torch.randn(20, 32, generator=generator)
    targets = torch.randint(400, (20,), generator=generator)
    grads, values = [], []
    for fused in (True, False):
        hidden = start.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fused:
                loss, _ = FrozenHeadLoss.apply(hidden, weight.bfloat16(), None, targets, None)
            else:
                logits = torch.nn.functional.linear(hidden, weight).float()
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss.sum().backward()
        values.append(loss.detach())
        grads.append(hidden.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0], grads[1], rtol=0.02, atol=0.02)


def test_no_logits_are_kept_and_none_of_the_gradient_where_it_is_not_wanted():
    weight = torch.randn(5000, 8)
    targets = torch.randint(5000, (64,))
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        FrozenHeadLoss.apply(torch.randn(64, 8, requires_grad=True), weight, None, targets, None)
    assert kept == [64 * 8]
    with torch.no_grad():
        loss, _ = FrozenHeadLoss.apply(torch.randn(64, 8), weight, None, targets, None)
    assert not loss.requires_grad


def test_nothing_to_predict():
    hidden = torch.zeros(0, 8, requires_grad=True)
    loss, correct = FrozenHeadLoss.apply(hidden, torch.randn(20, 8), None, torch.zeros(0).long(), None)
    loss.sum().backward()
    assert len(loss) == len(correct) == hidden.grad.numel() == 0


def test_training_goes_on_after_inference_mode(monkeypatch):
    """Memory that is kept from one to the other can be written to in both."""
    monkeypatch.setattr(losses, "_kept", {})
    weight, targets = torch.randn(50, 8), torch.randint(50, (6,))
    hidden = torch.randn(6, 8)
    with torch.inference_mode():
        first, _ = FrozenHeadLoss.apply(hidden, weight, None, targets, None)
    assert losses._kept
    again, _ = FrozenHeadLoss.apply(hidden.clone().requires_grad_(), weight, None, targets, None)
    assert torch.equal(again, first)
    again.sum().backward()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gptj"])
def test_logits_of_some_tokens(architecture, tmp_path):
    """With a soft cap (Gemma 2) and with a bias (GPT-J); under autocast in float32."""
    llm = LLM(tiny.write_llm(tmp_path, architecture)).load()
    generator = torch.Generator().manual_seed(0)
    if architecture == "gptj":
        bias = llm.model.get_output_embeddings().bias
        bias.copy_(torch.randn(bias.shape, generator=generator))
    hidden = 20 * torch.randn(7, 32, generator=generator)
    tokens = torch.randint(llm.vocab_size, (7, 3), generator=generator)
    expected = llm.logits(hidden).gather(1, tokens)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(llm.token_logits(hidden, tokens), expected, rtol=1e-5, atol=1e-5)
