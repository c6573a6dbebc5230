"""Cross-entropy through a frozen output head, without ever holding the logits.

With a frozen head the gradient of a token's loss is (softmax - onehot) W: all of it is known in the
forward pass. So the head runs over a few rows at a time, and what is kept for the backward pass is one
vector [D_l] per token instead of its V logits (49,152 or 256,000 of them, several times over).
"""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""Of float32 logits at a time. The head's weights are read once for each chunk: fewer are faster (one CPU
core, 213 targets, 49,152 x 576 in bfloat16: 0.27 s with 2**23, 0.20 s with 2**24, 0.16 s in one chunk)."""

_kept: dict[torch.dtype, Tensor] = {}


def _scratch(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for logits, beside `like`; on a CPU the same at every call.

    There the system would hand out and clear these pages anew each time; with larger chunks this spares 2 %
    of the default training step.
    """
    if like.device.type != "cpu" or type(like) is not Tensor:  # Fake ones have no memory to keep.
        return torch.empty(shape, dtype=dtype, device=like.device)
    size = prod(shape)
    if dtype not in _kept or len(_kept[dtype]) < size:
        with torch.inference_mode(False):  # What is made in that mode cannot be written to outside of it.
            _kept[dtype] = torch.empty(size, dtype=dtype)
    return _kept[dtype][:size].view(shape)


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
        most = max(1, CHUNK_BYTES.get(hidden.device.type, 2**26) // (4 * len(weight)))
        rows = max(1, ceil(len(hidden) / ceil(max(1, len(hidden)) / most)))  # In equal parts.
        head = weight.T
        size = rows, len(weight)
        products = _scratch(hidden, size, weight.dtype)
        exact = products if weight.dtype == torch.float32 else _scratch(hidden, size, torch.float32)
        losses = torch.empty(len(hidden), device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden, dtype=weight.dtype) if ctx.needs_input_grad[0] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                target = targets[part, None]  # [c, 1]
                inputs = hidden[part].to(weight.dtype)
                product, logits = products[: len(inputs)], exact[: len(inputs)]  # [c, V] each
                if bias is None:
                    torch.mm(inputs, head, out=product)
                else:
                    torch.addmm(bias, inputs, head, out=product)
                if exact is not products:
                    logits.copy_(product)
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
                if exact is not products:
                    share = product.copy_(share)
                gradient[part] = share @ weight
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * outer[0][:, None]).to(ctx.dtype), None, None, None, None
