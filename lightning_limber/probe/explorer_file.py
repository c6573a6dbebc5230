"""``explorer_epoch_{n}.gz``: what `explorer.explore` saw, small enough to stand in a page.

Gzipped: one line of JSON, the head, and behind it the arrays that it names, in their order, as bytes of
little-endian numbers. Numbers that are read by eye are codes of one byte: ``log8``, 0 for none (and NaN),
1 to 255 for low to high in equal ratios; ``cos8``, -127 to 127 for -1 to 1. The page's script decodes the
same (assets/explorer.js).
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_limber.probe import words
from lightning_limber.probe.explorer import Context, Explored, bank_of, page_of
from lightning_limber.probe.metrics.neighbours import Bank
from lightning_limber.probe.tables import Row
from lightning_limber.utils.files import write_whole

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe

KINDS = {
    **dict.fromkeys(("norm", "fvu_text", "activation", "p"), "log8"),
    **dict.fromkeys(("cos_start", "cosine"), "cos8"),
    **dict.fromkeys(("l0", "latent", "piece", "place"), "u2"),
    "counted": "u1",
}
DTYPES = {"log8": "u1", "cos8": "i1", "u1": "u1", "u2": "<u2"}
FULL_CONTROLS = 50_000
"""Where there are more tokens times layers, no more than the first entry of each of a control's lists is
kept: a page has megabytes, and a control is there to be glanced at."""
PICTURE_SIZE = 224
MAX_DESCRIPTION = 100
"""Letters of a description in the page."""
CONTEXT_WORDS = 4
"""On either side of a neighbour's word."""


def write_explorer(
    path: Path, probe: Probe, explored: Explored, rows: Sequence[Row], written: Mapping[str, str]
) -> None:
    """Writes the file.

    Args:
        path: ``explorer_epoch_{n}.gz``.
        probe: The probe that looked.
        explored: At least one image.
        rows: What the probe measured, which says at which layers lens and neighbours are to be believed.
        written: The model's captions by the names of their images, as far as there are any.
    """
    hooks = [name for name in probe.layers if name in probe.hooks_of(probe.groups["image"])]
    layers = [probe.layers[name] for name in hooks]
    arrays = {
        f"{group}/{field}": values.float().numpy() if values.is_floating_point() else values.numpy()
        for group, seen in explored.seen.items()
        for field, values in seen.items()
    }
    written = {name: written[name] for name in explored.names if name in written}
    texts = [*chain.from_iterable(explored.captions), *written.values()]
    vocabulary = sorted({word for text in texts for word in words.content_words(text)})
    latents, pieces = _renumber_latents(arrays, len(layers)), _renumber(arrays, "piece")
    tokenizer, bank = probe.model.llm.tokenizer, bank_of(probe)
    texts_of_pieces = [tokenizer.decode([piece]) for piece in pieces]
    neighbours = {} if bank is None else _neighbours(arrays, bank)
    column = {word: i for i, word in enumerate(vocabulary)}
    told: dict[tuple[str, ...], int] = {}  # Words in their contexts, numbered.

    def with_words(text: str) -> list[Any]:
        return [text, [[column[word], end] for word, end in words.content_spans(text)]]

    head: dict[str, Any] = {
        "layers": layers,
        "grid": probe.model.token_grid,
        "control": explored.control,
        "believed": {
            "lens": believed(rows, layers, "lens_hit", explored.control),
            "neighbours": believed(rows, layers, "neighbour_lift", explored.control),
        },
        "latents": [
            _latents(probe, name, ids, vocabulary, explored.contexts.get(name, {}), told)
            for name, ids in zip(hooks, latents, strict=True)
        ],
        "contexts": list(told),
        "pieces": {"texts": texts_of_pieces, "agree": _agree(texts_of_pieces, vocabulary)},
        "neighbours": neighbours
        | {"agree": _agree([w for _, w, _ in neighbours.get("spots", ())], vocabulary)},
        "words": vocabulary,
        "images": [
            {
                "name": name,
                "captions": [with_words(text) for text in captions],
                "written": with_words(written[name]) if name in written else None,
                "boxes": boxes,
                "jpeg": _jpeg(pixels),
            }
            for name, captions, boxes, pixels in zip(
                explored.names, explored.captions, explored.boxes, explored.pixels, strict=True
            )
        ],
    }
    packed = pack(head, cut_controls(arrays))
    write_whole(path, lambda part: part.write_bytes(packed))


def keep_ends(folder: Path, epochs: Collection[int]) -> None:
    """Removes the files of a run that nobody reads: all but those of the first and the last of `epochs`
    that have one (a run that went on from an earlier checkpoint may have left some of later epochs).
    """
    found = {int(path.stem.rpartition("_")[2]): path for path in folder.glob("explorer_epoch_*.gz")}
    known = found.keys() & set(epochs)
    for epoch in found.keys() - {min(known, default=0), max(known, default=0)}:
        found[epoch].unlink(missing_ok=True)


def pack(head: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """The file's bytes; the kind of each array is that of its field, the name behind the ``/``."""
    named, parts = [], []
    for name, values in arrays.items():
        kind = KINDS[name.rpartition("/")[2]]
        coded, ends = encode(values, kind)
        named.append({"name": name, "kind": kind, "shape": list(values.shape), **ends})
        parts.append(coded.tobytes())
    line = json.dumps(head | {"arrays": named}, ensure_ascii=False, separators=(",", ":"))
    return gzip.compress(line.encode() + b"\n" + b"".join(parts), mtime=0)


def read_explorer(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The head, and the arrays by name as numbers [I, L, P] and [I, L, P, top]."""
    line, _, rest = gzip.decompress(path.read_bytes()).partition(b"\n")
    head, arrays, start = json.loads(line), {}, 0
    for entry in head["arrays"]:
        dtype = np.dtype(DTYPES[entry["kind"]])
        coded = np.frombuffer(rest, dtype, math.prod(entry["shape"]), start)
        start += coded.nbytes
        arrays[entry["name"]] = decode(coded, entry).reshape(entry["shape"])
    return head, arrays


def encode(values: np.ndarray, kind: str) -> tuple[np.ndarray, dict[str, float]]:
    """Numbers as codes, and the ends of a ``log8``."""
    if kind == "cos8":
        return np.round(127 * np.nan_to_num(values)).astype("i1"), {}
    if kind != "log8":
        return values.astype(DTYPES[kind]), {}
    there = np.isfinite(values) & (values > 0)
    low, high = (float(values[there].min()), float(values[there].max())) if there.any() else (1.0, 1.0)
    ratio = math.log(high / low) or 1.0
    codes = 1 + np.round(254 * np.log(np.where(there, values, low) / low) / ratio)
    return np.where(there, codes, 0).astype("u1"), {"low": low, "high": high}


def decode(coded: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    """Codes as numbers; `entry` is the array's in the head."""
    if entry["kind"] == "cos8":
        return coded / 127
    if entry["kind"] != "log8":
        return coded
    values = entry["low"] * (entry["high"] / entry["low"]) ** ((coded - 1.0) / 254)
    return np.where(coded > 0, values, 0)


def believed(rows: Sequence[Row], layers: Sequence[int], metric: str, control: str | None) -> list[bool]:
    """Whether a lens says more than by chance at each layer.

    The low end of its interval is above the other images' captions (``{metric}_chance``; of a lift, which
    is divided by that, 1), and above the control's own value where it has one; and it is measured.
    """
    found = {(row.layer, row.group, row.metric): row for row in rows}
    answers = []
    for layer in layers:
        own, chance = (found.get((layer, "image", name)) for name in (metric, f"{metric}_chance"))
        level = 1.0 if metric.endswith("lift") or chance is None else chance.value
        other = found.get((layer, control or "", metric))
        is_less = own is not None and other is not None and own.low <= other.value
        answers.append(own is not None and own.low > level and not is_less)
    return answers


def _renumber(arrays: dict[str, np.ndarray], field: str) -> np.ndarray:
    """Replaces the ids of a field by their places among those that occur, which are returned."""
    ids = np.unique(np.concatenate([a.ravel() for name, a in arrays.items() if name.endswith(f"/{field}")]))
    for name, values in arrays.items():
        if name.endswith(f"/{field}"):
            arrays[name] = np.searchsorted(ids, values)
    return ids


def _renumber_latents(arrays: dict[str, np.ndarray], layers: int) -> list[np.ndarray]:
    """The same of latents, layer by layer; those that do not fire become 0."""
    groups = [name.partition("/")[0] for name in arrays if name.endswith("/latent")]
    fires = {group: arrays[f"{group}/activation"] > 0 for group in groups}
    found = []
    for layer in range(layers):
        ids = np.unique(
            np.concatenate([arrays[f"{g}/latent"][:, layer][fires[g][:, layer]] for g in groups])
        )
        found.append(ids)
        for group in groups:
            of_layer = arrays[f"{group}/latent"][:, layer]
            of_layer[...] = np.where(fires[group][:, layer], np.searchsorted(ids, of_layer), 0)
    return found


def cut_controls(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first entry of each of a control's lists alone, where there are more than `FULL_CONTROLS`."""
    if arrays["image/norm"].size <= FULL_CONTROLS:
        return arrays
    lists = {name for name, values in arrays.items() if values.ndim == 4 and not name.startswith("image/")}
    return {name: values[..., :1] if name in lists else values for name, values in arrays.items()}


def _latents(
    probe: Probe,
    hook: str,
    ids: np.ndarray,
    vocabulary: list[str],
    contexts: Mapping[int, Sequence[Context]],
    told: dict[tuple[str, ...], int],
) -> dict[str, Any]:
    """What is known of a layer's latents: ids, descriptions, densities on text, which caption words they
    agree with (as in `match`: not those that fire on much of text), and Neuronpedia's name for the SAE;
    without one, their contexts, as numbers in `told`, to which new ones are added, and activations.
    """
    config, known = probe.config, probe.descriptions.get(hook)
    page = page_of(probe, hook)
    entry: dict[str, Any] = {"ids": ids.tolist(), "neuronpedia": page, "agree": []}
    if contexts:
        entry["contexts"] = [
            [
                [told.setdefault(tuple(in_context(c.text, c.word, c.end)), len(told)), _short(c.activation)]
                for c in contexts[k]
            ]
            for k in ids.tolist()
        ]
    if known is not None:
        texts, density = [known.texts[k] for k in ids], known.density[ids.tolist()]
        entry["texts"] = [shorten(text, MAX_DESCRIPTION, placeholder=" …") for text in texts]
        entry["density"] = [_short(value) for value in density.tolist()]
        seldom = (density <= config.max_text_density).tolist()
        pairs = _agree(texts, vocabulary)
        entry["agree"] = [[k for k in of_word if seldom[k]] for of_word in pairs]
    return entry


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _agree(texts: Sequence[str], vocabulary: list[str]) -> list[list[int]]:
    """By word of the captions, the texts that agree with it (words.py)."""
    return [np.flatnonzero(column).tolist() for column in words.agreement(texts, vocabulary).T]


def _neighbours(arrays: dict[str, np.ndarray], bank: Bank) -> dict[str, Any]:
    """Text tokens that are somebody's neighbour, as [before, word, behind], and the layers of the text;
    places become (number of the layer) * (number of these tokens) + token.
    """
    count = len(bank.contexts)
    used = np.unique(
        np.concatenate([a.ravel() % count for name, a in arrays.items() if name.endswith("/place")])
    )
    for name, values in arrays.items():
        if name.endswith("/place"):
            layer, token = np.divmod(values, count)
            arrays[name] = layer * len(used) + np.searchsorted(used, token)
    spots = [in_context(bank.contexts[t], bank.vocabulary[bank.word_of[t]], bank.ends[t]) for t in used]
    return {"spots": spots, "layers": bank.layers.tolist()}


def in_context(text: str, word: str, end: int) -> list[str]:
    """A word that ends at a place in a text, between a few words on either side.

    Example:
        >>> in_context("There is a small red circle left of a square", "red", 20)
        ['… is a small ', 'red', ' circle left of a …']
    """
    start = end - len(word)
    before, behind = text[:start].split(" "), text[end:].split(" ")
    cut_before, cut_behind = before[-CONTEXT_WORDS:], behind[: CONTEXT_WORDS + 1]
    first = "… " * (len(cut_before) < len(before)) + " ".join(cut_before)
    last = " ".join(cut_behind) + " …" * (len(cut_behind) < len(behind))
    return [first, text[start:end], last]


def _jpeg(pixels: Tensor) -> str:
    """A small picture in base64."""
    from PIL import Image

    picture, jpeg = Image.fromarray(pixels.permute(1, 2, 0).numpy()), io.BytesIO()
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    picture.save(jpeg, "JPEG", quality=75)
    return base64.b64encode(jpeg.getvalue()).decode()
