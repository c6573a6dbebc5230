"""The trained part: adapters from patch features [B, P, D_v] to image tokens [B, P', D_l]."""

from lightning_limber.models.adapters.base import Adapter
from lightning_limber.models.adapters.linear import Linear
from lightning_limber.models.adapters.mlp import MLP
from lightning_limber.models.adapters.pixel_shuffle import PixelShuffle
from lightning_limber.models.adapters.resampler import Resampler
from lightning_limber.models.adapters.vocabulary import Vocabulary

__all__ = ["MLP", "Adapter", "Linear", "PixelShuffle", "Resampler", "Vocabulary"]
