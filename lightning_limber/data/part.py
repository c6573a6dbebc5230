"""A part of a training set that stands in for the held-out set while settings are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lightning_limber.data.held_out import spread
from lightning_limber.data.loader import RecordSet, RecordStream
from lightning_limber.data.records import Record


class Part:
    """Some records of a data set, with whatever it knows about them; see `RecordSet`.

    Args:
        records: The data set.
        indices: [n] indices of the records, ascending.
    """

    def __init__(self, records: Any, indices: Sequence[int]) -> None:
        self.records, self.indices = records, indices
        for name in ("captions", "name", "has_image"):
            if method := getattr(records, name, None):
                setattr(self, name, partial(self._ask, method))
        if hasattr(records, "lengths"):
            self.lengths = np.asarray(records.lengths)[indices]
        if hasattr(records, "blocks"):
            self.blocks = np.searchsorted(indices, records.blocks).tolist()
        if hasattr(records, "contents"):
            # Of the whole: what lies in one file may not be told apart. The settings say which part it is.
            self.contents = records.contents

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.records[self.indices[index]]

    def _ask(self, method: Callable[[int], Any], index: int) -> Any:
        return method(self.indices[index])


def split_off(records: RecordSet | RecordStream, count: int) -> tuple[Part, Part]:
    """The training set without `count` records with an image, spread by a hash, and these.

    Raises:
        ValueError: it is a stream, or has no more records.
    """
    if isinstance(records, RecordStream):
        raise ValueError(
            f"data.choose_on={count}: a stream's records can only be read from the start, so that none can "
            "be held out. Set data.streaming to false, or choose_on to null."
        )
    has_image = getattr(records, "has_image", None)
    known = [i for i in range(len(records)) if has_image is None or has_image(i)]
    if count >= len(known):
        raise ValueError(
            f"data.choose_on={count}: the training set has {len(known)} records with an image, and some "
            "must be left to train on. Lower it."
        )
    held_out = [known[i] for i in spread(len(known), count)]
    kept = np.setdiff1d(np.arange(len(records)), held_out).tolist()
    return Part(records, kept), Part(records, held_out)
