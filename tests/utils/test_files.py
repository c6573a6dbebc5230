"""Files are there whole or not at all, and a damaged checkpoint is refused by name."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from process import HELPERS, REPO
from runs import crash_flags

from lightning_limber.utils.checkpoints import read_checkpoint
from lightning_limber.utils.files import LEFT_SECONDS, write_text, write_whole

# Lines that are added to it one by one; and a file in a folder that is renamed as a whole.
STREAMED = {"tools/predict.py", "utils/wheels.py"}


def test_a_file_is_replaced_once_it_is_written():
    path = Path("runs/a.csv")
    write_text(path, "old")

    def fail(part: Path) -> None:
        part.write_text("half")
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: 'runs/a.csv'"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert [file.name for file in path.parent.iterdir()] == ["a.csv"]
    assert path.read_text() == "new"


def test_what_a_killed_process_left_is_removed_later():
    code = (
        "import os, signal; from lightning_limber.utils.files import write_whole\n"
        "def kill(part): part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole('a.json', kill)"
    )
    write_text("a.json", "old")
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, **HELPERS}, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert Path("a.json").read_text() == "old"
    (left,) = Path().glob(".part-*")
    write_text("a.json", "new")
    assert left.exists()  # It may still be written to.
    os.utime(left, (0, left.stat().st_mtime - LEFT_SECONDS - 1))
    write_text("a.json", "new")
    assert [file.name for file in Path().iterdir()] == ["a.json"]


def test_everything_is_written_so():
    """No file of the package writes a file in another way."""
    ways = r"\.write_text\(|\.write_bytes\(|\.to_csv\(|\.to_parquet\(|\.savefig\(|save_file\(|torch\.save\("
    found = set()
    for folder in ("lightning_limber", "callbacks"):
        for path in (REPO / folder).rglob("*.py"):
            if path.parent.name == "data":  # Caches that only help, and are made anew.
                continue
            for line in path.read_text().splitlines():
                if re.search(ways, line) and "part" not in line and "buffer" not in line:
                    found.add(str(path.relative_to(REPO / folder)))
    assert found <= STREAMED


@pytest.fixture
def checkpoints(straight) -> Path:
    shutil.copytree(straight / "runs", "runs")
    return Path("runs/default/version_0/checkpoints")


def test_a_flipped_bit_is_refused(checkpoints):
    path = checkpoints / "epoch_3.ckpt"
    content, true = path.read_bytes(), read_checkpoint(path)
    draw = random.Random(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        message = ""
        try:
            found = read_checkpoint(path)
        except ValueError as error:
            message = str(error)
        if message:
            assert "epoch_3.ckpt' is damaged" in message
            assert "Whole beside it: epoch_1.ckpt, epoch_2.ckpt, last.ckpt." in message
            refused += 1
        else:  # A bit that nobody reads: of the padding between members, or of a date.
            assert str(found) == str(true)
            for name, value in true["state_dict"].items():
                assert torch.equal(found["state_dict"][name], value)
    assert refused > 30


@pytest.mark.parametrize("size", [0, 1, 4096, -4096, -1])
def test_a_cut_file_is_refused(checkpoints, fit, size):
    path = checkpoints / "last.ckpt"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"last\.ckpt' is damaged .* Whole beside it: epoch_1"):
        fit("--ckpt_path=last", *crash_flags("batches"), base=False)
    with pytest.raises(ValueError, match=r"adapter_weights=.*last\.ckpt is damaged"):
        fit(f"--model.adapter_weights={path}")


def test_a_damaged_run_json_stops_no_run(checkpoints, fit):
    path = checkpoints.parent / "run.json"
    path.write_text(path.read_text()[:100])
    with pytest.warns(UserWarning, match="it is kept as"):
        fit(f"--ckpt_path={checkpoints / 'epoch_2.ckpt'}", *crash_flags("batches"), base=False)
    assert len(json.loads(path.read_text())) == 1
    assert len(path.with_name("run.damaged.json").read_text()) == 100
