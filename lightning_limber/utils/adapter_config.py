"""The adapter in configs and flags of older versions: a ``kind`` where today a class path stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

ADAPTERS = "lightning_limber.models.adapters"
KINDS = {"linear": "Linear", "mlp": "MLP", "pixel_shuffle": "PixelShuffle"}
NAMES = (*KINDS.values(), "Resampler", "Vocabulary")
"""Classes that need no import path."""
SHARED = ("input_norm", "dropout")
"""Settings that every kind had and used."""
FLAG, CONFIG = "--model.adapter", ("--config", "-c")


def upgrade_adapter(settings: dict[str, Any]) -> dict[str, Any]:
    """Turns ``{kind, input_norm, dropout, shuffle}`` into ``{class_path, init_args}``; others stay.

    Raises:
        ValueError: the kind is unknown.
    """
    if "kind" not in settings:
        return settings
    kind, init_args = settings["kind"], {key: value for key, value in settings.items() if key != "kind"}
    if kind not in KINDS:
        raise ValueError(f"model.adapter.kind={kind!r}: known are {', '.join(KINDS)}.")
    if kind != "pixel_shuffle":
        init_args.pop("shuffle", None)
    return {"class_path": f"{ADAPTERS}.{KINDS[kind]}", "init_args": init_args}


def upgrade_config(config: dict[str, Any], below: dict[str, Any] | None = None) -> dict[str, Any]:
    """Upgrades the adapter in a config.

    Args:
        config: The whole config; without a ``kind`` it comes back as it is.
        below: Settings of the layers below it, which a kind takes over.
    """
    model = config.get("model") if isinstance(config, dict) else None
    adapter = model.get("adapter") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(adapter, dict) or "kind" not in adapter:
        return config
    return {**config, "model": {**model, "adapter": upgrade_adapter({**(below or {}), **adapter})}}


def upgrade_args(args: list[str]) -> list[str]:
    """Upgrades the adapter in a command's flags and config files, whose order is that of the layers.

    A kind keeps the shared settings of the layers below it, as it always did; a class drops them.

    Raises:
        ValueError: a kind, or a name without a dot, is unknown.
    """
    path, made = f"{ADAPTERS}.Linear", []
    settings: dict[str, Any] = {}
    for option, value in _options(args):
        below = {name: settings[name] for name in SHARED if name in settings}
        adapter: Any = None
        if option in CONFIG:
            config = yaml.safe_load(Path(value).read_text(encoding="utf-8") if _is_file(value) else value)
            today = upgrade_config(config, below)
            if today is not config:
                value = yaml.safe_dump(today, sort_keys=False, allow_unicode=True)
            adapter = _get(_get(today, "model"), "adapter")
        elif option == f"{FLAG}.kind" and path.startswith(ADAPTERS):
            adapter = upgrade_adapter({**below, "kind": value})
            option, value = FLAG, json.dumps(adapter)
        elif option == FLAG:
            adapter = yaml.safe_load(value)
        elif value:
            adapter = {option.removeprefix(f"{FLAG}."): value}
        if isinstance(adapter, str):
            adapter = {"class_path": adapter}
        if isinstance(adapter, dict):
            replaced = _full_path(adapter.get("class_path", path))
            settings = {**(settings if replaced == path else {}), **adapter.get("init_args", adapter)}
            path = replaced
        made.append(f"{option}={value}" if value else option)
    return made


def _options(args: list[str]) -> Iterator[tuple[str, str]]:
    """Config files and the adapter's options with their values; other arguments as they are."""
    rest = iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option in CONFIG or option == FLAG or option.startswith(f"{FLAG}."):
            yield option, value if equals else next(rest, "")
        else:
            yield arg, ""


def _full_path(name: str) -> str:
    if "." in name:
        return name
    if name not in NAMES:
        near = get_close_matches(name, NAMES, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(
            f"model.adapter is {name}: it must be {', '.join(NAMES)} or the import path of a "
            f"subclass of Adapter, such as my_adapters.Resampler.{hint}"
        )
    return f"{ADAPTERS}.{name}"


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _is_file(name: str) -> bool:
    return "\n" not in name and Path(name).is_file()
