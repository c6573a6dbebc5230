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

Special tokens are the template's. What a record says is text: `</s>` in a caption is four characters.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from lightning_limber.data.records import Template, Turns, UnreadableRecord

CAPTION_QUESTION = "Describe the image concisely."
"""What a model that is trained on conversations is asked when it shall write a caption."""


MARKERS = ("{bos}", "{image}", "{caption}", "{conversation}", "{eos}")


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
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"model.llm: its tokenizer ({type(tokenizer).__name__}) is written in Python only and does "
                "not say which characters a token stands for. Choose an LLM with a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.max_caption_tokens = max_caption_tokens
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special.sort(key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        check_template(template)
        if not isinstance(template, str):
            template = self._render(list(template))
        self.is_conversation = "{conversation}" in template
        # Alone, the conversation has the image within it: where its first user turn begins.
        self._image_within = template == "{conversation}"
        if self._image_within:
            template = "{image}{conversation}"
        caption = _check_markers(template)  # Of a chat template that drops or repeats messages too.
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
            before, between, _ = self._conversation(1, has_image=True)
            before += CAPTION_QUESTION + between
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
            said = [caption]
            pieces = [self.before, self.after]
        else:
            said = [text for turn in caption for text in turn]
            pieces = self._conversation(len(caption), has_image)
        ids, offsets, spans = self._tokens(pieces, said)
        if not isinstance(caption, str):
            spans = spans[1::2]
        is_caption = [_inside(spans, a, b) for a, b in offsets]
        if isinstance(caption, str):
            if not any(is_caption):
                raise UnreadableRecord(f"this tokenizer makes no token of the caption {caption!r}")
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
        _, offsets, [(start, end)] = self._tokens([self.before, self.after], [caption])
        inside = [(a - start, b - start) for a, b in offsets if _inside([(start, end)], a, b)]
        return inside[: self.max_caption_tokens]

    def _conversation(self, count: int, has_image: bool) -> list[str]:
        """The template's text after the image, around the contents of `count` turns of each side."""
        first, *others, last = self._between_turns(count)
        opening = "\n" * has_image if self._image_within else self.before + first
        return [opening, *others, last + self.after]

    def _tokens(
        self, pieces: list[str], said: list[str]
    ) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
        """Tokens of `said` with the template's `pieces` around and between, as one text.

        Returns:
            Token ids, the characters that each stands for, and those of each of `said`.
        """
        whole, spans = "", []
        special: list[tuple[int, int]] = []  # The template's own.
        for piece, text in zip(pieces, [*said, ""], strict=True):
            start = len(whole)
            special += [(start + m.start(), start + m.end()) for m in self._special.finditer(piece)]
            whole += piece + text
            spans.append((start + len(piece), len(whole)))
        spans.pop()
        if not any(self._special.search(text) for text in said):
            encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
            return encoded["input_ids"], encoded["offset_mapping"], spans
        # The text between the template's special tokens is encoded as one without any.
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for begin, end in [*special, (len(whole), len(whole))]:
            if start < begin:
                encoded = self.tokenizer(
                    whole[start:begin],
                    add_special_tokens=False,
                    return_offsets_mapping=True,
                    split_special_tokens=True,
                )
                ids += encoded["input_ids"]
                offsets += [(a + start, b + start) for a, b in encoded["offset_mapping"]]
            if begin < end:
                ids.append(self.tokenizer.convert_tokens_to_ids(whole[begin:end]))
                offsets.append((begin, end))
            start = end
        return ids, offsets, spans


def _inside(spans: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether characters [start, end) touch one of the ordered spans."""
    i = bisect_right(spans, (end - 1, float("inf"))) - 1
    return i >= 0 and end > start and start < spans[i][1]


def check_template(template: Template) -> None:
    """Checks what of a prompt can be checked without a tokenizer.

    Raises:
        ValueError: a marker is unknown, is missing or stands twice, or the caption precedes the image.
    """
    said = template if isinstance(template, str) else "".join(turn.get("content", "") for turn in template)
    for marker in re.findall(r"\{\w*\}", said):
        if marker not in MARKERS:
            near = get_close_matches(marker, MARKERS, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"model.prompt: '{marker}' is given, known are {' '.join(MARKERS)}.{hint}")
    if said != "{conversation}":
        _check_markers(said)


def _check_markers(template: str) -> str:
    """The marker of the caption."""
    caption = "{conversation}" if "{conversation}" in template else "{caption}"
    for marker in ("{image}", caption):
        if template.count(marker) != 1:
            raise ValueError(f"model.prompt needs {marker} exactly once, given: {template!r}")
    if template.index(caption) < template.index("{image}"):
        raise ValueError(f"model.prompt: {caption} must follow {{image}}, given: {template!r}")
    return caption
