"""Mean, spread and norm of text in the LLM's residual stream: yardsticks for image tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_limber.models import activations
from lightning_limber.models.llm import LLM


class TextMoments(NamedTuple):
    """Of the residual stream of text at one place, without first positions and attention sinks."""

    norm: Tensor
    """Median L2 norm, a scalar."""
    mean: Tensor
    """[D]"""
    covariance: Tensor
    """[D, D]"""

    @property
    def variance(self) -> Tensor:
        """Mean squared distance from the mean, a scalar: the covariance's trace."""
        return self.covariance.diagonal().sum()


@torch.no_grad()
def text_moments(llm: LLM, texts: Iterable[str], hooks: Iterable[str]) -> dict[str, TextMoments]:
    """What text looks like to the LLM at the hooks.

    Args:
        llm: The loaded LLM.
        texts: Captions.
        hooks: Names, see `LLM.residual_hooks`.
    """
    names, device = list(hooks), llm.embedding.weight.device
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for ids, mask, _ in activations.batches(list(activations.contexts(texts, llm.tokenizer, 128)), 4096):
        counted = mask.bool()
        counted[:, 0] = False
        for name, hidden in activations.residuals(llm, ids.to(device), names).items():
            found[name].append(hidden[counted.to(device)].float())
    moments = {}
    for name, parts in found.items():
        x = torch.cat(parts)
        norm = x.norm(dim=-1)
        x = x[norm <= activations.SINK_FACTOR * norm.median()]
        moments[name] = TextMoments(norm.median(), x.mean(0), x.T.cov(correction=0))
    return moments
