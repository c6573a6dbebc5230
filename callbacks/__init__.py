"""What happens around training: SAE probes, caption samples, checkpoints, records."""

from .captions import CaptionSamples
from .checkpoints import Checkpoints
from .run_record import RunRecord
from .sae_probe import SAEProbe

__all__ = ["CaptionSamples", "Checkpoints", "RunRecord", "SAEProbe"]
