"""Each run has a folder of its own, whatever logs it, and goes on there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_limber.utils.checkpoints import read_checkpoint
from lightning_limber.utils.trainer import Trainer, make_trainer

CSV = {
    "class_path": "lightning.pytorch.loggers.CSVLogger",
    "init_args": {"save_dir": "runs", "name": "csv"},
}
OTHER = {"class_path": "wandb_like.WandbLogger"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("logger", "parent"),
    [
        pytest.param(None, "runs/default", id="TensorBoard"),
        pytest.param(False, "runs/default", id="none"),
        pytest.param(True, "runs/default", id="Lightning's default"),
        pytest.param(CSV, "runs/csv", id="CSV"),
        pytest.param(OTHER, "logs/project", id="one without folders"),
        pytest.param([OTHER, CSV], "runs/csv", id="list"),
    ],
)
def test_each_run_has_its_own_folder(fit, logger, parent):
    flags = [] if logger is None else [f"--trainer.logger={json.dumps(logger)}"]
    first, second = (Path(parent) / f"version_{i}" for i in range(2))
    fit(*flags, "--trainer.max_steps=4")
    before = content(first)
    fit(*flags, "--trainer.max_steps=4")
    assert content(first) == before
    names = {"run.json", "config.yaml", "captions.csv"}
    for folder in (first, second):
        assert names <= {path.name for path in folder.iterdir()}
        assert (folder / "checkpoints/epoch_1.ckpt").is_file()
    before = content(second)
    again = flags if "wandb_like" in str(flags) else []  # A class of one's own is named again.
    fit("--ckpt_path=" + str(first), *again, "--trainer.max_steps=8", base=False)
    assert content(second) == before
    assert read_checkpoint(first / "checkpoints/last.ckpt")["global_step"] == 8
    assert len(json.loads((first / "run.json").read_text())) == 2
    assert sorted(path.name for path in Path(parent).iterdir()) == ["version_0", "version_1"]
    if "CSV" in str(flags):  # Lightning's deletes the file that is there.
        assert (first / "metrics_to_step_4.csv").is_file()
        assert (first / "metrics.csv").is_file()
    fit("--ckpt_path=last", *flags, "--trainer.max_steps=8")  # Of these settings: the newest there.


def test_nothing_is_overwritten(fit):
    flags = ["--trainer.logger.init_args.version=mine", "--trainer.max_steps=1"]
    fit(*flags)
    with pytest.raises(ValueError, match=r"runs/default/mine holds a run already: go on"):
        fit(*flags)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_two_runs_that_start_at_once_share_no_folder(kind):
    def start() -> str | None:
        return make_trainer(lambda: Trainer(logger=kind("runs", "mine"), accelerator="cpu"), "cpu").log_dir

    # Nothing is written in between.
    assert [start(), start()] == ["runs/mine/version_0", "runs/mine/version_1"]
    Path("runs/mine/version_0").rmdir()
    assert start() == "runs/mine/version_2"


@pytest.mark.parametrize("logger", [OTHER, CSV, False])  # TensorBoard: callbacks/test_tensorboard.py.
def test_figures_and_tables_reach_whoever_takes_them(fit, logger):
    cli = fit(f"--trainer.logger={json.dumps(logger)}", "--trainer.max_steps=1", probe=True, figures=True)
    names = [f"overview_{name}" for name in ("1_loss", "2_captions", "3_use", "4_lift", "5_excess")]
    figures = {path.name for path in Path(cli.trainer.log_dir, "figures").iterdir()}
    assert {f"{name}_epoch_1.png" for name in [*names, "by_layer_fvu", "captions"]} <= figures
    if logger is OTHER:
        [found] = cli.trainer.loggers
        assert {"captions Image", "Overview/3_use Image", "by_layer/fvu Image"} <= set(found.images)
        assert {"image", "text"} <= set(found.tables["probe/rows"]["group"])
        numbers = found.numbers
    elif logger is CSV:
        header = Path(cli.trainer.log_dir, "metrics.csv").read_text().splitlines()[0]
        numbers = header.split(",")
    if logger in (OTHER, CSV):
        assert {"train/loss", "val/loss", "captions/all", "use/image/layer_02"} <= set(numbers)


def test_predict_leaves_its_output_and_nothing_else(fit):
    run = fit("--trainer.max_steps=1", "--captions.num_images=0").trainer.log_dir
    before = content(Path("runs"))
    fit(f"--ckpt_path={run}", command="predict", base=False)
    assert content(Path("runs")) == before
    assert Path("captions.jsonl").read_text().count("\n") == 10
