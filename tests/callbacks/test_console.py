"""What a run says: one line while it trains, one a probe, and at its end what was found."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from process import run_cli

from lightning_limber.callbacks import console
from lightning_limber.callbacks.console import Progress, in_time
from lightning_limber.models.limber import Limber
from lightning_limber.probe.finding import headline
from lightning_limber.probe.tables import Row
from lightning_limber.utils.quiet import keep_quiet, without_loading_bars

RANK_ZERO = "pytorch.utilities.rank_zero"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (65, "1:05"), (600, "10:00"), (3661, "1:01:01")]
)
def test_times_are_legible(seconds, text):
    assert in_time(seconds) == text


class Terminal:
    """What stands in a terminal's line after it has been written to."""

    def __init__(self, is_terminal: bool) -> None:
        self.text, self.isatty = "", lambda: is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    @property
    def lines(self) -> list[str]:
        """Every state of the line that somebody saw."""
        return [line.strip() for line in re.split(r"[\r\n]", self.text) if line.strip()]


def train(monkeypatch, terminal: Terminal, total: float = 12) -> None:
    """Two epochs of four steps, one a second."""
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys, "stderr", terminal)
    loop = SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=False))
    trainer = SimpleNamespace(
        global_step=0,
        current_epoch=0,
        should_stop=False,
        estimated_stepping_batches=total,
        num_training_batches=4,
        accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(epoch_loop=loop),
        callback_metrics={"train/loss": torch.tensor(0.5)},
    )
    progress = Progress()
    progress.on_train_start(trainer, None)
    for step in range(1, 9):
        now[0] += 1.0
        trainer.global_step, trainer.current_epoch = step, (step - 1) // 4
        loop.batch_progress.is_last_batch = step % 4 == 0
        progress.on_train_batch_end(trainer, None, None, None, 0)


def test_a_terminal_has_one_line(monkeypatch):
    terminal = Terminal(True)
    train(monkeypatch, terminal)
    assert "\n" not in terminal.text
    assert terminal.lines[:2] == [
        "epoch 1/3, step 1/12, loss 0.500  █░░░░░░░░░░░░░░░░░░░  0:11 left",
        "epoch 1/3, step 2/12, loss 0.500  ███░░░░░░░░░░░░░░░░░  0:10 left",
    ]
    assert terminal.lines[-1].startswith("epoch 2/3, step 7/12, loss 0.500  ")
    assert terminal.text.endswith(" \r")  # Before others print it is wiped.
    assert all(len(line) < 80 for line in terminal.lines)


def test_a_log_file_has_a_line_each_tenth(monkeypatch):
    file = Terminal(False)
    train(monkeypatch, file, total=20)
    # Steps 4 and 8 end epochs, of which others say more.
    assert [line.partition(", loss")[0] for line in file.lines] == [
        "[train] epoch 1/5, step 2/20",
        "[train] epoch 2/5, step 5/20",
        "[train] epoch 2/5, step 6/20",
    ]


def test_a_run_without_an_end_has_no_time_left(monkeypatch):
    terminal = Terminal(True)
    train(monkeypatch, terminal, total=float("inf"))
    assert terminal.lines[0] == "epoch 1, step 1, loss 0.500"


def test_a_probe_in_a_line_names_its_controls():
    rows = [Row(layer, "image", "use", 1.5 - layer / 9, 0, 2) for layer in (0, 3)]
    rows += [Row(layer, "image", "neighbour_lift", 1.2 + layer, 0, 2) for layer in (0, 3)]
    rows += [Row(layer, "words_long", "neighbour_lift", 1.0 + layer / 10, 0, 2) for layer in (0, 3)]
    rows += [Row(3, "image", "excess_cosine_over_words_long", 0.25, 0, 2)]
    assert headline(rows) == (
        "use 1.50 at layer 0 (0: not read), lift 4.20 at layer 3 (words_long 1.30), "
        "excess 0.25 at layer 3 (words_long 0)"
    )
    assert headline([]) == ""


def test_a_run_says_what_it_found_and_what_to_do_next(models, tmp_path):
    flags = [flag for flag in tiny.arguments(models) if "enable_progress_bar" not in flag]
    # More steps between two logged ones than there are batches: Lightning has a warning for that.
    done = run_cli("fit", *flags, "--trainer.max_steps=4", "--trainer.log_every_n_steps=10", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert [line for line in lines if not re.match(r"\[[a-zA-Z ]+\] +\S", line)] == []  # Of others.
    assert "[device]    1 x cpu, 32-true" in lines
    assert len([line for line in lines if re.match(r"\[probe\] epoch \d: use .*\(.*\), \d+ s$", line)]) == 2
    assert len([line for line in lines if line.startswith("[captions]  ")]) == 1
    end = lines[next(i for i, line in enumerate(lines) if line.startswith("[done]")) :]
    run = "runs/default/version_0"
    assert re.fullmatch(rf"\[done\] +4 steps, \d+:\d\d; all of it is in {run}", end[0])
    assert re.fullmatch(
        r"\[best loss\] +\d\.\d{3} \[.*\] nats a token held out, at step 4 \(another image's caption: .*\)",
        end[1],
    )
    said = dict(re.fullmatch(r"\[([\w ]+)\] +(.*)", line).groups() for line in end)
    assert list(said) == "done,best loss,captions,found,report,TensorBoard,predict,go on".split(",")
    assert said["TensorBoard"] == "tensorboard --logdir runs/default"
    assert said["go on"].endswith(f"fit --ckpt_path {run} --trainer.max_steps 8")
    assert said["report"].endswith(f"report {run}")


def test_what_others_say_stays_but_for_some_lines(caplog):
    keep_quiet()
    keep_quiet()
    seed, trainer = (
        logging.getLogger(f"lightning.{name}") for name in ("fabric.utilities.seed", RANK_ZERO)
    )
    with caplog.at_level(logging.INFO, "lightning"):
        seed.info("Seed set to 3")
        seed.info("[rank: 1] Seed set to 3")
        trainer.info("GPU available: False, used: False")
        trainer.info("Enabled gradient checkpointing")
        logging.getLogger("mine").warning("Seed set to 3")
    assert caplog.messages == ["Enabled gradient checkpointing", "Seed set to 3"]
    with pytest.warns(UserWarning, match="smaller than the logging interval"):
        warnings.warn(
            "The number of training batches (3) is smaller than the logging interval", stacklevel=1
        )


def test_bars_of_downloads_stay():
    """Those of weights that are put into their places go, while ours are."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils.logging import is_progress_bar_enabled

    with without_loading_bars():
        assert not is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
    assert is_progress_bar_enabled()


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger", "False"])
def test_a_run_that_stops_before_its_first_step_leaves_nothing(fit, logger):
    flags = [] if logger == "TensorBoardLogger" else [f"--trainer.logger={logger}"]
    flags += ["--trainer.logger.save_dir=runs"] if logger == "CSVLogger" else []
    with pytest.raises(ValueError, match="sanity check"):
        fit("--probe.sanity_check=stop", *flags, probe=True)
    assert not list(Path().rglob("version_*"))


def test_what_was_measured_stays(fit, monkeypatch):
    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Limber, "training_step", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        fit(probe=True)
    assert Path("runs/default/version_0/probe.csv").is_file()
