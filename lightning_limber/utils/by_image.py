"""``images_epoch_{n}.npz``: what a run measured on each held-out image, to pair runs over images.

One file an epoch, which validation, captions and probe each add their arrays to. An array's name is its
part of the run and the metric, ``held_out/loss`` or ``probe/l0``; ``{part}/names`` [I] are the names of the
part's images. A metric [I, 2] is the first column's sum over images divided by the second's.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lightning_limber.utils.files import write_whole

DAMAGED = (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What reading an archive that is cut or changed raises."""


def images_file(folder: Path, epoch: int, testing: bool = False) -> Path:
    """Where a run keeps an epoch's sums by image; what `test` finds has a file of its own."""
    return folder / f"{'test_' * testing}images_epoch_{epoch}.npz"


def add_arrays(path: Path, part: str, arrays: Mapping[str, Any]) -> None:
    """Puts a part's arrays into the file in place of those that it had; the file is whole at any time."""
    kept: dict[str, Any] = {}
    if path.is_file():
        # Of a damaged one, which may be measured again, nothing is kept.
        with suppress(*DAMAGED), np.load(path) as found:
            kept = {name: found[name] for name in found.files if not name.startswith(f"{part}/")}
    added = {f"{part}/{name}": array for name, array in arrays.items()}
    write_whole(path, lambda aside: np.savez_compressed(aside, **kept, **added))
