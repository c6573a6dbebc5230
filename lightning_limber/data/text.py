"""Captions as files hold them: their encoding, and what is no caption."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from lightning_limber.data.records import UnreadableRecord

UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""How a file in UTF-16 begins."""


def decode(content: bytes) -> str:
    """Text in UTF-8, with a byte order mark or without.

    Raises:
        UnreadableRecord: it is in another encoding.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = "UTF-16" if content.startswith(UTF16) else f"byte 0x{content[error.start]:02x}"
        raise UnreadableRecord(f"its text is not UTF-8 but {found}") from error


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UnreadableRecord: it is cut, broken, or a list, number or anything else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableRecord(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnreadableRecord(f"a JSON object is expected, found {type(value).__name__}")
    return value


def clean(value: Any, what: str = "caption") -> str:
    """A caption, with each run of white space as one space.

    Raises:
        UnreadableRecord: it is no text, or nothing of it can be seen, or it holds what no text does.
    """
    text = " ".join(_checked(value, what).split())
    if not is_visible(text):
        raise UnreadableRecord(f"no {what}")
    return text


def _checked(value: Any, what: str) -> str:
    if value is None:
        raise UnreadableRecord(f"no {what}")
    if not isinstance(value, str):
        raise UnreadableRecord(f"its {what} is {type(value).__name__}, not text")
    if "\0" in value:
        raise UnreadableRecord(f"its {what} has NUL characters (is it UTF-16?)")
    if not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise UnreadableRecord(f"its {what} is not UTF-8")
    return value


def clean_turn(value: Any, what: str) -> str:
    """A turn of a conversation, whose lines stay; an empty one is returned as such.

    Raises:
        UnreadableRecord: it is no text.
    """
    text = _checked(value, what).strip()
    return text if is_visible(text) else ""


def is_visible(text: str) -> bool:
    """Whether a text has more than white space and characters without width."""
    if text.isascii():
        return bool(text) and not text.isspace()
    return any(not sign.isspace() and unicodedata.category(sign) not in ("Cc", "Cf") for sign in text)


def sort_captions(value: Any) -> tuple[list[str], list[str]]:
    """The usable captions of a record, given as a text or a list of them, and why the others are not."""
    captions, reasons = [], []
    for one in value if isinstance(value, (list, tuple)) else [value]:
        try:
            captions.append(clean(one))
        except UnreadableRecord as error:
            reasons.append(str(error))
    return captions, reasons


def usable_captions(value: Any) -> list[str]:
    """The captions of a record that are usable.

    Raises:
        UnreadableRecord: none is.
    """
    captions, reasons = sort_captions(value)
    if not captions:
        raise UnreadableRecord(reasons[0] if reasons else "no caption")
    return captions
