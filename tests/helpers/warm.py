"""Runs commands in forks of a process that has imported what they need: the imports of a tiny run take ten
times its own time. A line of JSON in, the forks' process ids and exit codes out.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
from importlib import import_module

from lightning.pytorch.utilities import rank_zero_only
from process import drawing

MODULES = (
    "lightning_limber.cli",
    "omegaconf.grammar_parser",
    "sae_lens",
    "transformers.models.llama.modeling_llama",
    "transformers.models.dinov2.modeling_dinov2",
)


def serve() -> dict:
    """Forks for each request; returns, in a fork, what is asked of it."""
    for name in MODULES:
        import_module(name)
    gc.freeze()  # A fork shares the memory that it does not touch.
    while line := sys.stdin.buffer.readline():
        asked, pids = json.loads(line), []
        for rank in range(asked["processes"]):
            if (pid := os.fork()) == 0:
                env = {name: value.replace("{rank}", str(rank)) for name, value in asked["env"].items()}
                return asked | {"env": env, "rank": rank}
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)
    os._exit(0)


def become(asked: dict) -> None:
    """Makes the fork what a shell, or a launcher of several processes, would have started."""
    if asked["start_new_session"]:
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(asked["output"], os.O_WRONLY | os.O_APPEND)
    for file, number in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(file, number)
    rank_zero_only.rank = asked["rank"]  # Read from the environment when it was imported.
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    # As `python -m` does, with this file's own folder left out.
    sys.path[:1] = [asked["cwd"], *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    for module, name in [] if asked["figures"] else drawing():
        setattr(module, name, lambda *args: None)
    sys.argv = ["lightning_limber", *asked["args"]]
    # What runs in the background of a shell has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    become(serve())
    runpy.run_module("lightning_limber", run_name="__main__", alter_sys=True)
