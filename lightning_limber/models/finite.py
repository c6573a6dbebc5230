"""A loss that is no number ends a run, before it is saved."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_limber.models.optimizer import OptimizerConfig, lr_factor


class FiniteCheck:
    """Remembers the first step whose loss or gradient is not finite.

    It is noted on the device: a step waits for nothing. Who saves or logs reads it.

    Args:
        config: Says the learning rate, for the message.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self._first: Tensor | None = None

    def note(self, value: Tensor, step: int) -> None:
        """Looks at a scalar of optimiser step `step`, counted from 0."""
        first = self._first if self._first is not None else torch.full_like(value, -1, dtype=torch.long)
        self._first = torch.where(value.isfinite() | (first >= 0), first, step)

    def check(self) -> None:
        """Waits for the device.

        Raises:
            FloatingPointError: a value was not finite.
        """
        if self._first is None or (step := int(self._first)) < 0:
            return
        lr = self.config.lr * lr_factor(step, self.config)
        raise FloatingPointError(
            f"The loss or its gradient is not finite in step {step + 1} (learning rate {lr:.2e}): training "
            "stops, and no checkpoint was written since. Lower model.optimizer.lr or raise warmup_steps, "
            "lower trainer.gradient_clip_val, or set trainer.precision=32-true. A changed setting needs a "
            "new run: --model.adapter_weights PATH starts it from the adapter of a checkpoint of this one."
        )
