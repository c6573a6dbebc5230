"""What every data set has in common: order, sharding, resume, and the held-out set for the probes.

A data source is a subclass of `CaptionData` with one method, `datasets`. Everything else is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_limber.prompt import Batch, Collator, Record, choose_captions


class RecordSet(Protocol):
    """A map-style data set: the same index always gives the same record, in any process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class _BatchSource:
    """Makes a batch from (epoch, indices); what a worker process runs."""

    def __init__(
        self,
        records: RecordSet,
        collate: Collator,
        captions_per_image: int,
        seed: int,
        shuffled: bool = False,
    ) -> None:
        self.records = records
        self.collate = collate
        self.captions_per_image = captions_per_image
        self.seed = seed
        self.shuffled = shuffled

    def __getitem__(self, spec: tuple[int, list[int]]) -> Batch:
        epoch, indices = spec
        records = [self.records[i] for i in indices]
        # The control: every image with the captions of the next one, whatever the batches are.
        next_ones = (
            [self.records[(i + 1) % len(self.records)] for i in indices] if self.shuffled else records
        )
        captions = [
            choose_captions(record.captions, self.captions_per_image, (self.seed, epoch, i))
            for i, record in zip(indices, next_ones, strict=True)
        ]
        return self.collate(records, captions, indices)


class BatchLoader:
    """Batches in an order that is a pure function of (seed, epoch): so a resumed run sees exactly the
    batches that it has not seen, with any number of workers.

    Each batch is cut from the global one: process r of w takes items r, r + w, ... of it, so that the
    number of processes changes neither what a step sees nor how many steps an epoch has.

    Its whole state is the epoch and the number of batches handed out.
    """

    batch_sampler = None  # Lightning asks for it before it looks at `sampler`.

    def __init__(
        self,
        source: _BatchSource,
        batch_size: int,
        *,
        shuffle: bool,
        num_workers: int,
        rank: int,
        world_size: int,
        limit: int | None = None,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.rank, self.world_size = rank, world_size
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
        # Training drops the last, smaller batch; held-out passes keep every image.
        whole = self.count // self.batch_size
        return whole if self.shuffle else whole + (self.count % self.batch_size > 0)

    def batch_indices(self, epoch: int) -> list[list[int]]:
        """This process' share of every batch of `epoch`. A held-out share can be empty."""
        order = torch.arange(self.count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.source.seed * 1_000_003 + epoch)
            order = torch.randperm(self.count, generator=generator)
        batches = [chunk[self.rank :: self.world_size].tolist() for chunk in order.split(self.batch_size)]
        return batches[: len(self)]

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing runs until the first batch is asked for, when the epoch is known.
        resume, self._resume = self._resume, None
        start = resume["batches"] if resume and resume["epoch"] == self.epoch else 0
        specs = [(self.epoch, indices) for indices in self.batch_indices(self.epoch)[start:] if indices]
        self._yielded = start
        loader = DataLoader(
            cast(Any, self.source),
            batch_size=None,
            sampler=cast(Any, specs),
            num_workers=min(self.num_workers, len(specs)),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=False,
        )
        for batch in loader:
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = dict(state)


class CaptionData(pl.LightningDataModule):
    """Images with captions, split into training and held-out.

    Args:
        batch_size: Images in one training step, over all processes together.
        val_batch_size: The same for held-out passes.
        captions_per_image: Captions of an image used in one step; drawn anew each epoch.
        num_workers: Loader processes (0: the main process). Does not change any number.
        seed: Of the order of batches and the choice among captions.
    """

    def __init__(
        self,
        batch_size: int = 16,
        val_batch_size: int = 32,
        captions_per_image: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.captions_per_image = captions_per_image
        self.num_workers = num_workers
        self.seed = seed
        self.train_set: RecordSet
        self.val_set: RecordSet
        self.collate: Collator

    def datasets(self) -> tuple[RecordSet, RecordSet]:
        """Returns the training set and the held-out set."""
        raise NotImplementedError

    def score_caption(self, caption: str, scene: Any) -> dict[str, tuple[int, int]] | None:
        """Right and total slots of a written caption by kind, where the truth is known exactly."""
        return None

    def attributes(self, scene: Any) -> set[str] | None:
        """What is true of an image, in words ("red", "star"), where the truth is known exactly."""
        return None

    def setup(self, stage: str | None = None) -> None:
        if not hasattr(self, "train_set"):
            self.train_set, self.val_set = self.datasets()
        # How an image becomes numbers and a caption tokens belongs to the two frozen models.
        self.collate = cast(Any, self.trainer).lightning_module.collator()
        world_size = self._world[1]
        if self.batch_size % world_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} is the batch of all processes together and must "
                f"divide by their number, {world_size}."
            )
        if len(self.train_set) < self.batch_size:
            raise ValueError(
                f"{len(self.train_set)} training images do not fill one batch of {self.batch_size}: "
                "lower data.batch_size or add images."
            )

    @property
    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def _loader(
        self,
        records: RecordSet,
        batch_size: int,
        shuffle: bool,
        limit: int | None = None,
        shuffled_captions: bool = False,
    ) -> BatchLoader:
        rank, world_size = self._world
        return BatchLoader(
            _BatchSource(records, self.collate, self.captions_per_image, self.seed, shuffled_captions),
            batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
            limit=limit,
        )

    def train_dataloader(self) -> Any:
        return self._loader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        """Held-out images with their own captions, and (the control) with another image's."""
        return [
            self._loader(self.val_set, self.val_batch_size, shuffle=False, shuffled_captions=shuffled)
            for shuffled in (False, True)
        ]

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> Any:
        return self._loader(self.val_set, self.val_batch_size, shuffle=False)

    def probe_dataloader(self, num_images: int) -> BatchLoader:
        """The first `num_images` held-out images, always the same, in this process' share."""
        return self._loader(self.val_set, self.val_batch_size, shuffle=False, limit=num_images)

    def calibration_batch(self, num_images: int = 64) -> Batch:
        """The first training images, the same in every process: see `Adapter.calibrate`."""
        count = min(num_images, len(self.train_set))
        source = _BatchSource(self.train_set, self.collate, 1, self.seed)
        return source[(0, list(range(count)))]
