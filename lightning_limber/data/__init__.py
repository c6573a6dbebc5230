"""Where images and captions come from."""

from lightning_limber.data.base import CaptionData
from lightning_limber.data.image_folder import ImageFolder
from lightning_limber.data.scenes import Scenes

__all__ = ["CaptionData", "ImageFolder", "Scenes"]
