"""Which files make the config of a command: shipped ones by name from anywhere, and those of exports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning_limber.models.adapter_weights import EXPORTED


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


def split_exports(args: list[str]) -> tuple[list[str], list[Path]]:
    """Takes the configs of exported adapters out: they come with weights from elsewhere (trust.py)."""
    taken: set[int] = set()
    exports = []
    for first, last, name in _configs(args):
        if (Path(name).parent / EXPORTED).is_file():
            taken |= {first, last}
            exports.append(Path(name))
    return [arg for i, arg in enumerate(args) if i not in taken], exports
