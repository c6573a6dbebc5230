"""`neighbour_lift`: how much oftener than by chance a token's nearest text is a word of the captions.

The bank of text tokens is made once, of training captions: the last token of every content word in its
context, as the LLM's residual stream has it at several layers. A token's neighbour is the nearest of all of
them by cosine, as in LatentLens (arXiv 2602.00462), with the image's own captions in place of a judge:

    neighbour_lift = share of tokens whose neighbour's word is in the own captions
                     / mean share of them whose neighbour's word is in another image's captions

1 is chance. `neighbour_layer` is the mean layer of the text of the neighbours; noise makes the same leap to
middle layers as image tokens do, so that it says nothing alone.

Shapes: n tokens of I images, T text tokens at L layers, D the LLM's width, W words of the bank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import normalize

from lightning_limber.probe import words
from lightning_limber.probe.metrics.base import (
    NAN,
    Estimate,
    Found,
    Items,
    Measurement,
    ProbeMetric,
    Tokens,
)
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.statistics import Comparison, compare

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe

MAX_TEXTS = 256
MAX_TEXT_TOKENS = 64
"""Of each text; what follows is not read."""
MAX_CONTEXTS = 20
"""Of each word."""
MAX_TOKENS = 2048
"""T at most."""
MAX_LAYERS = 8
"""L at most."""
TEXTS_AT_ONCE = 32
TABLE_WORDS = 10
"""Words of each layer in the table."""


class Place(NamedTuple):
    """The last token of a content word in a text."""

    word: str
    text: int
    token: int
    end: int = 0
    """Place in the text behind the word's last letter."""


@dataclass(frozen=True)
class Bank:
    """Text tokens in their contexts.

    Attributes:
        vocabulary: [W] words.
        word_of: [T] word of each token.
        contexts: [T] the text that it stands in.
        ends: [T] place in that text behind the word's last letter.
        layers: [L] layers of the LLM.
        directions: [L, T, D] float32 residual streams of length 1.
        deviations: [L, T, D] the same less the layer's mean. Its product with a token ranks a layer's text
            as the cosine does, and is small where the mean's is large: the ranks survive bfloat16.
    """

    vocabulary: list[str]
    word_of: Tensor
    contexts: list[str]
    ends: list[int]
    layers: Tensor
    directions: Tensor
    deviations: Tensor

    @classmethod
    def of(cls, places: Sequence[Place], texts: Sequence[str], directions: dict[int, Tensor]) -> Bank:
        """Of places in texts, and the directions [T, D] of their tokens by layer."""
        vocabulary = sorted({place.word for place in places})
        column = {word: i for i, word in enumerate(vocabulary)}
        stacked = torch.stack(list(directions.values()))
        return cls(
            vocabulary,
            torch.tensor([column[place.word] for place in places]),
            [texts[place.text] for place in places],
            [place.end for place in places],
            torch.tensor(list(directions)),
            stacked,
            stacked - stacked.mean(1, keepdim=True),
        )

    @property
    def size(self) -> int:
        """L * T."""
        return len(self.layers) * len(self.contexts)

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest text token of each token [n, D], by cosine: its place [n] among L * T."""
        x = normalize(x, dim=-1)
        found, cosines = [], []
        for directions, deviations in zip(self.directions, self.deviations, strict=True):
            best = (x @ deviations.T).max(-1).indices  # Under autocast in its precision ...
            found.append(best)
            cosines.append((directions[best] * x).sum(-1))  # ... and the layers compared in float32.
        layer = torch.stack(cosines, dim=-1).max(-1, keepdim=True).indices  # [n, 1]
        token = torch.stack(found, dim=-1).gather(-1, layer)
        return (layer * len(self.contexts) + token)[:, 0]

    def nearest_words(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` words that are nearest to each token [n, D], each where it is nearest: places
        [n, count] as of `nearest`, and cosines [n, count].
        """
        with torch.autocast(x.device.type, enabled=False):
            x = normalize(x, dim=-1)
            cosines, layer = torch.stack([x @ at.T for at in self.directions]).max(0)  # [n, T] each
        word_of = self.word_of.to(x.device)
        of_words = x.new_full((len(x), len(self.vocabulary)), -2.0)
        of_words = of_words.scatter_reduce(1, word_of.expand_as(cosines), cosines, "amax")  # [n, W]
        nearest, word = of_words.topk(min(count, len(self.vocabulary)), dim=-1)
        others = word_of != word[..., None]  # [n, count, T]
        token = cosines[:, None].masked_fill(others, -2.0).max(-1).indices
        return layer.gather(-1, token) * len(self.contexts) + token, nearest


def word_places(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[Place]]:
    """Token ids of each text, and its content words' last tokens, at most `MAX_TOKENS`.

    Words take turns, so that rare ones have their places before frequent ones have many. A text's first
    token is left out, as everywhere in the probe.

    Args:
        tokenizer: A fast one.
        texts: Captions.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    ids = [of_text[:MAX_TEXT_TOKENS] for of_text in encoded["input_ids"]]
    seen: Counter[str] = Counter()
    found: list[tuple[int, Place]] = []  # With the number of each word's earlier places.
    for text, offsets in enumerate(encoded["offset_mapping"]):
        ends = [end for _, end in offsets[:MAX_TEXT_TOKENS]]
        for word, end in words.content_spans(texts[text]):
            token = next((i for i, reached in enumerate(ends) if reached >= end), 0)
            if token and seen[word] < MAX_CONTEXTS:
                found.append((seen[word], Place(word, text, token, end)))
                seen[word] += 1
    found.sort(key=lambda item: item[0])
    return ids, [place for _, place in found[:MAX_TOKENS]]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spread, the first and the last among them."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


@torch.no_grad()
def read_places(
    probe: Probe, ids: Sequence[list[int]], places: Sequence[Place], hooks: Iterable[str]
) -> tuple[list[Place], dict[str, Tensor]]:
    """What the probe's LLM makes of tokens in texts.

    Args:
        probe: The probe.
        ids: Token ids of each text, from `word_places`.
        places: T tokens of the texts.
        hooks: Hook names.

    Returns:
        The places in the order of the tokens, and the tokens [T, D] float32 by hook name.
    """
    llm, device = probe.model.llm, probe.model.device
    bos, prefix = llm.tokenizer.bos_token_id, probe.model.collator().prompt.prefix_ids
    opening = [bos] if prefix[:1] == [bos] else []
    found: dict[str, list[Tensor]] = {name: [] for name in hooks}
    order: list[Place] = []
    read_texts = sorted({place.text for place in places})  # Others need no forward.
    for start in range(0, len(read_texts), TEXTS_AT_ONCE):
        row_of = {text: row for row, text in enumerate(read_texts[start : start + TEXTS_AT_ONCE])}
        rows = [opening + ids[text] for text in row_of]
        width = max(map(len, rows))
        here = [place for place in places if place.text in row_of]
        order += here
        flat = [row_of[place.text] * width + len(opening) + place.token for place in here]
        positions = torch.tensor(flat, dtype=torch.long, device=device)

        def read(name: str, residual: Tensor, positions: Tensor = positions) -> None:
            found[name].append(residual.flatten(0, 1).index_select(0, positions).float())

        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        with probe.context(), llm.residual_hooks({name: partial(read, name) for name in found}):
            llm.decode(llm.embed(padded))
    return order, {name: torch.cat(parts) for name, parts in found.items()}


def make_bank(probe: Probe, texts: Sequence[str]) -> Bank | None:
    """Reads texts with the probe's LLM; None where they have no content word."""
    texts = spread(texts, MAX_TEXTS)
    ids, places = word_places(probe.model.llm.tokenizer, texts) if texts else ([], [])
    if not places:
        return None
    order, found = read_places(probe, ids, places, spread(list(probe.layers), MAX_LAYERS))
    directions = {probe.layers[name]: normalize(x, dim=-1) for name, x in found.items()}
    return Bank.of(order, texts, directions)


def lift(hits: Tensor, tokens: Tensor, weights: Tensor, permuted: Tensor) -> Comparison:
    """How much oftener tokens hit with their own images' captions than with other images'.

    Args:
        hits: [I, I] how many of image i's tokens have a neighbour whose word is in image j's captions.
        tokens: [I] tokens of each image.
        weights: [1 + R, I] from `bootstrap_weights`; an image drawn twice is no other image to itself.
        permuted: [M, I] from `permutations`.
    """
    own = weights @ hits.diagonal() / (weights @ tokens)
    apart = hits - hits.diagonal().diag()
    pairs = (weights @ tokens) * weights.sum(-1) - weights**2 @ tokens
    chance = ((weights @ apart) * weights).sum(-1) / pairs
    samples = torch.where(chance > 0, own / chance, torch.nan)
    if samples[0].isnan():
        return Comparison(*[NAN] * 7)
    shares = hits[torch.arange(len(hits)), permuted].sum(-1) / tokens.sum()
    return compare(samples, shares / chance[0])


class Neighbours(ProbeMetric):
    """Words of the nearest text tokens, of every group at image positions.

    Absent where no training captions are known (`Probe.texts`).
    """

    name = "neighbours"
    panels = (
        Panel("neighbour_lift", "neighbour_lift: caption word nearest, over chance"),
        Panel("neighbour_layer", "neighbour_layer: text layer of the nearest token"),
    )
    bank: Bank | None = None

    def setup(self, probe: Probe) -> None:
        self.asked = {name for name, group in probe.groups.items() if group.positions == "image"}
        if not probe.model.llm.tokenizer.is_fast:
            rank_zero_info("[warning] neighbours: this tokenizer cannot say where tokens are: left out.")
            return
        self.bank = make_bank(probe, list(probe.texts()))
        if self.bank is not None:
            self.stems = [words.stem(word) for word in self.bank.vocabulary]

    def update(self, tokens: Tokens) -> Tensor | None:
        """[n] row of the image * L T + place of the nearest text token; -1 at sinks."""
        if self.bank is None or tokens.group not in self.asked:
            return None
        code = tokens.image_rows * self.bank.size + self.bank.nearest(tokens.x)
        return code.masked_fill(~tokens.keep, -1).int()

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        bank = self.bank
        if bank is None:
            return
        stems, captions = words.stem_table(*data.caption_words)  # [I, S]
        column = {stem: i for i, stem in enumerate(stems)}
        said = torch.zeros(len(bank.vocabulary), len(captions), dtype=torch.float64)  # [W, I]
        for word, stem in enumerate(self.stems):
            if stem in column:
                said[word] = captions[:, column[stem]].double()
        row_of = {image.index: row for row, image in enumerate(data.images)}
        table = data.tables.setdefault("neighbours", [])
        for (group, hook), items in found.updates.items():
            layer, images, places = data.layers[hook], *self._neighbours(items, row_of)
            counts = torch.zeros(len(row_of), len(bank.vocabulary), dtype=torch.float64)
            ones = torch.ones(len(places), dtype=torch.float64)
            counts.index_put_((images, bank.word_of[places % len(bank.contexts)]), ones, accumulate=True)
            tokens = counts.sum(-1)
            hits = counts @ said  # [I, I]
            own = hits.diagonal()
            # Beside them what other images' captions give, on average.
            others = (hits.sum(-1) - own) / max(1, len(hits) - 1)
            data.add_ratio("neighbour_lift", group, layer, own, others)
            yield Estimate(
                layer, group, "neighbour_lift", lift(hits, tokens, data.weights, data.permutations())
            )
            text_layers = bank.layers[places // len(bank.contexts)].double()
            sums = torch.zeros_like(tokens).index_add_(0, images, text_layers)
            mean = data.weights @ sums / (data.weights @ tokens)
            yield Estimate(layer, group, "neighbour_layer", mean)
            if group == "image":
                table += self._table(layer, counts, said, places)

    def _neighbours(self, items: Items, row_of: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Image [n] and place [n] among L * T of each kept token."""
        assert self.bank is not None
        images, places = [], []
        for index, codes in items:
            codes = codes[codes >= 0].long()
            rows = torch.tensor([row_of[i] for i in index])
            images.append(rows[codes // self.bank.size])
            places.append(codes % self.bank.size)
        return torch.cat(images), torch.cat(places)

    def _table(self, layer: int, counts: Tensor, said: Tensor, places: Tensor) -> Iterator[dict[str, Any]]:
        """The words that are nearest most often: how often, to whose tokens, and where they stand."""
        assert self.bank is not None
        bank = self.bank
        tokens = counts.sum(0)  # [W]
        own = (counts * said.T).sum(0)
        other = (tokens * said.sum(-1) - own) / (len(counts) - 1)
        place_counts = places.bincount(minlength=bank.size).view(len(bank.layers), -1)  # [L, T]
        for word in tokens.argsort(descending=True, stable=True)[:TABLE_WORDS].tolist():
            if not tokens[word]:
                return
            of_word = place_counts * (bank.word_of == word)
            yield {
                "layer": layer,
                "word": bank.vocabulary[word],
                "tokens": int(tokens[word]),
                "share": float(tokens[word] / tokens.sum()),
                "lift": float(own[word] / other[word]) if other[word] else NAN,
                "text_layer": float((of_word.sum(-1) * bank.layers).sum() / of_word.sum()),
                "context": bank.contexts[int(of_word.sum(0).argmax())],
            }
