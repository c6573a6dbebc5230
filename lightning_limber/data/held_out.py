"""Which held-out images are looked at, and which image stands in for another.

Both are functions of indices and captions alone: no seed, batch size or number of processes changes them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from lightning_limber.data.records import UNREADABLE, Record

TRIES = 32
"""So many images are drawn until one has other captions."""


def spread(count: int, limit: int) -> list[int]:
    """`limit` of `count` indices, spread by a hash, a larger limit only adding to them; or all, in order.

    The first records of a data set are often of one kind: one author, one class, one video.
    """
    if limit >= count:
        return list(range(count))
    return sorted(range(count), key=lambda i: hashlib.sha256(str(i).encode()).digest())[:limit]


def stand_in(record: Record, index: int, count: int, read: Callable[[int], Record]) -> Record:
    """Another image's record, drawn at random as a function of `index`, without any of the same captions.

    It is another image by its pixels: a data set may hold one under two names.

    Args:
        record: The record that it stands in for.
        index: The index of that record.
        count: Number of records to draw from.
        read: Reads a record; one that it cannot read is passed over.

    Returns:
        The record itself, where no other can be read; one with a caption in common, where none of those
        drawn has other captions.
    """
    draws, found = random.Random(f"stand-in for {index}"), record
    for _ in range(TRIES if count > 1 else 0):
        try:
            found = read((index + draws.randrange(1, count)) % count)
        except UNREADABLE:
            continue
        if set(found.captions).isdisjoint(record.captions) and _pixels(found) != _pixels(record):
            break
    return found


def _pixels(record: Record) -> object:
    """What differs between different images, and between records without one."""
    return record if record.image is None else (record.image.size, record.image.tobytes())
