"""Where BOS, prompt text, image tokens and caption go, and how records become one batch.

A template is a string with the markers ``{bos}``, ``{image}``, ``{caption}``, ``{eos}``:

    LiMBeR           "{image}{caption}{eos}"
    Venhoff et al.   "{bos}{image}Describe the picture. {caption}{eos}"

or a list of chat messages, rendered with the tokenizer's own chat template:

    [{role: user, content: "{image}Describe the picture."}, {role: assistant, content: "{caption}"}]

Everything before ``{image}`` is the prefix; what follows it is the text. The loss is taken on the
caption's tokens and on the end token: the one that directly follows the caption.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_limber.backbones import ImageTransform

if TYPE_CHECKING:
    from PIL.Image import Image

Template = str | list[dict[str, str]]


@dataclass
class Record:
    """One image with what is known about it, as a data set yields it."""

    id: str
    image: Image
    captions: list[str]
    scene: dict[str, Any] | None = None
    """Ground truth of a drawn scene: objects, boxes, attributes, relations, background."""


@dataclass
class Batch:
    """B images and N >= B sequences, each [prefix | image | text], padded on the right.

    No attention mask is needed: in a causal model nothing real comes after the padding.
    """

    ids: list[str]
    """Names of the images, B."""
    pixel_values: Tensor
    """[B, 3, H, W]"""
    image_index: Tensor
    """[N] which image each sequence is about."""
    prefix_ids: Tensor
    """[T0] tokens before the image, the same in every sequence."""
    text_ids: Tensor
    """[N, T] tokens after the image."""
    is_caption: Tensor
    """[N, T] true at caption tokens (padding, prompt text and end token are false)."""
    target_index: Tensor
    """[n, 2] sequence and text position of every token that the loss is taken on."""
    captions: list[list[str]] = field(default_factory=list)
    """All captions of each image, B."""
    scenes: list[dict[str, Any] | None] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    """Places of the images in their data set, B."""

    def pin_memory(self) -> Batch:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.pin_memory())
        return self


class Prompt:
    """A template bound to a tokenizer."""

    def __init__(self, template: Template, tokenizer: Any, max_caption_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_caption_tokens = max_caption_tokens
        if not isinstance(template, str):
            template = self._render_chat(list(template))
        for marker in ("{image}", "{caption}"):
            if template.count(marker) != 1:
                raise ValueError(f"model.prompt needs {marker} exactly once, given: {template!r}")
        if template.index("{caption}") < template.index("{image}"):
            raise ValueError(f"model.prompt: {{caption}} must follow {{image}}, given: {template!r}")
        for marker, name in (("{bos}", "bos_token"), ("{eos}", "eos_token")):
            token = getattr(tokenizer, name)
            if marker in template and token is None:
                raise ValueError(
                    f"model.prompt has {marker} but this tokenizer has no {name}; leave it out or write "
                    "the token you want as text."
                )
            template = template.replace(marker, token or "")
        prefix, text = template.split("{image}")
        self.before, self.after = text.split("{caption}")
        self.prefix_ids: list[int] = self._encode(prefix)

    def _render_chat(self, messages: list[dict[str, str]]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "model.prompt is a list of chat messages but this tokenizer has no chat template. "
                'Write the prompt as one string, for example "{bos}{image}{caption}{eos}".'
            )
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    @property
    def generation_ids(self) -> list[int]:
        """Tokens between image and caption: what stands there when the LLM starts to write."""
        # A space that ends the prompt belongs to the caption's first token.
        return self._encode(self.before.rstrip(" "))

    def text(self, caption: str) -> tuple[list[int], list[bool], list[bool]]:
        """Tokens after the image, and which of them are caption and which are targets."""
        encoded = self.tokenizer(
            f"{self.before}{caption}{self.after}",
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
        start, end = len(self.before), len(self.before) + len(caption)
        is_caption = [a < end and b > start for a, b in encoded["offset_mapping"]]
        ids = encoded["input_ids"]
        first = is_caption.index(True)
        last = len(is_caption) - is_caption[::-1].index(True)  # One past the caption.
        cut = min(last, first + self.max_caption_tokens)
        ids = ids[:cut] + ids[last:]
        is_caption = is_caption[:cut] + is_caption[last:]
        is_target = [is_cap or i == cut for i, is_cap in enumerate(is_caption)]
        return ids, is_caption, is_target


class Collator:
    """Records -> Batch. Images are transformed and captions tokenised here, in the loader's worker."""

    def __init__(self, transform: ImageTransform, prompt: Prompt) -> None:
        self.transform = transform
        self.prompt = prompt

    def __call__(
        self, records: Sequence[Record], captions: Sequence[Sequence[str]], index: Sequence[int] = ()
    ) -> Batch:
        """Makes the batch.

        Args:
            records: B images.
            captions: Of each image those to make sequences of, at least one.
            index: Places of the images in their data set.
        """
        texts = [self.prompt.text(caption) for chosen in captions for caption in chosen]
        width = max(len(ids) for ids, _, _ in texts)
        text_ids = torch.zeros(len(texts), width, dtype=torch.long)
        is_caption = torch.zeros(len(texts), width, dtype=torch.bool)
        is_target = torch.zeros(len(texts), width, dtype=torch.bool)
        for row, (ids, caption_mask, target_mask) in enumerate(texts):
            text_ids[row, : len(ids)] = torch.tensor(ids)
            is_caption[row, : len(ids)] = torch.tensor(caption_mask)
            is_target[row, : len(ids)] = torch.tensor(target_mask)
        counts = torch.tensor([len(chosen) for chosen in captions])
        return Batch(
            ids=[record.id for record in records],
            pixel_values=torch.stack([self.transform(record.image) for record in records]),
            image_index=torch.arange(len(records)).repeat_interleave(counts),
            prefix_ids=torch.tensor(self.prompt.prefix_ids, dtype=torch.long),
            text_ids=text_ids,
            is_caption=is_caption,
            target_index=is_target.nonzero(),
            captions=[record.captions for record in records],
            scenes=[record.scene for record in records],
            index=list(index),
        )


def choose_captions(captions: list[str], count: int, seed: tuple) -> list[str]:
    """`count` of the captions, without repetition, as a pure function of `seed`."""
    if len(captions) <= count:
        return captions
    return random.Random(repr(seed)).sample(captions, count)
