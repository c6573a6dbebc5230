"""Tiny random models in the on-disk layouts of the real ones, built in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = (
    "a small large red green blue yellow orange purple brown cyan circle square triangle star "
    "cross diamond left of above on white black gray pink background . the picture describe cat dog "
    "one two three user assistant"
).split()


def write_tokenizer(folder: Path, chat: bool = True) -> None:
    """A word-level tokenizer with BOS, EOS and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<bos>", "<eos>", "<turn>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>"],
    )
    if chat:
        fast.chat_template = (
            "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }} {{ m.content }}<eos>{% endfor %}"
        )
    fast.save_pretrained(folder)


def llm_configs() -> dict:
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GPT2Config,
        GPTJConfig,
        GPTNeoXConfig,
        LlamaConfig,
        Qwen2Config,
        Qwen3Config,
    )

    vocabulary = 4 + len(WORDS)
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    gpt = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 128}
    gpt |= {"bos_token_id": 1, "eos_token_id": 2}
    neox = {k: v for k, v in common.items() if k not in ("num_key_value_heads", "head_dim")}
    return {
        "llama": LlamaConfig(**common, tie_word_embeddings=True),
        "gemma2": Gemma2Config(**common, query_pre_attn_scalar=16),
        "gemma3": Gemma3TextConfig(**common, query_pre_attn_scalar=16),
        "qwen2": Qwen2Config(**{k: v for k, v in common.items() if k != "head_dim"}),
        "qwen3": Qwen3Config(**common),
        "gpt2": GPT2Config(**gpt),
        "gptneox": GPTNeoXConfig(**neox),
        "gptj": GPTJConfig(**gpt, rotary_dim=8),
    }


def write_llm(folder: Path, architecture: str = "llama", chat: bool = True) -> str:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llm_configs()[architecture])
    with torch.no_grad():  # Larger than at initialisation: every part of the forward must matter.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    write_tokenizer(folder, chat)
    return str(folder)


def vision_configs() -> dict:
    from transformers import (
        BeitConfig,
        CLIPConfig,
        Dinov2Config,
        DINOv3ViTConfig,
        ResNetConfig,
        SiglipConfig,
        ViTConfig,
    )

    vit = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tower = {**vit, "image_size": 32, "patch_size": 8}
    text = {"vocab_size": 16, **vit, "max_position_embeddings": 8}
    return {
        "clip": CLIPConfig(text_config=text, vision_config=tower, projection_dim=16),
        "siglip": SiglipConfig(text_config=text, vision_config=tower),
        "dinov2": Dinov2Config(**tower),
        "dinov3": DINOv3ViTConfig(**tower, num_register_tokens=4),
        "beit": BeitConfig(**tower),
        "vit": ViTConfig(**tower),
        "resnet": ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1], layer_type="basic", num_channels=3
        ),
    }


def write_vision(folder: Path, architecture: str = "dinov2") -> str:
    from transformers import AutoModel, BitImageProcessorPil, ViTImageProcessorPil

    torch.manual_seed(1)
    AutoModel.from_config(vision_configs()[architecture]).save_pretrained(folder)
    if architecture in ("clip", "dinov2", "resnet"):
        square = {"height": 32, "width": 32}
        processor = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=square)
    else:
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return str(folder)


def write_saes(folder: Path, layers: tuple[int, ...] = (0, 2), place: str = "post", d_in: int = 32) -> str:
    """Standard SAEs with random weights in SAELens' own folder format."""
    from sae_lens import StandardSAE, StandardSAEConfig

    for layer in layers:
        torch.manual_seed(layer)
        config = StandardSAEConfig(d_in=d_in, d_sae=64, dtype="float32", device="cpu")
        config.metadata.hook_name = f"blocks.{layer}.hook_resid_{place}"
        sae = StandardSAE(config)
        with torch.no_grad():
            sae.b_enc.uniform_(-0.5, 0.5)
        sae.save_model(folder / f"layer_{layer}")
    return str(folder)


def arguments(root: Path, probe: bool = True) -> list[str]:
    """Flags that turn the default run into a tiny one on models below `root`."""
    flags = {
        "model.llm": root / "llm",
        "model.vision.name": root / "vision",
        "model.vision.image_size": 32,
        "model.vision.layer": -1,
        "model.vision.pool": 2,
        "model.optimizer.lr": 0.02,
        "model.optimizer.warmup_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.max_steps": 12,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "data.train_size": 16,
        "data.val_size": 10,
        "data.batch_size": 4,
        "data.val_batch_size": 4,
        "data.num_workers": 0,
        "probe.sae_release": root / "saes",
        "probe.sae_id": "layer_{layer}",
        "probe.num_images": 10,
        "probe.every_n_epochs": int(probe),
        # Random SAEs: the check could not but stop.
        "probe.sanity_check": "off",
        "probe.intervention_images": 6,
        "probe.bootstrap_samples": 50,
        "captions.num_images": 4,
        "captions.max_new_tokens": 8,
        "checkpoint.every_n_steps": 1,
    }
    return [f"--{name}={value}" for name, value in flags.items()]
