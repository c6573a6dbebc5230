"""Made-up files of the explorer, as large and about as hard to pack as real ones."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np

from lightning_limber.probe.explorer_file import cut_controls, pack

WORDS = "red green blue circle square star small large left above".split()
WRITTEN = "a small blue circle"
CAPTION = "a small red circle <b>left</b> of a large blue square"


def write_explorer_data(
    folder: Path,
    epoch: int = 1,
    grid: tuple[int, int] | None = (4, 4),
    layers: int = 3,
    images: int = 3,
    tokens: int = 16,
    latents: int = 300,
    neuronpedia: bool = False,
    seed: int = 0,
) -> Path:
    """A file of random numbers: of an image's patches the first is an attention sink, the second's
    strongest latent is 0 at every layer, and latent 0 agrees with "red".

    Args:
        folder: A run's.
        epoch: Of the file.
        grid: Rows and columns of the patches, or None.
        layers: L; SAEs are at layers 0, 3, 6, ...
        images: I.
        tokens: P.
        latents: That occur at a layer.
        neuronpedia: Whether it has pages of the latents.
        seed: Of the numbers.
    """
    draw = np.random.default_rng(seed)
    shape = (images, layers, tokens)

    def ids(count: int, top: int) -> np.ndarray:
        """Some are much more frequent than others, as latents and words are."""
        return np.minimum(count - 1, (count * draw.random((*shape, top)) ** 3).astype(int))

    def contexts(layer: int) -> list[list[list[float]]]:
        """Of a latent three; of the last none."""
        numbers = np.random.default_rng(layer)
        places = numbers.integers(0, 800, (latents - 1, 3)).tolist()
        values = np.sort(numbers.lognormal(2, 1, (latents - 1, 3)))[:, ::-1].round(2).tolist()
        return [
            [list(pair) for pair in zip(*of, strict=True)] for of in zip(places, values, strict=True)
        ] + [[]]

    arrays: dict[str, np.ndarray] = {}
    for group in ("image", "words_long"):
        strong = np.sort(draw.lognormal(2, 1, (*shape, 5)))[..., ::-1]
        p = np.sort(draw.beta(0.3, 3, (*shape, 3)))[..., ::-1]
        of = {
            "norm": draw.lognormal(0.5, 0.5, shape),
            "l0": draw.poisson(90, shape),
            "fvu_text": draw.lognormal(0, 1, shape),
            "cos_start": draw.uniform(-0.2, 1, shape),
            "counted": np.ones(shape, bool),
            "latent": ids(latents, 5),
            "activation": strong,
            "piece": ids(3000, 3),
            "p": p,
            "place": ids(800, 3) + 800 * draw.integers(0, 8, (*shape, 3)),
            "cosine": np.sort(draw.normal(0.5, 0.1, (*shape, 3)))[..., ::-1],
        }
        of["counted"][..., 0] = False
        if group == "image":
            of["latent"][:, :, 1, 0] = 0
        arrays |= {f"{group}/{field}": values for field, values in of.items()}
    text = np.array("on near after number colour shape small round place of in the and".split())
    agree = [[0]] + [[] for _ in WORDS[1:]]
    places = [[WORDS.index(w), CAPTION.index(w) + len(w)] for w in ("small", "red", "circle", "left")]
    head = {
        "layers": [3 * i for i in range(layers)],
        "grid": grid,
        "control": "words_long",
        "believed": {"lens": [i == layers - 1 for i in range(layers)], "neighbours": [True] * layers},
        "latents": [
            {
                "ids": (7 * np.arange(latents) + layer).tolist(),
                "neuronpedia": f"some-model/{layer}-res" if neuronpedia else None,
                "texts": [f"on: <i>{' '.join(draw.choice(text, 5))} {k}" for k in range(latents)],
                "density": draw.lognormal(-5, 1, latents).round(5).tolist(),
                "agree": agree,
                **({} if neuronpedia or not epoch else {"contexts": contexts(layer)}),
            }
            for layer in range(layers)
        ],
        "contexts": [["… a small ", f"word{i}", " on a <u> ground …"] for i in range(800)],
        "pieces": {"texts": [f" piece{i}" for i in range(3000)], "agree": agree},
        "neighbours": {
            "spots": [["… a small ", f"word{i}", " on a <u> ground …"] for i in range(800)],
            "layers": list(range(8)),
            "agree": agree,
        },
        "words": WORDS,
        "images": [
            {
                "name": f"val/{i}",
                "captions": [[CAPTION, places]],
                "written": [WRITTEN, [[WORDS.index("blue"), 12]]] if epoch else None,
                "boxes": [["small red circle", [0.25, 0.5, 0.5, 0.75]], ["large <b>", [0.6, 0.1, 1, 0.5]]],
                "jpeg": _picture(draw),
            }
            for i in range(images)
        ],
    }
    path = folder / f"explorer_epoch_{epoch}.gz"
    path.write_bytes(pack(head, cut_controls(arrays)))
    return path


def _picture(draw: np.random.Generator) -> str:
    from PIL import Image

    rough = Image.fromarray(draw.integers(0, 255, (20, 20, 3), dtype=np.uint8))
    jpeg = io.BytesIO()
    rough.resize((224, 224), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=75)
    return base64.b64encode(jpeg.getvalue()).decode()
