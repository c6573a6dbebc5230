"""Configs are API: every config is parsed by the real entry point, fast and without weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml
from process import REPO, run_cli

CONFIGS = sorted({*(REPO / "configs").rglob("*.yaml")} - {*(REPO / "configs/lab").glob("*")})


def settings(output: str) -> dict:
    """What --print_config printed."""
    return yaml.safe_load(output[output.index("# lightning") :])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_parsed_and_opens_with_its_command(config, parse):
    code, output = parse("fit", "--config", config, "--print_config")
    assert code == 0, output
    command, time, result = config.read_text().split("\n\n")[0].splitlines()
    assert re.match(r"# (srun )?python -m lightning_limber fit\b", command)
    assert command.endswith(str(config.relative_to(REPO))) or config.name in ("default.yaml", "base.yaml")
    assert time.startswith("# Time: ")
    assert result.startswith("# Result: ")


def test_layers_of_configuration(tmp_path, parse):
    (tmp_path / "mine.yaml").write_text("model: {optimizer: {lr: 0.125}}\ntrainer: {max_steps: 9}\n")
    _, output = parse("fit", "--config=mine.yaml", "--trainer.max_steps=77", "--print_config")
    found = settings(output)
    assert found["model"]["optimizer"]["lr"] == 0.125  # The overlay over the default,
    assert found["trainer"]["max_steps"] == 77  # a flag over the overlay,
    assert found["model"]["optimizer"]["total_steps"] == 77  # and it reaches the interpolation.
    assert found["data"]["class_path"] == "lightning_limber.data.Scenes"


def test_a_config_that_names_its_data_is_laid_over_base_alone(tmp_path, parse):
    base, default = (
        yaml.safe_load((REPO / f"configs/{name}.yaml").read_text()) for name in ("base", "default")
    )
    assert base.keys() == {"seed_everything", "trainer", "model", "checkpoint"}
    assert base["model"] == {"optimizer": {"total_steps": "${trainer.max_steps}"}}
    (tmp_path / "mine.yaml").write_text("data: {class_path: ImageFolder, init_args: {root: x}}\n")
    found = settings(parse("fit", "--config=mine.yaml", "--trainer.max_steps=5", "--print_config")[1])
    for name in ("gradient_clip_val", "log_every_n_steps", "max_epochs"):
        assert found["trainer"][name] == base["trainer"][name]
    assert found["trainer"]["logger"]["init_args"]["save_dir"] == "runs"
    for group, name in [("probe", "max_image_share"), ("probe", "num_images"), ("model", "vision")]:
        assert found[group][name] != default[group][name]
    assert found["model"]["vision"]["layer"] == -1
    assert found["model"]["optimizer"]["lr"] == 2e-3


HELP = """
import sys
from lightning_limber.cli import main
for args in (["fit", "--help"], ["fit", "--print_config"], ["plan", "--help"], ["--help"]):
    try:
        main(args)
    except SystemExit as stop:
        assert not stop.code, args
    assert "sae_lens" not in sys.modules, args
"""


def test_help_needs_no_weights_and_no_sae_lens(tmp_path):
    """Any download or conversion would land in the empty cache."""
    env = {**os.environ, "LIGHTNING_LIMBER_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", HELP], text=True, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


def test_options_are_frozen(parse):
    """A renamed or lost option breaks its users: change this list on purpose."""
    _, output = parse("fit", "--help")
    found = set(re.findall(r"--((?:model|data|probe|captions|checkpoint)\.[\w.]+)", output))
    assert found == {
        *(f"model.vision.{name}" for name in "name image_size pad_to_square layer keep_cls pool".split()),
        "model.adapter",
        "model.adapter.help",
        *(f"model.entry.{name}" for name in "layer norm inject hold".split()),
        *(f"model.regularise.{name}" for name in "weight kind layers sae_release sae_id".split()),
        *(f"model.optimizer.{name}" for name in "lr min_lr_ratio warmup_steps total_steps".split()),
        *(f"model.optimizer.{name}" for name in "weight_decay betas".split()),
        *(f"model.{name}" for name in "llm prompt max_caption_tokens adapter_weights".split()),
        *(f"model.{name}" for name in "cache_features held_out_features_gb compile_llm shard_llm".split()),
        *(f"probe.{name}" for name in "sae_release sae_id layers num_images every_n_epochs".split()),
        *(f"probe.{name}" for name in "sanity_check metrics intervention_images outlier_factor".split()),
        *(f"probe.{name}" for name in "seed text_tokens log explorer_images before_training".split()),
        *(f"probe.{name}" for name in "bootstrap_samples descriptions top_latents knn".split()),
        *(f"probe.{name}" for name in "max_image_share max_text_density lens_top_k".split()),
        *(f"probe.{name}" for name in "detector_auroc published_curves sae_memory_gb".split()),
        *(f"captions.{name}" for name in "num_images num_shown max_new_tokens clip".split()),
        *(f"checkpoint.{name}" for name in "every_n_steps keep_epochs".split()),
        "data.help",
        "data.batch_size",  # Named as an example.
    }


def test_old_names_of_options_are_still_taken(parse):
    old = ["--probe.text_gate=warn", "--probe.costly_images=3", "--probe.extras=[noise]"]
    code, output = parse("fit", *old, "--print_config")
    assert code == 0, output


MINE = """
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning_limber.data import CaptionData

class MyData(CaptionData):
    def __init__(self, train_size: int = 3, image_size: int = 5, **kwargs) -> None:
        super().__init__(**kwargs)

class MyLogger(CSVLogger):
    def __init__(self, save_dir: str = "mine", name: str = "mine", version: int = 7) -> None:
        super().__init__(save_dir, name, version)

class One(Callback):
    def __init__(self, shared: int = 1) -> None: ...

class Two(Callback):
    def __init__(self, shared: int = 2) -> None: ...
"""


@pytest.mark.parametrize(
    ("args", "key", "init_args"),
    [
        (["--data=mine.MyData"], "data", {"train_size": 3, "image_size": 5, "batch_size": 16}),
        (["--data=mine.MyData", "--data.train_size=9"], "data", {"train_size": 9, "image_size": 5}),
        # Of the class that is named, wherever the flag stands.
        (
            ["--data.train_size=9", "--data", "mine.MyData", "--seed_everything=1"],
            "data",
            {"train_size": 9},
        ),
        (["--config=mine.yaml"], "data", {"train_size": 3, "image_size": 8}),
        (["--config=mine.yaml", "--data=Scenes"], "data", {"train_size": 3200, "image_size": 112}),
        (
            ["--config=configs/stamps.yaml", "--data=mine.MyData"],
            "data",
            {"batch_size": 16, "image_size": 5},
        ),
        (
            ["--trainer.logger=mine.MyLogger"],
            "trainer.logger",
            {"save_dir": "mine", "name": "mine", "version": 7},
        ),
        (["--config=one.yaml", "--config=two.yaml"], "trainer.callbacks.0", {"shared": 2}),
        (["--config=one.yaml", "--config=other.yaml"], "trainer.callbacks", {"shared": 2}),
        (["--config=other.yaml", "--trainer.callbacks=mine.One"], "trainer.callbacks", {"shared": 1}),
    ],
)
def test_a_class_takes_no_settings_of_the_one_it_replaces(
    args, key, init_args, parse, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine.yaml").write_text(
        "data: {class_path: mine.MyData, init_args: {image_size: 8}}\ntrainer: {max_steps: 4}\n"
    )
    callback = "trainer: {{callbacks: {}}}\n"
    (tmp_path / "one.yaml").write_text(callback.format("[{class_path: mine.One, init_args: {shared: 8}}]"))
    (tmp_path / "two.yaml").write_text(callback.format("[{class_path: mine.Two}]"))
    (tmp_path / "other.yaml").write_text(callback.format("{class_path: mine.Two}"))
    code, output = parse("fit", *args, "--print_config")
    assert code == 0, output
    found = settings(output)
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else found[part]
    assert {name: found["init_args"][name] for name in init_args} == init_args


# Each the arguments, the file that they name with what it holds, and the whole error.
MISTAKES = [
    (["--model.lr=1"], None, "'model.lr' is not known. Did you mean 'model.optimizer.lr'?"),
    (["--prob.num_images", "1"], None, "'prob.num_images' is not known. Did you mean 'probe.num_images'?"),
    (["extra"], None, "unrecognized arguments: extra"),
    (["--model.vision.layer"], None, "argument --model.vision.layer: expected one argument"),
    (["--model.vision.layer=eight"], None, "model.vision.layer: 'eight' is given, wanted is int."),
    (
        ["--probe.sanity_check=wran"],
        None,
        "probe.sanity_check: 'wran' is given, wanted is Literal['stop', 'warn', 'off']. "
        "Did you mean 'warn'?",
    ),
    (
        ["--trainer.limit_val_batches=x"],
        None,
        "trainer.limit_val_batches: 'x' is given, wanted is Union[int, float, null].",
    ),
    (["--data=ImageFodler"], None, "data: there is no class 'ImageFodler'. Did you mean 'ImageFolder'?"),
    (
        ["--data=lightning_limber.data.ImageFodler"],
        None,
        "data: there is no class 'lightning_limber.data.ImageFodler' (module 'lightning_limber.data' has "
        "no attribute 'ImageFodler'). Did you mean 'ImageFolder'?",
    ),
    (
        ["--data=no.such.Class"],
        None,
        "data: there is no class 'no.such.Class' (No module named 'no').",
    ),
    (
        ["--trainer.callbacks=EarlyStoping"],
        None,
        "trainer.callbacks: there is no class 'EarlyStoping'. Did you mean 'EarlyStopping'?",
    ),
    (["--data=ImageFolder", "--data.rot=3"], None, "data: 'rot' is not known. Did you mean 'root'?"),
    (
        ["--config=a.yaml"],
        "model: {optimiser: {lr: 1.0}}",
        "a.yaml: 'model.optimiser.lr' is not known. Did you mean 'model.optimizer.lr'?",
    ),
    (
        ["--config=a.yaml"],
        "trainer: {max_step: 1}",
        "a.yaml: 'trainer.max_step' is not known. Did you mean 'trainer.max_steps'?",
    ),
    (
        ["--config=a.yaml"],
        "prob: {num_images: 1}",
        "a.yaml: 'prob.num_images' is not known. Did you mean 'probe.num_images'?",
    ),
    (
        ["--config=a.yaml"],
        "data: {class_path: CocoCaptions, init_args: {annotation: x, images: y}}",
        "a.yaml: data: 'annotation' is not known. Did you mean 'annotations'?",
    ),
    (
        ["--config=a.yaml"],
        "data: {class_path: ImageFodler, init_args: {root: x}}",
        "a.yaml: data: there is no class 'ImageFodler'. Did you mean 'ImageFolder'?",
    ),
    (
        ["--config=a.yaml"],
        "model: {vision: {layer: eight}}",
        "a.yaml: model.vision.layer: 'eight' is given, wanted is int.",
    ),
    (
        ["--config=a.yaml"],
        "model: {llm: [\n",
        "a.yaml, line 2: no valid YAML: expected the node content, but found '<stream end>'. ",
    ),
    (["--config=a.yaml"], "", "a.yaml is empty. A config is a mapping, such as"),
    (["--config=a.yaml"], "- 1", "a.yaml holds a list. A config is a mapping, such as"),
    (
        ["--config=configs/stamp.yaml"],
        None,
        "--config configs/stamp.yaml: there is no such file. Did you mean 'configs/stamps.yaml'?",
    ),
    (["--config", "b.yaml"], "{}", "--config b.yaml: there is no such file. Did you mean 'a.yaml'?"),
]


@pytest.mark.parametrize(("args", "content", "message"), MISTAKES)
def test_a_mistake_is_answered_in_a_line(args, content, message, parse, tmp_path, monkeypatch):
    """With the file, the nearest name that is right, exit code 2, and no usage."""
    monkeypatch.delenv("LIGHTNING_LIMBER_TRACEBACK")
    if content is not None:
        (tmp_path / "a.yaml").write_text(content)
    code, output = parse("fit", *args, *(["--print_config"] if len(args) > 1 or "=" in args[0] else []))
    assert code == 2
    assert output.startswith(f"error: {message}")
    assert output.count("\n") == 1


def test_what_a_class_must_be_given(parse):
    code, output = parse("plan", "--data=ImageFolder")
    assert (code, output) == (2, "error: data: 'root' must be given.\n")


def test_a_command_that_is_none(parse):
    code, output = parse("fti")
    assert code == 2
    assert output.startswith("error: there is no command 'fti'. Did you mean 'fit'? Commands are 'fit', ")


def test_errors_are_one_line_without_a_traceback(tmp_path):
    env = {"LIGHTNING_LIMBER_TRACEBACK": ""}
    done = run_cli("fit", "--ckpt_path=last", env=env)
    assert done.returncode == 2
    assert "error: --ckpt_path last: no run in 'runs/default' has saved a checkpoint" in done.stdout
    assert "Traceback" not in done.stdout


def test_without_a_command_it_says_what_there_is():
    for args in ([], ["--help"]):
        done = run_cli(*args)
        assert done.returncode == 0
        for command in ("fit", "validate", "test", "predict", "export", "plan", "report"):
            assert re.search(rf"^  {command} +[A-Z].*\.$", done.stdout, re.M)
        assert done.stdout.count("\n") < 20
    script = "import sys; sys.argv[1:] = []\nfrom lightning_limber.__main__ import main\nmain()"
    script += "\nassert not {'torch', 'lightning', 'yaml'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_help_shows_the_projects_own_options_first(parse):
    _, output = parse("fit", "--help")
    before, _, after = output.partition("\ntrainer: ")
    assert before.count("\n") <= 225
    groups = re.findall(r"^(\w[\w.]*): ", before, re.M)
    assert [name for name in groups if "." not in name] == [
        "usage",
        "model",
        "data",
        "probe",
        "captions",
        "checkpoint",
    ]
    assert "--trainer." not in before
    few, _, _ = after.partition("\ntrainer, the rest: ")
    assert {"--trainer.max_steps", "--trainer.devices", "--trainer.logger"} <= set(few.split())
    assert few.count("\n  --trainer.") == 12
    assert not re.findall(r"--(?!trainer)[\w.]+ ", re.sub(r"^      .*", "", after, flags=re.M))
    assert "--model.vision.layer int = -1\n" in before
    assert "Old name" not in output


def test_no_step_count(fit):
    with pytest.raises(ValueError, match="Set trainer.max_steps"):
        fit("--trainer.max_steps=-1", "--trainer.max_epochs=2")
