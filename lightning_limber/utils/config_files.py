"""Which files make the config of a command.

Layers, later ones win: configs/base.yaml (always), the experiment (configs/default.yaml, or the first
``--config`` that names its data), further ``--config`` files, flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lightning_limber.utils.checkpoints import EXPORTED

SECTIONS = ("trainer", "model", "probe", "captions", "checkpoint")
"""Groups of settings."""


def config_dir() -> Path:
    """The shipped configs: inside the installed package, or at the top of a clone."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def default_logger() -> Namespace:
    """What ``trainer.logger: true`` stands for: the logger of configs/base.yaml."""
    logger = _read(str(config_dir() / "base.yaml"))["trainer"]["logger"]
    return Namespace(logger | {"init_args": Namespace(logger["init_args"])})


def _configs(args: list[str]) -> Iterator[tuple[int, int, str]]:
    """Each ``--config``: the places of its first and last argument, and the file."""
    for i, arg in enumerate(args):
        if arg.startswith("--config="):
            yield i, i, arg.removeprefix("--config=")
        elif i and args[i - 1] in ("--config", "-c") and not arg.startswith("--"):
            yield i - 1, i, arg


def _read(name: str) -> dict[str, Any]:
    """The settings of a config file, or of YAML given in its place.

    Raises:
        ValueError: it is no YAML, or no mapping.
    """
    is_file = Path(name).is_file()
    where = name if is_file else "--config"
    try:
        config = yaml.safe_load(Path(name).read_text(encoding="utf-8") if is_file else name)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: no config, but a file that is not text (byte {error.start})."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(
            f"{where}{line}: no valid YAML: {problem}. Check brackets and indentation."
        ) from error
    if not isinstance(config, dict):
        found = "is empty" if config is None else f"holds a {type(config).__name__}"
        raise ValueError(f"{where} {found}. A config is a mapping, such as 'model: {{llm: gpt2}}'.")
    for name in SECTIONS:
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(
                f"{where}: {name}: {config[name]!r} is given, wanted is a mapping of settings."
            )
    return config


def find_configs(args: list[str]) -> list[str]:
    """Lets ``--config configs/stamps.yaml`` name a shipped config from any working directory.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: see `_read`.
    """
    found = list(args)
    for first, last, name in _configs(args):
        shipped = config_dir() / name.removeprefix("configs/")
        if not Path(name).exists() and shipped.is_file():
            found[last] = str(shipped) if first < last else f"--config={shipped}"
            name = str(shipped)
        if Path(name).is_dir():
            raise FileNotFoundError(
                f"--config {name}: this is a folder. Give a YAML file, such as one in it."
            )
        if not Path(name).is_file() and not re.search(r":|\n", name):
            shipped_names = [
                f"configs/{path.relative_to(config_dir())}" for path in config_dir().rglob("*.yaml")
            ]
            by_name = {Path(path).name: path for path in map(str, Path(name).parent.glob("*.yaml"))}
            # Of one name, the one that is least deep.
            shallow_last = sorted(shipped_names, key=lambda path: -path.count("/"))
            by_name |= {Path(path).name: path for path in shallow_last}
            near = get_close_matches(Path(name).name, by_name, 1)
            hint = (
                f"Did you mean '{by_name[near[0]]}'?"
                if near
                else f"Shipped are: {', '.join(shipped_names)}."
            )
            raise FileNotFoundError(f"--config {name}: there is no such file. {hint}")
        _read(name)
    return found


def default_experiment(args: list[str]) -> list[str]:
    """The flags of configs/default.yaml; none where a config names its data: an experiment of its own."""
    for _, _, name in _configs(args):
        data = _read(name).get("data")
        if isinstance(data, str) or (isinstance(data, dict) and "class_path" in data):
            return []
    return ["--config", str(config_dir() / "default.yaml")]


def config_with(key: str, args: list[str]) -> str | None:
    """The last ``--config`` that sets `key` (``model.vision``) or what is in it; None if a flag does."""
    if any(arg.partition("=")[0].removeprefix("--").startswith(key) for arg in args if arg[:2] == "--"):
        return None
    for _, _, name in reversed(list(_configs(args))):
        found: Any = _read(name)
        for part in key.split("."):
            found = found if isinstance(found, dict) else {}
            found = found.get(part, (found.get("init_args") or {}).get(part))
        if found is not None:
            return name if Path(name).is_file() else None
    return None


def split_exports(args: list[str]) -> tuple[list[str], list[Path]]:
    """Takes the configs of exported adapters out: they come with weights from elsewhere (trust.py)."""
    taken: set[int] = set()
    exports = []
    for first, last, name in _configs(args):
        if (Path(name).parent / EXPORTED).is_file():
            taken |= {first, last}
            exports.append(Path(name))
    return [arg for i, arg in enumerate(args) if i not in taken], exports
