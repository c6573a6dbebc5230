"""The command line in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
HELPERS = {"PYTHONPATH": f"{REPO}{os.pathsep}{Path(__file__).parent}"}
"""Environment in which a run finds `crash.CrashAt` and this package."""


def run_cli(*args: str, **kwargs) -> subprocess.CompletedProcess:
    """``python -m lightning_limber ...`` in a process of its own, which Ctrl-C reaches.

    A shell starts what runs in the background with SIGINT ignored, and processes inherit that.
    """
    return subprocess.run(
        [sys.executable, "-m", "lightning_limber", *map(str, args)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})},
        **kwargs,
    )
