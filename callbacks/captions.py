"""Captions of a few held-out images, written by the model at each validation, shown and scored."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from lightning_limber.captioning.figures import caption_figure
from lightning_limber.captioning.scores import (
    Score,
    most_frequent_caption,
    scores_by_image,
    scores_of_set,
)
from lightning_limber.data import CaptionData
from lightning_limber.data.loader import RecordSet
from lightning_limber.models.generation import Decoding
from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.models.limber import Limber
from lightning_limber.probe.palette import COLOURS
from lightning_limber.utils.bootstrap import interval_tags
from lightning_limber.utils.by_image import add_arrays, images_file
from lightning_limber.utils.checkpoints import measurement_differences
from lightning_limber.utils.earlier_rows import earlier_rows
from lightning_limber.utils.figures import Chart, Level, Line, chart_figure
from lightning_limber.utils.files import write_text, write_whole
from lightning_limber.utils.loop_state import measured_epoch

from .logs import log_figure, log_numbers


class Baseline(NamedTuple):
    """One caption for all images, and its scores."""

    caption: str
    scores: dict[str, Score]


@dataclass
class Captioned:
    """Images with their own captions and the model's; one entry an image."""

    names: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    scenes: list[Any] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    """As in the data set; for a CLIP only."""
    shown: list[torch.Tensor] = field(default_factory=list)
    """[3, H, W] each, of the first images, as the encoder sees them."""


class CaptionSamples(pl.Callback):
    """Generate captions of held-out images, log them beside their images and score them.

    Scores against the images' own captions (see lightning_limber/captioning/scores.py) are logged as
    ``captions/{score}``: cider_d, bleu_4, rouge_l and, with a CLIP, clip_score and ref_clip_score. With
    their 95 % bootstrap intervals over images they go to ``captions.csv`` in the run's folder (run, epoch,
    writer, metric, value, low, high). ``captions_epoch_{n}.jsonl`` holds the captions of the drawn images,
    with a small JPEG of each, and ``images_epoch_{n}.npz`` the scores of each image (by_image.py).
    ``validate`` and ``test`` score the checkpoint that they are given, as the last epoch that it finished;
    ``test`` on the data set's test part (where it has none, the held-out set), with ``captions_test`` for
    ``captions`` in all names.

    Where the data set can score a caption (`CaptionData.score_caption`; scenes can, exactly), the share
    of right slots (slot accuracy) is logged as ``captions/{slot}`` (in the table ``slots/{slot}``), and
    ``captions_chance/{slot}`` is the same with each caption scored against the next image's truth.

    Two captions that are the same for every image, and for every epoch, are scored beside the model's, as
    what is reached without looking: the most frequent one of (up to 4,096) training records, and what the
    LLM writes greedily when the prompt has no image. They are the table's writers ``most_frequent`` and
    ``no_image``, ``captions_{writer}/{score}`` in the log, and in words in ``captions_baselines.json``.

    Args:
        num_images: Number of held-out images to caption; 0 switches this off.
        num_shown: Number of captioned images to draw; 0 draws none.
        max_new_tokens: Longest caption, in tokens.
        clip: Name or folder of a CLIP of transformers for CLIPScore, such as
            ``openai/clip-vit-base-patch32`` (of published scores); null leaves these scores out.
    """

    def __init__(
        self, num_images: int = 64, num_shown: int = 8, max_new_tokens: int = 48, clip: str | None = None
    ) -> None:
        self.num_images = num_images
        self.num_shown = num_shown
        self.max_new_tokens = max_new_tokens
        self.clip = clip
        self.history: dict[int, dict[str, Score]] = {}
        self.baselines: dict[str, Baseline] = {}
        self.written: tuple[int, dict[str, str]] = (-1, {})
        """The newest captions by the names of their images, and the step at which they were written."""

    @property
    def settings(self) -> dict[str, Any]:
        """What enters the numbers."""
        return {name: getattr(self, name) for name in ("num_images", "max_new_tokens", "clip")}

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
        testing = trainer.state.fn == "test"
        found = self._write(trainer, pl_module, data, data.test_dataset() if testing else data.val_set)
        # In `fit` they are the same at every epoch; `validate` and `test` may be given other data.
        baselines = self.baselines if trainer.state.fn == "fit" else {}
        new = not baselines
        if new:
            with trainer.precision_plugin.val_step_context():
                [without_image] = self._captions(pl_module, None)
            most_frequent = most_frequent_caption(data.training_captions())
            baselines = {
                "most_frequent": Baseline(most_frequent, {}),
                "no_image": Baseline(without_image, {}),
            }
        if not testing:
            self.baselines = baselines
            written = dict(zip(found.names, found.written, strict=True))
            self.written = (trainer.global_step, written)
        if not trainer.is_global_zero:
            return

        def by_image(captions: list[str]) -> dict[str, torch.Tensor]:
            agreement = scores_by_image(
                captions, found.references, found.images, self.clip, pl_module.device
            )
            return agreement | slot_counts(data, captions, found.scenes)

        if new:
            for baseline in baselines.values():
                of_one = by_image([baseline.caption] * len(found.written))
                baseline.scores.update(scores_of_set(of_one))
        measured = by_image(found.written)
        scores = scores_of_set(measured)
        epoch, _ = measured_epoch(trainer)
        # What `test` finds, on other images, is no epoch of the run.
        history = {} if testing else self.history
        history[epoch] = scores
        name = "captions_test" if testing else "captions"
        if not trainer.fast_dev_run and folder:  # type: ignore[attr-defined]
            write_table(Path(folder) / f"{name}.csv", history, baselines)
            words = json.dumps({writer: of.caption for writer, of in baselines.items()}, indent=1)
            write_text(Path(folder) / f"{name}_baselines.json", words)
            write_gallery(Path(folder) / f"{name}_epoch_{epoch}.jsonl", found)
            arrays: dict[str, Any] = {metric: values.numpy() for metric, values in measured.items()}
            arrays["names"] = found.names
            add_arrays(images_file(Path(folder), epoch, testing), "captions", arrays)
        first = [captions[0] for captions in found.references]
        if found.shown:
            log_figure(trainer, name, caption_figure(found.shown, first, found.written), epoch)
        of_others = slot_counts(data, found.written, found.scenes[1:] + found.scenes[:1])
        chance = scores_of_set(of_others)
        blind = {writer: of.scores for writer, of in baselines.items()}
        _log(trainer, name, scores, chance, blind)
        if not testing:
            figure = chart_figure(score_chart(history, blind, len(found.written)))
            log_figure(trainer, "Overview/2_captions", figure, epoch)
        print(f"[{name}] step {trainer.global_step}: {in_words(scores, blind)}")

    on_test_epoch_end = on_validation_epoch_end

    def _write(
        self, trainer: pl.Trainer, model: Limber, data: CaptionData, records: RecordSet
    ) -> Captioned:
        found = Captioned()
        loader = data.caption_dataloader(self.num_images, records)
        loader.rank, loader.world_size = 0, 1
        for batch in loader:
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.val_step_context():
                found.written += self._captions(model, model.image_tokens(batch))
            found.names += batch.image_ids
            found.references += batch.captions
            found.scenes += batch.scenes
            found.images += [records[index].image for index in batch.index] if self.clip else []
            pixels = batch.pixel_values[: self.num_shown - len(found.shown)].float().cpu()
            found.shown += list(model.vision.transform.undo(pixels))
        return found

    def _captions(self, model: Limber, image_tokens: ImageTokens | None) -> list[str]:
        return [caption.text for caption in model.generate(image_tokens, Decoding(self.max_new_tokens))]

    def state_dict(self) -> dict[str, Any]:
        newest = sorted(self.history)[-1:]  # The others stand in captions.csv.
        return {
            "history": {
                epoch: {name: list(score) for name, score in self.history[epoch].items()}
                for epoch in newest
            },
            "table": "captions.csv",
            "settings": self.settings if newest else None,
            "baselines": {
                writer: [caption, {name: list(score) for name, score in scores.items()}]
                for writer, (caption, scores) in self.baselines.items()
            },
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["callbacks"].get(self.state_key, {})
        kept = {
            epoch: {name: Score(*score) for name, score in scores.items()}
            for epoch, scores in state.get("history", {}).items()
        }
        self.history = {}
        if kept and "table" in state:  # Older checkpoints hold all epochs.
            for row in earlier_rows(trainer, state["table"], "epoch", max(kept)):
                if row["writer"] == "model":
                    score = Score(*(row[name] for name in Score._fields))
                    self.history.setdefault(row["epoch"], {})[row["metric"]] = score
        self.history |= kept
        if trainer.state.fn != "fit" and measurement_differences(checkpoint["callbacks"], self):
            self.history = {}  # Of the run, and measured otherwise.
        self.baselines = {
            writer: Baseline(caption, {name: Score(*score) for name, score in scores.items()})
            for writer, (caption, scores) in state.get("baselines", {}).items()
        }


def newest_captions(trainer: Any) -> dict[str, str]:
    """Captions that were written at the present step, by the names of their images; often none."""
    written = {}
    for callback in trainer.callbacks:
        if isinstance(callback, CaptionSamples) and callback.written[0] == trainer.global_step:
            written = callback.written[1]
    return written


def write_table(path: Path, history: dict[int, dict[str, Score]], baselines: dict[str, Baseline]) -> None:
    """All epochs so far as one tidy table, with the baselines' scores at each."""
    import pandas as pd

    path.parent.mkdir(parents=True, exist_ok=True)
    run = f"{path.parent.parent.name}/{path.parent.name}"
    blind = {writer: baseline.scores for writer, baseline in baselines.items()}
    table = pd.DataFrame(
        [
            (run, epoch, writer, name, *score)
            for epoch, scores in sorted(history.items())
            for writer, of_writer in {"model": scores, **blind}.items()
            for name, score in of_writer.items()
        ],
        columns=["run", "epoch", "writer", "metric", *Score._fields],
    )
    write_whole(path, lambda part: table.to_csv(part, index=False))


def _log(
    trainer: pl.Trainer,
    name: str,
    scores: dict[str, Score],
    chance: dict[str, Score],
    blind: dict[str, dict[str, Score]],
) -> None:
    """Slots of a kind are logged of the model and of chance alone: in captions.csv are all."""
    numbers = {f"{name}/{_tag(metric)}": score.value for metric, score in scores.items()}
    numbers |= {f"{name}_chance/{_tag(metric)}": score.value for metric, score in chance.items()}
    for metric in headlines(scores):
        numbers |= interval_tags(f"{name}/{_tag(metric)}", scores[metric])
        numbers |= {
            f"{name}_{writer}/{_tag(metric)}": of[metric].value
            for writer, of in blind.items()
            if metric in of
        }
    log_numbers(trainer, numbers)


def _tag(metric: str) -> str:
    return metric.removeprefix("slots/")


HEADLINES = {"slots/all": "right slots", "cider_d": "CIDEr-D"}


def headlines(scores: dict[str, Score]) -> list[str]:
    """The one or two metrics that are named first; without ground truth there are no slots."""
    return [metric for metric in HEADLINES if metric in scores]


def score_chart(
    history: dict[int, dict[str, Score]], blind: dict[str, dict[str, Score]], images: int
) -> Chart:
    """The first headline by epoch, beside captions that do not look.

    Args:
        history: Scores of the model by epoch.
        blind: Scores of each writer that does not look.
        images: Number of images that were captioned.
    """
    [metric, *_] = headlines(history[max(history)])
    model = [(epoch, *scores[metric]) for epoch, scores in sorted(history.items()) if metric in scores]
    levels = [
        Level(of[metric].value, COLOURS[colour], f"{writer.replace('_', ' ')} caption")
        for (writer, of), colour in zip(blind.items(), ("words_long", "control"), strict=False)
        if metric in of
    ]
    title = f"Captions of {images} held-out images: {HEADLINES[metric]}"
    return Chart(title, "epoch", [Line(model, COLOURS["image"], "model")], levels)


def in_words(scores: dict[str, Score], blind: dict[str, dict[str, Score]]) -> str:
    """The headlines with their intervals, each with the best of the captions that do not look."""
    parts = []
    for metric in headlines(scores):
        value, low, high = scores[metric]
        controls = {writer: of[metric].value for writer, of in blind.items() if metric in of}
        best = max(controls, key=lambda writer: controls[writer], default=None)
        beside = f" ({best.replace('_', ' ')} caption: {controls[best]:.3f})" if best else ""
        parts.append(f"{HEADLINES[metric]} {value:.3f} [{low:.3f}, {high:.3f}]{beside}")
    return ", ".join(parts)


def write_gallery(path: Path, found: Captioned) -> None:
    """One line a drawn image: its captions, the model's, and a JPEG of 112 px in base64."""
    from PIL import Image

    lines = []
    for image, captions, caption in zip(found.shown, found.references, found.written, strict=False):
        pixels = (image.permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy()  # [H, W, 3]
        picture, jpeg = Image.fromarray(pixels), io.BytesIO()
        picture.thumbnail((112, 112))
        picture.save(jpeg, "JPEG", quality=75)
        thumbnail = base64.b64encode(jpeg.getvalue()).decode()
        line = {"references": captions, "caption": caption, "jpeg": thumbnail}
        lines.append(json.dumps(line) + "\n")
    write_text(path, "".join(lines))


def slot_counts(data: CaptionData, written: list[str], scenes: list[Any]) -> dict[str, torch.Tensor]:
    """Right slots of I captions and all of them, [I, 2], by ``slots/{kind}``, and ``slots/all``; empty
    without ground truth.
    """
    counts: dict[str, torch.Tensor] = {}
    for i, (caption, scene) in enumerate(zip(written, scenes, strict=True)):
        for slot, found in (data.score_caption(caption, scene) or {}).items():
            # `held_out` repeats slots of other kinds: it is not counted twice.
            for name in (slot,) if slot == "held_out" else (slot, "all"):
                none = torch.zeros(len(written), 2, dtype=torch.float64)
                counts.setdefault(f"slots/{name}", none)[i] += torch.tensor(found)
    return counts
