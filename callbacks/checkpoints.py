"""Writes what resuming needs: a few megabytes, often enough that little is lost."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from lightning_limber.utils.checkpoints import slurm_job


class Checkpoints(Checkpoint):
    """Save ``last.ckpt`` every few steps and at the end of each epoch, and keep one file per epoch.

    Files appear in ``checkpoints/`` of the run's folder, each whole or not at all (Lightning writes to
    the side and renames), so that a run that is killed while saving still has the one before.

    Under SLURM (``sbatch --signal=SIGUSR1@90``) the signal that announces the end of the job's time saves
    after the step that is under way, requeues the job and stops. Lightning's own handler would save from
    whatever line is running: the loader's state and the optimiser's would not belong together. During
    validation and probe the signal waits for their end: give it more seconds than they take.

    Args:
        every_n_steps: Number of optimiser steps between two savings of ``last.ckpt``; 0 saves it at the
            end of epochs only.
        keep_epochs: Keep ``epoch_{n}.ckpt`` after each epoch n (counted from 1) too.
    """

    def __init__(self, every_n_steps: int = 50, keep_epochs: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.keep_epochs = keep_epochs
        self.dirpath: Path | None = None
        self._between_epochs = False
        self._slurm = self._signalled = self._leaving = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)
        self.dirpath = Path(folder) / "checkpoints"
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            # Lightning leaves a signal alone that has a handler; so does this.
            if signal.getsignal(environment.requeue_signal) == signal.SIG_DFL:
                signal.signal(environment.requeue_signal, self._on_signal)
            self._slurm = True

    def _on_signal(self, *_: Any) -> None:
        self._signalled = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning counts the step that it logs at apart from the optimiser's, and that count is one
        # too high after some resumes.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        if self._leaving:  # Not right after saving: the step is logged in between.
            self._requeue(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Not after the last batch of an epoch: validation and probe come first, then the epoch is saved.
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or trainer.fit_loop._should_accumulate():
            return
        self._leaving = not loop._is_training_done and self._any_signalled(trainer)
        if self._leaving or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._save(trainer, "last.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._between_epochs = True
        if self.keep_epochs:
            self._save(trainer, f"epoch_{trainer.current_epoch + 1}.ckpt")
        self._save(trainer, "last.ckpt")
        self._between_epochs = False
        finished = (
            trainer.global_step == trainer.max_steps or trainer.current_epoch + 1 == trainer.max_epochs
        )
        if not finished and self._any_signalled(trainer):
            self._requeue(trainer)

    def _any_signalled(self, trainer: pl.Trainer) -> bool:
        """Whether a process got the signal: all stop at the same step."""
        return self._slurm and trainer.strategy.reduce_boolean_decision(self._signalled, all=False)

    def _requeue(self, trainer: pl.Trainer) -> None:
        """Puts the job back into SLURM's queue and ends the process; the same command goes on from here."""
        job = slurm_job()
        assert job is not None
        done = True
        if trainer.is_global_zero:
            try:
                done = subprocess.call(["scontrol", "requeue", job]) == 0
            except FileNotFoundError:
                done = False
        if trainer.strategy.broadcast(done):
            rank_zero_info(f"[slurm] job {job} is saved at step {trainer.global_step} and requeued")
            raise SystemExit(0)
        rank_zero_info(f"[slurm] 'scontrol requeue {job}' failed: saved, and going on until the job ends")
        self._signalled = self._leaving = False

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
