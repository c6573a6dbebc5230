"""The SAE probe: how far the image tokens look like text to each layer of the LLM, as it trains.

As Venhoff et al. (arXiv 2506.11976) did once, after training; here before the first step and after
every epoch, over the same held-out images. This file says when it runs and where its numbers go; what
is measured is in lightning_limber/probe/passes.py, what is made of it in findings.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from lightning_limber.data.collate import Batch
from lightning_limber.models.limber import Limber
from lightning_limber.probe import sanity_check as gate
from lightning_limber.probe.findings import EXTRAS, Descriptions, PatchMap, ProbeConfig, Row
from lightning_limber.probe.passes import Probe
from lightning_limber.probe.saes import chunks_on_device, load_saes, release_folder
from lightning_limber.utils.flops import FlopCounter

from .figures import (
    History,
    cross_layer_figure,
    heatmap_figure,
    log_figure,
    patch_figure,
    probe_figure,
)
from .run_record import log_layout

NUM_PATCH_IMAGES = 4


@dataclass
class Batches:
    """The first held-out images on the device, as often as they are iterated."""

    trainer: pl.Trainer
    num_images: int
    label: str

    def __iter__(self) -> Iterator[Batch]:
        trainer = self.trainer
        hidden = not trainer.is_global_zero or not trainer.progress_bar_callback
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for batch in tqdm(data.probe_dataloader(self.num_images), self.label, leave=False, disable=hidden):
            yield trainer.strategy.batch_to_device(batch)


class SAEProbe(pl.Callback):
    """Runs pretrained SAEs over held-out images and logs layer-wise alignment metrics.

    Numbers go to every logger as ``{metric}/{group}/layer_{l}``, with their 95 % bootstrap intervals to
    ``probe.csv`` and ``probe.parquet`` in the run's folder (run, epoch, layer, group, metric, value,
    low, high), and as figures to TensorBoard. ``flops/probe`` is counted in the probe before training.
    ``patches_epoch_{n}.jpg`` shows on which patches latents fire whose descriptions match the caption, at
    the layer where `match` is highest.

    Args:
        sae_release: A SAELens release, a folder of SAELens folders, or ``shipped:NAME``.
        sae_id: Id of each layer's SAE, with ``{layer}``.
        layers: Which layers; null takes every layer that has an SAE.
        num_images: Held-out images (the first ones, always the same).
        every_n_epochs: Epochs between two probes; 0 switches the probe off.
        text_gate: What happens when the SAEs do not do on plain text what is known of them (see
            gate.py): ``stop``, ``warn`` or ``off``.
        extras: Metrics beside reconstruction and sparsity, each of which costs its own time (printed
            after every probe): noise, match, lens_hit, knn, detectors, loss_recovered, cross_layer.
        sae_memory_gb: Most that the SAEs' weights may take on the device, in 1e9 bytes; null keeps all.
            With a number they wait in host memory, and a probe makes its passes once for each chunk of
            layers that fits: more time, the same numbers.
        costly_images: Images for loss_recovered and cross_layer, which need many forwards.
        outlier_factor: Tokens of more than this many times the median norm of plain text are left out
            (attention sinks); their share is logged as ``outliers``.
        bootstrap_samples: Samples over images that the intervals rest on.
        descriptions: Folder or URL of each SAE's explanations in Neuronpedia's export format, with
            ``{layer}`` or ``{hook}`` in it; null takes those that ship with a release.
        top_latents: Latents of an image whose descriptions `match` looks at.
        max_image_share: `match` leaves out latents that fire on a larger share of the images.
        max_text_density: `match` leaves out latents that fire on a larger share of text tokens.
        lens_top_k: Tokens of the logit lens that `lens_hit` looks at, at each image position.
        knn: Neighbours of `knn`.
        detector_auroc: AUROC from which a latent counts as a detector of an attribute.
        published_curves: Draws the curves of Venhoff et al. (Gemma 2 2B) beside the run's own, by
            relative depth.
        seed: Of bootstrap and chance levels.
    """

    def __init__(
        self,
        sae_release: str = "suite:smollm2-135m-instruct",
        sae_id: str = "blocks.{layer}.hook_resid_post",
        layers: list[int] | None = None,
        num_images: int = 256,
        every_n_epochs: int = 1,
        text_gate: gate.Policy = "stop",
        extras: tuple[str, ...] = EXTRAS,
        costly_images: int = 64,
        outlier_factor: float = 10.0,
        bootstrap_samples: int = 1000,
        descriptions: str | None = None,
        top_latents: int = 3,
        max_image_share: float = 0.05,
        max_text_density: float = 0.005,
        lens_top_k: int = 5,
        knn: int = 10,
        detector_auroc: float = 0.8,
        published_curves: bool = False,
        seed: int = 0,
        sae_memory_gb: float | None = None,
    ) -> None:
        unknown = sorted(set(extras) - set(EXTRAS))
        if unknown:
            raise ValueError(f"probe.extras: {unknown} are not among {list(EXTRAS)}.")
        if bootstrap_samples < 1:
            raise ValueError(f"probe.bootstrap_samples={bootstrap_samples}: at least 1 is needed.")
        self.sae_release = sae_release
        self.sae_id = sae_id
        self.layers = layers
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.text_gate: gate.Policy = text_gate
        self.costly_images = min(costly_images, num_images)
        self.descriptions = descriptions
        self.published_curves = published_curves
        self.sae_memory_gb = sae_memory_gb
        self.config = ProbeConfig(
            extras=tuple(extras),
            outlier_factor=outlier_factor,
            bootstrap_samples=bootstrap_samples,
            top_latents=top_latents,
            max_image_share=max_image_share,
            max_text_density=max_text_density,
            lens_top_k=lens_top_k,
            knn=knn,
            detector_auroc=detector_auroc,
            seed=seed,
        )
        self.history: History = {}
        self._probe: Probe | None = None
        self._layout_logged = False

    # -- when -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the SAEs and runs the text gate before anything is trained: an error comes at once."""
        self._probe = None  # Of an earlier run in this process, with its model and captions.
        if self.every_n_epochs:
            self._prepare(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Probes the untrained adapter, as epoch 0; not when a run is resumed."""
        if self.every_n_epochs and trainer.global_step == 0:
            self._run_and_log(trainer, pl_module, epoch=0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0:
            self._run_and_log(trainer, pl_module, epoch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """`validate` probes the checkpoint that it is given, as the last epoch that it finished."""
        if self.every_n_epochs and trainer.state.fn == "validate":
            self._prepare(trainer, pl_module)
            self._run_and_log(trainer, pl_module, epoch=max(self.history, default=0))

    @property
    def state_key(self) -> str:
        return "SAEProbe"

    def state_dict(self) -> dict[str, Any]:
        return {"history": {epoch: [list(row) for row in rows] for epoch, rows in self.history.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = {epoch: [Row(*row) for row in rows] for epoch, rows in state_dict["history"].items()}

    # -- what -------------------------------------------------------------------------------------

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Limber)
        if self._probe is not None:
            return
        if self.num_images < trainer.world_size:
            raise ValueError(
                f"probe.num_images={self.num_images}: each of {trainer.world_size} processes needs one."
            )

        def gather(items: list) -> list:
            if trainer.world_size == 1:
                return items
            parts: list[list] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, items)
            return [item for part in parts for item in part]

        self._probe = self.load(module, trainer.precision_plugin.val_step_context, gather)

    def load(
        self,
        model: Limber,
        context: Callable[[], AbstractContextManager] = nullcontext,
        gather: Callable[[list], list] = lambda items: items,
    ) -> Probe:
        """SAEs, descriptions, and the text gate, which also measures the probe's yardsticks.

        Args:
            model: On its device, with its LLM loaded.
            context: See `Probe`.
            gather: See `Probe`.

        Raises:
            FileNotFoundError: see `load_saes`.
            ValueError: see `load_saes` and `gate.check`.
        """
        folder = release_folder(self.sae_release)
        saes = load_saes(self.sae_release, self.sae_id, self.layers, model.llm)
        if self.sae_memory_gb is None:
            for sae in saes.values():
                sae.to(model.device)
        prefix = model.collator().prompt.prefix_ids
        bos = model.llm.tokenizer.bos_token_id
        text: dict[str, gate.TextStats] = {}
        for chunk in chunks_on_device(saes, model.device, self.sae_memory_gb):
            text |= gate.measure_once(
                model.llm,
                chunk,
                [bos] if prefix[:1] == [bos] else [],
                self.config.outlier_factor,
                context,
            )
        ids = {name: sae.cfg.metadata.sae_id for name, sae in saes.items()}
        gate.check(text, gate.expected(self.sae_release, folder, ids), self.text_gate)
        numbers = [f"{name.split('.')[1]}: {stats.fvu:.2f}, {stats.l0:.0f}" for name, stats in text.items()]
        rank_zero_info(f"[text gate] fvu and l0 of plain text by layer: {'; '.join(numbers)}")
        descriptions = {}
        pattern = self.descriptions or (f"{folder}/descriptions/{{hook}}" if folder else None)
        if pattern is not None and (self.descriptions or Path(pattern).parent.is_dir()):
            descriptions = {
                name: Descriptions.read(pattern.format(hook=name, layer=name.split(".")[1]), sae.cfg.d_sae)
                for name, sae in saes.items()
            }
        return Probe(model, saes, text, self.config, descriptions, context, gather, self.sae_memory_gb)

    def _batches(self, trainer: pl.Trainer, num_images: int, label: str) -> Batches:
        return Batches(trainer, num_images, label)

    def _run_and_log(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        assert self._probe is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        costly = {"loss_recovered", "cross_layer"} & set(self.config.extras)
        # The first is counted: it alone reads the captions without an image.
        counter = FlopCounter() if trainer.state.fn == "fit" and epoch == 0 else None
        with counter or nullcontext():
            report = self._probe.run(
                self._batches(trainer, self.num_images, "Probing"),
                self._batches(trainer, self.costly_images, "Probing layer by layer") if costly else (),
                data.attributes,
                same_captions=trainer.state.fn == "fit",  # `validate` may be given other data.
            )
        self.history[epoch] = report.rows
        flops: dict[str, float] = {}
        if counter is not None:
            count = torch.tensor(counter.total, device=module.device)
            flops["flops/probe"] = trainer.strategy.reduce(count, reduce_op="sum").item()
        patches = self._matching_patches(trainer, module, report.rows)
        folder = trainer.log_dir  # Asks all processes.
        if not trainer.is_global_zero:
            return
        scalars = {
            f"{row.metric}/{row.group}"
            + ("" if row.layer is None else f"/layer_{row.layer:02d}"): row.value
            for row in report.rows
            if not row.metric.endswith("_p") and abs(row.value) != float("inf")
        }
        scalars |= {f"probe_seconds/{name}": spent for name, spent in report.seconds.items()} | flops
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        if not self._layout_logged:
            log_layout(trainer, report.rows)
            self._layout_logged = True
        fresh = module.hparams["adapter_weights"] is None
        control = "untrained adapter" if fresh else "adapter at the start"
        num_images = min(self.num_images, len(data.val_set))
        title = f"SAE probe of {num_images} held-out images, epoch {epoch}"
        figure = probe_figure(self.history, epoch, title, control, self.published_curves)
        log_figure(trainer, "probe/by_layer", figure)
        log_figure(trainer, "probe/by_epoch", heatmap_figure(self.history, "Image tokens"))
        if report.cross_layer:
            layers = list(self._probe.findings.layers.values())
            title = f"{min(self.costly_images, num_images)} held-out images, epoch {epoch}"
            log_figure(trainer, "probe/cross_layer", cross_layer_figure(layers, report.cross_layer, title))
        files = Path(folder) if folder and not trainer.fast_dev_run else None  # type: ignore[attr-defined]
        if files:
            self._write_tables(files, epoch, report.detectors)
        if patches is not None:
            figure = patch_figure(*patches)
            log_figure(trainer, "probe/patches", figure)
            if files and figure is not None:
                figure.savefig(files / f"patches_epoch_{epoch}.jpg", dpi=70)
        total = sum(report.seconds.values())
        parts = ", ".join(f"{name} {spent:.1f}" for name, spent in report.seconds.items())
        print(f"[probe] epoch {epoch}: {total:.1f} s ({parts})")
        for group in ("image", "text"):
            values = [row.value for row in report.rows if (row.group, row.metric) == (group, "fvu")]
            print(f"[probe] fvu of {group:5} by layer: {' '.join(f'{value:.2f}' for value in values)}")

    def _matching_patches(
        self, trainer: pl.Trainer, module: pl.LightningModule, rows: list[Row]
    ) -> tuple[list[torch.Tensor], list[str], list[list[PatchMap]], int] | None:
        """What `patch_figure` draws, at the layer where `match` is highest; None without `match` or where
        the image tokens are no square grid.
        """
        assert self._probe is not None
        assert isinstance(module, Limber)
        found = {row.layer: row.value for row in rows if (row.group, row.metric) == ("image", "match")}
        if not found:
            return None
        layer = max(found, key=lambda at: found[at])
        findings = self._probe.findings
        hook = next(name for name, at in findings.layers.items() if at == layer)
        batch = next(iter(self._batches(trainer, NUM_PATCH_IMAGES * trainer.world_size, "Patches")))
        found_at: dict[str, torch.Tensor] = {}
        self._probe.latents(module.image_tokens(batch), found_at.__setitem__, [hook])
        latents = found_at[hook].nan_to_num()  # [B, P, K]
        side = math.isqrt(latents.shape[1])
        if latents.shape[1] - side**2 > 1:  # One more is the encoder's class token, which comes first.
            return None
        maps = findings.matching(hook, latents[:, -(side**2) :], batch.captions)
        images = list(module.vision.transform.undo(batch.pixel_values.float().cpu()))
        return images, [captions[0] for captions in batch.captions], maps, cast(int, layer)

    def _write_tables(self, folder: Path, epoch: int, detectors: list[tuple]) -> None:
        """All epochs so far as one tidy table, and this probe's detectors."""
        import pandas as pd

        folder.mkdir(parents=True, exist_ok=True)
        run = f"{folder.parent.name}/{folder.name}"
        table = pd.DataFrame(
            [(run, at, *row) for at, rows in sorted(self.history.items()) for row in rows],
            columns=["run", "epoch", *Row._fields],
        ).astype({"layer": "Int64"})
        table.to_csv(folder / "probe.csv", index=False)
        table.to_parquet(folder / "probe.parquet", index=False)
        if detectors:
            columns = (
                "layer attribute latent auroc_image text_latent auroc_text text_latent_auroc_image".split()
            )
            frame = pd.DataFrame(detectors, columns=columns)
            frame.insert(0, "epoch", epoch)
            assert self._probe is not None
            findings = self._probe.findings
            texts = {findings.layers[name]: known.texts for name, known in findings.descriptions.items()}
            for kind in ("latent", "text_latent"):
                frame[f"{kind}_description"] = [
                    texts[layer][latent] if layer in texts else ""
                    for layer, latent in zip(frame["layer"], frame[kind], strict=True)
                ]
            frame.to_csv(folder / f"detectors_epoch_{epoch}.csv", index=False)
