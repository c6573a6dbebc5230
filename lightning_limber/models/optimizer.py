"""AdamW with linear warm-up and cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rate and schedule. Step counts are given, never inferred.

    Attributes:
        lr: Peak learning rate.
        min_lr_ratio: Final learning rate as a share of the peak.
        warmup_steps: Optimiser steps of linear warm-up.
        total_steps: Optimiser steps until the final learning rate; normally ``${trainer.max_steps}``.
        weight_decay: Weight decay of the adapter's matrices; biases and norms have none.
        betas: AdamW's decay rates of the first and second moment.
    """

    lr: float = 2e-3
    min_lr_ratio: float = 0.0
    warmup_steps: int = 20
    total_steps: int = 1000
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)


def lr_factor(step: int, config: OptimizerConfig) -> float:
    """Learning rate at `step` as a share of the peak: linear warm-up, then half a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_steps = max(1, config.total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def stretched(saved: OptimizerConfig, now: OptimizerConfig, step: int) -> str:
    """Says what a longer schedule changes for a run that goes on from `step`; empty if it is the same."""
    if saved.total_steps == now.total_steps:
        return ""
    before, after = (config.lr * lr_factor(step, config) for config in (saved, now))
    return (
        f"[resume] the schedule of {saved.total_steps} steps is stretched to {now.total_steps}: the "
        f"learning rate goes from {before:.2e} to {after:.2e} at step {step}"
    )


def set_learning_rate(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Gives the optimiser the learning rate of where the schedule stands."""
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def make_optimizer(module: nn.Module, config: OptimizerConfig, fused: bool) -> dict[str, Any]:
    """Optimiser and schedule of a module's parameters, as Lightning wants them.

    Args:
        module: Its matrices decay, its biases and norms do not.
        config: Settings.
        fused: One kernel for all parameters. Not where gradients are scaled (float16): it would take the
            scale off after the clipping.
    """
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=fused
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepMean:
    """The mean over the tokens of a step that is made of several batches, as if they were one.

    Each batch's sum is divided by the tokens of the first, until all are known; Lightning divides by the
    number of batches, also where the end of an epoch leaves fewer.
    """

    def loss(self, loss_sum: Tensor, count: Tensor, batch_idx: int, trainer: Any) -> Tensor:
        """The loss of a batch: `loss_sum` is this process', `count` the number of tokens in all of them."""
        parts = trainer.accumulate_grad_batches
        if batch_idx % parts == 0:
            self._first, self._all = count.clamp_min(1), torch.zeros_like(count)
        self._all = self._all + count
        return loss_sum * (trainer.world_size * parts) / self._first

    def scale_gradients(self, module: nn.Module, trainer: Any) -> None:
        """Makes a module's gradients those of the mean, before the step."""
        if trainer.accumulate_grad_batches > 1:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, self._first / self._all.clamp_min(1))


def clip_gradients(module: nn.Module, value: float | None, algorithm: str | None) -> Tensor:
    """Clips a module's gradients in place.

    Args:
        module: After its backward pass.
        value: Largest norm, or largest absolute value; None or 0 clips nothing.
        algorithm: ``value`` clips each number, anything else the norm of all of them.

    Returns:
        Norm of all gradients before clipping, a scalar.
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if value and algorithm == "value":
        nn.utils.clip_grad_value_(parameters, value)
    elif value:
        nn.utils.clip_grads_with_norm_(parameters, value, norm)
    return norm
