"""``python -m dev.kills MINUTES [SEED]``: kills tiny runs at random moments and goes on with them.

Each chain is one run that is killed (kill -9) again and again, at start-up, in a step, while saving, in
validation or probe, until it gets through. Then its adapter must be that of the run that nobody killed, to
the bit; its tables the same; and every point of every curve must stand once in the event files. In every
third chain TMPDIR is on another file system. Prints a line for each chain, and exits with 1 where one
differs.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
import tiny
from runs import curves, final

OTHER_FILE_SYSTEM = Path("/dev/shm")
TABLES = ("probe.csv", "captions.csv", "validation.csv")


def start(folder: Path, flags: list[str], other: bool) -> subprocess.Popen:
    """`fit`, or where it has saved something, from there on."""
    saved = sorted((folder / "runs/default").glob("*/checkpoints/last.ckpt"))
    command = ["--ckpt_path", str(saved[-1].parent.parent)] if saved else flags
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    if other:
        env["TMPDIR"] = str(OTHER_FILE_SYSTEM)
    log = (folder / "log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_limber", "fit", *command],
        cwd=folder,
        env=env,
        stdout=log,
        stderr=log,
    )


def run_of(folder: Path) -> Path:
    """The run's folder: that with a checkpoint; starts that saved nothing may have left others."""
    [path] = (folder / "runs/default").glob("*/checkpoints/last.ckpt")
    return path.parents[1]


def differences(run: Path, straight: Path) -> list[str]:
    """What is not as in the run that nobody killed."""
    found = []
    ours, theirs = final(run), final(straight)
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in theirs):
        found.append("adapter")
    for table in TABLES:
        a, b = ((folder / table).read_text().replace(folder.name, "") for folder in (run, straight))
        if a != b:
            found.append(table)
    ours, theirs = (
        {tag: sorted(step for step, _ in points) for tag, points in curves(root).items()}
        for root in (run, straight)
    )
    wrong = [tag for tag in ours | theirs if ours.get(tag) != theirs.get(tag)]
    return found + [f"steps of {tag} in the event files: {ours.get(tag)}" for tag in wrong[:5]]


def main(minutes: float, seed: int = 0) -> int:
    rng, end = random.Random(seed), time.time() + 60 * minutes
    with tempfile.TemporaryDirectory() as root:
        models = Path(root) / "models"
        tiny.write_llm(models / "llm")
        tiny.write_vision(models / "vision")
        tiny.write_saes(models / "saes")
        flags = tiny.arguments(models)
        straight = Path(root) / "straight"
        straight.mkdir()
        begun = time.time()
        assert start(straight, flags, False).wait() == 0, (straight / "log").read_text()
        seconds = time.time() - begun
        kills = chain = bad = 0
        while time.time() < end:
            folder, of_chain, other = Path(root) / f"chain{chain}", 0, chain % 3 == 2
            folder.mkdir()
            while True:
                process = start(folder, flags, other)
                try:
                    code = process.wait(timeout=rng.uniform(0.2, 1.1) * seconds)
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    of_chain += 1
            kills += of_chain
            wrong = differences(run_of(folder), run_of(straight)) if code == 0 else [f"exit code {code}"]
            bad += bool(wrong)
            print(f"chain {chain}: {of_chain} kills: {'; '.join(wrong) or 'equal'}", flush=True)
            if wrong:
                print((folder / "log").read_text()[-3000:])
            chain += 1
        print(
            f"{kills} kills in {chain} chains, {bad} of them not equal; a whole run takes {seconds:.0f} s"
        )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *map(int, sys.argv[2:])))
