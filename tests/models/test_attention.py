"""Rows masked in blocks by FlexAttention, here uncompiled on a CPU, are rows under whole masks."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from torch.nn.attention import flex_attention as flex

from lightning_limber.data import layout
from lightning_limber.data.layout import RowMask
from lightning_limber.data.scenes import SceneSet
from lightning_limber.models import attention
from lightning_limber.models.attention import block_mask, can_flex
from lightning_limber.models.entry import EntryConfig
from lightning_limber.models.limber import Limber
from lightning_limber.models.llm import LLM
from lightning_limber.models.vision import VisionConfig
from lightning_limber.utils.flops import FlopCounter

ROWS = RowMask(
    torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 2, -1, -1, -1]]),
    torch.tensor([[0, 0, 1, 1, 2, 2, 0, 1], [0, 1, 1, 2, 2, 0, 0, 0]]),
)


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of queries that FlexAttention saw.

    torch has its backward on a CPU, but lets nobody use it; and compiling takes minutes.
    """
    seen = []

    def uncompiled(query, key, value, training, **kwargs):
        if not torch.compiler.is_compiling():
            seen.append(tuple(query.shape))
        return flex.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled
    )
    return seen


@pytest.mark.parametrize("hidden", [None, torch.arange(16).view(2, 8) % 3 == 0])
def test_blocks_are_the_whole_mask(hidden):
    rows = ROWS._replace(hidden=hidden)
    made = block_mask(rows, 8, torch.device("cpu"))
    row, place = torch.arange(2), torch.arange(8)
    seen = made.mask_mod(row[:, None, None], torch.tensor(0), place[:, None], place)
    assert torch.equal(seen, rows.dense()[:, 0])
    assert (made.to_dense()[:, 0, 0, 0] == 1).all()  # Of 128 places.
    assert seen.any(-1).all()  # Nowhere is a softmax over nothing.


def test_who_sees_whom():
    assert ROWS.dense()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],  # The second caption does not see the first.
        [1, 1, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]


EVERYTHING = {"layer": 1, "inject": [1, 2], "hold": True}


def made(models, llm: str, **entry) -> Limber:
    vision = VisionConfig(str(models / "vision"), image_size=32, pool=2)
    model = Limber(vision, llm, entry=EntryConfig(**entry))
    model.configure_model()
    return model


@pytest.mark.parametrize(("architecture", "entry"), [("llama", {}), ("gemma2", {}), ("gemma2", EVERYTHING)])
def test_losses_and_gradients_are_those_under_whole_masks(
    models, tmp_path, monkeypatch, calls, architecture, entry
):
    """Packed rows, captions that share an image in packed rows, and plain ones; text first or not."""
    model = made(models, tiny.write_llm(tmp_path, architecture), **entry)
    records = [SceneSet("train", 100, 112, 0)[i] for i in range(4)]
    records[1].image = None
    captions = [[record.captions[0], "a red cat ."] for record in records]
    monkeypatch.setattr(layout, "fill_rows", lambda lengths, *_: [[0, 1], [*range(2, len(lengths))]])
    for options in ({}, {"share_prefix": True}, {"for_probe": True}):
        batch = model.collator()(records, captions if options else [c[:1] for c in captions], **options)
        assert (batch.row_mask() is None) == ("for_probe" in options)
        for text_first in (False, True):
            # Text alone runs through the layers below, without a gradient.
            layers = 3 - (text_first and entry.get("layer", 0))
            decode = partial(model.decode, text_first=text_first)
            found = []
            for model.llm.uses_flex in (False, True):
                calls.clear()
                model.zero_grad()
                losses, _ = model.target_losses(batch, decode(batch, model.image_tokens(batch)))
                losses.sum().backward()
                found.append([losses.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
                assert len(calls) == layers * model.llm.uses_flex
            for whole, blocks in zip(*found, strict=True):
                torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-5)


def test_what_keeps_whole_masks(models, tmp_path, calls):
    """A forward whose FLOPs are counted or that is no training step, and rows beyond a sliding window."""
    model = made(models, tiny.write_llm(tmp_path, "gemma2"))
    batch = model.collator()([SceneSet("train", 100, 112, 0)[0]], [["a red cat ."]])
    tokens = model.image_tokens(batch)
    expected = model.decode(batch, tokens)
    model.llm.uses_flex = True
    with FlopCounter() as counter:
        assert torch.equal(model.decode(batch, tokens), expected)
    assert counter.total > 0
    with torch.no_grad():
        assert torch.equal(model.decode(batch, tokens), expected)
    model.llm.longest_row = expected.shape[1] - 1
    assert torch.equal(model.decode(batch, tokens), expected)
    assert not calls
    model.llm.longest_row = expected.shape[1]
    torch.testing.assert_close(model.decode(batch, tokens), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3


def test_it_is_used_where_it_gives_the_same(tmp_path, monkeypatch, calls):
    said: list[str] = []
    monkeypatch.setattr(attention, "rank_zero_info", said.append)
    served = {}
    for architecture in ("llama", "gemma2", "gptj"):
        llm = LLM(tiny.write_llm(tmp_path / architecture, architecture)).load()
        served[architecture] = can_flex(llm, torch.bfloat16)
    assert served == {"llama": True, "gemma2": True, "gptj": False}
    assert len(calls) == 6  # Of three layers.
    assert not said
    flex_rows = attention._flex_rows
    monkeypatch.setattr(attention, "_flex_rows", lambda *a, **k: flex_rows(*a, **{**k, "scaling": 1.0}))
    llm = LLM(str(tmp_path / "llama")).load()
    assert not can_flex(llm, torch.bfloat16)
    assert "without FlexAttention, because it differs by " in said[0]

    def no_compiler(*_args, **_kwargs):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(attention, "_flex_rows", no_compiler)
    assert not can_flex(llm, torch.bfloat16)
    assert said[1].endswith("because RuntimeError: no C compiler")


@pytest.mark.slow
def test_compiled_layers_take_blocks(tmp_path, monkeypatch):
    """Rows of any shape, by the graphs that the first ones made. (Without torch's own compiler behind.)"""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    llm = LLM(tiny.write_llm(tmp_path, "gemma2")).load()
    inputs = []
    for rows, length in ((3, 12), (2, 15), (5, 14)):
        segment = torch.arange(length).ge(length // 2).long().expand(rows, -1)
        mask = RowMask(segment, torch.zeros_like(segment))
        positions = torch.arange(length).expand(rows, -1) - segment * (length // 2)
        inputs.append((torch.randn(rows, length, 32, requires_grad=True), 2, mask, positions))
    expected = [torch.autograd.grad(llm.decode(*args).square().sum(), args[0]) for args in inputs]
    llm.compile_layers()
    llm.uses_flex = True
    torch._dynamo.utils.counters.clear()
    graphs = []
    for args, wanted in zip(inputs, expected, strict=True):
        got = torch.autograd.grad(llm.decode(*args).square().sum(), args[0])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3
    assert graphs[0] > 0
