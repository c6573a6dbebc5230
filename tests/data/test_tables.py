"""Tables, sidecars and folders as they are published and as office programs write them."""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path

import pytest
from datasets_on_disk import picture
from PIL import Image

from lightning_limber.data import CocoCaptions, HuggingFaceCaptions, ImageFolder, LLaVAConversations
from lightning_limber.data.held_out import stand_in
from lightning_limber.data.image_folder import find_pictures
from lightning_limber.data.records import Record
from lightning_limber.utils.cache import read_kept

SAID = {f"{i}.png": [f"image {i} , {word}" for word in ("one", "two", "three")] for i in range(4)}
ROWS = [(name, caption) for name, captions in SAID.items() for caption in captions]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
    return folder


def read(path: Path, **kwargs) -> dict[str, list[str]]:
    records, _ = ImageFolder(str(path), val_share=0, **kwargs).datasets()
    return {record.id: record.captions for record in (records[i] for i in range(len(records)))}


# -- several rows of one image -----------------------------------------------------------------------


def flickr8k(root: Path) -> None:
    lines = [f'{name},"{caption}"' for name, caption in ROWS]
    (root / "captions.txt").write_text("\n".join(["image,caption", *lines]))


def flickr30k(root: Path) -> None:
    lines = [f"{name}| {i}| {caption}" for i, (name, caption) in enumerate(ROWS)]
    (root / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *lines]))


def json_lines(root: Path) -> None:
    lines = [json.dumps({"image": name, "caption": caption}) for name, caption in ROWS]
    (root / "rows.jsonl").write_text("\n".join(lines))


def lists(root: Path) -> None:
    lines = [json.dumps({"image": name, "captions": captions}) for name, captions in SAID.items()]
    (root / "lists.jsonl").write_text("\n".join([*lines, lines[0]]))


@pytest.mark.parametrize("write", [flickr8k, flickr30k, json_lines, lists])
def test_rows_of_one_image_are_one_record(write, root):
    write(root)
    [table] = [path for path in root.iterdir() if path.suffix != ".png"]
    expected = SAID | ({"0.png": SAID["0.png"] * 2} if write is lists else {})
    assert read(table) == expected
    # The pictures may lie elsewhere.
    (root / "elsewhere").mkdir()
    table = table.rename(root / "elsewhere" / table.name)
    assert read(table, images=str(root)) == expected


def test_a_broken_row_costs_its_image_one_caption(root):
    flickr30k(root)
    text = (root / "results.csv").read_text().replace("1.png| 4| image", '1.png| 4   an "image')
    (root / "results.csv").write_text(text)  # As one row of the published file.
    with pytest.warns(UserWarning, match=r"Skipped: 1 captions .*\n  1.png: line 6 has 2 fields"):
        found = read(root / "results.csv")
    assert found == SAID | {"1.png": [SAID["1.png"][0], SAID["1.png"][2]]}


def test_one_image_twice_in_a_coco_file_is_one_record(root):
    images = [{"id": i, "file_name": f"{i % 2}.png"} for i in range(4)]
    notes = [{"image_id": i, "caption": f"caption {i}"} for i in range(4)]
    (root / "x.json").write_text(json.dumps({"images": images, "annotations": notes}))
    train, _ = CocoCaptions(str(root / "x.json"), str(root), val_share=0).datasets()
    assert [train[i].captions for i in range(len(train))] == [
        ["caption 0", "caption 2"],
        ["caption 1", "caption 3"],
    ]


def test_of_a_held_out_image_one_conversation_is_kept(root):
    entries = [
        {
            "image": f"{i // 3}.png",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"answer {i}"}],
        }
        for i in range(12)
    ]
    (root / "chat.json").write_text(json.dumps(entries))
    train, val = LLaVAConversations(str(root / "chat.json"), str(root), val_share=1).datasets()
    assert (len(train), len(val)) == (0, 4)
    assert [val[i].captions for i in range(4)] == [[f"answer {i}"] for i in (0, 3, 6, 9)]
    train, _ = LLaVAConversations(str(root / "chat.json"), str(root), val_share=0).datasets()
    assert len(train) == 12


def bmp(i: int) -> bytes:
    """Pictures of one size of file."""
    buffer = io.BytesIO()
    picture(i).save(buffer, "BMP")
    return buffer.getvalue()


def test_neighbouring_rows_of_one_image_in_a_table_are_one_record(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    runs = [0, 0, 0, 1, 2, 2, 1, None, None, 3]  # 1 comes twice, not as a neighbour.
    rows = {
        "image": [None if i is None else {"bytes": bmp(i), "path": None} for i in runs],
        "caption": [f"caption {place}" for place in range(len(runs))],
    }
    file = str(tmp_path / "x.parquet")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    data = HuggingFaceCaptions("parquet", data_files={"train": file}, val_split="train")
    records, _ = data.datasets()
    assert [records.name(i) for i in range(len(records))] == [f"train/{i}" for i in (0, 3, 4, 6, 7, 8, 9)]
    captions = [["caption 0", "caption 1", "caption 2"], ["caption 3"], ["caption 4", "caption 5"]]
    assert [records[i].captions for i in range(3)] == [records.captions(i) for i in range(3)] == captions
    assert [records[i].image.getpixel((0, 0))[0] for i in (0, 1, 2, 3, 6)] == [0, 1, 2, 1, 3]
    assert records.lengths == [27, 9, 18, 9, 9, 9, 9]


def test_a_stand_in_is_another_picture():
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    records = [Record(str(i), red if i < 7 else blue, [f"caption {i}"]) for i in range(8)]
    assert {stand_in(records[i], i, 8, records.__getitem__).id for i in range(7)} == {"7"}


# -- encodings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_marks_line_ends_and_blank_lines(encoding, end, root):
    lines = [json.dumps({"image": name, "caption": "café " + caption}) for name, caption in ROWS]
    (root / "rows.jsonl").write_bytes(end.join(["", *lines[:3], "", " ", *lines[3:], ""]).encode(encoding))
    lines = ["image,caption", *(f'{name},"café {caption}"' for name, caption in ROWS)]
    (root / "rows.csv").write_bytes(end.join([*lines[:3], "", *lines[3:], "", ""]).encode(encoding))
    for name in SAID:
        text = end.join([f"café {SAID[name][0]}", "another line"])
        (root / name).with_suffix(".txt").write_bytes(text.encode(encoding))
    expected = {name: ["café " + caption for caption in captions] for name, captions in SAID.items()}
    assert read(root / "rows.jsonl") == read(root / "rows.csv") == expected
    assert read(root) == {name: captions[:1] for name, captions in expected.items()}


@pytest.mark.parametrize("sign", ["\u2028", "\u0085", "\u2029", "\x0b"])
def test_only_a_line_feed_ends_a_line(sign, root):
    text = f"a red{sign}circle"
    (root / "rows.jsonl").write_text(
        json.dumps({"image": "0.png", "caption": text}, ensure_ascii=sign == "\x0b"), encoding="utf-8"
    )
    (root / "rows.csv").write_text(f"image,caption\n0.png,{text}\n", encoding="utf-8")
    assert read(root / "rows.jsonl") == read(root / "rows.csv") == {"0.png": ["a red circle"]}
    for i in range(4):
        (root / f"{i}.txt").write_text(text, encoding="utf-8")
    assert read(root)["0.png"] == ["a red circle"]


@pytest.mark.parametrize(
    ("encoding", "why"), [("utf-16", "not UTF-8 but UTF-16"), ("latin-1", "not UTF-8 but byte 0xe9")]
)
def test_sidecars_in_another_encoding_are_named(encoding, why, root):
    for i in range(4):
        text = "a café ."
        (root / f"{i}.txt").write_bytes(text.encode(encoding if i == 1 else "utf-8"))
    with pytest.warns(UserWarning, match=rf"1 of 4 records .*\n  1\.png: its text is {why}"):
        assert list(read(root, max_bad_share=0.3)) == ["0.png", "2.png", "3.png"]


def test_rows_in_another_encoding_are_named_and_such_tables_refused(root):
    lines = [f'{{"image": "{i}.png", "caption": "a café"}}'.encode() for i in range(4)]
    lines[2] = lines[2].decode().encode("latin-1")
    (root / "rows.jsonl").write_bytes(b"\n".join(lines))
    with pytest.warns(UserWarning, match=r"1 of 4 records .*\n  line 3: .*0xe9"):
        assert list(read(root / "rows.jsonl", max_bad_share=0.3)) == ["0.png", "1.png", "3.png"]
    rows = [f"{i}.png,a café".encode("latin-1" if i == 2 else "utf-8") for i in range(4)]
    (root / "rows.csv").write_bytes(b"\n".join([b"image,caption", *rows]))
    with pytest.warns(UserWarning, match=r"1 of 4 records .*\n  2\.png: its caption is not UTF-8"):
        assert list(read(root / "rows.csv", max_bad_share=0.3)) == ["0.png", "1.png", "3.png"]
    for name in ("rows.jsonl", "rows.csv"):
        (root / name).write_text("image,caption\n0.png,x", encoding="utf-16")
        with pytest.raises(ValueError, match=rf"data.root: '.*{name}' is in UTF-16; save it as UTF-8"):
            read(root / name)


# -- CSV ---------------------------------------------------------------------------------------------


def test_a_caption_with_a_comma_and_no_quotes_is_named_not_cut(root):
    (root / "rows.csv").write_text('image,caption\n0.png,a, b\n1.png,"a, b"\n2.png,a "b"\n3.png\n,x\n')
    with pytest.warns(UserWarning, match="3 of 5 records") as caught:
        assert read(root / "rows.csv", max_bad_share=0.9) == {"1.png": ["a, b"], "2.png": ['a "b"']}
    said = str(caught[0].message)
    assert "0.png: line 2 has 3 fields, the header 2; a caption with commas belongs in quotes" in said
    assert "3.png: line 5 has 1 fields, the header 2" in said
    assert "line 6: it names no image" in said


def test_quotes_that_are_not_closed_are_named(root):
    (root / "rows.csv").write_text('image,caption\n0.png,"a\n1.png,b\n2.png,"c"\n3.png,d\n')
    with pytest.warns(UserWarning, match=r"line 2: up to line 4 no CSV"):
        assert list(read(root / "rows.csv", max_bad_share=0.9)) == ["3.png"]


@pytest.mark.parametrize("header", ["file,text", "", "image;caption"])
def test_columns_that_are_not_there(header, root):
    (root / "rows.csv").write_text(f"{header}\n0.png,x\n")
    with pytest.raises(ValueError, match="must name the columns `image` and `caption`, found"):
        read(root / "rows.csv")


def test_a_file_that_is_no_table(root):
    with pytest.raises(FileNotFoundError, match=r"0\.png' is neither\. Give a folder or a table \(\.csv"):
        read(root / "0.png")


# -- folders -----------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "a/deep", root / "z", other / "more"):
        folder.mkdir(parents=True)
    for path in (
        root / "0.png",
        root / "a/deep/1.png",
        root / "z/2.png",
        other / "3.png",
        other / "more/4.png",
    ):
        Image.new("RGB", (4, 4)).save(path)
    (root / "linked").symlink_to(other)
    (root / "a/back").symlink_to(root)  # A circle.
    (root / "a/again").symlink_to(root / "z")  # Does not rename z/2.png.
    (root / "self").symlink_to(root / "self")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "folder.png").mkdir()
    names = [path.relative_to(root).as_posix() for path in find_pictures(root)]
    assert names == ["0.png", "a/deep/1.png", "gone.png", "linked/3.png", "linked/more/4.png", "z/2.png"]


def test_predict_follows_links_too(tmp_path):
    from lightning_limber.tools.predict import find_images

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a/0.png")
    (tmp_path / "b/link").symlink_to(tmp_path / "a")
    assert find_images([str(tmp_path / "b")]) == [tmp_path / "b/link/0.png"]


@pytest.mark.skipif(os.name == "nt", reason="names of files are bytes on POSIX only")
def test_names_that_are_no_utf_8_can_be_read_and_written(root):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        picture(9).save(root / name)
    except OSError:
        pytest.skip("this file system allows no such name")
    for i in range(4):
        (root / f"{i}.txt").write_text("x")
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("a cafe")
    found = read(root)
    assert found["caf\\udce9.png"] == ["a cafe"]
    assert all(key.encode() for key in found)
    (root / os.fsdecode(b"caf\xe9.txt")).unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(root, max_bad_share=0.3)
    assert [str(warning.message).encode() for warning in caught]


@pytest.mark.parametrize("content", ["", '{"a', "[]"])
def test_a_ledger_that_cannot_be_read_is_made_anew(content, root, tmp_path):
    for i in range(4):
        (root / f"{i}.txt").write_text("x")
    read(root)
    [ledger] = (tmp_path / "cache/image_folders").iterdir()
    ledger.write_text(content)
    assert len(read(root)) == 4
    assert len(json.loads(read_kept(ledger))) == 4


def test_a_picture_that_was_bad_is_looked_at_again(root):
    json_lines(root)
    (root / "1.png").rename(root / "hidden")
    with pytest.warns(UserWarning, match=r"1\.png: missing"):
        assert len(read(root / "rows.jsonl", max_bad_share=0.3)) == 3
    (root / "hidden").rename(root / "1.png")
    assert len(read(root / "rows.jsonl")) == 4
