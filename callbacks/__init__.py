"""What happens around training: SAE probes, caption samples, checkpoints."""

from .captions import CaptionSamples
from .checkpoints import Checkpoints
from .sae_probe import SAEProbe

__all__ = ["CaptionSamples", "Checkpoints", "SAEProbe"]
