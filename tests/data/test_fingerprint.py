"""What a run's data are: a checkpoint of other data is refused, and no picture gets another's features."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import types
from pathlib import Path

import pytest
from crash import Crash
from datasets_on_disk import picture
from PIL import Image
from runs import crash_flags

from lightning_limber.data import CocoCaptions, HuggingFaceCaptions, ImageFolder, LLaVAConversations, Shards
from lightning_limber.data.fingerprint import data_differences, fingerprint
from lightning_limber.models.feature_cache import open_feature_cache

COUNT = 12


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


# -- sources of COUNT records from (name, picture, caption); pictures are BMP, all of one size ----------

Rows = list[tuple[str, Image.Image, str]]


def save(root: Path, rows: Rows) -> None:
    for name, image, _ in rows:
        image.save(root / f"{name}.bmp")


def folder(root: Path, rows: Rows) -> ImageFolder:
    save(root, rows)
    for name, _, caption in rows:
        (root / f"{name}.txt").write_text(caption)
    return ImageFolder(str(root), val_share=0)


def coco(root: Path, rows: Rows) -> CocoCaptions:
    save(root, rows)
    images = [
        {"filename": f"{name}.bmp", "split": "train", "sentences": [{"raw": caption}]}
        for name, _, caption in rows
    ]
    (root / "x.json").write_text(json.dumps({"images": images}))
    return CocoCaptions(str(root / "x.json"), str(root))


def llava(root: Path, rows: Rows) -> LLaVAConversations:
    save(root, rows)
    entries = [
        {
            "id": name,
            "image": f"{name}.bmp",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": caption}],
        }
        for name, _, caption in rows
    ]
    (root / "x.json").write_text(json.dumps(entries))
    return LLaVAConversations(str(root / "x.json"), str(root), val_share=0)


def shards(root: Path, rows: Rows) -> Shards:
    save(root, rows)
    for number, part in enumerate((rows, rows[:1])):
        with tarfile.open(root / f"{number}.tar", "w") as tar:
            for name, _, caption in part:
                (root / f"{name}.txt").write_text(caption)
                for suffix in ("bmp", "txt"):
                    tar.add(root / f"{name}.{suffix}", f"{name}.{suffix}")
    return Shards(str(root / "{0,1}.tar"))


def parquet(root: Path, rows: Rows) -> HuggingFaceCaptions:
    import datasets

    save(root, rows)
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    files = [(root / f"{name}.bmp").read_bytes() for name, _, _ in rows]
    table = {
        "image": [{"bytes": file, "path": None} for file in files],
        "caption": [row[2] for row in rows],
    }
    datasets.Dataset.from_dict(table, features=features).to_parquet(root / "x.parquet")
    return HuggingFaceCaptions("parquet", data_files={"train": str(root / "x.parquet")}, val_split="train")


SOURCES = {"folder": folder, "coco": coco, "llava": llava, "shards": shards, "parquet": parquet}


def rows() -> Rows:
    return [(f"{i:02d}", picture(i), f"number {i}") for i in range(COUNT)]


def prints(source: str, root: Path, chosen: Rows, times: bool = False) -> dict[str, str]:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    return fingerprint(SOURCES[source](root, chosen).datasets()[0], times)


@pytest.mark.parametrize("source", SOURCES)
def test_every_change_of_the_data_is_seen_and_named(source, tmp_path):
    """Of the pictures what can be seen without opening them."""
    root = tmp_path / "data"
    start = prints(source, root, rows())
    assert start["records"] == f"{COUNT}"

    def changed(new: Rows) -> set[str]:
        now = prints(source, root, new)
        return {key for key in start if start[key] != now[key]}

    assert changed(rows()) == set()  # Written anew, at another time.
    edited = rows()
    edited[3] = (edited[3][0], edited[3][1], "number x")  # As long as before.
    assert changed(edited) == {"captions"}
    replaced = rows()
    replaced[3] = (replaced[3][0], Image.new("RGB", (20, 20)), replaced[3][2])
    assert changed(replaced) == {"pictures"}
    assert "records" in changed(rows()[1:])
    if source not in ("shards", "parquet"):  # There a record has no name of its own.
        renamed = rows()
        renamed[3] = ("03b", *renamed[3][1:])
        assert changed(renamed) == {"names"}
    swapped = rows()
    swapped[2], swapped[3] = swapped[3], swapped[2]
    assert bool(changed(swapped)) == (source != "folder")  # A folder has its own order.


@pytest.mark.parametrize("source", SOURCES)
def test_kept_features_are_of_these_very_files(source, tmp_path):
    """A file of the same name and size, changed at another time, is another."""
    root = tmp_path / "data"
    root.mkdir()

    def cache_name(data) -> str:
        data.train_set, _ = data.datasets()
        trainer = types.SimpleNamespace(datamodule=data, precision="32-true")
        open_feature_cache([], (1, 1), trainer)
        [path] = (tmp_path / "cache/features").glob("*.rows")
        path.unlink()
        return path.name

    data = SOURCES[source](root, rows())
    first = cache_name(data)
    assert cache_name(data) == first
    replaced = rows()
    replaced[3] = (replaced[3][0], picture(99), replaced[3][2])
    data = SOURCES[source](root, replaced)
    for path in root.iterdir():  # Further than the library's step of a second.
        os.utime(path, (1, 1))
    assert cache_name(data) != first


def test_what_differs_is_said_in_words():
    saved = {
        "training": {"records": "40", "names": "a", "captions": "b", "pictures": "c"},
        "held-out": {"records": "4"},
    }
    now = {
        "training": {"records": "39", "names": "x", "captions": "b", "pictures": "y"},
        "held-out": {"records": "4"},
    }
    assert data_differences(saved, saved) == []
    assert data_differences(saved, now) == [
        "training: 40 records in the checkpoint, 39 now, other names of records, "
        "other picture files (by size)"
    ]


# -- resume ------------------------------------------------------------------------------------------


def flags(models: Path, root: Path) -> list[str]:
    import tiny

    own = [flag for flag in tiny.arguments(models, probe=False) if not flag.startswith("--data.")]
    return [
        *own,
        "--data=ImageFolder",
        f"--data.root={root}",
        "--data.batch_size=4",
        "--data.num_workers=0",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "03.bmp").unlink(), r"training: 1\d records in the checkpoint, \d+ now"),
        (lambda root: (root / "03.txt").write_text("a cat"), "training: other captions\n"),
        (lambda root: Image.new("RGB", (50, 50)).save(root / "03.bmp"), r"training: other picture files"),
        (None, ""),
    ],
)
def test_a_run_goes_on_with_its_own_data_only(change, message, models, fit, tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    folder(root, [(f"{i:02d}", picture(i), "a red circle") for i in range(20)])
    with pytest.raises(Crash):
        fit(*flags(models, root), *crash_flags("batches", "batch_start", 2), base=False)
    if change is not None:
        change(root)
        with pytest.raises(
            ValueError, match=rf"(?s)not those that this run began with.*{message}"
        ) as error:
            fit("--ckpt_path=last", *crash_flags("batches"), base=False)
        assert "--model.adapter_weights" in str(error.value)
        # Other data may be looked at.
        fit("--ckpt_path=last", *crash_flags("batches"), command="validate", base=False)
    else:
        # A share that the run's own message asks to be raised may be raised.
        fit("--ckpt_path=last", "--data.max_bad_share=0.5", *crash_flags("batches"), base=False)
