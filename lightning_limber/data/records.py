"""What a data set yields, and what it may raise for a record that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

Template = str | list[dict[str, str]]


Turns = list[tuple[str, str]]


"""(user, assistant) pairs, in order."""


@dataclass
class Record:
    """One image with what is known about it, as a data set yields it."""

    id: str
    image: Image.Image | None
    """None: a record of text alone (training only)."""
    captions: list[str]
    scene: dict[str, Any] | None = None
    """Ground truth of a drawn scene: objects, boxes, attributes, relations, background."""
    turns: Turns | None = None
    """The conversation about the image; its answers are the captions then."""


class UnreadableRecord(ValueError):
    """A record that cannot be used; the message says why."""


# ValueError is also cut JSON and text that is no UTF-8, SyntaxError what Pillow says of some broken PNGs.
UNREADABLE = (UnreadableRecord, OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What reading one record may raise that leaves out this record and no other: it is counted and named. Any
other exception is a fault of the program.
"""


class Skipped(NamedTuple):
    """A record that is left out of a batch."""

    place: int
    """Its index in the data set, or in a stream's epoch."""
    name: str
    reason: str


def reason(error: BaseException) -> str:
    """Why a record is left out, in one line."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:300] or type(error).__name__


def printable(name: str) -> str:
    """A name that can be written as UTF-8, also where the file system holds other bytes."""
    return name.encode("utf-8", "backslashreplace").decode()
