"""The parser of the command line: what it adds to Lightning's."""

from __future__ import annotations

import re
import sys
from argparse import Action
from collections.abc import Iterable, Sequence
from copy import copy
from difflib import get_close_matches
from typing import Any, NoReturn

import yaml
from jsonargparse import DefaultHelpFormatter, _typehints
from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._common import defaults_cache
from lightning.pytorch.cli import LightningArgumentParser

from lightning_limber.utils.adapter_config import upgrade_args
from lightning_limber.utils.config_files import config_with


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


LONG_DEFAULT = 40
"""Characters of a default that still stand on the line of the option."""


TRAINER_FEW = {
    f"trainer.{name}"
    for name in "max_steps max_epochs max_time accelerator devices precision accumulate_grad_batches "
    "gradient_clip_val logger log_every_n_steps callbacks enable_progress_bar".split()
}
"""Options of Lightning's Trainer that a run is likely to set."""


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


class Formatter(DefaultHelpFormatter):
    """An option with its type and default on one line, and below it, in a wide column, what it means."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=6, **kwargs)

    def add_usage(self, usage: str | None, *args: Any, **kwargs: Any) -> None:
        super().add_usage(usage or "%(prog)s [--OPTION VALUE ...]", *args, **kwargs)

    def _get_help_string(self, action: Action) -> str:
        long = len(self._default(action)) > LONG_DEFAULT
        return f"{action.help or ''} (default: {self._default(action)})" if long else action.help or ""

    def _default(self, action: Action) -> str:
        if not isinstance(action, _typehints.ActionTypeHint) or action.required:
            return ""
        defaults: Any = defaults_cache.get() or {}
        given = defaults.get(action.dest, action.default)
        if _typehints.is_subclass_spec(given):
            given = given["class_path"].rpartition(".")[2]
        # ${...trainer.max_steps} is how a config names another setting.
        return (
            "null" if given is None else re.sub(r"\$\{\.*([\w.]+)\}", r"\1", str(given)).replace("%", "%%")
        )

    def _format_action_invocation(self, action: Action) -> str:
        names = [name for name in action.option_strings if not name.endswith("+")]
        if not names or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        default = self._default(action)
        shown = f" = {default}" if default and len(default) <= LONG_DEFAULT else ""
        return f"{', '.join(names)} {value}{' (required)' if action.required else shown}"

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        kind = self._get_type_str(action)
        if kind is None or action.dest == "data":
            return "CLASS" if action.dest == "data" else "FILE"
        kind = re.sub(r"^(Union|Optional)\[(.*)\]$", r"\2", re.sub(r"Literal\[.*?\]", "str", kind))
        kinds = re.split(r"(?:, | \| )(?![^\[]*\])", kind)  # At the commas that are in no brackets.
        return "|".join(dict.fromkeys(kinds))


def _is_shown(action: Action) -> bool:
    """Whether ``--help`` has the option; ``--model FILE``, ``--....help`` and old names make it longer."""
    is_help = action.dest.endswith(".help") and action.dest not in ("data.help", "model.adapter.help")
    is_old = (action.help or "").startswith("Old name")
    return not (is_help or is_old or isinstance(action, _ActionConfigLoad))


class Parser(LightningArgumentParser):
    """Help with the project's own options first, and errors of a line that name the file and the remedy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", Formatter)
        super().__init__(*args, **kwargs)

    def format_help(self, *args: Any) -> str:
        """Lightning's Trainer last, what a run needs of it first, and at each group of options the name of
        its settings.
        """
        groups, kept = self._action_groups, []
        before = [(group, group.title, group._group_actions) for group in groups]
        for group in groups:
            group._group_actions = [action for action in group._group_actions if _is_shown(action)]
            dests = {action.dest for action in group._group_actions}
            names = {"data"} & dests or {dest.rpartition(".")[0] for dest in dests if "." in dest}
            name = min(names, key=len, default="")
            if name:
                group.title = f"{name}: {group.title}"
            few = copy(group)
            few._group_actions = [action for action in group._group_actions if action.dest in TRAINER_FEW]
            if few._group_actions:
                few.title = "trainer: How long, on what, and what is logged"
                group.title = "trainer, the rest: Options of Lightning's Trainer"
                group._group_actions = [a for a in group._group_actions if a.dest not in TRAINER_FEW]
            kept += [one for one in (few, group) if one._group_actions]
        try:
            self._action_groups = sorted(kept, key=lambda group: str(group.title).startswith("trainer"))
            return super().format_help(*args)
        finally:
            self._action_groups = groups
            for group, title, actions in before:
                group.title, group._group_actions = title, actions

    def parse_args(self, args: Sequence[str] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        if self._subcommands_action:  # Not again for what a subcommand or a class gets.
            try:
                args = classes_first(upgrade_args(args))
            except (ValueError, yaml.YAMLError) as error:
                self.error(str(error))
        return super().parse_args(args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with code 2 and one or two lines; the parser of a class inside another raises instead."""
        parsers = [self, *(self._subcommands_action.choices.values() if self._subcommands_action else ())]
        text = explain(message, {action.dest: action for parser in parsers for action in parser._actions})
        if not self.exit_on_error:
            super().error(text, ex)
        self.exit(2, f"error: {text}\n")


NOT_ACCEPTED = re.compile(
    r"unrecognized arguments: --([\w.]+)|"
    r"(?:(?:Group '([\w.]+)'|Subcommand '\w+') does not accept o|O)ption '([\w.]+)'"
)
NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)|Problem with given class_path '([\w.]+)'")
NO_CALLABLE = re.compile(r"a callable class: (.*)\. Got value: (.*)")
NO_VALUE = re.compile(r"Expected an? (.*)\. Got value: (.*)")


def explain(message: str, options: dict[str, Any]) -> str:
    """What jsonargparse says on a wrong option, in a line or two with the nearest name that is right.

    Args:
        message: What it says.
        options: The parsers' options by their names.
    """
    if match := re.search(r"'\S+' (is not known|must be given)\..*", message):
        return _at(message, match[0])  # The parser of the class inside has said it.
    if match := NOT_ACCEPTED.search(message):
        given = ".".join(filter(None, match.groups()))
        # model.lr is model.optimizer.lr rather than model.llm.
        same = {name for name in options if name.rpartition(".")[2] == given.rpartition(".")[2]}
        return _at(message, f"'{given}' is not known.{_near(given, same or options)}", given)
    if match := re.search(r"the following arguments are required: (.*)", message):
        return _at(message, f"'{match[1]}' must be given.")
    key = _key(message)
    if (match := NO_CLASS.search(message)) and key:
        given = match[1] or match[2]
        paths = _typehints.get_all_subclass_paths(getattr(options.get(key), "_typehint", object))
        near = _near(given.rpartition(".")[2], {path.rpartition(".")[2] for path in paths})
        reason = re.search(r"class_path '[\w.]+':\n\s*(.*)", message)
        if reason and not re.search("No module|no attribute", reason[1]):
            return _at(message, f"{given}: {reason[1]}")
        what = f"there is no class '{given}'" + (f" ({reason[1]})" if reason else "")
        return _at(message, f"{what}.{near} A class of your own is named by its path, my_module.MyClass.")
    if match := NO_CALLABLE.search(message):
        missing = f"there is no class '{match[2]}' ({match[1]})."
        return _at(message, f"{missing} A class of your own is named by its path, my_module.MyClass.")
    if match := NO_VALUE.search(message):
        wanted, given = re.sub(r"<class '(\w+)'>|typing\.", r"\1", match[1]), match[2]
        near = _near(given, re.findall(r"'(\w+)'", wanted))
        return _at(message, f"{given!r} is given, wanted is {wanted}.{near}")
    if (match := re.search(r"Given value: (.*)", message)) and key in options:
        wanted = _typehints.type_to_str(options[key]._typehint)
        return _at(message, f"{match[1]!r} is given, wanted is {wanted}.")
    if match := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
        near = _near(match[1], re.findall(r"[\w-]+", match[2]))
        return f"there is no command '{match[1]}'.{near} Commands are {match[2]}."
    return "\n".join(line.strip() for line in message.splitlines() if line.strip())


def _near(given: str, names: Iterable[str]) -> str:
    found = get_close_matches(given, names, n=1)
    return f" Did you mean '{found[0]}'?" if found else ""


def _key(message: str) -> str:
    match = re.search(r"Parser key \"([\w.]+)\"", message)
    return match[1].removeprefix(f"{sys.argv[1]}.") if match and len(sys.argv) > 1 else ""


def _at(message: str, text: str, key: str = "") -> str:
    """Puts the option before the text, and the file that sets it."""
    option = _key(message)
    file = config_with(option or key, sys.argv[2:])
    return ": ".join(filter(None, [file, option, text]))
