"""The frozen vision encoder: pixel values [B, 3, H, W] to patch features [B, P, D_v]."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_limber.utils.hub import from_hub

if TYPE_CHECKING:
    from PIL.Image import Image
from lightning_limber.models.frozen import freeze, store_matrices


class ImageTransform:
    """PIL image -> float tensor [3, H, W], exactly as the encoder was trained to see images.

    It is the encoder's own image processor (always its PIL version, so that numbers do not depend on
    whether torchvision is installed); for a model of timm, timm's transform for evaluation. `image_size`
    replaces the size the processor names.
    """

    def __init__(self, path: str, image_size: int | None, pad_to_square: bool) -> None:
        from transformers import AutoImageProcessor

        self.processor: Any = AutoImageProcessor.from_pretrained(path, backend="pil")
        self.pad_to_square = pad_to_square
        timm_config = getattr(self.processor, "data_config", None)
        if image_size is not None:
            square = {"height": image_size, "width": image_size}
            if timm_config is not None:
                from timm.data import create_transform

                timm_config["input_size"] = (3, image_size, image_size)
                self.processor.val_transforms = create_transform(**timm_config, is_training=False)
            elif getattr(self.processor, "do_center_crop", False):
                self.processor.size = {"shortest_edge": image_size}
                self.processor.crop_size = square
            else:
                self.processor.size = square
        # Of the colours, in 0..1.
        self.mean: Sequence[float] = timm_config["mean"] if timm_config else self.processor.image_mean
        self.std: Sequence[float] = timm_config["std"] if timm_config else self.processor.image_std

    def __call__(self, image: Image) -> Tensor:
        image = image.convert("RGB")
        if self.pad_to_square and image.width != image.height:
            image = self._pad(image)
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def undo(self, pixels: Tensor) -> Tensor:
        """Pixel values [..., 3, H, W] back to colours in 0..1, to be looked at."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels * std + mean).clamp(0, 1)

    def _pad(self, image: Image) -> Image:
        """Centres the image on a square of the mean colour, as LLaVA 1.5 does: nothing is cropped."""
        from PIL import Image as PILImage

        side = max(image.size)
        colour = tuple(round(255 * mean) for mean in self.mean)
        square = PILImage.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square


@dataclass(frozen=True)
class VisionConfig:
    """Which vision encoder, and which of its features become image tokens.

    Attributes:
        name: Name of the encoder: a hub name (of transformers or, as ``timm/...``, of timm), a local
            folder, or ``wheel:dinov2-small``.
        image_size: Side of the square input in pixels; null keeps the encoder's own.
        pad_to_square: Pad images to a square before resizing them, instead of cropping.
        layer: Take the features of this hidden state: -1 is the encoder's output, -2 its penultimate
            layer (as in LLaVA), 0 its embeddings.
        keep_cls: Keep the CLS token (and register tokens) in front of the patch tokens.
        pool: Average-pool the patch grid by this factor per side; 2 leaves a quarter of the tokens.
    """

    name: str = "wheel:dinov2-small"
    image_size: int | None = None
    pad_to_square: bool = False
    layer: int = -1
    keep_cls: bool = False
    pool: int = 1


class VisionEncoder(nn.Module):
    """Frozen vision encoder: pixel values [B, 3, H, W] -> patch features [B, P, D_v]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.model: Any = None
        self._layer = config.layer
        self._output: Tensor | None = None  # Of the layer whose features are used, in a forward.
        self._autocast_dtype: torch.dtype | None = None
        self.grid = (0, 0)
        """Rows and columns of patches in the last forward; their tokens come last, row by row."""

    @cached_property
    def transform(self) -> ImageTransform:
        with from_hub(self.config.name) as path:
            return ImageTransform(path, self.config.image_size, self.config.pad_to_square)

    def load(self, weights: bool = True) -> VisionEncoder:
        """Reads the weights (float32) and freezes them. Of a two-tower model only the vision part.

        Args:
            weights: False reads ``config.json`` alone and leaves the weights on the meta device.
        """
        from transformers import AutoConfig, AutoModel

        with from_hub(self.config.name) as path:
            model_config = AutoConfig.from_pretrained(path)
            model_config = getattr(model_config, "vision_config", model_config)
            if weights:
                self.model = AutoModel.from_pretrained(path, config=model_config, dtype=torch.float32)
            else:
                with torch.device("meta"):
                    self.model = AutoModel.from_config(model_config, dtype=torch.float32)
        freeze(self)
        accepted = inspect.signature(self.model.forward).parameters
        self._kwargs = {
            key: True
            for key, wanted in {
                "interpolate_pos_encoding": self.config.image_size is not None,
                "output_hidden_states": self.config.layer != -1,
            }.items()
            # Most models take output_hidden_states through **kwargs.
            if wanted and (key in accepted or key == "output_hidden_states")
        }
        return self

    def drop_unused_layers(self) -> None:
        """Lets go of the encoder's layers behind the one whose features are used.

        These are then read where that layer leaves them: some models put their final norm into the last
        hidden state that they report.
        """
        count, layer = getattr(self.model.config, "num_hidden_layers", 0), self.config.layer
        used = layer if layer >= 0 else count + 1 + layer
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if layer == -1 or not 0 <= used < count or len(lists) != 1:
            return
        del lists[0][max(1, used) :]
        self._layer = used
        if used:
            lists[0][-1].register_forward_hook(self._keep_output)
            self._kwargs.pop("output_hidden_states", None)

    def _keep_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._output = output[0] if isinstance(output, tuple) else output

    def prepare_autocast(self, dtype: torch.dtype) -> None:
        """Stores the matrices in `dtype`, as autocast would round them at every call; from now on every
        forward is under autocast.
        """
        store_matrices(self.model, dtype)
        self._autocast_dtype = dtype

    @property
    def _patch_size(self) -> int | tuple[int, int]:
        timm_model = getattr(self.model, "timm_model", None)
        return timm_model.patch_embed.patch_size if timm_model else self.model.config.patch_size

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        dtype = self._autocast_dtype
        with torch.autocast(pixel_values.device.type, dtype) if dtype else nullcontext():
            output = self.model(pixel_values, **self._kwargs)
        layer = self._layer
        if self._output is not None:
            features, self._output = self._output, None
        elif layer == -1:
            features = output.last_hidden_state
        elif -len(output.hidden_states) <= layer < len(output.hidden_states):
            features = output.hidden_states[layer]
        else:
            raise ValueError(
                f"vision.layer={layer}: {self.config.name} has hidden states 0 to "
                f"{len(output.hidden_states) - 1}; negative numbers count from the end."
            )
        if features.ndim == 4:  # A CNN's feature map [B, D_v, h, w].
            grid, cls = features, features.new_zeros(features.shape[0], 0, features.shape[1])
        else:  # Patch tokens behind CLS and registers, [B, n + h*w, D_v].
            patch = self._patch_size
            patch_h, patch_w = patch if isinstance(patch, (tuple, list)) else (patch, patch)
            h, w = pixel_values.shape[-2] // patch_h, pixel_values.shape[-1] // patch_w
            cls, patches = features.split([features.shape[1] - h * w, h * w], dim=1)
            grid = patches.transpose(1, 2).unflatten(2, (h, w))
        grid = self._pool(grid)
        self.grid = grid.shape[-2], grid.shape[-1]
        patches = grid.flatten(2).transpose(1, 2)  # [B, P, D_v]
        return torch.cat([cls, patches], dim=1) if self.config.keep_cls else patches

    def _pool(self, grid: Tensor) -> Tensor:
        pool = self.config.pool
        if pool == 1:
            return grid
        if grid.shape[-1] % pool or grid.shape[-2] % pool:
            raise ValueError(
                f"vision.pool={pool} does not divide the {grid.shape[-2]}x{grid.shape[-1]} patch grid "
                f"of {self.config.name}. Choose a divisor, or another vision.image_size."
            )
        return nn.functional.avg_pool2d(grid, pool)
