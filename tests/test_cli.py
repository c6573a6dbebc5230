"""Configs and README are API: every config is parsed by the real entry point, fast and without weights."""

from __future__ import annotations

import os
import re
import shutil
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


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_parsed_and_opens_with_its_command(config, parse):
    code, output = parse("fit", "--config", config, "--print_config")
    assert code == 0, output
    head = config.read_text().split("\n\n")[0]
    assert head.startswith("# ")
    assert "python -m lightning_limber fit" in head


def test_layers_of_configuration(tmp_path, parse):
    (tmp_path / "mine.yaml").write_text("model: {optimizer: {lr: 0.125}}\ntrainer: {max_steps: 9}\n")
    _, output = parse("fit", "--config=mine.yaml", "--trainer.max_steps=77", "--print_config")
    settings = yaml.safe_load(output[output.index("# lightning") :])
    assert settings["model"]["optimizer"]["lr"] == 0.125  # The overlay over the default,
    assert settings["trainer"]["max_steps"] == 77  # a flag over the overlay,
    assert settings["model"]["optimizer"]["total_steps"] == 77  # and it reaches the interpolation.
    assert settings["data"]["class_path"] == "lightning_limber.data.Scenes"


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
        *(f"model.adapter.{name}" for name in "kind input_norm dropout shuffle".split()),
        *(f"model.optimizer.{name}" for name in "lr min_lr_ratio warmup_steps total_steps".split()),
        *(f"model.optimizer.{name}" for name in "weight_decay betas".split()),
        *(f"model.{name}" for name in "llm prompt max_caption_tokens adapter_weights".split()),
        *(f"model.{name}" for name in "cache_features compile_llm shard_llm".split()),
        *(f"probe.{name}" for name in "sae_release sae_id layers num_images every_n_epochs".split()),
        *(f"probe.{name}" for name in "text_gate extras costly_images outlier_factor seed".split()),
        *(f"probe.{name}" for name in "bootstrap_samples descriptions top_latents knn".split()),
        *(f"probe.{name}" for name in "max_image_share max_text_density lens_top_k".split()),
        *(f"probe.{name}" for name in "detector_auroc published_curves sae_memory_gb".split()),
        *(f"captions.{name}" for name in "num_images num_shown max_new_tokens clip".split()),
        *(f"checkpoint.{name}" for name in "every_n_steps keep_epochs".split()),
        "data.help",
    }


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--model.adapter.kind=conv", "conv"),
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


def test_runs_from_a_wheel_in_any_folder(models, tmp_path):
    """What is installed is complete: code, callbacks, configs, SAEs."""
    target = tmp_path / "site"
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "build")
    shutil.copytree(REPO, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    shutil.rmtree(source)
    (tmp_path / "empty").mkdir()
    code = (
        "import lightning_limber.callbacks as c, lightning_limber.probe.saes as s\n"
        "import lightning_limber.cli as m\n"
        f"assert c.__file__.startswith({str(target)!r}), c.__file__\n"
        "assert s.release_folder('shipped:smollm2-135m-instruct').is_dir()\n"
        f"assert str(m.config_dir()).startswith({str(target)!r})\n"
        "m.main(['fit', '--config', 'configs/stamps.yaml', '--data.root=x', '--print_config'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "lightning_limber.data.ImageFolder" in done.stdout


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
