"""What a grid's YAML file may say, and the checks of it that need no run (see grid.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

Settings = dict[str, Any]
"""By name in dotted form."""
KEYS = ("config", "set", "arms", "base", "seeds", "choose", "endpoints")
OWN = ("seed_everything", "trainer.logger", "ckpt_path", "config")
"""Settings that the grid gives its runs."""
ENDPOINT = re.compile(r"(held_out/\w+|captions/[\w/]+|probe/\w+@\d+)")


@dataclass(frozen=True)
class Choose:
    """A setting that is chosen for each arm on held-out training records."""

    setting: str
    values: list[Any]
    records: int
    set: Settings


@dataclass(frozen=True)
class Grid:
    """What a grid file says; see the head of grid.py."""

    file: Path
    config: str | None
    set: Settings
    arms: dict[str, Settings]
    base: str
    seeds: list[int]
    choose: Choose | None
    endpoints: list[str]

    @property
    def folder(self) -> Path:
        return Path("runs") / self.file.stem


def read_grid(name: str) -> Grid:
    """Reads a grid file and checks all but the settings themselves.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no grid.
    """
    from lightning_limber.utils.config_files import find_configs  # It imports torch.

    try:
        file = Path(find_configs(["--config", name])[-1])
    except FileNotFoundError as error:  # It was given without the flag.
        raise FileNotFoundError(str(error).removeprefix("--config ")) from None
    given = yaml.safe_load(file.read_text(encoding="utf-8"))

    def need(holds: bool, key: str, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{file}: {key}: {given.get(key)!r} is given, allowed is {allowed}.")

    known(file, "", given, KEYS)
    arms, seeds = given.get("arms"), given.get("seeds", [0, 1, 2])
    need(isinstance(arms, dict) and bool(arms), "arms", "a mapping of names to settings")
    arms = {str(arm): settings or {} for arm, settings in arms.items()}
    wrong = [arm for arm in arms if not re.fullmatch(r"[\w.+-]+", arm)]
    need(
        not wrong, "arms", f"letters, digits and . + - _ in a name, which {wrong} are not: folders have it"
    )
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    need(whole and 0 < len(seeds) == len({*seeds}), "seeds", "a list of whole numbers, each once")
    base = str(given.get("base", next(iter(arms))))
    need(base in arms, "base", f"one of the arms: {', '.join(arms)}")
    endpoints = given.get("endpoints", ["held_out/loss"])
    fits = isinstance(endpoints, list) and all(ENDPOINT.fullmatch(str(one)) for one in endpoints)
    form = "held_out/METRIC, captions/METRIC or probe/METRIC@LAYER"
    need(fits and bool(endpoints), "endpoints", f"a list of {form}")
    need(isinstance(given.get("config"), (str, type(None))), "config", "one config file")
    common = given.get("set") or {}
    for where, settings in {"set": common, **{f"arms.{arm}": of for arm, of in arms.items()}}.items():
        check_settings(file, where, settings)
    chosen = read_choose(file, given["choose"]) if given.get("choose") else None
    return Grid(file, given.get("config"), common, arms, base, seeds, chosen, endpoints)


def read_choose(file: Path, given: Any) -> Choose:
    if not isinstance(given, dict) or not isinstance(given.get("records"), int):
        raise ValueError(f"{file}: choose: {given!r} is given, allowed is a setting, `records` and `set`.")
    tried = {name: values for name, values in given.items() if "." in name}
    known(file, "choose: ", {name: given[name] for name in given.keys() - tried}, ("records", "set"))
    [(setting, values)] = tried.items() if len(tried) == 1 else [("", None)]
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(
            f"{file}: choose: {tried} is given, allowed is one setting with a list of values, such as "
            "'model.optimizer.lr: [0.005, 0.02]'."
        )
    check_settings(file, "choose.set", given.get("set") or {})
    return Choose(setting, [number(value) for value in values], given["records"], given.get("set") or {})


def number(value: Any) -> Any:
    """YAML takes 1e-3 for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def known(file: Path, where: str, given: Settings, names: tuple[str, ...]) -> None:
    for name in given:
        if name not in names:
            near = get_close_matches(str(name), names, 1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known are {', '.join(names)}."
            raise ValueError(f"{file}: {where}'{name}' is not known. {hint}")


def check_settings(file: Path, where: str, settings: Any) -> None:
    """Checks what can be said of settings without the command's parser."""
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file}: {where}: {settings!r} is given, allowed are settings as in 'a.b: value'."
        )
    for name in settings:
        if str(name).startswith(OWN):
            raise ValueError(
                f"{file}: {where}: '{name}' is the grid's own: each run has a seed and a folder."
            )


# -- configs of runs ----------------------------------------------------------------------------------


def without_own(text: str) -> Settings:
    """A config without what every run of a grid has of its own."""
    config = yaml.safe_load(text)
    config.pop("seed_everything", None)
    config["trainer"].pop("logger", None)
    return config


def with_newer(there: Settings, wanted: Settings, plain: Settings) -> Settings:
    """A run's config with those settings that its version did not have yet and that nobody has asked for.

    Args:
        there: The config.
        wanted: What the grid would give the run now.
        plain: What it would have without the grid's own settings.
    """
    found = dict(there)
    for name, value in wanted.items():
        if name not in there and name in plain and plain[name] == value:
            found[name] = value
        elif isinstance(value, dict) and isinstance(there.get(name), dict):
            inner = plain.get(name)
            found[name] = with_newer(there[name], value, inner if isinstance(inner, dict) else {})
    return found
