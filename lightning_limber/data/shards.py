"""WebDataset shards as img2dataset writes them (CC3M, CC12M): tar files of images with their captions.

Each tar is indexed once (where every image and caption begins), which makes the shards a map-style set:
every sample of an epoch is seen exactly once, by any number of processes and workers, and a run resumes
at any batch. Order keeps reads near together: a few shards at a time, in random order, are mixed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from lightning_limber.data.datamodule import CaptionData
from lightning_limber.data.image_folder import SUFFIXES, open_image
from lightning_limber.data.loader import RecordSet
from lightning_limber.data.records import Record
from lightning_limber.utils.cache import cache_dir


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


def index_shard(path: str) -> np.ndarray:
    """Where the samples of one tar are: [n, 5] of image offset and size, text offset and size, is-JSON.

    A sample is the files of one name: an image, and a ``.txt`` or (if there is none) the ``caption`` of
    a ``.json``. Names without both are left out: img2dataset writes none for failed downloads.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile():
                folder, name = os.path.split(member.name)
                key, _, suffix = name.partition(".")
                kind = "image" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                found.setdefault(f"{folder}/{key}", {})[kind] = (member.offset_data, member.size)
    rows = [
        (*files["image"], *files.get("txt", files.get("json", ())), "txt" not in files)
        for files in found.values()
        if "image" in files and ("txt" in files or "json" in files)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


class ShardSet:
    """Samples of indexed tars."""

    def __init__(self, paths: list[str], indices: list[np.ndarray]) -> None:
        self.paths = paths
        self.index = np.concatenate(indices)
        counts = np.array([len(rows) for rows in indices])
        self.starts = np.concatenate([[0], counts.cumsum()[:-1]])
        self.blocks = self.starts[counts > 0].tolist()
        self.lengths = self.index[:, 3]  # Bytes of the text.

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Record:
        shard = self._shard(index)
        image, image_size = self.index[index, :2].tolist()
        with open(self.paths[shard], "rb") as file:
            captions = self._captions(file, index)
            file.seek(image)
            picture = file.read(image_size)
        if not captions:
            raise OSError("its caption is empty")
        name = f"{Path(self.paths[shard]).stem}/{index - int(self.starts[shard])}"
        return Record(name, open_image(io.BytesIO(picture)), captions)

    def captions(self, index: int) -> list[str]:
        with open(self.paths[self._shard(index)], "rb") as file:
            return self._captions(file, index)

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _captions(self, file: BinaryIO, index: int) -> list[str]:
        """The sample's caption; none where it is empty."""
        text, text_size, is_json = self.index[index, 2:].tolist()
        file.seek(text)
        caption = file.read(text_size).decode("utf-8", errors="replace")
        if is_json:
            caption = json.loads(caption).get("caption") or ""
        caption = " ".join(caption.split())
        return [caption] if caption else []


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
        train, val = slice(None, -self.val_shards), slice(-self.val_shards, None)
        sets = [ShardSet(paths[part], indices[part]) for part in (train, val)]
        for records, what in zip(sets, ("training", "held-out"), strict=True):
            if not len(records):
                raise ValueError(f"data.shards: the {what} shards hold no image with a caption.")
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

    def _indices(self, paths: list[str]) -> list[np.ndarray]:
        """The index of every tar, cached by path, size and time."""
        folder = cache_dir() / "shards"
        folder.mkdir(parents=True, exist_ok=True)

        def cached(path: str) -> np.ndarray:
            stat = os.stat(path)
            key = hashlib.sha256(f"{path}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:24]
            file = folder / f"{key}.npy"
            if not file.is_file():
                scratch = folder / f"{key}.{os.getpid()}.npy"
                np.save(scratch, index_shard(path))
                scratch.replace(file)
            return np.load(file)

        with ThreadPoolExecutor(8) as pool:
            bar = tqdm(pool.map(cached, paths), "Indexing shards", len(paths), disable=len(paths) < 16)
            return list(bar)
