"""Forwards that go on from a layer with something else in the place of image tokens."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.probe.saes import hook_layer
from lightning_limber.probe.token_stats import ImageStats

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe


def next_layer(hook: str) -> int:
    """The layer that the residual stream at this hook enters."""
    return hook_layer(hook) + hook.endswith("post")


class Intervention:
    """One batch's clean forward, whose residual streams are kept, and forwards that branch off from it.

    Args:
        probe: The probe.
        batch: B images.
        stats: Sums by (group, hook name) over all probed images, of the layers at hand.
    """

    def __init__(self, probe: Probe, batch: Batch, stats: dict[tuple[str, str], ImageStats]) -> None:
        self.probe, self.batch, self.stats = probe, batch, stats
        self.residuals: dict[str, Tensor] = {}
        """[R, W, D] by hook name."""
        model = probe.model
        embeds = model.embed_sequences(batch, model.image_tokens(batch))
        keep = self.residuals.__setitem__
        with model.llm.residual_hooks({name: partial(keep, name) for name in probe.saes}):
            self.hidden = model.llm.decode(embeds)

    def image_tokens(self, hook: str, once: bool = False) -> Tensor:
        """[n, D] residual stream at all image positions, or at those of each image's first sequence."""
        positions, _ = self.batch.groups["image" if once else "image_copies"]
        return self.residuals[hook].flatten(0, 1).index_select(0, positions)

    def keep(self, hook: str, x: Tensor) -> Tensor:
        """[n] false at outliers among tokens [n, D]."""
        return self.probe.keep(hook, x.float())

    @cached_property
    def clean_label_losses(self) -> Tensor:
        """[n] cross-entropy of every label, with nothing replaced."""
        return self.probe.model.target_losses(self.batch, self.hidden)[0]

    @cached_property
    def clean_losses(self) -> Tensor:
        """[B] float64 cross-entropy summed over each image's labels, with nothing replaced."""
        return self._by_image(self.clean_label_losses)

    def label_losses(self, hook: str, new: Tensor) -> Tensor:
        """As `clean_label_losses`, with tokens [n, D] in place of `image_tokens` at this layer."""
        residual, (positions, _) = self.residuals[hook], self.batch.groups["image_copies"]
        spliced = residual.flatten(0, 1).index_copy(0, positions, new).view_as(residual)
        hidden = self.probe.model.llm.decode(spliced, first_layer=next_layer(hook))
        return self.probe.model.target_losses(self.batch, hidden)[0]

    def losses(self, hook: str, new: Tensor) -> Tensor:
        """As `clean_losses`, with tokens [n, D] in place of `image_tokens` at this layer."""
        return self._by_image(self.label_losses(hook, new))

    def _by_image(self, losses: Tensor) -> Tensor:
        sums = losses.new_zeros(len(self.batch.ids)).double()
        return sums.index_add_(0, self.batch.label_images, losses.double())
