"""Data sets of the Hugging Face hub, or saved by its library: map-style or streamed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_limber.data.datamodule import CaptionData
from lightning_limber.data.fingerprint import Content, file_stamps
from lightning_limber.data.image_folder import open_image
from lightning_limber.data.loader import RecordSet, RecordStream
from lightning_limber.data.records import Record, UnreadableRecord
from lightning_limber.data.text import sort_captions, usable_captions

SHUFFLE_BUFFER = 10_000


class Columns:
    """Which columns are what; makes a record of a row whose image is not decoded yet."""

    def __init__(self, image: str, caption: str) -> None:
        self.image, self.caption = image, caption

    def captions(self, row: dict[str, Any]) -> list[str]:
        return usable_captions(row[self.caption])

    def length(self, row: dict[str, Any]) -> int:
        return sum(map(len, sort_captions(row[self.caption])[0]))

    def record(self, row: dict[str, Any], name: str) -> Record:
        captions, image = self.captions(row), row[self.image]
        if image is None or (image["bytes"] is None and not image["path"]):
            raise UnreadableRecord("its image is null")
        source = io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])
        return Record(name, open_image(source), captions)


class TableSet:
    """A map-style data set; neighbouring rows of one image are one record."""

    def __init__(self, table: Any, columns: Columns, split: str) -> None:
        self.table, self.columns, self.split = table, columns, split
        self.first_rows = first_rows(table, columns.image)

    def __len__(self) -> int:
        return len(self.first_rows)

    def __getitem__(self, index: int) -> Record:
        row = {**self.table[int(self.first_rows[index])], self.columns.caption: self._said(index)}
        return self.columns.record(row, self.name(index))

    def name(self, index: int) -> str:
        return f"{self.split}/{self.first_rows[index]}"

    def captions(self, index: int) -> list[str]:
        return usable_captions(self._said(index))

    def contents(self, times: bool) -> Iterator[Content]:
        import pyarrow.compute as pc

        said = [
            value for part in arrow_parts(self._texts, self.columns.caption) for value in part.to_pylist()
        ]
        sizes: list[int | None] = []
        paths: list[str | None] = []
        for part in arrow_parts(self.table, self.columns.image):
            sizes += pc.binary_length(pc.struct_field(part, "bytes")).to_pylist()
            paths += pc.struct_field(part, "path").to_pylist()
        # Where the table itself holds the pictures, the library's name of it changes with them.
        table = self.table._fingerprint if times else ""
        files = [Path(path or "") for path, size in zip(paths, sizes, strict=True) if size is None]
        stamps = iter(file_stamps(files, times))
        pictures = [next(stamps) if size is None else f"{size} {table}" for size in sizes]
        firsts = self.first_rows.tolist()
        for first, end in zip(firsts, [*firsts[1:], len(said)], strict=True):
            yield Content(f"{self.split}/{first}", said[first:end], pictures[first])

    @cached_property
    def lengths(self) -> list[int]:
        of_rows = [self.columns.length(row) for row in self._texts]
        return np.add.reduceat(np.array(of_rows, dtype=np.int64), self.first_rows).tolist()

    def _said(self, index: int) -> list[Any]:
        """The captions of the record's rows as they stand."""
        end = self.first_rows[index + 1] if index + 1 < len(self) else len(self.table)
        values = self._texts[int(self.first_rows[index]) : int(end)][self.columns.caption]
        return [text for value in values for text in (value if isinstance(value, list) else [value])]

    @cached_property
    def _texts(self) -> Any:
        return self.table.select_columns([self.columns.caption])


def arrow_parts(table: Any, column: str) -> Iterator[Any]:
    """A column in parts, as Arrow arrays {bytes, path} of undecoded images, which are read when used."""
    for part in table.select_columns([column]).with_format("arrow").iter(1000):
        yield part[column].combine_chunks()


def first_rows(table: Any, image: str) -> np.ndarray:
    """The rows at which another image begins than that of the row before."""
    import pyarrow.compute as pc

    firsts, start, last = [], 0, None
    for column in arrow_parts(table, image):
        sizes = pc.fill_null(pc.binary_length(pc.struct_field(column, "bytes")), -1)
        sizes = sizes.to_numpy(zero_copy_only=False)
        same = np.concatenate([[last is not None], sizes[1:] == sizes[:-1]])
        for i in same.nonzero()[0].tolist():
            before = column[i - 1] if i else last
            same[i] = column[i].is_valid and column[i].equals(before)
        firsts.append(start + (~same).nonzero()[0])
        start, last = start + len(column), column[len(column) - 1]
    return np.concatenate(firsts) if firsts else np.zeros(0, dtype=np.int64)


class StreamSet(RecordStream):
    """A streamed data set; rows are shuffled in a buffer, as a function of seed and epoch."""

    def __init__(
        self, stream: Any, columns: Columns, split: str, count: int, seed: int, sources: list[str]
    ) -> None:
        self.stream, self.columns, self.split = stream, columns, split
        self.count, self.seed, self._sources = count, seed, sources

    def sources(self) -> list[str]:
        return self._sources

    def __len__(self) -> int:
        return self.count

    def rows(self, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        numbered = self.stream.map(lambda row, i: {**row, "_place": i}, with_indices=True)
        shuffled = numbered.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        shuffled.set_epoch(epoch)
        for row in shuffled:
            yield row.pop("_place"), row

    def length(self, row: tuple[int, dict[str, Any]]) -> int:
        return self.columns.length(row[1])

    def captions(self, row: tuple[int, dict[str, Any]]) -> list[str]:
        return self.columns.captions(row[1])

    def decode(self, row: tuple[int, dict[str, Any]]) -> Record:
        return self.columns.record(row[1], self.name(row))

    def name(self, row: tuple[int, dict[str, Any]]) -> str:
        return f"{self.split}/{row[0]}"


class HuggingFaceCaptions(CaptionData):
    """An image column and a caption column (a string, or a list of them) of a Hugging Face data set.

    Neighbouring rows of one image are one record; of a stream each row is one.

    Streamed, nothing is stored: every process reads the stream and decodes its own share, and a resumed
    run reads (without decoding) up to where it stopped. The held-out split is always map-style.

    Args:
        path: Hub name, or a folder that ``save_to_disk`` wrote, or any builder of the library
            (``parquet``, ``imagefolder``).
        name: Configuration of the data set.
        data_files: Files of a builder by split: ``{train: a-*.parquet, validation: b.parquet}``.
        image_column: Column that holds the image.
        caption_column: Column that holds the caption or captions.
        train_split: Split to train on.
        val_split: Split held out; slices are allowed (``train[:1000]``).
        streaming: Read the training split as a stream.
        num_train: Records of a streamed split; null takes what the data set says.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: dict[str, str] | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        train_split: str = "train",
        val_split: str = "validation",
        streaming: bool = False,
        num_train: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.name, self.data_files = path, name, data_files
        self.columns = Columns(image_column, caption_column)
        self.train_split, self.val_split = train_split, val_split
        self.streaming = streaming
        self.num_train = num_train
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        self._load(self.val_split, streaming=False)
        if not self.streaming:
            self._load(self.train_split, streaming=False)

    def datasets(self) -> tuple[RecordSet | RecordStream, RecordSet]:
        val = TableSet(self._load(self.val_split, streaming=False), self.columns, self.val_split)
        train = self._load(self.train_split, self.streaming)
        if not self.streaming:
            return TableSet(train, self.columns, self.train_split), val
        known = (train.info.splits or {}).get(self.train_split)
        count = self.num_train or (known.num_examples if known else None)
        if not count:
            raise ValueError(
                f"data.streaming=true: '{self.path}' does not say how many records "
                f"'{self.train_split}' has. Set data.num_train."
            )
        return StreamSet(train, self.columns, self.train_split, count, self.seed, self._sources()), val

    def _sources(self) -> list[str]:
        """Files of the training split with their sizes; on the hub their addresses name the revision."""
        import datasets

        folder = Path(self.path).expanduser()
        if (folder / "dataset_dict.json").is_file():
            return [datasets.load_from_disk(folder)[self.train_split]._fingerprint]
        builder = datasets.load_dataset_builder(self.path, self.name, data_files=self.data_files)
        files = list((builder.config.data_files or {}).get(self.train_split, ()))
        paths = [Path(file) for file in files]
        sizes = file_stamps(paths, times=False)
        return [
            f"{path.name} {size}" if size else file
            for file, path, size in zip(files, paths, sizes, strict=True)
        ]

    def _load(self, split: str, streaming: bool) -> Any:
        import datasets

        folder = Path(self.path).expanduser()
        if (folder / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(folder)[split]
            table = table.to_iterable_dataset(num_shards=1) if streaming else table
        else:
            table = datasets.load_dataset(
                self.path, self.name, data_files=self.data_files, split=split, streaming=streaming
            )
        missing = {self.columns.image, self.columns.caption} - set(table.column_names or ())
        if missing:
            raise ValueError(
                f"'{self.path}' has no column {sorted(missing)}; it has {table.column_names}. Set "
                "data.image_column and data.caption_column."
            )
        # Undecoded: the loader's workers decode.
        table = table.select_columns([self.columns.image, self.columns.caption])
        return table.cast_column(self.columns.image, datasets.Image(decode=False))
