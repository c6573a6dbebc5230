"""`lens_hit`: share of images with a content word of their captions among the logit lens' top tokens.

The top tokens at any image position count (the baseline of the field), where they are whole words.
`lens_hit_weighted` asks how much of the caption is hit, and counts rare words for more: a word that n of
the I images have weighs log(I / n), and the value is the weight of the words that are hit over that of all
the caption's words. Words that most captions have ("left") weigh next to nothing. Chance: other images'
captions.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_limber.probe import words
from lightning_limber.probe.metrics.base import Estimate, Found, Items, Measurement, ProbeMetric, Tokens
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.statistics import compare_hits
from lightning_limber.utils.word_tokens import word_tokens

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe


def whole_words(tokenizer: Any, vocab_size: int) -> dict[int, str]:
    """Stems of the tokens that begin a word, and are all of it as far as can be told, by token id."""
    texts = word_tokens(tokenizer, vocab_size)
    # A token that opens many words says none of them.
    return {i: words.stem(text.lower()) for i, text in texts.items() if len(text) > 2}


def weighted_hits(found: Tensor, captions: Tensor) -> Tensor:
    """[I, W] words found for each image, [J, W] of each caption -> [I, J] share of the caption's weight.

    Captions all of whose words are in every caption have no weight, and 0.
    """
    captions = captions.double()
    weight = captions * (len(captions) / captions.sum(0).clamp_min(1)).log()  # [J, W]
    return (found.double() @ weight.T / weight.sum(-1)).nan_to_num(0)


class LensHit(ProbeMetric):
    """Logit lens at image positions: the final norm and the output embeddings on the residual stream."""

    name = "lens_hit"
    panels = (
        Panel(
            "lens_hit",
            "lens_hit: caption word in logit lens",
            also=("lens_hit_weighted", "image, rare words weigh more"),
        ),
    )

    def setup(self, probe: Probe) -> None:
        self.llm, self.top_k = probe.model.llm, probe.config.lens_top_k
        if self.top_k > self.llm.vocab_size:
            raise ValueError(
                f"probe.lens_top_k: {self.top_k} is given, allowed is 1 to {self.llm.vocab_size}, the "
                f"tokens of {self.llm.name}."
            )

    def update(self, tokens: Tokens) -> Tensor | None:
        """[n, k] row of the image * V + token id; -1 at outliers."""
        if tokens.group != "image":
            return None
        hidden = self.llm.decode(tokens.residual[None], first_layer=len(self.llm.layers))[0]
        top = self.llm.logits(hidden).topk(self.top_k, dim=-1).indices
        code = tokens.image_rows[:, None] * self.llm.vocab_size + top
        return code.masked_fill(~tokens.keep[:, None], -1)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        stems, captions = words.stem_table(*data.caption_words)
        row_of = {image.index: row for row, image in enumerate(data.images)}
        for (group, hook), items in found.updates.items():
            said = self._words(items, row_of, stems)
            for metric, hits in (
                ("lens_hit", words.word_hits(said, captions)),
                ("lens_hit_weighted", weighted_hits(said, captions)),
            ):
                own = hits.diagonal()
                data.add_ratio(metric, group, data.layers[hook], own, torch.ones_like(own))
                comparison = compare_hits(hits, data.weights, data.permutations())
                yield Estimate(data.layers[hook], group, metric, comparison)

    @cached_property
    def _stem_of_token(self) -> dict[int, str]:
        return whole_words(self.llm.tokenizer, self.llm.vocab_size)

    def _words(self, items: Items, row_of: dict[int, int], stems: list[str]) -> Tensor:
        """Bool [I, S]: stems among the top tokens at some position of each image."""
        column = {stem: i for i, stem in enumerate(stems)}
        table = torch.zeros(len(row_of), len(stems), dtype=torch.bool)
        for index, codes in items:
            for row, token in (divmod(code, self.llm.vocab_size) for code in codes.unique().tolist()):
                if row >= 0 and (stem := self._stem_of_token.get(token)) in column:
                    table[row_of[index[row]], column[stem]] = True
        return table
