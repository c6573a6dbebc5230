"""Encoder features that are kept: the encoder is frozen, so no image needs to be encoded twice.

Features of held-out images stay in memory, because validation, its control, probes and captions look at the
same images again and again. Features of training images can be kept on disk for later epochs. That costs
P x D_v float32 numbers an image, and pays for small data sets and several epochs. What is read back is
bit-equal to what was computed first, in whatever batch that was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_limber.data.fingerprint import fingerprint
from lightning_limber.data.loader import RecordStream
from lightning_limber.utils.cache import cache_dir, warn_once
from lightning_limber.utils.checkpoints import FREE


class FeatureCache:
    """Features [count, P, D_v] float32 in one file, filled as they are computed; processes share it.

    A row is followed by its checksum: one that was never written, half written or damaged since is computed
    anew. The file is read and written, not mapped: a disk that fills under a map ends the process.

    Args:
        key: Everything that the features depend on: encoder, its settings, data.
        count: Number of images.
        shape: (P, D_v).

    Raises:
        OSError: the cache's folder cannot be written.
    """

    def __init__(self, key: Any, count: int, shape: tuple[int, ...]) -> None:
        name = hashlib.sha256(json.dumps([key, count, shape], sort_keys=True).encode()).hexdigest()[:24]
        self.path = cache_dir() / "features" / f"{name}.rows"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        made = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)  # By whichever process comes first.
        self._file = open(made, "r+b", buffering=0)  # noqa: SIM115
        self._shape, self._row_bytes = shape, math.prod(shape) * 4

    def read(self, index: list[int]) -> Tensor | None:
        """Features of the images of these indices, or None if any is missing."""
        rows = []
        for i in index:
            size = self._row_bytes + len(_checksum(b""))
            found = memoryview(os.pread(self._file.fileno(), size, i * size))
            row = found[: self._row_bytes]
            if len(found) < size or found[self._row_bytes :] != _checksum(row):
                return None
            rows.append(np.frombuffer(row, np.float32).reshape(self._shape))
        return torch.from_numpy(np.stack(rows))

    def write(self, index: list[int], features: Tensor) -> None:
        for i, values in zip(index, features.float().cpu().numpy(), strict=True):
            row = values.tobytes()
            row += _checksum(row)
            try:
                os.pwrite(self._file.fileno(), row, i * len(row))
            except OSError as error:
                warn_once(str(self.path), error.strerror)
                return


def _checksum(row: bytes | memoryview) -> bytes:
    return zlib.crc32(row).to_bytes(4, "little")


def open_feature_cache(key: list[Any], shape: tuple[int, ...], trainer: Any) -> FeatureCache | None:
    """The cache of a run's training images; None where it cannot be written.

    Args:
        key: What the features depend on beside the data and the precision.
        shape: (P, D_v).
        trainer: Lightning's, with its data module.

    Raises:
        ValueError: the training set is a stream.
    """
    data = trainer.datamodule
    if isinstance(data.train_set, RecordStream):
        raise ValueError(
            "model.cache_features=true: the images of a stream have no index to keep features by. Set it "
            "to false."
        )
    settings = {name: repr(value) for name, value in data.hparams.items() if name not in FREE}
    # Another picture of an old name, or in an old place, must not be given that one's features.
    contents = fingerprint(data.train_set, times=True)
    key = [*key, type(data).__name__, settings, contents, trainer.precision]
    try:
        return FeatureCache(key, len(data.train_set), shape)
    except OSError as error:
        warn_once(str(cache_dir()), error.strerror)
        return None


class KeptFeatures:
    """Features of held-out images in host memory, by the image's name.

    Args:
        max_bytes: Images beyond it are encoded again each time.
    """

    def __init__(self, max_bytes: float) -> None:
        self.free_bytes = max_bytes
        self._by_name: dict[str, Tensor] = {}

    def read(self, names: list[str]) -> Tensor | None:
        """Features [B, P, D_v] of these images, or None if any is missing."""
        if not all(name in self._by_name for name in names):
            return None
        return torch.stack([self._by_name[name] for name in names])

    def write(self, names: list[str], features: Tensor) -> None:
        size = features[0].nbytes
        for name, of_image in zip(names, features.cpu(), strict=True):
            if name not in self._by_name and size <= self.free_bytes:
                self._by_name[name] = of_image.clone()  # Not a view that holds the whole batch.
                self.free_bytes -= size
