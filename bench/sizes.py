"""The three sizes of everything, and models of random weights in the on-disk layouts of real ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig

from lightning_limber.data import CaptionData
from lightning_limber.data.collate import Batch, Collator
from lightning_limber.data.loader import RecordSet
from lightning_limber.data.records import Record
from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.adapters import Linear
from lightning_limber.models.limber import Limber
from lightning_limber.models.vision import VisionConfig
from tests.helpers import tiny


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        llm: Makes the LLM's config.
        vision: Makes the encoder's config.
        features: Which of the encoder's features become image tokens (`name` is filled in).
        batch_size: Images in a training step.
        steps: Timed steps of a contender in a round.
        d_sae: Latents of each layer's SAE.
        num_images: Probed images.
    """

    llm: Callable[[], Any]
    vision: Callable[[], Any]
    features: VisionConfig
    batch_size: int
    steps: int
    d_sae: int
    num_images: int

    def many_tokens(self) -> Size:
        """For prefix sharing: the encoder's whole grid, and fewer images in a batch."""
        image_size = 224 if self.features.image_size == 112 else self.features.image_size
        features = replace(self.features, image_size=image_size, pool=1)
        return replace(self, features=features, batch_size=max(2, self.batch_size // 4))


def _tiny(configs: str, name: str) -> Any:
    return getattr(tiny, configs)()[name]


SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
DINOV2_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
DINOV2_S |= {"image_size": 518, "patch_size": 14}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP_L |= {"num_attention_heads": 16, "image_size": 224, "patch_size": 14}
SIZES = {
    "tiny": Size(
        partial(_tiny, "llm_configs", "llama"),
        partial(_tiny, "vision_configs", "dinov2"),
        VisionConfig(image_size=32, layer=1, pool=2),
        batch_size=4,
        steps=2,
        d_sae=256,
        num_images=4,
    ),
    # configs/default.yaml
    "default": Size(
        partial(AutoConfig.for_model, "llama", **SMOLLM2_135M, bos_token_id=1, eos_token_id=2),
        partial(AutoConfig.for_model, "dinov2", **DINOV2_S),
        VisionConfig(image_size=112, layer=8, pool=2),
        batch_size=16,
        steps=10,
        d_sae=16 * 576,
        num_images=32,
    ),
    # Venhoff et al. (arXiv 2506.11976); transformers' own sizes of Gemma 2 are those of 2B.
    "venhoff": Size(
        partial(AutoConfig.for_model, "gemma2", bos_token_id=1, eos_token_id=2),
        partial(AutoConfig.for_model, "clip_vision_model", **CLIP_L),
        VisionConfig(layer=-1),
        batch_size=16,
        steps=10,
        d_sae=16384,
        num_images=64,
    ),
}


@dataclass(frozen=True)
class Setup:
    """One call of the bench; `folder` has the models and takes what is written.

    Attributes:
        until: No round is begun after this time (of `time.monotonic`) but the first.
        json: What is known so far is written here (gpu).
        in_process: Peak memory is that of this process, not of one for each contender.
    """

    size: Size
    folder: Path
    device: str
    repeats: int
    captions: int
    only: list[str] | None
    until: float = math.inf
    json: Path | None = None
    in_process: bool = False


def write_models(setup: Setup) -> None:
    """Writes ``llm`` and ``vision`` of random weights, for `from_pretrained`."""
    from transformers import AutoModel, AutoModelForCausalLM, BitImageProcessorPil

    size, folder = setup.size, setup.folder
    torch.manual_seed(0)
    with torch.device(setup.device):
        llm = AutoModelForCausalLM.from_config(size.llm())
        vision = AutoModel.from_config(size.vision())
    # Billions of weights are kept as they are published.
    large = sum(p.numel() for p in llm.parameters()) > 1e9
    llm.to(torch.bfloat16 if large else torch.float32).save_pretrained(folder / "llm")
    tiny.write_tokenizer(folder / "llm")
    vision.save_pretrained(folder / "vision")
    square = {"height": 224, "width": 224}
    BitImageProcessorPil(size={"shortest_edge": 224}, crop_size=square).save_pretrained(folder / "vision")


def limber(setup: Setup, **kwargs: Any) -> Limber:
    """The default run's module, not loaded yet; `kwargs` are more of its own, or others."""
    vision = replace(setup.size.features, name=str(setup.folder / "vision"))
    options = {"adapter": partial(Linear, input_norm="channel")} | kwargs
    return Limber(vision, str(setup.folder / "llm"), **options)


def collator(setup: Setup, packed: bool) -> Collator:
    """The default run's, without the LLM's weights.

    Args:
        setup: Has the models.
        packed: Let short sequences share a row, as in a run.
    """
    model = limber(setup)
    model.llm.load(weights=False)
    model.vision.load()
    blank = model.vision.transform(Image.new("RGB", (64, 64)))
    model.num_image_tokens = model.vision(blank[None]).shape[1]
    collate = model.collator()
    collate.packing = collate.packing if packed else None
    return collate


class _Scenes:
    """Drawn scenes, each with the captions of `captions` scenes."""

    def __init__(self, split: str, count: int, captions: int, image_size: int) -> None:
        self.scenes = SceneSet(split, count * captions, image_size, seed=0)
        self.count, self.per_record = count, captions

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        first, *others = [self.scenes[index * self.per_record + i] for i in range(self.per_record)]
        first.captions += [caption for other in others for caption in other.captions]
        return first


class Pictures(CaptionData):
    """The default run's data with several captions an image, and batches made ready beforehand.

    What making them costs is measured by ``python -m bench data``.
    """

    def __init__(self, count: int, image_size: int, **kwargs: Any) -> None:
        super().__init__(num_workers=0, **kwargs)
        self.count, self.image_size = count, image_size
        self.ready: list[Batch] = []

    def datasets(self) -> tuple[RecordSet, RecordSet]:
        sizes = self.count, self.captions_per_image, self.image_size
        return _Scenes("train", *sizes), _Scenes("val", *sizes)

    def train_dataloader(self) -> Any:
        return DataLoader(cast(Any, self.ready), batch_size=None)


def pictures(setup: Setup, batches: int, packed: bool, share_prefix: bool = False) -> Pictures:
    """Training batches in ``ready``; see `collator` for `packed`."""
    size = setup.size
    data = Pictures(
        batches * size.batch_size,
        size.features.image_size or 224,
        batch_size=size.batch_size,
        captions_per_image=setup.captions,
        share_prefix=share_prefix,
    )
    attach(data, collator(setup, packed))
    data.ready = list(CaptionData.train_dataloader(data))
    return data


def attach(data: CaptionData, collate: Collator) -> None:
    """Sets a data module up without a Trainer."""
    module = SimpleNamespace(collator=lambda: collate)
    data.trainer = cast(Any, SimpleNamespace(lightning_module=module, global_rank=0, world_size=1))
    data.setup()
