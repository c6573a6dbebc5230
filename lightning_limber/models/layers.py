"""Decoder layers of whatever architecture: hooks before and behind, stand-ins, and compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ResidualHook = Callable[[Tensor], Tensor | None]
"""Sees a residual stream [N, S, D_l]; a tensor that it returns takes its place."""


class Skipped(nn.Module):
    """Stands in for a decoder layer: hands on `output`, fires no hook, gathers no weights."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        # Straight into __dict__: the layer is not moved, sharded or listed as a part of this.
        self.__dict__.update(layer=layer, output=output)

    def __getattr__(self, name: str) -> Any:
        # Some models ask their layers for more (Gemma: attention_type).
        return getattr(self.__dict__["layer"], name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.output


def hook_pre(layer: nn.Module, fn: ResidualHook, first: bool):
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            new = fn(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = fn(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)


def hook_post(layer: nn.Module, fn: ResidualHook, first: bool):
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):  # See `LLM._look_at_a_layer`.
            new = fn(output[0])
            return None if new is None else (new, *output[1:])
        return fn(output)

    return layer.register_forward_hook(hook, prepend=first)


def check_compiler(device: torch.device) -> None:
    """Raises ValueError if torch cannot compile for this device here."""
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # Of a compiler that is missing, mostly, or of a folder without rights.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model.compile_llm=true: torch cannot compile here ({reason}). On a CPU it needs a C++ "
            "compiler such as g++, on a GPU Triton: install it, or set model.compile_llm to false."
        ) from error


def compiled(forward: Callable) -> Callable:
    """A layer's forward, compiled where a gradient is wanted."""
    in_training = torch.compile(forward, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        # Probes and generation are few and of other shapes: not worth compiling for.
        return (in_training if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return call
