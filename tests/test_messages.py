"""What a user can get wrong is answered in a line or two with the file and the remedy, and no traceback."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch

from lightning_limber.__main__ import main as entry_point
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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

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
    (["--model.adapter_weights=none"], "No file at 'none'. Give a checkpoint or projector file"),
    (["--model.adapter_weights=folder"], "model.adapter_weights=folder: the folder holds no adapter.safet"),
    (["--model.adapter_weights=other.pt"], "model.adapter_weights=other.pt: the adapter there is "),
    (["--captions.clip=folder"], "'folder' cannot be loaded: "),
    (["--model.vision.layer=99"], "vision.layer=99: "),
    (["--probe.sae_id=layer_{layer}_x"], "probe.sae_id='layer_{layer}_x' of "),
    (["--probe.layers=[7]", "--probe.sae_id=layer_{layer}"], "probe.sae_id='layer_{layer}' of "),
    (["--probe.metrics=[nomodule.Metric]"], "probe.metrics: cannot import 'nomodule.Metric': "),
    (
        ["--probe.sae_memory_gb=1e-9", "--probe.sae_id=layer_{layer}"],
        "probe.sae_memory_gb=1e-09: the SAE at ",
    ),
    (["--probe.sae_release=nothing"], "probe.sae_release='nothing' is no SAELens release and no folder. "),
    (
        ["--probe.descriptions=none/{layer}"],
        "probe.descriptions: cannot read none/0: none/0 holds no .jsonl",
    ),
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
    torch.save({"project.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    torch.save({"lightning_limber": {"version": "9"}, "state_dict": {}}, tmp_path / "part.ckpt")
    found = error(*args, probe="probe." in args[0])
    assert found.removeprefix(f"{tmp_path}/").startswith(message)


# Each a command and the beginning of the error; nothing is loaded.
COMMANDS = [
    ("ftt", "there is no command 'ftt'. Did you mean 'fit'? Commands are "),
    ("fit extra", "unrecognized arguments: extra"),
    ("fit --modle.llm=x", "'modle.llm' is not known. Did you mean 'model.llm'?"),
    ("fit --model.lr=1", "'model.lr' is not known. Did you mean 'model.optimizer.lr'?"),
    ("fit --data.batch_sise=3", "data: 'batch_sise' is not known. Did you mean 'batch_size'?"),
    ("fit --data=ImageFodler", "data: there is no class 'ImageFodler'. Did you mean 'ImageFolder'? "),
    ("fit --data=ImageFolder", "data: 'root' must be given."),
    ("fit --data=Shards --data.shard=a", "data: 'shard"),
    (
        "fit --model.adapter=mine.Own",
        "model.adapter: there is no class 'mine.Own' (No module named 'mine'). A ",
    ),
    (
        "fit --trainer.callbacks=EarlyStop",
        "trainer.callbacks: there is no class 'EarlyStop'. Did you mean 'E",
    ),
    ("fit --trainer.logger=NoLogger", "trainer.logger: there is no class 'NoLogger'. "),
    ("fit --trainer.max_steps=many", "trainer.max_steps: 'many' is given, wanted is int."),
    (
        "fit --trainer.devices=many",
        "trainer.devices: 'many' is given, allowed is auto, a number, or a list ",
    ),
    ("fit --trainer.precision=fp8", "trainer.precision: 'fp8' is given, wanted is "),
    ("fit --trainer.strategy=nothing", "You selected an invalid strategy name: `strategy='nothing'`. "),
    (
        "fit --trainer.accelerator=gpus",
        "You selected an invalid accelerator name: `accelerator='gpus'`. Ava",
    ),
    ("fit --trainer.max_time=soon", "`Timer(duration='soon')` is not a valid duration. Expected "),
    (
        "fit --trainer.profiler=none",
        "When passing string value for the `profiler` parameter of `Trainer`, it ",
    ),
    (
        "fit --data.batch_size=1.5",
        "data: lightning_limber.data.Scenes: batch_size: '1.5' is given, wanted is ",
    ),
    ("fit --model.optimizer.lr=fast", "model.optimizer.lr: 'fast' is given, wanted is float."),
    (
        "fit --model.optimizer.betas=[0.9]",
        "model.optimizer.betas: '[0.9]' is given, wanted is tuple with 2 ",
    ),
    ("fit --seed_everything=abc", "seed_everything: 'abc' is given, wanted is "),
    ("fit --checkpoint.keep_epochs=maybe", "checkpoint.keep_epochs: 'maybe' is given, wanted is bool."),
    ("fit --probe.sanity_check=maybe", "probe.sanity_check: 'maybe' is given, wanted is Literal['stop', "),
    ("fit --model.vision.pool", "argument --model.vision.pool: expected one argument"),
    (
        "fit --config=configs/stamp.yaml",
        "--config configs/stamp.yaml: there is no such file. Did you mean 'configs/stamps.yaml'?",
    ),
    ("fit --config=empty.yaml", "empty.yaml is empty. A config is a mapping, such as "),
    ("fit --config=list.yaml", "list.yaml holds a list. A config is a mapping, such as "),
    ("fit --config=broken.yaml", "broken.yaml, line 2: no valid YAML: "),
    (
        "fit --config=unknown.yaml",
        "unknown.yaml: 'model.lr' is not known. Did you mean 'model.optimizer.lr'?",
    ),
    (
        "fit --config=types.yaml",
        "types.yaml: data: lightning_limber.data.Scenes: batch_size: 'many' is given",
    ),
    ("fit --config=text.yaml", "text.yaml: model: 'gpt2' is given, wanted is a mapping"),
    (
        "validate --ckpt_path=foreign.ckpt",
        "'foreign.ckpt' was not written by lightning_limber (keys: ['a']).",
    ),
    ("test --ckpt_path=empty.ckpt", "'empty.ckpt' is damaged (0 bytes, "),
    (
        "predict --ckpt_path=none.ckpt",
        "No checkpoint at 'none.ckpt'. Give an existing .ckpt file, or 'last'.",
    ),
    ("predict --num_beams=many", "num_beams: 'many' is given, wanted is int."),
    ("predict --images=nowhere", "--images: there is no 'nowhere'. Give images or folders."),
    ("predict --images=folder", "--images: no image in 'folder' or below. Known: "),
    ("export", "--ckpt_path last: no run in 'runs/default' has saved a checkpoint yet. "),
    ("export --ckpt_path=folder", "--ckpt_path folder: no run in 'folder' has saved a checkpoint yet. "),
    ("export --outptu=x", "'outptu' is not known. Did you mean 'output'?"),
    ("plan --gpu B100", "--gpu B100: known are H200, "),
    ("plan --gpus many", "gpus: 'many' is given, wanted is int."),
    ("plan --model.llm=folder --model.vision.name=folder", "'folder' cannot be loaded: "),
    ("report", "the following arguments are required: RUN. See "),
    ("report nowhere", "'nowhere' has no probe.csv: give the folder of a run whose SAE probe has run, "),
    ("report --nothing folder", "unrecognized arguments: --nothing. See "),
    ("report folder -o", "argument -o/--out: expected one argument. See "),
]


@pytest.fixture
def files(tmp_path) -> None:
    """What the commands below name."""
    (tmp_path / "folder").mkdir()
    texts = {
        "empty.yaml": "",
        "list.yaml": "- 1",
        "broken.yaml": "model:\n  llm: [a",
        "unknown.yaml": "model: {optimizer: {lr: 1}, lr: 3}",
        "types.yaml": "data: {init_args: {batch_size: many}}",
        "text.yaml": "model: gpt2",
        "empty.ckpt": "",
        "table.csv": "a,b\n1,2\n",
        "table.xlsx": "",
        "none.json": "{}",
        "cut.json": '{"a": [',
        "list.json": "[1, 2]",
        "a.tar": "",
        "b.tar": "",
        "pictures/1.png": "no picture",
        "pictures/1.txt": "a cat",
    }
    (tmp_path / "pictures").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "utf16.csv").write_text("image,caption\n1.png,a\n", encoding="utf-16")
    torch.save({"a": 1}, tmp_path / "foreign.ckpt")


@pytest.mark.parametrize(("command", "message"), COMMANDS, ids=lambda text: str(text)[:40])
def test_a_wrong_command(command, message, files, monkeypatch, capsys):
    monkeypatch.delenv("LIGHTNING_LIMBER_TRACEBACK")
    monkeypatch.setattr(sys, "argv", ["lightning_limber", *command.split()])
    with pytest.raises(SystemExit) as stop:
        entry_point()
    output = capsys.readouterr().err
    found = output.rpartition("error: ")[2]
    assert stop.value.code == 2
    assert found.startswith(message)
    assert found.count("\n") == 1
    assert not re.search("Traceback|usage:", output)


COCO = "--data=CocoCaptions --data.images=. --data.annotations="
LLAVA = "--data=LLaVAConversations --data.images=. --data.annotations="
DATA = [
    (
        "--data=ImageFolder --data.root=nowhere",
        "data.root: there is no 'nowhere'. Give a folder or a table ",
    ),
    ("--data=ImageFolder --data.root=folder", "data.root: no image in 'folder'. Known: "),
    (
        "--data=ImageFolder --data.root=table.csv",
        "data.root: the first line of 'table.csv' must name the col",
    ),
    (
        "--data=ImageFolder --data.root=table.xlsx",
        "data.root: 'table.xlsx' is neither. Give a folder or a ",
    ),
    ("--data=ImageFolder --data.root=utf16.csv", "data.root: 'utf16.csv' is in UTF-16; save it as UTF-8."),
    (
        "--data=ImageFolder --data.root=pictures --data.exclude=(",
        "data.exclude='(' is no regular expression: ",
    ),
    (COCO + "nowhere.json", "data.annotations: there is no file 'nowhere.json'."),
    (COCO + "foreign.ckpt", "data.annotations: 'foreign.ckpt' is no JSON in UTF-8, or it is cut: "),
    (COCO + "cut.json", "data.annotations: 'cut.json' is no JSON in UTF-8, or it is cut: "),
    (COCO + "none.json", "data.annotations: "),
    (COCO + "list.json", "data.annotations: "),
    (LLAVA + "none.json", "data.annotations: "),
    ("--data=Shards --data.shards=nowhere.tar", "data.shards=nowhere.tar: 1 of 1 files do not exist, the "),
    ("--data=Shards --data.shards={a,b}.tar", "data.shards: "),
    ("--data=Shards --data.shards=a.tar", "data.val_shards=1 of 1 shards: at least one must be held out "),
]


def own_data(models: Path) -> list[str]:
    """The tiny run's flags without those of its scenes."""
    return [flag for flag in tiny.arguments(models, probe=False) if not re.search("(train|val)_size", flag)]


@pytest.mark.parametrize(("args", "message"), DATA, ids=lambda text: str(text)[:60])
def test_wrong_data(args, message, files, error, models):
    found = error(*own_data(models), *args.split(), base=False)
    assert found.startswith(message)


def test_a_folder_of_broken_pictures_lists_them(files, error, fit, models, monkeypatch):
    """Its error is as long as the list."""
    monkeypatch.setenv("LIGHTNING_LIMBER_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"^1 of 1 records in 'pictures' are bad:\n  1.png: "):
        fit(*own_data(models), "--data=ImageFolder", "--data.root=pictures", base=False)


def test_what_may_not_be_read(files, error, monkeypatch):
    """As root no file refuses: the system's answer is put in."""

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    found = error("--config=types.yaml")
    assert (
        found
        == "types.yaml: Permission denied. Choose a place that you may use, or change its permissions.\n"
    )


def test_no_network_is_one_line(error, monkeypatch, capsys, caplog):
    """Whatever is tried again is not said."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    def refuse(*args, **kwargs):
        raise httpx2.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(_http.get_session(), "request", refuse)
    monkeypatch.setattr(_http.get_session(), "stream", refuse)
    assert error("--model.llm=nobody/nothing").startswith(
        "'nobody/nothing' is no folder, not in the hub's "
    )
    assert "Retrying" not in caplog.text + capsys.readouterr().err


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
