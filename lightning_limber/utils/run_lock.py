"""One process writes to a run's folder at a time; those that it starts for its devices belong to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_only

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held: dict[Path, IO[Any]] = {}


@rank_zero_only
def hold_run(folder: Path, name: str = LOCK) -> None:
    """Takes the run for this process until `release_run` or its end.

    A lock of `lockf`, unlike one of `flock`, is not kept alive by loader processes that outlive a kill.

    Args:
        folder: The run's.
        name: Of the lock, where a run has several.

    Raises:
        ValueError: another process has it.
    """
    path = folder.resolve() / name
    if fcntl is None or path in _held or os.environ.get("NODE_RANK", "0") != "0":
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(
            f"{folder} is written by another process ({file.read() or 'unknown'}): wait for its end or "
            "stop it, or start a run of another name or version."
        ) from error
    except OSError:  # A file system without locks.
        return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _held[path] = file


def release_run(folder: Path, name: str = LOCK) -> None:
    """Lets others have the run."""
    if file := _held.pop(folder.resolve() / name, None):
        file.close()
