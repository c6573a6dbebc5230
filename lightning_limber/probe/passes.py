"""What one probe measures: passes over held-out images.

Pass 1, all images: one forward with the image, one of the same captions alone, one with noise in the
image's place. At every probed layer a hook runs the SAE and adds to sums by image (metrics.py); no
activation outlives its batch. Pass 2, `costly_images` of them: one more forward whose residual streams
are kept for the length of a batch, and forwards that go on from each layer with something replaced.
Where the SAEs do not fit the device together, both passes are made for each chunk of layers in turn.
Everything after that (intervals, chance levels, words) is arithmetic on sums: findings.py.

Groups of tokens:

    image    image positions                        caption  caption positions behind the image
    text     the same captions, without an image    noise    image positions, filled with Gaussian
                                                             noise of the image tokens' norms

Never counted: the first position of a sequence (an attention sink in every LLM), and tokens whose norm
at a layer is more than `outlier_factor` times the median of plain text there (sinks that form
elsewhere). Their share is the metric ``outliers``.
"""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.data.layout import Sequences
from lightning_limber.models.limber import Limber
from lightning_limber.probe.alignment import ImageSums, SAEAlignment, active_latents
from lightning_limber.probe.findings import Clock, Descriptions, Findings, PassSums, ProbeConfig, Report
from lightning_limber.probe.saes import chunks_on_device, hook_layer
from lightning_limber.probe.sanity_check import TextStats
from lightning_limber.probe.screened_encoder import make_encoder


class Probe:
    """One set of SAEs on one LLM; `run` measures whatever adapter the model has at that moment.

    Args:
        model: With its LLM loaded.
        saes: By hook name; on the model's device, or on the CPU where there is a budget.
        text: Yardsticks of plain text by hook name, from the text gate.
        config: What is measured.
        descriptions: By hook name, for `match`; layers without any have no match.
        context: Makes the context of each forward (autocast).
        gather: Makes of a process' list the list of all processes' items, in any order.
        sae_memory_gb: Most that SAEs may take on the device at a time; see `chunks_on_device`.
    """

    def __init__(
        self,
        model: Limber,
        saes: dict[str, Any],
        text: dict[str, TextStats],
        config: ProbeConfig,
        descriptions: dict[str, Descriptions] | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
        gather: Callable[[list], list] = lambda items: items,
        sae_memory_gb: float | None = None,
    ) -> None:
        self.model, self.text, self.config = model, text, config
        # In the order in which the residual stream passes them.
        self.saes = dict(sorted(saes.items(), key=lambda item: (_next_layer(item[0]), item[0])))
        self.encoders = {name: make_encoder(sae, model.device) for name, sae in self.saes.items()}
        self.context, self.gather, self.sae_memory_gb = context, gather, sae_memory_gb
        self.extras = set(config.extras)
        self.clock = Clock()
        self._text_sums: dict[str, ImageSums] = {}
        layers = {name: hook_layer(name) for name in self.saes}
        self.findings = Findings(layers, text, config, descriptions or {}, model.llm, self.clock)

    @torch.no_grad()
    def run(
        self,
        batches: Iterable[Batch],
        costly_batches: Iterable[Batch] = (),
        attributes: Callable[[Any], set[str] | None] = lambda scene: None,
        same_captions: bool = False,
    ) -> Report:
        """Measures everything.

        Args:
            batches: Held-out images, on the model's device, this process' share; iterated for each chunk
                of SAEs.
            costly_batches: The first of them again, for the costly metrics; may be empty.
            attributes: Truth of a scene in words, for the detectors.
            same_captions: The captions are the same at every call: what the LLM makes of them without an
                image is then measured by the first alone, as neither LLM nor SAEs ever change.
        """
        self.clock.seconds.clear()
        training = self.model.training
        self.model.eval()
        known = self._text_sums if same_captions else {}
        groups = ["image", "caption", *([] if known else ["text"])]
        groups += ["noise"] if "noise" in self.extras else []
        sums = {("text", name): of for name, of in known.items()}
        truth: dict[int, tuple[int, list[str], set[str] | None]] = {}
        lens: dict[str, list[Tensor]] = {name: [] for name in self.saes}
        losses: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        cross: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for chunk in chunks_on_device(self.saes, self.model.device, self.sae_memory_gb):
            names = list(chunk)
            metrics = {
                (group, name): SAEAlignment(self._keeps_strength(group)).to(self.model.device)
                for group in groups
                for name in names
            }
            for batch in batches:
                self._clean_pass(batch, names, metrics, lens)
                for place, captions, scene in zip(batch.index, batch.captions, batch.scenes, strict=True):
                    truth[place] = place, captions, attributes(scene)
            # One by one: the parts that a metric was given are let go when its whole is made.
            sums |= {key: metrics.pop(key).compute() for key in list(metrics)}
            for batch in costly_batches:
                self._costly_pass(batch, names, sums, losses, cross)
        self.model.train(training)
        if same_captions:
            self._text_sums = {name: sums["text", name] for name in self.saes}
        return self.findings.report(
            PassSums(
                # In one order, whatever the chunks were.
                groups={
                    (group, name): sums[group, name]
                    for group in ("image", "caption", "text", "noise")
                    for name in self.saes
                    if (group, name) in sums
                },
                truth=sorted(self.gather(list(truth.values())), key=lambda item: item[0]),
                lens={
                    name: set(self.gather(torch.cat(parts).unique().tolist())) - {-1}
                    for name, parts in lens.items()
                    if "lens_hit" in self.extras
                },
                losses=self.gather(
                    [
                        item
                        for places, parts in losses.items()
                        for item in zip(places, torch.stack(parts, dim=1).tolist(), strict=True)
                    ]
                ),
                cross=self.gather(
                    [(list(key), torch.cat(parts, dim=1).cpu()) for key, parts in cross.items()]
                ),
            )
        )

    @torch.no_grad()
    def latents(
        self, image_tokens: Tensor, read: Callable[[str, Tensor], None], names: Iterable[str] | None = None
    ) -> None:
        """Hands what the SAEs find in image tokens [B, P, D_l] to ``read(hook name, latents [B, P, K])``.

        Latents are NaN at image tokens that are never counted.

        Args:
            image_tokens: On the model's device.
            read: Called once for each layer; keep little of what it is given.
            names: Hook names; None: all.
        """
        chosen = {name: sae for name, sae in self.saes.items() if names is None or name in names}
        training = self.model.training
        self.model.eval()
        with self.context():
            opening = self.model.collator().opening(len(image_tokens))
            positions = opening.image_positions.to(image_tokens.device)  # [B * P]
            counted = opening.position_ids.flatten()[opening.image_positions] > 0
            counted = counted.to(image_tokens.device)
            opening = apply_to_collection(opening, Tensor, lambda tensor: tensor.to(image_tokens.device))
            embeds = self.model.embed_sequences(opening, image_tokens)

            def look(name: str, residual: Tensor) -> None:
                x = residual.flatten(0, 1).index_select(0, positions).float()  # [B * P, D_l]
                with torch.autocast(x.device.type, enabled=False):
                    found = self.encoders[name](x).to_dense()  # [B * P, K]
                never = ~(self._keep(name, x) & counted)
                found = found.masked_fill(never[:, None], torch.nan)
                read(name, found.unflatten(0, image_tokens.shape[:2]))

            for chunk in chunks_on_device(chosen, self.model.device, self.sae_memory_gb):
                with self.model.llm.residual_hooks({name: partial(look, name) for name in chunk}):
                    self.model.llm.decode(embeds)
        self.model.train(training)

    def _keeps_strength(self, group: str) -> bool:
        """Whether some metric needs what each latent does on each image of the group."""
        of_match = "match" in self.extras and bool(self.findings.descriptions)
        return (of_match and group != "caption") or (
            "detectors" in self.extras and group in ("image", "text")
        )

    # -- passes -----------------------------------------------------------------------------------

    def _clean_pass(
        self,
        batch: Batch,
        names: list[str],
        metrics: dict[tuple[str, str], SAEAlignment],
        lens: dict[str, list[Tensor]],
    ) -> None:
        start, hooks = time.perf_counter(), sum(self.clock.seconds.values())
        with self.context():
            tokens = self.model.image_tokens(batch)
            where = {"image": "image", "caption": "caption"}
            self._forward(batch, names, batch, tokens, where, metrics, lens)
            if ("text", names[0]) in metrics and batch.without_image is not None:
                self._forward(batch, names, batch.without_image, None, {"text": "caption"}, metrics)
            if "noise" in self.extras:
                with self.clock("noise"):
                    noise = gaussian_like(tokens, batch.ids)
                    before = self.clock.seconds["sae"]
                    self._forward(batch, names, batch, noise, {"noise": "image"}, metrics)
                self.clock.seconds["noise"] -= self.clock.seconds["sae"] - before
        spent = sum(self.clock.seconds.values()) - hooks
        self.clock.seconds["forward"] += time.perf_counter() - start - spent

    def _forward(
        self,
        batch: Batch,
        names: list[str],
        sequences: Sequences,
        image_tokens: Tensor | None,
        groups: dict[str, str],
        metrics: dict[tuple[str, str], SAEAlignment],
        lens: dict[str, list[Tensor]] | None = None,
    ) -> None:
        """One forward of the LLM that feeds the metrics of the named layers."""
        indices = {group: sequences.groups[where] for group, where in groups.items()}
        embeds = self.model.embed_sequences(sequences, image_tokens)

        def read(name: str, residual: Tensor) -> None:
            with self.clock("sae"):
                for group, (index, row) in indices.items():
                    x = residual.flatten(0, 1).index_select(0, index).float()  # [n, D_l]
                    latents, reconstruction = self._sae(name, x)
                    keep = self._keep(name, x)
                    metrics[group, name].update(x, reconstruction, latents, row, batch.index, keep)
            if lens is not None and "lens_hit" in self.extras:
                with self.clock("lens_hit"):
                    index, row = indices["image"]
                    x = residual.flatten(0, 1).index_select(0, index)  # [n, D_l]
                    self._lens(name, x, row, batch, lens[name])

        with self.model.llm.residual_hooks({name: partial(read, name) for name in names}):
            self.model.llm.decode(embeds)

    def _sae(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [n, K], dense or sparse, and reconstruction [n, D_l] of float32 tokens."""
        with torch.autocast(x.device.type, enabled=False):
            latents = self.encoders[name](x)
            return latents, self.saes[name].decode(latents)

    def _keep(self, name: str, x: Tensor) -> Tensor:
        """Which of the tokens [n, D_l] are no outliers."""
        return x.norm(dim=-1) <= self.config.outlier_factor * self.text[name].median_norm

    def _lens(self, name: str, x: Tensor, row: Tensor, batch: Batch, lens: list[Tensor]) -> None:
        """Keeps the logit lens' top tokens at image positions, as image * V + token id; -1 at outliers."""
        llm = self.model.llm
        hidden = llm.decode(x[None], first_layer=len(llm.layers))[0]  # final norm alone
        top = llm.logits(hidden).topk(self.config.lens_top_k, dim=-1).indices  # [n, k]
        place = torch.tensor(batch.index, device=x.device)[row]
        code = place[:, None] * llm.vocab_size + top
        lens.append(code.masked_fill(~self._keep(name, x.float())[:, None], -1).flatten())

    def _costly_pass(
        self,
        batch: Batch,
        names: list[str],
        sums: dict[tuple[str, str], ImageSums],
        losses: dict[tuple[int, ...], list[Tensor]],
        cross: dict[tuple[int, ...], list[Tensor]],
    ) -> None:
        """Forwards that go on from each named layer with something replaced, and tokens of all layers
        through the named layers' SAEs.
        """
        model, llm = self.model, self.model.llm
        with self.context():
            embeds = model.embed_sequences(batch, model.image_tokens(batch))
            index, every = batch.groups["image"][0], batch.groups["image_copies"][0]
            places = tuple(batch.index)
            kept: dict[str, Tensor] = {}
            with llm.residual_hooks({name: partial(kept.__setitem__, name) for name in self.saes}):
                hidden = llm.decode(embeds)
            if "loss_recovered" in self.extras:
                with self.clock("loss_recovered"):
                    # The clean forward is the same for each chunk: counted with the first.
                    if places not in losses:
                        losses[places].append(self._losses(batch, hidden))
                    for name in names:
                        residual = kept[name]
                        x = residual.flatten(0, 1).index_select(0, every)
                        counted = self._keep(name, x.float())[:, None]
                        mean = _mean(sums["image", name]).to(x)
                        for new in (self._sae(name, x.float())[1].to(x), mean):
                            new = torch.where(counted, new, x)
                            spliced = residual.flatten(0, 1).index_copy(0, every, new).view_as(residual)
                            onward = llm.decode(spliced, first_layer=_next_layer(name))
                            losses[places].append(self._losses(batch, onward))
            if "cross_layer" in self.extras:
                with self.clock("cross_layer"):
                    cross[places].append(self._cross(kept, names, index))

    def _losses(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Cross-entropy summed over each image's targets, [B] float64."""
        losses, _ = self.model.target_losses(batch, hidden)
        sums = losses.new_zeros(len(batch.ids), dtype=torch.float64)
        return sums.index_add_(0, batch.label_images, losses.double())

    def _cross(self, kept: dict[str, Tensor], names: list[str], index: Tensor) -> Tensor:
        """Tokens of all L layers through the SAEs of c named ones: sums [L, c, 3] of squared errors, active
        latents and tokens.
        """
        table = torch.zeros(len(kept), len(names), 3, dtype=torch.float64, device=index.device)
        for i, name in enumerate(self.saes):
            x = kept[name].flatten(0, 1).index_select(0, index).float()
            keep = self._keep(name, x)
            for j, other in enumerate(names):
                latents, reconstruction = self._sae(other, x)
                errors = (x - reconstruction).double().pow(2).sum(-1)
                by_token = torch.stack([errors, active_latents(latents), torch.ones_like(errors)], dim=-1)
                table[i, j] = torch.where(keep[:, None], by_token, 0.0).sum(0)
        return table


def _mean(group: ImageSums) -> Tensor:
    """[D] mean over all tokens of all images."""
    return group.total.sum(0) / group.sums[:, 0].sum()


def _next_layer(hook_name: str) -> int:
    """The layer that the residual stream at this hook enters."""
    return hook_layer(hook_name) + hook_name.endswith("post")


def gaussian_like(tokens: Tensor, ids: list[str]) -> Tensor:
    """Gaussian directions with the norms of `tokens` [B, P, D_l]; an image's are a function of its name."""
    noise = []
    for name in ids:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise.append(torch.randn(tokens.shape[1:], generator=generator))
    directions = torch.stack(noise).to(tokens)
    return directions * (tokens.norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True))
