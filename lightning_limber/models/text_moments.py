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
    contexts = list(activations.contexts(texts, llm.tokenizer, 128))
    found = activations.text_tokens(llm, contexts, list(hooks), 4096)
    return {name: TextMoments(norm, x.mean(0), x.T.cov(correction=0)) for name, (x, norm) in found.items()}
