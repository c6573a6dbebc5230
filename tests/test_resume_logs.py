"""Wherever a run was killed, every point stands once in the event files and the tables are whole."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from crash import Crash
from process import REPO, run_here
from runs import assert_equal, curves, final

from lightning_limber.callbacks import Checkpoints
from lightning_limber.utils.checkpoints import read_checkpoint

RUN = Path("runs/default/version_0")
EXTRA = ["--model.adapter.dropout=0.3", "--trainer.val_check_interval=2", "--trainer.max_steps=8"]
EXTRA += ["--probe.metrics=[direction]", "--captions.num_shown=0"]

TABLES = ("probe.csv", "captions.csv", "captions_baselines.json", "validation.csv")


def points(folder: Path) -> dict[str, list]:
    """All points (as text: NaN is NaN); of those that depend on the machine, the steps alone."""
    found = curves(folder)
    for tag in found:
        if tag.startswith(("memory/", "probe_seconds/")):
            found[tag] = [(step, 0.0) for step, _ in found[tag]]
    return {tag: list(map(repr, points)) for tag, points in found.items()}


@pytest.fixture
def kill_at_save(monkeypatch):
    """Ends the run before or after it saves for the n-th time."""
    save = Checkpoints._save

    def arm(number: int, before: bool) -> None:
        saved = iter(range(1, 1000))

        def crash(*args) -> None:
            now = next(saved)
            if now != number or not before:
                save(*args)
            if now == number:
                raise Crash

        monkeypatch.setattr(Checkpoints, "_save", crash)

    yield arm
    monkeypatch.undo()


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    """2 epochs of 4 steps, validated after every second."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, root, "fit", *tiny.arguments(models), *EXTRA)
    return root / RUN


# A run saves: step 1, step 2, validation, step 3, step 4, validation, epoch_1.ckpt, last.ckpt, step 5, ...
@pytest.mark.parametrize(
    ("number", "before"),
    [
        pytest.param(1, False, id="between save and log of a step"),
        pytest.param(4, True, id="validated in mid-epoch, a step logged and not saved"),
        pytest.param(4, False, id="after a step behind a validation"),
        pytest.param(5, False, id="between save and log of an epoch's last step"),
        pytest.param(6, True, id="validated, not saved"),
        pytest.param(6, False, id="before the end of an epoch"),
        pytest.param(7, True, id="probed, not saved"),
        pytest.param(8, False, id="after an epoch's end"),
        pytest.param(10, True, id="a step after an epoch's end"),
    ],
)
def test_every_point_stands_once(whole, fit, kill_at_save, number, before):
    kill_at_save(number, before)
    with pytest.raises(Crash):
        fit(*EXTRA, probe=True)
    kill_at_save(0, False)
    fit("--ckpt_path=last", base=False)
    assert points(RUN) == points(whole)
    for name in TABLES:
        assert (RUN / name).read_bytes() == (whole / name).read_bytes()
    assert_equal(final(RUN), final(whole))


# -- a run that ends inside an epoch -------------------------------------------------------------------

STEPS = "--trainer.max_steps=6"
TIME = {"steps": [STEPS], "time": ["--trainer.max_time=00:00:01:00"]}


def tick_by_steps(monkeypatch) -> None:
    """Lightning's Timer on a clock that goes on by ten seconds a step."""
    fake = types.SimpleNamespace(now=0, monotonic=lambda: fake.now)
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", fake)

    def tick(*args) -> None:
        fake.now += 10

    monkeypatch.setattr(Checkpoints, "on_before_zero_grad", tick, raising=False)


@pytest.fixture(scope="module", params=TIME)
def short(request, models, tmp_path_factory) -> tuple[list[str], Path]:
    """Flags of a run that ends inside an epoch, and the run that nobody killed."""
    flags = [*EXTRA, "--trainer.val_check_interval=4", *TIME[request.param]]
    root = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        tick_by_steps(patch)
        run_here(patch, root, "fit", *tiny.arguments(models), *flags)
    return flags, root / RUN


# It saves: steps 1 to 4, validation, epoch_1.ckpt, last.ckpt, step 5, step 6, validation, last.ckpt.
@pytest.mark.parametrize(
    ("number", "before"),
    [
        pytest.param(9, False, id="before the last validation"),
        pytest.param(10, True, id="validated, not saved"),
        pytest.param(10, False, id="before the last probe"),
        pytest.param(11, True, id="probed, not saved"),
    ],
)
def test_the_end_of_a_run_is_made_up(short, fit, monkeypatch, kill_at_save, number, before):
    flags, run = short
    tick_by_steps(monkeypatch)
    kill_at_save(number, before)
    with pytest.raises(Crash):
        fit(*flags, probe=True)
    kill_at_save(0, False)
    fit(f"--ckpt_path={RUN}", base=False)
    assert points(RUN) == points(run)
    for name in TABLES:
        assert (RUN / name).read_text() == (run / name).read_text()
    assert_equal(final(RUN), final(run))
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == 6
    # Once: there is nothing left to make up.
    before = {path: path.read_bytes() for path in RUN.glob("*.csv")}
    fit(f"--ckpt_path={RUN}", base=False)
    assert points(RUN) == points(run)
    assert {path: path.read_bytes() for path in RUN.glob("*.csv")} == before


@pytest.mark.parametrize("number", [9, 10, 11])
def test_a_run_whose_end_was_killed_is_made_longer(whole, fit, kill_at_save, number):
    flags = [*EXTRA, "--trainer.val_check_interval=4", "--model.optimizer.total_steps=8", STEPS]
    kill_at_save(number, False)
    with pytest.raises(Crash):
        fit(*flags)
    kill_at_save(0, False)
    fit(f"--ckpt_path={RUN}", "--trainer.max_steps=8", base=False)
    assert_equal(final(RUN), final(whole))
    assert [step for step, _ in curves(RUN)["train/loss"]] == list(range(8))


# -- tables, of which a checkpoint holds the ends alone ------------------------------------------------


def test_a_checkpoint_does_not_grow(fit):
    fit(*EXTRA, "--data.train_size=4", "--trainer.val_check_interval=1", probe=True)
    sizes = [(RUN / f"checkpoints/epoch_{n}.ckpt").stat().st_size for n in (2, 8)]
    assert abs(sizes[1] - sizes[0]) < 500  # Six epochs' rows are ten thousand bytes.


@pytest.fixture
def run(whole):
    """A copy of the whole run, which goes on from its first epoch."""
    shutil.copytree(whole, RUN)
    return RUN


@pytest.mark.parametrize("change", ["missing", "damaged", "cut"])
def test_a_table_that_is_gone_is_said(run, fit, change):
    path, text = run / "probe.csv", (run / "probe.csv").read_text()
    if change == "missing":
        path.unlink()
    else:
        path.write_text("\x00" if change == "damaged" else text[: len(text) // 9])
    why = re.escape(str(path)) + " is " + ("missing" if change == "missing" else "damaged")
    with pytest.warns(match=f"{why}.*before epoch 1 are lost, and a new table begins") as warned:
        fit(f"--ckpt_path={run}/checkpoints/epoch_1.ckpt", base=False)
    assert sum("a new table begins" in str(warning.message) for warning in warned) == 1
    assert path.read_text() == text  # The checkpoint holds epochs 0 and 1.
    assert (run / "probe.damaged.csv").is_file() == (change != "missing")


def test_a_lone_checkpoint_knows_the_untrained_adapter(run, fit, tmp_path):
    shutil.copy(run / "checkpoints/last.ckpt", tmp_path / "lone.ckpt")
    cli = fit("--ckpt_path=lone.ckpt", base=False, command="validate")
    lines = (Path(cli.trainer.log_dir) / "probe.csv").read_text().splitlines()
    assert {line.split(",")[1] for line in lines[1:]} == {"0", "2"}


def test_a_checkpoint_with_all_its_rows_goes_on(run, fit):
    """As older versions wrote them: nothing is read from the tables."""
    path = run / "checkpoints/last.ckpt"
    checkpoint, first = (torch.load(run / f"checkpoints/{name}.ckpt") for name in ("last", "epoch_1"))
    for name in ("SAEProbe", "CaptionSamples", "RunRecord"):
        state = checkpoint["callbacks"][name]
        state["history"] |= first["callbacks"][name]["history"]
        del state["table"]
    torch.save(checkpoint, path)
    lines = {name: (run / name).read_text() for name in ("probe.csv", "captions.csv")}
    for name in lines:
        (run / name).unlink()
    fit(f"--ckpt_path={run}", "--trainer.max_steps=9", base=False)
    for name, text in lines.items():
        assert (run / name).read_text().startswith(text)


# -- one process at a time -------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_a_second_process_is_refused(run, fit):
    code = f"from lightning_limber.utils.run_lock import *; hold_run(Path({str(run)!r})); print(1); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": REPO}
    code = code.replace(str(run), str(run.resolve()))
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline()
        before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
        with pytest.raises(ValueError, match=rf"{run} is written by another process \({other.pid}\)"):
            fit(f"--ckpt_path={run}", base=False)
        assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
        other.kill()
    fit(f"--ckpt_path={run}", base=False)
