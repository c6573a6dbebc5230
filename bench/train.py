"""One training step: this project's, LLaVA's under transformers' Trainer, and a plain loop.

All get the same ready batches: the same pixels, texts and image tokens, labels on caption tokens and end
token, AdamW, gradients clipped at 1. What is trained is the part between the frozen models: our linear
adapter, LLaVA's own projector (two layers), a linear layer in the plain loop. LLaVA takes no pooling, so
where we pool its vision tower's features are pooled by the same factor: same encoder work, same number of
image tokens. Names of contenders:

    limber              through Lightning's Trainer with the default run's settings and logger
    limber-step         forward, backward, optimiser alone: what the loop costs is the difference
    limber-fp32         the first in float32 (where the default precision is bf16-mixed)
    llava-fp32          LlavaForConditionalGeneration under transformers' Trainer, float32
    llava-bf16          the same with bf16=True (autocast over float32 weights)
    llava-bf16-weights  the same with frozen weights in bfloat16 too
    plain-fp32          a loop with logits at every position, float32
    plain-bf16          the same under autocast
    limber-cached       the first with features from disk (`model.cache_features`; only with --only)
    limber-compiled     the first with the LLM's layers compiled (`model.compile_llm`; only with --only)
    limber-shared       (several captions an image) the captions of an image in one sequence
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import measure
from bench.measure import Clock, Laps, Row
from bench.sizes import Setup, Size, collator, limber, pictures
from lightning_limber.cli import default_precision
from lightning_limber.data.collate import Batch
from lightning_limber.models.vision import VisionEncoder

READY_BATCHES = 2


class _Marks(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.mark()


class Ours:
    """Limber's training step, in Lightning's loop (`fit`) and without it (`step`)."""

    def __init__(
        self,
        size: Size,
        folder: Path,
        device: str,
        precision: str,
        captions: int,
        share: bool = False,
        **kwargs: Any,
    ) -> None:
        self.device, self.precision = device, precision
        self.model = limber(size, folder, **kwargs)
        self.data = pictures(size, collator(size, folder), READY_BATCHES, captions, share)
        self.runs = str(folder / "runs")
        self.fit(1)  # Loads and calibrates.

    def fit(self, steps: int) -> list[float]:
        clock = Clock(self.device)
        # As in configs/default.yaml, without what runs between epochs.
        trainer = pl.Trainer(
            accelerator=self.device,
            devices=1,
            precision=self.precision,  # type: ignore[arg-type]
            max_steps=steps + 1,
            max_epochs=-1,
            gradient_clip_val=1.0,
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            logger=TensorBoardLogger(self.runs, default_hp_metric=False),
            callbacks=[_Marks(clock)],
        )
        ready = self.data.ready
        self.data.ready = [ready[i % len(ready)] for i in range(steps + 1)]
        trainer.fit(self.model, datamodule=self.data)
        self.data.ready = ready
        self.padding = float(trainer.callback_metrics["train/padding"])
        return clock.laps()

    def step(self, steps: int) -> list[float]:
        clock = Clock(self.device)
        model = self.model.to(self.device)  # Lightning leaves it on the CPU.
        batches = [move_data_to_device(batch, self.device) for batch in self.data.ready]
        self.model.train()
        made = model.configure_optimizers()
        optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        for i in range(steps + 1):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
                _, losses, _ = model(batches[i % len(batches)])
                loss = losses.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.adapter.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            clock.mark()
        return clock.laps()


class _PooledTower(nn.Module):
    """A vision tower whose chosen hidden state has its patch grid pooled."""

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.tower, self.layer, self.pool = encoder.model, encoder.config.layer, encoder.config.pool

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        output = self.tower(pixel_values, **kwargs)
        hidden = output.hidden_states[self.layer]  # [B, 1 + h*w, D_v]
        side = round((hidden.shape[1] - 1) ** 0.5)
        grid = hidden[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        patches = nn.functional.avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)
        pooled = torch.cat([hidden[:, :1], patches], dim=1)
        return SimpleNamespace(hidden_states={self.layer: pooled})


class Peers:
    """The same frozen models, put together as LLaVA and as a plain loop."""

    def __init__(
        self, size: Size, folder: Path, device: str, batches: list[Batch], dtype: torch.dtype
    ) -> None:
        from transformers import AutoModelForCausalLM, LlavaConfig

        self.device, self.folder, self.dtype = device, folder, dtype
        self.encoder = VisionEncoder(limber(size, folder).vision.config).load().to(device, dtype)
        llm: Any = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=dtype)
        self.llm = llm.to(device).requires_grad_(False)
        self.config = LlavaConfig(
            # Copies: it would unset the attention kernel in the parts' own.
            vision_config=deepcopy(self.encoder.model.config),
            text_config=deepcopy(self.llm.config),
            vision_feature_layer=size.features.layer,
            image_token_index=self.llm.config.vocab_size - 1,
        )
        with torch.no_grad():
            image_tokens = self.encoder(batches[0].pixel_values[:1].to(device, dtype))
        self.projector = nn.Linear(image_tokens.shape[2], self.llm.config.hidden_size, device=device)
        self.examples = [
            self._example(batch, image_tokens.shape[1], self.config.image_token_index) for batch in batches
        ]

    def llava(self) -> Any:
        """A fresh LLaVA around the frozen parts, with a new projector in float32."""
        from transformers import LlavaForConditionalGeneration

        with torch.device("meta"):
            llava = LlavaForConditionalGeneration(self.config)
        pooled = self.encoder.config.pool > 1
        llava.model.vision_tower = _PooledTower(self.encoder) if pooled else self.encoder.model
        llava.model.language_model = self.llm.base_model
        llava.lm_head = self.llm.get_output_embeddings()
        projector = llava.model.multi_modal_projector.to_empty(device=self.device).float()
        for parameter in projector.parameters():
            nn.init.normal_(parameter, std=0.02)
        return llava

    @staticmethod
    def _example(batch: Batch, image_tokens: int, image_token_id: int) -> dict[str, Tensor]:
        """The batch, every sequence in a row of its own, as transformers takes it."""
        ids, labels = batch.input_ids.clone(), torch.full_like(batch.input_ids, -100)
        ids.view(-1)[batch.image_positions] = image_token_id
        labels.view(-1)[batch.label_positions + 1] = batch.labels
        column = torch.arange(ids.shape[1])
        # The end token is the last of each text.
        last = torch.where(labels >= 0, column, 0).amax(1, keepdim=True)
        return {
            "input_ids": ids,
            "attention_mask": (column <= last).long(),
            "labels": labels,
            "pixel_values": batch.pixel_values[batch.image_rows[::image_tokens] // image_tokens],
        }

    def trainer(self, steps: int, bf16: bool) -> list[float]:
        from accelerate.state import AcceleratorState
        from transformers import Trainer, TrainerCallback, TrainingArguments

        # Accelerate keeps the precision of a process' first Trainer, whatever a later one is told; and a
        # model that it has prepared it does not prepare again.
        AcceleratorState._reset_state(reset_partial_state=True)
        llava = self.llava()
        clock = Clock(self.device)

        class Marks(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.mark()

        trainer = Trainer(
            model=llava,
            args=TrainingArguments(
                output_dir=str(self.folder / "llava"),
                max_steps=steps + 1,
                per_device_train_batch_size=1,  # An example is a whole batch.
                bf16=bf16,
                use_cpu=self.device == "cpu",
                dataloader_pin_memory=self.device == "cuda",
                remove_unused_columns=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=self.examples,  # type: ignore[arg-type]
            data_collator=lambda examples: examples[0],
            callbacks=[Marks()],
        )
        trainer.train()
        assert ("_original_forward" in vars(llava)) == bf16, "autocast is not what was asked for"
        return clock.laps()

    def plain(self, steps: int, bf16: bool) -> list[float]:
        clock = Clock(self.device)
        examples = [{name: t.to(self.device) for name, t in x.items()} for x in self.examples]
        before = (examples[0]["input_ids"] == self.config.image_token_index).nonzero()[0, 1]
        optimizer = torch.optim.AdamW(self.projector.parameters(), lr=1e-3)
        for i in range(steps + 1):
            example = examples[i % len(examples)]
            with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
                image = self.projector(self.encoder(example["pixel_values"].to(self.dtype)))
                embeds = self.llm.get_input_embeddings()(example["input_ids"])
                after = before + image.shape[1]
                embeds = torch.cat([embeds[:, :before], image.to(embeds), embeds[:, after:]], dim=1)
                mask = example["attention_mask"]
                logits = self.llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
                logits, labels = logits[:, :-1].flatten(0, 1), example["labels"][:, 1:].flatten()
                loss = nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.projector.parameters(), 1.0)
            optimizer.step()
            clock.mark()
        return clock.laps()


class Contenders:
    """Builds contenders by name, each part once."""

    def __init__(self, setup: Setup) -> None:
        self.size, self.folder, self.device = setup.size, setup.folder, setup.device
        self.captions = setup.captions
        self.precision = default_precision(setup.device)
        self._made: dict[Any, Any] = {}

    def names(self) -> list[str]:
        bf16 = self.precision == "bf16-mixed"
        if self.captions > 1:
            return ["limber-shared", "limber", "llava-bf16" if bf16 else "llava-fp32"]
        names = ["limber", "limber-step", "llava-fp32", "plain-fp32"]
        if bf16:
            names += ["limber-fp32", "llava-bf16", "llava-bf16-weights", "plain-bf16"]
        return names

    def ours(self, precision: str, **kwargs: Any) -> Ours:
        key = (precision, *kwargs)
        if key not in self._made:
            self._made[key] = Ours(self.size, self.folder, self.device, precision, self.captions, **kwargs)
        return self._made[key]

    def peers(self, dtype: torch.dtype) -> Peers:
        if dtype not in self._made:
            self._made[dtype] = Peers(self.size, self.folder, self.device, self.plain_batches(), dtype)
        return self._made[dtype]

    def plain_batches(self) -> list[Batch]:
        """The same batches, each caption in a row of its own."""
        collate = collator(self.size, self.folder, packed=False)
        return pictures(self.size, collate, READY_BATCHES, self.captions).ready

    def build(self, name: str) -> Laps:
        bf16 = "bf16" in name
        makers: dict[str, Callable[[], Laps]] = {
            "limber": lambda: self.ours(self.precision).fit,
            "limber-step": lambda: self.ours(self.precision).step,
            "limber-fp32": lambda: self.ours("32-true").fit,
            "limber-cached": lambda: self.ours(self.precision, cache_features=True).fit,
            "limber-compiled": lambda: self.ours(self.precision, compile_llm=True).fit,
            "limber-shared": lambda: self.ours(self.precision, share=True).fit,
            "llava": lambda: lambda steps: self.peers(torch.float32).trainer(steps, bf16),
            "llava-bf16-weights": lambda: lambda steps: self.peers(torch.bfloat16).trainer(steps, bf16),
            "plain": lambda: lambda steps: self.peers(torch.float32).plain(steps, bf16),
        }
        key = name if name in makers else name.rsplit("-", 1)[0]
        return makers[key]()


def _memory(setup: Setup, name: str) -> Row:
    """Bytes of one contender; runs in a process of its own."""
    run = Contenders(setup).build(name)
    run(1)  # Some parts are built when they are first used.
    return measure.peak_memory(setup.device, lambda: run(1))


def count_work(ours: Ours, batches: list[Batch], setup: Setup) -> Row:
    """What a batch holds, and the FLOPs that its maths needs: by parameters and tokens, 2 a product.

    Forward and the backward through activations for the LLM's layers (4N a token), the same for the head
    on target tokens alone, one forward for the encoder up to the layer that is used; attention's own
    products are left out. `batches` have each caption in a row of its own. Padding, and a prefix that is
    laid down for each caption, are not needed.
    """
    from transformers import AutoModel

    model, size = ours.model, setup.size
    image_tokens = model.num_image_tokens
    with torch.device("meta"):
        encoder = AutoModel.from_config(size.vision())

    def matrices(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    layer, layers = size.features.layer, encoder.config.num_hidden_layers
    used = (layer if layer >= 0 else layers + 1 + layer) / layers
    patches = (batches[0].pixel_values.shape[-1] // encoder.config.patch_size) ** 2
    images = sum(len(batch.pixel_values) for batch in batches)
    samples = images * setup.captions
    before = len(model.collator().prompt.prefix_ids) + image_tokens
    # The last token of a sequence is its last label.
    text = sum(batch.used_positions for batch in batches) + samples - samples * before
    targets = sum(len(batch.labels) for batch in batches)
    flops = 4 * matrices(model.llm.layers) * (images * before + text)
    flops += 4 * model.llm.embedding.weight.numel() * targets
    flops += int(2 * used * matrices(encoder) * patches * images)
    return {
        "images": images / len(batches),
        "samples": samples / len(batches),
        # As separate sequences count them, for all contenders.
        "tokens": (samples * before + text) / len(batches),
        "image_tokens": image_tokens,
        "padding": ours.padding,
        "needed_flops_per_sample": flops / samples,
    }


def main(setup: Setup) -> Row:
    """Measures the contenders; a sample is a caption with its image."""
    # Features are kept in the cache; the user's own is left alone.
    with patch.dict(os.environ, LIGHTNING_LIMBER_CACHE=str(setup.folder / "cache")):
        return _main(setup)


def _main(setup: Setup) -> Row:
    contenders = Contenders(setup)
    names = setup.only or contenders.names()
    runs, flops = {}, {}
    for name in names:
        print(f"  building and warming up {name}", file=sys.stderr)
        runs[name] = contenders.build(name)
        with FlopCounterMode(display=False) as counter:
            runs[name](1)  # Two steps.
        flops[name] = counter.get_total_flops() / 2
    work = count_work(contenders.ours(contenders.precision), contenders.plain_batches(), setup)
    config = setup.size.llm()
    shapes = [(int(work["tokens"]), config.hidden_size, config.intermediate_size), (2048, 2048, 2048)]
    dtypes = [torch.float32, *([torch.bfloat16] if contenders.precision == "bf16-mixed" else [])]
    rates: dict[str, list[float]] = {str(dtype).removeprefix("torch."): [] for dtype in dtypes}
    rounds: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(setup.repeats):
        print(f"  round {number + 1} of {setup.repeats}", file=sys.stderr)
        for dtype, found in zip(dtypes, rates.values(), strict=True):
            found.append(measure.matmul_rate(setup.device, dtype, shapes))
        for name, laps in measure.alternate(runs, 1, setup.steps).items():
            rounds[name] += laps
    rate = {name: statistics.median(found) for name, found in rates.items()}
    rows = []
    for name in names:
        row: Row = {"name": name, **measure.step_times(rounds[name])}
        row["samples_per_s"] = work["samples"] / row["step_s"]
        row["tokens_per_s"] = work["tokens"] / row["step_s"]
        row |= measure.speedup(rounds[names[0]], rounds[name])
        row["flops_per_sample"] = flops[name] / work["samples"]
        fastest = max(rate.values()) if "fp32" not in name else rate["float32"]
        row["share_of_matmul"] = row["flops_per_sample"] * row["samples_per_s"] / fastest
        row["share_of_matmul_4n"] = work["needed_flops_per_sample"] * row["samples_per_s"] / fastest
        row |= measure.in_new_process(_memory, setup, name)
        rows.append(row)
    return {"precision": contenders.precision, "work": work, "matmul_flops_per_s": rate, "results": rows}


COLUMNS = (
    "name samples_per_s tokens_per_s step_s step_s_p10 step_s_p90 speedup speedup_min speedup_max "
    "flops_per_sample share_of_matmul share_of_matmul_4n built_bytes peak_bytes"
).split()
