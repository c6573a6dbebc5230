"""What happens around training: SAE probes, caption samples, checkpoints, records."""

from .captions import CaptionSamples
from .checkpoints import Checkpoints
from .console import Ending, Progress
from .run_record import RunRecord
from .sae_probe import SAEProbe

__all__ = ["CaptionSamples", "Checkpoints", "Ending", "Progress", "RunRecord", "SAEProbe"]
