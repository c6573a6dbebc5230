"""What a user can get wrong is answered in a line or two with the file and the remedy, and no traceback."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from lightning_limber.models.generation import Decoding, generate
from lightning_limber.models.llm import LLM
from lightning_limber.utils.checkpoints import newest_checkpoint, read_checkpoint


def cut(path: Path, size: int = 40) -> None:
    path.write_bytes(path.read_bytes()[:size])


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# Each what is done to a copy of a model, and the error.
MODELS = [
    ("llm", lambda at: cut(at / "config.json"), "cannot be loaded: OSError: It looks like the config file"),
    ("llm", lambda at: cut(at / "model.safetensors"), "cannot be loaded: SafetensorError: "),
    ("llm", lambda at: (at / "model.safetensors").unlink(), "Error no file named model.safetensors"),
    ("llm", lambda at: (at / "config.json").unlink(), "cannot be loaded: "),
    ("llm", lambda at: cut(at / "tokenizer.json"), "cannot be loaded: JSONDecodeError"),
    ("llm", lambda at: replace(at / "config.json", '"llama"', '"nothing"'), "has model type `nothing`"),
    (
        "llm",
        lambda at: replace(at / "config.json", '"hidden_size": 32', '"hidden_size": 64'),
        "other sizes",
    ),
    ("vision", lambda at: cut(at / "model.safetensors"), "cannot be loaded: SafetensorError: "),
    ("vision", lambda at: cut(at / "config.json"), "is not a valid JSON file"),
    ("vision", lambda at: cut(at / "preprocessor_config.json"), "is not a valid JSON file"),
    ("vision", lambda at: (at / "preprocessor_config.json").unlink(), "has no preprocessor_config.json, "),
    ("saes", lambda at: cut(at / "layer_0/cfg.json"), "layer_0' cannot be read (JSONDecodeError"),
    ("saes", lambda at: cut(at / "layer_0/sae_weights.safetensors"), "cannot be read (SafetensorError"),
    ("saes", lambda at: (at / "layer_0/sae_weights.safetensors").unlink(), "cannot be read (FileNotFound"),
    (
        "saes",
        lambda at: replace(at / "layer_0/cfg.json", '"d_in": 32', '"d_in": 16'),
        "cannot be read (Run",
    ),
    (
        "saes",
        lambda at: replace(at / "layer_0/cfg.json", '"standard"', '"foo"'),
        "cannot be read (KeyError",
    ),
    (
        "saes",
        lambda at: replace(at / "layer_0/cfg.json", '"hook_name"', '"no"'),
        "has no metadata.hook_name",
    ),
    ("saes", lambda at: shutil.rmtree(at / "layer_0") or shutil.rmtree(at / "layer_2"), "holds no SAEs"),
]
FLAGS = {"llm": "model.llm", "vision": "model.vision.name", "saes": "probe.sae_release"}


@pytest.fixture
def error(fit, monkeypatch, capsys):
    """Runs the CLI on the tiny models; what it prints after "error: ", and nothing that is a traceback."""
    monkeypatch.delenv("LIGHTNING_LIMBER_TRACEBACK")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*args: str, code: int = 2, **kwargs) -> str:
        with pytest.raises(SystemExit) as stop:
            fit(*args, **kwargs)
        assert stop.value.code == code
        found = capsys.readouterr().err.rpartition("error: ")[2]
        assert 1 <= found.count("\n") <= 2
        return found

    return run


@pytest.mark.parametrize(("kind", "damage", "message"), MODELS)
def test_a_damaged_model(kind, damage, message, error, models, tmp_path):
    shutil.copytree(models / kind, tmp_path / "copy")
    damage(tmp_path / "copy")
    found = error(f"--{FLAGS[kind]}={tmp_path / 'copy'}", probe=kind == "saes")
    assert message in found
    assert str(tmp_path / "copy") in found


# Each arguments and the beginning of the error.
MISTAKES = [
    (["--config=folder"], "--config folder: this is a folder. "),
    (["--config=binary"], "binary: no config, but a file that is not text"),
    (["--probe.metrics=[wrods]"], "probe.metrics: 'wrods' is none of "),
    (["--model.adapter=Liner"], "model.adapter is Liner: it must be Linear, MLP, "),
    (["--probe.descriptions=x/{foo}"], "probe.descriptions='x/{foo}': {layer} and {hook} are known"),
    (["--probe.sae_id=layer"], "probe.sae_id='layer' needs {layer} in it."),
    (["--probe.sae_release=shipped:none"], "probe.sae_release: 'shipped:none' does not ship. Known: "),
    (["--probe.sae_release=./none"], "probe.sae_release: there is no folder './none'."),
    (["--ckpt_path="], "--ckpt_path .: no run in '.' has saved a checkpoint yet."),
    (["--ckpt_path=folder"], "--ckpt_path folder: no run in 'folder' has saved a checkpoint yet."),
    (["--ckpt_path=none.ckpt"], "No checkpoint at 'none.ckpt'."),
    (["--ckpt_path=empty.ckpt"], "'empty.ckpt' is damaged (0 bytes, "),
    (["--ckpt_path=pickle.ckpt"], "'pickle.ckpt' is damaged "),
    (["--ckpt_path=foreign.ckpt"], "'foreign.ckpt' was not written by lightning_limber (keys: ['a'])."),
    (["--ckpt_path=part.ckpt"], "'part.ckpt' has no hyper_parameters, loops, global_step, backbones, "),
    (["--model.adapter_weights=binary"], "model.adapter_weights=binary is no file of weights, or damaged"),
    (["--model.adapter_weights=bad.safetensors"], "model.adapter_weights=bad.safetensors is no file of w"),
    (["--model.llm=folder"], "'folder' cannot be loaded: "),
    (["--model.llm=nobody/nothing"], "'nobody/nothing' is no folder, not in the hub's cache, "),
    (["--model.llm=wheel:nothing"], "'wheel:nothing' is not known. Allowed: "),
    (["--model.vision.pool=3"], "vision.pool=3 does not divide "),
    (["--trainer.logger.save_dir=binary"], "binary"),
    (["--trainer.enable_checkpointing=false"], "trainer.enable_checkpointing: False is given, allowed is "),
    (["--trainer.precision=bf16-true"], "trainer.precision: 'bf16-true' is given, allowed is 32-true, "),
    (["--trainer.precision=16-true"], "trainer.precision: '16-true' is given, allowed is 32-true, "),
    (["--trainer.accelerator=tpu"], "trainer.accelerator=tpu is not to be had on this machine"),
    (["--trainer.callbacks=WeightAveraging"], "trainer.callbacks: WeightAveraging copies the whole module"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=lambda text: str(text)[:40])
def test_a_mistake(args, message, error, models, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\x80\xff\x00")
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\xff\x00")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": 1}, tmp_path / "foreign.ckpt")
    torch.save({"lightning_limber": {"version": "9"}, "state_dict": {}}, tmp_path / "part.ckpt")
    found = error(*args, probe="sae_" in args[0])
    assert found.removeprefix(f"{tmp_path}/").startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_no_gpu(name, error):
    found = error(f"--trainer.accelerator={name}")
    assert found.startswith(f"trainer.accelerator={name} is not to be had on this machine")


def test_a_checkpoint_is_found_by_its_folder_and_by_links(fit, tmp_path, capsys):
    fit("--trainer.max_steps=1", "--captions.num_images=0")
    run = Path("runs/default/version_0")
    assert newest_checkpoint(run / "checkpoints") == run / "checkpoints/last.ckpt"
    os.symlink(run / "checkpoints/last.ckpt", "link.ckpt")
    fit("--ckpt_path=link.ckpt", "--trainer.max_steps=2", "--captions.num_images=0")
    assert read_checkpoint(run / "checkpoints/last.ckpt")["global_step"] == 2
    assert not Path("runs/default/version_1").exists()


def test_a_multimodal_checkpoint_gives_its_text_model(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = Gemma3Config(
        text_config=tiny.llm_configs()["gemma3"].to_dict(),
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=5,
    )
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    llm = LLM(str(tmp_path)).load()
    assert type(llm.model).__name__ == "Gemma3ForCausalLM"
    ids = torch.arange(6, 12)[None]
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits[0]
    torch.testing.assert_close(llm.logits(llm.decode(llm.embed(ids))[0]), wanted, rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in llm.named_parameters() if "vision" in name]
    [caption] = generate(llm, llm.embed(ids), [2], Decoding(max_new_tokens=4))
    assert caption.tokens >= 1
    assert type(LLM(str(tmp_path)).load(weights=False).model) is type(llm.model)


def test_what_an_architecture_cannot_do_is_said_at_loading(models, monkeypatch):
    from transformers import LlamaForCausalLM

    def fail(*args, **kwargs):
        raise KeyError("cache")

    monkeypatch.setattr(LlamaForCausalLM, "generate", fail)
    with pytest.raises(ValueError, match=r"\(LlamaForCausalLM\) is not supported, because 'cache'"):
        LLM(str(models / "llm")).load()
