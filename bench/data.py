"""The loader alone: batches a second by data set and number of workers, and how much of them is padding.

Sets are written on the spot: pictures of 256 px with captions of one to four sentences, so that lengths
differ. Every pass is a new epoch; the first batch, which starts the workers, is not counted.
"""

from __future__ import annotations

import io
import os
import random
import statistics
import sys
import tarfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench import measure
from bench.measure import Row
from bench.sizes import Setup, attach, collator
from lightning_limber.data import CaptionData, ImageFolder, Scenes, Shards
from lightning_limber.data.scenes import SceneSet

PICTURE_SIZE = 256
WINDOW = 16
WORKERS = (0, 1, 2)


def write_sets(folder: Path, count: int) -> None:
    """The same pictures and captions as a folder and as two shards (one for training, one held out)."""
    scenes = SceneSet("train", count, PICTURE_SIZE, seed=0)
    rng = random.Random(0)
    (folder / "images").mkdir()
    with (
        tarfile.open(folder / "00000.tar", "w") as first,
        tarfile.open(folder / "00001.tar", "w") as second,
    ):
        for i in range(count):
            record = scenes[i]
            assert record.image is not None
            texts = [scenes[rng.randrange(count)].captions[0] for _ in range(rng.randrange(4))]
            caption = " ".join([record.captions[0], *texts])
            image = io.BytesIO()
            record.image.save(image, "jpeg", quality=90)
            (folder / f"images/{i:05d}.jpg").write_bytes(image.getvalue())
            (folder / f"images/{i:05d}.txt").write_text(caption)
            for tar in (first, *([second] if i < count // 4 else [])):
                for suffix, content in (("jpg", image.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def make(kind: str, folder: Path, batch_size: int, count: int, workers: int, window: int) -> CaptionData:
    settings: Any = {"batch_size": batch_size, "num_workers": workers, "length_window": window}
    if kind == "Scenes":
        return Scenes(train_size=count, val_size=4, **settings)
    if kind == "ImageFolder":
        return ImageFolder(root=str(folder / "images"), **settings)
    return Shards(shards=str(folder / "{00000..00001}.tar"), val_shards=1, **settings)


def one_pass(data: CaptionData, epoch: int) -> tuple[float, float]:
    """Seconds per batch and the share of positions that are padding."""
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    real = padded = 0
    start = 0.0
    for i, batch in enumerate(loader):
        if i == 0:
            start = time.perf_counter()
        real, padded = real + batch.used_positions, padded + batch.input_ids.numel()
    return (time.perf_counter() - start) / i, 1 - real / padded


def main(setup: Setup) -> Row:
    """Measures every data set with every number of workers, in turns."""
    # The sets are indexed in the cache; the user's own is left alone.
    with patch.dict(os.environ, LIGHTNING_LIMBER_CACHE=str(setup.folder / "cache")):
        return _main(setup)


def _main(setup: Setup) -> Row:
    size = setup.size
    count = 16 * size.batch_size
    write_sets(setup.folder, count)
    collate = collator(size, setup.folder)
    sets = {}
    for kind in setup.only or ["Scenes", "ImageFolder", "Shards"]:
        for workers in WORKERS:
            for window in (0,) if kind == "Scenes" or workers else (0, WINDOW):
                data = make(kind, setup.folder, size.batch_size, count, workers, window)
                attach(data, collate)
                sets[kind, workers, window] = data
    passes: dict[tuple, list[tuple[float, float]]] = {key: [] for key in sets}
    for number in range(setup.repeats):
        print(f"  round {number + 1} of {setup.repeats}", file=sys.stderr)
        for key, data in sets.items():
            passes[key].append(one_pass(data, number))
    rows = []
    for (kind, workers, window), found in passes.items():
        row: Row = {"name": kind, "workers": workers, "length_window": window}
        row |= measure.step_times([[seconds for seconds, _ in found]])
        row["batches_per_s"] = 1 / row["step_s"]
        row["images_per_s"] = size.batch_size / row["step_s"]
        row["padding"] = statistics.mean(padding for _, padding in found)
        rows.append(row)
    return {"work": {"images": count, "picture_size": PICTURE_SIZE}, "results": rows}


COLUMNS = (
    "name workers length_window batches_per_s images_per_s step_s step_s_p10 step_s_p90 padding"
).split()
