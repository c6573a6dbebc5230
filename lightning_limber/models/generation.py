"""Writes captions: the LLM goes on from [prefix | image | prompt text], with a KV cache.

Shapes use the legend of backbones.py; G is the number of tokens of the longest caption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_limber.data.collate import Batch

if TYPE_CHECKING:
    from lightning_limber.models.limber import Limber, Sequences


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


def opening(model: Limber, pixel_values: Tensor | None) -> Sequences:
    """Images [B, 3, H, W] as the LLM sees them when it starts to write: [prefix | image | prompt text].

    None is one sequence without an image, [prefix | prompt text]. A prompt that has neither opens with
    BOS then (EOS, if the tokenizer has no BOS): the LLM cannot go on from nothing.
    """
    prompt, device = model.collator().prompt, model.device
    prefix_ids, generation_ids = prompt.prefix_ids, prompt.generation_ids
    if pixel_values is None:
        count, image_tokens = 1, None
        if not prefix_ids and not generation_ids:
            bos = prompt.tokenizer.bos_token_id
            prefix_ids = [prompt.tokenizer.eos_token_id if bos is None else bos]
    else:
        count, image_tokens = len(pixel_values), model.image_tokens(pixel_values)
    text_ids = torch.tensor(generation_ids, dtype=torch.long, device=device).expand(count, -1)
    batch = Batch(
        ids=[],
        pixel_values=torch.empty(0, device=device) if pixel_values is None else pixel_values,
        image_index=torch.arange(count, device=device),
        prefix_ids=torch.tensor(prefix_ids, dtype=torch.long, device=device),
        text_ids=text_ids,
        is_caption=np.zeros(text_ids.shape, dtype=bool),
        target_index=text_ids.new_zeros(0, 2),
        image_of=list(range(count)),
    )
    return model.sequences(batch, image_tokens)


@torch.no_grad()
def generate(
    model: Limber, pixel_values: Tensor | None, decoding: Decoding, log_probabilities: bool = True
) -> list[Caption]:
    """Captions of images [B, 3, H, W].

    Args:
        model: With its adapter loaded or trained.
        pixel_values: On the model's device. None is one caption without an image: what the LLM says when
            it sees the prompt alone.
        decoding: How.
        log_probabilities: They keep the logits of all steps, 4 G V bytes for each image and beam; without
            them they are NaN.
    """
    if pixel_values is not None and not len(pixel_values):
        return []
    embeds = opening(model, pixel_values).embeds.to(model.llm.embedding.weight.dtype)  # [B, S, D_l]
    tokenizer, end_ids = model.llm.tokenizer, model.collator().prompt.end_ids
    # A stream of random numbers of its own: nothing else in the process moves with it.
    with torch.random.fork_rng(devices=[embeds.device] if embeds.is_cuda else []):
        torch.manual_seed(decoding.seed)
        output: Any = model.llm.model.generate(
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
            synced_gpus=model.llm.sharded,
            **decoding.options(),
        )
    ids = output.sequences  # [B, G]
    ended = torch.isin(ids, torch.tensor(end_ids, device=ids.device))
    written = ended.cumsum(1) - ended.long() == 0  # Up to the first end token.
    sums = ids.new_full((len(ids),), torch.nan, dtype=torch.float64)
    if log_probabilities:
        steps = model.llm.model.compute_transition_scores(
            ids, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
        )  # [B, G]
        sums = steps.double().masked_fill(~written, 0).sum(1)
    texts = tokenizer.batch_decode(ids.masked_fill(~written, end_ids[0]), skip_special_tokens=True)
    return [
        Caption(text.strip(), log_probability, tokens)
        for text, log_probability, tokens in zip(texts, sums.tolist(), written.sum(1).tolist(), strict=True)
    ]
