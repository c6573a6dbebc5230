"""Batches: their order, their shares for each process, and how a run finds its place in them again."""

from __future__ import annotations

import json
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_limber.data.collate import Batch, choose_captions
from lightning_limber.data.held_out import spread, stand_in
from lightning_limber.data.records import UNREADABLE, Record, Skipped, Turns, UnreadableRecord, reason


class RecordSet(Protocol):
    """A map-style data set: the same index always gives the same record, in any process.

    ``[index]`` raises one of `UNREADABLE` for a record that cannot be used.

    These attributes are optional: ``lengths`` (about how long each record's text is, in any unit) lets
    batches hold texts of like length, ``blocks`` (first index of each file, if many records lie in one)
    keeps what is read at a time near together, ``captions(index)`` gives a record's captions without
    decoding its image, ``name(index)`` its name in messages, ``has_image(index)`` whether it has one, and
    ``contents(times)`` what tells the records from others (`fingerprint`).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class RecordStream(ABC):
    """A data set that can only be read from its start: rows are cheap to pass over, `decode` is not."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, epoch: int) -> Iterator[Any]:
        """All rows of an epoch, undecoded, always in the same order."""

    @abstractmethod
    def length(self, row: Any) -> int:
        """About how long the row's text is."""

    @abstractmethod
    def decode(self, row: Any) -> Record:
        """The row as a record."""

    def captions(self, row: Any) -> list[str]:
        """The row's captions; better without decoding its image."""
        return self.decode(row).captions

    def name(self, row: Any) -> str:
        """The row's name in messages."""
        return "of a stream"

    def sources(self) -> list[str]:
        """What tells the stream from others without reading it, such as names and sizes of its files."""
        return []


class PackedList(Sequence):
    """A long list of plain values, each kept as JSON in one array.

    A list of Python objects is copied bit by bit into every loader process as it is read (reference
    counts are written), many gigabytes with half a million conversations; an array is shared.
    """

    def __init__(self, items: Iterator[Any]) -> None:
        packed = [json.dumps(item).encode() for item in items]
        self.ends = np.cumsum([len(item) for item in packed], dtype=np.int64)
        self.bytes = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        start = self.ends[index - 1] if index else 0
        return json.loads(self.bytes[start : self.ends[index]].tobytes())


Purpose = Literal["training", "validation", "probe", "interventions", "captions", "prediction"]
"""What a batch is for: validation adds the captions of other images, the probe its groups of tokens, its
interventions the other images.
"""


class BatchSource:
    """Makes a batch from (epoch, indices or rows of a stream); what a worker process runs."""

    def __init__(
        self,
        records: Any,
        collate: Callable[..., Batch],
        captions_per_image: int,
        seed: int,
        purpose: Purpose = "prediction",
        share_prefix: bool = False,
    ) -> None:
        self.records = records
        self.collate = collate
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.purpose = purpose
        self.share_prefix = share_prefix

    def __getitem__(self, spec: tuple[int, list[tuple[int, Any]]]) -> Batch:
        epoch, items = spec
        records, indices, skipped = [], [], []
        for index, row in items:
            try:
                records.append(self._read(index, row))
                indices.append(index)
            # Left out, counted and named, and too many stop the run (BatchLoader).
            except UNREADABLE as error:
                skipped.append(Skipped(index, self._name(index, row), reason(error)))
        others: list[Record] = []
        if self.purpose in ("validation", "interventions"):  # The control.
            count = len(self.records)
            read = self.records.__getitem__
            others = [stand_in(r, i, count, read) for i, r in zip(indices, records, strict=True)]
        batch = self.collate(
            records,
            self._chosen(records, epoch, indices),
            indices,
            skipped,
            share_prefix=self.share_prefix and self.purpose == "training",
            other_captions=self._chosen(others, epoch, indices) if self.purpose == "validation" else (),
            others=others if self.purpose == "interventions" else (),
            for_probe=self.purpose in ("probe", "interventions"),
        )
        held_out = self.purpose in ("validation", "probe", "interventions", "captions")
        for made in filter(None, (batch, batch.other)):
            made.held_out = held_out
        return batch

    def _chosen(self, records: list[Record], epoch: int, indices: list[int]) -> list[Sequence[str | Turns]]:
        count = self.captions_per_image
        return [
            choose_captions(record, count, (self.seed, epoch, index))
            for index, record in zip(indices, records, strict=True)
        ]

    def _read(self, index: int, row: Any) -> Record:
        record = self.records[index] if row is None else self.records.decode(row)
        if not record.captions and self.purpose != "prediction":
            raise UnreadableRecord("no caption")
        return record

    def _name(self, index: int, row: Any) -> str:
        named = getattr(self.records, "name", None)
        return f"record {index}" if named is None else named(index if row is None else row)


def _leave_signals_alone(worker_id: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach workers too: the run still needs them for the step under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The next SIGTERM is that of the main process.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class BatchLoader:
    """Batches in an order that is a pure function of (seed, epoch): so a resumed run sees exactly the
    batches that it has not seen, with any number of workers.

    An epoch is cut into ``count // batch_size`` batches of nearly equal size: what does not fill a batch
    of its own is spread over the others, so no record is lost. Each batch is cut from the global one:
    process r of w takes items r, r + w, ... of it, so that the number of processes changes neither what
    a step sees nor how many steps an epoch has.

    Its whole state is the epoch and the number of batches handed out. A stream is read to that place
    again (without decoding), and by every process.

    Args:
        source: Makes batches.
        batch_size: Records in a batch, over all processes together.
        shuffle: Training order, else the data set's own.
        num_workers: Loader processes.
        rank: Rank of this process.
        world_size: Number of processes.
        limit: Only so many records, spread by a hash (`held_out.spread`); not of a stream.
        length_window: Sort the records of this many consecutive batches by length before they are cut
            into batches; 0 does not.
        max_bad_share: More unreadable records than this stop the run.
    """

    batch_sampler = None  # Lightning asks for it before it looks at `sampler`.

    def __init__(
        self,
        source: BatchSource,
        batch_size: int,
        *,
        shuffle: bool,
        num_workers: int,
        rank: int,
        world_size: int,
        limit: int | None = None,
        length_window: int = 0,
        max_bad_share: float = 1.0,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.rank, self.world_size = rank, world_size
        self.length_window = length_window
        self.max_bad_share = max_bad_share
        self.count = len(source.records) if limit is None else min(limit, len(source.records))
        self.epoch = 0
        self._yielded = 0
        self._resume: dict[str, int] | None = None

    @property
    def sampler(self) -> BatchLoader:
        """Lightning calls ``loader.sampler.set_epoch(epoch)`` when an epoch starts."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.count // self.batch_size)

    def batch_sizes(self) -> list[int]:
        """Sizes of the global batches of an epoch."""
        size, rest = divmod(self.count, len(self))
        return [size + (i < rest) for i in range(len(self))]

    def batches(self, epoch: int) -> Iterator[list[tuple[int, Any]]]:
        """This process' share of every batch of `epoch`: (index, row of a stream or None)."""
        generator = torch.Generator().manual_seed(self.source.seed * 1_000_003 + epoch)
        sizes = self.batch_sizes()
        window = max(1, self.length_window) if self.shuffle else 1
        items = self._items(epoch, generator)
        for start in range(0, len(sizes), window):
            chosen = sizes[start : start + window]
            chunk = list(islice(items, sum(chosen)))
            if self.length_window and self.shuffle:
                chunk.sort(key=self._length)
            if len(chunk) < sum(chosen):
                raise ValueError(
                    f"The stream ended after {sum(sizes[:start]) + len(chunk)} of {self.count} records: "
                    "set data.num_train to what it holds."
                )
            cuts = np.cumsum([0, *chosen])
            order = torch.randperm(len(chosen), generator=generator).tolist() if window > 1 else [0]
            for i in order:
                yield chunk[cuts[i] : cuts[i + 1]][self.rank :: self.world_size]

    def _items(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[int, Any]]:
        """Records of an epoch in their order."""
        records = self.source.records
        if isinstance(records, RecordStream):
            yield from enumerate(islice(records.rows(epoch), self.count))
        elif not self.shuffle:
            yield from ((i, None) for i in spread(len(records), self.count))
        else:
            for part in shuffled_order(self.count, getattr(records, "blocks", None), generator):
                yield from ((i, None) for i in part.tolist())

    def _length(self, item: tuple[int, Any]) -> int:
        index, row = item
        records = self.source.records
        return records.lengths[index] if row is None else records.length(row)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing runs until the first batch is asked for, when the epoch is known.
        resume, self._resume = self._resume, None
        start = resume["batches"] if resume and resume["epoch"] == self.epoch else 0
        epoch = self.epoch
        self._yielded = start
        loader = DataLoader(
            cast(Any, self.source),
            batch_size=None,
            sampler=cast(Any, ((epoch, items) for items in islice(self.batches(epoch), start, None))),
            num_workers=min(self.num_workers, len(self) - start),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_alone,
            persistent_workers=False,
        )
        seen = bad = 0
        for batch in loader:
            self._yielded += 1
            seen, bad = seen + len(batch.ids) + len(batch.skipped), bad + len(batch.skipped)
            if batch.skipped:
                self._report(batch.skipped, bad, seen)
            yield batch

    def _report(self, skipped: list[Skipped], bad: int, seen: int) -> None:
        lines = "\n  ".join(f"{name}: {why}" for _, name, why in skipped)
        # A few at first are no sign of their share.
        if bad > (max(8, self.max_bad_share * max(seen, 1000)) if self.max_bad_share else 0):
            raise ValueError(
                f"{bad} of {seen} records could not be read, more than data.max_bad_share="
                f"{self.max_bad_share:g}; the last:\n  {lines}\nMend or remove them, or raise the share."
            )
        rank_zero_warn(f"Skipped ({bad} of {seen} so far):\n  {lines}")

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = dict(state)


BLOCKS_AT_A_TIME = 8


def shuffled_order(
    count: int, blocks: Sequence[int] | None, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """A permutation of range(count), in parts.

    Args:
        count: Number of records.
        blocks: First index of each file; files are taken in random order, a few at a time, and the
            records of those are mixed. None mixes all.
        generator: Source of randomness; it is advanced.
    """
    if blocks is None:
        yield torch.randperm(count, generator=generator)
        return
    edges = [*blocks, count]
    for some in torch.randperm(len(blocks), generator=generator).split(BLOCKS_AT_A_TIME):
        part = torch.cat([torch.arange(edges[i], edges[i + 1]) for i in some.tolist()])
        yield part[torch.randperm(len(part), generator=generator)]
