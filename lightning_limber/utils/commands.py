"""The commands in a line each; imports nothing, so that help comes at once."""

import sys

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


def program() -> str:
    """How the command line was called."""
    return "lightning-limber" if "lightning-limber" in sys.argv[0] else "python -m lightning_limber"
