"""What cannot be used of a source that is read at the start: counted, named, and too much of it refused."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_limber.data.records import printable, reason

SHOWN = 20
"""So many are listed by name."""


class LeftOut:
    """Records, and single captions of records that have others, which are left out of one source.

    Args:
        source: The file or folder.
        max_bad_share: See `CaptionData`.
    """

    def __init__(self, source: Path, max_bad_share: float) -> None:
        self.source = source
        self.max_bad_share = max_bad_share
        self.records: list[str] = []
        self.captions: list[str] = []

    def record(self, name: str, why: str | BaseException) -> None:
        self.records.append(f"{printable(name)}: {why if isinstance(why, str) else reason(why)}")

    def caption(self, name: str, why: str) -> None:
        self.captions.append(f"{printable(name)}: {why}")

    def check(self, total: int, expected: str) -> None:
        """Says what is left out.

        Args:
            total: Number of records of the source, with those that are left out.
            expected: What a usable source looks like.

        Raises:
            ValueError: nothing is left, or more is left out than the share allows.
        """
        bad = len(self.records)
        message = f"{bad} of {total} records in '{self.source}' are bad:\n  {listing(self.records)}"
        if bad > self.max_bad_share * total:
            usable = f"\nExpected: {expected}" if bad == total else ""
            raise ValueError(
                f"{message}{usable}\nThat is more than data.max_bad_share={self.max_bad_share:g}: mend or "
                "remove them, or raise the share."
            )
        if bad == total:
            raise ValueError(f"'{self.source}' has no record that can be used. Expected: {expected}")
        if bad:
            rank_zero_warn(f"Skipped: {message}")
        if self.captions:
            rank_zero_warn(
                f"Skipped: {len(self.captions)} captions of records that have others, in '{self.source}':"
                f"\n  {listing(self.captions)}"
            )


def listing(lines: list[str]) -> str:
    """The first lines, and how many more there are."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([*lines[:SHOWN], *more])
