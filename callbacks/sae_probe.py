"""The SAE probe: how far the image tokens look like text to each layer of the LLM, as it trains.

As Venhoff et al. (arXiv 2506.11976) did once, after training; here before the first step and after
every epoch, over the same held-out images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from lightning_limber.metrics import SAEAlignment, shared_latents
from lightning_limber.model import Limber, Sequences
from lightning_limber.sae import hook_layer, load_saes

from .figures import Results, heatmap_figure, log_figure, probe_figure

GROUPS = ("image", "caption", "text")


class SAEProbe(pl.Callback):
    """Runs pretrained SAEs over held-out images and logs layer-wise alignment metrics.

    Three groups of tokens are compared: ``image`` (image positions), ``caption`` (caption positions
    after the image) and ``text`` (the same captions through the LLM without the image). The metrics
    are those of metrics.py and ``shared``, the overlap of a group's live latents with those of text.
    They are logged as ``{metric}/{group}/layer_{l}``, with two figures.

    Never counted: the first position of a sequence (an attention sink in every LLM) and tokens whose
    norm at a layer is more than `outlier_factor` times the median of caption tokens there (sinks that
    form elsewhere). Their share is logged as ``outliers``.

    Nothing outlives its batch: each layer's hook encodes, decodes, adds to its sums and lets go.

    Args:
        sae_release: A SAELens release, a folder of SAELens folders, or ``suite:NAME``.
        sae_id: Id of each layer's SAE, with ``{layer}``.
        layers: Which layers; null takes every layer that has an SAE.
        num_images: Held-out images (the first ones, always the same).
        every_n_epochs: Epochs between two probes; 0 switches the probe off.
        outlier_factor: See above.
    """

    def __init__(
        self,
        sae_release: str = "suite:smollm2-135m-instruct",
        sae_id: str = "blocks.{layer}.hook_resid_post",
        layers: list[int] | None = None,
        num_images: int = 256,
        every_n_epochs: int = 1,
        outlier_factor: float = 10.0,
    ) -> None:
        self.sae_release = sae_release
        self.sae_id = sae_id
        self.layers = layers
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.outlier_factor = outlier_factor
        self.history: dict[int, Results] = {}
        self._saes: dict[str, Any] = {}
        self._norm_limit: dict[str, Tensor] = {}

    # -- when -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the SAEs before anything is trained: a wrong release is found at once."""
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
        """`validate` probes the checkpoint that it is given."""
        if self.every_n_epochs and trainer.state.fn == "validate":
            self._prepare(trainer, pl_module)
            self._run_and_log(trainer, pl_module, epoch=0)

    @property
    def state_key(self) -> str:
        return "SAEProbe"

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    # -- what -------------------------------------------------------------------------------------

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, Limber)
        if self._saes:
            return
        saes = load_saes(self.sae_release, self.sae_id, self.layers, module.llm)
        self._saes = {hook_name: sae.to(module.device) for hook_name, sae in saes.items()}
        # The yardstick for outliers: median norm of caption tokens at each layer, over one fixed batch
        # of training captions that every process reads whole.
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batch = trainer.strategy.batch_to_device(data.calibration_batch())
        sequences = module.sequences(batch, None)
        index = _index(sequences.groups["caption"])

        def measure(hook_name: str) -> Callable[[Tensor], None]:
            def hook(residual: Tensor) -> None:
                norms = residual.flatten(0, 1).index_select(0, index).float().norm(dim=-1)
                self._norm_limit[hook_name] = self.outlier_factor * norms.median()

            return hook

        with (
            torch.no_grad(),
            trainer.precision_plugin.val_step_context(),
            module.llm.residual_hooks({name: measure(name) for name in self._saes}),
        ):
            module.llm.decode(sequences.embeds)

    @torch.no_grad()
    def run(self, trainer: pl.Trainer, module: Limber) -> Results:
        """One pass over the held-out images: group -> metric -> value by layer."""
        metrics = {
            (group, hook_name): SAEAlignment(sae.cfg.d_in, sae.cfg.d_sae).to(module.device)
            for hook_name, sae in self._saes.items()
            for group in GROUPS
        }
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.probe_dataloader(self.num_images)
        hidden = not trainer.is_global_zero or not trainer.progress_bar_callback
        training = module.training
        module.eval()
        for batch in tqdm(loader, "Probing", leave=False, disable=hidden):
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.val_step_context():
                with_image = module.sequences(batch, module.image_tokens(batch.pixel_values))
                self._pass(module, with_image, {"image": "image", "caption": "caption"}, metrics)
                self._pass(module, module.sequences(batch, None), {"text": "caption"}, metrics)
        module.train(training)
        return self._collect({key: metric.compute() for key, metric in metrics.items()})

    def _pass(
        self,
        module: Limber,
        sequences: Sequences,
        groups: dict[str, str],
        metrics: dict[tuple[str, str], SAEAlignment],
    ) -> None:
        """One forward of the LLM that feeds the metrics of all layers."""
        indices = {group: _index(sequences.groups[where]) for group, where in groups.items()}

        def hook(hook_name: str) -> Callable[[Tensor], None]:
            def update(residual: Tensor) -> None:
                sae, rows = self._saes[hook_name], residual.flatten(0, 1)  # [N * S, D_l]
                for group, index in indices.items():
                    x = rows.index_select(0, index).float()  # [n, D_l]
                    with torch.autocast(x.device.type, enabled=False):
                        latents = sae.encode(x)  # [n, K]
                        reconstruction = sae.decode(latents)  # [n, D_l]
                    keep = x.norm(dim=-1) <= self._norm_limit[hook_name]  # [n]
                    metrics[group, hook_name].update(x, reconstruction, latents, keep)

            return update

        with module.llm.residual_hooks({name: hook(name) for name in self._saes}):
            module.llm.decode(sequences.embeds)

    def _collect(self, values: dict[tuple[str, str], dict[str, Tensor]]) -> Results:
        results: Results = {group: {} for group in GROUPS}
        for hook_name in self._saes:
            fired = values["text", hook_name]["fired"]
            for group in GROUPS:
                of_layer = dict(values[group, hook_name])
                of_layer["shared"] = shared_latents(of_layer.pop("fired"), fired)
                for metric, value in of_layer.items():
                    results[group].setdefault(metric, []).append(float(value))
        return results

    def _run_and_log(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        assert isinstance(module, Limber)
        results = self.run(trainer, module)
        self.history[epoch] = results
        if not trainer.is_global_zero:
            return
        layers = [hook_layer(name) for name in self._saes]
        scalars = {
            f"{metric}/{group}/layer_{layer:02d}": value
            for group, metrics in results.items()
            for metric, values in metrics.items()
            for layer, value in zip(layers, values, strict=True)
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        title = f"SAE probe of {self.num_images} held-out images, epoch {epoch}"
        untrained = self.history.get(0) if epoch else None
        log_figure(trainer, "probe/by_layer", probe_figure(layers, results, untrained, title))
        log_figure(trainer, "probe/by_epoch", heatmap_figure(layers, self.history, "Image tokens"))
        print(f"[probe] epoch {epoch}: fvu by layer, image {_row(results['image']['fvu'])}, ", end="")
        print(f"text {_row(results['text']['fvu'])}")


def _index(mask: Tensor) -> Tensor:
    """[N, S] mask -> flat positions of its true entries; once per pass, not once per layer."""
    return mask.flatten().nonzero()[:, 0]


def _row(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
