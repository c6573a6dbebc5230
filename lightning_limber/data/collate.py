"""Records -> one batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_limber.models.vision import ImageTransform

if TYPE_CHECKING:
    pass
from lightning_limber.data.prompt import Prompt
from lightning_limber.data.records import Record, Turns


@dataclass
class Batch:
    """B images and N sequences, each [prefix | image | text], padded on the right.

    No attention mask is needed: in a causal model nothing real comes after the padding. Only where
    several captions share a sequence, `caption_number` says which tokens see each other.
    """

    ids: list[str]
    """Names of the records, one for each image and each text-only sequence."""
    pixel_values: Tensor
    """[B, 3, H, W]"""
    image_index: Tensor
    """[N] which image each sequence is about; -1 for text alone: [prefix | text]."""
    prefix_ids: Tensor
    """[T0] tokens before the image, the same in every sequence."""
    text_ids: Tensor
    """[N, T] tokens after the image."""
    is_caption: np.ndarray
    """[N, T] true at caption tokens (padding, prompt text and end tokens are false); on the host."""
    target_index: Tensor
    """[n, 2] sequence and text position of every token that the loss is taken on."""
    text_tokens: int = 0
    """Tokens of all texts together; the rest of [N, T] is padding."""
    lengths: list[int] = field(default_factory=list)
    """Of each sequence the tokens, without those of the image, that come before its last target; N."""
    image_of: list[int] = field(default_factory=list)
    """`image_index`, on the host."""
    caption_number: Tensor | None = None
    """[N, T] which of the sequence's captions each token belongs to, where they share an image."""
    truncated: list[bool] = field(default_factory=list)
    """Whether each caption was cut to ``max_caption_tokens``."""
    captions: list[list[str]] = field(default_factory=list)
    """All captions of each image, B."""
    scenes: list[dict[str, Any] | None] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    """Places of the images in their data set, B."""
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """Records that could not be read and are not in the batch: place in their data set and reason."""

    @property
    def has_image(self) -> list[bool]:
        """Whether each sequence is about an image; N."""
        return [image >= 0 for image in self.image_of]

    @property
    def text_only(self) -> int:
        """Sequences without an image."""
        return self.has_image.count(False)

    def pin_memory(self) -> Batch:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.pin_memory())
        return self


def images(batch: Batch) -> int:
    """Images of a batch, as Lightning's ThroughputMonitor asks for them (``batch_size_fn``)."""
    return len(batch.pixel_values)


class Collator:
    """Records -> Batch. Images are transformed and captions tokenised here, in the loader's worker."""

    def __init__(self, transform: ImageTransform, prompt: Prompt) -> None:
        self.transform = transform
        self.prompt = prompt

    def __call__(
        self,
        records: Sequence[Record],
        captions: Sequence[Sequence[str | Turns]],
        index: Sequence[int] = (),
        skipped: Sequence[tuple[int, str]] = (),
        share_prefix: bool = False,
    ) -> Batch:
        """Makes the batch.

        Args:
            records: B images, and records without one.
            captions: Of each record those to make sequences of, at least one: captions or conversations.
            index: Places of the records in their data set.
            skipped: Passed on to the batch.
            share_prefix: Put all captions of a record into one sequence, [prefix | image | caption 1 |
                caption 2 | ...], instead of a sequence each.
        """
        has_image = [record.image is not None for record in records]
        place = torch.tensor(has_image, dtype=torch.long).cumsum(0) - 1  # Of each record among the images.
        texts = [
            [self.prompt.text(caption, has) for caption in chosen]
            for has, chosen in zip(has_image, captions, strict=True)
        ]
        # A process' share of a batch of which nothing could be read: one sequence without a target.
        texts = texts or [[([0], [False], [False], False)]]
        # Of each sequence its captions.
        sequences = texts if share_prefix else [[text] for chosen in texts for text in chosen]
        width = max(sum(len(ids) for ids, *_ in row) for row in sequences)
        text_ids = torch.zeros(len(sequences), width, dtype=torch.long)
        is_caption = np.zeros((len(sequences), width), dtype=bool)
        is_target = torch.zeros(len(sequences), width, dtype=torch.bool)
        number = torch.full((len(sequences), width), -1)
        for row, parts in enumerate(sequences):
            start = 0
            for i, (ids, caption_mask, target_mask, _) in enumerate(parts):
                here = slice(start, start := start + len(ids))
                text_ids[row, here] = torch.tensor(ids)
                is_caption[row, here] = caption_mask
                is_target[row, here] = torch.tensor(target_mask)
                number[row, here] = i
        counts = [1 if share_prefix else len(chosen) for chosen in captions]
        image_index = torch.where(torch.tensor(has_image, dtype=torch.bool), place, -1)
        image_index = image_index.repeat_interleave(torch.tensor(counts, dtype=torch.long))
        image_index = image_index if records else torch.tensor([-1])
        last_target = (is_target * torch.arange(width)).amax(1).tolist()
        with_image = [record for record in records if record.image is not None]
        pixels = [self.transform(record.image) for record in with_image]  # type: ignore[arg-type]
        return Batch(
            ids=[record.id for record in records],
            pixel_values=torch.stack(pixels) if pixels else torch.zeros(0, 3, 1, 1),
            image_index=image_index,
            prefix_ids=torch.tensor(self.prompt.prefix_ids, dtype=torch.long),
            text_ids=text_ids,
            is_caption=is_caption,
            target_index=is_target.nonzero(),
            text_tokens=sum(len(ids) for row in sequences for ids, *_ in row),
            lengths=[len(self.prompt.prefix_ids) + last for last in last_target],
            image_of=image_index.tolist(),
            caption_number=number if any(len(row) > 1 for row in sequences) else None,
            truncated=[cut for row in sequences for *_, cut in row],
            captions=[record.captions for record in with_image],
            scenes=[record.scene for record in with_image],
            index=[i for i, has in zip(index, has_image, strict=False) if has],
            skipped=list(skipped),
        )


def choose_captions(record: Record, count: int, seed: tuple) -> Sequence[str | Turns]:
    """What to make sequences of: the record's conversation, or `count` of its captions.

    The captions are drawn without repetition, as a pure function of `seed`.
    """
    if record.turns is not None:
        return [record.turns]
    if len(record.captions) <= count:
        return record.captions
    return random.Random(repr(seed)).sample(record.captions, count)
