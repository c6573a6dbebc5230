"""Where derived files are kept: ``$LIGHTNING_LIMBER_CACHE``, or ``~/.cache/lightning_limber``.

What is kept only saves time. A damaged file is made anew, and where none can be written a run goes on
without.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_limber.utils.files import write_text


def cache_dir() -> Path:
    """Where converted models and other derived files live."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning_limber"
    return Path(os.environ.get("LIGHTNING_LIMBER_CACHE", default)).expanduser()


def read_kept(path: Path) -> str | None:
    """What `keep` wrote; None where there is nothing, or it is damaged."""
    with suppress(OSError, ValueError):
        checksum, _, text = path.read_text(encoding="utf-8").partition("\n")
        if checksum == _checksum(text):
            return text
    return None


def keep(path: Path, text: str) -> None:
    """Writes text with its checksum; where that fails, warns."""
    try:
        write_text(path, f"{_checksum(text)}\n{text}")
    except OSError as error:
        warn_once(str(cache_dir()), error.strerror)


@lru_cache
def warn_once(folder: str, reason: str | None) -> None:
    """Says, once a process, that `folder` keeps nothing."""
    rank_zero_warn(
        f"The cache {folder} cannot be written ({reason}): going on without. Make room, change its "
        "permissions, or choose another folder with LIGHTNING_LIMBER_CACHE."
    )


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
