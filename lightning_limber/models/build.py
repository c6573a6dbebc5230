"""From names to models: loads the two frozen ones and makes an adapter that fits between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_limber.models.adapter_weights import load_weights
from lightning_limber.models.adapters import Adapter
from lightning_limber.models.entry import Entry, EntryConfig
from lightning_limber.models.frozen import fingerprint
from lightning_limber.models.llm import LLM
from lightning_limber.models.regularise import RegulariseConfig, Regulariser
from lightning_limber.models.vision import VisionEncoder

BLANK_IMAGE = Image.new("RGB", (64, 64))
"""Its features have the shape of any image's."""


class Built(NamedTuple):
    """What `build` makes and measures."""

    adapter: Adapter
    entry: Entry
    regulariser: Regulariser | None
    backbones: dict[str, str]
    """Fingerprints of the frozen models' weights."""
    feature_shape: tuple[int, ...]
    """(P_v, D_v)"""
    num_image_tokens: int
    token_norm: float
    """Mean L2 norm of the LLM's token embeddings."""
    seed: int
    """Seed that the adapter's first weights were drawn with."""


def build(
    vision: VisionEncoder,
    llm: LLM,
    make_adapter: Callable[[int, int], Adapter],
    entry_config: EntryConfig,
    regularise_config: RegulariseConfig,
    hparams: Mapping[str, Any],
    trainer: Any,
) -> Built:
    """Loads `vision` and `llm`, prepares them for the run, and makes the adapter.

    Args:
        vision: Encoder without its weights.
        llm: LLM without its weights.
        make_adapter: Widths D_v and D_l -> adapter.
        entry_config: Where image tokens enter the LLM.
        regularise_config: What the loss asks of them.
        hparams: Of the module (`Limber`).
        trainer: Lightning's; None outside a run.

    Raises:
        ValueError: image tokens and captions do not fit the LLM, or it cannot be sharded in this run.
    """
    shard = hparams["shard_llm"]
    if shard:
        _check_processes(trainer)
    vision.load()
    # Not on the device (Lightning's default here) when it may not fit there.
    with torch.device("cpu") if shard else nullcontext():
        llm.load()
    backbones = {"vision": fingerprint(vision), "llm": fingerprint(llm)}
    vision.drop_unused_layers()
    blank = vision.transform(BLANK_IMAGE)
    features = vision(blank[None].to(next(vision.parameters()).device))  # [1, P_v, D_v]
    # Its own random stream: what loading the weights drew does not change the adapter.
    seed = torch.initial_seed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = make_adapter(features.shape[-1], llm.hidden_size)
        entry = make_entry(entry_config, adapter, make_adapter, features.shape[-1], llm)
    adapter.bind(llm)
    tokens = adapter.count_tokens(features.to(next(adapter.parameters()).device))
    check_length(llm, tokens, hparams["max_caption_tokens"])
    token_norm = float(llm.token_norm())
    if hparams["adapter_weights"] is not None:
        load_weights(adapter, entry, hparams["adapter_weights"])
    bf16 = trainer is not None and trainer.precision == "bf16-mixed"
    if bf16:
        llm.prepare_autocast(torch.bfloat16, trainer.strategy.root_device)
        vision.prepare_autocast(torch.bfloat16)
    if shard:
        llm.shard(init_device_mesh(trainer.strategy.root_device.type, (trainer.world_size,)))
    if hparams["compile_llm"]:
        llm.compile_layers(torch.bfloat16 if bf16 else None)
    rank_zero_info(f"[frozen]    vision  {_millions(vision)}  {hparams['vision']['name']}")
    rank_zero_info(f"[frozen]    llm     {_millions(llm)}  {hparams['llm']}")
    rank_zero_info(
        f"[trainable] adapter {_millions(adapter)}  {type(adapter).__name__}, "
        f"{features.shape[1]} x {features.shape[2]} -> {tokens} x {llm.hidden_size}"
    )
    if trainer is not None:
        place = trainer.strategy.root_device.type
        rank_zero_info(f"[device]    {trainer.world_size} x {place}, {trainer.precision}")
    regulariser = None
    if regularise_config.weight:
        regulariser = Regulariser(regularise_config, llm, entry_config.layer)
    return Built(
        adapter, entry, regulariser, backbones, tuple(features.shape[1:]), tokens, token_norm, seed
    )


def make_entry(
    config: EntryConfig,
    adapter: Adapter,
    make_adapter: Callable[[int, int], Adapter],
    vision_size: int,
    llm: LLM,
) -> Entry:
    """What stands between an adapter and an LLM."""
    config.check(len(llm.layers))
    if config.norm == "moments" and adapter.last_linear is not None:
        # Taken off again with the mean, it would move by rounding alone.
        adapter.last_linear.bias.requires_grad_(False)

    def make() -> Adapter:
        adapter = make_adapter(vision_size, llm.hidden_size)
        adapter.bind(llm)
        return adapter

    return Entry(config, make, llm.hidden_size, len(llm.layers))


def check_length(llm: LLM, image_tokens: int, caption_tokens: int) -> None:
    """Checks that image tokens and captions fit the LLM.

    Raises:
        ValueError: they are longer than its context.
    """
    context = getattr(llm.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and image_tokens + caption_tokens > context:
        raise ValueError(
            f"{image_tokens} image tokens and captions of {caption_tokens} do not fit the {context} "
            f"positions of {llm.name}: raise model.vision.pool, lower model.vision.image_size or "
            "model.max_caption_tokens."
        )


def _check_processes(trainer: Any) -> None:
    strategy = None if trainer is None else trainer.strategy
    if not isinstance(strategy, DDPStrategy) or strategy.world_size == 1:
        raise ValueError(
            "model.shard_llm splits the LLM over the processes of a DDP run, but this is "
            + ("no run" if strategy is None else f"{trainer.world_size} process(es)")
            + f" with {type(strategy).__name__}. Set trainer.strategy to ddp and trainer.devices (or "
            "trainer.num_nodes) to 2 or more, or model.shard_llm to false."
        )


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:8.2f} M"
