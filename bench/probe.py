"""One probe of all layers: this project's, TransformerLens' cache and SAELens' SAEs, dense caching.

All run the same LLM weights on the same embeddings, with image and with the captions alone, in the same
precision, and the same SAEs (JumpReLU, thresholds set so that about one latent in 128 is active, float32).
Ours leaves latents that cannot fire out by a product in bfloat16, where a CPU has it, and computes the
others in float32 (screened_encoder.py); on a GPU it splits numbers into two of bfloat16 (products.py).
It makes every reconstruction metric of image, caption and text tokens by image, and their bootstrap
intervals. The peers add up less, which favours them: squared error,
squared norm, mean, cosine and l0 of each layer and group. The encoder's features of the images are at hand
for all, as in a run after its first validation. Names of contenders:

    limber      `Probe.run` without further metrics, as at the epochs of a run after the first probe: what
                the frozen LLM makes of the captions alone is known by then
    limber-first  the first probe of a run
    limber-float32  the first with SAEs in float32 products on a GPU too (products.py; only with --only)
    saelens     HookedSAETransformer.run_with_cache of all layers' residual streams, then each SAE
    dense       residual streams of all layers written to one .pt an image, then read again for the SAEs
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any
from unittest.mock import patch

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from bench import measure
from bench.measure import Laps, Row
from bench.sizes import Pictures, Setup, attach, collator, limber, pictures
from lightning_limber.cli import default_precision
from lightning_limber.data.collate import Batch
from lightning_limber.models.image_tokens import embed_sequences
from lightning_limber.probe.config import ProbeConfig
from lightning_limber.probe.passes import Probe
from lightning_limber.probe.sanity_check import TextStats

NAMES = ["limber", "limber-first", "saelens", "dense"]
ACTIVE_SHARE = 1 / 128
Found = dict[tuple[str, int], dict[str, float]]
"""Metrics by group and layer."""


class Sums:
    """What a peer keeps of a layer and a group: the field's usual numbers, in float32."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.total: Tensor | float = 0.0

    def update(self, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
        error = (x - reconstruction).pow(2).sum()
        cosine = torch.cosine_similarity(x, reconstruction, dim=-1).sum()
        l0 = (latents > 0).sum().float()
        self.values.append(torch.stack([error, x.pow(2).sum(), cosine, l0, error.new_tensor(len(x))]))
        self.total = self.total + x.sum(0)

    def compute(self) -> dict[str, float]:
        error, squares, cosine, l0, count = torch.stack(self.values).sum(0).tolist()
        mean = self.total / count
        variance = squares - count * float(mean @ mean)  # type: ignore[operator]
        return {"fvu": error / variance, "cosine": cosine / count, "l0": l0 / count}


class Contenders:
    """The model, its SAEs (of all layers, or of the first so many) and the ways to probe it; every one
    returns the metrics it made.
    """

    def __init__(self, setup: Setup, layers: int | None = None) -> None:
        self.setup, self.device = setup, setup.device
        self.bf16 = default_precision(setup.device) == "bf16-mixed"
        self.model = limber(setup)
        self.model.configure_model()
        self.model.to(self.device)
        batch = move_data_to_device(pictures(setup, 1, packed=False).ready[0], self.device)
        norm = torch.tensor(self.model.token_norm, device=self.device)
        self.model.adapter.calibrate(self.model.vision(batch.pixel_values), norm)
        if self.bf16:
            self.model.llm.prepare_autocast(torch.bfloat16)
        self.names = [f"blocks.{i}.hook_resid_post" for i in range(len(self.model.llm.layers))][:layers]
        self.saes = self._make_saes(batch)
        self.probe = self.make_probe()

    def make_probe(self) -> Probe:
        # Nothing is an outlier, as for the peers.
        text = dict.fromkeys(self.names, TextStats(1e30, 1.0, 0.0, 0.0))
        return Probe(self.model, self.saes, text, ProbeConfig(metrics=[]), context=self.context)

    def context(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def _make_saes(self, batch: Batch) -> dict[str, Any]:
        from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

        width, latents = self.model.llm.hidden_size, self.setup.size.d_sae
        saes: dict[str, Any] = {}

        def build(name: str, residual: Tensor) -> None:
            torch.manual_seed(len(saes))
            config = JumpReLUSAEConfig(d_in=width, d_sae=latents, dtype="float32", device=self.device)
            config.metadata.hook_name = name
            sae: Any = JumpReLUSAE(config).eval().requires_grad_(False)
            x = residual[:, 1:].flatten(0, 1).float()  # The first position is a sink.
            with torch.autocast(self.device, enabled=False):
                active = sae.encode(x).flatten()
            kept = max(1, int(ACTIVE_SHARE * active.numel()))
            sae.threshold.fill_(float(active.topk(kept).values[-1]))
            saes[name] = sae

        with self.context():
            self._decode(self._embeds(batch), build)
        return saes

    def _embeds(self, batch: Batch) -> Tensor:
        return embed_sequences(self.model.llm, batch, self.model.image_tokens(batch))

    def _decode(self, embeds: Tensor, read: Callable[[str, Tensor], Any]) -> None:
        """One forward of the LLM that hands each layer's residual stream to ``read(name, residual)``."""
        hooks: dict[str, Any] = {name: partial(read, name) for name in self.names}
        with self.model.llm.residual_hooks(hooks):
            self.model.llm.decode(embeds)

    def batches(self, num_images: int) -> Iterator[Batch]:
        """The first held-out images, each batch made when it is asked for, as in a run."""
        data = Pictures(num_images, self.setup.size.features.image_size or 224, batch_size=1)
        attach(data, collator(self.setup, packed=False))
        for batch in data.probe_dataloader(num_images):
            yield move_data_to_device(batch, self.device)

    def forwards(self, batch: Batch) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Embeddings of the batch with its images, then of its captions alone, and groups of positions."""
        embeds = self._embeds(batch)
        yield embeds, {name: batch.groups[name][0] for name in ("image", "caption")}
        alone = batch.without_image
        assert alone is not None
        yield embed_sequences(self.model.llm, alone, None), {"text": alone.groups["caption"][0]}

    # -- contenders -------------------------------------------------------------------------------

    def limber(self, batches: Iterable[Batch], same_captions: bool = True) -> Found:
        found: Found = defaultdict(dict)
        for row in self.probe.run(batches, same_captions=same_captions).rows:
            if row.layer is not None:
                found[row.group, row.layer][row.metric] = row.value
        return found

    def limber_first(self, batches: Iterable[Batch]) -> Found:
        return self.limber(batches, same_captions=False)

    def limber_float32(self, batches: Iterable[Batch]) -> Found:
        with patch("lightning_limber.probe.passes.sae_products", lambda device: nullcontext()):
            return self.limber(batches)

    @torch.no_grad()
    def saelens(self, batches: Iterable[Batch]) -> Found:
        sums: dict[tuple[str, int], Sums] = defaultdict(Sums)
        for batch in batches:
            with self.context():
                for embeds, groups in self.forwards(batch):
                    _, cache = self.hooked.run_with_cache(
                        embeds.to(self.hooked.cfg.dtype),
                        start_at_layer=0,
                        return_type=None,
                        names_filter=self.names,
                    )
                    for layer, name in enumerate(self.names):
                        for group, index in groups.items():
                            x = cache[name].flatten(0, 1).index_select(0, index).float()
                            self._add(sums, group, layer, x)
        return {key: of_key.compute() for key, of_key in sums.items()}

    @torch.no_grad()
    def dense(self, batches: Iterable[Batch]) -> Found:
        folder = self.setup.folder / "dense"
        folder.mkdir()
        for batch in batches:
            with self.context():
                for embeds, groups in self.forwards(batch):
                    kept: dict[str, Tensor] = {}
                    self._decode(embeds, kept.__setitem__)
                    residuals = torch.stack(
                        [kept[name] for name in self.names], dim=1
                    ).cpu()  # [N, L, S, D]
                    length = residuals.shape[2]
                    for row, image in enumerate(batch.index):
                        own = {g: (i[i // length == row] % length).cpu() for g, i in groups.items()}
                        path = folder / f"{'text' if 'text' in groups else 'image'}-{image}.pt"
                        torch.save((residuals[row].clone(), own), path)
        self.bytes_on_disk = sum(path.stat().st_size for path in folder.iterdir())
        sums: dict[tuple[str, int], Sums] = defaultdict(Sums)
        for path in sorted(folder.iterdir()):
            residual, own = torch.load(path)
            for layer in range(len(self.names)):
                for group, index in own.items():
                    x = residual[layer].index_select(0, index).to(self.device).float()
                    self._add(sums, group, layer, x)
            path.unlink()
        folder.rmdir()
        return {key: of_key.compute() for key, of_key in sums.items()}

    def _add(self, sums: dict[tuple[str, int], Sums], group: str, layer: int, x: Tensor) -> None:
        sae = self.saes[self.names[layer]]
        with torch.autocast(self.device, enabled=False):
            latents = sae.encode(x)
            sums[group, layer].update(x, latents, sae.decode(latents))

    @cached_property
    def hooked(self) -> Any:
        """The same weights in TransformerLens' layout, in the precision that its users would load."""
        from sae_lens import HookedSAETransformer
        from transformer_lens import HookedTransformerConfig
        from transformer_lens.loading_from_pretrained import (
            convert_hf_model_config,
            get_pretrained_state_dict,
        )
        from transformers import AutoModelForCausalLM

        folder = str(self.setup.folder / "llm")
        # Its settings for Gemma 2 hang on the name.
        gemma = self.model.llm.model.config.model_type == "gemma2"
        known = convert_hf_model_config("google/gemma-2-2b" if gemma else folder)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        known |= {"n_ctx": 512, "dtype": dtype, "device": self.device, "init_weights": False}
        config = HookedTransformerConfig.from_dict(known | {"tokenizer_name": None})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        state = get_pretrained_state_dict(folder, config, model, dtype=dtype)
        hooked = HookedSAETransformer(config).eval().requires_grad_(False)
        options = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed"), False)
        hooked.load_and_process_state_dict(state, **options)
        return hooked

    def not_needed(self, name: str) -> int:
        """Bytes on a GPU that a contender has no use for: our decoder's layers beside TransformerLens'."""
        if name != "saelens" or self.device != "cuda":
            return 0
        return sum(parameter.nbytes for parameter in self.model.llm.layers.parameters())

    def run(self, name: str, batches: Iterable[Batch]) -> tuple[float, Found]:
        """Seconds of one probe, and what it found."""
        made: Callable[[Iterable[Batch]], Found] = getattr(self, name.replace("-", "_"))
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        found = made(batches)  # Ends in Python numbers: nothing is queued any more.
        return time.perf_counter() - start, found


def _memory(setup: Setup, name: str) -> Row:
    """Bytes of one contender with N and 4N images; runs in a process of its own."""
    contenders = Contenders(setup)
    found: Row = {}
    contenders.run(name, contenders.batches(setup.size.num_images))  # Warms up.
    for factor in (1, 4):
        contenders.probe = contenders.make_probe()  # Other images: their captions are not known yet.
        images = contenders.batches(factor * setup.size.num_images)
        memory = measure.peak_memory(setup.device, partial(contenders.run, name, images))
        found |= {f"{key}_{factor}n": value for key, value in memory.items()}
    return found


def main(setup: Setup) -> Row:
    """Measures the contenders."""
    contenders, images = Contenders(setup), setup.size.num_images
    names = setup.only or NAMES
    print("  warming up", file=sys.stderr)
    # Ready before the clock starts: what making them costs is measured by `data`.
    batches = list(contenders.batches(images))
    found, memory = {}, {}
    for name in names:
        found[name] = contenders.run(name, batches)[1]
        if setup.in_process:
            peak = measure.peak_memory(setup.device, partial(contenders.run, name, batches))["peak_bytes"]
            memory[name] = {"peak_bytes": peak - contenders.not_needed(name)}

    def timed(name: str, _: int) -> list[float]:
        return [contenders.run(name, batches)[0]]

    runs: dict[str, Laps] = {name: partial(timed, name) for name in names}
    rows = measure.compare(runs, setup.repeats, until=setup.until)
    for row in rows:
        name = row["name"]
        row["images_per_s"] = images / row["step_s"]
        row["bytes_on_disk"] = contenders.bytes_on_disk if name == "dense" else 0
        of_image = found[name]["image", len(contenders.names) // 2]
        row |= {f"{key}_image_middle": of_image[key] for key in ("fvu", "cosine", "l0")}
        row |= memory.get(name) or measure.in_new_process(_memory, setup, name)
    work = {"images": images, "layers": len(contenders.names), "d_sae": setup.size.d_sae}
    return {"precision": "bf16-mixed" if contenders.bf16 else "32-true", "work": work, "results": rows}


COLUMNS = (
    "name images_per_s step_s step_s_p10 step_s_p90 speedup speedup_min speedup_max bytes_on_disk "
    "peak_bytes_1n peak_bytes_4n fvu_image_middle cosine_image_middle l0_image_middle"
).split()
