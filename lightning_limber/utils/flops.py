"""FLOPs of whatever runs, counted as torch executes it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

# torch knows the fused attention kernels of GPUs only.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of matrix products, convolutions and attention within it, in `total`.

    With the formulas of torch's FlopCounterMode (2 FLOPs a multiply-add). That one also takes some
    operations apart, which rounds otherwise: here what runs is, bit by bit, what runs without a counter.
    In inference mode, and in compiled code, it does not see the products.
    """

    FORMULAS = {**flop_registry, **{op: shape_wrapper(count) for op, count in CPU_ATTENTION.items()}}

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func._overloadpacket is torch.ops.aten.sparse_sampled_addmm:
            self.total += 2 * output._nnz() * args[1].shape[-1]
        elif count := self.FORMULAS.get(func._overloadpacket):
            if args[0].is_sparse:
                self.total += 2 * args[0]._nnz() * output.shape[-1]
            else:
                self.total += count(*args, **kwargs, out_val=output)
        return output
