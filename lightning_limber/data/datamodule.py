"""What every data set has in common: its two parts, their loaders, and the held-out images of the probes.

A data source is a subclass of `CaptionData` with one method, `datasets`. Everything else is here, and in
loader.py: which records make a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, repeat
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_limber.data.collate import Batch, Collator
from lightning_limber.data.fingerprint import data_differences, fingerprint
from lightning_limber.data.left_out import listing
from lightning_limber.data.loader import BatchLoader, BatchSource, Purpose, RecordSet, RecordStream
from lightning_limber.data.part import split_off
from lightning_limber.data.records import UNREADABLE


class CaptionData(pl.LightningDataModule):
    """Images with captions, split into training and held-out.

    Args:
        batch_size: Number of images in a training batch, over all processes together.
        val_batch_size: Number of images in a batch of held-out images, over all processes together.
        captions_per_image: Number of an image's captions in one batch, drawn anew each epoch.
        num_workers: Number of loader processes; 0 loads in the main process. Changes no result.
        seed: Seed of the order of batches and of the choice among captions.
        length_window: Put texts of like length into one batch, so that less is padding
            (``train/padding``): the records of this many consecutive batches are sorted by length, cut
            into batches, and these are shuffled. 0 switches it off.
        max_bad_share: Stop the run when more than this share of the records cannot be read. Up to it,
            they are left out, counted and named.
        share_prefix: Put the captions of one training image into one sequence, [prefix | image |
            caption 1 | caption 2 | ...], in which each sees the image and itself only: the same loss,
            with the image's tokens computed once. False gives each caption a sequence of its own.
        choose_on: Hold out this many training records, spread by a hash, in place of the held-out set: for
            choosing settings without a look at the held-out images. null holds out the held-out set.
    """

    def __init__(
        self,
        batch_size: int = 16,
        val_batch_size: int = 32,
        captions_per_image: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        length_window: int = 0,
        max_bad_share: float = 0.01,
        share_prefix: bool = True,
        choose_on: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.captions_per_image = captions_per_image
        self.num_workers = num_workers
        self.seed = seed
        self.length_window = length_window
        self.max_bad_share = max_bad_share
        self.share_prefix = share_prefix
        self.choose_on = choose_on
        self._fingerprint: dict[str, dict[str, str]] | None = None
        self.train_set: RecordSet | RecordStream
        self.val_set: RecordSet

    def datasets(self) -> tuple[RecordSet | RecordStream, RecordSet]:
        """Returns the training set and the held-out set; every held-out record has an image."""
        raise NotImplementedError

    def test_dataset(self) -> RecordSet:
        """What `test` runs on: the held-out set, unless the data set has a third part."""
        return self.val_set

    def score_caption(self, caption: str, scene: Any) -> dict[str, tuple[int, int]] | None:
        """Right and total slots of a written caption by kind, where the truth is known exactly."""
        return None

    def attributes(self, scene: Any) -> set[str] | None:
        """What is true of an image, in words ("red", "star"), where the truth is known exactly."""
        return None

    def setup(self, stage: str | None = None) -> None:
        if not hasattr(self, "train_set"):
            self.train_set, self.val_set = self.datasets()
            if self.choose_on is not None:
                self.train_set, self.val_set = split_off(self.train_set, self.choose_on)
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
        if min(self.val_batch_size, len(self.val_set)) < world_size:
            raise ValueError(
                f"data.val_batch_size={self.val_batch_size} and {len(self.val_set)} held-out images: each "
                f"of {world_size} processes needs at least one image of every batch."
            )
        if self.length_window and not (
            hasattr(self.train_set, "lengths") or hasattr(self.train_set, "length")
        ):
            raise ValueError(
                f"data.length_window={self.length_window}: {type(self).__name__} does not know the lengths "
                "of its texts. Set it to 0."
            )

    @property
    def collate(self) -> Collator:
        """How an image becomes pixels and a caption tokens belongs to the model."""
        return cast(Any, self.trainer).lightning_module.collator()

    @property
    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)

    def _loader(
        self, records: RecordSet | RecordStream, purpose: Purpose, limit: int | None = None
    ) -> BatchLoader:
        rank, world_size = self._world
        training = purpose == "training"
        return BatchLoader(
            BatchSource(
                records, self.collate, self.captions_per_image, self.seed, purpose, self.share_prefix
            ),
            self.batch_size if training else self.val_batch_size,
            shuffle=training,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
            limit=limit,
            length_window=self.length_window,
            max_bad_share=self.max_bad_share,
        )

    def train_dataloader(self) -> Any:
        return self._loader(self.train_set, "training")

    def val_dataloader(self) -> Any:
        """Held-out images with their own captions, and (the control) with another image's."""
        return self._loader(self.val_set, "validation")

    def test_dataloader(self) -> Any:
        return self._loader(self.test_dataset(), "validation")

    def predict_dataloader(self) -> Any:
        return self._loader(self.val_set, "prediction")

    def probe_dataloader(self, num_images: int, interventions: bool = False) -> BatchLoader:
        """`num_images` held-out records (`held_out.spread`), in this process' share, for the probe.

        Args:
            num_images: Fewer are always among more.
            interventions: Also read another image for each.
        """
        return self._loader(self.val_set, "interventions" if interventions else "probe", num_images)

    def caption_dataloader(self, num_images: int, records: RecordSet) -> BatchLoader:
        """`num_images` of `records` (`held_out.spread`), in this process' share."""
        return self._loader(records, "captions", num_images)

    def training_captions(self, limit: int = 4096) -> Iterator[str]:
        """All captions of `limit` training records, spaced evenly; of a stream, of its first ones.

        Images are decoded only where the data set cannot do without. What cannot be read is left out:
        the training loader counts and names it.
        """
        records = self.train_set
        if isinstance(records, RecordStream):
            rows: Iterable[Any] = islice(records.rows(0), min(limit, len(records)))
            captions = records.captions
        else:
            rows = range(0, len(records), -(-len(records) // limit))
            captions = getattr(records, "captions", None) or (lambda index: records[index].captions)
        for row in rows:
            try:
                yield from captions(row)
            except UNREADABLE:
                continue

    def fingerprint(self) -> dict[str, dict[str, str]]:
        """What both parts hold (`fingerprint.py`), looked up once."""
        if self._fingerprint is None:
            parts = {"training": self.train_set, "held-out": self.val_set}
            self._fingerprint = {part: fingerprint(records) for part, records in parts.items()}
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Into every checkpoint."""
        return {"fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses to train on with other data than those that the run began with.

        Raises:
            ValueError: they differ.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        if lines := data_differences(state["fingerprint"], self.fingerprint()):
            raise ValueError(
                "The data are not those that this run began with:\n  "
                + "\n  ".join(lines)
                + "\nBring them back to continue the run, or start a new one from its adapter with "
                "--model.adapter_weights PATH (and no --ckpt_path)."
            )
        for part, found in self.fingerprint().items():
            if found.keys() == {"records"}:
                rank_zero_info(f"[resume] {part} data: their number alone is known, and is the same")

    def calibration_batch(self, num_images: int = 64) -> Batch:
        """The first training images that can be read, the same in every process: see `Adapter.calibrate`.

        Raises:
            ValueError: no record has an image that can be read, or all captions are cut.
        """
        count = min(num_images, len(self.train_set))
        source = BatchSource(self.train_set, self.collate, 1, self.seed, "training")
        rows = self.train_set.rows(0) if isinstance(self.train_set, RecordStream) else repeat(None)
        items = enumerate(islice(rows, len(self.train_set)))
        batch = source[(0, list(islice(items, count)))]
        skipped = [*batch.skipped]
        while not len(batch.pixel_values) and (more := list(islice(items, count))):
            batch = source[(0, more)]
            skipped += batch.skipped
        if not len(batch.pixel_values):
            lines = listing([f"{name}: {why}" for _, name, why in skipped])
            raise ValueError(
                f"None of the {len(self.train_set)} training records has an image"
                + (f" that can be read:\n  {lines}" if skipped else ".")
            )
        if all(batch.truncated):
            raise ValueError(
                f"model.max_caption_tokens={self.collate.prompt.max_caption_tokens} cuts all of the first "
                f"{len(batch.truncated)} captions: raise it."
            )
        return batch
