"""The loader alone: batches a second by data set and number of workers, and how much of them is padding.

Sets are written on the spot: pictures of 256 px with captions of one to four sentences, so that lengths
differ. Every pass is a new epoch; the first batch, which starts the workers, is not counted.
"""

from __future__ import annotations

import io
import random
import tarfile
import time
from collections import defaultdict
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

from bench import measure
from bench.measure import Laps, Row
from bench.sizes import Setup, attach, collator
from lightning_limber.data import CaptionData, ImageFolder, Scenes, Shards
from lightning_limber.data.scenes import SceneSet

PICTURE_SIZE = 256
WINDOW = 16
WORKERS = (0, 1, 2)


def write_sets(folder: Path, images: int) -> None:
    """The same pictures and captions as a folder and as two shards (one for training, one held out)."""
    scenes = SceneSet("train", images, PICTURE_SIZE, seed=0)
    rng = random.Random(0)
    (folder / "images").mkdir()
    with tarfile.open(folder / "00000.tar", "w") as train, tarfile.open(folder / "00001.tar", "w") as val:
        for i in range(images):
            record = scenes[i]
            assert record.image is not None
            texts = [scenes[rng.randrange(images)].captions[0] for _ in range(rng.randrange(4))]
            image = io.BytesIO()
            record.image.save(image, "jpeg", quality=90)
            contents = {"jpg": image.getvalue(), "txt": " ".join([record.captions[0], *texts]).encode()}
            for suffix, content in contents.items():
                path = folder / f"images/{i:05d}.{suffix}"
                path.write_bytes(content)
                for tar in (train, val) if i < images // 4 else (train,):
                    tar.add(path, path.name)


def make(kind: str, setup: Setup, images: int, workers: int, window: int) -> CaptionData:
    settings: Any = {"batch_size": setup.size.batch_size, "num_workers": workers, "length_window": window}
    if kind == "Scenes":
        return Scenes(train_size=images, val_size=4, **settings)
    if kind == "ImageFolder":
        return ImageFolder(root=str(setup.folder / "images"), **settings)
    return Shards(shards=str(setup.folder / "{00000..00001}.tar"), val_shards=1, **settings)


def main(setup: Setup) -> Row:
    """Measures every data set with every number of workers, in turns."""
    images = 16 * setup.size.batch_size
    write_sets(setup.folder, images)
    collate = collator(setup, packed=True)
    padding: dict[str, list[float]] = defaultdict(list)
    keys: dict[str, Row] = {}
    runs: dict[str, Laps] = {}

    def add(kind: str, workers: int, window: int) -> None:
        data, epochs = make(kind, setup, images, workers, window), count()
        attach(data, collate)
        name = f"{kind}, {workers} workers, window {window}"
        keys[name] = {"name": kind, "workers": workers, "length_window": window}

        def one_pass(_steps: int) -> list[float]:
            loader = data.train_dataloader()
            loader.set_epoch(next(epochs))
            real = total = 0
            for i, batch in enumerate(loader):
                if i == 0:
                    start = time.perf_counter()
                real, total = real + batch.used_positions, total + batch.input_ids.numel()
            padding[name].append(1 - real / total)
            return [(time.perf_counter() - start) / i]

        runs[name] = one_pass

    for kind in setup.only or ["Scenes", "ImageFolder", "Shards"]:
        for workers in WORKERS:
            for window in (0,) if kind == "Scenes" or workers else (0, WINDOW):
                add(kind, workers, window)
    rows = measure.compare(runs, setup.repeats)
    for row in rows:
        row |= {"padding": mean(padding[row["name"]]), "batches_per_s": 1 / row["step_s"]}
        row |= {"images_per_s": setup.size.batch_size / row["step_s"], **keys[row["name"]]}
    return {"work": {"images": images, "picture_size": PICTURE_SIZE}, "results": rows}


COLUMNS = (
    "name workers length_window batches_per_s images_per_s step_s step_s_p10 step_s_p90 padding".split()
)
