"""A model hub on disk: tiny models and SAEs under the names, and in the files, of the published ones.

The cache layout of huggingface_hub is written directly, so everything below the recipes' names runs as it
does for the real repositories: SAELens' registry and converters, transformers' Auto classes, timm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

REVISION = "0" * 40
D_MODEL, D_SAE = 32, 64


def snapshot(hub: Path, repo: str) -> Path:
    """The folder of a repository's files."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(REVISION)
    (folder / "snapshots" / REVISION).mkdir(parents=True, exist_ok=True)
    return folder / "snapshots" / REVISION


# -- language models --------------------------------------------------------------------------------

# In structure as the published ones.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Special tokens (BOS, EOS, others) and chat template.
TOKENIZERS: dict[str, tuple[str | None, str, list[str], str | None]] = {
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], GEMMA),
    "qwen": (None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], QWEN),
    "llama": ("<|begin_of_text|>", "<|end_of_text|>", [], None),
    "gpt": ("<|endoftext|>", "<|endoftext|>", [], None),
}


def write_tokenizer(folder: Path, family: str) -> None:
    """Bytes as tokens, behind the family's special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bos, eos, others, template = TOKENIZERS[family]
    # Token 0 is padding: its embedding is a row of zeros.
    special = list(dict.fromkeys(filter(None, ["<pad>", eos, bos, *others])))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({token: i for i, token in enumerate([*special, *letters])}, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, additional_special_tokens=others
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def llm(layers: int, family: str, architecture: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import transformers

        sizes: dict[str, Any] = {"vocab_size": 264, "eos_token_id": 1, "pad_token_id": 0}
        if family == "gpt":
            sizes |= {"n_embd": D_MODEL, "n_layer": layers, "n_head": 2, "n_positions": 256}
            sizes |= {"rotary_dim": 8} if architecture == "GPTJ" else {}
        else:
            sizes |= {"hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": layers}
            sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
            sizes |= {"max_position_embeddings": 2048}
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(**sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        write_tokenizer(folder, family)

    return write


# -- vision encoders --------------------------------------------------------------------------------


def vision(architecture: str, image_size: int, patch_size: int) -> Callable[[Path], None]:
    """Two-tower checkpoints where the published ones are."""

    def write(folder: Path) -> None:
        import transformers

        vit = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        tower = {**vit, "image_size": image_size, "patch_size": patch_size}
        square = {"height": image_size, "width": image_size}
        torch.manual_seed(1)
        if architecture == "Beit":
            # As pre-trained: with the head that guesses masked patches, which no one needs here.
            config = transformers.BeitConfig(**tower, vocab_size=16, use_mask_token=True)
            model = transformers.BeitForMaskedImageModeling(config)
            processor = transformers.BeitImageProcessorPil(size=square, crop_size=square)
        else:
            text = {"vocab_size": 16, **vit, "max_position_embeddings": 8}
            config = getattr(transformers, f"{architecture}Config")(text_config=text, vision_config=tower)
            model = transformers.AutoModel.from_config(config)
            processor = getattr(transformers, f"{architecture}ImageProcessorPil")()
            processor.size = {"shortest_edge": image_size} if architecture == "CLIP" else square
            processor.crop_size = square if architecture == "CLIP" else None
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return write


def timm_vision(name: str, **model_args) -> Callable[[Path], None]:
    """As timm itself pushes a model to the hub, at the size of its images but with few channels."""

    def write(folder: Path) -> None:
        import timm
        from timm.models._hub import save_for_hf

        torch.manual_seed(1)
        model = timm.create_model(name, pretrained=False, num_classes=10, **model_args)
        save_for_hf(model, folder, safe_serialization=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_args": model_args}))

    return write


# -- SAEs -------------------------------------------------------------------------------------------


def weights(layer: int) -> dict[str, torch.Tensor]:
    """Of one SAE, in SAELens' names and orientation."""
    generator = torch.Generator().manual_seed(layer)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=-1)
    b_enc = 0.1 * torch.randn(D_SAE, generator=generator)
    b_dec = 0.1 * torch.randn(D_MODEL, generator=generator)
    return {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}


THRESHOLD, AVERAGE_NORM = 0.05, 9.0


def gemma_scope(folder: Path, path: str, layer: int) -> None:
    (folder / path).mkdir(parents=True)
    arrays = {name: tensor.numpy() for name, tensor in weights(layer).items()}
    np.savez(folder / path / "params.npz", threshold=np.full(D_SAE, THRESHOLD, np.float32), **arrays)


def gemma_scope_2(folder: Path, path: str, layer: int) -> None:
    (folder / path).mkdir(parents=True)
    tensors = {name.lower(): tensor for name, tensor in weights(layer).items()}
    tensors["threshold"] = torch.full((D_SAE,), THRESHOLD)
    save_file(tensors, folder / path / "params.safetensors")
    config = {
        "hf_hook_point_in": f"model.layers.{layer}.output",
        "hf_hook_point_out": f"model.layers.{layer}.output",
        "width": D_SAE,
        "model_name": "gemma-v3-270m-it",
        "architecture": "jump_relu",
        "type": "sae",
        "affine_connection": False,
    }
    (folder / path / "config.json").write_text(json.dumps(config))


def llama_scope(folder: Path, path: str, layer: int) -> None:
    (folder / path / "checkpoints").mkdir(parents=True)
    of = weights(layer)
    tensors = {
        "encoder.weight": of["W_enc"].T,
        "decoder.weight": of["W_dec"].T,
        "encoder.bias": of["b_enc"],
        "decoder.bias": of["b_dec"],
    }
    tensors = {name: tensor.contiguous().bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / path / "checkpoints/final.safetensors")
    hook = f"blocks.{layer}.hook_resid_post"
    config = {
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": THRESHOLD,
        "dataset_average_activation_norm": {"in": AVERAGE_NORM, "out": AVERAGE_NORM},
        "norm_activation": "dataset-wise",
        "use_decoder_bias": True,
        "top_k": 50,
    }
    (folder / path / "hyperparams.json").write_text(json.dumps(config))


def qwen_scope(folder: Path, path: str, layer: int) -> None:
    of = weights(layer)
    torch.save(of | {name: of[name].T.contiguous() for name in ("W_enc", "W_dec")}, folder / path)


def res_jb(folder: Path, path: str, layer: int) -> None:
    """SAELens' layout before version 6."""
    (folder / path).mkdir(parents=True)
    save_file(weights(layer), folder / path / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(D_SAE)}, folder / path / "sparsity.safetensors")
    config = {
        "model_name": "gpt2-small",
        "hook_point": path,
        "hook_point_layer": layer,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "device": "mps",
        "expansion_factor": D_SAE // D_MODEL,
        "l1_coefficient": 8e-05,
    }
    (folder / path / "cfg.json").write_text(json.dumps(config))


# -- the hub ----------------------------------------------------------------------------------------

MODELS = {
    "google/gemma-2-2b-it": llm(26, "gemma", "Gemma2"),
    "google/gemma-3-270m-it": llm(18, "gemma", "Gemma3Text"),
    "Qwen/Qwen3-1.7B-Base": llm(28, "qwen", "Qwen3"),
    "meta-llama/Llama-3.1-8B": llm(32, "llama", "Llama"),
    "openai-community/gpt2": llm(12, "gpt", "GPT2"),
    "EleutherAI/gpt-j-6B": llm(3, "gpt", "GPTJ"),
    "openai/clip-vit-large-patch14": vision("CLIP", 56, 14),
    "openai/clip-vit-large-patch14-336": vision("CLIP", 56, 14),
    "openai/clip-vit-base-patch32": vision("CLIP", 64, 32),
    "google/siglip-base-patch16-224": vision("Siglip", 32, 16),
    "microsoft/beit-large-patch16-224-pt22k": vision("Beit", 32, 16),
}
SAES = {
    "gemma-scope-2b-pt-res-canonical": gemma_scope,
    "gemma-scope-2-270m-it-res-all": gemma_scope_2,
    "qwen-scope-3-1.7b-base-w32k-l50": qwen_scope,
    "llama_scope_lxr_8x": llama_scope,
    "gpt2-small-res-jb": res_jb,
}
TIMM = {
    "timm/resnet50x16_clip.openai": timm_vision("resnet50x16_clip.openai", width_factor=0.0625),
    "timm/nf_resnet50.ra2_in1k": timm_vision(
        "nf_resnet50.ra2_in1k", depths=[1, 1, 1, 1], channels=[16, 16, 32, 48]
    ),
    "timm/vit_tiny_patch16_224.augreg_in21k": timm_vision("vit_tiny_patch16_224.augreg_in21k", depth=2),
}


def write_release(hub: Path, release: str, sae_id: str) -> None:
    """All layers of one release, where SAELens' registry looks for them."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from lightning_limber.models.saes import find_saes

    entry = get_pretrained_saes_directory()[release]
    for name in find_saes(release, sae_id, None)[1]:
        layer = int(re.findall(r"\d+", name)[0])
        SAES[release](snapshot(hub, entry.repo_id), entry.saes_map[name], layer)


def use(hub: Path, monkeypatch) -> None:
    """Makes `hub` the only hub there is, and its SAEs' sizes known to SAELens."""
    import huggingface_hub.constants
    from sae_lens.loading import pretrained_sae_loaders
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # The converters of these two know the sizes of the published SAEs, not those of the files.
    for release in ("gemma-scope-2b-pt-res-canonical", "qwen-scope-3-1.7b-base-w32k-l50"):
        sizes = {"d_in": D_MODEL, "d_sae": D_SAE}
        monkeypatch.setattr(get_pretrained_saes_directory()[release], "config_overrides", sizes)

    # The converter for Gemma Scope 2 asks the hub for the first bytes of a file, not the cache.
    def first_bytes(url: str, headers: dict, timeout: int) -> Any:
        repo, _, path = url.removeprefix("https://huggingface.co/").partition("/resolve/main/")
        start, end = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        content = (snapshot(hub, repo) / path).read_bytes()[start : end + 1]
        return SimpleNamespace(content=content, status_code=206, raise_for_status=lambda: None)

    monkeypatch.setattr(pretrained_sae_loaders.requests, "get", first_bytes)
