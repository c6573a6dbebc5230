from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_limber.models.adapters.base import Adapter, linear
from lightning_limber.utils.word_tokens import word_tokens

if TYPE_CHECKING:
    from lightning_limber.models.llm import LLM

WHOLE_WORDS = 8192
"""Words of ``words: whole``."""
CALIBRATION_TOKENS = 128
"""Image tokens that set the temperature."""


class Vocabulary(Adapter):
    """Convex combinations of the LLM's own token embeddings (ALIGN of AlignVLM, arXiv 2502.01341).

    z = LayerNorm(W v), p = softmax(z H^T / T), x = p E: an image token is a mean of the embeddings E
    [V', D_l] of V' words, weighted by p, so it lies in their convex hull. H is the LM head (E where the
    LLM ties them). Both are frozen, and the LLM's own: only W and the norm are trained. (The paper trains a
    copy of H, V' D_l parameters more.) `words` names the largest weights of each patch.

    The temperature T is set once, on training images, so that a token mixes `perplexity` words: an LLM
    whose logits are small would make every p near uniform and every token near the mean embedding. Tokens
    are shorter than words: their norm falls with the number of words they mix, and no scale is set.

    Cost: 4 D_l V' FLOPs a token forward and as many backward; 4 V' bytes a token for each of the logits, p
    and their gradients.

    Args:
        vision_size: Width D_v of the encoder's features.
        llm_size: Width D_l of the LLM.
        words: ``all`` takes every row of the embedding; ``whole`` the first 8,192 tokens that begin with
            a space and have letters alone (ids of a BPE vocabulary follow frequency).
        perplexity: Words that a token mixes at the start: exp of the mean entropy of p.
        **shared: Settings that every adapter has.
    """

    llm: LLM

    def __init__(
        self,
        vision_size: int,
        llm_size: int,
        words: Literal["all", "whole"] = "all",
        perplexity: float = 50.0,
        **shared: Any,
    ) -> None:
        super().__init__(vision_size, llm_size, **shared)
        if words not in ("all", "whole"):
            raise ValueError(f"model.adapter.words={words!r}: allowed are all, whole.")
        self.project = nn.Sequential(linear(vision_size, llm_size), nn.LayerNorm(llm_size))
        self.only_whole, self.perplexity = words == "whole", perplexity
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(1.0))
        self.word_ids: Tensor | None
        self.register_buffer("word_ids", None, persistent=False)

    def bind(self, llm: LLM) -> None:
        # Straight into __dict__, see `Adapter.bind`.
        self.__dict__["llm"] = llm
        count = llm.vocab_size
        if self.only_whole:
            ids = sorted(word_tokens(llm.tokenizer, llm.vocab_size))[:WHOLE_WORDS]
            self.word_ids, count = torch.tensor(ids), len(ids)
        if not 1 < self.perplexity < count:
            raise ValueError(
                f"model.adapter.perplexity={self.perplexity:g}: allowed is any number above 1 and below "
                f"the {count} words of {llm.name}."
            )

    def token_grid(self, patch_grid: tuple[int, int]) -> tuple[int, int]:
        return patch_grid

    def forward(self, features: Tensor) -> Tensor:
        embeddings = self._of_words(self.llm.embedding.weight, features)  # [V', D_l]
        tokens = self.probabilities(features) @ embeddings  # [B, P, D_l]
        # Gemma multiplies what it looks up.
        return tokens * getattr(self.llm.embedding, "embed_scale", 1.0)

    def probabilities(self, features: Tensor) -> Tensor:
        """The weights p [B, P, V'] of the words in each image token."""
        return (self._logits(features) / self.temperature).softmax(-1)

    @torch.no_grad()
    def words(self, features: Tensor, count: int = 5) -> list[list[list[tuple[str, float]]]]:
        """The `count` words of largest weight in each image token, with the weight: [B][P][count].

        Args:
            features: [B, P, D_v].
            count: Words for each token.
        """
        weights, places = self.evaluate(self.probabilities, features).topk(count)  # [B, P, count]
        ids = places if self.word_ids is None else self.word_ids[places]
        return [
            [
                [(self.llm.tokenizer.decode([i]), weight) for i, weight in zip(*token, strict=True)]
                for token in zip(*image, strict=True)
            ]
            for image in zip(ids.tolist(), weights.tolist(), strict=True)
        ]

    def _logits(self, features: Tensor) -> Tensor:
        hidden = self.project(self.dropout(self.input_norm(features)))  # [B, P, D_l]
        head = self._of_words(self.llm.model.get_output_embeddings().weight, features)  # [V', D_l]
        return nn.functional.linear(hidden, head).to(self.temperature.dtype)

    def _of_words(self, weight: Tensor, features: Tensor) -> Tensor:
        """The words' rows of a matrix of the LLM."""
        # An LLM that will be sharded is on the CPU while the model is built.
        weight = weight.to(features.device)
        return weight if self.word_ids is None else weight[self.word_ids]

    def _calibrate_output(self, features: Tensor, token_norm: Tensor) -> None:
        rows = features.flatten(0, 1)  # [B * P, D_v]
        rows = rows[:: -(-len(rows) // CALIBRATION_TOKENS)]
        logits = self.evaluate(self._logits, rows[None])[0]  # [n, V']
        # Entropy grows with the temperature: bisection of its logarithm.
        low, high = logits.std().log() + torch.tensor([[-6.0], [6.0]], device=logits.device)
        for _ in range(16):
            middle = (low + high) / 2
            log_p = (logits / middle.exp()).log_softmax(-1)
            entropy = -(log_p.exp() * log_p).sum(-1).mean()
            is_high = entropy.exp() > self.perplexity
            low, high = torch.where(is_high, low, middle), torch.where(is_high, middle, high)
        self.temperature.copy_(middle[0].exp())
