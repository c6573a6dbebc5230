"""The base class of a probe's metrics, and what a metric is given.

A metric says which groups of tokens it needs, looks at the tokens of each group and layer as they pass
(`update`), may run forwards with something replaced (`intervene`), and makes estimates of what it and the
probe have kept (`compute`). Its panels say how they are drawn. Shapes: n tokens of B images, I images in
all, D the LLM's width, K latents, R bootstrap samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.probe import words
from lightning_limber.probe.palette import CONTROLS, Panel
from lightning_limber.probe.statistics import Comparison, bootstrap_weights, interval, permutations
from lightning_limber.probe.tables import Row
from lightning_limber.probe.token_stats import ImageStats, sum_by_image

if TYPE_CHECKING:
    from lightning_limber.models.limber import Limber
    from lightning_limber.probe.intervention import Intervention
    from lightning_limber.probe.passes import Probe

NAN = float("nan")


@dataclass(frozen=True)
class Group:
    """Tokens that the probe reads.

    Attributes:
        name: Name in tables and figures.
        positions: ``image``, ``caption`` or ``prompt``: which tokens of a sequence (`Sequences.groups`).
        fill: Makes what stands at the image positions [B, P, D] of the model, the batch and its image
            tokens [B, P, D]; None leaves the image tokens there. Each function costs a forward of its own.
        as_text: What `fill` makes stands among the embeddings, as words do. Else it takes the image tokens'
            way (`model.entry`), and is made of each tensor [B, P, D] that an image puts into the LLM.
        with_image: Whether the sequences have image positions at all.
    """

    name: str
    positions: str
    fill: Callable[[Limber, Batch, Tensor], Tensor] | None = None
    as_text: bool = False
    with_image: bool = True


IMAGE = Group("image", "image")
CAPTION = Group("caption", "caption")
TEXT = Group("text", "caption", with_image=False)


@dataclass(frozen=True)
class Tokens:
    """Tokens of one group at one layer in one batch.

    Attributes:
        group: Name of the group.
        hook: Hook name of the layer.
        batch: The batch.
        residual: [n, D] residual stream in the precision of the forward.
        x: [n, D] the same in float32.
        latents: [n, K] of the layer's SAE, dense or sparse COO.
        reconstruction: [n, D] by the SAE.
        image_rows: [n] image of each token, 0 to B - 1.
        keep: [n] false at attention sinks, which are not to be counted.
    """

    group: str
    hook: str
    batch: Batch
    residual: Tensor
    x: Tensor
    latents: Tensor
    reconstruction: Tensor
    image_rows: Tensor
    keep: Tensor

    def by_image(self, values: Tensor) -> Tensor:
        """Sums values [n, C] of the kept tokens over each image: [B, C] float64."""
        return sum_by_image(values.double(), self.image_rows, len(self.batch.index), self.keep)


class Estimate(NamedTuple):
    """One metric of one group at one layer (None: of all layers).

    `value` is a number, (value, low, high), bootstrap samples [1 + R] with the value itself first, or a
    comparison with chance.
    """

    layer: int | None
    group: str
    metric: str
    value: float | tuple[float, float, float] | Tensor | Comparison

    def rows(self) -> list[Row]:
        """Rows of the table; a comparison has ``{metric}_chance`` and ``{metric}_p`` beside its own."""
        key, value = (self.layer, self.group), self.value
        if isinstance(value, Comparison):
            chance = (value.chance, value.chance_low, value.chance_high)
            return [
                Row(*key, self.metric, value.value, value.low, value.high),
                Row(*key, f"{self.metric}_chance", *chance),
                Row(*key, f"{self.metric}_p", value.p, NAN, NAN),
            ]
        if isinstance(value, Tensor):
            value = interval(value)
        return [Row(*key, self.metric, *(value if isinstance(value, tuple) else (value, NAN, NAN)))]


@dataclass(frozen=True)
class ImageInfo:
    """A probed image: its index in the held-out set, its name, captions, and attributes where known."""

    index: int
    name: str
    captions: list[str]
    attributes: set[str] | None


def nan_like(
    value: float | tuple[float, float, float] | Tensor | Comparison,
) -> float | Tensor | Comparison:
    """NaN in the form of an estimate's value."""
    if isinstance(value, Comparison):
        return Comparison(*[NAN] * 7)
    return torch.full_like(value, NAN) if isinstance(value, Tensor) else NAN


Items = list[tuple[list[int], Any]]
"""What a metric returned for each batch, with the indices of the batch's images, in their order."""


class Found(NamedTuple):
    """What a metric's `update` returned by (group, hook name), and `intervene` by hook name."""

    updates: dict[tuple[str, str], Items]
    interventions: dict[str, Items]


@dataclass
class Measurement:
    """What the passes leave for `ProbeMetric.compute`, of all processes' images.

    Attributes:
        probe: The probe: its config, layers by hook name, yardsticks of text, descriptions and model.
        stats: Sums by (group, hook name).
        images: The I images, by index.
        start: Rows of the untrained adapter; empty where they are not known.
        estimates: Those of the metrics before this one.
        tables: Rows by name; ``name`` is written to ``name_epoch_{n}.csv``.
        matrices: Of each metric, tables [layer of the tokens][layer of the SAE] by name, which are drawn.
        notes: Sentences to print: why a number is NaN.
        by_image: Numerator and denominator [I, 2] float32 by (metric, group, layer) of metrics that are
            ratios of sums over images, to pair epochs and runs over them; 0, 0 at images without a part.
    """

    probe: Probe
    stats: dict[tuple[str, str], ImageStats]
    images: list[ImageInfo]
    start: Sequence[Row] = ()
    estimates: list[Estimate] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    matrices: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    by_image: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """Names of the groups that were measured."""
        return list(dict.fromkeys(group for group, _ in self.stats))

    @property
    def layers(self) -> dict[str, int]:
        """Layers by hook name, in the order of the residual stream."""
        return self.probe.layers

    @property
    def image_layers(self) -> dict[str, int]:
        """Those of `layers` that image tokens pass: not those below the layer where they enter."""
        return {hook: layer for hook, layer in self.layers.items() if ("image", hook) in self.stats}

    @property
    def controls(self) -> list[str]:
        """Names of the groups that stand in the image's place without its content (`CONTROLS`)."""
        return [name for name in CONTROLS if name in self.groups]

    @property
    def image_groups(self) -> list[str]:
        """Names of the groups at image positions: image tokens, and what is put in their place."""
        return [name for name in self.groups if self.probe.groups[name].positions == "image"]

    @cached_property
    def without_tokens(self) -> set[tuple[int, str]]:
        """(layer, group) where no token is counted; a note says which."""
        found: dict[str, list[int]] = defaultdict(list)
        for (group, hook), stats in self.stats.items():
            if not stats.sums[:, 0].any():
                found[group].append(self.layers[hook])
        self.notes += [
            f"All tokens of group '{group}' at layers {', '.join(map(str, layers))} are attention sinks, "
            "or there are none: its metrics there are NaN."
            for group, layers in found.items()
        ]
        return {(layer, group) for group, layers in found.items() for layer in layers}

    def add_ratio(
        self, metric: str, group: str, layer: int, over: Tensor, under: Tensor, items: Items | None = None
    ) -> None:
        """Keeps a metric's numerator and denominator of each image in `by_image`.

        Args:
            metric, group, layer: Where the table has it.
            over: [n] numerators; of all images, or of those of `items`, in the order of the images.
            under: [n] denominators.
            items: Names n of the images: the others have no part.
        """
        ratio = torch.zeros(len(self.images), 2)
        chosen = None if items is None else {i for index, _ in items for i in index}
        rows = [row for row, image in enumerate(self.images) if chosen is None or image.index in chosen]
        ratio[rows] = torch.stack([over, under], dim=-1).float()
        self.by_image[metric, group, layer] = ratio

    @cached_property
    def weights(self) -> Tensor:
        """[1 + R, I] bootstrap weights over the images."""
        return self.bootstrap_weights(len(self.images))

    def bootstrap_weights(self, images: int) -> Tensor:
        """[1 + R, images], for a metric that has only some of the images."""
        return bootstrap_weights(images, self.probe.config.bootstrap_samples, self.probe.config.seed)

    def permutations(self, images: int | None = None, at_most: int | None = None) -> Tensor:
        """[M, I] permutations for a chance level."""
        count = min(at_most or self.probe.config.bootstrap_samples, self.probe.config.bootstrap_samples)
        return permutations(images or len(self.images), count, self.probe.config.seed)

    @cached_property
    def caption_words(self) -> tuple[list[str], Tensor]:
        """Content words of all captions, and which image has which: bool [I, W]."""
        said = [{w for text in image.captions for w in words.content_words(text)} for image in self.images]
        return words.word_table([sorted(found) for found in said])


class ProbeMetric:
    """One metric of the probe; a subclass with its arguments is named in ``probe.metrics``.

    Attributes:
        name: Name under which its time is logged; the class' name unless it is given.
        groups: Groups that it needs beside image, caption and text.
        activation_sums: Groups of which it needs the activation sum of each latent by image.
        activation_maxima: Groups of which it needs the largest activation of each latent by image.
        panels: How its metrics are drawn.
    """

    name: str
    groups: tuple[Group, ...] = ()
    activation_sums: tuple[str, ...] = ()
    activation_maxima: tuple[str, ...] = ()
    panels: tuple[Panel, ...] = ()

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def setup(self, probe: Probe) -> None:
        """Called once, before the first forward."""

    def update(self, tokens: Tokens) -> Any:
        """Called for each group, layer and batch of a forward.

        Returns:
            Plain values and tensors to keep for `compute`, on any device; None keeps nothing. Ask nothing
            of the device here (no ``.item()``): the forward would wait.
        """

    def intervene(self, run: Intervention, hook: str) -> Any:
        """Called for each layer and batch of the first ``probe.intervention_images`` images.

        Returns:
            As `update`.
        """

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        """Makes estimates, in every process alike.

        Args:
            data: What the passes leave.
            found: What `update` and `intervene` returned.
        """
        return ()


class TokenMean(ProbeMetric):
    """A metric that is a mean over a group's tokens, with its bootstrap interval over images."""

    def per_token(self, tokens: Tokens) -> dict[str, Tensor]:
        """Values [n] of the tokens by name of the metric."""
        raise NotImplementedError

    def update(self, tokens: Tokens) -> dict[str, Tensor]:
        found = self.per_token(tokens).items()
        return {key: tokens.by_image(torch.stack([v, torch.ones_like(v)], dim=-1)) for key, v in found}

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for (group, hook), items in found.updates.items():
            order = torch.tensor([i for index, _ in items for i in index]).argsort()
            for metric in items[0][1]:
                sums = torch.cat([sums[metric] for _, sums in items])[order]  # [I, 2]
                data.add_ratio(metric, group, data.layers[hook], sums[:, 0], sums[:, 1])
                total, tokens = (data.weights @ sums).unbind(-1)
                yield Estimate(data.layers[hook], group, metric, total / tokens)
