"""What is needed to read a run later and to repeat it: command, versions, hardware, hyper-parameters; and
what validation found.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.tensorboard.summary import hparams

from lightning_limber.data.collate import Batch
from lightning_limber.models.limber import Limber
from lightning_limber.probe.palette import Panel, ordered_groups
from lightning_limber.probe.tables import Row
from lightning_limber.utils.by_image import add_arrays, images_file
from lightning_limber.utils.checkpoints import FREE
from lightning_limber.utils.earlier_rows import earlier_rows
from lightning_limber.utils.files import write_text, write_whole
from lightning_limber.utils.flops import FlopCounter
from lightning_limber.utils.loop_state import measured_epoch

PACKAGES = (
    "lightning-limber",
    "torch",
    "lightning",
    "transformers",
    "sae-lens",
    "torchmetrics",
    "tensorboard",
    "omegaconf",
    "jsonargparse",
)
SCORES = ("cider_d", "bleu_4", "rouge_l", "clip_score", "ref_clip_score")
Interval = tuple[float, float, float]
HPARAM_METRICS = ("val/loss", "val/loss_shuffled", "val/accuracy", "captions/cider_d", "captions/all")


class RunRecord(pl.Callback):
    """Writes ``run.json`` into the run's folder and hyper-parameters to TensorBoard, and logs its costs.

    Held-out loss and accuracy of each validation go to ``validation.csv`` (run, epoch, step, split, metric,
    value, low, high), with 95 % bootstrap intervals over images, and by image to ``images_epoch_{n}.npz``
    (by_image.py). What `test` finds goes to ``test.csv`` and ``test_images_epoch_{n}.npz``, as the last
    epoch that the checkpoint finished.

    ``run.json`` lists, for each start of the run (a resumed one has several): command, versions, device,
    numbers of trained parameters and of images; and where it ended by itself, ``ended_at_step``.
    ``memory/peak_gb`` (1e9 bytes) is the device's on a GPU, the process' elsewhere. ``flops/step`` and
    ``flops/image`` are counted in forward and backward of the run's first batch, over all processes (see
    flops.py): other batches have captions of other lengths, and with `cache_features` later epochs have no
    encoder. Compiled layers cannot be counted.
    """

    def __init__(self) -> None:
        self._session_end: Any = None
        self._counter: FlopCounter | None = None
        self._records = 0
        self.history: dict[int, tuple[int, dict[str, Interval]]] = {}
        """Epoch and scores of each validation, by step."""
        self._names: dict[int, str] = {}
        self._folder: str | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._folder = trainer.log_dir  # Asks all processes.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self._folder:
            self._write(Path(self._folder), trainer, pl_module, data)
        settings = flat({"model": dict(pl_module.hparams), "data": dict(data.hparams)})
        # Not by log_hyperparams: Lightning's also logs the metrics as scalars of step 0. The tab shows
        # the newest value of each of these tags.
        start, session, self._session_end = hparams(settings, dict.fromkeys(HPARAM_METRICS, 0.0))
        self._summaries(trainer, start, session)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(self._folder) / "run.json" if self._folder and trainer.is_global_zero else None
        if path and (starts := earlier_starts(path)):
            starts[-1]["ended_at_step"] = trainer.global_step
            write_text(path, json.dumps(starts, indent=1))
        if self._session_end is not None:
            self._summaries(trainer, self._session_end)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == batch_idx == 0 and not pl_module.hparams["compile_llm"]:
            self._records = len(batch.ids)
            self._counter = FlopCounter()
            self._counter.__enter__()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._counter is None:
            return
        counter, self._counter = self._counter, None
        counter.__exit__(None, None, None)
        counts = torch.tensor([counter.total, self._records], device=pl_module.device)
        flops, records = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        scalars = {"flops/step": flops * trainer.accumulate_grad_batches, "flops/image": flops / records}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # It would count on in whatever this process does next.
        if self._counter is not None:
            self._counter.__exit__(None, None, None)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(pl_module.device)
        else:
            import resource  # Not on Windows.

            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        for logger in trainer.loggers:
            logger.log_metrics({"memory/peak_gb": peak / 1e9}, step=trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._names = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._names |= zip(batch.index, batch.image_ids, strict=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes down what the module found at the end of the epoch, after its callbacks."""
        assert isinstance(pl_module, Limber)
        found = pl_module.held_out_sums
        if trainer.sanity_checking or found is None:
            return
        folder = trainer.log_dir  # Asks all processes.
        names = dict(gather(trainer, list(self._names.items())))
        step, testing = trainer.global_step, trainer.state.fn == "test"
        epoch, _ = measured_epoch(trainer)
        history = {} if testing else self.history
        history[step] = epoch, found.scores
        if not trainer.is_global_zero or not folder or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        write_validation(Path(folder) / ("test.csv" if testing else "validation.csv"), history, testing)
        arrays = {name: sums.numpy() for name, sums in found.by_image().items()}
        arrays["names"] = np.array([names[i] for i in found.index.tolist()])
        add_arrays(images_file(Path(folder), epoch, testing), "held_out", arrays)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end

    def state_dict(self) -> dict[str, Any]:
        newest = sorted(self.history)[-1:]  # The others stand in validation.csv.
        found = {step: self.history[step] for step in newest}
        return {
            "history": {
                step: [epoch, {name: list(score) for name, score in scores.items()}]
                for step, (epoch, scores) in found.items()
            },
            "table": "validation.csv",
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["callbacks"].get(self.state_key, {})
        kept = {
            step: (epoch, {name: (value, low, high) for name, (value, low, high) in scores.items()})
            for step, (epoch, scores) in state.get("history", {}).items()
        }
        self.history = {}
        if kept and "table" in state:  # Older checkpoints hold all steps.
            for row in earlier_rows(trainer, state["table"], "step", max(kept)):
                scores = self.history.setdefault(row["step"], (row["epoch"], {}))[1]
                scores[row["metric"]] = row["value"], row["low"], row["high"]
        self.history |= kept

    def _write(self, folder: Path, trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> None:
        path = folder / "run.json"
        starts = earlier_starts(path)
        cuda = trainer.strategy.root_device.type == "cuda"
        starts.append(
            {
                "command": shlex.join(["python", *sys.orig_argv[1:]]),
                "from_step": trainer.global_step,
                "device": torch.cuda.get_device_name()
                if cuda
                else f"CPU, {torch.get_num_threads()} threads",
                "processes": trainer.world_size,
                "precision": str(trainer.precision),
                "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
                "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
                "images": {"train": len(data.train_set), "held out": len(data.val_set)},
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(starts, indent=1))

    @staticmethod
    def _summaries(trainer: Any, *summaries: Any) -> None:
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_hparams"):
                for summary in summaries:
                    logger.experiment._get_file_writer().add_summary(summary)


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """What ``run.json`` holds; a damaged one is put aside, so that the run goes on."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        kept = path.replace(path.with_name("run.damaged.json"))
        rank_zero_warn(f"{path} is damaged ({error}): it is kept as {kept}, and a new one begins.")
        return []


def gather(trainer: pl.Trainer, items: list) -> list:
    """The items of all processes."""
    if trainer.world_size == 1:
        return items
    parts: list[list] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def write_validation(
    path: Path, history: dict[int, tuple[int, dict[str, Interval]]], testing: bool = False
) -> None:
    """All validations so far as one tidy table."""
    import pandas as pd

    run = f"{path.parent.parent.name}/{path.parent.name}"
    split = "test" if testing else "val"
    table = pd.DataFrame(
        [
            (run, epoch, step, split, name, *score)
            for step, (epoch, scores) in sorted(history.items())
            for name, score in scores.items()
        ],
        columns="run epoch step split metric value low high".split(),
    )
    write_whole(path, lambda part: table.to_csv(part, index=False))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``a.b.c: value``, without those that change speed alone; lists become text."""
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        if name in FREE - {"adapter_weights"}:
            continue
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return leaves


def log_figure(trainer: Any, tag: str, figure: Any) -> None:
    """Hands a matplotlib figure to every logger that takes figures (TensorBoard, W&B); None is left out.

    Where none does, the newest is a PNG in the run's folder.
    """
    if figure is None:
        return
    taken = False
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_figure"):
            logger.experiment.add_figure(tag, figure, global_step=trainer.global_step)
        elif hasattr(logger, "log_image"):
            logger.log_image(tag, [figure], step=trainer.global_step)
        else:
            continue
        taken = True
    if not taken and trainer.run_folder:
        path = Path(trainer.run_folder) / f"{tag.replace('/', '_')}.png"
        write_whole(path, partial(figure.savefig, dpi=80))


def log_table(trainer: Any, tag: str, table: Any) -> None:
    """Hands a data frame to every logger that takes tables (W&B)."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(tag, dataframe=table, step=trainer.global_step)


def log_layout(trainer: Any, rows: list[Row], panels: Sequence[Panel]) -> None:
    """Lays out the charts in every logger that can (TensorBoard: the first layout of a run counts)."""
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_custom_scalars"):
            logger.experiment.add_custom_scalars(chart_layout(rows, panels))


def chart_layout(rows: list[Row], panels: Sequence[Panel]) -> dict[str, dict[str, list]]:
    """TensorBoard's CUSTOM SCALARS: one metric's layers in one chart, one layer's groups in one chart."""
    layers = sorted({row.layer for row in rows if row.layer is not None})
    measured = {row.metric for row in rows}
    labels = {panel.metric: panel.label for panel in panels if panel.metric in measured}
    groups = "|".join(ordered_groups(row.group for row in rows))
    layout = {
        "training": {
            "loss": ["Multiline", ["train/loss$", "val/loss"]],
            "accuracy": ["Multiline", ["train/accuracy$", "val/accuracy$"]],
            "captions: slot accuracy, and without looking": ["Multiline", [r"captions(_\w+)?/all$"]],
            "captions: CIDEr-D, and without looking": ["Multiline", [r"captions(_\w+)?/cider_d$"]],
            "captions: scores": ["Multiline", [f"captions/({'|'.join(SCORES)})$"]],
        },
        "image tokens, all layers": {
            label: ["Multiline", [rf"{metric}/image/layer_\d+$"]] for metric, label in labels.items()
        },
    }
    for layer in layers:
        layout[f"layer {layer:02d}, all groups"] = {
            label: ["Multiline", [f"{metric}/({groups})/layer_{layer:02d}$"]]
            for metric, label in labels.items()
        }
    return layout
