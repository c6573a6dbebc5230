"""`plan` against what it predicts: the real step, counted and weighed as it runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from parts import sae_probe
from torch.utils.flop_counter import FlopCounterMode

from lightning_limber.data.records import Record
from lightning_limber.models.adapters import MLP, Adapter, Linear, PixelShuffle, Resampler, Vocabulary
from lightning_limber.models.adapters.spec import adapter_from_spec
from lightning_limber.models.entry import EntryConfig
from lightning_limber.models.image_tokens import embed_sequences
from lightning_limber.models.limber import Limber
from lightning_limber.models.vision import VisionConfig
from lightning_limber.probe.metrics import DEFAULT_METRICS
from lightning_limber.tools.plan import probe_flops, sae_sizes, width_in_name
from lightning_limber.tools.rehearsal import Rehearsal
from lightning_limber.utils.flops import CPU_ATTENTION

IMAGES, CAPTION_TOKENS = 3, 12


def write_llm(folder: Path, architecture: str, **sizes) -> str:
    """A model in which every term of the count matters: wide, deep, a vocabulary larger than either."""
    from transformers import AutoModelForCausalLM

    config = tiny.llm_configs()[architecture]
    for name, value in sizes.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return str(folder)


def batch_of(model: Limber, images: int = IMAGES, **kwargs):
    from PIL import Image

    caption = " ".join(tiny.WORDS[:CAPTION_TOKENS])
    records = [Record(str(i), Image.new("RGB", (48, 48)), [caption]) for i in range(images)]
    return model.collator()(records, [[caption]] * images, list(range(images)), **kwargs)


def real_and_planned(
    vision: str,
    llm: str,
    precision: str = "32-true",
    adapter: Callable[[int, int], Adapter] = Linear,
    entry: EntryConfig = EntryConfig(),
) -> tuple[Limber, Rehearsal]:
    """The same model twice: loaded, and on fake tensors."""

    def limber() -> Limber:
        return Limber(VisionConfig(vision), llm, adapter, entry, prompt="{bos}{image}the {caption}{eos}")

    real = limber()
    real.configure_model()
    if precision == "bf16-mixed":
        real.vision.prepare_autocast(torch.bfloat16)
        real.llm.prepare_autocast(torch.bfloat16)
    return real, Rehearsal(limber(), precision, CAPTION_TOKENS)


def run(model: Limber, batch, precision: str) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        losses = model(batch)[1]
    losses.sum().backward()


def counted(function) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("llm", "vision", "adapter"),
    [
        ("llama", "dinov2", Linear),
        ("gemma2", "clip", MLP),
        ("gpt2", "dinov2", PixelShuffle),
        ("gptj", "resnet", Linear),
        ("llama", "dinov2", partial(Resampler, queries=5)),
        ("gemma2", "dinov2", partial(Vocabulary, perplexity=10)),
        ("gptj", "dinov2", partial(Vocabulary, words="whole", perplexity=10)),
    ],
)
def test_flops_and_parameters_are_those_of_the_real_step(tmp_path, llm, vision, adapter):
    names = tiny.write_vision(tmp_path / "vision", vision), tiny.write_llm(tmp_path / "llm", llm)
    check_counts(*real_and_planned(*names, adapter=adapter))


@pytest.mark.parametrize(
    "entry",
    [{"layer": 2}, {"layer": 1, "norm": "fixed", "hold": True}, {"inject": [0, 2], "norm": "moments"}],
)
def test_entries_are_counted(models, entry):
    names = str(models / "vision"), str(models / "llm")
    check_counts(*real_and_planned(*names, entry=EntryConfig(**entry)))


def check_counts(real: Limber, planned: Rehearsal) -> None:
    batch = batch_of(real)
    step = planned.step(IMAGES)
    assert sum(step.flops.values()) == pytest.approx(counted(lambda: run(real, batch, "32-true")), rel=0.02)
    with torch.no_grad():
        pixels = batch.pixel_values
        assert step.flops["vision forward"] == counted(lambda: real.vision(pixels))
        features = real.vision(pixels)
        assert step.flops["adapter forward"] == counted(lambda: real.made_of(features))
        alone = batch_of(real, for_probe=True).without_image
        text = counted(lambda: real.llm.decode(embed_sequences(real.llm, alone, None)))
    assert planned.text_flops() * IMAGES == text
    assert not [p for part in (real.vision, real.llm) for p in part.parameters() if p.grad is not None]
    assert planned.parameters == {
        "vision": sum(p.numel() for p in real.vision.parameters()),
        "llm": sum(p.numel() for p in real.llm.parameters()),
        "adapter": sum(p.numel() for p in real.parameters()),
    }


def test_flops_by_hand(tmp_path):
    """Llama's products, written out: a frozen LLM's backward costs its forward, not twice that."""
    llm = write_llm(tmp_path / "llm", "llama", vocab_size=512, num_hidden_layers=4)
    planned = Rehearsal(
        Limber(VisionConfig(tiny.write_vision(tmp_path / "vision")), llm), "32-true", CAPTION_TOKENS
    )
    flops = planned.step(1).flops
    d, ffn, layers, heads, kv_heads, head_dim = 32, 48, 4, 2, 1, 16
    image, text = 16, CAPTION_TOKENS + 1  # And the end token.
    sequence = 1 + image + text
    matrices = d * head_dim * (2 * heads + 2 * kv_heads) + 3 * d * ffn
    linear = 2 * layers * matrices * sequence
    square = 2 * sequence**2 * heads * head_dim * layers  # One product of queries and keys.
    assert flops["LLM forward"] == linear + 2 * square
    assert flops["LLM backward"] == linear + 5 * square  # The fused kernel makes the scores anew.
    assert flops["head"] == 2 * 2 * d * 512 * text
    assert flops["adapter forward"] == flops["adapter backward"] == 2 * 24 * d * image  # Weight alone.


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_memory_is_that_of_a_real_step(tmp_path, precision):
    """Kept tensors against torch's own hooks, the peak against the allocator's record of the step."""
    from transformers import AutoModel, Dinov2Config

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 2048}
    llm = write_llm(tmp_path / "llm", "llama", **sizes)
    vision = tiny.write_vision(tmp_path / "vision")
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    AutoModel.from_config(config).save_pretrained(vision)
    real, planned = real_and_planned(vision, llm, precision)
    # On a CPU under autocast attention is written out; a plan is for GPUs.
    planned.model.llm.model.set_attn_implementation(real.llm.model.config._attn_implementation)
    batch = batch_of(real)
    step = planned.step(IMAGES)
    assert planned.image_tokens == 64

    weights = [t for part in (real.vision, real.llm, real.adapter) for t in part.parameters()]
    ours = {t.untyped_storage().data_ptr() for t in weights}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(real, batch, precision)
    assert step.kept_bytes + step.head_bytes == pytest.approx(sum(kept.values()), rel=0.15)

    real.zero_grad()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as record:
        run(real, batch, precision)
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert step.peak_bytes == pytest.approx(peak, rel=0.15)

    by_part = {
        "vision": sum(t.nbytes for t in real.vision.state_dict().values()),
        "llm": sum(t.nbytes for t in [*real.llm.parameters(), *real.llm.buffers()]),
        "adapter": sum(t.nbytes for t in real.adapter.state_dict().values()),
    }
    assert planned.weight_bytes() == pytest.approx(by_part, rel=0.01)


def test_autocast_is_that_of_a_gpu(tmp_path):
    """The GELU with a power in it keeps its float32 input, two more in float32 and one in bfloat16; the
    fused one keeps its bfloat16 input.
    """
    vision, kept = tiny.write_vision(tmp_path / "vision"), {}
    for act in ("gelu_new", "gelu_pytorch_tanh"):
        llm = write_llm(tmp_path / act, "gptj", activation_function=act)
        planned = Rehearsal(Limber(VisionConfig(vision), llm), "bf16-mixed", CAPTION_TOKENS)
        kept[act] = planned.step(IMAGES).kept_bytes
    tokens = IMAGES * (planned.prefix_tokens + planned.image_tokens + planned.text_tokens)
    assert kept["gelu_new"] - kept["gelu_pytorch_tanh"] == tokens * 3 * 4 * 32 * (3 * 4 + 2 - 2)


def test_probe_flops_are_those_of_a_real_probe(models, fit, monkeypatch):
    """The passes of a probe, counted while they run."""
    from lightning_limber.probe.passes import Probe, Report

    spent: dict[str, list[int]] = {"_clean_pass": [], "_intervention_pass": []}
    for name, found in spent.items():
        original = getattr(Probe, name)

        def count(self, batch, *args, original=original, found=found):
            found.append(counted(lambda: original(self, batch, *args)) // len(batch.ids))

        monkeypatch.setattr(Probe, name, count)
    monkeypatch.setattr(Probe, "_report", lambda *args: Report([], {}, {}, {}))
    # Captions are cut to one length, which it would refuse.
    monkeypatch.setattr(Limber, "_calibrate", lambda self: None)
    flags = ["--model.max_caption_tokens=8", "--trainer.max_steps=1"]  # Every scene's caption is longer.
    cli = fit(*flags, probe=True)
    settings = cli.config["fit"].model
    model = Limber(VisionConfig(**settings.vision.as_dict()), settings.llm, max_caption_tokens=8)
    planned = Rehearsal(model, "32-true", 8)
    saes = sae_sizes(str(models / "saes"), "layer_{layer}", None, model.llm)
    metrics, probe = set(DEFAULT_METRICS), sae_probe(cli).probe
    [bank] = [metric.bank for metric in probe.metrics if metric.name == "neighbours"]
    of_image = probe_flops(planned, planned.step(1).flops, saes, metrics, len(bank.contexts))
    assert of_image["every image"] == pytest.approx(spent["_clean_pass"][0], rel=0.02)
    assert of_image["images of interventions"] == pytest.approx(spent["_intervention_pass"][-1], rel=0.02)
    parameters = sum(p.numel() for sae in probe.saes.values() for p in sae.parameters())
    assert sum(2 * 32 * sae.d_sae + 32 + sae.d_sae for sae in saes) == parameters


@pytest.mark.parametrize(("metric", "forwards"), [("object_patches", 2), ("object_steer", 3)])
def test_flops_of_interventions_on_objects(models, metric, forwards):
    """So many forwards on from behind layers 0 and 2 of 3."""
    model = Limber(VisionConfig(str(models / "vision"), image_size=32), str(models / "llm"))
    planned = Rehearsal(model, "32-true", 8)
    saes = sae_sizes(str(models / "saes"), "layer_{layer}", None, model.llm)
    flops = planned.step(1).flops
    found = probe_flops(planned, flops, saes, {metric})["images of interventions"]
    decode, head = flops["LLM forward"], flops["head"] / 2
    expected = flops["adapter forward"] + decode + forwards * decode * 2 / 3
    expected += (1 + 2 * forwards) * head if metric == "object_patches" else 0
    assert found == pytest.approx(expected)


def test_checkpoint_has_the_planned_size(models, fit):
    cli = fit("--trainer.max_steps=2", "--model.adapter.input_norm=channel")
    checkpoint = torch.load(Path(cli.trainer.log_dir) / "checkpoints" / "last.ckpt", weights_only=True)
    tensors = list(checkpoint["state_dict"].values())
    for state in checkpoint["optimizer_states"][0]["state"].values():
        tensors += state.values()
    settings = cli.config["fit"].model
    planned = Rehearsal(
        Limber(
            VisionConfig(**settings.vision.as_dict()),
            settings.llm,
            adapter_from_spec(settings.adapter.as_dict()),
        ),
        "32-true",
        CAPTION_TOKENS,
    )
    assert planned.checkpoint_bytes() == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("gemma-scope-2b-pt-res-canonical layer_3/width_16k/canonical", 16384),
        ("gemma-scope-2b-pt-res layer_3/width_65k/average_l0_72", 65536),
        ("gemma-scope-2-270m-it-res-all layer_0_width_262k_l0_big", 262144),
        ("gemma-scope-2b-pt-res layer_12/width_1m/average_l0_107", 1 << 20),
        ("llama_scope_lxr_8x l3r_8x", 8 * 4096),
        ("qwen-scope-3.5-27b-w80k-l50 layer0", 81920),
        ("gpt2-small-resid-post-v5-32k blocks.0.hook_resid_post", 32768),
        ("gpt2-small-res-jb blocks.8.hook_resid_pre", None),
    ],
)
def test_widths_in_names(name, width):
    assert width_in_name(name, d_in=4096) == width


# -- the command ------------------------------------------------------------------------------------


def value(output: str, row: str) -> list[str]:
    """Cells of a row of the table."""
    match = re.search(rf"^  {re.escape(row)}  +(.*)$", output, re.M)
    assert match, output
    return re.split("  +", match[1])


def test_plan_command(models, fit, capsys, monkeypatch):
    def no_weights(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("safetensors.safe_open", no_weights)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", no_weights)
    # What the config names for another machine is no matter here.
    elsewhere = ["--trainer.accelerator=gpu", "--trainer.devices=8", "--trainer.strategy=ddp"]
    options = ["--gpu", "h100", "A100", "--gpus", "1", "2", "--utilisation=0.5", "--caption_tokens=8"]
    fit(*elsewhere, *options, command="plan", probe=True)
    output = capsys.readouterr().out
    assert value(output, "memory per GPU") == ["1 x H100", "2 x H100", "1 x A100", "2 x A100"]
    assert value(output, "adapter, trainable") == ["800"]
    assert value(output, "SAEs, frozen") == ["2 x 64 latents"]
    assert value(output, "with 10% to spare") == ["fits"] * 4
    assert "4 image + 8 caption" in output
    assert value(output, "training, 48 images") == ["under 0.1 s"] * 4
    # float32: the tensor cores' bf16 peak is out of reach.
    total = float(value(output, "training, all of it")[0].split()[0]) * 1e6
    rates = [float(cell.replace(",", "")) for cell in value(output, "images/s")]
    assert rates[0] == pytest.approx(67e12 * 0.5 / total, rel=0.01)
    assert rates[1:] == pytest.approx(
        [2 * rates[0], rates[0] * 19.5 / 67, 2 * rates[0] * 19.5 / 67], rel=0.01
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "H1000"], "--gpu H1000: known are H200, H100"),
        (["--gpus", "3"], "--gpus 3: data.batch_size=4 must divide"),
        (["--utilisation=40"], "utilisation: 40.0 is given, allowed is any number above 0 up to 1."),
        (["--caption_tokens=65"], "allowed are 1 to model.max_caption_tokens=64"),
        (["--trainer.precision=64-true"], "trainer.precision='64-true'"),
        (
            [
                "--probe.sae_release=suite:smollm2-135m-instruct",
                "--probe.sae_id=blocks.{layer}.hook_resid_post",
            ],
            "does not fit",
        ),
    ],
)
def test_plan_says_what_is_wrong(fit, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit("--gpus=1", *flags, command="plan", probe=True)


def test_a_model_that_is_not_here(fit, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hf download google/gemma-2-2b-it"):
        fit("--model.llm=google/gemma-2-2b-it", "--gpus=1", command="plan")


def test_unsharded_and_sharded_llm(models):
    """With `shard_llm` a GPU holds its share of the layers, and two of them whole."""
    from types import SimpleNamespace

    from lightning_limber.tools.plan import _memory

    model = Limber(VisionConfig(str(models / "vision")), str(models / "llm"))
    planned = Rehearsal(model, "32-true", 8)
    step, probe = planned.step(1), SimpleNamespace(config=SimpleNamespace(metrics=[]), num_images=0)
    whole = _memory(planned, step, 2, [], probe)["LLM"]
    model.hparams["shard_llm"] = True
    layers = sum(p.nbytes for p in model.llm.layers.parameters())
    assert _memory(planned, step, 1, [], probe)["LLM"] == whole
    assert _memory(planned, step, 2, [], probe)["LLM"] == pytest.approx(whole - layers / 2 + 2 * layers / 3)


@pytest.mark.slow
def test_plan_imports_no_sae_lens_for_a_folder(models, tmp_path):
    code = (
        "import sys\nfrom lightning_limber.cli import main\n"
        f"main({['plan', '--gpus=1', *tiny.arguments(models)]!r})\n"
        "assert 'sae_lens' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(models))  # The table, and nothing before it.


def test_plan_of_conversations_and_of_captions_that_share_an_image(models):
    for prompt, captions in (("{conversation}", 1), ("{bos}{image}{caption}{eos}", 3)):
        vision = VisionConfig(str(models / "vision"), image_size=32, pool=2)
        planned = Rehearsal(Limber(vision, str(models / "llm"), prompt=prompt), "32-true", 8, captions)
        alone = Rehearsal(Limber(vision, str(models / "llm")), "32-true", 8)
        assert planned.captions_per_image == captions
        assert planned.step(2).flops["LLM forward"] > alone.step(2).flops["LLM forward"]
        assert planned.step(2).flops["vision forward"] == alone.step(2).flops["vision forward"]


def test_the_penalty_is_counted(fit, models, capsys):
    flags = {"weight": 1, "layers": [0, 2], "sae_release": models / "saes", "sae_id": "layer_{layer}"}
    for kind, said in (("error", True), ("direction", True), ("norm", False)):
        options = [f"--model.regularise.{name}={value}" for name, value in (flags | {"kind": kind}).items()]
        fit(*options, command="plan")
        output = capsys.readouterr().out
        # 4 image tokens, 2 SAEs of 64 latents, D = 32: 8 K D each; and their weights.
        found = [line.split()[-2:] for line in output.splitlines() if "SAEs of the penalty" in line]
        assert len(found) == 2 * said
        if said:
            assert found[0] == ["131.07", "k"]
            assert found[1] == ["33.54", "kB"]
