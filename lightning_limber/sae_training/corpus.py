"""Reads the text that SAEs are trained on: a JSONL file, a folder of plain text or a `datasets` name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "heldout"]
HELDOUT_PCT = 6


def split_by_name(name: str) -> Split:
    """Held-out or not, by a hash of the document's name: the same on every machine."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return "heldout" if digest % 100 < HELDOUT_PCT else "train"


def read_documents(where: str | Path, text_key: str = "text") -> Iterator[tuple[Split, str, str]]:
    """Documents of a text source, one by one, so that a source of any size can be read.

    Args:
        where: A JSONL file, a folder of `.txt` files (one document each), or the name of a `datasets`
            data set, whose "train" split is read as a stream.
        text_key: The field of a record that holds its text.

    Yields:
        `(split, source, text)`. A record's own `split` decides where there is one, else a hash of its
        index; source is the record's own, with its kind of English, or `where`.

    Raises:
        FileNotFoundError: There is no such file, or no text in the folder.
        ValueError: A record has no text field.
    """
    for name, record in _records(where):
        if text_key not in record:
            raise ValueError(
                f"{where}: record {name} has no field {text_key!r}, only {sorted(record)}; "
                "put the text of each record there"
            )
        source = ", ".join(str(record[key]) for key in ("source", "kind") if key in record)
        yield record.get("split", split_by_name(name)), source or str(where), record[text_key]


def read_texts(where: str | Path, split: Split) -> Iterator[str]:
    """Texts of one split of a text source (`read_documents`)."""
    return (text for found, _, text in read_documents(where) if found == split)


def _records(where: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(where)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise FileNotFoundError(f"{path} holds no .txt file")
        for file in files:
            yield str(file.relative_to(path)), {"text": file.read_text(encoding="utf-8")}
    elif path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from ((str(i), json.loads(line)) for i, line in enumerate(lines))
    elif path.suffix:
        raise FileNotFoundError(f"{path} does not exist")
    else:
        from datasets import load_dataset

        stream = load_dataset(str(where), split="train", streaming=True)
        yield from ((str(i), record) for i, record in enumerate(stream))
