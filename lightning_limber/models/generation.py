"""Writes captions: the LLM goes on from [prefix | image | prompt text], with a KV cache.

Shapes use the legend of llm.py; G is the number of tokens of the longest caption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_limber.models.llm import LLM


@dataclass(frozen=True)
class Decoding:
    """How the next tokens are chosen: greedily unless `num_beams` or `temperature` says otherwise.

    Attributes:
        max_new_tokens: Longest caption, with its end token.
        num_beams: Beam search keeps this many; 1 is greedy.
        temperature: 0 takes the likeliest token; else they are drawn, from softmax(logits / temperature).
        top_p: Tokens are drawn among the likeliest that together have this probability.
        seed: Of the draws; the same images in the same batches get the same captions.
    """

    max_new_tokens: int = 48
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"{self}: max_new_tokens and num_beams start at 1, temperature at 0; top_p is in (0, 1]."
            )
        if self.num_beams > 1 and self.temperature:
            raise ValueError(
                f"num_beams={self.num_beams} searches and temperature={self.temperature} samples: choose "
                "one of them."
            )
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"top_p={self.top_p} belongs to sampling: set temperature above 0, such as 1.")

    def options(self) -> dict[str, Any]:
        """Of transformers' `generate`."""
        if self.temperature:
            return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"do_sample": False, "num_beams": self.num_beams}


class Caption(NamedTuple):
    """A written caption.

    `log_probability` is the sum over its `tokens` tokens (with the end token, if it came to that) of the
    natural logarithm of the LLM's own probability, before temperature and `top_p`.
    """

    text: str
    log_probability: float
    tokens: int


@torch.no_grad()
def generate(
    llm: LLM, embeds: Tensor, end_ids: list[int], decoding: Decoding, log_probabilities: bool = True
) -> list[Caption]:
    """Goes on from openings [prefix | image | prompt text], all of one length.

    Args:
        llm: The loaded LLM.
        embeds: [B, S, D_l], on the LLM's device.
        end_ids: Tokens that end a caption.
        decoding: How tokens are chosen.
        log_probabilities: Also sum log-probabilities. This keeps the logits of all steps, 4 G V bytes for
            each image and beam; without it they are NaN.
    """
    embeds = embeds.to(llm.embedding.weight.dtype)
    # A stream of random numbers of its own: nothing else in the process moves with it.
    with torch.random.fork_rng(devices=[embeds.device] if embeds.is_cuda else []):
        torch.manual_seed(decoding.seed)
        output: Any = llm.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=end_ids,
            pad_token_id=end_ids[0],
            # Some models' generation_config.json has one.
            repetition_penalty=1.0,
            return_dict_in_generate=True,
            output_logits=log_probabilities,
            # A process that is done goes on with the others: each of them holds a part of the layers.
            synced_gpus=llm.sharded,
            **decoding.options(),
        )
    ids = output.sequences  # [B, G]
    ended = torch.isin(ids, torch.tensor(end_ids, device=ids.device))
    written = ended.cumsum(1) - ended.long() == 0  # Up to the first end token.
    sums = ids.new_full((len(ids),), torch.nan, dtype=torch.float64)
    if log_probabilities:
        steps = llm.model.compute_transition_scores(
            ids, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
        )  # [B, G]
        sums = steps.double().masked_fill(~written, 0).sum(1)
    texts = llm.tokenizer.batch_decode(ids.masked_fill(~written, end_ids[0]), skip_special_tokens=True)
    return [
        Caption(text.strip(), log_probability, tokens)
        for text, log_probability, tokens in zip(texts, sums.tolist(), written.sum(1).tolist(), strict=True)
    ]
