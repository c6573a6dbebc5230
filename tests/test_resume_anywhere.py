"""Wherever a run ended and whoever saved, the run that goes on is the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import Crash
from runs import assert_equal, batches, crash_flags, final, scalars

from lightning_limber.models.optimizer import OptimizerConfig, lr_factor

EXTRA = ["--model.adapter.dropout=0.3", "--model.optimizer.total_steps=12"]
RUN = Path("runs/default/version_0")
LAST = f"--ckpt_path={RUN}/checkpoints/last.ckpt"


def with_callback(class_path: str, **init_args: Any) -> str:
    """Puts a callback beside the one that writes the batches down."""
    log = {"class_path": "crash.CrashAt", "init_args": {"log": "batches"}}
    return f"--trainer.callbacks={json.dumps([log, {'class_path': class_path, 'init_args': init_args}])}"


def saving(**init_args: Any) -> str:
    return with_callback("lightning.pytorch.callbacks.ModelCheckpoint", **init_args)


def test_a_step_that_is_done_again_is_logged_once(straight, fit):
    with pytest.raises(Crash):
        fit(*EXTRA, "--checkpoint.every_n_steps=5", *crash_flags("batches", "batch_start", 7))
    fit(LAST, *crash_flags("batches"), base=False)
    for tag in ("train/loss", "val/loss"):
        assert scalars(RUN, tag) == scalars(straight / RUN, tag)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_that_is_no_number_is_saved(fit, what):
    """Whoever saves; Lightning's callback does so before the run's own looks at the loss."""
    poison = {"class_path": "crash.Poison", "init_args": {"step": 5, "what": what}}
    options = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_exception": True}
    other = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}
    flags = [f"--trainer.callbacks={json.dumps([poison, other])}", "--trainer.log_every_n_steps=100"]
    with pytest.raises(FloatingPointError, match=r"not finite in step 6 \(learning rate 1\.59e-02\)"):
        fit(*EXTRA, *flags)
    for path in (RUN / "checkpoints").glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        assert saved["global_step"] <= 5
        assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


def assert_same_run(root: Path) -> None:
    assert batches(Path("batches.0")) == batches(root / "batches.0")
    assert_equal(final(RUN), final(root / RUN))


@pytest.mark.parametrize("steps", [6, 8])
def test_prolonged_after_max_steps(straight, fit, steps):
    fit(*EXTRA, f"--trainer.max_steps={steps}", *crash_flags("batches"))
    fit(LAST, "--trainer.max_steps=12", *crash_flags("batches"), base=False)
    assert_same_run(straight)
    names = [path.name for path in sorted((RUN / "checkpoints").iterdir())]
    assert names == ["epoch_1.ckpt", "epoch_2.ckpt", "epoch_3.ckpt", "last.ckpt"]


@pytest.mark.parametrize("at", [6])
def test_stopped_by_should_stop(straight, fit, at):
    fit(*EXTRA, with_callback("crash.StopAt", batches=at))
    assert len(batches(Path("batches.0"))) == at
    fit(LAST, with_callback("crash.StopAt", batches=-1), base=False)
    assert_same_run(straight)


def test_stopped_between_the_parts_of_a_step(fit, tmp_path):
    """Gradients are not saved: the step's first batch is read again."""
    flags = [*EXTRA, "--trainer.accumulate_grad_batches=3", "--trainer.max_steps=5"]
    fit(*flags, *crash_flags("straight"))
    fit(*flags, with_callback("crash.StopAt", batches=6))
    path = Path("runs/default/version_1")
    fit(f"--ckpt_path={path}", with_callback("crash.StopAt", batches=-1), base=False)
    assert_equal(final(path), final(RUN))
    assert sorted(batches(Path("batches.0"))) == sorted(batches(Path("straight.0")))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("epoch=0-step=4", {}, id="end of an epoch"),
        pytest.param("epoch=1-step=8", {"save_on_train_epoch_end": False}, id="end of validation"),
        pytest.param("epoch=0-step=2", {"every_n_train_steps": 2}, id="mid epoch 0"),
        pytest.param("epoch=1-step=6", {"every_n_train_steps": 2}, id="mid epoch 1"),
        pytest.param("epoch=1-step=8", {"every_n_train_steps": 2}, id="last batch of an epoch"),
    ],
)
def test_files_of_model_checkpoint(straight, fit, name, options):
    fit(*EXTRA, saving(save_top_k=-1, **options))
    at = int(name.rpartition("=")[2])
    lines = batches(Path("batches.0"))
    Path("batches.0").write_text("\n".join(lines[:at]) + "\n")
    for path in (RUN / "checkpoints").glob("epoch_*.ckpt"):
        path.unlink()
    fit(f"--ckpt_path={RUN}/checkpoints/{name}.ckpt", saving(save_top_k=-1, **options), base=False)
    assert_same_run(straight)
    # What an epoch ends with came after the file, unless it was of the end.
    ended = at // 4 if options == {} else (at - 1) // 4
    assert len(list((RUN / "checkpoints").glob("epoch_*.ckpt"))) == 3 - ended


def test_a_file_of_weights_alone_is_refused(fit):
    flag = saving(save_weights_only=True, save_top_k=-1)
    fit(*EXTRA, flag, "--trainer.max_steps=4")
    with pytest.raises(ValueError, match="holds weights only"):
        fit(f"--ckpt_path={RUN}/checkpoints/epoch=0-step=4.ckpt", flag, base=False)


@pytest.mark.parametrize(
    ("hook", "step"),
    [("validation_start", 6), ("validation_start", 8), ("validation_start", 12), ("epoch_end", 12)],
)
def test_validation_that_was_killed_is_made_up(fit, hook, step):
    """Also in the middle of an epoch, and of a run that has all its steps."""
    flags = [*EXTRA, "--trainer.val_check_interval=2"]
    fit(*flags, *crash_flags("straight"))
    with pytest.raises(Crash):
        fit(*flags, *crash_flags("batches", hook, step))
    path = Path("runs/default/version_1")
    fit("--ckpt_path=last", *crash_flags("batches"), base=False)
    assert batches(Path("batches.0")) == batches(Path("straight.0"))
    assert_equal(final(path), final(RUN))
    for tag in ("val/loss", "train/loss"):
        assert scalars(path, tag) == scalars(RUN, tag)
    assert len(scalars(path, "val/loss")) == 6
    assert (path / "checkpoints/epoch_3.ckpt").is_file()


def test_a_run_is_made_longer(fit, capsys, caplog):
    """The schedule follows trainer.max_steps again, and the run says what that changes."""
    fit("--model.optimizer.warmup_steps=2", "--trainer.max_steps=6", *crash_flags("batches"))
    with caplog.at_level("INFO"):
        fit("--ckpt_path=last", "--trainer.max_steps=12", *crash_flags("batches"), base=False)
    line = "the schedule of 6 steps is stretched to 12: the learning rate goes from 0.00e+00 to 1.31e-02"
    assert f"{line} at step 6" in caplog.text
    config = OptimizerConfig(lr=0.02, warmup_steps=2, total_steps=12)
    rates = dict(scalars(RUN, "train/lr"))
    for step in range(6, 12):
        assert rates[step] == pytest.approx(0.02 * lr_factor(step, config), rel=1e-5)
    saved = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["optimizer"]["total_steps"] == 12
    # Also where the command is repeated from the config that it wrote.
    text = (RUN / "config.yaml").read_text()
    assert "total_steps: ${trainer.max_steps}" in text
    cli = fit(f"--config={RUN / 'config.yaml'}", "--trainer.max_steps=3", base=False)
    assert cli.model.optimizer_config.total_steps == 3
    with pytest.raises(ValueError, match="belongs to another run") as error:
        fit(f"--ckpt_path={RUN}", "--trainer.max_steps=9", *crash_flags("batches"), base=False)
    kept = "total_steps: 12 in the checkpoint, 9 now; --model.optimizer.total_steps=12 keeps"
    assert kept in str(error.value)
    assert "trainer.max_steps: 9, but the checkpoint is of step 12" in str(error.value)
