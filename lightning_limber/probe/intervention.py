"""Forwards that go on from a layer with something else in the place of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.data.layout import Sequences
from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.models.saes import next_layer

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe


@dataclass(frozen=True)
class _Forward:
    """A forward in which nothing is replaced."""

    sequences: Sequences
    image_tokens: ImageTokens | None
    residuals: dict[str, Tensor]
    """[R, W, D] by hook name."""
    hidden: Tensor
    """[R, W, D] last hidden states."""


class Intervention:
    """One batch's clean forward, whose residual streams are kept, and forwards that branch off from it.

    Losses are cross-entropy in nats, summed over each image's targets, [B] float64, or of each target.

    Args:
        probe: The probe.
        batch: B images, with `Batch.other`.
        known_text: The captions are the same at every probe: see `Probe.run`.
    """

    def __init__(self, probe: Probe, batch: Batch, known_text: bool = False) -> None:
        self.probe, self.batch, self.known_text = probe, batch, known_text
        self._swapped: dict[str, Tensor] = {}
        self._filled: dict[str, dict[str, Tensor]] = {}
        self._tokens = probe.model.image_tokens(batch)
        self._clean = self._forward(batch, self._tokens)

    def image_tokens(self, hook: str, once: bool = False) -> Tensor:
        """[n, D] residual stream at all image positions, or at those of each image's first sequence."""
        positions, _ = self.batch.groups["image" if once else "image_copies"]
        return self._clean.residuals[hook].flatten(0, 1).index_select(0, positions)

    def keep(self, hook: str, x: Tensor) -> Tensor:
        """[n] false at outliers among tokens [n, D]."""
        return self.probe.keep(hook, x.float())

    def splice(self, hook: str, x: Tensor) -> Tensor:
        """What the layer's SAE makes of tokens [n, D]."""
        return self.probe.encode(hook, x.float())[1].to(x)

    @cached_property
    def targets(self) -> Tensor:
        """[B] float64 number of each image's targets."""
        return self._sum(self.batch, torch.ones_like(self.batch.labels, dtype=torch.float64))

    @cached_property
    def clean_label_losses(self) -> Tensor:
        """[n] cross-entropy of every label, with nothing replaced."""
        return self._label_losses(self.batch, self._clean.hidden)

    @cached_property
    def clean_losses(self) -> Tensor:
        """Losses with nothing replaced."""
        return self._sum(self.batch, self.clean_label_losses)

    def label_losses(self, hook: str, new: Tensor) -> Tensor:
        """As `clean_label_losses`, with tokens [n, D] in place of `image_tokens` at this layer."""
        return self._branch(self._clean, hook, self.batch.groups["image_copies"][0], new)

    def token_logits(
        self, labels: Tensor, tokens: Tensor, hook: str = "", new: Tensor | None = None
    ) -> Tensor:
        """[m, k] logits of token ids [m, k] where labels of numbers [m] stand, all before them as it is.

        With nothing replaced, or with tokens `new` as in `label_losses`.
        """
        hidden = self._clean.hidden
        if new is not None:
            hidden = self._decode(self._clean, hook, self.batch.groups["image_copies"][0], new)
        rows = hidden.flatten(0, 1).index_select(0, self.batch.label_positions[labels])
        return self.probe.model.llm.token_logits(rows, tokens)

    def losses(self, hook: str, new: Tensor) -> Tensor:
        """Losses with tokens [n, D] in place of `image_tokens` at this layer."""
        return self._sum(self.batch, self.label_losses(hook, new))

    def swapped_losses(self, hook: str) -> Tensor:
        """Losses with another image's residual stream in place of `image_tokens` at this layer."""
        if hook not in self._swapped:
            _, images = self.batch.groups["image_copies"]
            # [B, p, D]; an image that stands in several sequences is replaced in all of them.
            other = self._others[hook].unflatten(0, (len(self.batch.index), -1))
            copies = images.view(-1, other.shape[1])[:, 0]
            new = other.index_select(0, copies).flatten(0, 1)
            # What enters at later layers is the other image's, too.
            clean = replace(self._clean, image_tokens=self._other_tokens)
            losses = self._branch(clean, hook, self.batch.groups["image_copies"][0], new)
            self._swapped[hook] = self._sum(self.batch, losses)
        return self._swapped[hook]

    def spliced_text_losses(self, hook: str) -> Tensor:
        """[B, 2] losses of the captions without an image: clean, and with caption tokens spliced."""
        text = self._text
        positions, _ = text.sequences.groups["caption"]
        x = text.residuals[hook].flatten(0, 1).index_select(0, positions)
        spliced = self._branch(text, hook, positions, self.splice(hook, x))
        clean = self._label_losses(text.sequences, text.hidden)
        return torch.stack([self._sum(text.sequences, losses) for losses in (clean, spliced)], dim=-1)

    def filled(self, group: str) -> dict[str, Tensor]:
        """[n, D] by hook name: what the LLM makes of a group that stands in the image's place."""
        if group not in self._filled:
            tokens = self.probe.filled(self.probe.groups[group], self.batch, self._tokens)
            self._filled[group] = self._read(self.batch, tokens)
        return self._filled[group]

    @cached_property
    def _others(self) -> dict[str, Tensor]:
        assert self.batch.other is not None
        return self._read(self.batch.other, self._other_tokens)

    @cached_property
    def _other_tokens(self) -> ImageTokens:
        assert self.batch.other is not None
        return self.probe.model.image_tokens(self.batch.other)

    @cached_property
    def _text(self) -> _Forward:
        assert self.batch.without_image is not None
        return self._forward(self.batch.without_image, None)

    def _read(self, batch: Batch, tokens: ImageTokens) -> dict[str, Tensor]:
        """[n, D] at image positions by hook name. No token sees what follows it: captions are left out."""
        sequences, found = batch.without_captions, {}
        assert sequences is not None
        positions, _ = sequences.groups["image"]

        def keep(name: str, residual: Tensor) -> None:
            found[name] = residual.flatten(0, 1).index_select(0, positions)

        model = self.probe.model
        with model.llm.residual_hooks({name: partial(keep, name) for name in self.probe.saes}):
            model.decode(sequences, tokens)
        return found

    def _forward(self, sequences: Sequences, tokens: ImageTokens | None) -> _Forward:
        model = self.probe.model
        residuals: dict[str, Tensor] = {}
        keep = residuals.__setitem__
        with model.llm.residual_hooks({name: partial(keep, name) for name in self.probe.saes}):
            hidden = model.decode(sequences, tokens)
        return _Forward(sequences, tokens, residuals, hidden)

    def _branch(self, clean: _Forward, hook: str, positions: Tensor, new: Tensor) -> Tensor:
        return self._label_losses(clean.sequences, self._decode(clean, hook, positions, new))

    def _decode(self, clean: _Forward, hook: str, positions: Tensor, new: Tensor) -> Tensor:
        """[R, W, D] last hidden states with tokens `new` at flat positions of this layer."""
        residual = clean.residuals[hook]
        spliced = residual.flatten(0, 1).index_copy(0, positions, new).view_as(residual)
        return self.probe.model.decode_from(next_layer(hook), spliced, clean.sequences, clean.image_tokens)

    def _label_losses(self, sequences: Sequences, hidden: Tensor) -> Tensor:
        return self.probe.model.target_losses(sequences, hidden)[0]

    def _sum(self, sequences: Sequences, values: Tensor) -> Tensor:
        """Sums values [n] of the targets by image: [B] float64."""
        values = values.double()
        return values.new_zeros(len(self.batch.ids)).index_add_(0, sequences.label_images, values)
