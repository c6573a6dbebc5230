"""Everything that the probe's instruments say of single image tokens: what the report's explorer shows.

At each layer, of each image token x [D]:

    norm        |x| over text's median norm
    l0          active latents of the layer's SAE
    fvu_text    |x - x'|^2 over the variance of text, x' by the SAE
    cos_start   cosine to the token as it entered the LLM
    counted     false at tokens that the probe never counts (passes.py)
    latents     the strongest of the SAE, with their activations
    lens        the logit lens' first tokens, with their probabilities
    neighbours  the nearest words of the text of `neighbours`, each where it is nearest, with their cosines

Shapes: B images of P tokens, L layers that image tokens pass, D the LLM's width, K latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.data.layout import Sequences
from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.models.llm import LLM
from lightning_limber.models.saes import chunks_on_device, release_folder
from lightning_limber.probe.explanations import neuronpedia_id
from lightning_limber.probe.metrics.base import IMAGE
from lightning_limber.probe.metrics.neighbours import Bank, Neighbours, read_places, word_places
from lightning_limber.probe.metrics.object_patches import patch_centres
from lightning_limber.probe.palette import CONTROLS

if TYPE_CHECKING:
    import pandas as pd

    from lightning_limber.models.vision import ImageTransform
    from lightning_limber.probe.passes import Probe

TOP_LATENTS, TOP_LENS, TOP_NEIGHBOURS = 5, 3, 3
TOP_CONTEXTS = 3
LENS_ROWS = 256
"""Tokens whose logits are held at a time."""

Seen = dict[str, Tensor]
"""What is seen of image tokens at one layer: [B, P] ``norm``, ``l0``, ``fvu_text``, ``cos_start``,
``counted``; [B, P, 5] ``latent``, ``activation``; [B, P, 3] ``piece`` (a token id), ``p``; and, where there
is a bank, [B, P, 3] ``place`` (as in `Bank.nearest`), ``cosine``.
"""


def look(
    probe: Probe, sequences: Sequences, image_tokens: ImageTokens, bank: Bank | None = None
) -> dict[str, Seen]:
    """Reads image tokens in one forward, by hook name; asks nothing of the device.

    Args:
        probe: Has the SAEs.
        sequences: A sequence for each of the B images.
        image_tokens: Of the B images, or what stands in their place.
        bank: Text tokens among which neighbours are sought; None leaves them out.
    """
    shape = image_tokens.tokens.shape[:2]
    start = image_tokens.tokens.flatten(0, 1).float()  # [B * P, D]
    found: dict[str, Seen] = {}

    def read(name: str, residual: Tensor, keep: Tensor) -> None:
        x, text = residual.float(), probe.text[name]
        latents, reconstruction = probe.encode(name, x)
        latents = latents.to_dense()
        activation, latent = latents.topk(min(TOP_LATENTS, latents.shape[-1]), dim=-1)
        p, piece = _lens(probe.model.llm, residual)
        seen = {
            "norm": x.norm(dim=-1) / text.median_norm,
            "l0": (latents > 0).sum(-1),
            "fvu_text": (x - reconstruction).square().sum(-1) / text.variance,
            "cos_start": torch.cosine_similarity(x, start, dim=-1),
            "counted": keep,
            **{"latent": latent, "activation": activation, "piece": piece, "p": p},
        }
        if bank is not None:
            seen["place"], seen["cosine"] = bank.nearest_words(x, TOP_NEIGHBOURS)
        found[name] = {field: values.unflatten(0, shape) for field, values in seen.items()}

    probe.read_image(sequences, image_tokens, read)
    return found


def _lens(llm: LLM, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [n, 3] and ids [n, 3] of the logit lens' first tokens."""
    hidden = llm.decode(residual[None], first_layer=len(llm.layers))[0]
    tops = [llm.logits(rows).float().softmax(-1).topk(TOP_LENS) for rows in hidden.split(LENS_ROWS)]
    return torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])


def bank_of(probe: Probe) -> Bank | None:
    """The text of the probe's metric `neighbours`, where it is measured."""
    return next((metric.bank for metric in probe.metrics if isinstance(metric, Neighbours)), None)


# -- of the first held-out images ---------------------------------------------------------------------


class Context(NamedTuple):
    """A word of a text on which a latent fires; `end` is the place behind its last letter."""

    text: str
    word: str
    end: int
    activation: float


def page_of(probe: Probe, hook: str) -> str | None:
    """Neuronpedia's name for a layer's SAE; None where it has none."""
    config = probe.config
    if release_folder(config.sae_release) is None:
        with suppress(ValueError):
            return neuronpedia_id(config.sae_release, probe.saes[hook].cfg.metadata.sae_id)
    return None


@torch.no_grad()
def text_contexts(
    probe: Probe, bank: Bank, latents: dict[str, list[int]]
) -> dict[str, list[list[Context]]]:
    """The words of the bank's texts on which latents fire most strongly, at most `TOP_CONTEXTS` of each, by
    hook name and in the order of `latents`.
    """
    texts = list(dict.fromkeys(bank.contexts))
    ids, places = word_places(probe.model.llm.tokenizer, texts)
    found: dict[str, list[list[Context]]] = {}
    for chunk in chunks_on_device(
        {name: probe.saes[name] for name in latents}, probe.model.device, probe.config.sae_memory_gb
    ):
        order, residuals = read_places(probe, ids, places, chunk)
        for name, x in residuals.items():
            fires = probe.encode(name, x)[0].to_dense()[:, latents[name]]  # [T, k]
            activation, at = (t.T.tolist() for t in fires.topk(min(TOP_CONTEXTS, len(order)), dim=0))
            found[name] = [
                [
                    Context(texts[order[i].text], order[i].word, order[i].end, value)
                    for i, value in zip(*of, strict=True)
                    if value > 0
                ]
                for of in zip(at, activation, strict=True)
            ]
    return found


class Explored(NamedTuple):
    """Some images, in the order of their indices, and what is seen of them.

    Attributes:
        control: The group that was read beside ``image``, in the same places and of the same norms; None
            where the probe has none.
        names: Of the I images.
        captions: Of each image.
        boxes: Of each image its objects where the data know them, in words and as left, top, right, bottom
            in shares of the picture.
        pixels: [3, H, W] of each, bytes, as the encoder sees them.
        seen: As `Seen`, [I, L, P] and [I, L, P, top], by group.
        contexts: Of the latents in `seen` without a page of Neuronpedia, by hook name and latent; empty
            without a bank of text.
    """

    control: str | None
    names: list[str]
    captions: list[list[str]]
    boxes: list[list[tuple[str, list[float]]]]
    pixels: list[Tensor]
    seen: dict[str, Seen]
    contexts: dict[str, dict[int, list[Context]]]


@torch.no_grad()
def explore(probe: Probe, batches: Iterable[Batch], with_contexts: bool = True) -> Explored:
    """Looks at the image tokens of a few images, and at a control in their place.

    Args:
        probe: The probe.
        batches: As in `Probe.run`: this process' share, which is joined with the others'.
        with_contexts: Whether to look for the latents' contexts.
    """
    control = next((name for name in reversed(CONTROLS) if name in probe.groups), None)
    groups = [IMAGE, *([] if control is None else [probe.groups[control]])]
    bank, items = bank_of(probe), list[tuple[int, str, list[str], Any, Tensor, dict[str, Seen]]]()
    training = probe.model.training
    probe.model.eval()
    for batch in batches:
        sequences = batch.without_captions
        if sequences is None:  # No image could be read.
            continue
        with probe.context():
            tokens = probe.model.image_tokens(batch)
            filled = {g.name: tokens if g.fill is None else probe.filled(g, batch, tokens) for g in groups}
        seen = {name: list(look(probe, sequences, of, bank).values()) for name, of in filled.items()}
        stacked = {
            name: {field: torch.stack([at[field] for at in layers], dim=1) for field in layers[0]}
            for name, layers in seen.items()
        }  # [B, L, P] and [B, L, P, top]
        stacked = apply_to_collection(stacked, Tensor, lambda tensor: tensor.cpu())
        colours = probe.model.vision.transform.undo(batch.pixel_values.float().cpu())
        pixels = (255 * colours).round().byte()  # [B, 3, H, W]
        for i, index in enumerate(batch.index):
            own = apply_to_collection(stacked, Tensor, lambda tensor, i=i: tensor[i])
            boxes = object_boxes(batch.scenes[i], probe.model.vision.transform, pixels[i].shape[1:])
            items.append((index, batch.image_ids[i], batch.captions[i], boxes, pixels[i], own))
    items = sorted(probe.gather(items), key=lambda item: item[0])
    seen_of = [item[-1] for item in items]
    joined: dict[str, Seen] = {
        name: {field: torch.stack([seen[name][field] for seen in seen_of]) for field in of}
        for name, of in (seen_of[0] if seen_of else {}).items()
    }
    contexts: dict[str, dict[int, list[Context]]] = {}
    if with_contexts and bank is not None and joined:
        latents = {
            name: torch.cat([of["latent"][:, layer].flatten() for of in joined.values()]).unique().tolist()
            for layer, name in enumerate(probe.hooks_of(IMAGE, probe.layers))
            if page_of(probe, name) is None
        }
        found = text_contexts(probe, bank, latents)
        contexts = {name: dict(zip(latents[name], of, strict=True)) for name, of in found.items()}
    probe.model.train(training)
    return Explored(
        control,
        names=[item[1] for item in items],
        captions=[item[2] for item in items],
        boxes=[item[3] for item in items],
        pixels=[item[4] for item in items],
        seen=joined,
        contexts=contexts,
    )


def object_boxes(
    scene: dict[str, Any] | None, transform: ImageTransform, size: Sequence[int]
) -> list[tuple[str, list[float]]]:
    """The boxes of a scene's objects in the picture that the encoder sees, `size` pixels high and wide, as
    shares of it; objects that are cut away are left out.
    """
    if not scene or "image_size" not in scene:
        return []
    centres = patch_centres(transform, scene["image_size"], (size[0], size[1])).view(*size, 2)
    across, down = centres[0, :, 0], centres[:, 0, 1]  # Of each column and row the place in the scene.
    found = []
    for item in scene["objects"]:
        left, top, right, bottom = item["box"]
        columns = ((across >= left) & (across < right)).nonzero().flatten().tolist()
        rows = ((down >= top) & (down < bottom)).nonzero().flatten().tolist()
        if columns and rows:
            ends = (
                (columns[0], size[1]),
                (rows[0], size[0]),
                (columns[-1] + 1, size[1]),
                (rows[-1] + 1, size[0]),
            )
            label = " ".join(value for value in item.values() if isinstance(value, str))
            found.append((label, [round(place / whole, 3) for place, whole in ends]))
    return found


# -- of one image, as tables ----------------------------------------------------------------------------


class TokenTables(NamedTuple):
    """Tidy data frames, a row for each thing that is seen of an image token at a layer.

    Attributes:
        tokens: layer, token, row, column, norm, l0, fvu_text, cos_start, counted.
        latents: layer, token, rank, latent, activation, description, density.
        lens: layer, token, rank, piece (as text), p.
        neighbours: layer, token, rank, word, context, text_layer, cosine; empty without text.
    """

    tokens: pd.DataFrame
    latents: pd.DataFrame
    lens: pd.DataFrame
    neighbours: pd.DataFrame


COLUMNS = {
    "tokens": "layer token row column norm l0 fvu_text cos_start counted",
    "latents": "layer token rank latent activation description density",
    "lens": "layer token rank piece p",
    "neighbours": "layer token rank word context text_layer cosine",
}


def token_tables(probe: Probe, found: dict[str, Seen], bank: Bank | None = None) -> TokenTables:
    """What `look` found of one image. `row` and `column` are those of a token's patch: none for CLS, and
    where tokens are no places in the image.
    """
    import pandas as pd

    height, width = probe.model.token_grid or (0, 0)
    before = probe.model.num_image_tokens - height * width
    decode = probe.model.llm.tokenizer.decode
    rows: dict[str, list[tuple]] = {name: [] for name in COLUMNS}
    for name, of_layer in found.items():
        layer, known = probe.layers[name], probe.descriptions.get(name)
        seen = {field: values[0].tolist() for field, values in of_layer.items()}

        def ranked(token: int, *fields: str, seen: dict[str, list] = seen) -> Iterable[tuple]:
            entries = zip(*(seen[field][token] for field in fields), strict=True)
            return ((rank, *entry) for rank, entry in enumerate(entries))

        for token in range(len(seen["norm"])):
            place = divmod(token - before, width) if token >= before and width else (None, None)
            numbers = (seen[field][token] for field in ("norm", "l0", "fvu_text", "cos_start", "counted"))
            rows["tokens"].append((layer, token, *place, *numbers))
            for rank, latent, activation in ranked(token, "latent", "activation"):
                text = (
                    (None, None) if known is None else (known.texts[latent], float(known.density[latent]))
                )
                if activation > 0:
                    rows["latents"].append((layer, token, rank, latent, activation, *text))
            for rank, piece, p in ranked(token, "piece", "p"):
                rows["lens"].append((layer, token, rank, decode([piece]), p))
            if bank is None:
                continue
            for rank, spot, cosine in ranked(token, "place", "cosine"):
                number, at = divmod(spot, len(bank.contexts))
                word = bank.vocabulary[bank.word_of[at]], bank.contexts[at], int(bank.layers[number])
                rows["neighbours"].append((layer, token, rank, *word, cosine))
    frames = {name: pd.DataFrame(rows[name], columns=of.split()) for name, of in COLUMNS.items()}
    frames["tokens"] = frames["tokens"].astype({"row": "Int64", "column": "Int64"})
    return TokenTables(**frames)
