"""What a run says on the console while it goes, and at its end."""

from __future__ import annotations

import math
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_limber.models.limber import Limber
from lightning_limber.probe.finding import sentences
from lightning_limber.utils.commands import program

from .captions import CaptionSamples, in_words
from .run_record import RunRecord
from .sae_probe import SAEProbe

BAR = 20
"""Characters of the bar."""
REDRAW_SECONDS = 0.3


class Progress(ProgressBar):
    """One line, redrawn: epoch and step out of how many, the loss, and the time left, validations and
    probes included as far as there were any.

    Where the console is no terminal, a line is printed at each tenth of the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._width = 0
        self._drawn_at = -math.inf
        self._begun, self._first_step, self._tenth = 0.0, 0, 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # -- training ---------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun, self._first_step, self._tenth = time.monotonic(), trainer.global_step, 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._enabled:
            return
        if trainer.should_stop or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._hide()  # Others print now.
        elif sys.stderr.isatty():
            if self._is_due():
                self._draw(self._training(trainer))
        else:
            total = trainer.estimated_stepping_batches
            tenth = int(10 * trainer.global_step / total)  # 0 where there is no end.
            if tenth > self._tenth:
                print(f"[train] {self._training(trainer, bar=False)}", file=sys.stderr)
            self._tenth = tenth

    def _training(self, trainer: pl.Trainer, bar: bool = True) -> str:
        """Asks the device for the loss."""
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        done = step - self._first_step
        parts = [f"epoch {trainer.current_epoch + 1}", f"step {step}"]
        left = filled = ""
        if math.isfinite(total):
            parts[1] += f"/{int(total)}"
            if bar:
                filled = f"  {'█' * int(BAR * step / total):░<{BAR}}"
            if math.isfinite(steps):
                parts[0] += f"/{math.ceil(total / math.ceil(steps))}"
            if done:
                seconds = (time.monotonic() - self._begun) / done * (total - step)
                left = f"  {in_time(seconds)} left"
        return f"{', '.join(parts)}, loss {float(trainer.callback_metrics['train/loss']):.3f}{filled}{left}"

    # -- what else takes time ---------------------------------------------------------------------

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._draw_batch("validation", args[3], trainer.num_val_batches)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._draw_batch("test", args[3], trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._draw_batch("captions", args[3], trainer.num_predict_batches)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hide()

    on_test_epoch_end = on_predict_epoch_end = on_train_end = on_validation_epoch_end
    on_validation_start = on_train_epoch_end = on_validation_epoch_end

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._hide()

    def _draw_batch(self, what: str, batch_idx: int, batches: Any) -> None:
        total = sum(batches)  # There is one loader.
        if batch_idx + 1 >= total:
            self._hide()
        elif self._enabled and sys.stderr.isatty() and self._is_due():
            self._draw(f"{what}, batch {batch_idx + 1}" + (f"/{total}" if math.isfinite(total) else ""))

    # -- the line ---------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        return time.monotonic() - self._drawn_at > REDRAW_SECONDS

    def _draw(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        print(f"\r{text.ljust(self._width)}", end="", file=sys.stderr, flush=True)
        self._width, self._drawn_at = len(text), time.monotonic()

    def _hide(self) -> None:
        if self._width:
            print(f"\r{' ' * self._width}\r", end="", file=sys.stderr, flush=True)
        self._width = 0


class Ending(pl.Callback):
    """Says at a run's end where it lies, its best numbers, what was found, and what can be done next."""

    def __init__(self) -> None:
        self._begun = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = time.monotonic()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = trainer.log_dir  # Asks all processes.
        if trainer.is_global_zero and folder and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert isinstance(pl_module, Limber)
            print(self._text(trainer, Path(folder)))

    def _text(self, trainer: pl.Trainer, folder: Path) -> str:
        spent = in_time(time.monotonic() - self._begun)
        lines = {"done": f"{trainer.global_step} steps, {spent}; all of it is in {folder}"}
        lines |= dict.fromkeys(("best loss", "captions", "found"), "")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunRecord) and callback.history:
                lines["best loss"] = _best_loss(callback)
            elif isinstance(callback, CaptionSamples) and callback.history:
                newest = callback.history[max(callback.history)]
                lines["captions"] = in_words(newest, {w: b.scores for w, b in callback.baselines.items()})
            elif isinstance(callback, SAEProbe) and callback.history:
                lines["found"] = next(iter(sentences(callback.history[max(callback.history)])), "")
        command = program()
        if (folder / "probe.csv").is_file():
            lines["report"] = f"{command} report {folder}"
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            lines["TensorBoard"] = f"tensorboard --logdir {folder.parent}"
        lines["predict"] = f"{command} predict --ckpt_path {folder} --images FOLDER"
        more = f" --trainer.max_steps {2 * trainer.global_step}" if trainer.max_steps > 0 else ""
        lines["go on"] = f"{command} fit --ckpt_path {folder}{more}"
        return "\n".join(f"[{name}]".ljust(14) + text for name, text in lines.items() if text)


def _best_loss(record: RunRecord) -> str:
    step, (_, scores) = min(record.history.items(), key=lambda found: found[1][1]["loss"][0])
    value, low, high = scores["loss"]
    text = f"{value:.3f} [{low:.3f}, {high:.3f}] nats a token held out, at step {step}"
    if control := scores.get("loss_shuffled"):
        text += f" (another image's caption: {control[0]:.3f})"
    return text


def in_time(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if text.startswith("0:") else text
