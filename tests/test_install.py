"""The same run from a bare clone and from an installed wheel: two steps with captions and the probe."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import tiny
from process import REPO

MAIN = """
import sys
sys.path[:0] = {paths}
from lightning_limber.__main__ import main
main()
own = [module for name, module in sys.modules.items() if name.startswith("lightning_limber")]
away = [str(file) for file in (getattr(module, "__file__", None) for module in own) if file]
assert all(file.startswith({root!r}) for file in away), away
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What a clone has, and no more."""
    root = tmp_path_factory.mktemp("clone")
    names = ["lightning_limber", "callbacks", "configs", "pyproject.toml", "README.md", "LICENSE"]
    ignored = shutil.ignore_patterns("__pycache__")
    for name in names:
        copy = shutil.copy if (REPO / name).is_file() else shutil.copytree
        copy(REPO / name, root / name, **({"ignore": ignored} if copy is shutil.copytree else {}))
    return root


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    build, out = tmp_path_factory.mktemp("build") / "source", tmp_path_factory.mktemp("wheel")
    shutil.copytree(source, build)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(build)], check=True)
    shutil.rmtree(build)
    [path] = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True)
    return target


NOT_INSTALLED = """
from importlib import metadata
def version(name, known=metadata.version):
    if name == "lightning-limber":
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
"""


def two_steps(models: Path) -> list[str]:
    return [
        "fit",
        *tiny.arguments(models),
        "--trainer.max_steps=2",
        "--data.train_size=8",
        "--probe.num_images=4",
        "--probe.text_gate=warn",  # Reads the package's text.
    ]


def run(command: list[str], folder: Path, path: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def check(folder: Path) -> None:
    log = folder / "runs/default/version_0"
    table = pd.read_csv(log / "probe.csv")
    assert {"fvu", "lens_hit", "loss_recovered"} <= set(table.metric)
    assert sorted(table.epoch.unique()) == [0, 1]
    assert (log / "captions.csv").is_file()
    assert (log / "checkpoints/epoch_1.ckpt").is_file()


def test_a_bare_clone_runs_two_steps_with_the_probe(source, models):
    before = set(source.rglob("*"))
    code = NOT_INSTALLED + MAIN.format(paths=[str(source)], root=str(source))
    run(["-c", code, *two_steps(models)], source)
    check(source)
    assert {file.relative_to(source).parts[0] for file in set(source.rglob("*")) - before} == {"runs"}
    shutil.rmtree(source / "runs")


def test_an_installed_wheel_runs_two_steps_with_the_probe(installed, models, tmp_path):
    code = MAIN.format(paths=[str(installed)], root=str(installed))
    run(["-c", code, *two_steps(models)], tmp_path)
    check(tmp_path)


def test_the_wheel_holds_every_asset_and_config(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(REPO) for path in (REPO / "lightning_limber/assets").rglob("*")}
    expected |= {"lightning_limber" / path.relative_to(REPO) for path in (REPO / "configs").rglob("*")}
    expected |= {"lightning_limber" / path.relative_to(REPO) for path in (REPO / "callbacks").glob("*.py")}
    expected |= {path.relative_to(REPO) for path in (REPO / "lightning_limber").rglob("*.py")}
    files = {path.as_posix() for path in expected if path.suffix and "__pycache__" not in path.parts}
    files = {name for name in files if not name.endswith((".pyc", "_resid_post"))}
    assert len(files) > 100
    assert files <= held, sorted(files - held)
    extra = {name for name in held - files if ".dist-info/" not in name}
    assert not extra


def test_the_console_script_is_the_command_line(installed, tmp_path):
    script = installed / "bin/lightning-limber"
    assert "lightning_limber.data.ImageFolder" in run(
        [str(script), "fit", "--config=configs/stamps.yaml", "--print_config"],
        tmp_path,
        path=str(installed),
    )
    help_text = run([str(script), "report", "--help"], tmp_path, path=str(installed))
    assert "RUN [RUN ...]" in help_text
