"""The SAE probe: how far the image tokens look like text to each layer of the LLM, as it trains.

As Venhoff et al. (arXiv 2506.11976) did once, after training; here before the first step and after
every epoch, over the same held-out images. This file says when the probe runs and where its numbers go;
what is measured is in lightning_limber/probe/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from lightning_limber.data.collate import Batch
from lightning_limber.models.frozen import fingerprint
from lightning_limber.models.limber import Limber
from lightning_limber.probe.config import ProbeConfig
from lightning_limber.probe.explorer import Explored, explore
from lightning_limber.probe.explorer_file import keep_ends, write_explorer
from lightning_limber.probe.figures import heatmap_figure, matrix_figure, panel_figure, patch_figure
from lightning_limber.probe.finding import drawn_charts, headline
from lightning_limber.probe.load import build_probe
from lightning_limber.probe.metrics import whole_spec
from lightning_limber.probe.metrics.base import IMAGE
from lightning_limber.probe.palette import write_panels
from lightning_limber.probe.passes import Probe, Report
from lightning_limber.probe.patches import PatchMap, patch_maps
from lightning_limber.probe.tables import (
    History,
    Row,
    arrays_by_image,
    frame,
    overview,
    scalars,
    write_tables,
)
from lightning_limber.utils.bootstrap import interval_tags
from lightning_limber.utils.by_image import add_arrays, images_file
from lightning_limber.utils.checkpoints import differences, measurement_differences, refuse
from lightning_limber.utils.earlier_rows import earlier_rows
from lightning_limber.utils.figures import chart_figure
from lightning_limber.utils.files import write_whole
from lightning_limber.utils.flops import FlopCounter
from lightning_limber.utils.loop_state import measured_epoch

from .captions import newest_captions
from .logs import headline_rows, log_figure, log_layout, log_numbers, log_table
from .run_record import gather

NUM_PATCH_IMAGES = 4
NUM_TRAINING_RECORDS = 256
"""Whose captions metrics may compare with."""


@dataclass
class Batches:
    """Held-out images on the device, always the same, as often as they are iterated."""

    trainer: pl.Trainer
    num_images: int
    label: str
    interventions: bool = False

    def __iter__(self) -> Iterator[Batch]:
        trainer = self.trainer
        hidden = not trainer.is_global_zero or not trainer.progress_bar_callback
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.probe_dataloader(self.num_images, self.interventions)
        for batch in tqdm(loader, self.label, leave=False, disable=hidden or None):  # None: no terminal.
            yield trainer.strategy.batch_to_device(batch)


class SAEProbe(pl.Callback):
    """Runs pretrained SAEs over held-out images and logs layer-wise alignment metrics.

    Numbers go to every logger as ``{metric}/{group}/layer_{l}``, with their 95 % bootstrap intervals to
    ``probe.csv`` and ``probe.parquet`` in the run's folder (run, epoch, layer, group, metric, value,
    low, high), by image to ``images_epoch_{n}.npz`` (by_image.py), and as figures to every logger that
    takes pictures and to ``figures/``.
    ``flops/probe`` is counted in the passes of the first probe.
    ``patches_epoch_{n}.jpg`` shows on which patches latents fire whose descriptions match the caption, at
    the layer where `match` is highest. ``explorer_epoch_{n}.gz`` is what the
    explorer of single image tokens in the report shows (explorer.py).

    Args:
        num_images: Held-out images to probe, spread over them by a hash: always the same.
        explorer_images: As many of them are shown token by token in the report.
        every_n_epochs: Epochs between two probes; 0 switches the probe off.
        before_training: Probe the untrained adapter too, as epoch 0: a control.
        published_curves: Draw the curves of Venhoff et al. (Gemma 2 2B) beside the run's own, by
            relative depth.
        log: Numbers that loggers get: ``overview``, a first look at five layers, or ``all``, as tables,
            figures and the report have them.
        config: See `ProbeConfig`.
    """

    def __init__(
        self,
        num_images: int = 256,
        explorer_images: int = 12,
        every_n_epochs: int = 1,
        before_training: bool = True,
        published_curves: bool = False,
        log: Literal["overview", "all"] = "overview",
        **config: Any,
    ) -> None:
        self.config = ProbeConfig(**config)
        self.num_images = num_images
        self.explorer_images = explorer_images
        self.every_n_epochs = every_n_epochs
        self.before_training = before_training
        self.published_curves = published_curves
        self.details = log == "all"
        self.history: History = {}
        self._saes: dict[str, str] = {}
        """Fingerprints by hook name, of this run or its checkpoint."""
        self._probe: Probe | None = None
        self._layout_logged = False

    @property
    def probe(self) -> Probe:
        """The probe, once a Trainer has started."""
        assert self._probe is not None
        return self._probe

    @property
    def intervention_images(self) -> int:
        """Probed images on which metrics intervene."""
        return min(self.config.intervention_images, self.num_images)

    # -- when -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the SAEs and checks them before anything is trained: an error comes at once."""
        self._probe = None  # Of an earlier run in this process, with its model and captions.
        self._saes = self._saes if trainer.ckpt_path else {}
        if self.every_n_epochs:
            self._prepare(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Probes the untrained adapter, as epoch 0; not when a run is resumed."""
        if self.every_n_epochs and self.before_training and trainer.global_step == 0:
            self._run_and_log(trainer, pl_module, 0, "epoch 0")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, label = measured_epoch(trainer)
        ends = trainer.should_stop or epoch == trainer.max_epochs  # At max_steps Checkpoints asks for it.
        if self.every_n_epochs and (ends or epoch % self.every_n_epochs == 0):
            self._run_and_log(trainer, pl_module, epoch, label)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """`validate` probes the checkpoint that it is given, as the epoch that it is of, once its captions
        are written.
        """
        if self.every_n_epochs and trainer.state.fn == "validate":
            self._prepare(trainer, pl_module)
            self._run_and_log(trainer, pl_module, *measured_epoch(trainer))

    @property
    def state_key(self) -> str:
        return "SAEProbe"

    def state_dict(self) -> dict[str, Any]:
        kept = {0, max(self.history, default=0)} & self.history.keys()  # The others stand in probe.csv.
        panels = self._probe.panels if self._probe is not None else []
        return {
            "history": {epoch: [list(row) for row in self.history[epoch]] for epoch in sorted(kept)},
            "table": "probe.csv",
            "settings": self.settings if kept else None,
            "saes": self._saes,
            "panels": [asdict(panel) for panel in panels],
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["callbacks"].get(self.state_key, {})
        kept = {epoch: [Row(*row) for row in rows] for epoch, rows in state.get("history", {}).items()}
        self.history = {}
        if kept and "table" in state:  # Older checkpoints hold all epochs.
            for row in earlier_rows(trainer, state["table"], "epoch", max(kept)):
                values = [row[name] for name in Row._fields]
                self.history.setdefault(row["epoch"], []).append(Row(*values))
        self.history |= kept
        self._saes = state.get("saes", {})
        if trainer.state.fn != "fit":
            self._begin_anew(measurement_differences(checkpoint["callbacks"], self))

    @property
    def settings(self) -> dict[str, Any]:
        """What enters the numbers."""
        metrics = [whole_spec(spec) for spec in self.config.metrics]
        return {"num_images": self.num_images, **asdict(self.config), "metrics": metrics}

    def _begin_anew(self, other: list[str]) -> None:
        """Leaves the run's rows out of the table of `validate` where they were measured otherwise."""
        if other and self.history:
            text = "\n  ".join(other)
            rank_zero_info(f"[probe] measured otherwise than the run, whose rows are left out:\n  {text}")
            self.history = {}

    # -- what -------------------------------------------------------------------------------------

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Limber)
        if self._probe is not None:
            return
        if self.num_images < trainer.world_size:
            raise ValueError(
                f"probe.num_images={self.num_images}: each of {trainer.world_size} processes needs one."
            )
        context = trainer.precision_plugin.val_step_context
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        texts = partial(data.training_captions, NUM_TRAINING_RECORDS)
        self._probe = build_probe(module, self.config, context, partial(gather, trainer), texts)
        saes = {name: fingerprint(sae) for name, sae in self._probe.saes.items()}
        other = differences(self._saes, saes, "probe.saes") if self._saes else []
        if trainer.state.fn == "fit":
            refuse(other)
        self._begin_anew(other)
        self._saes = saes

    def _run_and_log(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, label: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        # The first is counted: it alone reads the captions without an image.
        counter = FlopCounter() if trainer.state.fn == "fit" and not self.history else None
        untrained = epoch > 0 and module.hparams["adapter_weights"] is None
        report = self.probe.run(
            Batches(trainer, self.num_images, "Probing"),
            Batches(trainer, self.intervention_images, "Probing layer by layer", interventions=True),
            data.attributes,
            same_captions=trainer.state.fn == "fit",  # `validate` may be given other data.
            start=self.history.get(0, ()) if untrained else (),
            counter=counter,
        )
        explored = self._explore(trainer, epoch)
        report.seconds.update(self.probe.clock.take())
        self.history[epoch] = report.rows
        own = [
            panel.metric
            for metric in self.probe.metrics
            if not type(metric).__module__.startswith("lightning_limber.")
            for panel in metric.panels
        ]
        shown = report.rows if self.details else overview(report.rows, own)
        logged = scalars(shown)
        for row in headline_rows(shown):
            logged |= interval_tags(next(iter(scalars([row]))), row[-3:])
        logged |= {f"probe_seconds/{name}": spent for name, spent in report.seconds.items()}
        if counter is not None:
            count = torch.tensor(counter.total, device=module.device)
            logged["flops/probe"] = trainer.strategy.reduce(count, reduce_op="sum").item()
        patches = self._matching_patches(trainer, module, report.rows)
        folder = trainer.log_dir  # Asks all processes.
        if not trainer.is_global_zero:
            return
        log_numbers(trainer, logged)
        if not self._layout_logged:
            log_layout(trainer, report.rows, self.probe.panels, details=self.details)
            self._layout_logged = True
        files = Path(folder) if folder and not trainer.fast_dev_run else None  # type: ignore[attr-defined]
        if files:
            write_tables(files, self.history, epoch, report.tables)
            write_panels(self.probe.panels, files)
            arrays = arrays_by_image(report.by_image, report.images)
            add_arrays(images_file(files, epoch), "probe", arrays)
            if explored is not None and explored.names:
                file, written = files / f"explorer_epoch_{epoch}.gz", newest_captions(trainer)
                write_explorer(file, self.probe, explored, report.rows, written)
                keep_ends(files, self.history)
        log_table(trainer, "probe/rows", frame(report.rows).astype({"layer": float}))
        self._log_figures(trainer, module, epoch, label, report)
        if patches is not None:
            figure = patch_figure(*patches, report.rows)
            log_figure(trainer, "probe/patches", figure, epoch)
            if files and figure is not None:
                write_whole(files / f"patches_epoch_{epoch}.jpg", partial(figure.savefig, dpi=70))
        spent = f"{sum(report.seconds.values()):.0f} s"
        print(f"[probe] {label}: {', '.join(filter(None, [headline(report.rows), spent]))}")

    def _log_figures(
        self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int, label: str, report: Report
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        fresh = module.hparams["adapter_weights"] is None
        control = "untrained adapter" if fresh else "adapter at the start"
        num_images, panels = min(self.num_images, len(data.val_set)), self.probe.panels
        of = f"{num_images} held-out images, {label}"
        names = ("3_use", "5_excess", "4_lift")
        for name, chart in zip(names, drawn_charts(report.rows), strict=True):
            log_figure(trainer, f"Overview/{name}", chart_figure(chart), epoch)
        # One panel a figure: TensorBoard shows them as thumbnails.
        for panel in panels:
            figure = panel_figure(self.history, epoch, panel, of, control, self.published_curves)
            log_figure(trainer, f"by_layer/{panel.metric}", figure, epoch)
            if panel.by_epoch:
                log_figure(trainer, f"by_epoch/{panel.metric}", heatmap_figure(self.history, panel), epoch)
        layers = [self.probe.layers[hook] for hook in self.probe.hooks_of(IMAGE)]
        of = f"{min(self.intervention_images, num_images)} held-out images, {label}"
        for name, tables in report.matrices.items():
            for metric, table in tables.items():
                figure = matrix_figure(layers, metric, table, of)
                log_figure(trainer, f"{name}/{metric.replace(' ', '_')}", figure, epoch)

    def _explore(self, trainer: pl.Trainer, epoch: int) -> Explored | None:
        count = min(self.explorer_images, self.num_images)
        if not count:
            return None
        with self.probe.clock("explorer"):
            # Each process needs an image.
            batches = Batches(trainer, max(count, trainer.world_size), "Looking at tokens")
            return explore(self.probe, batches, with_contexts=epoch > 0)  # They make the page large.

    def _matching_patches(
        self, trainer: pl.Trainer, module: pl.LightningModule, rows: list[Row]
    ) -> tuple[list[torch.Tensor], list[str], list[list[PatchMap]], int] | None:
        """What `patch_figure` draws, at the layer where `match` is highest; None without `match` or where
        the image tokens are no places in the image.
        """
        assert isinstance(module, Limber)
        found = {row.layer: row.value for row in rows if (row.group, row.metric) == ("image", "match")}
        layer = max(found, key=lambda at: found[at], default=None)
        if layer is None:
            return None
        batch = next(iter(Batches(trainer, NUM_PATCH_IMAGES * trainer.world_size, "Patches")))
        maps = patch_maps(self.probe, batch, layer)
        if maps is None:
            return None
        images = list(module.vision.transform.undo(batch.pixel_values.float().cpu()))
        return images, [captions[0] for captions in batch.captions], maps, layer
