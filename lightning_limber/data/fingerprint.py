"""What a data set holds, in a few short hashes: whether it is still the one that a run began with.

No image is opened. A picture is known by its name and the size of its file; where a copy of the files
need not be taken for the same (kept features), by the time of its last change too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

LOOKED_AT = 20_000
"""Without times, the sizes of so many files are looked at, evenly spaced."""


class Content(NamedTuple):
    """What tells one record from another, or all those of one file."""

    name: str
    captions: list[Any]
    """Or the turns of a conversation, or anything that changes with them."""
    picture: str
    """What tells its picture from others without decoding it."""


def file_stamps(paths: Sequence[Path], times: bool) -> list[str]:
    """Size of each file, and with `times` when it was changed and which path it has; '' without a file."""
    step = 1 if times else max(1, -(-len(paths) // LOOKED_AT))

    def stamp(path: Path) -> str:
        try:
            stat = os.stat(path)
        except (OSError, ValueError):
            return ""
        return f"{stat.st_size} {stat.st_mtime_ns} {path}" if times else f"{stat.st_size}"

    with ThreadPoolExecutor(16) as pool:
        stamps = iter(pool.map(stamp, paths[::step]))
        return [next(stamps) if i % step == 0 else "" for i in range(len(paths))]


def fingerprint(records: Any, times: bool = False) -> dict[str, str]:
    """Number of records, and hashes of their names, their captions and their pictures.

    Args:
        records: A data set. Without ``contents`` (see `RecordSet`) only its length is known, and of a
            stream its ``sources``.
        times: Also tell files apart by path and time of change.
    """
    found = {"records": str(len(records))}
    if not hasattr(records, "contents"):
        sources = records.sources() if hasattr(records, "sources") else []
        return found | ({"sources": _short(repr(sources).encode())} if sources else {})
    hashes = {name: hashlib.sha256() for name in ("names", "captions", "pictures")}
    contents: Iterator[Content] = records.contents(times)
    for content in contents:
        for digest, part in zip(hashes.values(), content, strict=True):
            digest.update(repr(part).encode())
    return found | {name: digest.hexdigest()[:16] for name, digest in hashes.items()}


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


WORDS = {
    "names": "names of records",
    "captions": "captions",
    "pictures": "picture files (by size)",
    "sources": "files or revision of the stream",
}


def data_differences(saved: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """One line for each part of the data that differs, with what differs in it."""
    lines = []
    for part, before in saved.items():
        after = now.get(part, {})
        # What an older version did not look at is not compared.
        found = [
            f"other {word}"
            for key, word in WORDS.items()
            if before.get(key, after.get(key)) != after.get(key)
        ]
        if before["records"] != after.get("records"):
            found.insert(0, f"{before['records']} records in the checkpoint, {after.get('records')} now")
        if found:
            lines.append(f"{part}: {', '.join(found)}")
    return lines
