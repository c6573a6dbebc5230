"""How long one waits: for ``--help``, for ``--print_config``, and for the first optimiser step of ``fit``;
beside them the bare imports of torch and Lightning.

Every command runs in a process of its own, once unmeasured to warm caches. The default run's models have
random weights of true size here, so the sanity check only warns; all else is the default config.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from bench import measure
from bench.measure import Row
from bench.sizes import SIZES, Setup
from tests.helpers import tiny

REPO = Path(__file__).parents[1]
LIMBER = ["-m", "lightning_limber"]
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s+([\w.]+)")


def fit_flags(setup: Setup) -> list[str]:
    if setup.size.llm is SIZES["tiny"].llm:
        tiny.write_saes(setup.folder / "saes")
        flags = tiny.arguments(setup.folder)
    elif setup.size.llm is SIZES["default"].llm:
        flags = ["--probe.sanity_check=warn", f"--model.llm={setup.folder / 'llm'}"]
        flags.append(f"--model.vision.name={setup.folder / 'vision'}")
    else:
        raise ValueError("bench start measures the default config: use --size default or tiny.")
    return [*flags, f"--trainer.logger.init_args.save_dir={setup.folder / 'runs'}"]


def call(args: list[str]) -> tuple[float, float, str]:
    """Seconds, CPU seconds and standard error of ``python args``."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    env = {**os.environ, "BENCH_STARTED": str(started)}
    done = subprocess.run([sys.executable, *args], cwd=REPO, env=env, capture_output=True, text=True)
    spent, after = time.time() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(args)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, cpu, done.stderr


def imports(args: list[str]) -> dict[str, float]:
    """Seconds spent in the modules of each package while ``python args`` runs; the ten largest."""
    found: Counter[str] = Counter()
    for own, _, module in IMPORT.findall(call(["-X", "importtime", *args])[2]):
        found[module.split(".")[0]] += int(own)
    return {name: microseconds / 1e6 for name, microseconds in found.most_common(10)}


def main(setup: Setup) -> Row:
    """Measures the commands in turns."""
    out = setup.folder / "first_step.json"
    flags = fit_flags(setup)
    commands = {
        "bare_imports": ["-c", "import torch, lightning.pytorch"],
        "help": [*LIMBER, "--help"],
        "fit_help": [*LIMBER, "fit", "--help"],
        "print_config": [*LIMBER, "fit", "--print_config"],
        "fit_to_first_step": ["-m", "bench.first_step", str(out), "fit", *flags],
    }
    names = setup.only or list(commands)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    parts: list[dict[str, float]] = []
    for number in range(setup.repeats + 1):
        print(f"  round {number} of {setup.repeats} (0 warms up)", file=sys.stderr)
        for name in names:
            wall, cpu, _ = call(commands[name])
            if number == 0:
                continue
            spent[name].append((wall, cpu))
            if name == "fit_to_first_step":
                parts.append(json.loads(out.read_text()))
    rows = []
    for name, found in spent.items():
        walls, cpus = zip(*found, strict=True)
        row = {"name": name, **measure.spread("seconds", walls), "cpu_seconds": statistics.median(cpus)}
        rows.append(row)
    medians = {part: statistics.median(one[part] for one in parts) for part in parts[0]} if parts else {}
    return {
        "first_step_seconds": medians,
        "import_seconds": {name: imports(commands[name]) for name in names if name != "fit_to_first_step"},
        "results": rows,
    }


COLUMNS = "name seconds seconds_p10 seconds_p90 cpu_seconds".split()
