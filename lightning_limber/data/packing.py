"""Several short sequences in one row, so that little of a batch is padding.

A batch is as wide as its longest sequence, and of drawn or photographed scenes' captions the mean is well
below it. Laid end to end, a few to a row, sequences are kept apart by a mask and their position ids: each
token's result is what it is in a sequence of its own, within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace
from math import ceil

ATTENTION = 4.0
"""Time of a FLOP of attention as a multiple of a FLOP of the matrices: small products, a mask and a softmax
(measured on two CPU cores, D 576, bfloat16: rows of 60 tokens are 7 % faster than rows of 120)."""
LEAST_GAIN = 0.05
"""Packing must save this share of the cost, because the mask itself costs time; chosen, not measured."""


def fill_rows(
    lengths: Sequence[int], width: int, hidden_size: int, longest_row: int | None
) -> list[list[int]]:
    """Chooses which sequences share a row; each gets its own where packing does not pay.

    The longest sequence comes first, each goes to the row that is shortest so far; this is tried for two to
    eight sequences a row, and the cheapest result is taken. A position costs what the layers' matrices do
    (24 D^2 FLOPs) and attention over its row (4 W D FLOPs, each `ATTENTION` times as slow).

    Args:
        lengths: Tokens of each of the N sequences, without padding.
        width: Width of a row when each sequence has its own.
        hidden_size: Width D of the LLM.
        longest_row: Longest allowed row; None: no two sequences may share one.
    """

    def cost(rows: int, width: int) -> float:
        return rows * width * (1 + ATTENTION * width / (6 * hidden_size))

    best = [[i] for i in range(len(lengths))]
    if longest_row is None:
        return best
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
