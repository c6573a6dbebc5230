"""Files that are there whole or not at all, whatever ends the process or fills the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

LEFT_SECONDS = 600
"""A part that nobody has written to for so long was left by a process that was killed."""


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Puts a new file in the place of `path` once it is written and on the disk.

    Args:
        path: The file; its folder is made.
        write: Writes the path that it is given, which lies beside `path` and has its ending.

    Raises:
        OSError: the disk is full or may not be written; it names `path`, which is as before.
    """
    path = Path(path)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".part-*-{path.name}"):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink(missing_ok=True)
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` of text in UTF-8."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def append_text(path: Path, lines: str) -> None:
    """Adds whole lines to a file, or none of them.

    Raises:
        OSError: the disk is full or may not be written; it names `path`.
    """
    size = path.stat().st_size
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        if path.is_file():  # Not /dev/stdout.
            os.truncate(path, size)
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_as(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a file of a run.

    Raises:
        OSError: there is none, or it may not be read.
        ValueError: it is damaged.
    """
    try:
        return read(path)
    except OSError:
        raise
    except Exception as error:  # Of whatever library reads it.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{path} is damaged ({reason}). Put a whole one in its place, or take it away: a report leaves "
            "out what is not there."
        ) from error


def new_folder(parent: Path) -> str:
    """Makes ``version_N`` in `parent`, the next one that nobody has."""
    taken = [int(path.name[8:]) for path in parent.glob("version_*") if path.name[8:].isdecimal()]
    for number in count(max(taken, default=-1) + 1):
        folder = parent / f"version_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return str(folder)
    raise AssertionError


CHECKSUMS = "checksums.json"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_checksums(folder: Path, pattern: str = "*") -> None:
    """Writes down what the files are that this project has put into a folder."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.name != CHECKSUMS)
    write_text(folder / CHECKSUMS, json.dumps({path.name: sha256(path) for path in files}, indent=1))


def damaged_file(folder: Path) -> str:
    """The first file of a folder that is not as `write_checksums` found it, '' if there is none."""
    path = folder / CHECKSUMS
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError:
        return CHECKSUMS
    files = (name for name, digest in known.items() if not _is(folder / name, digest))
    return next(files, "")


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


REMEDIES = {
    errno.ENOSPC: "Make room, or choose a folder on another disk.",
    errno.EDQUOT: "Make room, or choose a folder on another disk.",
    errno.EFBIG: "Raise the limit on a file's size (ulimit -f), or choose a folder on another disk.",
    errno.EIO: "The disk fails: choose a folder on another one.",
    errno.EACCES: "Choose a place that you may use, or change its permissions.",
    errno.EPERM: "Choose a place that you may use, or change its permissions.",
    errno.EROFS: "Choose a place that may be written.",
    errno.ENOTDIR: "A file is where a folder is needed: move it, or choose another path.",
    errno.EEXIST: "A file is where a folder is needed: move it, or choose another path.",
    errno.EISDIR: "A folder is where a file is needed: choose another path.",
    errno.ENOENT: "Check the path.",
}


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def in_words(error: BaseException) -> str:
    """An error as it is shown: of the operating system's the path first, and what to do."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}. {REMEDIES.get(error.errno or 0, '')}".rstrip()
    return str(error)


def on_thread_error(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer, a thread, hands a full disk on to the main one, where it is said in a line."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)
