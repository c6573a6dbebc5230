"""The adapter in configs and flags: a class path with settings, and what older versions wrote instead."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ADAPTERS = "lightning_limber.models.adapters"
KINDS = {"linear": "Linear", "mlp": "MLP", "pixel_shuffle": "PixelShuffle"}
"""The shipped adapters by the names that they had before class paths."""
FLAG, CONFIG = "--model.adapter", ("--config", "-c")


def upgrade_adapter(settings: dict[str, Any]) -> dict[str, Any]:
    """Turns ``{kind, input_norm, dropout, shuffle}`` into ``{class_path, init_args}``; that stays as it is.

    Raises:
        ValueError: the kind is unknown.
    """
    if "kind" not in settings:
        return settings
    kind, init_args = settings["kind"], {key: value for key, value in settings.items() if key != "kind"}
    if kind not in KINDS:
        raise ValueError(f"model.adapter.kind={kind!r}: known are {', '.join(KINDS)}.")
    if kind != "pixel_shuffle":
        init_args.pop("shuffle", None)  # Every kind had this setting, and one used it.
    return {"class_path": f"{ADAPTERS}.{KINDS[kind]}", "init_args": init_args}


def upgrade_config(text: str) -> str:
    """Upgrades the adapter in a config in YAML; one of today comes back unchanged."""
    adapter = adapter_in(text)
    if not isinstance(adapter, dict) or "kind" not in adapter:
        return text
    config = yaml.safe_load(text)
    config["model"]["adapter"] = upgrade_adapter(adapter)
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def adapter_in(text: str) -> Any:
    """What a config in YAML says of the adapter, None where it says nothing."""
    value = yaml.safe_load(text)
    for name in ("model", "adapter"):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def adapter_args(args: list[str]) -> list[str]:
    """Rewrites the arguments of a command that choose an adapter.

    In flags and config files, ``kind`` becomes the class that it stood for. A class that replaces another
    starts from its own defaults, not from the settings that both happen to have.

    Raises:
        ValueError: a kind, or a name without a dot, is unknown.
    """
    current, made = f"{ADAPTERS}.Linear", []
    for option, value in _options(args):
        adapter, upgraded = None, False
        if option in CONFIG:
            text = Path(value).read_text(encoding="utf-8") if _is_file(value) else value
            today = upgrade_config(text)
            adapter, upgraded = adapter_in(today), today != text
            value = today if upgraded else value
        elif option == f"{FLAG}.kind" and current.startswith(ADAPTERS):
            adapter, upgraded = upgrade_adapter({"kind": value}), True
            option, value = FLAG, json.dumps(adapter)
        elif option == FLAG:
            adapter = yaml.safe_load(value)
        named = _class_path(adapter)
        # What replaced a kind kept the settings that it shares.
        if named not in (None, current) and not upgraded:
            made.append(f"{FLAG}={ADAPTERS}.base._Unset")
        current = named or current
        made.append(f"{option}={value}" if value else option)
    return made


def _options(args: list[str]) -> Iterator[tuple[str, str]]:
    """The options that may choose an adapter, each with its value; other arguments as they are."""
    rest = iter(args)
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option not in (*CONFIG, FLAG, f"{FLAG}.kind"):
            yield arg, ""
        else:
            yield option, value if equals else next(rest, "")


def _class_path(adapter: Any) -> str | None:
    named = adapter.get("class_path") if isinstance(adapter, dict) else adapter
    if not isinstance(named, str) or "." in named:
        return named if isinstance(named, str) else None
    if named not in KINDS.values():
        raise ValueError(
            f"model.adapter is {named}: it must be {', '.join(KINDS.values())} or the import path of a "
            "subclass of Adapter, such as my_adapters.Resampler."
        )
    return f"{ADAPTERS}.{named}"


def _is_file(name: str) -> bool:
    return "\n" not in name and Path(name).is_file()
