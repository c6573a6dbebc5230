"""`object_drop_own`: what it costs the words for an object when the object's patches are taken away.

In scenes whose objects have boxes, one object of each image is chosen by chance. The image tokens whose
patches are centred in its box are replaced, at one layer, by tokens of background patches of the same
image. In nats per token:

    object_drop_own     rise of the loss of the words for its colour and shape
    object_drop_other   rise of the loss of the words for the other objects' colours and shapes
    patch_drop          rise of the loss of its own words when as many background patches are replaced
                        instead, also by other background patches: what the replacing does by itself

So the picture of an object is read from its own place, from this layer on, as far as the first lies above
the other two. Why other background tokens: the mean of tokens is shorter than any of them and does harm of
its own, and another image's tokens at the same places often show an object, which the caption would then
be wrong about. Off by default: two forwards for each layer. Attention sinks stay where they are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_limber.probe.metrics.base import Estimate, Found, Measurement, ProbeMetric
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.token_stats import sum_by_image

if TYPE_CHECKING:
    from lightning_limber.data.collate import Batch
    from lightning_limber.data.prompt import Prompt
    from lightning_limber.models.limber import Limber
    from lightning_limber.models.vision import ImageTransform
    from lightning_limber.probe.intervention import Intervention
    from lightning_limber.probe.passes import Probe


@lru_cache(maxsize=8)
def patch_centres(transform: ImageTransform, image_size: int, grid: tuple[int, int]) -> Tensor:
    """Where the centre of each cell of the grid lies in a square image, in its pixels: [rows * columns, 2].

    Found by sending an image through the transform whose colours say x and y: whatever it resizes and
    crops is followed.
    """
    from PIL import Image

    ramp = (np.arange(image_size) + 0.5) / image_size * 255
    x, y = np.meshgrid(ramp, ramp)
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))
    places = transform.undo(transform(image))[:2]  # [2, H, W] from 0 to 1
    return torch.nn.functional.adaptive_avg_pool2d(places, grid).flatten(1).T * image_size


def said_objects(prompt: Prompt, caption: str, scene: dict[str, Any], count: int) -> np.ndarray:
    """[count] which object's colour or shape each label of a sequence says; -1: none's."""
    spans, end = [], 0
    for item in scene["objects"]:
        words = f"{item['colour']} {item['shape']}"
        start = caption.index(words, end)
        end = start + len(words)
        spans.append((start, end))
    said = np.full(count, -1)
    for label, (start, end) in enumerate(prompt.caption_spans(caption)):
        for number, (first, last) in enumerate(spans):
            if start < last and end > first:
                said[label] = number
    return said


def replacements(
    scene: dict[str, Any], number: int, centres: Tensor, first: int, rng: random.Random
) -> tuple[dict[int, int], dict[int, int]] | None:
    """Which cell comes into the place of which: for an object's cells, and for as many of the background.

    Args:
        scene: Truth with boxes.
        number: Of the object.
        centres: [cells, 2] from `patch_centres`.
        first: The first cell that has a token.
        rng: Chooses the background's cells.

    Returns:
        None where the object has no cell, or the background too few for the second.
    """
    x, y = centres.T
    boxes = torch.tensor([item["box"] for item in scene["objects"]])[:, :, None]  # [objects, 4, 1]
    inside = (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])
    inside, outside = inside[:, first:], ~inside.any(0)[first:]
    cells, background = (found.nonzero().flatten() + first for found in (inside[number], outside))
    if not 0 < len(cells) < len(background):
        return None
    drawn = rng.sample(background.tolist(), len(background))
    control, others = drawn[: len(cells)], drawn[len(cells) :]
    sources = [rng.choice(others) for _ in control]
    dropped, replaced = (dict(zip(places, sources, strict=True)) for places in (cells.tolist(), control))
    return dropped, replaced


def choose_object(
    scene: dict[str, Any], centres: Tensor, first: int, rng: random.Random
) -> tuple[int, tuple[dict[int, int], dict[int, int]]] | None:
    """Number of an object, by chance, and its `replacements`; None where no object has any."""
    found = [
        (number, swaps)
        for number in range(len(scene["objects"]))
        if (swaps := replacements(scene, number, centres, first, rng)) is not None
    ]
    return rng.choice(found) if found else None


def knows_boxes(batch: Batch) -> bool:
    """Whether the truth of every image is known, with its objects' boxes."""
    return bool(batch.scenes) and all(scene and "image_size" in scene for scene in batch.scenes)


def check_places(name: str, probe: Probe) -> None:
    """Raises ValueError where the adapter's tokens are no places in the image, as metric `name` needs."""
    if probe.model.token_grid is None:
        adapter = type(probe.model.adapter).__name__
        raise ValueError(
            f"probe.metrics: {name} needs image tokens that are places in the image, and those of "
            f"{adapter} are not. Give an adapter that has a token_grid, such as Linear, or leave {name} "
            "out."
        )


def plan(batch: Batch, model: Limber, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses an object of each image, by the image's name.

    Args:
        batch: Scenes with one caption each.
        model: Its token grid is known.
        tokens: Number of image tokens of the batch that are counted.

    Returns:
        [2, tokens] which token comes into the place of each, to drop the object and for the control;
        [2, n] which labels say the object, and which say others.
    """
    grid, images = model.token_grid, len(batch.index)
    assert grid is not None  # `ObjectPatches.setup`
    by_image = tokens // images
    before = by_image - math.prod(grid)  # Tokens before the grid's; -1: its first is never counted.
    sources = np.tile(np.arange(tokens).reshape(images, by_image), (2, 1, 1))
    said = np.zeros((2, len(batch.labels)), dtype=bool)
    ends = np.cumsum(batch.label_counts)
    for image, (scene, [caption], end) in enumerate(zip(batch.scenes, batch.captions, ends, strict=True)):
        assert scene is not None  # `ObjectPatches.intervene`
        centres = patch_centres(model.vision.transform, scene["image_size"], grid)
        rng = random.Random(batch.image_ids[image])
        found = choose_object(scene, centres, max(0, -before), rng)
        if found is None:
            continue
        chosen, swaps = found
        for table, cells in zip(sources, swaps, strict=True):
            for place, source in cells.items():
                table[image, before + place] = image * by_image + before + source
        count = batch.label_counts[image]
        objects = said_objects(model.collator().prompt, caption, scene, count)
        said[:, end - count : end] = objects == chosen, (objects >= 0) & (objects != chosen)
    return sources.reshape(2, tokens), said


class ObjectPatches(ProbeMetric):
    """Harm of dropping an object's patches to its own words and to others', and of dropping background."""

    name = "object_patches"
    panels = (
        Panel(
            "object_drop_own",
            "object's patches dropped: nats of its words",
            also=("object_drop_other", "image, words of other objects"),
        ),
        Panel("patch_drop", "background dropped: nats of an object's words"),
    )

    def setup(self, probe: Probe) -> None:
        check_places(self.name, probe)

    def intervene(self, run: Intervention, hook: str) -> Tensor | None:
        """[B, 5] sums over each image's tokens: rise of the loss of own words, of others' and of own with
        the background replaced; number of own and of others' tokens.
        """
        batch, model = run.batch, run.probe.model
        if not knows_boxes(batch):
            return None
        x = run.image_tokens(hook)
        keep = run.keep(hook, x)[:, None]
        sources, said = (torch.from_numpy(table).to(x.device) for table in plan(batch, model, len(x)))
        drop, control = (
            run.label_losses(hook, torch.where(keep, x[index], x)).double() - run.clean_label_losses
            for index in sources
        )
        own, other = said.double()
        by_label = torch.stack([drop * own, drop * other, control * own, own, other], dim=-1)
        return sum_by_image(by_label, batch.label_images, len(batch.index))

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        for hook, items in found.interventions.items():
            order = torch.tensor([i for index, _ in items for i in index]).argsort()
            table = torch.cat([sums for _, sums in items])[order]  # [I, 5]
            own, other, control, owned, others = (data.bootstrap_weights(len(table)) @ table).unbind(-1)
            layer = data.layers[hook]
            yield Estimate(layer, "image", "object_drop_own", own / owned)
            yield Estimate(layer, "image", "object_drop_other", other / others)
            yield Estimate(layer, "image", "patch_drop", control / owned)
        if not found.interventions:
            data.notes.append("object_patches measures nothing: these data know no boxes of objects.")
