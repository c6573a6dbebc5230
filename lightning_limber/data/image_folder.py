"""Your own pictures: a folder of images with captions beside them, or a table of image and captions."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from lightning_limber.data.datamodule import CaptionData
from lightning_limber.data.fingerprint import Content, file_stamps
from lightning_limber.data.left_out import LeftOut
from lightning_limber.data.loader import RecordSet
from lightning_limber.data.records import UNREADABLE, Record, UnreadableRecord, printable, reason
from lightning_limber.data.tables import EXPECTED, TABLES, Said, read_table
from lightning_limber.data.text import decode, sort_captions
from lightning_limber.utils.cache import cache_dir, keep, read_kept

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


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
        UnreadableRecord: Pillow raises anything else over what it holds.
    """
    try:
        with Image.open(path) as opened:
            return _as_rgb(opened)
    except (OSError, MemoryError):
        raise
    # Over what a file holds Pillow's decoders also raise SyntaxError, struct.error, zlib.error and others.
    except Exception as error:
        raise UnreadableRecord(reason(error)) from error


def _as_rgb(opened: Image.Image) -> Image.Image:
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


def find_pictures(root: Path) -> list[Path]:
    """The pictures in a folder and below, in order; a folder that cannot be listed stands for its own.

    Links to folders are followed, and each folder is read once: under its own name, if it lies in `root`.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            stat = folder.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            found.append(folder)
            continue
        for entry in entries:
            path = Path(entry.path)
            # A link is asked through its path, which takes links in a circle for no folder.
            link = entry.is_symlink()
            if path.is_dir() if link else entry.is_dir():
                (links if link else folders).append(path)
            elif path.suffix.lower() in SUFFIXES:
                found.append(path)
    return sorted(found)


def read_entries(root: Path, exclude: str | None) -> Iterator[Said]:
    """Yields each image of a folder with the caption of its sidecar ``.txt``, or each row of a table."""
    if not root.is_dir():
        yield from read_table(root)
        return
    try:
        pattern = re.compile(exclude) if exclude else None
    except re.error as error:
        raise ValueError(f"data.exclude={exclude!r} is no regular expression: {error}.") from error
    for path in find_pictures(root):
        name = path.relative_to(root).as_posix()
        if not (pattern and pattern.search(name)):
            yield name, _sidecar(path.with_suffix(".txt"))


def _sidecar(path: Path) -> Any:
    """The first line of a sidecar; what makes it unreadable; or None without one."""
    try:
        text = decode(path.read_bytes()) if path.is_file() else ""
    except UNREADABLE as error:
        return UnreadableRecord(reason(error))
    return text.strip().replace("\r", "\n").split("\n")[0]


class EntrySet:
    """Map-style records over checked entries."""

    def __init__(self, folder: Path, entries: list[Entry]) -> None:
        self.folder = folder
        self.entries = entries
        self.lengths = [sum(map(len, entry.captions)) for entry in entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Record:
        image = open_image(self.folder / self.entries[index].name)
        return Record(self.name(index), image, self.captions(index))

    def name(self, index: int) -> str:
        return printable(self.entries[index].name)

    def captions(self, index: int) -> list[str]:
        return list(self.entries[index].captions)

    def contents(self, times: bool) -> Iterator[Content]:
        stamps = file_stamps([self.folder / entry.name for entry in self.entries], times)
        for index, stamp in enumerate(stamps):
            yield Content(self.name(index), self.captions(index), stamp)


class ImageFolder(CaptionData):
    """A folder of images with sidecar ``.txt`` captions, or a table of images and captions.

    In a sidecar the first line is the caption; other lines are ignored. Folders below and links to folders
    are read too. A table is ``.jsonl`` or ``.csv`` and has the columns ``image`` (a path relative to
    `images`) and ``caption`` or ``captions`` (JSONL: also a list), or it is Flickr8k's ``captions.txt`` or
    Flickr30k's ``results.csv`` as published. All rows of one image are one record.

    Every record is decoded once before training; the verdict is cached by name, size and time. Bad ones
    (missing, undecodable, no caption, no UTF-8) are skipped, counted and named; too many of them stop the
    run.

    Args:
        root: The folder or the table.
        exclude: Regular expression on the path relative to `root`; images that match are left out.
        images: Folder that the paths in a table are relative to; null is the table's own.
        val_share: Share of the images held out, chosen by a hash of the file name: adding images never
            moves another image from one side to the other.
    """

    def __init__(
        self,
        root: str,
        exclude: str | None = None,
        images: str | None = None,
        val_share: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.exclude = exclude
        self.images = images
        self.val_share = val_share
        self.save_hyperparameters()

    @property
    def folder(self) -> Path:
        if self.images is not None:
            return Path(self.images).expanduser()
        return self.root if self.root.is_dir() else self.root.parent

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
        if not self.root.exists() or not (self.root.is_dir() or self.root.suffix in TABLES):
            problem = f"'{self.root}' is neither" if self.root.exists() else f"there is no '{self.root}'"
            raise FileNotFoundError(
                f"data.root: {problem}. Give a folder or a table ({', '.join(sorted(TABLES))})."
            )
        found: dict[str, tuple[list[str], list[str]]] = {}
        for name, said in read_entries(self.root, self.exclude):
            captions, reasons = found.setdefault(name, ([], []))
            good, bad = ([], [str(said)]) if isinstance(said, UnreadableRecord) else sort_captions(said)
            captions += good
            reasons += bad
        if not found:
            raise ValueError(
                f"data.root: no image in '{self.root}'. Known: {', '.join(sorted(SUFFIXES))}"
                + (f"; data.exclude is {self.exclude!r}." if self.exclude else ".")
            )
        verdicts = self._verdicts([name for name, (captions, _) in found.items() if captions])
        left_out = LeftOut(self.root, self.max_bad_share)
        entries = []
        for name, (captions, reasons) in found.items():
            if why := verdicts.get(name, reasons[0] if reasons else "no caption"):
                left_out.record(name, why)
                continue
            entries.append(Entry(name, tuple(captions)))
            for why in reasons:
                left_out.caption(name, why)
        beside = "pictures, each with a caption in UTF-8 in a .txt file of its name beside it"
        left_out.check(len(found), beside if self.root.is_dir() else EXPECTED)
        return entries

    def _verdicts(self, names: list[str]) -> dict[str, str]:
        """Decodes every image that has not been found good before; '' is good, anything else the reason."""
        key = hashlib.sha256(str(self.root.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
        ledger = cache_dir() / "image_folders" / f"{key}.json"
        good = set(json.loads(read_kept(ledger) or "[]"))
        stamps = {name: _stamp(self.folder / name) for name in names}
        new = [name for name in names if stamps[name] not in good]
        verdicts = dict.fromkeys(names, "")
        if new:
            with ThreadPoolExecutor() as pool:
                reasons = pool.map(lambda name: _reason(self.folder / name), new)
                verdicts |= tqdm(
                    zip(new, reasons, strict=True), "Checking images", len(new), disable=len(new) < 100
                )
            # Bad ones are looked at again: a permission can change, or a disk be mounted.
            good |= {stamps[name] for name in new if not verdicts[name]}
            keep(ledger, json.dumps(sorted(good)))
        return verdicts


def hash_share(name: str) -> float:
    """A number in [0, 1) that depends on the file name alone."""
    return int(hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8], 16) / 2**32


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except (OSError, ValueError):  # ValueError: what can be no name at all.
        return f"missing/{path}"
    return f"{path.name}/{stat.st_size}/{stat.st_mtime_ns}/{path}"


def _reason(path: Path) -> str:
    try:
        open_image(path)
    except UNREADABLE as error:
        return reason(error)
    return ""
