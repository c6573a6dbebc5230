"""Captions of a few held-out images, written by the model at each validation and shown beside them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_limber.data import CaptionData
from lightning_limber.model import Limber

from .figures import caption_figure, log_figure


class CaptionSamples(pl.Callback):
    """Generates captions, logs them beside their images and, where the truth is known, scores them.

    Where the data set can score a caption (`CaptionData.score_caption`; scenes can, exactly), the share
    of right slots is logged as ``captions/{slot}``, and ``captions_chance/{slot}`` is the same with each
    caption scored against the next image's truth: what a model that is blind to the image reaches.

    Args:
        num_images: Held-out images that are captioned; 0 switches this off.
        num_shown: How many of them are drawn.
        max_new_tokens: Longest caption.
    """

    def __init__(self, num_images: int = 64, num_shown: int = 8, max_new_tokens: int = 48) -> None:
        self.num_images = num_images
        self.num_shown = num_shown
        self.max_new_tokens = max_new_tokens

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Limber)
        # One process writes: generation is a small part of the time, and its loader is not split. (All
        # write the same where each has only a part of the LLM.)
        if trainer.sanity_checking or not self.num_images:
            return
        if not trainer.is_global_zero and not pl_module.llm.sharded:
            return
        data: CaptionData = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.probe_dataloader(self.num_images)
        loader.rank, loader.world_size = 0, 1
        written: list[str] = []
        references: list[str] = []
        scenes: list[Any] = []
        shown: list[torch.Tensor] = []
        for batch in loader:
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.val_step_context():
                written += pl_module.generate(batch.pixel_values, self.max_new_tokens)
            references += [captions[0] for captions in batch.captions]
            scenes += batch.scenes
            pixels = batch.pixel_values[: self.num_shown - len(shown)].float().cpu()
            shown += list(pl_module.vision.transform.undo(pixels))
        if not trainer.is_global_zero:
            return
        figure = caption_figure(shown, references, written)
        log_figure(trainer, "captions", figure)
        values = slot_shares(data, written, scenes, "captions") | slot_shares(
            data, written, scenes[1:] + scenes[:1], "captions_chance"
        )
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if values:
            self._print(trainer, values)

    def _print(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        slots = [name.split("/")[1] for name in values if name.startswith("captions/")]
        parts = [
            f"{slot} {values[f'captions/{slot}']:.0%} ({values[f'captions_chance/{slot}']:.0%})"
            for slot in slots
        ]
        print(f"[captions] step {trainer.global_step}: right slots (chance): {', '.join(parts)}")


def slot_shares(data: CaptionData, written: list[str], scenes: list[Any], prefix: str) -> dict[str, float]:
    """Share of right slots by kind of slot, and over ``all`` of them; empty without ground truth."""
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    for caption, scene in zip(written, scenes, strict=True):
        for slot, (hits, count) in (data.score_caption(caption, scene) or {}).items():
            # `held_out` repeats slots of other kinds: it is not counted twice.
            for name in (slot,) if slot == "held_out" else (slot, "all"):
                right[name] = right.get(name, 0) + hits
                total[name] = total.get(name, 0) + count
    return {f"{prefix}/{slot}": right[slot] / total[slot] for slot in total}
