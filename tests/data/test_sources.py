"""Published data sets, written in tiny in their own formats: what is read, and that nothing is lost."""

from __future__ import annotations

import io
import json
import tarfile
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets_on_disk import SMALL, caption, jpg, picture, write_karpathy, write_llava

from lightning_limber.data import CocoCaptions, HuggingFaceCaptions, ImageFolder, LLaVAConversations, Shards
from lightning_limber.data.collate import Collator
from lightning_limber.data.loader import PackedList, shuffled_order
from lightning_limber.data.prompt import Prompt
from lightning_limber.data.shards import expand_braces
from lightning_limber.models.llm import LLM
from lightning_limber.models.vision import ImageTransform


def write_shards(root: Path, count: int) -> Shards:
    sizes = [count // 3, 0, count - count // 3 - 2, 2, 6]
    i = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for _ in range(size):
                members = {"jpg": jpg(i), "json": json.dumps({"caption": caption(i)}).encode()}
                if i % 2:
                    members["txt"] = caption(i).encode()
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                i += 1
            info = tarfile.TarInfo(f"{shard:05d}failed.json")  # As of a failed download.
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    return Shards(str(root / "{00000..00004}.tar"), **SMALL)


def write_parquet(root: Path, count: int, streaming: bool = False) -> HuggingFaceCaptions:
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "said": [datasets.Value("string")]})
    for split, numbers in {"train": range(count), "val": range(count, count + 6)}.items():
        rows = {
            "picture": [{"bytes": jpg(i), "path": None} for i in numbers],
            "said": [[caption(i)] for i in numbers],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}.parquet")
    return HuggingFaceCaptions(
        "parquet",
        data_files={"train": str(root / "train.parquet"), "val": str(root / "val.parquet")},
        image_column="picture",
        caption_column="said",
        val_split="val",
        streaming=streaming,
        num_train=count if streaming else None,
        **SMALL,
    )


def write_stream(root: Path, count: int) -> HuggingFaceCaptions:
    return write_parquet(root, count, streaming=True)


def write_folder(root: Path, count: int) -> ImageFolder:
    for i in range(count):
        picture(i).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(caption(i))
    return ImageFolder(str(root), val_share=0.15, **SMALL)


WRITERS = {
    "llava": write_llava,
    "coco": write_karpathy,
    "shards": write_shards,
    "hf-map": write_parquet,
    "hf-stream": write_stream,
    "folder": write_folder,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return LLM(tiny.write_llm(tmp_path_factory.mktemp("llm"))).tokenizer


@pytest.fixture
def make(tmp_path, models, tokenizer, monkeypatch):
    """A data module of a kind, set up for one of several processes."""
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    # The library waits so long at the end of every stream.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)

    def build(kind: str, count: int = 30, rank: int = 0, world_size: int = 1, **attributes):
        root = tmp_path / kind
        root.mkdir(exist_ok=True)
        data = WRITERS[kind](root, count)
        for name, value in attributes.items():
            setattr(data, name, value)
        template = "{conversation}" if kind == "llava" else "{bos}{image}{caption}{eos}"
        collator = Collator(
            ImageTransform(models / "vision", 32, False), Prompt(template, tokenizer, 64), image_tokens=0
        )
        module = types.SimpleNamespace(collator=lambda: collator)
        data.trainer = types.SimpleNamespace(
            lightning_module=module, global_rank=rank, world_size=world_size
        )
        data.prepare_data()
        data.setup("fit")
        return data

    return build


@pytest.mark.parametrize("length_window", [0, 3])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_record_is_seen_once_in_two_processes_of_two_workers(kind, length_window, make):
    """Also when the run is cut off in mid-epoch and goes on from its state."""
    straight: list[list[str]] = []
    resumed: list[list[str]] = []
    steps = []
    for rank in (0, 1):
        data = make(kind, rank=rank, world_size=2, length_window=length_window)
        loader = data.train_dataloader()
        loader.set_epoch(1)
        straight.append([name for batch in loader for name in batch.ids])
        steps.append(len(loader))

        first = data.train_dataloader()
        first.set_epoch(1)
        batches = iter(first)
        seen = [name for _ in range(3) for name in next(batches).ids]
        state = first.state_dict()
        del batches  # With what its workers had read ahead.
        second = data.train_dataloader()
        second.load_state_dict(state)
        second.set_epoch(1)
        resumed.append(seen + [name for batch in second for name in batch.ids])
    assert straight == resumed
    counts = Counter(sum(straight, []))
    assert set(counts.values()) == {1}
    assert len(counts) == len(data.train_set)
    assert abs(len(straight[0]) - len(straight[1])) <= steps[0] == steps[1]
    # And all of those that were written for training.
    held_out = [name for batch in data.predict_dataloader() for name in batch.ids]
    assert not set(held_out) & set(counts)
    if kind in ("coco", "hf-map", "hf-stream"):
        assert len(counts) == 30


@pytest.mark.parametrize("kind", WRITERS)
def test_images_belong_to_their_captions(kind, make):
    data = make(kind)
    for i in range(len(data.val_set)):
        record = data.val_set[i]
        number = record.image.getpixel((0, 0))[0]
        assert caption(number).split() == record.captions[0].split()[: len(caption(number).split())]


@pytest.mark.parametrize("kind", WRITERS)
def test_training_captions_need_no_image(kind, make, monkeypatch):
    """Those of every record where it is decoded; fewer are spaced evenly, or the first of a stream."""
    import datasets

    from lightning_limber.data import annotations, huggingface, image_folder, shards

    data = make(kind)
    if kind == "hf-stream":
        records = [data.train_set.decode(row) for row in data.train_set.rows(0)]
    else:
        records = [data.train_set[i] for i in range(len(data.train_set))]

    def refuse(path):
        raise AssertionError("an image was opened")

    for module in (annotations, huggingface, image_folder, shards):
        monkeypatch.setattr(module, "open_image", refuse)
    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    assert list(data.training_captions()) == [text for record in records for text in record.captions]
    some = records[:7] if kind == "hf-stream" else records[:: -(-len(records) // 7)]
    assert len(some) > 4
    assert list(data.training_captions(limit=7)) == [text for record in some for text in record.captions]


@pytest.mark.parametrize("kind", sorted(WRITERS.keys() - {"hf-stream"}))
def test_settings_are_chosen_on_training_records(kind, make):
    """The records of both parts are those of the training set, and each knows what it knew there."""
    whole = make(kind)
    data = make(kind, choose_on=5)
    kept, held_out = data.train_set, data.val_set
    assert len(held_out) == 5
    assert all(record.image is not None for record in map(held_out.__getitem__, range(5)))
    indices = [*kept.indices, *held_out.indices]
    assert sorted(indices) == list(range(len(whole.train_set)))
    for place, index in enumerate(indices):
        part, own = (kept, place) if place < len(kept) else (held_out, place - len(kept))
        assert part[own].id == whole.train_set[index].id
        assert list(part.captions(own)) == list(whole.train_set.captions(index))
        if hasattr(whole.train_set, "lengths"):
            assert part.lengths[own] == whole.train_set.lengths[index]
    assert [name for batch in data.val_dataloader() for name in batch.ids] == [
        held_out[i].id for i in range(5)
    ]
    seen = [name for batch in data.train_dataloader() for name in batch.ids]
    assert sorted(seen) == sorted(kept[i].id for i in range(len(kept)))
    assert data.fingerprint()["training"]["records"] == str(len(kept))
    # A larger number only adds to them.
    assert {*held_out.indices} < {*make(kind, choose_on=9).val_set.indices}


def test_no_settings_are_chosen_on_what_is_not_there(make):
    with pytest.raises(ValueError, match="data.choose_on=5: a stream's records can only be read from the"):
        make("hf-stream", choose_on=5)
    with pytest.raises(
        ValueError, match="data.choose_on=99: the training set has .* records with an image"
    ):
        make("coco", choose_on=99)


def test_training_captions_of_any_data_set(make):
    """One that has no `captions`, and records that cannot be read."""
    data = make("folder")
    records = [data.train_set[i] for i in range(len(data.train_set))]

    class Plain:
        def __len__(self) -> int:
            return len(records)

        def __getitem__(self, index: int):
            if index == 2:
                raise OSError("no picture")
            return records[index]

    data.train_set = Plain()
    expected = [record.captions[0] for i, record in enumerate(records) if i != 2]
    assert list(data.training_captions()) == expected


def test_epochs_differ_and_processes_share_them(make):
    for kind in ("shards", "hf-stream"):
        data = make(kind)
        orders = []
        for epoch in (0, 1):
            loader = data.train_dataloader()
            loader.set_epoch(epoch)
            orders.append([name for batch in loader for name in batch.ids])
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == sorted(orders[1])


def test_batches_of_like_length_have_less_padding(make):
    waste = {}
    for window in (0, 7):
        data = make("coco", count=28, length_window=window)
        loader = data.train_dataloader()
        padded = real = 0
        for batch in loader:
            # The last label of a sequence is no input that is used.
            padded += batch.input_ids.numel()
            real += batch.used_positions + len(batch.label_counts)
        waste[window] = 1 - real / padded
    assert waste[7] < waste[0] / 3
    assert waste[7] < 0.1


# -- conversations ----------------------------------------------------------------------------------


def test_conversations(make):
    data = make("llava")
    records = [data.train_set[i] for i in range(len(data.train_set))]
    assert {record.image is None for record in records} == {True, False}
    assert all(data.val_set[i].image is not None for i in range(len(data.val_set)))
    assert {len(record.turns) for record in records} == {1, 2}
    assert not any("<image>" in text for record in records for turn in record.turns for text in turn)
    loader = data.train_dataloader()
    loader.num_workers = 0
    kinds = [(len(batch.label_counts), len(batch.pixel_values)) for batch in loader]
    assert all(sequences in (4, 5) for sequences, _ in kinds)
    assert any(images < sequences for sequences, images in kinds)
    # Sorted by length, records without an image keep to themselves: all batches but one are of one kind.
    loader.length_window = 99
    assert sum(0 < len(batch.pixel_values) < len(batch.ids) for batch in loader) <= 1


def test_broken_conversations_are_counted(tmp_path):
    good = [{"from": "human", "value": "dog"}, {"from": "gpt", "value": "cat"}]
    entries = [{"id": "a", "conversations": talk} for talk in (good, [good[1], *good], [*good, good[0]])]
    entries += [{"id": "b", "conversations": talk} for talk in ([], [good[0], good[0]])]
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    data = LLaVAConversations("chat.json", str(tmp_path), max_bad_share=0.5)
    with pytest.warns(UserWarning, match="(?s)2 of 5 records .*human and gpt do not take turns"):
        train, _ = data.datasets()
    assert [train[i].turns for i in range(len(train))] == [[("dog", "cat")]] * 3
    with pytest.raises(ValueError, match="human and gpt do not take turns"):
        LLaVAConversations("chat.json", str(tmp_path)).datasets()


# -- formats ----------------------------------------------------------------------------------------


def test_karpathy_split(make):
    data = make("coco", captions_per_image=2)
    assert (len(data.train_set), len(data.val_set), len(data.test_dataset())) == (30, 4, 4)
    assert all(len(data.train_set[i].captions) == 5 for i in range(30))
    batch = next(iter(data.train_dataloader()))
    assert len(batch.label_counts) == len(batch.ids)  # Two captions in each sequence.
    assert batch.caption_ids.amax(-1).tolist() == [2] * len(batch.ids)
    data.share_prefix = False
    batch = next(iter(data.train_dataloader()))
    assert len(batch.label_counts) == 2 * len(batch.ids)
    assert batch.label_images.unique().tolist() == [*range(len(batch.ids))]


def test_official_coco_file(tmp_path):
    names = [f"{i:012d}.jpg" for i in range(40)]
    data = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i % 40, "caption": f" a  cat\n {i}"} for i in range(80)],
    }
    (tmp_path / "captions_train2017.json").write_text(json.dumps(data))
    for name in names:
        picture(0).save(tmp_path / name, "PNG")
    train, val = CocoCaptions("captions_train2017.json", str(tmp_path), val_share=0.2).datasets()
    assert len(train) + len(val) == 40
    assert 0 < len(val) < 20
    assert val[0].captions == [f"a cat {int(val[0].id[:12]) + add}" for add in (0, 40)]


def test_wrong_paths_are_named(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(FileNotFoundError, match=r"data.annotations: there is no file 'y.json'"):
        CocoCaptions("y.json", ".").datasets()
    image = {"filename": "1.png", "split": "train", "sentences": [{"raw": "cat"}]}
    (tmp_path / "x.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(FileNotFoundError, match=r"has no '1.png', which data.annotations names"):
        CocoCaptions("x.json", str(tmp_path)).datasets()
    with pytest.raises(FileNotFoundError, match=r"2 of 2 files do not exist"):
        Shards("{00..01}.tar").datasets()


def test_fewer_shards_than_workers_are_no_obstacle_but_one_must_be_held_out(make, tmp_path):
    data = make("shards", num_workers=6)
    assert len(data.train_set) == sum(len(batch.ids) for batch in data.train_dataloader())
    with pytest.raises(ValueError, match="data.val_shards=1 of 1 shards"):
        Shards(str(tmp_path / "shards/00000.tar")).datasets()


def test_shards_are_indexed_once(make, tmp_path, monkeypatch):
    make("shards")
    from lightning_limber.data import shards

    monkeypatch.setattr(shards, "index_shard", lambda path: pytest.fail("indexed again"))
    data = Shards(str(tmp_path / "shards/{00000..00004}.tar"), **SMALL)
    assert len(data.datasets()[0]) == 30


def test_braces():
    assert expand_braces("a/{08..11}.tar") == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_shuffled_blocks_are_a_permutation_that_stays_near_together():
    blocks = list(range(0, 2000, 100))
    generator = torch.Generator().manual_seed(0)
    parts = list(shuffled_order(2000, blocks, generator))
    assert torch.cat(parts).sort().values.tolist() == list(range(2000))
    assert all(len({int(i) // 100 for i in part}) <= 8 for part in parts)
    assert len({int(i) // 100 for i in parts[0][:50]}) > 4  # Files of a part are mixed.


def test_a_stream_that_ends_early_says_so(make):
    data = make("hf-stream")
    data.train_set.count = 99
    with pytest.raises(ValueError, match="ended after 30 of 99 records: set data.num_train"):
        list(data.train_dataloader())


def test_unreadable_pictures_are_counted_and_too_many_stop(make, tmp_path):
    data = make("coco", count=40, num_workers=0, max_bad_share=0.01)
    for i in (3, 5):
        (tmp_path / f"coco/val2014/{i}.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"Skipped \(2 of \d+ so far\)"):
        batches = list(data.train_dataloader())
    assert sum(len(batch.ids) for batch in batches) == 38
    assert sum(len(batch.skipped) for batch in batches) == 2
    for i in range(15):
        (tmp_path / f"coco/val2014/{i}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"could not be read, more than data.max_bad_share=0.01"):
        list(data.train_dataloader())


def test_a_batch_of_which_nothing_can_be_read_teaches_nothing(make, tmp_path):
    data = make("coco", num_workers=0, max_bad_share=1.0)
    for path in (tmp_path / "coco/val2014").iterdir():
        path.write_bytes(b"no picture")
    batch = next(iter(data.train_dataloader()))
    assert batch.ids == []
    assert len(batch.labels) == len(batch.pixel_values) == 0
    assert batch.label_counts == [0]


def test_packed_list():
    items = [{"a": i, "b": ["é"] * i} for i in range(50)]
    packed = PackedList(iter(items))
    assert len(packed) == 50
    assert [packed[i] for i in range(50)] == items
    assert isinstance(packed.bytes, np.ndarray)
