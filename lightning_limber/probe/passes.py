"""What one probe runs: passes over held-out images.

Pass 1, all images: a forward with the image, one of the same captions alone, and one for each group that
fills the image's place with something else, as far as the group's tokens reach. At every probed layer a
hook runs the SAE, adds to sums by image (token_stats.py) and hands the tokens to the metrics; no activation
outlives its batch. Pass 2, the first `intervention_images`: one more forward whose residual streams are
kept for the length of a batch, and what forwards the metrics branch off from it. Where the SAEs do not fit
the device together, both passes are made for each chunk of layers in turn. What was kept then goes to
`ProbeMetric.compute`.

Groups of tokens that are always measured:

    image    image positions                        caption  caption positions behind the image
    text     the same captions, without an image (with `text_tokens` ``prompt``: all of these sequences)

Never counted: the first position of a sequence (an attention sink in every LLM), the first token of a
caption (without an image it is the same in all captions), and at each layer the tokens that point where the
LLM's first position does (sinks that form elsewhere, see `sanity_check.counted`). The share of the latter
is the metric ``outliers``. Where none of a group's tokens is left, its metrics are NaN.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.data.layout import Sequences
from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.models.limber import Limber
from lightning_limber.models.saes import chunks_on_device, hook_layer, next_layer
from lightning_limber.probe.config import ProbeConfig
from lightning_limber.probe.explanations import Descriptions
from lightning_limber.probe.intervention import Intervention
from lightning_limber.probe.metrics import Group, Measurement, ProbeMetric, Tokens
from lightning_limber.probe.metrics.base import CAPTION, IMAGE, TEXT, Found, ImageInfo, nan_like
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.products import sae_products
from lightning_limber.probe.sanity_check import TextStats, counted
from lightning_limber.probe.screened_encoder import make_encoder
from lightning_limber.probe.tables import Row
from lightning_limber.probe.token_stats import ImageStats, TokenStats
from lightning_limber.utils.clock import Clock

Kept = dict[tuple[int, str, str], list[tuple[list[int], Any]]]
"""What metrics returned, by number of the metric, group and hook name: indices of the images, and items."""
COUNTS = ("tokens", "outliers")
"""Metrics that a group without a token has too."""
INTERVENTIONS = ""
"""Stands for the group of what `intervene` returned."""


@dataclass(frozen=True)
class Report:
    """What a probe found; tables, matrices and sums by image are those of `Measurement`."""

    rows: list[Row]
    tables: dict[str, list[dict[str, Any]]]
    matrices: dict[str, dict[str, list[list[float]]]]
    seconds: dict[str, float]
    by_image: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    images: Sequence[str] = ()


class Probe:
    """One set of SAEs on one LLM; `run` measures whatever adapter the model has at that moment.

    Args:
        model: Has its LLM loaded.
        saes: By hook name; on the model's device, or on the CPU where `config.sae_memory_gb` is given.
        text: Yardsticks of plain text by hook name, from the sanity check.
        config: What is measured.
        descriptions: By hook name, for `match`; layers without any have no match.
        context: Makes the context of each forward (autocast).
        gather: All-gathers a list across processes (order unspecified).
        texts: Gives captions of the training part, the same in every process, for metrics that compare with
            text; none where there is no training part.
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
        texts: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self.model, self.text, self.config = model, text, config
        # In the order in which the residual stream passes them.
        self.saes = dict(sorted(saes.items(), key=lambda item: (next_layer(item[0]), item[0])))
        self.layers = {name: hook_layer(name) for name in self.saes}
        self.encoders = {name: make_encoder(sae, model.device) for name, sae in self.saes.items()}
        given = descriptions or {}
        self.descriptions = {name: given[name] for name in self.saes if name in given}
        sinks = {name: torch.tensor(text[name].sink, device=model.device) for name in self.saes}
        self._sinks = {name: sink if len(sink) else None for name, sink in sinks.items()}
        self.context, self.gather, self.texts = context, gather, texts
        self.clock = Clock()
        self.noted = False
        if not self.hooks_of(IMAGE):
            raise ValueError(
                f"model.entry.layer={model.entry.config.layer}: no SAE reads behind it; they are at layers "
                f"{', '.join(map(str, self.layers.values()))} (probe.layers)."
            )
        self.metrics = config.make_metrics()
        needed = [group for metric in self.metrics for group in metric.groups]
        self.groups: dict[str, Group] = {}  # By name.
        text_group = replace(TEXT, positions=config.text_tokens)
        for group in (IMAGE, CAPTION, text_group, *needed):
            if self.groups.setdefault(group.name, group) != group:
                raise ValueError(
                    f"probe.metrics: two metrics define a group '{group.name}', and not alike."
                )
        for metric in self.metrics:
            with self.clock(metric.name):  # Part of the first run's seconds.
                metric.setup(self)
        self._known_text: tuple[dict[tuple[str, str], ImageStats], Kept] = {}, {}

    @property
    def panels(self) -> list[Panel]:
        """How the metrics are drawn, in their order."""
        return [panel for metric in self.metrics for panel in metric.panels]

    @property
    def intervenes(self) -> bool:
        """Whether some metric runs forwards with something replaced."""
        return any(_intervenes(metric) for metric in self.metrics)

    @torch.no_grad()
    def run(
        self,
        batches: Iterable[Batch],
        intervention_batches: Iterable[Batch] = (),
        attributes: Callable[[Any], set[str] | None] = lambda scene: None,
        same_captions: bool = False,
        start: Sequence[Row] = (),
        counter: AbstractContextManager[Any] | None = None,
    ) -> Report:
        """Measures everything.

        Args:
            batches: Held-out images, on the model's device, this process' share; iterated for each chunk
                of SAEs.
            intervention_batches: The first of them again, for metrics that intervene; may be empty.
            attributes: Truth of a scene in words, for the detectors.
            same_captions: The captions are the same at every call: what the LLM makes of them without an
                image is then measured by the first alone, as neither LLM nor SAEs ever change.
            start: Rows of the untrained adapter, a control; empty where they are not known.
            counter: Counts FLOPs, of both passes alone: it slows down the many small operations behind.
        """
        training = self.model.training
        self.model.eval()
        stats, kept = self._known_text if same_captions else ({}, {})
        stats, kept = dict(stats), defaultdict(list, kept)
        known = {group for group, _ in stats}
        images: dict[int, ImageInfo] = {}
        with counter or nullcontext():
            for chunk in chunks_on_device(self.saes, self.model.device, self.config.sae_memory_gb):
                accumulators = {
                    (group, name): TokenStats(
                        any(group in metric.activation_sums for metric in self.metrics),
                        any(group in metric.activation_maxima for metric in self.metrics),
                    ).to(self.model.device)
                    for group in self.groups
                    for name in self.hooks_of(self.groups[group], chunk)
                    if group not in known
                }
                for batch in batches:
                    self._clean_pass(batch, accumulators, kept)
                    told = zip(batch.index, batch.image_ids, batch.captions, batch.scenes, strict=True)
                    images |= {i: ImageInfo(i, name, said, attributes(s)) for i, name, said, s in told}
                # One by one: parts are freed when their whole is made.
                stats |= {key: accumulators.pop(key).compute() for key in list(accumulators)}
                for batch in intervention_batches if self.intervenes else ():
                    self._intervention_pass(batch, self.hooks_of(IMAGE, chunk), kept, same_captions)
        self.model.train(training)
        kept = apply_to_collection(dict(kept), Tensor, lambda tensor: tensor.cpu())
        if same_captions:
            alone = {group.name for group in self.groups.values() if not group.with_image}
            self._known_text = (
                {key: of_key for key, of_key in stats.items() if key[0] in alone},
                {key: items for key, items in kept.items() if key[1] in alone},
            )
        return self._report(stats, kept, images, start)

    def _report(
        self,
        stats: dict[tuple[str, str], ImageStats],
        kept: Kept,
        images: dict[int, ImageInfo],
        start: Sequence[Row],
    ) -> Report:
        """Joins what all processes kept, and computes each metric."""
        joined: Kept = defaultdict(list)
        for key, items in self.gather(list(kept.items())):
            joined[key] += items
        # In one order, whatever the chunks and processes were.
        order = [(group, name) for group in self.groups for name in self.hooks_of(self.groups[group])]
        data = Measurement(
            self,
            {key: stats[key] for key in order},
            sorted(self.gather(list(images.values())), key=lambda image: image.index),
            start,
        )
        empty = data.without_tokens
        for number, metric in enumerate(self.metrics):

            def items(group: str, name: str, number: int = number) -> list[tuple[list[int], Any]]:
                return sorted(joined.get((number, group, name), ()), key=lambda item: item[0])

            found = Found(
                {key: items(*key) for key in order if (number, *key) in joined},
                {name: items("", name) for name in self.saes if (number, INTERVENTIONS, name) in joined},
            )
            with self.clock(metric.name):
                for estimate in metric.compute(data, found):
                    known = (estimate.layer, estimate.group) not in empty or estimate.metric in COUNTS
                    value = estimate.value if known else nan_like(estimate.value)
                    data.estimates.append(estimate._replace(value=value))
        for note in data.notes if not self.noted else ():  # Once is enough.
            rank_zero_info(f"[probe] {note}")
        self.noted = True
        rows = [row for estimate in data.estimates for row in estimate.rows()]
        names = [image.name for image in data.images]
        return Report(rows, data.tables, data.matrices, self.clock.take(), data.by_image, names)

    def latents(
        self,
        image_tokens: ImageTokens,
        read: Callable[[str, Tensor], None],
        names: Iterable[str] | None = None,
    ) -> None:
        """Hands image tokens' latents to ``read(hook name, latents [B, P, K])``, as `read_image`: NaN at
        tokens that are never counted. Keep little of what `read` is given.
        """
        shape = image_tokens.tokens.shape[:2]

        def look(name: str, residual: Tensor, keep: Tensor) -> None:
            with torch.autocast(residual.device.type, enabled=False):
                found = self.encoders[name](residual.float()).to_dense()  # [B * P, K]
            read(name, found.masked_fill(~keep[:, None], torch.nan).unflatten(0, shape))

        self.read_image(self.model.opening(len(image_tokens)), image_tokens, look, names)

    @torch.no_grad()
    def read_image(
        self,
        sequences: Sequences,
        image_tokens: ImageTokens,
        read: Callable[[str, Tensor, Tensor], None],
        names: Iterable[str] | None = None,
    ) -> None:
        """Hands image tokens at each layer to ``read(hook name, residual [B * P, D], keep [B * P])``.

        Args:
            sequences: A sequence for each of the B images, on the model's device.
            image_tokens: On the model's device.
            read: Called for each layer from theirs on; `keep` is false at tokens that are never counted.
            names: Hook names; None: all.
        """
        chosen = {name: self.saes[name] for name in self.hooks_of(IMAGE, names)}
        training = self.model.training
        self.model.eval()
        with self.context():
            positions = sequences.image_positions  # [B * P]
            behind_first = sequences.position_ids.flatten()[positions] > 0

            def look(name: str, residual: Tensor) -> None:
                selected = residual.flatten(0, 1).index_select(0, positions)
                read(name, selected, self.keep(name, selected.float()) & behind_first)

            for chunk in chunks_on_device(chosen, self.model.device, self.config.sae_memory_gb):
                with self.model.llm.residual_hooks({name: partial(look, name) for name in chunk}):
                    self.model.decode(sequences, image_tokens)
        self.model.train(training)

    def encode(self, hook: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [n, K], dense or sparse, and reconstruction [n, D] of float32 tokens [n, D]."""
        with torch.autocast(x.device.type, enabled=False), sae_products(x.device):
            latents = self.encoders[hook](x)
            return latents, self.saes[hook].decode(latents)

    def keep(self, hook: str, x: Tensor) -> Tensor:
        """[n] false at sinks among float32 tokens [n, D], which are not counted."""
        factor = self.config.outlier_factor
        longest = math.inf if factor is None else factor * self.text[hook].median_norm
        return counted(x, self._sinks[hook], longest)

    def hooks_of(self, group: Group, names: Iterable[str] | None = None) -> list[str]:
        """Those of the probe's hooks (or of `names`) at which a group has tokens: at image positions there
        are none below the layer where image tokens enter.
        """
        first = self.model.entry.config.layer if group.positions == "image" else 0
        return [name for name in names or self.saes if next_layer(name) >= first]

    def filled(self, group: Group, batch: Batch, image_tokens: ImageTokens) -> ImageTokens:
        """What stands in the image's place in a group that fills it."""
        assert group.fill is not None
        fill = partial(group.fill, self.model, batch)
        if group.as_text:
            return ImageTokens(fill(image_tokens.tokens))
        return image_tokens.filled(fill)

    # -- passes -----------------------------------------------------------------------------------

    def _clean_pass(
        self, batch: Batch, accumulators: dict[tuple[str, str], TokenStats], kept: Kept
    ) -> None:
        """One forward for each thing that stands in the image's place, and one without an image."""
        with self.context(), self.clock("forward"):
            tokens = self.model.image_tokens(batch)
            wanted = {group for group, _ in accumulators}
            forwards: dict[tuple, list[Group]] = defaultdict(list)
            for group in self.groups.values():
                if group.name in wanted:
                    forwards[group.with_image, group.fill].append(group)
            for (with_image, fill), groups in forwards.items():
                if not with_image:
                    if batch.without_image is not None:
                        self._forward(batch, batch.without_image, None, groups, accumulators, kept)
                elif fill is None:
                    self._forward(batch, batch, tokens, groups, accumulators, kept)
                else:
                    # No token sees what follows it: a group at image positions needs no captions.
                    short = all(group.positions == "image" for group in groups)
                    sequences = batch.without_captions if short else batch
                    with self.clock(groups[0].name):
                        if sequences is not None:
                            filled = self.filled(groups[0], batch, tokens)
                            self._forward(batch, sequences, filled, groups, accumulators, kept)

    def _forward(
        self,
        batch: Batch,
        sequences: Sequences,
        image_tokens: ImageTokens | None,
        groups: list[Group],
        accumulators: dict[tuple[str, str], TokenStats],
        kept: Kept,
    ) -> None:
        """One forward of the LLM that feeds sums and metrics."""
        names = list(dict.fromkeys(name for _, name in accumulators))

        def read(name: str, residual: Tensor) -> None:
            for group in groups:
                if (group.name, name) not in accumulators:
                    continue
                positions, image_rows = sequences.groups[group.positions]
                with self.clock("sae" if group.fill is None else group.name):
                    selected = residual.flatten(0, 1).index_select(0, positions)  # [n, D]
                    x = selected.float()
                    latents, reconstruction = self.encode(name, x)
                    keep = self.keep(name, x)
                    accumulators[group.name, name].update(
                        x, reconstruction, latents, image_rows, batch.index, keep
                    )
                tokens = Tokens(
                    group.name, name, batch, selected, x, latents, reconstruction, image_rows, keep
                )
                for number, metric in enumerate(self.metrics):
                    with self.clock(metric.name):
                        item = metric.update(tokens)
                    if item is not None:
                        kept[number, group.name, name].append((batch.index, item))

        with self.model.llm.residual_hooks({name: partial(read, name) for name in names}):
            self.model.decode(sequences, image_tokens)

    def _intervention_pass(
        self, batch: Batch, names: list[str], kept: Kept, same_captions: bool = False
    ) -> None:
        """Lets metrics branch off from a batch's forward at each named layer."""
        if not batch.index:  # No image could be read.
            return
        with self.context():
            with self.clock("forward"):
                run = Intervention(self, batch, same_captions)
            for number, metric in enumerate(self.metrics):
                for name in names if _intervenes(metric) else ():
                    with self.clock(metric.name):
                        item = metric.intervene(run, name)
                    if item is not None:
                        kept[number, INTERVENTIONS, name].append((batch.index, item))


def _intervenes(metric: ProbeMetric) -> bool:
    return type(metric).intervene is not ProbeMetric.intervene
