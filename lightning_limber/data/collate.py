"""Records -> one batch: images become pixels, captions tokens, and both are laid into rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_limber.data.layout import Packing, Parts, Sequences, lay_out
from lightning_limber.data.prompt import Prompt, Text
from lightning_limber.data.records import Record, Skipped, Turns, UnreadableRecord

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(kw_only=True)
class Batch(Sequences):
    """B images and the sequences about them.

    Lightning moves the tensors to the device; lists stay on the host.
    """

    ids: list[str]
    """Names of the records, with an image or without."""
    pixel_values: Tensor
    """[B, 3, H, W]"""
    image_ids: list[str]
    """Names of the records with an image, B."""
    index: list[int]
    """Index of each image in its data set, B."""
    captions: list[list[str]]
    """All captions of each image, B."""
    scenes: list[dict[str, Any] | None]
    """Truth of each image where it is known, B."""
    truncated: list[bool]
    """Whether each caption was cut to ``max_caption_tokens``."""
    own_labels: int
    """The first so many labels are of the images' own captions, the others (a control, in validation) of
    another image's."""
    without_image: Sequences | None = None
    """The same captions without their images; for the probe."""
    without_captions: Sequences | None = None
    """The same images without captions, a sequence each; for the probe."""
    other: Batch | None = None
    """Another image for each, with other captions, laid out without captions; for interventions."""
    held_out: bool = False
    """Whether the images are of a fixed set that comes again: their features are worth keeping."""
    skipped: list[Skipped] = field(default_factory=list)
    """Records that could not be read and are not in the batch."""

    def pin_memory(self) -> Batch:
        return apply_to_collection(self, Tensor, Tensor.pin_memory)


def num_images(batch: Batch) -> int:
    """Images of a batch, as Lightning's ThroughputMonitor asks for them (``batch_size_fn``)."""
    return len(batch.pixel_values)


class Collator:
    """Records -> Batch; runs in the loader's worker.

    Args:
        transform: PIL image -> pixel values [3, H, W].
        prompt: Places image and caption.
        image_tokens: Image tokens P of one image.
        packing: The LLM's limits for sequences that share a row; None gives each a row of its own.
    """

    def __init__(
        self,
        transform: Callable[[Image], Tensor],
        prompt: Prompt,
        image_tokens: int,
        packing: Packing | None = None,
    ) -> None:
        self.transform = transform
        self.prompt = prompt
        self.image_tokens = image_tokens
        self.packing = packing

    def __call__(
        self,
        records: Sequence[Record],
        captions: Sequence[Sequence[str | Turns]],
        index: Sequence[int] = (),
        skipped: Sequence[Skipped] = (),
        *,
        share_prefix: bool = False,
        other_captions: Sequence[Sequence[str | Turns]] = (),
        others: Sequence[Record] = (),
        for_probe: bool = False,
    ) -> Batch:
        """Makes the batch.

        Args:
            records: B images, and records without one.
            captions: The captions or conversations of each record that sequences are made of.
            index: Index of each record in its data set.
            skipped: Passed on to the batch.
            share_prefix: Put all captions of a record into one sequence instead of one each.
            other_captions: Also make sequences of these captions of other images, behind the others.
            others: Another image for each record, for the batch's `other`.
            for_probe: Give each sequence a row of its own, name its groups of tokens, and lay out the
                captions without their images too, and the images without their captions.
        """
        texts, lost = self._texts(records, captions)
        if lost:  # A caption of which the tokenizer makes nothing.
            skipped = [*skipped, *(Skipped(index[i], records[i].id, why) for i, why in lost.items())]
            kept = [i for i in range(len(records)) if i not in lost]
            records, index = [records[i] for i in kept], [index[i] for i in kept]
            texts = [texts[i] for i in kept]
            other_captions = [other_captions[i] for i in kept] if other_captions else ()
            others = [others[i] for i in kept] if others else ()
        image_of: list[int] = []  # Index of each record's image among the batch's; -1: it has none.
        with_image: list[Record] = []
        for record in records:
            image_of.append(-1 if record.image is None else len(with_image))
            with_image += [] if record.image is None else [record]
        sequences: list[Parts] = []
        own = 0
        for of_records in (texts, self._texts(records, other_captions)[0] if other_captions else []):
            for image, said in zip(image_of, of_records, strict=False):
                groups = [said] if share_prefix else [[text] for text in said]
                sequences += [Parts(image, group) for group in groups if group]
            own = own or len(sequences)
        # Nothing could be read, or nothing is said: one sequence without a label.
        if not sequences:
            sequences, own = [Parts(-1, [Text([0], [False], [False])])], 1
        prefix, packing = self.prompt.prefix_ids, None if for_probe else self.packing
        laid = lay_out(sequences, prefix, self.image_tokens, packing, groups=for_probe)
        alone = lay_out(sequences, prefix, 0, groups=True) if for_probe else None
        openings = None
        if for_probe and with_image:
            images = [Parts(image, []) for image in range(len(with_image))]
            openings = lay_out(images, prefix, self.image_tokens, groups=True)
        pixels = [self.transform(record.image) for record in with_image]  # type: ignore[arg-type]
        return Batch(
            **vars(laid),
            ids=[record.id for record in records],
            pixel_values=torch.stack(pixels) if pixels else torch.zeros(0, 3, 1, 1),
            image_ids=[record.id for record in with_image],
            index=[i for i, image in zip(index, image_of, strict=False) if image >= 0],
            captions=[record.captions for record in with_image],
            scenes=[record.scene for record in with_image],
            truncated=[text.truncated for parts in sequences[:own] for text in parts.texts],
            own_labels=sum(laid.label_counts[:own]),
            without_image=alone,
            without_captions=openings,
            other=self(others, [[]] * len(others), for_probe=True) if others else None,
            skipped=list(skipped),
        )

    def _texts(
        self, records: Sequence[Record], captions: Sequence[Sequence[str | Turns]]
    ) -> tuple[list[list[Text]], dict[int, str]]:
        """The tokens of each record's captions, and by place why those of a record are none."""
        texts: list[list[Text]] = []
        lost: dict[int, str] = {}
        for i, (record, chosen) in enumerate(zip(records, captions, strict=True)):
            try:
                has_image = record.image is not None
                texts.append([self.prompt.text(caption, has_image) for caption in chosen])
            except UnreadableRecord as error:
                texts.append([])
                lost[i] = str(error)
        return texts, lost

    def opening(self, images: int | None) -> Sequences:
        """What the LLM goes on from when it writes a caption: [prefix | image | prompt text].

        Args:
            images: Number of images, a sequence each. None: one sequence without an image. A prompt with
                neither prefix nor text then opens with BOS (EOS, if the tokenizer has no BOS), because the
                LLM cannot go on from nothing.
        """
        ids, prefix = self.prompt.generation_ids, self.prompt.prefix_ids
        if images is None and not prefix and not ids:
            tokenizer = self.prompt.tokenizer
            bos = tokenizer.bos_token_id
            prefix = [tokenizer.eos_token_id if bos is None else bos]
        text = Text(ids, [False] * len(ids), [False] * len(ids))
        parts = [Parts(-1, [text])] if images is None else [Parts(i, [text]) for i in range(images)]
        return lay_out(parts, prefix, self.image_tokens)


def choose_captions(record: Record, count: int, seed: tuple) -> Sequence[str | Turns]:
    """What to make sequences of: the record's conversation, or `count` of its captions.

    The captions are drawn without repetition, as a pure function of `seed`.
    """
    if record.turns is not None:
        return [record.turns]
    if len(record.captions) <= count:
        return record.captions
    return random.Random(repr(seed)).sample(record.captions, count)
