"""From text to residual-stream tokens: contexts, batches, one forward for all layers, the mask.

Training, scoring and describing an SAE all read the language model through this file, which itself
goes through `LLM.residual_hooks` as the probe does: "layer l" means one thing everywhere.

Shapes: N sequences, S positions, D the LLM's width, n tokens that count.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_limber.models.llm import LLM

Context = array
"""Token ids of one context, 4 bytes each."""

SINK_FACTOR = 10.0
"""A token is an attention sink where its norm exceeds this many times the layer's median norm."""


def contexts(texts: Iterable[str], tokenizer: Any, context_size: int) -> Iterator[Context]:
    """Cuts texts into contexts of at most `context_size` token ids, each opened by BOS.

    Documents are never joined: a context reads like the start or a part of one text. Pieces of
    fewer than 4 tokens are dropped. A tokenizer without BOS opens contexts with no extra token;
    position 0 is left out of every count either way.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    width = context_size - len(bos)
    for text in texts:
        # What a document says is text: `</s>` in it ends nothing.
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for start in range(0, len(ids), width):
            piece = ids[start : start + width]
            if len(piece) >= 4:
                yield array("i", bos + piece)


def first_tokens(contexts: list[Context], n_tokens: int) -> list[Context]:
    """The first contexts that together hold `n_tokens` tokens."""
    taken, found = [], 0
    for context in contexts:
        if found >= n_tokens:
            break
        taken.append(context)
        found += len(context)
    return taken


def batches(contexts: list[Context], batch_tokens: int) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Right-padded batches of contexts of like length, so that little is padding.

    Yields:
        Token ids [N, S], attention mask [N, S] (int64), and the places of the N contexts in the
        list.
    """
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]), reverse=True)
    while order:
        width = len(contexts[order[0]])
        taken, order = order[: max(1, batch_tokens // width)], order[max(1, batch_tokens // width) :]
        ids = torch.zeros(len(taken), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(taken):
            ids[row, : len(contexts[place])] = torch.tensor(contexts[place].tolist())
            mask[row, : len(contexts[place])] = 1
        yield ids, mask, taken


@torch.no_grad()
def residuals(llm: LLM, ids: Tensor, hook_names: list[str]) -> dict[str, Tensor]:
    """Residual stream [N, S, D] at each hook, from one forward without the vocabulary head."""
    caught: dict[str, Tensor] = {}

    def catch(name: str):
        def hook(hidden: Tensor) -> None:
            caught[name] = hidden

        return hook

    with llm.residual_hooks({name: catch(name) for name in hook_names}), autocast(llm):
        llm.decode(llm.embed(ids))
    return caught


def autocast(llm: LLM) -> torch.autocast:
    """bf16 matrix products where the layers' matrices were stored as bf16, else nothing."""
    weights = (p.dtype for p in llm.layers.parameters())
    return torch.autocast(
        llm.embedding.weight.device.type, torch.bfloat16, enabled=torch.bfloat16 in weights
    )


def counted(hidden: Tensor, mask: Tensor, median_norm: float) -> Tensor:
    """Which tokens count at one layer: text (mask), not position 0, not an attention sink.

    Args:
        hidden: Residual stream [N, S, D].
        mask: Attention mask [N, S]: zero on padding.
        median_norm: Median L2 norm of text tokens at that layer (`median_norms`).

    Returns:
        Bool [N, S].
    """
    keep = mask.bool() & (hidden.float().norm(dim=-1) <= SINK_FACTOR * median_norm)
    keep[:, 0] = False
    return keep


def counted_at_all(hidden: dict[str, Tensor], mask: Tensor, median_norms: dict[str, float]) -> Tensor:
    """Which tokens count at every layer, bool [N, S]; by hook name, see `counted`."""
    return torch.stack([counted(hidden[name], mask, median_norms[name]) for name in hidden]).all(0)


@torch.no_grad()
def text_tokens(
    llm: LLM, contexts: list[Context], hook_names: list[str], batch_tokens: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens [n, D] of text at each hook, float32, without first positions and attention sinks; and the
    median norm, before sinks are left out.
    """
    device = llm.embedding.weight.device
    kept: dict[str, list[Tensor]] = {name: [] for name in hook_names}
    for ids, mask, _ in batches(contexts, batch_tokens):
        inner = mask.bool().to(device)
        inner[:, 0] = False
        for name, hidden in residuals(llm, ids.to(device), hook_names).items():
            kept[name].append(hidden[inner].float())
    found = {}
    for name, parts in kept.items():
        x = torch.cat(parts)
        norm = x.norm(dim=-1)
        median = norm.median()
        found[name] = x[norm <= SINK_FACTOR * median], median
    return found


def median_norms(
    llm: LLM, contexts: list[Context], hook_names: list[str], batch_tokens: int
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, float]]:
    """Yardsticks of text at each hook: median norm, then mean vector and mean norm without sinks."""
    found = text_tokens(llm, contexts, hook_names, batch_tokens)
    median = {name: float(norm) for name, (_, norm) in found.items()}
    mean = {name: x.mean(0) for name, (x, _) in found.items()}
    return median, mean, {name: float(x.norm(dim=-1).mean()) for name, (x, _) in found.items()}
