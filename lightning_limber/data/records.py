"""What a data set yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


Template = str | list[dict[str, str]]


Turns = list[tuple[str, str]]


"""(user, assistant) pairs, in order."""


@dataclass
class Record:
    """One image with what is known about it, as a data set yields it."""

    id: str
    image: Image | None
    """None: a record of text alone (training only)."""
    captions: list[str]
    scene: dict[str, Any] | None = None
    """Ground truth of a drawn scene: objects, boxes, attributes, relations, background."""
    turns: Turns | None = None
    """The conversation about the image; its answers are the captions then."""
