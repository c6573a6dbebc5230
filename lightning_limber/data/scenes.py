"""Drawn scenes with known truth: one to three objects on a background, nothing to download.

A scene's objects lie on a path that only goes right or down, so each image has one canonical caption:

    "a small red circle left of a large blue star above a small green cross on a pink background."

Held-out scenes test composition, not memory: eight pairs of colour and shape (each colour once, each
shape at least once) never occur in training, and every held-out scene has at least one of them.
"""

from __future__ import annotations

import math
import random
import re
from typing import Any

from PIL import Image, ImageDraw

from lightning_limber.data.datamodule import CaptionData
from lightning_limber.data.loader import RecordSet
from lightning_limber.data.records import Record

COLOURS = {
    "red": (214, 39, 40),
    "green": (30, 150, 50),
    "blue": (35, 80, 220),
    "yellow": (245, 225, 40),
    "orange": (250, 135, 20),
    "purple": (125, 50, 165),
    "brown": (115, 70, 40),
    "cyan": (60, 210, 225),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = {"small": 10, "large": 16}  # Radius in pixels on a 112 px canvas.
RELATIONS = {"left of": (1, 0), "above": (0, 1)}  # Step on the grid to the next object.
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "pink": (250, 190, 205),
}
HELD_OUT = {(colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS)}
GRID = 3
OBJECT = re.compile(r"an? (\w+) (\w+) (\w+)(?: (left of|above) (?=an? ))?")


def make_scene(rng: random.Random, held_out: bool) -> dict[str, Any]:
    """Draws the truth of one scene: background, objects (attributes, cell) and relations."""
    count = rng.choices((1, 2, 3), weights=(5, 4, 1))[0]
    relations = [rng.choice(list(RELATIONS)) for _ in range(count - 1)]
    steps = [RELATIONS[relation] for relation in relations]
    cells = [(0, 0)]
    for dx, dy in steps:
        cells.append((cells[-1][0] + dx, cells[-1][1] + dy))
    x0, y0 = (rng.randint(0, GRID - 1 - cells[-1][axis]) for axis in (0, 1))
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    seen = [pair for pair in pairs if pair not in HELD_OUT]
    chosen = [rng.choice(pairs if held_out else seen) for _ in range(count)]
    if held_out:
        chosen[rng.randrange(count)] = rng.choice(sorted(HELD_OUT))
    objects = [
        {"size": rng.choice(list(SIZES)), "colour": colour, "shape": shape, "cell": [x0 + x, y0 + y]}
        for (colour, shape), (x, y) in zip(chosen, cells, strict=True)
    ]
    return {
        "background": rng.choice(list(BACKGROUNDS)),
        "objects": objects,
        "relations": relations,
    }


def describe(scene: dict[str, Any]) -> str:
    """The scene's one canonical caption."""
    words = []
    for item, relation in zip(scene["objects"], [*scene["relations"], None], strict=True):
        words.append(f"a {item['size']} {item['colour']} {item['shape']}")
        words.extend([relation] if relation else [])
    return f"{' '.join(words)} on a {scene['background']} background."


def draw(scene: dict[str, Any], rng: random.Random, image_size: int) -> Image.Image:
    """Draws the scene, with a little jitter of place and size, and adds its own size and each object's box
    (pixels).
    """
    scene["image_size"] = image_size
    scale = 2 * image_size / 112  # Twice as large, then reduced: smooth edges.
    side = 2 * image_size
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene["background"]])
    canvas = ImageDraw.Draw(image)
    for item in scene["objects"]:
        radius = SIZES[item["size"]] * scale * rng.uniform(0.95, 1.05)
        x, y = ((cell + 0.5) * side / GRID + rng.uniform(-1, 1) * scale for cell in item["cell"])
        item["box"] = [round(v / 2, 1) for v in (x - radius, y - radius, x + radius, y + radius)]
        _draw_shape(canvas, item["shape"], x, y, radius, COLOURS[item["colour"]])
    return image.resize((image_size, image_size), Image.Resampling.BOX)


def _draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour: tuple[int, int, int]
) -> None:
    def polygon(points: int, radii: tuple[float, ...], turn: float) -> list[tuple[float, float]]:
        angles = [2 * math.pi * i / points + turn for i in range(points)]
        return [
            (x + radii[i % len(radii)] * math.sin(a), y - radii[i % len(radii)] * math.cos(a))
            for i, a in enumerate(angles)
        ]

    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        canvas.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif shape == "triangle":
        canvas.polygon(polygon(3, (1.1 * r,), 0.0), fill=colour)
    elif shape == "star":
        canvas.polygon(polygon(10, (1.1 * r, 0.45 * r), 0.0), fill=colour)
    elif shape == "cross":
        canvas.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=colour)
        canvas.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=colour)
    else:  # diamond
        canvas.polygon([(x, y - 1.1 * r), (x + 0.75 * r, y), (x, y + 1.1 * r), (x - 0.75 * r, y)], colour)


def score_caption(caption: str, scene: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Right and total slots of a caption, by attribute, against the scene's truth.

    Objects are compared in order. A missing object makes all its slots wrong; superfluous ones are
    seen in ``count``. ``held_out`` repeats the colour and shape slots of objects whose pair of colour
    and shape never occurred in training.
    """
    found = OBJECT.findall(caption.split(" on a ")[0])
    background = re.search(r"on an? (\w+) background", caption)
    slots: dict[str, list[bool]] = {
        "background": [background is not None and background[1] == scene["background"]],
        "count": [len(found) == len(scene["objects"])],
    }
    for i, item in enumerate(scene["objects"]):
        said = found[i] if i < len(found) else ("", "", "", "")
        pair = [said[1] == item["colour"], said[2] == item["shape"]]
        slots.setdefault("size", []).append(said[0] == item["size"])
        slots.setdefault("colour", []).append(pair[0])
        slots.setdefault("shape", []).append(pair[1])
        if (item["colour"], item["shape"]) in HELD_OUT:
            slots.setdefault("held_out", []).extend(pair)
        if i < len(scene["relations"]):
            slots.setdefault("relation", []).append(said[3] == scene["relations"][i])
    return {name: (sum(values), len(values)) for name, values in slots.items()}


def attributes(scene: dict[str, Any]) -> set[str]:
    """Colours, shapes, sizes and relations that occur in the scene, and its background."""
    items = scene["objects"]
    words = {item[key] for item in items for key in ("colour", "shape", "size")}
    return words | set(scene["relations"]) | {f"{scene['background']} background"}


class SceneSet:
    """Scene number i of a split is a pure function of (seed, split, i)."""

    def __init__(self, split: str, size: int, image_size: int, seed: int) -> None:
        self.split = split
        self.size = size
        self.image_size = image_size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        scene, rng = self._scene(index)
        image = draw(scene, rng, self.image_size)
        return Record(f"{self.split}/{index:06d}", image, [describe(scene)], scene)

    def captions(self, index: int) -> list[str]:
        return [describe(self._scene(index)[0])]

    def _scene(self, index: int) -> tuple[dict[str, Any], random.Random]:
        """The truth, and the generator that draws it."""
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        return make_scene(rng, held_out=self.split == "val"), rng


class Scenes(CaptionData):
    """Drawn scenes; see this file's head.

    Args:
        train_size: Number of training scenes.
        val_size: Number of held-out scenes.
        image_size: Side of the drawing in pixels.
    """

    def __init__(
        self, train_size: int = 3200, val_size: int = 256, image_size: int = 112, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.train_size = train_size
        self.val_size = val_size
        self.image_size = image_size
        self.save_hyperparameters()

    def datasets(self) -> tuple[RecordSet, RecordSet]:
        return (
            SceneSet("train", self.train_size, self.image_size, self.seed),
            SceneSet("val", self.val_size, self.image_size, self.seed),
        )

    def score_caption(self, caption: str, scene: Any) -> dict[str, tuple[int, int]]:
        return score_caption(caption, scene)

    def attributes(self, scene: Any) -> set[str]:
        return attributes(scene)
