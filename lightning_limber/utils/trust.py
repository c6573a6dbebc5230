"""Which code a file may name: a checkpoint or an export is data, and chooses no code by itself."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from pathlib import Path

PACKAGE = "lightning_limber."


def trusted_class(class_path: str, source: str | Path, key: str, named: Collection[str] = ()) -> type:
    """Imports the class that a file from elsewhere names.

    Args:
        class_path: Its import path.
        source: The file, for the message.
        key: The setting, for the message.
        named: Import paths that the user's own command names.

    Raises:
        ValueError: the class is neither this package's nor in `named`, or does not exist.
    """
    if not class_path.startswith(PACKAGE) and class_path not in named:
        raise ValueError(
            f"{source}: {key} is {class_path}, a class outside lightning_limber, and importing it runs its "
            f"code. If you trust it, name it in this command: --{key} {class_path}"
        )
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{source}: {key} is {class_path}, which does not exist: {error}") from error
    if not isinstance(found, type):
        raise ValueError(f"{source}: {key} is {class_path}, which is no class.")
    return found
