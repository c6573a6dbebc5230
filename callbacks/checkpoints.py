"""Writes what resuming needs: a few megabytes, often enough that little is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint


class Checkpoints(Checkpoint):
    """``last.ckpt`` every few steps and at the end of each epoch, and one file per epoch to keep.

    Files appear in ``checkpoints/`` of the run's folder, each whole or not at all (Lightning writes to
    the side and renames), so that a run that is killed while saving still has the one before.

    Args:
        every_n_steps: Optimiser steps between two ``last.ckpt``; 0 saves at the end of epochs only.
        keep_epochs: Also keep ``epoch_{n}.ckpt`` after epoch n (counted from 1).
    """

    def __init__(self, every_n_steps: int = 50, keep_epochs: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.keep_epochs = keep_epochs
        self.dirpath: Path | None = None
        self._between_epochs = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)
        self.dirpath = Path(folder) / "checkpoints"

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning counts the step that it logs at apart from the optimiser's, and that count is one
        # too high after some resumes.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Not after the last batch of an epoch: validation and probe come first, then the epoch is saved.
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last or not self.every_n_steps or trainer.fit_loop._should_accumulate():
            return
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, "last.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._between_epochs = True
        if self.keep_epochs:
            self._save(trainer, f"epoch_{trainer.current_epoch + 1}.ckpt")
        self._save(trainer, "last.ckpt")
        self._between_epochs = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes an epoch's checkpoint say that the epoch is over.

        While Lightning (2.6) calls the hooks of an epoch's end, its counters still stand inside the
        epoch: resumed from there it runs the hooks of the finished epoch again and numbers the next
        one wrongly. What is stored instead is the state in which the next epoch starts.
        """
        if not self._between_epochs:
            return
        loop = checkpoint["loops"]["fit_loop"]
        for scope in ("total", "current"):
            epochs = loop["epoch_progress"][scope]
            epochs["completed"] = epochs["processed"]
        batches = loop["epoch_loop.batch_progress"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None
        trainer.save_checkpoint(self.dirpath / name, weights_only=False)
