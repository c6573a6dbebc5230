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
        self._saved_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)
        self.dirpath = Path(folder) / "checkpoints"

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._saved_step:
            self._save(trainer, "last.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.keep_epochs:
            self._save(trainer, f"epoch_{trainer.current_epoch + 1}.ckpt")
        self._save(trainer, "last.ckpt")

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.dirpath / name)
