"""Encoder features that are kept: the encoder is frozen, so no image needs to be encoded twice.

Features of held-out images stay in memory, because validation, its control, probes and captions look at the
same images again and again. Features of training images can be kept on disk for later epochs. That costs
P x D_v float32 numbers an image, and pays for small data sets and several epochs. What is read back is
bit-equal to what was computed first, in whatever batch that was.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_limber.data.fingerprint import fingerprint
from lightning_limber.data.loader import RecordStream
from lightning_limber.utils.cache import cache_dir
from lightning_limber.utils.checkpoints import FREE


class FeatureCache:
    """Features [count, P, D_v] float32 in one file, filled as they are computed; processes share it.

    Args:
        key: Everything that the features depend on: encoder, its settings, data.
        count: Number of images.
        shape: (P, D_v).
    """

    def __init__(self, key: Any, count: int, shape: tuple[int, ...]) -> None:
        name = hashlib.sha256(json.dumps([key, count, shape], sort_keys=True).encode()).hexdigest()[:24]
        folder = cache_dir() / "features"
        folder.mkdir(parents=True, exist_ok=True)
        self.values = _open(folder / f"{name}.f32", (count, *shape), np.float32)
        # Written behind its row: a run that is killed leaves no row half true.
        self.known = _open(folder / f"{name}.known", (count,), np.uint8)

    def read(self, index: list[int]) -> Tensor | None:
        """Features of the images of these indices, or None if any is missing."""
        return torch.from_numpy(self.values[index]) if self.known[index].all() else None

    def write(self, index: list[int], features: Tensor) -> None:
        self.values[index] = features.float().cpu().numpy()
        self.known[index] = 1


def open_feature_cache(key: list[Any], shape: tuple[int, ...], trainer: Any) -> FeatureCache:
    """The cache of a run's training images.

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
    return FeatureCache(key, len(data.train_set), shape)


def _open(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with path.open("ab") as file:  # Made by whichever process comes first; sparse until it is written.
        file.truncate(size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


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
