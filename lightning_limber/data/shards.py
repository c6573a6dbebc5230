"""WebDataset shards as img2dataset writes them (CC3M, CC12M): tar files of images with their captions.

Each tar is indexed once (where every image and caption begins), which makes the shards a map-style set:
every sample of an epoch is seen exactly once, by any number of processes and workers, and a run resumes
at any batch. Order keeps reads near together: a few shards at a time, in random order, are mixed.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm

from lightning_limber.data.datamodule import CaptionData
from lightning_limber.data.fingerprint import Content, file_stamps
from lightning_limber.data.image_folder import SUFFIXES, open_image
from lightning_limber.data.loader import RecordSet
from lightning_limber.data.records import Record, UnreadableRecord
from lightning_limber.data.text import clean, decode, parse_object
from lightning_limber.utils.by_image import DAMAGED
from lightning_limber.utils.cache import cache_dir, warn_once
from lightning_limber.utils.files import write_whole

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstandard"}
"""The first two bytes of compressed files."""


def expand_braces(pattern: str) -> list[str]:
    """``cc3m/{00000..00331}.tar`` -> 332 names; ``{a,b}`` -> two."""
    parts: list[list[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        if span := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text):
            first, last = span.groups()
            parts.append([str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)])
        elif text.startswith("{"):
            parts.append(text[1:-1].split(","))
        else:
            parts.append([text])
    return ["".join(choice) for choice in product(*parts)]


class Index(NamedTuple):
    """Where the samples of one tar are."""

    rows: np.ndarray
    """[n, 6] of image offset and size, text offset and size, is-JSON, and the text's CRC-32. A text that is
    not there has offset -1.
    """
    cut: str = ""
    """What is wrong with the tar's end; '' if it is whole."""


def index_shard(path: str) -> Index:
    """Looks up every sample of a tar.

    A sample is the files of one name: an image, and a ``.txt`` or (if there is none) the ``caption`` of
    a ``.json``. Names without an image are no sample: img2dataset writes such for failed downloads. Of a
    tar that was cut, the samples that are whole are read.

    Raises:
        ValueError: it is compressed, empty or no tar.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with open(path, "rb") as file:
        if kind := COMPRESSED.get(file.read(2)):
            raise ValueError(
                f"data.shards: '{path}' is compressed ({kind}), and its samples are read where they lie. "
                "Unpack it to a plain .tar."
            )
        size, cut, members = os.path.getsize(path), "", 0
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    members += 1
                    if member.isfile() and member.offset_data + member.size <= size:
                        folder, name = os.path.split(member.name)
                        key, _, suffix = name.partition(".")
                        kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                        found.setdefault(f"{folder}/{key}", {})[kind] = (member.offset_data, member.size)
                # A whole tar ends with blocks of zeros; tarfile also stops at the end of the file, and at
                # what is no header.
                end = tar.offset
            file.seek(end)
            if file.read(512) != bytes(512):
                cut = f"it has no end mark at byte {end}"
        except tarfile.TarError as error:
            cut = str(error)
        if not members:
            raise ValueError(f"data.shards: '{path}' holds no file" + (f" ({cut})." if cut else "."))
        rows = []
        for files in found.values():
            text = files.get("txt", files.get("json"))
            if "image" not in files or (text is None and cut):
                continue
            crc = 0
            if text is not None:
                file.seek(text[0])
                crc = zlib.crc32(file.read(text[1]))
            rows.append((*files["image"], *(text or (-1, 0)), "txt" not in files, crc))
    return Index(np.array(rows, dtype=np.int64).reshape(-1, 6), cut)


class ShardSet:
    """Samples of indexed tars."""

    def __init__(self, paths: list[str], indices: list[np.ndarray]) -> None:
        self.paths = paths
        self.index = np.concatenate(indices)
        counts = np.array([len(rows) for rows in indices])
        self.starts = np.concatenate([[0], counts.cumsum()[:-1]])
        self.blocks = self.starts[counts > 0].tolist()
        self.lengths = self.index[:, 3]  # Bytes of the text.
        stems = [Path(path).stem for path in paths]
        # Tars of one name in different folders: with their folders.
        self.names = stems if len({*stems}) == len(stems) else [path.removesuffix(".tar") for path in paths]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Record:
        image, image_size = self.index[index, :2].tolist()
        with open(self.paths[self._shard(index)], "rb") as file:
            caption = self._caption(file, index)
            file.seek(image)
            picture = file.read(image_size)
        return Record(self.name(index), open_image(io.BytesIO(picture)), [caption])

    def name(self, index: int) -> str:
        shard = self._shard(index)
        return f"{self.names[shard]}/{index - int(self.starts[shard])}"

    def captions(self, index: int) -> list[str]:
        with open(self.paths[self._shard(index)], "rb") as file:
            return [self._caption(file, index)]

    def contents(self, times: bool) -> Iterator[Content]:
        stamps = file_stamps([Path(path) for path in self.paths], times)
        rows = np.split(self.index, self.starts[1:])
        for name, of_tar, stamp in zip(self.names, rows, stamps, strict=True):
            texts, pictures = (
                hashlib.sha256(part.tobytes()).hexdigest() for part in (of_tar[:, 3:], of_tar[:, 1])
            )
            yield Content(f"{name}: {len(of_tar)}", [texts], f"{pictures} {stamp if times else ''}")

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _caption(self, file: BinaryIO, index: int) -> str:
        """The sample's caption.

        Raises:
            UnreadableRecord: there is none that can be used.
        """
        text, text_size, is_json = self.index[index, 2:5].tolist()
        if text < 0:
            raise UnreadableRecord("it has neither a .txt nor a .json")
        file.seek(text)
        content = decode(file.read(text_size))
        return clean(parse_object(content).get("caption") if is_json else content)


class Shards(CaptionData):
    """WebDataset shards of pictures with captions; see this file's head.

    Args:
        shards: Paths of the tars with braces: ``cc3m/{00000..00331}.tar``. Local or mounted files.
        val_shards: Number of shards to hold out, the last ones.
    """

    def __init__(self, shards: str, val_shards: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shards = shards
        self.val_shards = val_shards
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        self._indices(self._paths())  # Once per machine; the other processes read the cache.

    def datasets(self) -> tuple[RecordSet, RecordSet]:
        paths = self._paths()
        indices = self._indices(paths)
        if cut := [f"{path}: {index.cut}" for path, index in zip(paths, indices, strict=True) if index.cut]:
            lines = "\n  ".join(cut)
            rank_zero_warn(
                f"{len(cut)} of {len(paths)} tars are cut; samples up to the cut are read, and what was "
                f"behind it is lost:\n  {lines}"
            )
        train, val = slice(None, -self.val_shards), slice(-self.val_shards, None)
        sets = [ShardSet(paths[part], [index.rows for index in indices[part]]) for part in (train, val)]
        for records, what in zip(sets, ("training", "held-out"), strict=True):
            if not len(records):
                raise ValueError(
                    f"data.shards={self.shards}: the {what} shards hold no sample. Expected: an image "
                    "and a .txt or .json of the same name."
                )
        return sets[0], sets[1]

    def _paths(self) -> list[str]:
        paths = [str(Path(name).expanduser().resolve()) for name in expand_braces(self.shards)]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise FileNotFoundError(
                f"data.shards={self.shards}: {len(missing)} of {len(paths)} files do not exist, the first: "
                f"'{missing[0]}'."
            )
        if not 0 < self.val_shards < len(paths):
            raise ValueError(
                f"data.val_shards={self.val_shards} of {len(paths)} shards: at least one must be held out "
                "and one be left for training."
            )
        return paths

    def _indices(self, paths: list[str]) -> list[Index]:
        """The index of every tar, cached by path, size and time."""
        folder = cache_dir() / "shards"

        def cached(path: str) -> Index:
            stat = os.stat(path)
            key = hashlib.sha256(f"2/{path}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:24]
            file = folder / f"{key}.npz"
            try:
                with np.load(file) as kept:
                    return Index(kept["rows"], str(kept["cut"]))
            except (OSError, *DAMAGED):  # There is none, or half.
                index = index_shard(path)
            try:
                write_whole(file, lambda part: np.savez(part, rows=index.rows, cut=index.cut))
            except OSError as error:
                warn_once(str(cache_dir()), error.strerror)
            return index

        with ThreadPoolExecutor(8) as pool:
            bar = tqdm(pool.map(cached, paths), "Indexing shards", len(paths), disable=len(paths) < 16)
            return list(bar)
