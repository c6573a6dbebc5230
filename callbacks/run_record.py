"""What is needed to read a run later and to repeat it: command, versions, hardware, hyper-parameters; and
what validation found.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_limber import __version__
from lightning_limber.data.collate import Batch
from lightning_limber.models.limber import Limber
from lightning_limber.probe.palette import COLOURS
from lightning_limber.utils.by_image import add_arrays, images_file
from lightning_limber.utils.earlier_rows import earlier_rows
from lightning_limber.utils.figures import Chart, Line, chart_figure
from lightning_limber.utils.files import write_text, write_whole
from lightning_limber.utils.flops import FlopCounter
from lightning_limber.utils.loop_state import measured_epoch

from .logs import add_summaries, hparam_summaries, log_figure, log_numbers

PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "sae-lens",
    "torchmetrics",
    "tensorboard",
    "omegaconf",
    "jsonargparse",
)
Interval = tuple[float, float, float]
MAX_POINTS = 200
"""Points of the training loss that are kept for its figure; longer curves are means of neighbours."""


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
        self.train_loss: list[list[float]] = []
        """Steps and values, thinned."""
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
        *start, self._session_end = hparam_summaries(pl_module, data)
        add_summaries(trainer, *start)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(self._folder) / "run.json" if self._folder and trainer.is_global_zero else None
        if path and (starts := earlier_starts(path)):
            starts[-1]["ended_at_step"] = trainer.global_step
            write_text(path, json.dumps(starts, indent=1))
        if self._session_end is not None:
            add_summaries(trainer, self._session_end)

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
        log_numbers(trainer, scalars)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        step, is_new = trainer.global_step, not trainer.fit_loop._should_accumulate()
        if is_new and step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.train_loss.append([step, float(trainer.callback_metrics["train/loss"])])
        if len(self.train_loss) == 2 * MAX_POINTS:
            pairs = zip(self.train_loss[::2], self.train_loss[1::2], strict=True)
            self.train_loss = [[b[0], (a[1] + b[1]) / 2] for a, b in pairs]

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
        log_numbers(trainer, {"memory/peak_gb": peak / 1e9})

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
        if not testing:
            log_figure(trainer, "Overview/1_loss", chart_figure(self._loss_chart()), epoch)

    def _loss_chart(self) -> Chart:
        def held_out(metric: str) -> list[tuple[float, float, float, float]]:
            found = sorted(self.history.items())
            return [(step, *scores[metric]) for step, (_, scores) in found if metric in scores]

        control = COLOURS["control"]
        lines = [
            Line([(*point, point[1], point[1]) for point in self.train_loss], control, "training", ":"),  # type: ignore[misc]
            Line(held_out("loss"), COLOURS["image"], "held out"),
            Line(held_out("loss_shuffled"), COLOURS["noise"], "held out, another image's caption"),
        ]
        return Chart("Loss, nats a token", "step", lines)

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
            "train_loss": self.train_loss,
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
        self.train_loss = [list(point) for point in state.get("train_loss", [])]

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
                "versions": {
                    "python": platform.python_version(),
                    "lightning-limber": __version__,  # A clone that is not installed has no metadata.
                    **{p: version(p) for p in PACKAGES},
                },
                "trained_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
                "images": {"train": len(data.train_set), "held out": len(data.val_set)},
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(starts, indent=1))


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
