"""Lays sequences [prefix | image | text] into rows of tokens, in the loader's worker.

A sequence is about one image, or about none. Its text is a caption with the prompt around it, or a
conversation. Several captions of one image can share a sequence, [prefix | image | caption 1 | caption 2 |
...]: each sees itself and what precedes all captions. Short sequences can share a row (packing.py).

Shapes: B images of P image tokens each, N sequences in R rows of W positions, n labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_limber.data.packing import fill_rows
from lightning_limber.data.prompt import Text


class Parts(NamedTuple):
    """The image and the texts of one sequence."""

    image: int
    """Index among the batch's images; -1: no image."""
    texts: Sequence[Text]


class Packing(NamedTuple):
    """Limits for sequences that share a row; see `packing.fill_rows`."""

    hidden_size: int
    longest_row: int | None


class RowMask(NamedTuple):
    """Which token of a row sees which: of its own sequence those before it, but no other caption's.

    The tensors are of one shape, [R, W] as they come.
    """

    segment: Tensor
    """Number of each token's sequence."""
    caption: Tensor
    """Number of the caption in its sequence, from 1; 0 before the captions, which all of them see."""
    hidden: Tensor | None = None
    """True at tokens that only their like see; None: there are none."""

    def at(self, *index: Any) -> RowMask:
        """The tokens at an index, or at several."""
        return RowMask(*(None if ids is None else ids[index] for ids in self))  # type: ignore[arg-type]

    def sees(self, other: RowMask) -> Tensor:
        """Whether these tokens see others, pair by pair, if they stand behind them."""
        sees = self.segment == other.segment
        sees = sees & ((other.caption == 0) | (self.caption == other.caption))
        if self.hidden is None or other.hidden is None:
            return sees
        return sees & ~(other.hidden & ~self.hidden)

    def dense(self) -> Tensor:
        """[R, 1, W, W] true where the row's token sees the column's."""
        return self.at(slice(None), slice(None), None).sees(self.at(slice(None), None)).tril()[:, None]

    def gathered(self, places: Tensor) -> RowMask:
        """Of the tokens at places [R, T] of each row."""
        return RowMask(*(None if ids is None else ids.gather(1, places) for ids in self))  # type: ignore[arg-type]


@dataclass(kw_only=True)
class Sequences:
    """N sequences in R rows of W positions, padded on the right.

    Flat positions count through the rows: position w of row r is r * W + w.
    """

    input_ids: Tensor
    """[R, W] token ids; 0 at image tokens and padding."""
    position_ids: Tensor
    """[R, W] position of each token in its own sequence, from 0."""
    segment_ids: Tensor | None = None
    """[R, W] number of the sequence, -1 at padding; None: plain causal rows, a sequence each."""
    caption_ids: Tensor | None = None
    """[R, W] number of the caption in its sequence, from 1; 0 before the captions."""
    image_positions: Tensor
    """[s * P] flat positions of the image tokens of s sequences ..."""
    image_rows: Tensor
    """[s * P] ... and which of the batch's B * P image tokens stands there."""
    labels: Tensor
    """[n] tokens to be predicted, in the order of the sequences."""
    label_positions: Tensor
    """[n] flat position that predicts each of them."""
    label_images: Tensor
    """[n] image of each label's sequence; -1: none."""
    label_counts: list[int]
    """Number of labels of each of the N sequences (on the host)."""
    text_width: int
    """Largest number of positions in a row where no image token stands, padding included."""
    used_positions: int
    """Number of positions that some label needs; the rest of R * W is padding."""
    groups: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Tokens that the probe reads: flat positions [m], and the image [m] that each belongs to.

    ``image`` holds an image's tokens once, ``image_copies`` those in all its sequences, ``caption`` those
    of the captions but the first, ``prompt`` all of a sequence. The first position of a sequence is in no
    group: whatever stands there is an attention sink. Nor, but in ``prompt``, is a caption's first token:
    without an image it follows the same tokens in every caption, and is mostly the same word, so that it is
    one datum for all of them.
    """

    def row_mask(self) -> RowMask | None:
        """Which token sees which; None: all before it."""
        if self.segment_ids is None or self.caption_ids is None:
            return None
        return RowMask(self.segment_ids, self.caption_ids)


class _Laid(NamedTuple):
    """One sequence of L tokens, before it has a row."""

    ids: np.ndarray
    position_ids: np.ndarray
    caption_ids: np.ndarray
    start: int
    """Tokens before the captions."""
    targets: np.ndarray
    """[n] positions of the tokens to be predicted ..."""
    predictors: np.ndarray
    """[n] ... and the position that predicts each."""
    captions: np.ndarray
    """Positions of the captions' tokens, without each one's first."""

    @property
    def used(self) -> int:
        return max(1, int(self.targets[-1]) if len(self.targets) else self.start)


def _lay(parts: Parts, prefix_ids: list[int], image_tokens: int) -> _Laid:
    start = len(prefix_ids) + image_tokens * (parts.image >= 0)
    lengths = [len(text.ids) for text in parts.texts]
    ids = np.zeros(start + sum(lengths), dtype=np.int64)
    ids[: len(prefix_ids)] = prefix_ids
    ids[start:] = [token for text in parts.texts for token in text.ids]
    position_ids = np.concatenate([np.arange(start), *(start + np.arange(length) for length in lengths)])
    caption_ids = np.repeat(np.arange(1 + len(lengths)), [start, *lengths])
    # Position t predicts token t + 1; a caption's first token is predicted from the last position before
    # all captions.
    predictors = np.arange(len(ids)) - 1
    predictors[(caption_ids > 0) & (position_ids == start)] = start - 1
    is_target = np.array([False] * start + [is_it for text in parts.texts for is_it in text.is_target])
    is_target &= predictors >= 0  # Nothing precedes the first token of a text without prefix and image.
    is_caption = np.array([False] * start + [is_it for text in parts.texts for is_it in text.is_caption])
    captions = is_caption.nonzero()[0]
    captions = np.delete(captions, np.unique(caption_ids[captions], return_index=True)[1])
    targets = is_target.nonzero()[0]
    return _Laid(ids, position_ids, caption_ids, start, targets, predictors[targets], captions)


def lay_out(
    sequences: Sequence[Parts],
    prefix_ids: list[int],
    image_tokens: int,
    packing: Packing | None = None,
    groups: bool = False,
) -> Sequences:
    """Lays sequences into rows, and says where labels and image tokens are.

    Args:
        sequences: The N sequences.
        prefix_ids: Tokens before the image, the same in every sequence.
        image_tokens: Number P of image tokens of one image.
        packing: Lets sequences share rows where that saves time; None gives each a row of its own.
        groups: Also say which tokens the probe reads. Not together with `packing`.
    """
    laid = [_lay(parts, prefix_ids, image_tokens) for parts in sequences]
    width = max(len(sequence.ids) for sequence in laid)
    rows = [[i] for i in range(len(laid))]
    used = [sequence.used for sequence in laid]
    if packing is not None:
        rows = fill_rows(used, width, packing.hidden_size, packing.longest_row)
    packed = len(rows) < len(laid)
    if packed:  # What no label needs is left out.
        width = max(sum(used[i] for i in row) for row in rows)
    input_ids, position_ids, caption_ids = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
    segment_ids = np.full((len(rows), width), -1)
    starts = np.zeros(len(laid), dtype=np.int64)  # Flat position of each sequence's first token.
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            length = used[i] if packed else len(laid[i].ids)
            here = slice(start, start + length)
            input_ids[r, here] = laid[i].ids[:length]
            position_ids[r, here] = laid[i].position_ids[:length]
            caption_ids[r, here] = laid[i].caption_ids[:length]
            segment_ids[r, here] = i
            starts[i] = r * width + start
            start += length
        if not packed:
            position_ids[r, start:] = np.arange(start, width)  # Positions of plain rows only count up.
    images = np.array([parts.image for parts in sequences])
    counts = [len(sequence.targets) for sequence in laid]
    with_image = (images >= 0).nonzero()[0]
    offsets = np.arange(image_tokens)
    is_plain = not packed and all(len(parts.texts) < 2 for parts in sequences)
    made = Sequences(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        segment_ids=None if is_plain else torch.from_numpy(segment_ids),
        caption_ids=None if is_plain else torch.from_numpy(caption_ids),
        image_positions=_flat(starts[with_image, None] + len(prefix_ids) + offsets),
        image_rows=_flat(images[with_image, None] * image_tokens + offsets),
        labels=_flat([sequence.ids[sequence.targets] for sequence in laid]),
        label_positions=_flat(
            [start + sequence.predictors for start, sequence in zip(starts, laid, strict=True)]
        ),
        label_images=torch.from_numpy(np.repeat(images, counts)),
        label_counts=counts,
        text_width=width - min(image_tokens * sum(images[i] >= 0 for i in row) for row in rows),
        used_positions=sum(used),
    )
    if groups:
        # An image with several captions stands in several sequences: it counts once.
        first = with_image[np.unique(images[with_image], return_index=True)[1]]
        before = np.arange(len(prefix_ids) == 0, image_tokens) + len(prefix_ids)
        captions = [one.captions[one.captions > 0] for one in laid]
        prompts = [np.arange(1, len(one.ids)) for one in laid]

        def of_sequences(places: list[np.ndarray]) -> tuple[Tensor, Tensor]:
            flat = [start + of_one for start, of_one in zip(starts, places, strict=True)]
            return _flat(flat), torch.from_numpy(np.repeat(images, [len(found) for found in places]))

        made.groups = {
            "image": (_flat(starts[first, None] + before), _each(images[first], len(before))),
            "image_copies": (
                _flat(starts[with_image, None] + before),
                _each(images[with_image], len(before)),
            ),
            "caption": of_sequences(captions),
            "prompt": of_sequences(prompts),
        }
    return made


def _flat(values: np.ndarray | list[np.ndarray]) -> Tensor:
    flat = np.concatenate(values) if isinstance(values, list) else values.reshape(-1)
    return torch.from_numpy(flat.astype(np.int64))


def _each(values: np.ndarray, times: int) -> Tensor:
    return torch.from_numpy(np.repeat(values, times))
