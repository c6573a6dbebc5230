"""The parser of the command line: what it adds to Lightning's."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import yaml
from jsonargparse import _typehints
from lightning.pytorch.cli import LightningArgumentParser

from lightning_limber.utils.adapter_config import upgrade_args


def _drop_settings_of_another_class(parser: Any, previous: Any, value: Any) -> None:
    """A class that takes another's place takes none of its settings.

    jsonargparse keeps those that the new class has too: `--data MyData` would get the number of images
    that the default experiment sets for its scenes.
    """
    if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
        for key in list(previous["init_args"].keys()):
            previous["init_args"].pop(key)
        previous.pop("dict_kwargs", None)


_typehints.discard_init_args_on_class_path_change = _drop_settings_of_another_class


def classes_first(args: list[str]) -> list[str]:
    """Puts ``--data MyData`` before ``--data.root x``, which it would drop if it came later.

    What stands before a ``--config`` stays there.
    """
    found, start, i = list(args), 0, 0
    while i < len(found):
        name, equals, _ = found[i].partition("=")
        if name == "--config":
            start = i
        inside = [j for j in range(start, i) if found[j].startswith(f"{name}.")]
        if name.startswith("--") and inside:
            end = i + (1 if equals else 2)
            found[inside[0] : end] = found[i:end] + found[inside[0] : i]
        i += 1
    return found


NOT_ACCEPTED = re.compile(
    r"unrecognized arguments: --([\w.]+)|(?:Group '([\w.]+)' does not accept o|O)ption '([\w.]+)'"
)


class Parser(LightningArgumentParser):
    """Names the nearest option where one is misspelt, on the command line or in a YAML file."""

    def parse_args(self, args: Sequence[str] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        if self._subcommands_action:  # Not again for what a subcommand or a class gets.
            try:
                args = classes_first(upgrade_args(args))
            except (ValueError, yaml.YAMLError) as error:
                self.error(str(error))
        return super().parse_args(args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        match = NOT_ACCEPTED.search(message)
        if match and "Did you mean" not in message:  # The parser of a class inside has said it.
            given = ".".join(filter(None, match.groups()))
            parsers = [
                self,
                *(self._subcommands_action.choices.values() if self._subcommands_action else ()),
            ]
            known = {action.dest for parser in parsers for action in parser._actions}
            # model.lr is model.optimizer.lr rather than model.llm.
            same = {name for name in known if name.rpartition(".")[2] == given.rpartition(".")[2]}
            if near := get_close_matches(given, same or known, n=1):
                message += f"\n'{given}' is not known. Did you mean '{near[0]}'?"
        super().error(message, ex)
