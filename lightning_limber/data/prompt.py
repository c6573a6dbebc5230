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

import re
from bisect import bisect_right
from functools import lru_cache
from typing import Any, NamedTuple

from lightning_limber.data.records import Template, Turns

CAPTION_QUESTION = "Describe the image concisely."
"""What a model that is trained on conversations is asked when it shall write a caption."""


class Text(NamedTuple):
    """The tokens after the image."""

    ids: list[int]
    is_caption: list[bool]
    is_target: list[bool]
    """Whether the loss is taken on the token: the caption, and what ends it."""
    truncated: bool = False


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

    def text(self, caption: str | Turns, has_image: bool = True) -> Text:
        """The tokens after the image, for a caption or a conversation."""
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
            return Text(ids, is_caption, is_target, cut < last)
        # The end token of each turn is the one after its last.
        is_target = [here or before for here, before in zip(is_caption, [False, *is_caption], strict=False)]
        limit = self.max_caption_tokens
        return Text(ids[:limit], is_caption[:limit], is_target[:limit], len(ids) > limit)

    def caption_spans(self, caption: str) -> list[tuple[int, int]]:
        """Characters [start, end) of a caption that its tokens stand for, those that `text` keeps."""
        start, end = len(self.before), len(self.before) + len(caption)
        whole = f"{self.before}{caption}{self.after}"
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [
            (a - start, b - start) for a, b in encoded["offset_mapping"] if _inside([(start, end)], a, b)
        ]
        return offsets[: self.max_caption_tokens]

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
