"""Several short sequences in one row, so that little of a batch is padding.

A batch is as wide as its longest sequence, and of drawn or photographed scenes' captions the mean is well
below it. Here sequences are laid end to end, a few to a row; a mask and position ids keep them apart, so
each token's result is what it is in a sequence of its own, within rounding.

Shapes: N sequences of S positions before, R rows of W positions after.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace
from math import ceil

import torch
from torch import Tensor

ATTENTION = 4.0
"""Seconds that a FLOP of attention takes, as a multiple of one of the matrices: small products, a mask and
a softmax, written out on a CPU (two cores, D 576, bfloat16: rows of 60 tokens 7 % faster than of 120)."""
LEAST_GAIN = 0.05
"""Share of the cost that packing must spare, as a mask has a price of its own; chosen, not measured."""


def fill_rows(lengths: Sequence[int], width: int, hidden_size: int, longest_row: int) -> list[list[int]]:
    """Which sequences share a row, in order; one a row where packing does not pay.

    The longest come first, each to the row that is shortest so far, for two to eight sequences a row; the
    cheapest of these is taken. The cost of a position is that of the layers' matrices (24 D^2 FLOPs)
    and of attention over its row (4 W D, and by measurement four times as slow: `ATTENTION`).

    Args:
        lengths: Of the N sequences, without their padding.
        width: What they are padded to when each has its own row.
        hidden_size: The LLM's D.
        longest_row: No packed row is longer.
    """

    def cost(rows: int, width: int) -> float:
        return rows * width * (1 + ATTENTION * width / (6 * hidden_size))

    best = [[i] for i in range(len(lengths))]
    least = (1 - LEAST_GAIN) * cost(len(lengths), width)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for share in (2, 3, 4, 6, 8):
        rows: list[list[int]] = [[] for _ in range(ceil(len(lengths) / share))]
        shortest = [(0, row) for row in range(len(rows))]  # A heap.
        for i in order:
            filled, row = shortest[0]
            rows[row].append(i)
            heapreplace(shortest, (filled + lengths[i], row))
        longest, _ = max(shortest)
        if longest <= longest_row and cost(len(rows), longest) < least:
            best, least = rows, cost(len(rows), longest)
    return best


def pack(
    embeds: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    rows: list[list[int]],
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lays sequences [N, S, D] out in rows.

    Args:
        embeds: [N, S, D]
        mask: [N, 1, S, S] true where the row's token sees the column's; None: all before it.
        positions: [N, S] position ids; None: 0, 1, 2, ...
        rows: From `fill_rows`.
        lengths: Of the N sequences; what is behind is dropped.

    Returns:
        embeds [R, W, D], mask [R, 1, W, W], positions [R, W], and where each of the N * S positions now is
        among the R * W ([N * S]; of a dropped one any).
    """
    count, length = embeds.shape[:2]
    width = max(sum(lengths[i] for i in row) for row in rows)
    # On the host, where the lengths are known: the device is not asked for anything.
    source = torch.zeros(len(rows), width, dtype=torch.long)
    owner = torch.full((len(rows), width), -1)  # Padding sees padding: no row of the mask is empty.
    place = torch.zeros(count * length, dtype=torch.long)
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            end = start + lengths[i]
            source[r, start:end] = torch.arange(i * length, i * length + lengths[i])
            owner[r, start:end] = i
            place[i * length : i * length + lengths[i]] = torch.arange(r * width + start, r * width + end)
            start = end
    source, owner, place = (t.to(embeds.device, non_blocking=True) for t in (source, owner, place))
    column = source % length  # [R, W]
    same = owner[:, :, None] == owner[:, None, :]  # [R, W, W]
    if mask is None:
        sees = column[:, :, None] >= column[:, None, :]
    else:
        sees = mask[owner.clamp_min(0)[:, :, None], 0, column[:, :, None], column[:, None, :]]
        sees = sees | (owner < 0)[:, :, None]
    own = column if positions is None else positions.flatten()[source]
    laid = embeds.flatten(0, 1).index_select(0, source.flatten()).unflatten(0, source.shape)
    return laid, (same & sees)[:, None], own, place
