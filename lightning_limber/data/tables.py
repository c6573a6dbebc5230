"""Tables of pictures and captions: JSON lines, CSV, and the CSV-like files of Flickr8k and Flickr30k."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_limber.data.records import UnreadableRecord
from lightning_limber.data.text import UTF16, decode, parse_object

TABLES = {".jsonl", ".csv", ".txt"}
IMAGE, CAPTION = ("image", "image_name"), ("captions", "caption", "comment")
"""Names of the two columns; `image_name` and `comment` are Flickr30k's."""
EXPECTED = "rows that have `image` and `caption` or `captions`"
Said = tuple[str, Any]
"""An image's name (or a row's place), and its captions as they stand, or the error that the row is."""


def read_table(path: Path) -> Iterator[Said]:
    """Yields every row. Several rows may be of one image.

    Raises:
        ValueError: it is no such table at all.
    """
    with path.open("rb") as file:
        if file.read(2) in UTF16:
            raise ValueError(f"data.root: '{path}' is in UTF-16; save it as UTF-8.")
    return _json_lines(path) if path.suffix == ".jsonl" else _csv(path)


def _json_lines(path: Path) -> Iterator[Said]:
    with path.open("rb") as file:  # Bytes are split at \n alone; text also where a string may go on.
        for number, line in enumerate(file, 1):
            if line.strip() and line.strip() != b"\xef\xbb\xbf":
                yield _row(line, number)


def _row(line: bytes, number: int) -> Said:
    place = f"line {number}"
    try:
        row = parse_object(decode(line))
    except UnreadableRecord as error:
        return place, error
    image = next((row[key] for key in IMAGE if key in row), None)
    captions = next((row[key] for key in CAPTION if row.get(key) is not None), None)
    if not isinstance(image, str) or not image:
        return place, UnreadableRecord(f"each row needs `image` and `caption` or `captions`, found {row}")
    return image, captions


def _csv(path: Path) -> Iterator[Said]:
    # What is no UTF-8 becomes characters that no caption may have, so that other rows can be read.
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    header = text.partition("\n")[0]
    # Flickr30k's results.csv has quotes that are never closed.
    bars = "|" in header and "," not in header
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="|" if bars else ",",
        quoting=csv.QUOTE_NONE if bars else csv.QUOTE_MINIMAL,
        strict=True,
    )
    names = [name.strip() for name in next(rows, [])]
    image = next((names.index(name) for name in IMAGE if name in names), None)
    caption = next((names.index(name) for name in CAPTION if name in names), None)
    if image is None or caption is None:
        raise ValueError(
            f"data.root: the first line of '{path}' must name the columns `image` and `caption`, found "
            f"{header.strip()!r}."
        )
    while True:
        place = f"line {rows.line_num + 1}"
        try:
            fields = [field.strip() for field in next(rows)]
        except StopIteration:
            return
        except csv.Error as error:
            yield place, UnreadableRecord(f"up to line {rows.line_num} no CSV: {error}")
            continue
        if not any(fields):
            continue
        name = (fields[image] if image < len(fields) else "") or place
        if name == place:
            yield place, UnreadableRecord("it names no image")
        elif len(fields) != len(names):
            hint = "" if bars or len(fields) < len(names) else "; a caption with commas belongs in quotes"
            yield name, UnreadableRecord(f"{place} has {len(fields)} fields, the header {len(names)}{hint}")
        else:
            yield name, fields[caption]
