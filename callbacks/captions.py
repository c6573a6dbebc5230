"""Captions of a few held-out images, written by the model at each validation, shown and scored."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_limber.data import CaptionData
from lightning_limber.model import Limber
from lightning_limber.scores import Score, caption_scores

from .figures import caption_figure, log_figure


class CaptionSamples(pl.Callback):
    """Generates captions, logs them beside their images and scores them.

    Scores against the images' own captions (see lightning_limber/scores.py) are logged as
    ``captions/{score}``: cider_d, bleu_4, rouge_l and, with a CLIP, clip_score and ref_clip_score. With
    their 95 % bootstrap intervals over images they go to ``captions.csv`` in the run's folder (run, epoch,
    metric, value, low, high). ``validate`` and ``test`` score the checkpoint that they are given, as the
    last epoch that it finished. ``captions_epoch_{n}.jsonl`` holds the captions of the drawn images, with a
    small JPEG of each.

    Where the data set can score a caption (`CaptionData.score_caption`; scenes can, exactly), the share
    of right slots is logged as ``captions/{slot}``, and ``captions_chance/{slot}`` is the same with each
    caption scored against the next image's truth: what a model that is blind to the image reaches.

    Args:
        num_images: Held-out images that are captioned; 0 switches this off.
        num_shown: How many of them are drawn.
        max_new_tokens: Longest caption.
        clip: Name or folder of a CLIP of transformers, such as ``openai/clip-vit-base-patch32`` (the one
            that published CLIPScores come from); null leaves out the scores that need one.
    """

    def __init__(
        self, num_images: int = 64, num_shown: int = 8, max_new_tokens: int = 48, clip: str | None = None
    ) -> None:
        self.num_images = num_images
        self.num_shown = num_shown
        self.max_new_tokens = max_new_tokens
        self.clip = clip
        self.history: dict[int, dict[str, Score]] = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Limber)
        # One process writes: generation is a small part of the time, and its loader is not split. (All
        # write the same where each has only a part of the LLM.)
        if trainer.sanity_checking or not self.num_images:
            return
        folder = trainer.log_dir  # Asks all processes.
        if not trainer.is_global_zero and not pl_module.llm.sharded:
            return
        data: CaptionData = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.probe_dataloader(self.num_images)
        loader.rank, loader.world_size = 0, 1
        written: list[str] = []
        references: list[list[str]] = []
        scenes: list[Any] = []
        images: list[Any] = []
        shown: list[torch.Tensor] = []
        for batch in loader:
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.val_step_context():
                written += pl_module.generate(batch.pixel_values, self.max_new_tokens)
            references += batch.captions
            scenes += batch.scenes
            images += [data.val_set[index].image for index in batch.index] if self.clip else []
            pixels = batch.pixel_values[: self.num_shown - len(shown)].float().cpu()
            shown += list(pl_module.vision.transform.undo(pixels))
        if not trainer.is_global_zero:
            return
        figure = caption_figure(shown, [captions[0] for captions in references], written)
        log_figure(trainer, "captions", figure)
        scores = caption_scores(written, references, images, self.clip, pl_module.device)
        epoch = trainer.current_epoch + 1 if trainer.state.fn == "fit" else max(self.history, default=0)
        self.history[epoch] = scores
        if not trainer.fast_dev_run and folder:  # type: ignore[attr-defined]
            self._write_table(Path(folder))
            write_gallery(Path(folder) / f"captions_epoch_{epoch}.jsonl", shown, references, written)
        values = slot_shares(data, written, scenes, "captions") | slot_shares(
            data, written, scenes[1:] + scenes[:1], "captions_chance"
        )
        scalars = values | {f"captions/{name}": score.value for name, score in scores.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        parts = [
            f"{name} {value:.3f} [{low:.3f}, {high:.3f}]" for name, (value, low, high) in scores.items()
        ]
        print(f"[captions] step {trainer.global_step}: {', '.join(parts)}")
        if values:
            self._print(trainer, values)

    on_test_epoch_end = on_validation_epoch_end

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": {
                epoch: {name: list(score) for name, score in scores.items()}
                for epoch, scores in self.history.items()
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = {
            epoch: {name: Score(*score) for name, score in scores.items()}
            for epoch, scores in state_dict["history"].items()
        }

    def _write_table(self, folder: Path) -> None:
        """All epochs so far as one tidy table."""
        import pandas as pd

        folder.mkdir(parents=True, exist_ok=True)
        run = f"{folder.parent.name}/{folder.name}"
        table = pd.DataFrame(
            [
                (run, epoch, name, *score)
                for epoch, scores in sorted(self.history.items())
                for name, score in scores.items()
            ],
            columns=["run", "epoch", "metric", *Score._fields],
        )
        table.to_csv(folder / "captions.csv", index=False)

    def _print(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        slots = [name.split("/")[1] for name in values if name.startswith("captions/")]
        parts = [
            f"{slot} {values[f'captions/{slot}']:.0%} ({values[f'captions_chance/{slot}']:.0%})"
            for slot in slots
        ]
        print(f"[captions] step {trainer.global_step}: right slots (chance): {', '.join(parts)}")


def write_gallery(
    path: Path, images: list[torch.Tensor], references: list[list[str]], written: list[str]
) -> None:
    """One line an image: its captions, the model's, and a JPEG of 112 px in base64."""
    from PIL import Image

    lines = []
    for image, captions, caption in zip(images, references, written, strict=False):
        pixels = (image.permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy()  # [H, W, 3]
        picture, jpeg = Image.fromarray(pixels), io.BytesIO()
        picture.thumbnail((112, 112))
        picture.save(jpeg, "JPEG", quality=75)
        thumbnail = base64.b64encode(jpeg.getvalue()).decode()
        lines.append(json.dumps({"references": captions, "caption": caption, "jpeg": thumbnail}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
