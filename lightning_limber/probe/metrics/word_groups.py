"""Groups of words in the image's place: what the numbers are of random words, and of the right ones.

    words_long  random tokens of the vocabulary at the image tokens' norms: the sharpest control
                (where image tokens enter behind layer 0: as the LLM has them there)
    words       the same tokens at their own norms: text without sense
    told        the tokens of the caption's content words: the right content, as text

An image's words are a function of its name, or of its captions, alone. Every metric that measures all
groups measures these too. Each costs a forward of the image positions, and their SAEs.
"""

from __future__ import annotations

import zlib
from itertools import cycle, islice

import torch
from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.models.limber import Limber
from lightning_limber.models.llm import LLM
from lightning_limber.probe import words
from lightning_limber.probe.metrics.base import Group, ProbeMetric


def random_words(llm: LLM, names: list[str], count: int) -> Tensor:
    """Random token ids [B, count] without special tokens; an image's are a function of its name."""
    size = min(llm.vocab_size, len(llm.tokenizer))
    known = llm.tokenizer.added_tokens_decoder.items()
    special = sorted(i for i, token in known if token.special and i < size)
    drawn = torch.empty(len(names), count, dtype=torch.long)
    for row, name in zip(drawn, names, strict=True):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        row.random_(0, size - len(special), generator=generator)
    for token in special:  # Those from here on are one further.
        drawn += drawn >= token
    return drawn


def content_tokens(llm: LLM, captions: list[str], count: int) -> list[int]:
    """Token ids of the captions' content words in order, each word once, repeated or cut to `count`.

    Captions without any give all their tokens; no captions give EOS.
    """
    text = " ".join(words.content_words(". ".join(captions))) or " ".join(captions)
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    ids = llm.tokenizer(f" {text}", **plain)["input_ids"] if text else []
    return list(islice(cycle(ids or [llm.tokenizer.eos_token_id]), count))


def _words(model: Limber, batch: Batch, image_tokens: Tensor) -> Tensor:
    ids = random_words(model.llm, batch.image_ids, image_tokens.shape[1])
    return model.llm.embed(ids.to(image_tokens.device))


def _at_entry(model: Limber, batch: Batch, embeds: Tensor) -> Tensor:
    """What the layers below the image tokens' make of embeddings [B, P, D] in the image's place."""
    layer, sequences = model.entry.config.layer, batch.without_captions
    if not layer or sequences is None:
        return embeds
    found: list[Tensor] = []
    with model.llm.residual_hooks({f"blocks.{layer}.hook_resid_pre": found.append}):
        model.decode(sequences, ImageTokens(embeds))
    return found[0].flatten(0, 1)[sequences.image_positions].view_as(embeds)


def _words_long(model: Limber, batch: Batch, image_tokens: Tensor) -> Tensor:
    embeds = _at_entry(model, batch, _words(model, batch, image_tokens)).to(image_tokens)
    norm = embeds.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return embeds * (image_tokens.norm(dim=-1, keepdim=True) / norm)


def _told(model: Limber, batch: Batch, image_tokens: Tensor) -> Tensor:
    count = image_tokens.shape[1]
    ids = torch.tensor([content_tokens(model.llm, captions, count) for captions in batch.captions])
    return model.llm.embed(ids.to(image_tokens.device))


class WordsLong(ProbeMetric):
    """Adds the group `words_long`, random words of the image tokens' norms; it has no number of its own."""

    name = "words_long"
    groups = (Group("words_long", "image", _words_long),)


class Words(ProbeMetric):
    """Adds the group `words`, random words; it has no number of its own."""

    name = "words"
    groups = (Group("words", "image", _words, as_text=True),)


class Told(ProbeMetric):
    """Adds the group `told`, the caption's content words; it has no number of its own."""

    name = "told"
    groups = (Group("told", "image", _told, as_text=True),)
