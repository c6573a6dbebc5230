"""How a token is kept from seeing others: by whole masks, or in blocks by FlexAttention.

FlexAttention makes its mask from the rows' ids, leaves out blocks in which nothing is seen, and knows soft
caps, which torch's fused kernels do not. But it must be compiled, which took 16 s for the first width of
rows on an H100 and 13 s more for some of those that followed: training steps on a GPU use it where layers
are compiled anyway (`model.compile_llm`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_limber.data.layout import RowMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_ROWS = "flex_rows"
"""Name of this attention among those of transformers."""
CHECKED_LENGTH = 256
MOST_DIFFERENCE = 0.02
"""Of last hidden states and their gradient in bfloat16, relative; chosen, not measured."""


def whole_mask(rows: RowMask) -> Tensor:
    """What is added to the scores [R, 1, W, W]."""
    lowest = torch.finfo(torch.bfloat16).min  # Of every dtype that attention may be computed in.
    hides = ~rows.dense()
    return torch.zeros_like(hides, dtype=torch.float32).masked_fill_(hides, lowest)


def block_mask(rows: RowMask | None, length: int, device: torch.device) -> BlockMask:
    """The mask of rows [R, W], or of `length` tokens of which each sees all before it, in blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def of_rows(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert rows is not None
        return (query >= key) & rows.at(row, query).sees(rows.at(row, key))

    if rows is None:
        return create_block_mask(causal, None, None, length, length, device=str(device))
    return create_block_mask(of_rows, len(rows.segment), None, length, length, device=str(device))


@contextmanager
def flex_attention(config: Any) -> Iterator[None]:
    """FlexAttention for the forwards inside, of the model with this config; masks are `block_mask`'s."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLEX_ROWS, _flex_rows)
    before = config._attn_implementation
    config._attn_implementation = FLEX_ROWS
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.compiler.disable  # A part of a compiled layer it would get soft caps as symbols, and fail.
def _flex_rows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    from transformers.integrations.flex_attention import flex_attention_forward

    device = query.device.type
    if torch.is_autocast_enabled(device):  # Rotary embeddings leave queries and keys in float32.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)


def can_flex(llm: Any, dtype: torch.dtype) -> bool:
    """Whether FlexAttention serves an LLM under autocast to `dtype`, on the GPU where it is.

    Compiles it, and compares two packed rows and their gradient with those under whole masks. A failure is
    said; none is fatal.
    """
    config = llm.model.config
    # Other kinds of layers see less than all that is before them.
    known = set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    if not (llm.model._supports_flex_attn and known and llm.longest_row):
        return False
    device = llm.embedding.weight.device
    context = getattr(config, "max_position_embeddings", None) or CHECKED_LENGTH
    length = min(CHECKED_LENGTH, llm.longest_row, context)
    segment = torch.arange(length, device=device).ge(length // 2).long().expand(2, -1)  # [2, S]
    rows = RowMask(segment, torch.zeros_like(segment))
    positions = torch.arange(length, device=device) - segment * (length // 2)
    ids = torch.arange(2 * length, device=device).view(2, -1) % llm.vocab_size
    found: list[tuple[Tensor, Tensor]] = []
    try:
        for llm.uses_flex in (False, True):
            with torch.enable_grad(), torch.autocast(device.type, dtype):
                embeds = llm.embed(ids).detach().requires_grad_()
                hidden = llm.decode(embeds, mask=rows, positions=positions)
            # Of half of the width: the final norm leaves the mean square of all of it the same.
            score = hidden.float()[..., : hidden.shape[-1] // 2].square().mean()
            found.append((hidden.detach(), *torch.autograd.grad(score, embeds)))
        differences = [float((b - a).norm() / a.norm()) for a, b in zip(*found, strict=True)]
        reason = f"it differs by {max(differences):.2g}" if max(differences) > MOST_DIFFERENCE else ""
    except Exception as error:  # Of a compiler, mostly: whatever it is, whole masks do.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    llm.uses_flex = False
    if reason:
        rank_zero_info(f"[warning] {llm.name}: attention without FlexAttention, because {reason}")
    return not reason
