"""Image tokens on their way through the LLM: where they enter, and what is written to their rows.

Those that enter at layer 0 stand among the embeddings. Behind it they are written into the residual stream
at the entrance of their layer, and the layers below see text alone: nothing there attends to the image's
places, so that text has the residual stream that it has without an image, at the same positions.

Shapes use the legend of llm.py; R rows of W positions hold the sequences (layout.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_limber.data.layout import RowMask, Sequences
from lightning_limber.models.attention import block_mask
from lightning_limber.models.llm import LLM


@dataclass(frozen=True)
class ImageTokens:
    """What stands at the places of B images.

    Attributes:
        tokens: [B, P, D_l] image tokens.
        layer: They take their places at the entrance of this layer.
        added: By layer, from `layer` on: [B, P, D_l] what is added to the images' rows at its entrance.
        hold: [L] by layer: the rows are written anew at the entrance of every layer, as so many times
            `tokens`; None: the layers process them as they do text.
    """

    tokens: Tensor
    layer: int = 0
    added: Mapping[int, Tensor] = field(default_factory=dict)
    hold: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def nothing(self) -> Tensor:
        """0, as a function of all that enters: DDP asks for every parameter, also where B is 0."""
        return 0.0 * torch.stack([t[:0].sum() for t in (self.tokens, *self.added.values())]).sum()

    def filled(self, fill: Callable[[Tensor], Tensor]) -> ImageTokens:
        """The same places with other tokens: ``fill`` maps each [B, P, D_l] that is written there."""
        added = {layer: fill(tokens) for layer, tokens in self.added.items()}
        return ImageTokens(fill(self.tokens), self.layer, added, self.hold)

    def written_at(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """What replaces the images' rows at the entrance of a layer, and what is added to them."""
        replaces = None
        if layer == self.layer:
            replaces = self.tokens
        elif layer > self.layer and self.hold is not None:
            replaces = self.tokens * self.hold[layer]
        return replaces, self.added.get(layer)


def embed_sequences(llm: LLM, sequences: Sequences, image_tokens: ImageTokens | None) -> Tensor:
    """Embeds token ids [R, W, D_l], with the image tokens that enter at layer 0 in their places."""
    embeds = llm.embed(sequences.input_ids)
    write = None if image_tokens is None else _write(sequences, image_tokens, 0)
    return embeds if write is None else write(embeds)


@contextmanager
def entering(llm: LLM, sequences: Sequences, image_tokens: ImageTokens | None) -> Iterator[None]:
    """Lets image tokens enter behind the embeddings in the one forward, or generation, inside.

    What is written at the entrance of layer l is what ``blocks.{l - 1}.hook_resid_post`` reads, and a
    forward that begins at layer l or later has it in its input.

    Raises:
        ValueError: image tokens enter behind layer 0, and the LLM's layers take no attention mask.
    """
    with ExitStack() as stack:
        if image_tokens is not None:
            for layer in range(1, len(llm.layers)):
                if (write := _write(sequences, image_tokens, layer)) is not None:
                    name = f"blocks.{layer - 1}.hook_resid_post"
                    stack.enter_context(llm.residual_hooks({name: write}, first=True))
            if image_tokens.layer:
                hidden = _Hidden(sequences)
                for number in range(image_tokens.layer):
                    stack.callback(hidden.hook(llm, number).remove)
        yield


def decode_text_first(llm: LLM, sequences: Sequences, image_tokens: ImageTokens) -> Tensor:
    """What `LLM.decode` gives inside `entering`, [R, W, D_l], in less time: layers below the one where the
    image tokens enter run over text alone, in shorter rows and without a gradient.
    """
    layer, places = image_tokens.layer, image_places(sequences)  # [R, W]
    # Text in its order, then as much of the images' places as makes all rows [R, T] alike.
    text = places.int().argsort(dim=1, stable=True)[:, : sequences.text_width]
    mask = _hiding(sequences, places).gathered(text)
    below = llm.residual_entering(
        layer, llm.embed(sequences.input_ids.gather(1, text)), mask, sequences.position_ids.gather(1, text)
    )  # [R, T, D_l]
    residual = below.new_zeros(*places.shape, below.shape[-1])
    residual = residual.scatter(1, text[..., None].expand_as(below), below)
    write = _write(sequences, image_tokens, layer)
    assert write is not None
    with entering(llm, sequences, image_tokens):
        return llm.decode(write(residual), layer, sequences.row_mask(), sequences.position_ids)


def image_places(sequences: Sequences) -> Tensor:
    """[R, W] whether an image token stands there."""
    places = torch.zeros_like(sequences.input_ids, dtype=torch.bool)
    return places.flatten().index_fill(0, sequences.image_positions, True).view_as(places)


def _hiding(sequences: Sequences, places: Tensor) -> RowMask:
    """Which token sees which where the tokens at places [R, W] are hidden from all others."""
    mask = sequences.row_mask()
    if mask is None:  # Plain causal.
        mask = RowMask(torch.zeros_like(sequences.input_ids), torch.zeros_like(sequences.input_ids))
    return mask._replace(hidden=places)


def _write(sequences: Sequences, image_tokens: ImageTokens, layer: int) -> Callable | None:
    """Residual stream at a layer's entrance -> the same with the images' rows written; None: nothing is."""
    replaces, added = (
        None if tokens is None else tokens.flatten(0, 1).index_select(0, sequences.image_rows)
        for tokens in image_tokens.written_at(layer)
    )  # [s * P, D_l] each
    if replaces is None and added is None:
        return None
    is_done = False

    def write(residual: Tensor) -> Tensor | None:
        nonlocal is_done
        if is_done:  # Later steps of a generation: the rows are in the cache.
            return None
        is_done = True
        positions, times = sequences.image_positions, len(residual) // len(sequences.input_ids)
        if times > 1:  # Beams.
            row, place = positions // residual.shape[1], positions % residual.shape[1]
            rows = row[:, None] * times + torch.arange(times, device=row.device)
            positions = (rows * residual.shape[1] + place[:, None]).flatten()
        flat = residual.flatten(0, 1)
        if replaces is not None:
            flat = flat.index_copy(0, positions, replaces.repeat_interleave(times, 0).to(flat.dtype))
        if added is not None:
            flat = flat.index_add(0, positions, added.repeat_interleave(times, 0).to(flat.dtype))
        return flat.view_as(residual)

    return write


class _Hidden:
    """Hides the images' places from all other rows, in the layers below the one where they enter."""

    def __init__(self, sequences: Sequences) -> None:
        self.places = image_places(sequences)
        self.rows = _hiding(sequences, self.places)
        self._known: tuple[Any, int, int, Any] | None = None

    def hook(self, llm: LLM, number: int) -> Any:
        """Hooks layer `number` of the LLM."""
        layer: nn.Module = llm.layers[number]
        signature = inspect.signature(type(layer).forward)
        attention = llm.model.config.get_text_config()._attn_implementation
        takes_mask = "attention_mask" in signature.parameters and attention in ("eager", "sdpa")
        if not takes_mask or llm.longest_row is None:
            raise ValueError(
                f"model.entry.layer: {llm.name} ({type(layer).__name__}, attention {attention}) cannot "
                "hide the image from the layers below: they take no mask. Set model.entry.layer to 0."
            )

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            given = signature.bind(module, *args, **kwargs)
            cache = next((value for name, value in given.arguments.items() if "past" in name), None)
            past = 0 if cache is None else cache.get_seq_length(number)
            rows, queries = (args[0] if args else kwargs["hidden_states"]).shape[:2]
            mask = given.arguments.get("attention_mask")
            given.arguments["attention_mask"] = self._mask(mask, rows, queries, past)
            return given.args[1:], given.kwargs

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    def _mask(self, mask: Any, rows: int, queries: int, past: int) -> Any:
        """A layer's mask without the images' columns: [rows, 1, queries, keys], in blocks if it was."""
        if self._known is not None:  # The layer before had the same.
            known, *sizes, made = self._known
            if known is mask and sizes == [queries, past]:
                return made
        if mask is not None and not isinstance(mask, Tensor):
            made = block_mask(self.rows, queries, self.places.device)
            self._known = mask, queries, past, made
            return made
        keys = past + queries if mask is None else mask.shape[-1]
        places = self.places.repeat_interleave(rows // len(self.places), 0)
        places = nn.functional.pad(places, (0, keys - places.shape[1]))
        own = places[:, past : past + queries]  # The images' rows, which nobody reads.
        hidden = (~own[:, :, None] & places[:, None])[:, None]
        whole = mask
        if whole is None:  # Plain causal.
            whole = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device).tril(past)
        is_bool = whole.dtype == torch.bool
        made = whole & ~hidden if is_bool else whole.masked_fill(hidden, torch.finfo(torch.bfloat16).min)
        self._known = mask, queries, past, made
        return made
