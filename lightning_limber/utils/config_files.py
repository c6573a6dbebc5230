"""Which files make the config of a command.

Layers, later ones win: configs/base.yaml (always), the experiment (configs/default.yaml, or the first
``--config`` that names its data), further ``--config`` files, flags.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from lightning_limber.utils.checkpoints import EXPORTED


def config_dir() -> Path:
    """The shipped configs: inside the installed package, or at the top of a clone."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _configs(args: list[str]) -> Iterator[tuple[int, int, str]]:
    """Each ``--config``: the places of its first and last argument, and the file."""
    for i, arg in enumerate(args):
        if arg.startswith("--config="):
            yield i, i, arg.removeprefix("--config=")
        elif i and args[i - 1] in ("--config", "-c"):
            yield i - 1, i, arg


def find_configs(args: list[str]) -> list[str]:
    """Lets ``--config configs/stamps.yaml`` name a shipped config from any working directory."""
    found = list(args)
    for first, last, name in _configs(args):
        shipped = config_dir() / name.removeprefix("configs/")
        if not Path(name).exists() and shipped.is_file():
            found[last] = str(shipped) if first < last else f"--config={shipped}"
    return found


def default_experiment(args: list[str]) -> list[str]:
    """The flags of configs/default.yaml; none where a config names its data: an experiment of its own."""
    for _, _, name in _configs(args):
        try:
            text = Path(name).read_text(encoding="utf-8") if Path(name).is_file() else name
            config = yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError):
            continue  # The parser says what is wrong with it.
        data = config.get("data") if isinstance(config, dict) else None
        if isinstance(data, str) or (isinstance(data, dict) and "class_path" in data):
            return []
    return ["--config", str(config_dir() / "default.yaml")]


def split_exports(args: list[str]) -> tuple[list[str], list[Path]]:
    """Takes the configs of exported adapters out: they come with weights from elsewhere (trust.py)."""
    taken: set[int] = set()
    exports = []
    for first, last, name in _configs(args):
        if (Path(name).parent / EXPORTED).is_file():
            taken |= {first, last}
            exports.append(Path(name))
    return [arg for i, arg in enumerate(args) if i not in taken], exports
