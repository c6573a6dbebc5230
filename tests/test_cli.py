"""Configs and README are API: every config is parsed by the real entry point, fast and without weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml
from process import REPO, run_cli


@pytest.fixture
def parse(monkeypatch, capsys):
    """The real entry point, in this process, up to the point where it would build anything."""
    from lightning_limber.cli import main

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lightning_limber"])
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out + output.err

    return run


CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))


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


PROBE = """
import resource, sys, time
import torch, lightning.pytorch
start = time.process_time()
from lightning_limber.cli import main
try:
    main({args})
except SystemExit:
    pass
assert "sae_lens" not in sys.modules, "imported what it does not need"
print("CPU", time.process_time() - start)
"""


@pytest.mark.parametrize(
    "args", [["fit", "--help"], ["fit", "--print_config"], ["plan", "--help"], ["--help"]]
)
def test_help_needs_no_weights_and_no_sae_lens(args, tmp_path):
    """Any download or conversion would land in the empty cache."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(args=args)],
        text=True,
        capture_output=True,
        env={**os.environ, "LIGHTNING_LIMBER_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()
    assert "CPU" in done.stdout


def test_options_are_frozen(parse):
    """A renamed or lost option breaks its users: change this list on purpose."""
    _, output = parse("fit", "--help")
    found = set(re.findall(r"--((?:model|data|probe|captions|checkpoint)\.[\w.]+)", output))
    assert found == {
        "model.vision",
        "model.adapter",
        "model.optimizer",
        *(f"model.vision.{name}" for name in "name image_size pad_to_square layer keep_cls pool".split()),
        "model.adapter.help",
        *(f"model.optimizer.{name}" for name in "lr min_lr_ratio warmup_steps total_steps".split()),
        *(f"model.optimizer.{name}" for name in "weight_decay betas".split()),
        *(f"model.{name}" for name in "llm prompt max_caption_tokens adapter_weights".split()),
        *(f"model.{name}" for name in "cache_features held_out_features_gb compile_llm shard_llm".split()),
        *(f"probe.{name}" for name in "sae_release sae_id layers num_images every_n_epochs".split()),
        *(f"probe.{name}" for name in "sanity_check metrics intervention_images outlier_factor".split()),
        *(f"probe.{name}" for name in "text_gate extras costly_images seed".split()),  # three old names
        *(f"probe.{name}" for name in "bootstrap_samples descriptions top_latents knn".split()),
        *(f"probe.{name}" for name in "max_image_share max_text_density lens_top_k".split()),
        *(f"probe.{name}" for name in "detector_auroc published_curves sae_memory_gb".split()),
        *(f"captions.{name}" for name in "num_images num_shown max_new_tokens clip".split()),
        *(f"checkpoint.{name}" for name in "every_n_steps keep_epochs".split()),
        "data.help",
    }


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


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.lr=1", "model.lr"),
        ("--data=Scene", "Scene"),
    ],
)
def test_wrong_options_are_named(flag, message, parse):
    code, output = parse("fit", flag, "--print_config")
    assert code != 0
    assert message in output


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("--model.lr=1", "model.optimizer.lr"),
        ("--prob.num_images=1", "probe.num_images"),
        ("model: {optimiser: {lr: 1.0}}", "model.optimizer.lr"),
        ("trainer: {max_step: 1}", "trainer.max_steps"),
        ("prob: {num_images: 1}", "probe.num_images"),
        ("data: {class_path: CocoCaptions, init_args: {annotation: x, images: y}}", "annotations"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_nearest(given, right, parse, tmp_path):
    (tmp_path / "mine.yaml").write_text(given)
    code, output = parse("fit", given if given.startswith("--") else "--config=mine.yaml", "--print_config")
    assert code != 0
    assert output.count(f"is not known. Did you mean '{right}'?") == 1


def test_errors_are_one_line_without_a_traceback(tmp_path):
    env = {"LIGHTNING_LIMBER_TRACEBACK": ""}
    done = run_cli("fit", "--ckpt_path=last", env=env)
    assert done.returncode == 1
    assert "error: --ckpt_path last: no run in 'runs/default' has saved a checkpoint" in done.stdout
    assert "Traceback" not in done.stdout


def test_no_step_count(fit):
    with pytest.raises(ValueError, match="Set trainer.max_steps"):
        fit("--trainer.max_steps=-1", "--trainer.max_epochs=2")


# -- README -----------------------------------------------------------------------------------------


def readme() -> str:
    return (REPO / "README.md").read_text(encoding="utf-8")


def test_readme_names_files_that_exist():
    tree = re.search(r"```text\n(.*?)```", readme(), re.S)[1]
    for line in tree.splitlines():
        if name := line.split("#")[0].strip():
            assert (REPO / name).exists(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", readme()):
        assert (REPO / link).exists(), link


def test_readme_commands_are_parsed(parse, monkeypatch):
    monkeypatch.chdir(REPO)
    pattern = r"^ *(?:srun )?python -m lightning_limber (fit|validate|test|predict)(.*)$"
    for name, value in {"kind": "pixel_shuffle", "seed": "2"}.items():  # Of the sweeps.
        monkeypatch.setenv(name, value)
    commands = re.findall(pattern, os.path.expandvars(readme()), re.M)
    assert sum("pixel_shuffle-2" in rest for _, rest in commands) == 2
    assert len(commands) > 7
    for subcommand, rest in commands:
        if "--ckpt_path" in rest or "--model.adapter_weights" in rest:
            continue  # Needs a run; tests/test_resume.py does these.
        flags = rest.split("#")[0].split()
        code, output = parse(subcommand, *flags, "--print_config")
        assert code == 0, (subcommand, rest, output)


def test_readme_targets_are_in_the_makefile():
    makefile = (REPO / "Makefile").read_text()
    for target in set(re.findall(r"^make ([\w-]+)", readme(), re.M)):
        assert f"\n{target}:" in makefile
