"""From pixels to the loss of captions and to captions: encoder, adapter, entry and LLM in one forward.

Shapes use the legend of llm.py: B images, N sequences, P image tokens, T0 prefix and T text
tokens, S = T0 + P + T, D_l the LLM's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_limber.data.collate import Batch, Collator
from lightning_limber.data.layout import Packing, Sequences
from lightning_limber.data.prompt import Prompt
from lightning_limber.models.adapters import Adapter
from lightning_limber.models.entry import Entry
from lightning_limber.models.feature_cache import FeatureCache, KeptFeatures
from lightning_limber.models.generation import Caption, Decoding, generate
from lightning_limber.models.image_tokens import ImageTokens, decode_text_first, embed_sequences, entering
from lightning_limber.models.llm import LLM
from lightning_limber.models.vision import VisionConfig, VisionEncoder


class Captioner(pl.LightningModule):
    """A frozen encoder, an adapter, and a frozen LLM that captions what they put into it.

    The frozen models are no submodules: no checkpoint, optimiser or DDP bucket holds them, and `train()`
    cannot reach them. `_apply` still moves them with the module.
    """

    vision: VisionEncoder
    llm: LLM
    adapter: Adapter
    entry: Entry
    num_image_tokens: int
    feature_shape: tuple[int, ...]
    """(P_v, D_v)"""

    def __init__(self, vision: VisionConfig, llm: str) -> None:
        super().__init__()
        # Straight into __dict__: a submodule would be saved, optimised, wrapped and set to train.
        self.__dict__["vision"] = VisionEncoder(vision)
        self.__dict__["llm"] = LLM(llm)
        self._collator: Collator | None = None
        self.cache: FeatureCache | None = None
        """Features of training images on disk."""
        self.kept = KeptFeatures(0)
        """Features of held-out images in memory."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Captioner:
        for frozen in (self.vision, self.llm):
            frozen._apply(fn)
        return super()._apply(fn, recurse)

    def collator(self) -> Collator:
        """Makes batches for this model, once it is configured."""
        if self._collator is None:
            prompt = Prompt(self.hparams["prompt"], self.llm.tokenizer, self.hparams["max_caption_tokens"])
            packing = Packing(self.llm.hidden_size, self.llm.longest_row)
            self._collator = Collator(self.vision.transform, prompt, self.num_image_tokens, packing)
        return self._collator

    def features(self, batch: Batch) -> Tensor:
        """The encoder's features [B, P_v, D_v] of a batch; those that are kept are not computed again."""
        if not len(batch.pixel_values):  # Text alone: the adapter still takes part, for DDP's sake.
            return batch.pixel_values.new_zeros(0, *self.feature_shape)
        kept: FeatureCache | KeptFeatures | None = self.cache if self.training else None
        key: Any = batch.index
        if batch.held_out:
            kept, key = self.kept, batch.image_ids
        if kept is not None and (known := kept.read(key)) is not None:
            return known.to(self.device)
        features = self.vision(batch.pixel_values)
        if kept is not None:
            kept.write(key, features)
        return features

    def image_tokens(self, batch: Batch) -> ImageTokens:
        """What the batch's B images put into the LLM."""
        return self.made_of(self.features(batch))

    def made_of(self, features: Tensor) -> ImageTokens:
        """What features [B, P_v, D_v] put into the LLM."""
        return self.entry(self.adapter(features), features)

    def decode(
        self, sequences: Sequences, image_tokens: ImageTokens | None, text_first: bool = False
    ) -> Tensor:
        """Last hidden states [R, W, D_l] of sequences with image tokens in their places.

        Args:
            sequences: On the model's device.
            image_tokens: None: the sequences have no images.
            text_first: Run the layers below the image tokens' over text alone, which is faster. Hooks there
                see shorter rows.
        """
        # A mask cannot separate rows longer than a sliding window.
        is_short = sequences.text_width <= (self.llm.longest_row or 0)
        if text_first and is_short and image_tokens is not None and image_tokens.layer:
            return decode_text_first(self.llm, sequences, image_tokens)
        embeds = embed_sequences(self.llm, sequences, image_tokens)  # [R, W, D_l]
        with entering(self.llm, sequences, image_tokens):
            mask = sequences.row_mask()
            return self.llm.decode(embeds, mask=mask, positions=sequences.position_ids)

    def decode_from(
        self, layer: int, residual: Tensor, sequences: Sequences, image_tokens: ImageTokens | None
    ) -> Tensor:
        """Last hidden states of the residual stream [R, W, D_l] that enters a layer, with all that has
        been written there; what is written behind it is written as in `decode`.
        """
        with entering(self.llm, sequences, image_tokens):
            return self.llm.decode(residual, first_layer=layer)

    def target_losses(self, sequences: Sequences, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats [n] and correctness [n] of every label, from the last hidden states."""
        rows = hidden.flatten(0, 1).index_select(0, sequences.label_positions)  # [n, D_l]
        return self.llm.token_losses(rows, sequences.labels)

    def forward(self, batch: Batch) -> tuple[ImageTokens, Tensor, Tensor]:
        """Image tokens of B images, and losses [n] and correctness [n] of the labels."""
        features = self.features(batch)  # [B, P_v, D_v], no gradient
        image_tokens = self.entry(self.adapter(features), features)  # [B, P, D_l]; where they enter
        hidden = self.decode(batch, image_tokens, text_first=True)  # [R, W, D_l]
        losses, correct = self.target_losses(batch, hidden)  # [n] each
        return image_tokens, losses, correct

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """Rows and columns of an image's tokens, see `Adapter.token_grid`."""
        return self.adapter.token_grid(self.vision.grid)

    def opening(self, images: int | None) -> Sequences:
        """What captions of so many images go on from, on the model's device; see `Collator.opening`."""
        opening = self.collator().opening(images)
        return apply_to_collection(opening, Tensor, lambda tensor: tensor.to(self.device))

    def generate(
        self,
        image_tokens: ImageTokens | None,
        decoding: Decoding | None = None,
        log_probabilities: bool = False,
    ) -> list[Caption]:
        """Captions of B images (None: one caption without an image); see generation.py.

        Raises:
            ValueError: image tokens enter behind layer 0, and captions outgrow the LLM's sliding window.
        """
        if image_tokens is not None and not len(image_tokens):
            return []
        opening = self.opening(None if image_tokens is None else len(image_tokens))
        embeds, decoding = embed_sequences(self.llm, opening, image_tokens), decoding or Decoding()
        longest, window = embeds.shape[1] + decoding.max_new_tokens, self.llm.longest_row or 0
        if image_tokens is not None and image_tokens.layer and longest > window:
            raise ValueError(
                f"model.entry.layer={image_tokens.layer}: captions of {decoding.max_new_tokens} tokens "
                f"make rows of {longest}, more than the window of {self.llm.name}, {window}: image tokens "
                "could not be hidden below it. Lower max_new_tokens, or set model.entry.layer to 0."
            )
        with entering(self.llm, opening, image_tokens):
            return generate(self.llm, embeds, self.collator().prompt.end_ids, decoding, log_probabilities)
