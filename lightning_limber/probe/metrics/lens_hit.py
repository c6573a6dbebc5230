"""`lens_hit`: share of images with a content word of their captions among the logit lens' top tokens.

The top tokens at any image position count (the baseline of the field). Chance: other images' captions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_limber.probe import words
from lightning_limber.probe.metrics.base import Estimate, Found, Items, Measurement, ProbeMetric, Tokens
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.statistics import compare_hits

if TYPE_CHECKING:
    from lightning_limber.probe.passes import Probe


class LensHit(ProbeMetric):
    """Logit lens at image positions: the final norm and the output embeddings on the residual stream."""

    name = "lens_hit"
    panels = (Panel("lens_hit", "lens_hit: caption word in logit lens"),)

    def setup(self, probe: Probe) -> None:
        self.llm, self.top_k = probe.model.llm, probe.config.lens_top_k

    def update(self, tokens: Tokens) -> Tensor | None:
        """[n, k] row of the image * V + token id; -1 at outliers."""
        if tokens.group != "image":
            return None
        hidden = self.llm.decode(tokens.residual[None], first_layer=len(self.llm.layers))[0]
        top = self.llm.logits(hidden).topk(self.top_k, dim=-1).indices
        code = tokens.image_rows[:, None] * self.llm.vocab_size + top
        return code.masked_fill(~tokens.keep[:, None], -1)

    def compute(self, data: Measurement, found: Found) -> Iterable[Estimate]:
        vocabulary, captions = data.caption_words
        row_of = {image.index: row for row, image in enumerate(data.images)}
        for (group, hook), items in found.updates.items():
            hits = words.word_hits(self._words(items, row_of, vocabulary), captions)
            own = hits.diagonal()
            data.add_ratio("lens_hit", group, data.layers[hook], own, torch.ones_like(own))
            comparison = compare_hits(hits, data.weights, data.permutations())
            yield Estimate(data.layers[hook], group, "lens_hit", comparison)

    @cached_property
    def _stem_of_token(self) -> dict[int, str]:
        """Stems of the vocabulary's whole words; a token that opens many words says none of them."""
        tokenizer = self.llm.tokenizer
        pieces = tokenizer.convert_ids_to_tokens(range(min(self.llm.vocab_size, len(tokenizer))))
        texts = (tokenizer.convert_tokens_to_string([piece]).strip().lower() for piece in pieces)
        return {i: words.stem(text) for i, text in enumerate(texts) if text.isalpha() and len(text) > 2}

    def _words(self, items: Items, row_of: dict[int, int], vocabulary: list[str]) -> Tensor:
        """Bool [I, W]: words among the top tokens at some position of each image."""
        columns: dict[str, list[int]] = defaultdict(list)
        for i, word in enumerate(vocabulary):
            columns[words.stem(word)].append(i)
        table = torch.zeros(len(row_of), len(vocabulary), dtype=torch.bool)
        for index, codes in items:
            for row, token in (divmod(code, self.llm.vocab_size) for code in codes.unique().tolist()):
                if row >= 0:
                    table[row_of[index[row]], columns.get(self._stem_of_token.get(token, ""), [])] = True
        return table
