"""A callback that writes down every batch and stops the run at a chosen point."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import lightning.pytorch as pl


class Crash(Exception):
    pass


class CrashAt(pl.Callback):
    """Args: the hook and optimiser step to stop at; `kill` sends SIGKILL instead of raising."""

    def __init__(self, log: str, hook: str = "", step: int = -1, kill: bool = False) -> None:
        self.path = log
        self.hook = hook
        self.step = step
        self.kill = kill

    def _maybe(self, hook: str, trainer: pl.Trainer) -> None:
        if hook == self.hook and trainer.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Crash

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._maybe("batch_start", trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        with Path(f"{self.path}.{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} {' '.join(batch.ids)}\n")

    def on_validation_start(self, trainer, pl_module) -> None:
        self._maybe("validation_start", trainer)

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._maybe("epoch_start", trainer)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._maybe("epoch_end", trainer)  # Before what saves and beside the probe.


class StopAt(pl.Callback):
    """Asks Lightning to stop after so many batches, as its Timer (max_time) and EarlyStopping do."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = trainer.fit_loop.total_batch_idx + 1 == self.batches


class Poison(pl.Callback):
    """Makes the loss of a step (or its gradient alone) no number."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.what == "loss" and trainer.global_step == self.step:
            pl_module.adapter.project.weight.data[0, 0] = float("inf")

    def on_after_backward(self, trainer, pl_module) -> None:
        if self.what == "gradient" and trainer.global_step == self.step:
            pl_module.adapter.project.weight.grad[0, 0] = float("nan")


class Preempt(pl.Callback):
    """Sends a signal (SLURM's) to one process, while a batch is on its way or in another hook."""

    def __init__(
        self,
        step: int,
        rank: int,
        name: str = "SIGUSR1",
        hook: str = "backward",
        times: int = 1,
        group: bool = False,
    ) -> None:
        self.step, self.rank, self.hook, self.times = step, rank, hook, times
        self.number = signal.Signals[name]
        self.send = os.killpg if group else os.kill

    def _maybe(self, hook: str, trainer: pl.Trainer) -> None:
        if (hook, trainer.global_step, trainer.global_rank) == (self.hook, self.step, self.rank):
            for _ in range(self.times):
                self.send(os.getpid(), self.number)

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self._maybe("backward", trainer)

    def on_train_start(self, trainer, pl_module) -> None:
        self._maybe("train_start", trainer)

    def on_validation_batch_end(self, trainer, *args, **kwargs) -> None:
        self._maybe("validation", trainer)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._maybe("epoch_end", trainer)  # Where the probe runs.
