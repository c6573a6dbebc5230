"""Each supported architecture, at tiny size, through the real loading code."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from lightning_limber.models.frozen import fingerprint
from lightning_limber.models.llm import LLM
from lightning_limber.models.vision import VisionConfig, VisionEncoder

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("architecture", list(tiny.llm_configs()))
def test_llm_steps_hooks_and_norms(architecture, tmp_path):
    llm = LLM(tiny.write_llm(tmp_path, architecture)).load()
    ids = torch.arange(4, 16).view(2, 6)
    residual = {}
    hooks = {
        f"blocks.{layer}.hook_resid_{place}": lambda x, key=(layer, place): residual.update({key: x})
        for layer in range(3)
        for place in ("pre", "post")
    }
    with torch.no_grad(), llm.residual_hooks(hooks):
        hidden = llm.decode(llm.embed(ids))
        logits = llm.logits(hidden.flatten(0, 1))
    with torch.no_grad():
        expected = llm.model(input_ids=ids, output_hidden_states=True)
    # Embedding, decoder and head are the model; Gemma's embedding scale is on the right side of the cut.
    torch.testing.assert_close(logits, expected.logits.flatten(0, 1))
    torch.testing.assert_close(residual[0, "pre"], expected.hidden_states[0])
    for layer in (0, 1):
        assert torch.equal(residual[layer, "post"], residual[layer + 1, "pre"])
        torch.testing.assert_close(residual[layer, "post"], expected.hidden_states[layer + 1])
    # hidden_states[-1] has the final norm applied; the hook of the last layer has not.
    assert not torch.allclose(residual[2, "post"], expected.hidden_states[3])
    norms = llm.embed(torch.arange(llm.vocab_size)).norm(dim=-1)
    torch.testing.assert_close(llm.token_norm(), norms.mean())


def test_hook_can_replace_the_residual_stream(models):
    llm = LLM(str(models / "llm")).load()
    embeds = llm.embed(torch.arange(4, 10)[None])
    with torch.no_grad():
        clean = llm.decode(embeds)
        with llm.residual_hooks({"blocks.2.hook_resid_post": lambda x: torch.ones_like(x)}):
            replaced = llm.decode(embeds)
        after = llm.decode(embeds)
    assert (replaced == replaced[0, 0]).all()
    assert torch.equal(clean, after)  # The hooks are gone.


@pytest.mark.parametrize("name", ["blocks.3.hook_resid_post", "blocks.0.hook_mlp_out", "layer_0"])
def test_wrong_hook_names(models, name):
    llm = LLM(str(models / "llm")).load()
    with (
        pytest.raises(ValueError, match=r"allowed are blocks\.0 \.\.\. blocks\.2"),
        llm.residual_hooks({name: print}),
    ):
        pass


@pytest.mark.parametrize("architecture", list(tiny.llm_configs()))
def test_a_forward_can_begin_at_any_layer(architecture, tmp_path):
    """From a layer's own input the forward ends as it would have, and no hook before it fires."""
    llm = LLM(tiny.write_llm(tmp_path, architecture)).load()
    embeds = llm.embed(torch.arange(4, 16).view(2, 6))
    kept: dict[str, torch.Tensor] = {}
    names = [f"blocks.{i}.hook_resid_post" for i in range(3)]
    with torch.no_grad():
        with llm.residual_hooks({name: partial(kept.__setitem__, name) for name in names}):
            whole = llm.decode(embeds)
        for i, name in enumerate(names):
            fired: list[str] = []
            with llm.residual_hooks({n: lambda x, n=n, to=fired: to.append(n) for n in names}):
                part = llm.decode(kept[name], first_layer=i + 1)
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)
            assert fired == names[i + 1 :]
        torch.testing.assert_close(llm.decode(embeds), whole)  # And nothing is left behind.


def test_unknown_head_is_refused(models, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ValueError, match="do not add up to the model's own logits"):
        LLM(str(models / "llm")).load()


def test_prepared_weights_are_those_that_autocast_would_use(models):
    llm = LLM(str(models / "llm")).load()
    llm.model.set_attn_implementation("eager")
    embeds = llm.embed(torch.arange(4, 16).view(2, 6))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = llm.decode(embeds)
        llm.prepare_autocast(torch.bfloat16)
        assert torch.equal(llm.decode(embeds), before)


@pytest.mark.parametrize("architecture", list(tiny.vision_configs()))
def test_vision_features(architecture, tmp_path):
    name = tiny.write_vision(tmp_path, architecture)

    def tokens(**options) -> torch.Tensor:
        encoder = VisionEncoder(VisionConfig(name, **options)).load()
        pixels = encoder.transform(PICTURE)
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert not encoder.training
        return encoder(pixels[None])

    last = tokens()
    assert last.shape == (1, 16, 24)  # A 4x4 grid: of patches, or a CNN's feature map.
    assert not last.requires_grad
    prefix = {"siglip": 0, "resnet": 0, "dinov3": 5}.get(architecture, 1)
    with_cls = tokens(keep_cls=True)
    assert with_cls.shape == (1, 16 + prefix, 24)
    torch.testing.assert_close(with_cls[:, prefix:], last)
    if architecture == "resnet":  # Its stages differ in width and size.
        assert tokens(layer=-2).shape == (1, 64, 8)
        assert tokens(image_size=64).shape == (1, 64, 24)
        return
    assert tokens(layer=-2).shape == last.shape
    assert not torch.allclose(tokens(layer=-2), last)
    pooled = tokens(pool=2)
    torch.testing.assert_close(pooled[0, 0], last[0, [0, 1, 4, 5]].mean(0))  # Neighbours in the picture.
    if architecture != "beit":  # BEiT's relative positions are bound to its grid.
        assert tokens(image_size=64).shape == (1, 64, 24)
    with pytest.raises(ValueError, match=r"vision\.layer=9: .* has hidden states 0 to 2"):
        tokens(layer=9)
    with pytest.raises(ValueError, match=r"vision\.pool=3 does not divide the 4x4"):
        tokens(pool=3)


def test_of_two_towers_only_the_vision_weights_are_read(tmp_path):
    from transformers import CLIPModel

    name = tiny.write_vision(tmp_path, "clip")
    encoder = VisionEncoder(VisionConfig(name)).load()
    whole = CLIPModel.from_pretrained(name).vision_model.state_dict()
    own = {
        key.removeprefix("model.").removeprefix("vision_model."): v
        for key, v in encoder.state_dict().items()
    }
    assert own.keys() == whole.keys()
    assert all(torch.equal(own[key], whole[key]) for key in whole)


def test_preprocessing_is_the_encoders_own(tmp_path):
    from transformers import AutoImageProcessor

    name = tiny.write_vision(tmp_path, "clip")
    own = AutoImageProcessor.from_pretrained(name, backend="pil")
    expected = own(PICTURE, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(VisionEncoder(VisionConfig(name)).transform(PICTURE), expected)
    resized = VisionEncoder(VisionConfig(name, image_size=48)).transform(PICTURE)
    assert resized.shape == (3, 48, 48)


def test_pixels_can_be_looked_at(tmp_path):
    transform = VisionEncoder(VisionConfig(tiny.write_vision(tmp_path, "clip"), image_size=32)).transform
    square = PICTURE.resize((32, 32))
    colours = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    torch.testing.assert_close(transform.undo(transform(square)), colours, atol=1e-5, rtol=0)


def test_padding_keeps_the_whole_picture(tmp_path):
    name = tiny.write_vision(tmp_path, "clip")
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste((255, 0, 0), (0, 0, 10, 30))  # A red left edge that a centre crop would lose.
    cropped = VisionEncoder(VisionConfig(name, image_size=32)).transform(wide)
    padded = VisionEncoder(VisionConfig(name, image_size=32, pad_to_square=True)).transform(wide)

    def reddest(pixels: torch.Tensor) -> float:
        return float((pixels[0] - pixels[1]).max())

    assert reddest(padded) > 10 * max(reddest(cropped), 0.1)


def test_fingerprint_tells_weights_apart(tmp_path):
    a = LLM(tiny.write_llm(tmp_path)).load()
    b = LLM(str(tmp_path)).load()
    assert fingerprint(a) == fingerprint(b)
    with torch.no_grad():
        b.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    assert fingerprint(a) != fingerprint(b)


@pytest.mark.parametrize("architecture", [name for name in tiny.vision_configs() if name != "resnet"])
def test_layers_behind_the_used_one_are_dropped_without_a_change(architecture, tmp_path):
    name = tiny.write_vision(tmp_path, architecture)
    for layer, kept in ((0, 1), (1, 1), (-3, 1), (-2, 1), (-1, 2)):
        encoder = VisionEncoder(VisionConfig(name, layer=layer)).load()
        pixels = encoder.transform(PICTURE)[None]
        before = encoder(pixels)
        encoder.drop_unused_layers()
        assert torch.equal(encoder(pixels), before)
        lists = [len(m) for m in encoder.modules() if isinstance(m, torch.nn.ModuleList)]
        assert kept in lists
