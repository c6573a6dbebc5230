"""The commands in a line each; imports next to nothing, so that help comes at once."""

import argparse
import sys
from typing import Any, NoReturn

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
ADDED: dict[str, dict[str, dict[str, Any]]] = {
    "predict": {
        "images": {
            "nargs": "+",
            "type": str,
            "default": None,
            "help": "Images and folders to caption; null takes the held-out images of the data.",
        },
        "output": {
            "type": str,
            "default": "captions.jsonl",
            "help": "File to write, one JSON object a line.",
        },
        "latents": {
            "type": bool,
            "default": False,
            "help": "Write the strongest SAE latents of each image by layer too, and where they fire.",
        },
    },
    "plan": {
        "gpu": {
            "nargs": "+",
            "type": str,
            "default": ["H100"],
            "help": "Kinds of GPU; an unknown one lists those known.",
        },
        "gpus": {"nargs": "+", "type": int, "default": [1, 8], "help": "Numbers of GPUs."},
        "utilisation": {"type": float, "default": 0.4, "help": "Share of the dense peak FLOP/s."},
        "caption_tokens": {
            "type": int | None,
            "default": None,
            "help": "Mean tokens of a caption; null is 32, or model.max_caption_tokens if lower.",
        },
    },
}
"""Options of a command that are no settings of a run."""
METAVARS = {"ckpt_path": "PATH"} | dict.fromkeys(("data", "model.adapter"), "CLASS")
METAVARS |= dict.fromkeys(("data.help", "model.adapter.help"), "CLASS")


def program() -> str:
    """How the command line was called."""
    return "lightning-limber" if "lightning-limber" in sys.argv[0] else "python -m lightning_limber"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, as the commands of LightningCLI do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. See {self.prog} --help.\n")
