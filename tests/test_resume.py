"""A resumed run is the uninterrupted run: same batches, bit-equal adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from crash import Crash
from process import HELPERS, run_cli
from runs import assert_equal, batches, crash_flags, final, scalars

from lightning_limber.utils.checkpoints import read_checkpoint

EXTRA = ["--model.adapter.dropout=0.3"]


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        pytest.param("batch_start", 2, id="mid epoch 0"),
        pytest.param("batch_start", 10, id="mid epoch 2"),
        pytest.param("validation_start", 8, id="last batch of an epoch"),
        pytest.param("epoch_start", 8, id="end of an epoch"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_bit_equal(straight, fit, hook, step, num_workers):
    flags = [*EXTRA, f"--data.num_workers={num_workers}"]
    with pytest.raises(Crash):
        fit(*flags, *crash_flags("batches", hook, step))
    assert read_checkpoint("runs/default/version_0/checkpoints/last.ckpt")["global_step"] == step
    # No other flag: the checkpoint knows its run.
    cli = fit("--ckpt_path=last", *crash_flags("batches"), base=False)
    assert cli.trainer.log_dir.endswith("version_0")
    assert batches(Path("batches.0")) == batches(straight / "batches.0")
    assert_equal(final(Path("runs/default/version_0")), final(straight / "runs/default/version_0"))


@pytest.mark.parametrize("hook", ["validation_start", "epoch_start"])
def test_every_epoch_is_validated_and_logged_once(straight, fit, hook):
    with pytest.raises(Crash):
        fit(*EXTRA, *crash_flags("batches", hook, 4))
    fit("--ckpt_path=last", *crash_flags("batches"), base=False)
    whole = straight / "runs/default/version_0"
    expected = scalars(whole, "val/loss")
    assert scalars(Path("runs/default/version_0"), "val/loss") == expected
    assert len(expected) == 3
    # The tables by run and by image are whole, and the same.
    tables = [root / "validation.csv" for root in (Path("runs/default/version_0"), whole)]
    assert len(tables[1].read_text().splitlines()) == 1 + 3 * 4
    assert tables[0].read_text() == tables[1].read_text()
    for n in (1, 2, 3):
        with (
            np.load(tables[0].with_name(f"images_epoch_{n}.npz")) as a,
            np.load(whole / f"images_epoch_{n}.npz") as b,
        ):
            assert np.array_equal(a["held_out/loss"], b["held_out/loss"])


@pytest.mark.slow
def test_kill_9(straight, models, tmp_path):
    path = HELPERS
    flags = [*tiny.arguments(models, probe=False), *EXTRA]
    killed = run_cli("fit", *flags, *crash_flags("batches", "batch_start", 6, kill=True), env=path)
    assert killed.returncode == -9, killed.stdout
    resumed = run_cli("fit", "--ckpt_path=last", *crash_flags("batches"), env=path)
    assert resumed.returncode == 0, resumed.stdout
    assert batches(Path("batches.0")) == batches(straight / "batches.0")
    assert_equal(final(Path("runs/default/version_0")), final(straight / "runs/default/version_0"))


def conversations(root: Path) -> list[str]:
    """Flags of a data set of which some records have no image."""
    from datasets_on_disk import write_llava

    root.mkdir()
    write_llava(root, 24)
    return [
        "--data=LLaVAConversations",
        f"--data.annotations={root / 'chat.json'}",
        f"--data.images={root}",
        "--data.val_share=0.2",
        "--data.length_window=3",
        "--data.batch_size=4",
        "--data.val_batch_size=4",
        "--model.prompt={conversation}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["scenes", "conversations"])
def test_kill_9_of_two_processes(models, tmp_path, data):
    """Lightning starts the second process of the run that is killed and goes on; with the other data a
    launcher does, which is much cheaper.
    """
    launched = {"env": HELPERS, "processes": 2}
    ranks = {"env": HELPERS, "processes": 1 if data == "scenes" else 2}
    flags = [*tiny.arguments(models, probe=False), *EXTRA]
    if data == "conversations":
        flags = [flag for flag in flags if not flag.startswith("--data.")]
        flags += conversations(tmp_path / "chat")
    flags += ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.num_workers=1"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    done = run_cli("fit", *flags, *crash_flags("batches"), **launched, cwd=tmp_path / "a")
    assert done.returncode == 0, done.stdout
    crash = crash_flags("batches", "batch_start", 6, kill=True)
    killed = run_cli("fit", *flags, *crash, **ranks, cwd=tmp_path / "b")
    assert killed.returncode != 0, killed.stdout
    flags = ["--ckpt_path=last", *crash_flags("batches")]
    resumed = run_cli("fit", *flags, **ranks, cwd=tmp_path / "b")
    assert resumed.returncode == 0, resumed.stdout
    for rank in (0, 1):
        a, b = (batches(tmp_path / run / f"batches.{rank}") for run in "ab")
        assert a == b
    runs = [tmp_path / run / "runs/default/version_0" for run in "ab"]
    assert_equal(final(runs[1]), final(runs[0]))


def test_checkpoint_is_small_and_plain(straight):
    path = straight / "runs/default/version_0/checkpoints/last.ckpt"
    assert path.stat().st_size < 300_000  # The tiny LLM alone has more; the adapter has 800 weights.
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {
        "adapter.calibrated",
        "adapter.input_norm.mean",
        "adapter.input_norm.std",
        "adapter.project.weight",
        "adapter.project.bias",
    }
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "epoch_1.ckpt",
        "epoch_2.ckpt",
        "epoch_3.ckpt",
        "last.ckpt",
    ]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.optimizer.lr=0.5", "model.optimizer.lr: 0.02 in the checkpoint, 0.5 now"),
        ("--data.batch_size=8", "data.batch_size: 4 in the checkpoint, 8 now"),
        ("--trainer.gradient_clip_val=7", "trainer.gradient_clip_val: 1.0 in the checkpoint, 7 now"),
        ("--model.prompt={image}{caption}", "model.prompt"),
        ("--seed_everything=5", "trainer.seed_everything: '0' in the checkpoint, '5' now"),
    ],
)
def test_a_changed_setting_stops_the_resume(straight, fit, flag, message):
    path = straight / "runs/default/version_0/checkpoints/epoch_1.ckpt"
    with pytest.raises(ValueError, match=r"belongs to another run") as error:
        fit(f"--ckpt_path={path}", flag, *crash_flags("batches"), base=False)
    assert message in str(error.value)


def test_last_without_a_run_stops(fit):
    with pytest.raises(FileNotFoundError, match="no run in 'runs/default' has saved a checkpoint"):
        fit("--ckpt_path=last")


def test_a_file_that_is_no_checkpoint_stops(fit, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="was not written by lightning_limber"):
        fit(f"--ckpt_path={tmp_path / 'other.ckpt'}")


def test_a_new_run_starts_from_a_finished_adapter(straight, fit):
    path = straight / "runs/default/version_0/checkpoints/last.ckpt"
    cli = fit(f"--model.adapter_weights={path}", "--trainer.max_steps=1", "--model.optimizer.lr=0")
    assert_equal(
        {f"adapter.{key}": value for key, value in cli.model.adapter.state_dict().items()},
        final(path.parents[1]),
    )


def test_adapter_weights_of_another_shape_stop(straight, fit):
    path = straight / "runs/default/version_0/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match="the adapter there is"):
        fit(f"--model.adapter_weights={path}", "--model.adapter=MLP")


def test_a_second_stage_starts_from_the_first_ones_adapter(models, fit, tmp_path):
    """LLaVA's two stages: captions, then conversations; the loss falls in both."""
    own = [flag for flag in tiny.arguments(models, probe=False) if not flag.startswith("--data.")]
    own += [*conversations(tmp_path / "chat"), "--trainer.max_steps=60", "--data.num_workers=0"]
    single = tmp_path / "chat/single.json"
    entries = json.loads((tmp_path / "chat/chat.json").read_text())
    single.write_text(
        json.dumps([{**e, "conversations": e["conversations"][:2]} for e in entries if "image" in e])
    )
    losses = {}
    stages = {
        "first": [f"--data.annotations={single}", "--model.prompt={bos}{image}{caption}{eos}"],
        "second": ["--model.adapter_weights=runs/first"],
    }
    for name, flags in stages.items():
        cli = fit(*own, *flags, f"--trainer.logger.init_args.name={name}", base=False)
        losses[name] = [value for _, value in scalars(Path(cli.trainer.log_dir), "val/loss")]
        assert losses[name][-1] < losses[name][0] - 0.1
    start = read_checkpoint(Path("runs/second/version_0/checkpoints/epoch_1.ckpt"))
    assert start["hyper_parameters"]["adapter_weights"] == "runs/first"
    Path("runs/empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no run that has saved a checkpoint"):
        fit(*own, "--model.adapter_weights=runs/empty", base=False)
