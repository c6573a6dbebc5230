"""Where derived files are kept: ``$LIGHTNING_LIMBER_CACHE``, or ``~/.cache/lightning_limber``."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where converted models and other derived files live."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning_limber"
    return Path(os.environ.get("LIGHTNING_LIMBER_CACHE", default)).expanduser()
