"""Cross-entropy through a frozen output head, without ever holding the logits.

With a frozen head the gradient of a token's loss is (softmax - onehot) W: all of it is known in the
forward pass. So the head runs over a few rows at a time, and what is kept for the backward pass is one
vector [D_l] per token instead of its V logits (49,152 or 256,000 of them, several times over).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""Of float32 logits at a time. The head's weights are read once for each chunk: fewer are faster (two CPU
cores, 213 targets, 49,152 x 576 in float32: 0.43 s with 2**23, 0.25 s with 2**25, 0.23 s in one chunk)."""


class FrozenHeadLoss(torch.autograd.Function):
    """Losses in nats [n] and correctness [n] of hidden states [n, D_l] against token ids [n].

    Products are in the weight's dtype; everything between them is float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Weight is [V, D_l]; `softcap` is Gemma 2's: logits are softcap * tanh(logits / softcap)."""
        rows = max(1, CHUNK_BYTES.get(hidden.device.type, 2**25) // (4 * len(weight)))
        losses = torch.empty(len(hidden), device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden, dtype=weight.dtype) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                target = targets[part, None]  # [c, 1]
                logits = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float()
                if softcap is not None:
                    tanh = logits.div_(softcap).tanh_()
                    logits = tanh * softcap
                top, best = logits.max(dim=-1, keepdim=True)  # [c, 1]
                own = logits.gather(1, target)
                share = logits.sub_(top).exp_()  # [c, V]
                total = share.sum(dim=-1, keepdim=True)
                losses[part] = (total.log() + top - own)[:, 0]
                correct[part] = (best == target)[:, 0]
                if gradient is None:
                    continue
                share.div_(total).scatter_add_(1, target, torch.full_like(own, -1.0))
                if softcap is not None:
                    share.mul_(tanh.square_().neg_().add_(1))
                gradient[part] = share.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * outer[0][:, None]).to(ctx.dtype), None, None, None, None
