"""The commands in a line each; imports next to nothing, so that help comes at once."""

import argparse
import sys
from typing import NoReturn

COMMANDS = {
    "fit": "Train an adapter, validate and probe it after each epoch.",
    "validate": "Score and probe a checkpoint on the held-out images.",
    "test": "Score a checkpoint on the test images.",
    "predict": "Caption images or folders with a checkpoint.",
    "export": "Write the adapter of a checkpoint as a folder for a hub.",
    "plan": "Say what a run will cost in FLOPs, memory and hours; no weights are loaded.",
    "report": "Make one HTML file of runs.",
    "grid": "Train designs with several seeds and say which is better at what.",
}
HELP = """\
usage: {prog} COMMAND [--config FILE ...] [--OPTION VALUE ...]

Train an adapter between a frozen vision encoder and a frozen LLM, and watch with SAEs where its image
tokens become language.

{commands}

  {prog} fit                                    the default experiment, minutes on a CPU
  {prog} fit --config configs/stamps.yaml       a recipe; configs/ holds others
  {prog} fit --ckpt_path last                   go on where the newest run stopped
  {prog} predict --ckpt_path last --images DIR  captions.jsonl
  {prog} COMMAND --help                         all options of a command
"""

LAYERS = """\
Settings come from configs/base.yaml, the experiment (configs/default.yaml, unless a --config names its
data), each --config, and flags; what comes later wins."""
# Of options whose help is Lightning's.
OPTIONS = {
    "config": "Lay a YAML file of settings over the others; may be given several times.",
    "print_config": "Print the whole config that this command makes, and exit.",
    "seed_everything": "Seed of all random numbers; true draws one.",
    "ckpt_path": "Start from this checkpoint: a .ckpt file, a run's folder, or 'last' for the newest run. "
    "`fit` goes on where it stopped. The checkpoint's config takes the place of the experiment's.",
    "weights_only": "Read tensors and plain values only; null does so for files on this machine.",
    "model.adapter.help": "Show the options of a class of adapters, such as MLP, and exit.",
    "data.help": "Show the options of a class of data, such as ImageFolder, and exit.",
    "data": "Where images and captions come from: Scenes, ImageFolder, CocoCaptions, LLaVAConversations, "
    "HuggingFaceCaptions, Shards, or a class of your own as my_module.MyData. Give its options as in "
    "--data.batch_size 8.",
}
METAVARS = {"ckpt_path": "PATH"} | dict.fromkeys(("data", "model.adapter"), "CLASS")
METAVARS |= dict.fromkeys(("data.help", "model.adapter.help"), "CLASS")


def program() -> str:
    """How the command line was called."""
    return "lightning-limber" if "lightning-limber" in sys.argv[0] else "python -m lightning_limber"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, as the commands of LightningCLI do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. See {self.prog} --help.\n")
