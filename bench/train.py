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
    limber-compiled     the first with the LLM's layers compiled, on a GPU with FlexAttention
                        (`model.compile_llm`; only with --only)
    limber-shared       (several captions an image) the captions of an image in one sequence
    limber-DESIGN       another design of the lab (`DESIGNS`, such as limber-enter-40; only with --only)
    limber-A+B          both, such as limber-compiled+fp32 (only with --only)
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import measure
from bench.measure import Clock, Laps, Row
from bench.peers import READY_BATCHES, Peers, plain_loop
from bench.sizes import Setup, limber, pictures
from lightning_limber.cli import default_precision
from lightning_limber.models.adapters import MLP, Resampler, Vocabulary
from lightning_limber.models.entry import EntryConfig

DESIGNS: dict[str, dict[str, Any]] = {
    "mlp": {"adapter": partial(MLP, input_norm="channel")},
    "resampler": {"adapter": Resampler},
    "vocabulary": {"adapter": partial(Vocabulary, input_norm="channel")},
    "fixed": {"norm": "fixed"},
    "moments": {"norm": "moments"},
    "hold": {"norm": "fixed", "hold": True},
    "inject": {"norm": "fixed", "inject": [0, 20, 40, 60]},
    **{f"enter-{share}": {"layer": share} for share in (20, 40, 60)},
}
"""Adapters and entries beside the default ones; layers as percentages of the LLM's."""
SWITCHES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "32-true"},
    "cached": {"cache_features": True},
    "compiled": {"compile_llm": True},
    "shared": {"share": True},
}
"""Ways to train the same design."""


class Ours:
    """Limber's training step, in Lightning's loop (`fit`) and without it (`step`)."""

    def __init__(self, setup: Setup, precision: str, share: bool = False, **kwargs: Any) -> None:
        self.device, self.precision = setup.device, precision
        self.model = limber(setup, **kwargs)
        self.data = pictures(setup, READY_BATCHES, packed=True, share_prefix=share)
        self.runs = str(setup.folder / "runs")
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
            callbacks=[pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_: clock.mark())],
        )
        ready = self.data.ready
        self.data.ready = [ready[i % len(ready)] for i in range(steps + 1)]
        trainer.fit(self.model, datamodule=self.data)
        self.data.ready = ready
        self.padding = float(trainer.callback_metrics["train/padding"])
        return clock.laps()

    def step(self, steps: int) -> list[float]:
        model = self.model.to(self.device).train()  # Lightning leaves it on the CPU.
        made = model.configure_optimizers()
        return plain_loop(
            lambda batch: model(batch)[1].mean(),
            self.data.ready,
            list(model.adapter.parameters()),
            made["optimizer"],
            steps,
            self.device,
            self.precision == "bf16-mixed",
            made["lr_scheduler"]["scheduler"],
        )


class Contenders:
    """Builds contenders by name, each part once."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.precision = default_precision(setup.device)
        self._made: dict[Any, Any] = {}

    def names(self) -> list[str]:
        bf16 = self.precision == "bf16-mixed"
        if self.setup.captions > 1:
            return ["limber-shared", "limber", "llava-bf16" if bf16 else "llava-fp32"]
        names = ["limber", "limber-step", "llava-fp32", "plain-fp32"]
        return names + ["limber-fp32", "llava-bf16", "llava-bf16-weights", "plain-bf16"] * bf16

    def design(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the module for one of `DESIGNS`."""
        if "adapter" in settings:
            return settings
        layers = self.setup.size.llm().num_hidden_layers
        settings = dict(settings)
        for name in settings.keys() & {"layer", "inject"}:
            share = settings[name]
            at = sorted({layers * part // 100 for part in ([share] if name == "layer" else share)})
            settings[name] = at[0] if name == "layer" else at
        return {"entry": EntryConfig(**settings)}

    def ours(self, precision: str | None = None, **kwargs: Any) -> Ours:
        key = precision or self.precision, repr(kwargs)
        if key not in self._made:
            self._made[key] = Ours(self.setup, key[0], **kwargs)
        return self._made[key]

    def peers(self, dtype: torch.dtype = torch.float32) -> Peers:
        if dtype not in self._made:
            self._made[dtype] = Peers(self.setup, dtype)
        return self._made[dtype]

    def build(self, name: str) -> Laps:
        match name:
            case "limber":
                return self.ours().fit
            case "limber-step":
                return self.ours().step
            case "llava-fp32" | "llava-bf16":
                return partial(self.peers().trainer, name == "llava-bf16")
            case "llava-bf16-weights":
                return partial(self.peers(torch.bfloat16).trainer, True)
            case "plain-fp32" | "plain-bf16":
                return partial(self.peers().plain, name == "plain-bf16")
        parts = name.removeprefix("limber-").split("+")
        if name.startswith("limber-") and set(parts) <= {*SWITCHES, *DESIGNS}:
            ways = (SWITCHES.get(part) or self.design(DESIGNS[part]) for part in parts)
            return self.ours(**{key: value for way in ways for key, value in way.items()}).fit
        raise ValueError(f"--only {name}: there is no such contender.")


def _memory(setup: Setup, name: str) -> Row:
    """Bytes of one contender; runs in a process of its own."""
    run = Contenders(setup).build(name)
    run(1)  # Some parts are built when they are first used.
    return measure.peak_memory(setup.device, lambda: run(1))


def count_flops(run: Laps) -> float | None:
    """FLOPs of a step that ran; None where torch's counter does not know an attention kernel's shapes, as
    2.11 does not know grouped queries on a GPU.
    """
    try:
        with FlopCounterMode(display=False) as counter:
            run(1)  # Two steps.
    except AssertionError as error:
        print(f"  FLOPs are not counted: {error}", file=sys.stderr)
        run(1)
        return None
    return counter.get_total_flops() / 2


def count_work(ours: Ours, setup: Setup) -> Row:
    """What a batch holds, and the FLOPs that its maths needs: by parameters and tokens, 2 a product.

    Forward and the backward through activations for the LLM's layers (4N a token), the same for the head
    on target tokens alone, one forward for the encoder up to the layer that is used; attention's own
    products are left out. Padding, and a prefix that is laid down for each caption, are not needed.
    """
    from transformers import AutoModel

    model, size = ours.model, setup.size
    batches = pictures(setup, READY_BATCHES, packed=False).ready
    with torch.device("meta"):
        encoder = AutoModel.from_config(size.vision())

    def matrices(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    layer, layers = size.features.layer, encoder.config.num_hidden_layers
    used = (layer if layer >= 0 else layers + 1 + layer) / layers
    patches = (batches[0].pixel_values.shape[-1] // encoder.config.patch_size) ** 2
    images = sum(len(batch.pixel_values) for batch in batches)
    samples = images * setup.captions
    before = len(model.collator().prompt.prefix_ids) + model.num_image_tokens
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
        "image_tokens": model.num_image_tokens,
        "padding": ours.padding,
        "needed_flops_per_sample": flops / samples,
    }


def main(setup: Setup) -> Row:
    """Measures the contenders; a sample is a caption with its image."""
    contenders = Contenders(setup)
    runs, flops, memory = {}, {}, {}
    for name in setup.only or contenders.names():
        print(f"  building and warming up {name}", file=sys.stderr)
        of_others = measure.allocated(setup.device)
        runs[name] = contenders.build(name)
        # Layers that have run under torch's counter are not compiled any more.
        flops[name] = None if "compiled" in name else count_flops(runs[name])
        if setup.in_process:
            peak = measure.peak_memory(setup.device, partial(runs[name], 1))["peak_bytes"]
            memory[name] = {"peak_bytes": peak - of_others}
    work = count_work(contenders.ours(), setup)
    config = setup.size.llm()
    shapes = [(int(work["tokens"]), config.hidden_size, config.intermediate_size), (2048, 2048, 2048)]
    rates: dict[str, list[float]] = {"float32": []}
    if setup.device == "cuda":
        shapes.append((8192, 8192, 8192))
    if contenders.precision == "bf16-mixed":
        rates["bfloat16"] = []

    def measure_matmul() -> None:
        for dtype, found in rates.items():
            found.append(measure.matmul_rate(setup.device, getattr(torch, dtype), shapes))

    rows = measure.compare(runs, setup.repeats, setup.size.steps, measure_matmul, setup.until)
    peak_rate = measure.peak_rate() if setup.device == "cuda" else None
    rate = {name: statistics.median(found) for name, found in rates.items()}
    for row in rows:
        name = row["name"]
        row["samples_per_s"] = work["samples"] / row["step_s"]
        row["tokens_per_s"] = work["tokens"] / row["step_s"]
        fastest = max(rate.values()) if "fp32" not in name else rate["float32"]
        if (counted := flops[name]) is not None:
            row["flops_per_sample"] = counted / work["samples"]
            row["share_of_matmul"] = row["flops_per_sample"] * row["samples_per_s"] / fastest
        row["share_of_matmul_4n"] = work["needed_flops_per_sample"] * row["samples_per_s"] / fastest
        if peak_rate is not None and "fp32" not in name:
            row["mfu_4n"] = work["needed_flops_per_sample"] * row["samples_per_s"] / peak_rate
        row |= memory.get(name) or measure.in_new_process(_memory, setup, name)
    return {
        "precision": contenders.precision,
        "work": work,
        "matmul_flops_per_s": rate,
        "peak_flops_per_s": peak_rate,
        "results": rows,
    }


COLUMNS = (
    "name samples_per_s tokens_per_s step_s step_s_p10 step_s_p90 speedup speedup_min speedup_max "
    "flops_per_sample share_of_matmul share_of_matmul_4n built_bytes peak_bytes"
).split()
