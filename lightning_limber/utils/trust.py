"""What a file from elsewhere may decide: values, and which of a few known classes.

A checkpoint or an exported adapter carries the config of its run, and such files are shared. Their
config is read as plain values: no interpolation, no path of another file, no function. It may name
classes of this package and those listed here; any other class must be named by the command itself. It
decides no folder that is written to.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

SECTIONS = ("seed_everything", "trainer", "model", "data", "probe", "captions", "checkpoint")
"""What is read of a stored config; what a command does beside (paths, outputs) is the command's own."""
PACKAGES = tuple(f"lightning_limber.{part}." for part in ("callbacks", "data", "models", "probe"))
CLASSES = frozenset(
    f"lightning.pytorch.{name}"
    for name in (
        *("loggers.TensorBoardLogger", "loggers.CSVLogger"),
        *("callbacks.EarlyStopping", "callbacks.LearningRateMonitor", "callbacks.DeviceStatsMonitor"),
        *("callbacks.TQDMProgressBar", "callbacks.RichProgressBar", "callbacks.ModelSummary"),
        *("strategies.DDPStrategy", "strategies.SingleDeviceStrategy"),
    )
)
# Where a Lightning class or the Trainer writes to, or what it uploads.
OUTPUTS = {"default_root_dir", "model_registry"}
OUTPUTS |= {"save_dir", "name", "version", "sub_dir", "filename_suffix"}  # Of loggers.
LOOSE = {Any, object, list, dict, tuple, set}
SCALARS = {str, int, float, bool, None, type(None), Path, timedelta}
CONTAINERS = {list, tuple, set, frozenset, dict, Iterable, Sequence, Mapping}
# As in `strategy: ddp` and `devices: 0,1`: neither an import path nor a file's name with an ending.
WORD = re.compile(r"[a-z0-9_]+(,[0-9]+)*")


def trusted_class(class_path: str, source: str | Path, key: str, named: Collection[str] = ()) -> type:
    """Imports the class that a file from elsewhere names.

    Args:
        class_path: Its import path.
        source: The file, for the message.
        key: The setting, for the message.
        named: Import paths that the user's own command names.

    Raises:
        ValueError: the class is neither this package's, nor in `CLASSES`, nor in `named`.
    """
    own = isinstance(class_path, str) and class_path.startswith(PACKAGES)
    if own or class_path in CLASSES or class_path in named:
        module, _, name = class_path.rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            message = f"{source}: {key} names '{class_path}', which does not exist"
            raise ValueError(f"{message}: {error}") from error
        # Modules of this package hold other modules, and what those hold.
        if isinstance(found, type) and (not own or found.__module__.startswith(PACKAGES)):
            return found
    raise ValueError(
        f"{source}: its config names '{class_path}' for {key}. A file may not choose a class outside "
        "lightning_limber by itself. If you trust it, name it in this command, as the run did: repeat "
        f"the run's --config FILE, or give the flag --{key} {class_path}. In Python, import it first."
    )


def read_config(
    text: Any,
    parser: ArgumentParser,
    source: str | Path,
    named: Collection[str],
    save_dir: str,
    name: str,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
) -> str:
    """Reads the config that a file carries; see this file's head.

    Args:
        text: The config as YAML.
        parser: Its options' types say what each value may be.
        source: The file, for messages.
        named: Import paths of classes that the user's own command names.
        save_dir: Where the loggers of the config write to, whatever it says.
        name: The run's name there.
        upgrade: Makes a config of an older version one of this version, before it is checked.

    Returns:
        The config as YAML, with values and allowed classes only.

    Raises:
        ValueError: it holds anything else.
    """
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ValueError(f"{source}: its config is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{source}: its config is no mapping but {type(config).__name__}.")
    config = upgrade({key: config[key] for key in SECTIONS if key in config})
    _Reader(source, named, save_dir, name).options(parser, config)
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def class_paths(value: Any) -> set[str]:
    """Every class that a config names, at any depth."""
    if isinstance(value, list):
        return {path for item in value for path in class_paths(item)}
    if not isinstance(value, dict):
        return set()
    own = {value["class_path"]} if isinstance(value.get("class_path"), str) else set()
    return own | {path for item in value.values() for path in class_paths(item)}


class _Reader:
    """Checks values against the types of the options that they are for, and takes outputs out."""

    def __init__(self, source: str | Path, named: Collection[str], save_dir: str, name: str) -> None:
        self.source, self.named = source, named
        self.logger = {"save_dir": save_dir, "name": name}

    def refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise ValueError(f"{self.source}: its config has {value!r:.200} for {key}. {wanted}")

    def options(self, parser: ArgumentParser, values: dict, at: str = "", within: str = "") -> None:
        """Checks what is given for options of `parser`: of the class at `at`, of the group `within` it."""
        actions: dict[str, Any] = {action.dest: action for action in parser._actions}
        for name in list(values):
            key, value = f"{within}{name}", values[name]
            if name in OUTPUTS and f"{at}{key}".startswith("trainer."):
                del values[name]
            elif isinstance(value, dict) and any(dest.startswith(f"{key}.") for dest in actions):
                if not hasattr(actions.get(key), "_typehint"):
                    self.options(parser, value, at, f"{key}.")
                else:
                    self.value(actions[key]._typehint, values, name, at + key)
            elif hasattr(actions.get(key), "_typehint"):
                self.value(actions[key]._typehint, values, name, at + key)
            elif value is not None:
                wanted = "A mapping is needed." if key in actions else "There is no such option."
                self.refuse(at + key, value, wanted)

    def value(self, typehint: Any, holder: Any, place: Any, key: str) -> None:
        """Checks ``holder[place]``, of type `typehint`."""
        value, kinds = holder[place], _alternatives(typehint)
        plain = all(map(_is_plain, kinds))
        parts = [part for kind in kinds for part in _parts(kind)]
        if not plain or not parts:
            parts.append(Any)
        if isinstance(value, str):
            self.text(kinds, value, key)
        elif isinstance(value, dict) and "class_path" in value:
            self.class_spec(value, key)
        elif isinstance(value, (list, dict)):
            for name in range(len(value)) if isinstance(value, list) else value:
                if "." in str(name) and not plain:
                    self.refuse(key, name, "A name without dots is needed.")
                self.value(Union[tuple(parts)], value, name, key)  # noqa: UP007
        elif value is not None and not isinstance(value, (bool, int, float)):
            self.refuse(key, value, "Text, numbers, lists and mappings are read.")

    def text(self, kinds: list[Any], value: str, key: str) -> None:
        if "${" in value:
            self.refuse(key, value, "Text with ${...} is not read from a file that carries its config.")
        if all(kind in (str, Path, None, type(None)) or _is_choice(kind) for kind in kinds):
            return
        # An option that takes more than text may take the text for a class, a file or YAML.
        texts = [kind for kind in kinds if kind in (str, Path, timedelta) or _is_choice(kind)]
        accepted = texts or any(map(_is_loose, kinds))
        imports = not all(_is_plain(kind) or _is_loose(kind) for kind in kinds)
        # Of plain values nested ones do no harm: '{conversation}' is a prompt, and a mapping of YAML's.
        nested = _is_file(value) if all(map(_is_plain, kinds)) else _is_structure(value)
        if not accepted or nested or (imports and not WORD.fullmatch(value)):
            self.refuse(key, value, "It may name no function, class or other file; give that by a flag.")

    def class_spec(self, value: dict[str, Any], key: str) -> None:
        found = trusted_class(value["class_path"], self.source, key, self.named)
        value.pop("dict_kwargs", None)
        if value.keys() - {"class_path", "init_args"}:
            self.refuse(key, value, "A class is given by class_path and init_args.")
        arguments = value.setdefault("init_args", {})
        if not isinstance(arguments, dict):
            self.refuse(f"{key}.init_args", arguments, "A mapping is needed.")
        logs = "save_dir" in arguments
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(found)
        self.options(parser, arguments, f"{key}.")
        if logs and key == "trainer.logger":
            arguments.update(self.logger)


def _alternatives(typehint: Any) -> list[Any]:
    origin = get_origin(typehint)
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(typehint) for kind in _alternatives(part)]
    return _alternatives(get_args(typehint)[0]) if origin is Annotated else [typehint]


def _is_file(text: str) -> bool:
    """Whether a parser may take the text for a file, or for the standard input."""
    try:
        return text == "-" or Path(text).is_file()
    except (OSError, ValueError):
        return False


def _is_structure(text: str) -> bool:
    """Whether a parser may take the text for a file or for nested settings."""
    try:
        return _is_file(text) or isinstance(yaml.safe_load(text), (dict, list))
    except yaml.YAMLError:
        return False


def _parts(kind: Any) -> tuple[Any, ...]:
    """Types of what is in a list or mapping."""
    if get_origin(kind) not in CONTAINERS:
        return ()
    first = 1 if get_origin(kind) in (dict, Mapping) else 0  # Without the type of the keys.
    return tuple(part for part in get_args(kind)[first:] if part is not ...)


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum))


def _is_loose(kind: Any) -> bool:
    """Whether a value of this type imports nothing by text, but what looks like a class inside it."""
    return kind in LOOSE or type(kind).__module__.startswith("jsonargparse.")  # A type that it cannot read.


def _is_plain(kind: Any) -> bool:
    """Whether no value of this type is imported, instantiated or read from a file."""
    if kind in SCALARS or _is_choice(kind):
        return True
    parts = _parts(kind)
    return bool(parts) and all(_is_plain(part) for part in _alternatives(Union[parts]))  # noqa: UP007
