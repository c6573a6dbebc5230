"""Where BOS, prompt text, image tokens and captions go, and how records become one batch.

A prompt is a string with the markers ``{bos}``, ``{image}``, ``{caption}``, ``{eos}``:

    LiMBeR           "{image}{caption}{eos}"
    captions         "{bos}{image}Describe the picture. {caption}{eos}"

or a list of chat messages, rendered with the tokenizer's own chat template:

    [{role: user, content: "{image}Describe the picture."}, {role: assistant, content: "{caption}"}]

or, for records that are conversations, their own turns in that chat template:

    LLaVA            "{conversation}"              the image opens the first user turn
    Venhoff et al.   "{bos}{image}{conversation}"  the image stands before the conversation

Everything before the image is the prefix; what follows it is the text. The loss is taken on the
caption (the assistant's turns) and on each end token: the one that directly follows a caption.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_limber.backbones import ImageTransform

if TYPE_CHECKING:
    from PIL.Image import Image

Template = str | list[dict[str, str]]
Turns = list[tuple[str, str]]
"""(user, assistant) pairs, in order."""

CAPTION_QUESTION = "Describe the image concisely."
"""What a model that is trained on conversations is asked when it shall write a caption."""


@dataclass
class Record:
    """One image with what is known about it, as a data set yields it."""

    id: str
    image: Image | None
    """None: a record of text alone (training only)."""
    captions: list[str]
    scene: dict[str, Any] | None = None
    """Ground truth of a drawn scene: objects, boxes, attributes, relations, background."""
    turns: Turns | None = None
    """The conversation about the image; its answers are the captions then."""


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


class Prompt:
    """A template bound to a tokenizer.

    Args:
        template: See this file's head.
        tokenizer: Of the LLM. It needs no padding token.
        max_caption_tokens: Longer captions are cut there (the end token stays); of a conversation, the
            whole text.
    """

    def __init__(self, template: Template, tokenizer: Any, max_caption_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_caption_tokens = max_caption_tokens
        if not isinstance(template, str):
            template = self._render(list(template))
        self.is_conversation = "{conversation}" in template
        # Alone, the conversation has the image within it: where its first user turn begins.
        self._image_within = template == "{conversation}"
        if self._image_within:
            template = "{image}{conversation}"
        caption = "{conversation}" if self.is_conversation else "{caption}"
        for marker in ("{image}", caption):
            if template.count(marker) != 1:
                raise ValueError(f"model.prompt needs {marker} exactly once, given: {template!r}")
        if template.index(caption) < template.index("{image}"):
            raise ValueError(f"model.prompt: {caption} must follow {{image}}, given: {template!r}")
        for marker, name in (("{bos}", "bos_token"), ("{eos}", "eos_token")):
            token = getattr(tokenizer, name)
            if marker in template and token is None:
                raise ValueError(
                    f"model.prompt has {marker} but this tokenizer has no {name}; leave it out or write "
                    "the token you want as text."
                )
            template = template.replace(marker, token or "")
        prefix, text = template.split("{image}")
        self.before, self.after = text.split(caption)
        if self.is_conversation:
            # Made once here, so that a tokenizer that has no chat template is met before training.
            opening = self._between_turns(1)[0]
            if self._image_within:
                prefix = opening
        self.prefix_ids: list[int] = self._encode(prefix)

    def _render(self, messages: list[dict[str, str]]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "model.prompt needs a chat template, and this tokenizer has no chat template. Choose an "
                "instruction-tuned LLM, or write the prompt as one string, for example "
                '"{bos}{image}{caption}{eos}".'
            )
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    @lru_cache(maxsize=256)  # noqa: B019 (one prompt lives as long as its process)
    def _between_turns(self, count: int) -> list[str]:
        """The chat template's own text around `count` turns: before, between and after the contents."""
        messages = []
        for i in range(count):
            messages.append({"role": "user", "content": f"⟦{2 * i}⟧"})
            messages.append({"role": "assistant", "content": f"⟦{2 * i + 1}⟧"})
        rendered = self._render(messages)
        pieces = re.split(r"⟦\d+⟧", rendered)
        if len(pieces) != 2 * count + 1:
            raise ValueError(f"This tokenizer's chat template does not keep all turns: {rendered!r}.")
        bos = self.tokenizer.bos_token
        if not self._image_within and bos:
            # What stands before the image already opens the sequence.
            pieces[0] = pieces[0].removeprefix(bos)
        return pieces

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    @property
    def generation_ids(self) -> list[int]:
        """Tokens between image and caption: what stands there when the LLM starts to write."""
        if self.is_conversation:
            text, spans = self._conversation([(CAPTION_QUESTION, "?")], has_image=True)
            before = text[: spans[0][0]]
        else:
            before = self.before
        # A space that ends the prompt belongs to the caption's first token.
        return self._encode(before.rstrip(" "))

    @property
    def end_ids(self) -> list[int]:
        """Tokens at which a caption is over: EOS, and the special token that the prompt puts behind it."""
        after = self._between_turns(1)[2] + self.after if self.is_conversation else self.after
        tokens = self.tokenizer.added_tokens_decoder
        ends = [i for i in self._encode(after)[:1] if i in tokens and tokens[i].special]
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *ends]))

    def text(
        self, caption: str | Turns, has_image: bool = True
    ) -> tuple[list[int], list[bool], list[bool], bool]:
        """Tokens after the image, which of them are caption, which are targets; and whether any was cut."""
        if not isinstance(caption, str) and not self.is_conversation:
            if len(caption) > 1:
                raise ValueError(
                    f'model.prompt has "{{caption}}", but a record has {len(caption)} turns: use '
                    '"{conversation}" or "{bos}{image}{conversation}".'
                )
            caption = caption[0][1]
        if isinstance(caption, str):
            if self.is_conversation:
                raise ValueError(
                    'model.prompt has "{conversation}", but this data set has captions without turns: use '
                    '"{caption}", or chat messages around it.'
                )
            whole = f"{self.before}{caption}{self.after}"
            spans = [(len(self.before), len(self.before) + len(caption))]
        else:
            whole, spans = self._conversation(caption, has_image)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        is_caption = [_inside(spans, a, b) for a, b in offsets]
        if isinstance(caption, str):
            if not any(is_caption):
                raise ValueError(f"This tokenizer makes no token of the caption {caption!r}.")
            first = is_caption.index(True)
            last = len(is_caption) - is_caption[::-1].index(True)  # One past the caption.
            cut = min(last, first + self.max_caption_tokens)
            ids = ids[:cut] + ids[last:]
            is_caption = is_caption[:cut] + is_caption[last:]
            is_target = [is_cap or i == cut for i, is_cap in enumerate(is_caption)]
            return ids, is_caption, is_target, cut < last
        # The end token of each turn is the one after its last.
        is_target = [here or before for here, before in zip(is_caption, [False, *is_caption], strict=False)]
        limit = self.max_caption_tokens
        return ids[:limit], is_caption[:limit], is_target[:limit], len(ids) > limit

    def _conversation(self, turns: Turns, has_image: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text after the image, and where the assistant's turns are in it."""
        pieces = self._between_turns(len(turns))
        text = "\n" * has_image if self._image_within else self.before + pieces[0]
        spans = []
        for i, (user, assistant) in enumerate(turns):
            text += user + pieces[2 * i + 1]
            spans.append((len(text), len(text) + len(assistant)))
            text += assistant + pieces[2 * i + 2]
        return text + self.after, spans


def _inside(spans: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether characters [start, end) touch one of the ordered spans."""
    i = bisect_right(spans, (end - 1, float("inf"))) - 1
    return i >= 0 and end > start and start < spans[i][1]


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
