"""Signals to real processes: what is saved, what is said, the exit code, and the run that goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import tiny
from process import HELPERS, run_cli
from runs import assert_equal, batches, final

from lightning_limber.utils.checkpoints import read_checkpoint

RUN = Path("runs/default/version_0")
EXTRA = ["--model.adapter.dropout=0.3", "--checkpoint.every_n_steps=0"]


def signalled(name: str, step: int, hook: str = "backward", rank: int = 0, **more: int) -> str:
    init_args = {"step": step, "rank": rank, "name": name, "hook": hook, **more}
    log = {"class_path": "crash.CrashAt", "init_args": {"log": "batches"}}
    sender = {"class_path": "crash.Preempt", "init_args": init_args}
    return f"--trainer.callbacks={json.dumps([log, sender])}"


@pytest.mark.parametrize(
    ("name", "step", "hook", "saved", "code"),
    [
        pytest.param("SIGTERM", 5, "backward", 6, 143, id="SIGTERM in a step"),
        pytest.param("SIGINT", 5, "backward", 6, 130, id="Ctrl-C in a step"),
        pytest.param("SIGTERM", 3, "backward", 4, 143, id="last batch of an epoch"),
        pytest.param("SIGTERM", 8, "validation", 8, 143, id="validation"),
        pytest.param("SIGINT", 12, "epoch_end", 12, 130, id="last probe", marks=pytest.mark.slow),
    ],
)
def test_saved_and_resumed(straight, models, name, step, hook, saved, code):
    flags = [*tiny.arguments(models, probe=False), *EXTRA, signalled(name, step, hook)]
    stopped = run_cli("fit", *flags, env=HELPERS)
    assert stopped.returncode == code, stopped.stdout
    assert "Traceback" not in stopped.stdout
    line = f"[stop] {name}: {RUN}/checkpoints/last.ckpt holds step {saved}; go on with: "
    assert line in stopped.stdout
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == saved
    command = stopped.stdout.partition(line)[2].splitlines()[0].partition("lightning_limber ")[2].split()
    resumed = run_cli(*command, signalled(name, -1), env=HELPERS)
    assert resumed.returncode == 0, resumed.stdout
    assert batches(Path("batches.0")) == batches(straight / "batches.0")
    assert_equal(final(RUN), final(straight / RUN))
    assert (RUN / "checkpoints/epoch_3.ckpt").is_file()


def test_a_second_ctrl_c_stops_at_once(models):
    flags = [*tiny.arguments(models, probe=False), *EXTRA, signalled("SIGINT", 5, times=2)]
    stopped = run_cli("fit", *flags, env=HELPERS)
    assert stopped.returncode == 130, stopped.stdout
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == 4  # Before the step.


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_whole_process_group_gets_it(models, name):
    """A terminal and SLURM signal the loader's workers too, which the step under way still needs."""
    flags = [*tiny.arguments(models, probe=False), *EXTRA, "--data.num_workers=2"]
    flags.append(signalled(name, 5, group=True))
    stopped = run_cli("fit", *flags, env=HELPERS, start_new_session=True)
    assert stopped.returncode in (130, 143), stopped.stdout
    assert "Traceback" not in stopped.stdout
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == 6


def test_before_the_first_step(models):
    flags = [*tiny.arguments(models, probe=False), signalled("SIGTERM", 0, "train_start")]
    stopped = run_cli("fit", *flags, env=HELPERS)
    assert stopped.returncode == 143, stopped.stdout
    assert "[stop] SIGTERM: no step has been saved yet" in stopped.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "hook", "step", "launched"),
    [(0, "backward", 5, False), (1, "backward", 5, True), (0, "validation", 8, True)],
)
def test_two_processes_stop_together(models, tmp_path, rank, hook, step, launched):
    """Those that Lightning starts, and those of a launcher."""
    flags = [*tiny.arguments(models, probe=False), *EXTRA, "--trainer.devices=2", "--trainer.strategy=ddp"]
    flags.append(signalled("SIGTERM", step, hook, rank))
    stopped = run_cli("fit", *flags, env=HELPERS, processes=1 + launched)
    assert stopped.returncode == 143, stopped.stdout
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["global_step"] == (6 if step == 5 else 8)
    assert len(batches(Path("batches.0"))) == len(batches(Path("batches.1")))


def test_the_handlers_of_before_come_back(fit):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    fit("--trainer.max_steps=1")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
