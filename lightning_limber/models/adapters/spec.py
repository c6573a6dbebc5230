"""An adapter as plain values, ``{class_path, init_args}``: what configs, checkpoints and exports store."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_limber.models.adapters.base import Adapter
from lightning_limber.utils.adapter_config import upgrade_adapter
from lightning_limber.utils.trust import trusted_class


def adapter_spec(adapter: Callable[..., Adapter]) -> dict[str, Any]:
    """Describes an adapter class, or a `partial` of one with settings.

    Raises:
        ValueError: a setting is no plain value, so that no checkpoint could store it.
    """
    parts = (adapter.func, *adapter.args) if isinstance(adapter, partial) else (adapter,)
    # The config parser's partial has a function before the class.
    classes = [part for part in parts if isinstance(part, type) and issubclass(part, Adapter)]
    if not classes:
        raise ValueError(f"model.adapter must be a subclass of Adapter or a partial of one, not {adapter}.")
    found = classes[0]
    settings = dict(adapter.keywords) if isinstance(adapter, partial) else {}
    try:
        json.dumps(settings)
    except TypeError as error:
        raise ValueError(
            f"model.adapter {found.__name__}: settings must be plain values (numbers, text, lists, dicts), "
            f"but they are {settings}."
        ) from error
    module = found.__module__
    package = module.rpartition(".")[0]  # Where the class is exported, as the config parser writes it.
    if getattr(sys.modules.get(package), found.__name__, None) is found:
        module = package
    return {"class_path": f"{module}.{found.__qualname__}", "init_args": settings}


def adapter_from_spec(spec: dict[str, Any]) -> Callable[[int, int], Adapter]:
    """The inverse of `adapter_spec`; classes of other packages must have been imported.

    Raises:
        ValueError: it is a class of another package that was not, see `trusted_class`.
    """
    spec = upgrade_adapter(spec)
    path = spec["class_path"]
    imported = [path] if path.rpartition(".")[0] in sys.modules else []
    found = trusted_class(path, "this adapter", "model.adapter", imported)
    return partial(found, **spec.get("init_args", {}))
