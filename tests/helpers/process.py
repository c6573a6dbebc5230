"""The command line in a process of its own."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any

REPO = Path(__file__).parents[2]
HELPERS = {"PYTHONPATH": f"{REPO}{os.pathsep}{Path(__file__).parent}"}
"""Environment in which a run finds `crash.CrashAt` and this package."""
TIMEOUT = 500


@cache
def _warm() -> subprocess.Popen:
    """A process that has done a command's imports, for as long as this one lives (warm.py)."""
    pipe = subprocess.PIPE
    env = {**os.environ, **HELPERS, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("warm.py")], stdin=pipe, stdout=pipe, env=env, bufsize=0
    )


def drawing() -> list[tuple[ModuleType, str]]:
    """Where figures are drawn, as modules and names: they are most of a tiny run's time."""
    from lightning_limber.callbacks import captions, run_record, sae_probe

    modules = (captions, run_record, sae_probe)
    return [(module, name) for module in modules for name in vars(module) if name.endswith("_figure")]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run_here(patch: Any, folder: Path, *args: str, figures: bool = False) -> Any:
    """A command in this process and a folder; the CLI object.

    Args:
        patch: A `pytest.MonkeyPatch`, whose changes last as long as it does.
        folder: Working directory.
        args: Command and flags.
        figures: Draw them.
    """
    from lightning_limber.cli import main

    patch.chdir(folder)
    patch.setattr(sys, "argv", ["lightning_limber"])
    for module, name in [] if figures else drawing():
        patch.setattr(module, name, lambda *args: None)
    return main(list(map(str, args)))


def run_cli(
    *args: str,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    start_new_session: bool = False,
    figures: bool = False,
    processes: int = 1,
) -> subprocess.CompletedProcess:
    """``python -m lightning_limber ...`` in a process of its own, which Ctrl-C reaches.

    Args:
        env: Besides this process's; ``{rank}`` stands for the number of the process.
        figures: Draw them.
        processes: Ranks of ``--trainer.devices`` that are started from here, as a launcher does. With 1,
            Lightning starts the others, and each takes its time to import.

    Raises:
        subprocess.TimeoutExpired: it takes longer than `TIMEOUT` seconds.
    """
    warm = _warm()
    assert warm.stdin is not None
    assert warm.stdout is not None
    ranks = {}
    if processes > 1:
        ranks = {"LOCAL_RANK": "{rank}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with NamedTemporaryFile() as output:
        asked = {
            "args": list(map(str, args)),
            "cwd": str(cwd or Path.cwd()),
            "env": {**os.environ, "OMP_NUM_THREADS": "1", **ranks, **(env or {})},
            "output": output.name,
            "start_new_session": start_new_session,
            "figures": figures,
            "processes": processes,
        }
        warm.stdin.write(f"{json.dumps(asked)}\n".encode())
        pids = json.loads(warm.stdout.readline())
        late = not select.select([warm.stdout], [], [], TIMEOUT)[0]
        for pid in pids if late else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        codes = json.loads(warm.stdout.readline())
        said = output.read().decode()
    if late:
        raise subprocess.TimeoutExpired(asked["args"], TIMEOUT, said)
    return subprocess.CompletedProcess(asked["args"], next(filter(None, codes), 0), said)
