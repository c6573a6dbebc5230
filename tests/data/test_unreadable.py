"""Records that cannot be used, in every source: left out, counted and named, and never the end of a run."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import types
import warnings
import zlib
from pathlib import Path

import pytest
from datasets_on_disk import jpg
from PIL import Image, PngImagePlugin

from lightning_limber.data import CocoCaptions, HuggingFaceCaptions, ImageFolder, LLaVAConversations, Shards
from lightning_limber.data.loader import BatchSource
from lightning_limber.data.records import Record

COUNT = 60


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def png_with_text(length: int) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * length, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


PICTURES = {
    3: (jpg(3)[:45], ""),  # Cut; Pillow has several words for it.
    7: (png_of(20_000, 20_000), "exceeds limit"),  # A decompression bomb.
    11: (png_with_text(2**21), "too large"),  # ValueError
    13: (jpg(13).replace(b"IDAT", b"I?AT"), ""),  # SyntaxError
    17: (b"no picture", "cannot identify"),
    19: (b"", "cannot identify"),
    23: (None, ""),  # Missing, or null.
}
CAPTIONS = {
    29: (None, "no caption"),
    31: ("", "no caption"),
    37: (" \t\u00a0", "no caption"),
    41: ("\u200b\ufeff", "no caption"),
    43: ("a\0b", "NUL"),
    47: (42, "int, not text"),
    53: (["a list", {"not": "text"}], ""),  # Where lists are allowed, what is text in them is used.
    59: ({"of": "a"}, "dict, not text"),
}
ROWS = [
    (PICTURES.get(i, (jpg(i),))[0], CAPTIONS.get(i, (f"a picture of {i}", ""))[0]) for i in range(COUNT)
]


def save_pictures(root: Path) -> None:
    for i, (picture, _) in enumerate(ROWS):
        if picture is not None:
            (root / f"{i}.png").write_bytes(picture)


def write_folder(root: Path) -> ImageFolder:
    save_pictures(root)
    for i, (_, caption) in enumerate(ROWS):
        if isinstance(caption, str):
            (root / f"{i}.txt").write_text(caption, encoding="utf-8")
    return ImageFolder(str(root), max_bad_share=1.0)


def write_jsonl(root: Path) -> ImageFolder:
    save_pictures(root)
    lines = [json.dumps({"image": f"{i}.png", "caption": caption}) for i, (_, caption) in enumerate(ROWS)]
    (root / "table.jsonl").write_text("\n".join(lines))
    return ImageFolder(str(root / "table.jsonl"), max_bad_share=1.0)


def write_official(root: Path) -> CocoCaptions:
    save_pictures(root)
    notes = [{"image_id": i, "caption": caption} for i, (_, caption) in enumerate(ROWS)]
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(COUNT)]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return CocoCaptions(str(root / "captions.json"), str(root), val_share=0.2, max_bad_share=1.0)


def write_karpathy(root: Path) -> CocoCaptions:
    save_pictures(root)
    images = [
        {"filename": f"{i}.png", "split": "train" if i % 5 else "val", "sentences": [{"raw": caption}]}
        for i, (_, caption) in enumerate(ROWS)
    ]
    (root / "dataset.json").write_text(json.dumps({"images": images}))
    return CocoCaptions(str(root / "dataset.json"), str(root), max_bad_share=1.0)


def write_llava(root: Path) -> LLaVAConversations:
    save_pictures(root)
    entries = [
        {
            "id": f"{i}.png",
            "image": f"{i}.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}],
        }
        for i, (_, caption) in enumerate(ROWS)
    ]
    (root / "chat.json").write_text(json.dumps(entries))
    return LLaVAConversations(str(root / "chat.json"), str(root), val_share=0.2, max_bad_share=1.0)


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples):
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_shards(root: Path) -> Shards:
    samples = [
        {"png": picture or b"", "json": json.dumps({"caption": caption}).encode()}
        for picture, caption in ROWS
    ]
    write_tar(root / "00000.tar", samples)
    write_tar(root / "00001.tar", [{"png": jpg(0), "txt": b"held out"}] * 4)
    return Shards(str(root / "{00000..00001}.tar"), max_bad_share=1.0)


def write_parquet(root: Path, streaming: bool = False) -> HuggingFaceCaptions:
    import datasets

    # A column has one type: no number among texts.
    features = datasets.Features({"image": datasets.Image(), "caption": [datasets.Value("string")]})
    said = [[caption] if isinstance(caption, (str, type(None))) else [] for _, caption in ROWS]
    images = [None if picture is None else {"bytes": picture, "path": None} for picture, _ in ROWS]
    for split, part in {"train": slice(None), "validation": slice(0, 4)}.items():
        rows = {"image": images[part], "caption": said[part]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}.parquet")
    files = {split: str(root / f"{split}.parquet") for split in ("train", "validation")}
    count = COUNT if streaming else None
    return HuggingFaceCaptions(
        "parquet", data_files=files, streaming=streaming, num_train=count, max_bad_share=1.0
    )


def write_stream(root: Path) -> HuggingFaceCaptions:
    return write_parquet(root, streaming=True)


WRITERS = {
    "folder": write_folder,
    "jsonl": write_jsonl,
    "coco": write_official,
    "karpathy": write_karpathy,
    "llava": write_llava,
    "shards": write_shards,
    "hf-map": write_parquet,
    "hf-stream": write_stream,
}


def collate(records, captions, index, skipped, **_):
    assert all(record.captions and all(record.captions) for record in records)
    return types.SimpleNamespace(ids=[r.id for r in records], skipped=skipped, held_out=False, other=None)


def on_one_process(data):
    module = types.SimpleNamespace(collator=lambda: collate)
    data.trainer = types.SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    data.num_workers, data.batch_size, data.val_batch_size = 0, 4, 4
    data.setup("fit")
    return data


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    # The library waits so long at the end of every stream.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


# A caption without its picture is no record of a folder; a typed column holds no such list.
ABSENT = {("folder", 23), ("hf-map", 53), ("hf-stream", 53)}


def why_bad(kind: str, i: int) -> str | None:
    """Part of the reason for which record `i` is left out; None where it is used."""
    if i >= 47 and i in CAPTIONS and kind in ("folder", "hf-map", "hf-stream"):
        return "no caption"  # These hold nothing but text.
    if kind == "llava" and i in (29, 31, 37, 41):
        return "no turn of gpt" if i == 29 else "an answer is empty"
    if i == 53:
        return None if kind == "jsonl" else "list, not text"
    return {**PICTURES, **CAPTIONS}.get(i, (None, None))[1]


@pytest.mark.parametrize("kind", WRITERS)
def test_bad_records_are_left_out_and_named_in_every_source(kind, tmp_path):
    data = WRITERS[kind](tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.prepare_data()
        on_one_process(data)
        batches = [*data.train_dataloader(), *data.val_dataloader()]
        batches += [
            *data.probe_dataloader(4, interventions=True),
            *data.caption_dataloader(4, data.val_set),
        ]
        captions = list(data.training_captions())
    said = [line.strip() for warning in caught for line in str(warning.message).splitlines()]

    def name(i: int) -> str:
        of_kind = {"llava": f"{i}/{i}.png", "shards": f"00000/{i}", "hf-map": f"train/{i}"}
        return {**of_kind, "hf-stream": f"train/{i}"}.get(kind, f"{i}.png")

    seen = {record for batch in batches for record in batch.ids}
    for i in range(COUNT):
        lines = [line for line in said if line.startswith(f"{name(i)}: ")]
        if (kind, i) in ABSENT:
            continue
        assert (name(i) in seen) == (why_bad(kind, i) is None)
        if why_bad(kind, i) is not None:
            assert any(why_bad(kind, i) in line for line in lines), (i, lines)
    assert captions
    assert all(isinstance(caption, str) and caption.strip() for caption in captions)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_run_that_allows_no_bad_record_stops_at_the_first_and_names_it(kind, tmp_path):
    data = WRITERS[kind](tmp_path)
    data.max_bad_share = 0.0

    def epoch():
        on_one_process(data)
        return list(data.train_dataloader())

    with pytest.raises(ValueError, match="more than data.max_bad_share=0") as error:
        epoch()
    assert re.search(r"\n  [\w/]+(\.png)?: ", str(error.value))


def test_your_own_data_set_may_raise_what_its_pictures_raise():
    class Own:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Record:
            if index in (1, 2, 3):
                raise [OSError, ValueError, SyntaxError][index - 1](f"bad {index}")
            return Record(str(index), None, [] if index == 4 else ["a dog"])

    source = BatchSource(Own(), collate, 1, 0, "validation")
    batch = source[(0, [(i, None) for i in range(6)])]
    assert batch.ids == ["0", "5"]
    reasons = {1: "bad 1", 2: "bad 2", 3: "bad 3", 4: "no caption"}
    assert batch.skipped == [(i, f"record {i}", why) for i, why in reasons.items()]

    class Wrong(Own):
        def __getitem__(self, index: int) -> Record:
            return Record("x", None, {}["captions"])  # A fault of the program is not a bad record.

    with pytest.raises(KeyError):
        BatchSource(Wrong(), collate, 1, 0)[(0, [(0, None)])]


# -- sources of which nothing can be used ------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"images": [{"id": 0, "file_name": "0.png"}]}, "has no captions", id="no annotations"),
        pytest.param(
            {
                "images": [{"id": 0, "file_name": "0.png"}],
                "annotations": [{"image_id": 0, "id": 0, "category_id": 1, "bbox": [0, 0, 1, 1]}],
            },
            r"no annotation of .* has a `caption` \(keys: .*bbox.*captions_\*\.json",
            id="instances",
        ),
        pytest.param([1, 2], "has no captions", id="list"),
        pytest.param(
            {"images": [{"filename": "0.png", "split": "train", "sentences": []}]},
            r"(?s)0\.png: no caption.*Expected: Karpathy's",
            id="no sentence",
        ),
        pytest.param(
            {"images": [{"filename": "0.png", "split": "dev", "sentences": [{"raw": "x"}]}]},
            "its split is 'dev'",
            id="split",
        ),
    ],
)
def test_coco_files_without_captions_are_refused(content, message, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        CocoCaptions(str(tmp_path / "x.json"), str(tmp_path)).datasets()


GOOD = {"image": "0.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ([], "an object is expected, found list"),
        (None, "an object is expected, found NoneType"),
        ({}, "no list of `conversations`"),
        (GOOD | {"conversations": None}, "no list of `conversations`"),
        (GOOD | {"conversations": ["hello", "hi"]}, "no list of `conversations`"),
        (GOOD | {"conversations": []}, "do not take turns"),
        (GOOD | {"conversations": [{"value": "?"}, {"value": "!"}]}, "do not take turns"),
        (GOOD | {"conversations": [{"from": "human"}, {"from": "gpt"}]}, "no turn of human"),
        (GOOD | {"image": ["0.png"]}, "its image is list"),
        (GOOD | {"image": 3}, "its image is int"),
    ],
)
def test_entries_that_are_no_conversation(entry, why, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "chat.json").write_text(json.dumps([entry, GOOD]))
    data = LLaVAConversations(str(tmp_path / "chat.json"), str(tmp_path), val_share=0, max_bad_share=0.5)
    with pytest.warns(UserWarning, match=rf"1 of 2 records .*\n  0.*: .*{why}"):
        train, _ = data.datasets()
    assert train[0].turns == [("?", "!")]
    (tmp_path / "chat.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="(?s)Expected: a list of {id, image, conversations"):
        data.datasets()


@pytest.mark.parametrize("make", [CocoCaptions, LLaVAConversations])
@pytest.mark.parametrize(
    "content", [b'{"images": [', b"\x1f\x8b\x08", b"\xff\xfe[\x00]\x00", b"[" * 100_000]
)
def test_cut_and_foreign_json_files_are_named(make, content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"data.annotations: '.*x.json' is no JSON in UTF-8, or it is cut"):
        make(str(tmp_path / "x.json"), str(tmp_path)).datasets()


def test_a_json_file_may_have_a_byte_order_mark(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "chat.json").write_text(json.dumps([GOOD]), encoding="utf-8-sig")
    train, _ = LLaVAConversations(str(tmp_path / "chat.json"), str(tmp_path), val_share=0).datasets()
    assert len(train) == 1


def test_some_missing_pictures_do_not_stop_at_the_start(tmp_path):
    images = [
        {"filename": f"{i}.png", "split": "train", "sentences": [{"raw": f"number {i}"}]} for i in range(4)
    ]
    (tmp_path / "x.json").write_text(json.dumps({"images": images}))
    for i in (0, 1):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    assert len(CocoCaptions(str(tmp_path / "x.json"), str(tmp_path)).datasets()[0]) == 4
    (tmp_path / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="3 of 4 looked for are missing"):
        CocoCaptions(str(tmp_path / "x.json"), str(tmp_path)).datasets()


# -- tars -------------------------------------------------------------------------------------------

SAMPLES = [{"png": jpg(i), "txt": f"number {i}".encode()} for i in range(6)]


def shards(root: Path, **kwargs) -> Shards:
    write_tar(root / "1.tar", SAMPLES[:2])
    return Shards(str(root / "{0,1}.tar"), **kwargs)


def ends(path: Path) -> list[int]:
    """Where each member's content ends."""
    with tarfile.open(path) as tar:
        return [member.offset_data + member.size for member in tar]


@pytest.mark.parametrize(
    ("cut", "whole"),
    [
        pytest.param(lambda end: end[6] + 10, 3, id="in a header"),
        pytest.param(lambda end: -(-end[7] // 512) * 512, 4, id="between blocks"),
        pytest.param(lambda end: -(-end[7] // 512) * 512 + 512 + 20, 4, id="in a picture"),
        pytest.param(lambda end: -(-end[6] // 512) * 512, 3, id="between picture and text"),
        pytest.param(lambda end: end[7] - 1, 3, id="in a text"),
        pytest.param(lambda end: 512 + 30, 0, id="in the first"),
    ],
)
def test_of_a_cut_tar_the_whole_samples_are_read_and_the_cut_is_named(cut, whole, tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, SAMPLES)
    path.write_bytes(path.read_bytes()[: cut(ends(path))])
    for _ in range(2):  # Also where the index is kept.
        data = shards(tmp_path)
        named = pytest.warns(UserWarning, match=r"(?s)1 of 2 tars are cut.*0\.tar: ")
        if not whole:
            with named, pytest.raises(ValueError, match="training shards hold no sample"):
                data.datasets()
            continue
        with named:
            train, _ = data.datasets()
        assert [train[i].captions[0] for i in range(len(train))] == [f"number {i}" for i in range(whole)]


def test_what_is_overwritten_in_mid_tar_ends_it_by_name(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, SAMPLES)
    content = bytearray(path.read_bytes())
    start = -(-ends(path)[3] // 512) * 512
    content[start : start + 512] = b"x" * 512
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"0\.tar: it has no end mark at byte {start}"):
        train, _ = shards(tmp_path).datasets()
    assert len(train) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "holds no file", id="0 bytes"),
        pytest.param(bytes(10240), "holds no file", id="no member"),
        pytest.param(b"\x1f\x8b\x08" + bytes(600), r"compressed \(gzip\).*Unpack it", id="gzip"),
        pytest.param(b"no tar at all" * 99, "holds no file", id="text"),
    ],
)
def test_tars_without_anything_to_read_are_refused_by_name(content, message, tmp_path):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data.shards: '.*0\.tar' .*{message}"):
        shards(tmp_path).datasets()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"caption": "a do', "no JSON"),
        (b'["a dog"]', "a JSON object is expected, found list"),
        (b"3", "a JSON object is expected, found int"),
        (b"{}", "no caption"),
        (b"\xff\xfea\0", "not UTF-8 but UTF-16"),
        ('{"caption": "café"}'.encode("latin-1"), "not UTF-8 but byte 0xe9"),
        (b"[" * 100_000, "no JSON"),
        (None, "neither a .txt nor a .json"),
    ],
)
def test_texts_in_a_tar_that_cannot_be_used(content, why, tmp_path):
    bad = {"png": jpg(0)} | ({} if content is None else {"json": content})
    write_tar(tmp_path / "0.tar", [SAMPLES[0], bad, *SAMPLES[2:]])
    data = on_one_process(shards(tmp_path))
    with pytest.warns(UserWarning, match=rf"1 of \d so far\):\n  0/1: .*{why}"):
        batches = list(data.train_dataloader())
    assert sorted(name for batch in batches for name in batch.ids) == ["0/0", "0/2", "0/3", "0/4", "0/5"]
    assert sorted(data.training_captions()) == [f"number {i}" for i in (0, 2, 3, 4, 5)]


def test_tars_of_one_name_in_two_folders_keep_their_samples_apart(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", SAMPLES[:2])
    _, val = Shards(str(tmp_path / "{a,b,c}/0.tar"), val_shards=2).datasets()
    assert len({val[i].id for i in range(len(val))}) == len(val) == 4


def test_a_half_written_index_is_made_anew(tmp_path):
    write_tar(tmp_path / "0.tar", SAMPLES)
    shards(tmp_path).datasets()
    for file in (tmp_path / "cache/shards").iterdir():
        file.write_bytes(file.read_bytes()[:30])
    assert len(shards(tmp_path).datasets()[0]) == 6
