"""Each published layout, written under its own key names, is the same map when read back."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from lightning_limber import __version__
from lightning_limber.models.adapter_weights import read_projector
from lightning_limber.models.adapters import MLP, Adapter, Linear, PixelShuffle

VISION, LLM = 12, 8
OTHERS = {"model.layers.0.mlp.up_proj.weight": (5, 5), "lm_head.weight": (4, LLM)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}weight": random(LLM, VISION), f"{prefix}bias": random(LLM)}


def mlp(first: str, second: str) -> dict[str, torch.Tensor]:
    return linear(first) | {f"{second}weight": random(LLM, LLM), f"{second}bias": random(LLM) + 1}


def write(weights: dict, path) -> str:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    else:
        torch.save(weights, path)
    return str(path)


def forward(path: str, kind: type[Adapter], features: torch.Tensor) -> torch.Tensor:
    """[B, P, VISION] -> [B, P, LLM] by this project's adapter with the weights of `path`."""
    adapter = kind(VISION, LLM, dropout=0.5).eval()
    adapter.load_state_dict(read_projector(path))
    assert adapter.calibrated, "an uncalibrated adapter would be rescaled before the first step"
    return adapter(features)


@pytest.fixture
def features() -> torch.Tensor:
    return random(2, 5, VISION)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("others", [{}, OTHERS], ids=["alone", "among others"])
@pytest.mark.parametrize(
    "prefix",
    [
        "model.mm_projector.",
        "mm_projector.",
        "base_model.model.model.mm_projector.",  # LLaVA's non_lora_trainables.bin
        "image_prefix.proj.",
        "module.image_prefix.proj.",
    ],
)
def test_linear(prefix, others, suffix, features, tmp_path):
    weights = linear(prefix) | {key: random(*shape) for key, shape in others.items()}
    expected = features @ weights[f"{prefix}weight"].T + weights[f"{prefix}bias"]
    path = write(weights, tmp_path / f"weights.{suffix}")
    torch.testing.assert_close(forward(path, Linear, features), expected)


@pytest.mark.parametrize("prefix", ["", "proj.", "some.where.else."])  # "": LiMBeR's proj.ckpt
def test_linear_alone_in_its_file(prefix, features, tmp_path):
    weights = linear(prefix)
    expected = features @ weights[f"{prefix}weight"].T + weights[f"{prefix}bias"]
    path = write(weights, tmp_path / "proj.ckpt")
    torch.testing.assert_close(forward(path, Linear, features), expected)


@pytest.mark.parametrize("others", [{}, OTHERS], ids=["alone", "among others"])
@pytest.mark.parametrize("model", ["", "model."])
@pytest.mark.parametrize(
    "names",
    [
        ("mm_projector.0.", "mm_projector.2."),
        ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    ],
)
def test_mlp(names, model, others, features, tmp_path):
    first, second = (f"{model}{name}" for name in names)
    weights = mlp(first, second) | {key: random(*shape) for key, shape in others.items()}
    hidden = features @ weights[f"{first}weight"].T + weights[f"{first}bias"]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    expected = hidden @ weights[f"{second}weight"].T + weights[f"{second}bias"]
    path = write(weights, tmp_path / "mm_projector.bin")
    torch.testing.assert_close(forward(path, MLP, features), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_llava(bias, features, tmp_path):
    """Both the file that transformers writes and the names that its model has in memory."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=VISION, image_size=8, patch_size=4, **size),
        text_config=LlamaConfig(hidden_size=LLM, vocab_size=8, **size),
        image_token_index=7,
        multimodal_projector_bias=bias,
    )
    model = LlavaForConditionalGeneration(config).eval()
    projector = model.model.multi_modal_projector
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    expected = projector(features)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(forward(tmp_path / "model.safetensors", MLP, features), expected)
    path = write(model.state_dict(), tmp_path / "memory.pt")
    torch.testing.assert_close(forward(path, MLP, features), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_16_bit_weights_become_float32_and_a_missing_bias_zero(dtype, suffix, tmp_path):
    weight = random(LLM, VISION).to(dtype)
    path = write({"model.mm_projector.weight": weight}, tmp_path / f"weights.{suffix}")
    state = read_projector(path)
    assert {value.dtype for key, value in state.items() if key != "calibrated"} == {torch.float32}
    torch.testing.assert_close(state["project.weight"], weight.float(), rtol=0, atol=0)
    assert state["project.bias"].tolist() == [0.0] * LLM


def test_a_checkpoint_of_this_project_comes_back_unchanged(tmp_path):
    adapter = PixelShuffle(VISION, LLM, input_norm="channel")
    saved = {f"adapter.{key}": value for key, value in adapter.state_dict().items()}
    own = {"version": __version__, "backbones": {}, "trainer": {}, "config": None}
    checkpoint = {"lightning_limber": own, "hyper_parameters": {}, "loops": {}, "global_step": 0}
    path = write(checkpoint | {"state_dict": saved}, tmp_path / "last.ckpt")
    state = read_projector(path)
    assert not state["calibrated"], "what was saved before calibration is still to be calibrated"
    adapter.load_state_dict(state)
    assert all(torch.equal(value, adapter.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize(
    "weights",
    [
        {key: random(*shape) for key, shape in OTHERS.items()},
        mlp("model.mm_projector.0.", "model.mm_projector.2.") | linear("model.mm_projector.4."),
        linear("multi_modal_projector.linear_1."),  # one of a model's several files
        linear("mm_projector.") | {"mm_projector.norm.weight": random(LLM)},
        {"state_dict": linear("adapter.project.")},
        {},
    ],
    ids=["no projector", "three layers", "half", "extra norm", "nested", "empty"],
)
def test_another_layout_stops_with_the_keys_found(weights, tmp_path):
    path = write(weights, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="in a known layout") as error:
        read_projector(path)
    for shown in [*list(weights)[:2], "mm_projector.{0,2}", "linear_{1,2}", "image_prefix.proj"]:
        assert shown in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file at"):
        read_projector(tmp_path / "missing.bin")
