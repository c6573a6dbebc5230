"""`python -m lightning_limber.sae_training train|evaluate|describe`: makes and checks a release of SAEs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from lightning_limber import sae_training
from lightning_limber.utils.files import in_words


def main(args: list[str] | None = None) -> None:
    """Entry point: one sub-command a step."""
    from lightning_limber.sae_training.describe import describe_release
    from lightning_limber.sae_training.evaluate import evaluate_release
    from lightning_limber.sae_training.train import TrainConfig, train

    parser = ArgumentParser(
        prog="python -m lightning_limber.sae_training", description=sae_training.__doc__
    )
    commands = parser.add_subcommands()
    steps: dict[str, Callable[..., Any]] = {
        "train": lambda **options: print(train(TrainConfig(**options))),
        "evaluate": evaluate_release,
        "describe": describe_release,
    }
    for name, step in steps.items():
        command = ArgumentParser()
        command.add_argument("--config", action="config")
        if name == "train":
            command.add_class_arguments(TrainConfig)
        else:
            command.add_function_arguments(step)
        commands.add_subcommand(name, command)
    # --suite is the former name of --release.
    given = [re.sub(r"^--suite\b", "--release", arg) for arg in (sys.argv[1:] if args is None else args)]
    chosen = parser.parse_args(given)
    options = chosen[chosen.subcommand].as_dict()
    options.pop("config")
    try:
        steps[chosen.subcommand](**options)
    except (OSError, ValueError) as error:
        if os.environ.get("LIGHTNING_LIMBER_TRACEBACK"):
            raise
        print(f"error: {in_words(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
