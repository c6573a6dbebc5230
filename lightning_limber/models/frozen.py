"""What both frozen models have in common."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def freeze(module: nn.Module) -> None:
    """Frozen means: eval mode, and no gradient for any parameter."""
    module.eval().requires_grad_(False)


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def fingerprint(module: nn.Module, values_per_tensor: int = 4096) -> str:
    """A short hash of a module's weights: names, shapes and evenly spaced values of each tensor.

    Quick (it reads at most `values_per_tensor` values of each), and enough to tell one pretrained
    model, or one revision of it, from another.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // values_per_tensor)].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def store_matrices(module: nn.Module, dtype: torch.dtype) -> None:
    """Stores the matrices of all linear layers in `dtype`.

    Not embeddings and norms, which autocast leaves in float32.
    """
    for part in module.modules():
        weight = getattr(part, "weight", None)
        # By shape: GPT-2 has a linear layer of its own kind.
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(part, nn.Embedding):
            weight.data = weight.data.to(dtype)
