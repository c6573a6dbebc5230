"""SIGTERM, which every cluster sends, and Ctrl-C: a run saves, says how to go on, and ends."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import lightning.pytorch as pl

Handler = Any


class Signals:
    """Handlers of SIGTERM, SIGINT and SLURM's requeue signal, from a run's set-up to its end.

    They take the place of Lightning's own, which saves nothing and exits with 0, or saves from whatever
    line is running, so that the loader's state and the optimiser's do not belong together. While `waits` a
    signal is only noted, and who runs the training step looks at `stop`; else (loading, validation,
    captions, probe) it ends the process at once, with the exit code of a shell (128 + number: 143, 130). A
    second Ctrl-C always does.

    A handler that somebody else has set stays.
    """

    def __init__(self) -> None:
        self.waits = False
        self.stop = 0
        """Number of the signal that ends the run, once it came."""
        self.requeue = False
        """Whether SLURM has announced the end of the job's time."""
        self._trainer: Any = None
        self._before: dict[int, Handler] = {}

    def install(self, trainer: pl.Trainer, requeue_signal: int | None) -> None:
        # Lightning's own would be put around these.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        self.waits, self.stop, self.requeue, self._trainer = False, 0, False, trainer
        handlers = {signal.SIGTERM: self._on_stop, signal.SIGINT: self._on_stop}
        if requeue_signal is not None:
            handlers[signal.Signals(requeue_signal)] = self._on_requeue
        for number, handler in handlers.items():
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, handler)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_requeue(self, number: int, frame: Any) -> None:
        self.requeue = True

    def _on_stop(self, number: int, frame: Any) -> None:
        trainer, is_again = self._trainer, self.stop == number
        self.stop = self.stop or number
        if number == signal.SIGTERM and not is_again and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)  # To the processes that this one started.
        if not self.waits or (is_again and number == signal.SIGINT):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # A third one needs no Python.
            self.leave()
        if number == signal.SIGINT and trainer.is_global_zero and not is_again:
            # Not by print, which may be what was interrupted.
            os.write(2, b"\n[stop] saving after this step; Ctrl-C again stops at once\n")

    def leave(self) -> None:
        """Ends the process; with 0 those that the first one started, or it would be killed for them."""
        raise SystemExit(128 + self.stop if self._trainer.is_global_zero else 0)

    def any_stop(self, trainer: pl.Trainer) -> bool:
        """Whether any process is to stop: then all do, after the same step, as this one's `stop` says."""
        self.stop = most(trainer, self.stop)
        return self.stop > 0


def most(trainer: pl.Trainer, value: int) -> int:
    """The largest of the processes' values."""
    if trainer.world_size == 1:
        return value
    import torch

    tensor = torch.tensor(value, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return int(tensor)
