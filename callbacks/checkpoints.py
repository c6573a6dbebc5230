"""Writes what resuming needs: a few megabytes, often enough that little is lost."""

from __future__ import annotations

import io
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from lightning_limber.models.limber import Limber
from lightning_limber.models.optimizer import OptimizerConfig, set_learning_rate, stretched
from lightning_limber.utils.checkpoints import slurm_job
from lightning_limber.utils.commands import program
from lightning_limber.utils.event_files import go_on, written
from lightning_limber.utils.files import write_whole
from lightning_limber.utils.loop_state import place, write_place
from lightning_limber.utils.run_lock import hold_run, release_run

from .signals import Signals


class WholeFiles(TorchCheckpointIO):
    """Writes beside the file and renames; Lightning's own way there leads through TMPDIR."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(path, lambda part: part.write_bytes(buffer.getbuffer()))


class Checkpoints(Checkpoint):
    """Save ``last.ckpt`` every few steps and around validations and epochs, and keep one file per epoch.

    Files appear in ``checkpoints/`` of the run's folder, each whole or not at all, so that a run that is
    killed while saving still has the one before. Whatever else saves (Lightning's ModelCheckpoint), its
    files are as whole, and go on where training stood (loop_state.py).

    SIGTERM and Ctrl-C save after the step that is under way, say how to go on and end the run with exit
    code 143 or 130. During validation, captions and probe nothing is left to save: they end at once, and
    the run that goes on does them again. A second Ctrl-C always ends at once.

    Under SLURM (``sbatch --signal=SIGUSR1@90``) the signal that announces the end of the job's time saves
    after the step that is under way, requeues the job and stops. During validation and probe it waits for
    their end: give it more seconds than they take.

    Args:
        every_n_steps: Number of optimiser steps between two savings of ``last.ckpt``; 0 saves it before
            validations and after epochs only.
        keep_epochs: Keep ``epoch_{n}.ckpt`` after each epoch n (counted from 1) too.
    """

    def __init__(self, every_n_steps: int = 50, keep_epochs: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.keep_epochs = keep_epochs
        self.dirpath: Path | None = None
        self.signals = Signals()
        self._saved_step: int | None = None
        self._max_steps = -1
        self._ending: int | None = None  # The step of a checkpoint of which the end of an epoch is to come.
        self._validated_batches = -1
        self._requeues = self._leaving = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Not one that somebody chose.
            trainer.strategy.checkpoint_io = WholeFiles()
        folder = trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)
        self.dirpath = Path(folder) / "checkpoints"
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            hold_run(self.dirpath.parent)
        self._saved_step, self._validated_batches = None, -1
        environment = trainer._accelerator_connector.cluster_environment
        requeue_signal = None
        if stage == "fit" and isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            requeue_signal = environment.requeue_signal
        self._requeues = requeue_signal is not None
        self.signals.install(trainer, requeue_signal)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._let_go()
        path = self.dirpath / "last.ckpt" if self.dirpath else Path("last.ckpt")
        step = "" if self._saved_step is None else f" holds step {self._saved_step}"
        is_saved = trainer.state.fn == "fit" and path.is_file()
        if isinstance(exception, FloatingPointError) and is_saved:
            rank_zero_info(f"[stop] not finite: {path}{step}, from before")
        elif isinstance(exception, SystemExit) and self.signals.stop:
            text = "no step has been saved yet" if trainer.state.fn == "fit" else "nothing was to be saved"
            if is_saved:
                text = f"{path}{step}; go on with: {program()} fit --ckpt_path {path.parent.parent}"
            rank_zero_info(f"[stop] {signal.Signals(self.signals.stop).name}: {text}")

    def _let_go(self) -> None:
        self.signals.restore()
        if self.dirpath is not None:
            release_run(self.dirpath.parent)

    # -- when -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.dirpath is not None
        run = self.dirpath.parent
        is_new = trainer.ckpt_path is None and trainer.global_step == 0
        if is_new and (self.dirpath / "last.ckpt").is_file():
            raise ValueError(
                f"{run} holds a run already: go on with it (--ckpt_path {run}), or give this one a folder "
                "of its own, by another name or version of the logger."
            )
        # Lightning does nothing in a run that has all its steps or time, also if its end is to come.
        loop = trainer.fit_loop.epoch_loop
        self._max_steps, has_steps = loop.max_steps, self._ending == loop.max_steps
        if self._ending is not None and (has_steps or trainer.should_stop):
            loop.max_steps += has_steps
            trainer.should_stop = False
            loop._should_check_val_fx = partial(self._stop_here, trainer)  # type: ignore[method-assign]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A checkpoint brings the learning rate of its own schedule, which may have been a shorter one.
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                set_learning_rate(config.scheduler)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning counts the step that it logs at apart from the optimiser's, and that count is one
        # too high after some resumes.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._leave(trainer)  # Not right after saving: the step is logged in between.
        self.signals.waits = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if trainer.fit_loop._should_accumulate():
            return
        assert isinstance(pl_module, Limber)
        # Nothing waits for a GPU here, or only when it is waited for anyway.
        if pl_module.device.type == "cpu" or trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.finite.check()
        # A run always ends with validation, captions and probe.
        trainer.should_stop |= trainer.global_step == trainer.max_steps
        # They and the end of an epoch take long: what is before them is saved first.
        is_done = loop._is_training_done or trainer.should_stop
        long = is_done or loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        stops = self.signals.any_stop(trainer)
        self._leaving = stops or (not is_done and self._any_requeue(trainer))
        if self._leaving or long or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._save(trainer, "last.ckpt")
        if long:
            self.signals.waits = False
            if stops:
                self.signals.leave()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Before the hook in which others save.
        self._validated_batches = place(trainer).all_batches

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer, "last.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        if self.keep_epochs and place(trainer).batches == 0:
            self._save(trainer, f"epoch_{trainer.current_epoch + 1}.ckpt")
        self._save(trainer, "last.ckpt")
        finished = (
            trainer.global_step == trainer.max_steps or trainer.current_epoch + 1 == trainer.max_epochs
        )
        self._leaving = not finished and self._any_requeue(trainer)
        self._leave(trainer)

    @staticmethod
    def _stop_here(trainer: pl.Trainer, data_fetcher: Any) -> bool:
        """Asked in place of whether to validate, before the next batch: the run stops without it, and what
        was to come goes on.
        """
        del trainer.fit_loop.epoch_loop._should_check_val_fx
        trainer.should_stop = True
        return True

    def _any_requeue(self, trainer: pl.Trainer) -> bool:
        """Whether a process got SLURM's signal: all stop at the same step."""
        return self._requeues and trainer.strategy.reduce_boolean_decision(self.signals.requeue, all=False)

    def _leave(self, trainer: pl.Trainer) -> None:
        if not self._leaving:
            return
        if self.signals.stop:
            self.signals.leave()
        self._requeue(trainer)

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
        self.signals.requeue = self._leaving = False

    # -- what -------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Makes a checkpoint of whoever saves say what is left to do."""
        if trainer.state.fn == "fit":
            loops = checkpoint["loops"]["fit_loop"]
            checkpoint["is_ending"] = write_place(loops, trainer, self._validated_batches)
            checkpoint["event_files"] = written(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, Limber)
        loop, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
        saved = OptimizerConfig(**checkpoint["hyper_parameters"]["optimizer"])
        if trainer.state.fn == "fit" and (text := stretched(saved, pl_module.optimizer_config, step)):
            rank_zero_info(text)
        if trainer.state.fn != "fit":  # What is measured is of this step.
            epoch_loop = trainer.fit_loop.epoch_loop
            epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
            epoch_loop._batches_that_stepped = max(0, step - 1)  # As `fit` logs what it measures there.
        elif "event_files" in checkpoint:  # Older ones: see `purge_step` in cli.py.
            go_on(trainer, checkpoint["event_files"])
        is_whole = loop["epoch_loop.batch_progress"]["is_last_batch"]  # Older checkpoints say no more.
        self._ending = step if checkpoint.get("is_ending", is_whole) else None

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None
        trainer.save_checkpoint(self.dirpath / name, weights_only=False)
        self._saved_step = trainer.global_step
