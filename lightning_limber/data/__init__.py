"""Where images and captions come from."""

from lightning_limber.data.annotations import CocoCaptions, LLaVAConversations
from lightning_limber.data.datamodule import CaptionData
from lightning_limber.data.huggingface import HuggingFaceCaptions
from lightning_limber.data.image_folder import ImageFolder
from lightning_limber.data.scenes import Scenes
from lightning_limber.data.shards import Shards

__all__ = [
    "CaptionData",
    "CocoCaptions",
    "HuggingFaceCaptions",
    "ImageFolder",
    "LLaVAConversations",
    "Scenes",
    "Shards",
]
