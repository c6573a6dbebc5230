"""Your own pictures: a folder of images with captions beside them, or a table of image and captions."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from tqdm import tqdm

from lightning_limber.data.datamodule import CaptionData
from lightning_limber.data.loader import RecordSet
from lightning_limber.data.records import Record
from lightning_limber.utils.cache import cache_dir

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
TABLES = {".jsonl", ".csv"}


@dataclass(frozen=True)
class Entry:
    """One row of the data: image path relative to the root, and its captions."""

    name: str
    captions: tuple[str, ...]


def open_image(path: Path | BinaryIO) -> Image.Image:
    """Decodes any picture to 8-bit RGB as a viewer shows it.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey is scaled (not clipped), and of
    an animation the first frame is taken.

    Raises:
        OSError: the file is missing, truncated or no picture.
    """
    with Image.open(path) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened)
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype("uint8"))
        elif image.mode == "F":
            raise OSError("floating-point picture: its range of values is unknown")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def read_entries(root: Path, exclude: str | None) -> Iterator[tuple[str, list[str]]]:
    """Yields (image name, captions) from a table, or from the sidecar ``.txt`` files of a folder."""
    if root.suffix == ".jsonl":
        for line in root.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield _row(json.loads(line), root)
    elif root.suffix == ".csv":
        with root.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield _row(row, root)
    else:
        pattern = re.compile(exclude) if exclude else None
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.suffix.lower() in SUFFIXES and not (pattern and pattern.search(name)):
                sidecar = path.with_suffix(".txt")
                text = sidecar.read_text("utf-8", errors="replace") if sidecar.is_file() else ""
                yield name, text.strip().splitlines()[:1]


def _row(row: dict[str, Any], table: Path) -> tuple[str, list[str]]:
    captions = row.get("captions") or row.get("caption")
    if "image" not in row or ("captions" not in row and "caption" not in row):
        raise ValueError(f"{table}: each row needs `image` and `caption` or `captions`, found {row}.")
    return row["image"], [captions] if isinstance(captions, str) else list(captions or [])


class EntrySet:
    """Map-style records over checked entries."""

    def __init__(self, folder: Path, entries: list[Entry]) -> None:
        self.folder = folder
        self.entries = entries
        self.lengths = [sum(map(len, entry.captions)) for entry in entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Record:
        entry = self.entries[index]
        return Record(entry.name, open_image(self.folder / entry.name), self.captions(index))

    def captions(self, index: int) -> list[str]:
        return list(self.entries[index].captions)


class ImageFolder(CaptionData):
    """A folder of images with sidecar ``.txt`` captions, or a ``.jsonl``/``.csv`` table.

    In a sidecar the first line is the caption; other lines are ignored. A table has the columns
    ``image`` (path relative to the table) and ``caption`` or ``captions`` (JSONL only: a list).

    Every record is decoded once before training; the verdict is cached by name, size and time. Bad ones
    (missing, undecodable, no caption) are skipped, counted and named; too many of them stop the run.

    Args:
        root: The folder or the table.
        exclude: Regular expression on the path relative to `root`; images that match are left out.
        val_share: Share of the images held out, chosen by a hash of the file name: adding images never
            moves another image from one side to the other.
    """

    def __init__(
        self,
        root: str,
        exclude: str | None = None,
        val_share: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.exclude = exclude
        self.val_share = val_share
        self.save_hyperparameters()

    @property
    def folder(self) -> Path:
        return self.root.parent if self.root.suffix in TABLES else self.root

    def prepare_data(self) -> None:
        self._checked()  # Once per machine; the other processes read the cached verdicts.

    def datasets(self) -> tuple[RecordSet, RecordSet]:
        entries = self._checked()
        held_out = [hash_share(entry.name) < self.val_share for entry in entries]
        return (
            EntrySet(self.folder, [e for e, out in zip(entries, held_out, strict=True) if not out]),
            EntrySet(self.folder, [e for e, out in zip(entries, held_out, strict=True) if out]),
        )

    def _checked(self) -> list[Entry]:
        """The good entries.

        Raises:
            FileNotFoundError: `root` does not exist.
            ValueError: it holds no images, or more bad ones than `max_bad_share`.
        """
        if not self.root.exists():
            raise FileNotFoundError(f"data.root: there is no '{self.root}'. Give a folder or a table.")
        rows = list(read_entries(self.root, self.exclude))
        if not rows:
            raise ValueError(
                f"data.root: no image in '{self.root}'. Known: {', '.join(sorted(SUFFIXES))}"
                + (f"; data.exclude is {self.exclude!r}." if self.exclude else ".")
            )
        reasons = self._verdicts([name for name, _ in rows])
        bad = {
            name: reasons[name] or "no caption"
            for name, captions in rows
            if reasons[name] or not any(caption.strip() for caption in captions)
        }
        if bad:
            listing = "\n  ".join(f"{name}: {reason}" for name, reason in bad.items())
            message = f"{len(bad)} of {len(rows)} records in '{self.root}' are bad:\n  {listing}"
            if len(bad) > self.max_bad_share * len(rows):
                raise ValueError(
                    f"{message}\nThat is more than data.max_bad_share={self.max_bad_share:g}: mend or "
                    "remove them, or raise the share."
                )
            rank_zero_warn(f"Skipped: {message}")
        return [
            Entry(name, tuple(caption.strip() for caption in captions if caption.strip()))
            for name, captions in rows
            if name not in bad
        ]

    def _verdicts(self, names: list[str]) -> dict[str, str]:
        """Decodes every image that has not been decoded before; '' is good, anything else the reason."""
        key = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:16]
        ledger = cache_dir() / "image_folders" / f"{key}.json"
        known: dict[str, str] = json.loads(ledger.read_text()) if ledger.is_file() else {}
        stamps = {name: _stamp(self.folder / name) for name in names}
        new = [name for name in names if stamps[name] not in known]
        if new:
            with ThreadPoolExecutor() as pool:
                reasons = pool.map(lambda name: _reason(self.folder / name), new)
                bar = tqdm(
                    zip(new, reasons, strict=True), "Checking images", len(new), disable=len(new) < 100
                )
                known |= {stamps[name]: reason for name, reason in bar}
            ledger.parent.mkdir(parents=True, exist_ok=True)
            scratch = ledger.with_suffix(f".{hashlib.sha256(str(new).encode()).hexdigest()[:8]}")
            scratch.write_text(json.dumps(known))
            scratch.replace(ledger)
        return {name: known[stamps[name]] for name in names}


def hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the file name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def _stamp(path: Path) -> str:
    stat = path.stat() if path.is_file() else None
    return f"{path.name}/{stat.st_size}/{stat.st_mtime_ns}/{path}" if stat else f"missing/{path}"


def _reason(path: Path) -> str:
    try:
        open_image(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "missing" if isinstance(error, FileNotFoundError) else f"{error}" or type(error).__name__
    return ""
