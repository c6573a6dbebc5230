from __future__ import annotations

import csv
import io
import json
import random
import struct
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_limber.data import CaptionData, ImageFolder, Scenes
from lightning_limber.data.held_out import spread, stand_in
from lightning_limber.data.image_folder import hash_share, open_image
from lightning_limber.data.loader import BatchLoader, BatchSource
from lightning_limber.data.records import Record
from lightning_limber.data.scenes import (
    COLOURS,
    HELD_OUT,
    SHAPES,
    SceneSet,
    describe,
    make_scene,
    score_caption,
)

# -- order, shards, resume --------------------------------------------------------------------------


class Numbers:
    """Records that are their own index."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return Record(index, None, [f"{index}{letter}" for letter in "abc"])


@dataclass
class Drawn:
    ids: list[int]
    captions: list[list[str]]
    other_captions: list[list[str]]
    skipped: tuple = ()
    other: None = None
    held_out: bool = False


def draw(records, captions, index, skipped, *, other_captions, **_) -> Drawn:
    return Drawn([record.id for record in records], captions, other_captions)


def loader(count: int = 22, rank: int = 0, world_size: int = 1, **kwargs) -> BatchLoader:
    source = BatchSource(Numbers(count), draw, 1, 0, kwargs.pop("purpose", "training"))
    kwargs = {"shuffle": True, "num_workers": 0, **kwargs}
    return BatchLoader(source, 4, rank=rank, world_size=world_size, **kwargs)


def ids(batches) -> list[list[int]]:
    return [batch.ids for batch in batches]


def test_training_order_changes_with_the_epoch_only():
    a, b = loader(), loader(num_workers=2)
    epochs = []
    for epoch in range(2):
        a.set_epoch(epoch)
        b.set_epoch(epoch)
        epochs.append(list(a))
        assert epochs[-1] == list(b)
        # The last two of 22 fill no batch of 4: they are spread over the others.
        assert [len(batch) for batch in ids(epochs[-1])] == [5, 5, 4, 4, 4]
        assert sorted(i for batch in ids(epochs[-1]) for i in batch) == list(range(22))
        assert len(a) == 5
    assert ids(epochs[0]) != ids(epochs[1])


def test_held_out_order_is_fixed_and_complete():
    batches = ids(loader(shuffle=False))
    assert [i for batch in batches for i in batch] == list(range(22))
    chosen = [i for batch in ids(loader(shuffle=False, limit=6)) for i in batch]
    assert chosen == spread(22, 6)


@pytest.mark.parametrize("shuffle", [True, False])
def test_two_processes_split_each_batch(shuffle):
    whole = ids(loader(shuffle=shuffle))
    halves = [ids(loader(shuffle=shuffle, rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(batch) == sorted(sum(parts, []))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_state_is_the_position(num_workers):
    a = loader(num_workers=num_workers)
    a.set_epoch(3)
    expected = ids(a)
    iterator = iter(a)
    seen = [next(iterator).ids for _ in range(2)]
    b = loader(num_workers=num_workers)
    b.load_state_dict(a.state_dict())
    iterator = iter(b)  # Lightning makes the iterator before it names the epoch.
    b.set_epoch(3)
    assert seen + ids(iterator) == expected
    b.set_epoch(4)
    assert len(ids(b)) == 5  # The state is used once.


def test_captions_are_drawn_anew_each_epoch():
    a = loader()
    a.source.captions_per_image = 2
    chosen = []
    for epoch in range(4):
        a.set_epoch(epoch)
        chosen.append({i: tuple(c) for batch in a for i, c in zip(batch.ids, batch.captions, strict=True)})
    assert all(len(set(captions)) == 2 for epoch in chosen for captions in epoch.values())
    assert len({epoch[i] for i in chosen[0] for epoch in chosen if i in epoch}) > 1


def test_shuffled_captions_are_another_images_in_any_batch():
    found = []
    for size in (4, 7):
        a = loader(shuffle=False, purpose="validation")
        a.batch_size = size
        drawn: dict[str, list[int]] = {"captions": [], "other_captions": []}
        for batch in a:
            for name, whose in drawn.items():
                whose += [int(caption[0][:-1]) for caption in getattr(batch, name)]
        assert drawn["captions"] == list(range(22))
        assert all(own != other for own, other in enumerate(drawn["other_captions"]))
        found.append(drawn["other_captions"])
    assert found[0] == found[1]
    assert len({other - own for own, other in enumerate(found[0])}) > 5  # Not the neighbour's.


def test_the_images_looked_at_are_spread_and_fewer_are_among_more():
    def chosen(limit: int, purpose: str) -> list[int]:
        a = loader(shuffle=False, purpose=purpose, limit=limit)
        return [int(i) for batch in a for i in batch.ids]

    few, more = chosen(5, "captions"), chosen(9, "captions")
    assert more[:5] == few
    assert sorted(few) != list(range(5))
    assert chosen(22, "captions") == list(range(22))


def test_a_stand_in_has_other_captions_and_can_be_read():
    said = ["a dog", "a dog", "a cat", "a dog"]

    def read(index: int) -> Record:
        if index == 3:
            raise OSError("truncated")
        return Record(str(index), None, [said[index]])

    assert [stand_in(read(i), i, 4, read).id for i in range(3)][:2] == ["2", "2"]
    assert stand_in(read(2), 2, 4, read).captions == ["a dog"]
    assert stand_in(read(0), 0, 1, read).id == "0"


# -- scenes -----------------------------------------------------------------------------------------


def test_scenes_are_a_function_of_seed_split_and_index():
    a, b = SceneSet("train", 10, 112, 0)[3], SceneSet("train", 99, 112, 0)[3]
    assert a.captions == b.captions
    assert a.image.tobytes() == b.image.tobytes()
    assert SceneSet("train", 10, 112, 0).captions(3) == a.captions
    others = [SceneSet("val", 10, 112, 0)[3], SceneSet("train", 10, 112, 1)[3]]
    assert all(other.image.tobytes() != a.image.tobytes() for other in others)


def test_held_out_pairs_never_occur_in_training_and_always_in_held_out_scenes():
    def pairs(split: str) -> list[set]:
        rng = random.Random(0)
        scenes = [make_scene(rng, held_out=split == "val") for _ in range(2000)]
        return [{(item["colour"], item["shape"]) for item in scene["objects"]} for scene in scenes]

    seen = set().union(*pairs("train"))
    assert not seen & HELD_OUT
    assert all(scene & HELD_OUT for scene in pairs("val"))
    # What is held out is the combination: each part of it is trained.
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)
    assert len(seen) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)


def test_boxes_hold_the_objects():
    for index in range(30):
        record = SceneSet("train", 100, 112, 0)[index]
        pixels = np.asarray(record.image).astype(int)
        for item in record.scene["objects"]:
            x0, y0, x1, y1 = item["box"]
            x, y = round((x0 + x1) / 2), round((y0 + y1) / 2)
            assert np.abs(pixels[y, x] - COLOURS[item["colour"]]).max() < 12  # Centre: the object's colour.
            assert x0 >= 0
            assert y0 >= 0
            assert max(x1, y1) <= 112
    relations = [
        (a, b, relation)
        for index in range(50)
        for scene in [SceneSet("train", 100, 112, 0)[index].scene]
        for a, b, relation in zip(scene["objects"], scene["objects"][1:], scene["relations"], strict=False)
    ]
    for a, b, relation in relations:
        axis = 0 if relation == "left of" else 1
        assert a["box"][axis + 2] < b["box"][axis] + 3


def test_score_of_the_true_caption_is_full_and_of_wrong_ones_exact():
    rng = random.Random(1)
    for _ in range(200):
        scene = make_scene(rng, held_out=True)
        assert all(hits == total for hits, total in score_caption(describe(scene), scene).values())
    scene = {
        "background": "pink",
        "objects": [
            {"size": "small", "colour": "red", "shape": "circle"},  # A held-out pair.
            {"size": "large", "colour": "blue", "shape": "star"},
        ],
        "relations": ["left of"],
    }
    wrong = "a small green circle above a large blue star on a white background."
    assert score_caption(wrong, scene) == {
        "background": (0, 1),
        "count": (1, 1),
        "size": (2, 2),
        "colour": (1, 2),
        "shape": (2, 2),
        "held_out": (1, 2),
        "relation": (0, 1),
    }
    assert score_caption("", scene)["colour"] == (0, 2)
    missing = score_caption("a small red circle on a pink background.", scene)
    assert missing["count"] == (0, 1)
    assert missing["shape"] == (1, 2)
    assert missing["relation"] == (0, 1)


# -- image folder -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))


def folder(root: Path, count: int = 40) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"{i:03d}.png")
        (root / f"{i:03d}.txt").write_text(f"Caption {i}.\nfr.utf8=Légende {i}.\n", encoding="utf-8")
    return root


def test_sidecars_give_their_first_line_and_the_split_is_a_hash(tmp_path):
    root = folder(tmp_path / "images")
    train, val = ImageFolder(str(root), val_share=0.3).datasets()
    names = {split[i].id for split in (train, val) for i in range(len(split))}
    assert len(names) == len(train) + len(val) == 40
    assert train[0].captions == [f"Caption {int(train[0].id[:3])}."]
    assert all(hash_share(val[i].id) < 0.3 <= hash_share(train[0].id) for i in range(len(val)))
    held_out = {val[i].id for i in range(len(val))}
    folder(root, 60)  # More images: nobody changes sides.
    _, val = ImageFolder(str(root), val_share=0.3).datasets()
    assert held_out <= {val[i].id for i in range(len(val))}


def test_tables(tmp_path):
    root = folder(tmp_path / "images", 3)
    rows = [{"image": "000.png", "captions": ["one", "two"]}, {"image": "001.png", "caption": "three"}]
    (root / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption"])
        writer.writeheader()
        writer.writerows([{"image": "002.png", "caption": 'a "quoted", one'}])
    train, _ = ImageFolder(str(root / "table.jsonl"), val_share=0).datasets()
    assert [train[i].captions for i in (0, 1)] == [["one", "two"], ["three"]]
    train, _ = ImageFolder(str(root / "table.csv"), val_share=0).datasets()
    assert train[0].captions == ['a "quoted", one']
    (root / "bad.jsonl").write_text('{"picture": "000.png"}')
    with pytest.raises(ValueError, match="each row needs `image`"):
        ImageFolder(str(root / "bad.jsonl")).datasets()


def test_bad_records_are_named_and_too_many_stop_the_run(tmp_path):
    root = folder(tmp_path / "images")
    data = (root / "000.png").read_bytes()
    Image.effect_noise((64, 64), 50).save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:600])
    (root / "cut.txt").write_text("cut")
    (root / "text.png").write_bytes(b"no picture")
    (root / "text.txt").write_text("text")
    (root / "silent.png").write_bytes(data)
    (root / "blank.png").write_bytes(data)
    (root / "blank.txt").write_text("   \n")
    with pytest.raises(ValueError, match="4 of 44 records") as error:
        ImageFolder(str(root)).datasets()
    for line in ("cut.jpg: ", "text.png: ", "silent.png: no caption", "blank.png: no caption"):
        assert line in str(error.value)
    with pytest.warns(UserWarning, match="Skipped: 4 of 44 records"):
        train, val = ImageFolder(str(root), max_bad_share=0.1).datasets()
    assert len(train) + len(val) == 40
    (root / "table.jsonl").write_text('{"image": "gone.png", "caption": "x"}')
    with pytest.raises(ValueError, match="gone.png: missing"):
        ImageFolder(str(root / "table.jsonl")).datasets()


def test_verdicts_are_kept_until_the_file_changes(tmp_path, monkeypatch):
    from lightning_limber.data import image_folder

    root = folder(tmp_path / "images", 5)
    ImageFolder(str(root)).datasets()
    opened = []
    monkeypatch.setattr(image_folder, "open_image", lambda path: opened.append(path.name))
    ImageFolder(str(root)).datasets()
    assert opened == []
    Image.new("RGB", (9, 9)).save(root / "001.png")
    ImageFolder(str(root)).datasets()
    assert opened == ["001.png"]


def test_a_root_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root: there is no"):
        ImageFolder("nowhere").datasets()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image in"):
        ImageFolder(str(tmp_path / "empty")).datasets()


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    def pixel(name: str) -> tuple:
        image = open_image(tmp_path / name)
        assert image.mode == "RGB"
        return image.getpixel((0, 0))

    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "alpha.png")
    assert pixel("alpha.png") == (255, 255, 255)  # Transparent is white, not black.
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png")
    assert pixel("palette.png") == (10, 20, 30)
    palette.save(tmp_path / "clear.png", transparency=1)
    assert pixel("clear.png") == (255, 255, 255)
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    assert pixel("grey.png") == (77, 77, 77)
    Image.new("LA", (4, 4), (77, 255)).save(tmp_path / "grey_alpha.png")
    assert pixel("grey_alpha.png") == (77, 77, 77)
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "grey16.png")
    assert pixel("grey16.png") == (128, 128, 128)  # Scaled; a plain conversion clips to white.
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    assert pixel("cmyk.jpg") == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixel("moving.gif") == (255, 0, 0)
    wide = Image.new("RGB", (8, 4), "white")
    exif = wide.getexif()
    exif[274] = 6  # Turned by 90 degrees.
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)


def test_truncated_png_is_an_error(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "png")
    data = buffer.getvalue()
    assert struct.unpack(">I", data[16:20])[0] == 64
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match="truncated"):
        open_image(tmp_path / "cut.png")


# -- the module's own checks ------------------------------------------------------------------------


def test_batch_must_divide_by_the_processes_and_fit_the_data():
    def set_up(data: CaptionData, world_size: int) -> None:
        collate = types.SimpleNamespace(collator=lambda: None)
        data.trainer = types.SimpleNamespace(lightning_module=collate, global_rank=0, world_size=world_size)
        data.setup()

    with pytest.raises(ValueError, match="divide by their number, 3"):
        set_up(Scenes(batch_size=4, train_size=8), 3)
    with pytest.raises(ValueError, match="do not fill one batch of 16"):
        set_up(Scenes(batch_size=16, train_size=8), 1)


def test_same_record_in_any_process():
    first = [SceneSet("val", 8, 64, 0)[i].captions for i in range(8)]
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_captions, range(8)) == first


def _captions(index: int) -> list[str]:
    return SceneSet("val", 8, 64, 0)[index].captions
