"""A metric of one's own for the SAE probe, named by its path:

python -m lightning_limber fit \
  --probe.metrics+='{class_path: my_metrics.StrongLatents, init_args: {threshold: 1.0}}'

Run it where Python finds this file: in its folder, or with that on PYTHONPATH.
"""

from torch import Tensor

from lightning_limber.probe.metrics import Panel, TokenMean, Tokens


class StrongLatents(TokenMean):
    """Mean number of latents per token whose activation exceeds a threshold.

    Args:
        threshold: Activation that a latent must exceed; 0 gives `l0`.
    """

    panels = (Panel("l0_strong", "l0_strong: strong latents per token", log=True, by_epoch=True),)

    def __init__(self, threshold: float = 1.0) -> None:
        self.threshold = threshold

    def per_token(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"l0_strong": (tokens.latents.to_dense() > self.threshold).sum(-1)}
