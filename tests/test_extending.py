"""Parts of a user's own (examples/my_parts.py), plugged in by configuration alone."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from PIL import Image
from process import HELPERS, REPO, run_cli
from runs import assert_equal, crash_flags, final

from lightning_limber import load
from lightning_limber.models.limber import Limber
from lightning_limber.tools.report import main as report
from lightning_limber.utils.checkpoints import read_checkpoint

EXAMPLES = str(REPO / "examples")
ENV = {"PYTHONPATH": os.pathsep.join([HELPERS["PYTHONPATH"], EXAMPLES, str(REPO)])}
NAMED = ["--model.adapter=my_parts.LearnedQueries", "--probe.metrics+=my_parts.StrongLatents"]
OWN = [*NAMED, "--model.adapter.queries=3", "--model.adapter.dropout=0.1"]
RUN = Path("runs/default/version_0")


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    """What a user's file is on the path for; each test imports it anew."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)


@pytest.fixture(scope="module")
def straight(models, tmp_path_factory) -> Path:
    """The uninterrupted run, with a probe: 3 epochs of 4 steps."""
    root = tmp_path_factory.mktemp("straight")
    done = run_cli("fit", *tiny.arguments(models), *OWN, cwd=root, env=ENV)
    assert done.returncode == 0, done.stdout
    assert "LearnedQueries, 4 x 24 -> 3 x 32" in done.stdout
    return root / RUN


@pytest.fixture
def checkpoint(straight) -> Path:
    return straight / "checkpoints/last.ckpt"


def test_the_example_is_short():
    assert len((REPO / "examples/my_parts.py").read_text().splitlines()) <= 60


def test_the_run_stores_plain_values(straight, checkpoint):
    settings = {"queries": 3, "layers": 2, "heads": 4, "input_norm": "none", "dropout": 0.1}
    spec = {"class_path": "my_parts.LearnedQueries", "init_args": settings}
    assert read_checkpoint(checkpoint)["hyper_parameters"]["adapter"] == spec
    assert yaml.safe_load((straight / "config.yaml").read_text())["model"]["adapter"] == spec
    assert (straight / "probe.csv").is_file()
    # Its tokens are no places in the image: nothing to draw a map of.
    assert not list(straight.glob("patches_epoch_*.jpg"))


def test_killed_and_resumed_it_is_the_uninterrupted_run(models, straight, tmp_path):
    flags = [*tiny.arguments(models), *OWN]
    killed = run_cli("fit", *flags, *crash_flags("batches", "batch_start", 6, kill=True), env=ENV)
    assert killed.returncode == -9, killed.stdout
    # Named without its settings: those are the checkpoint's.
    resumed = run_cli("fit", "--ckpt_path=last", *NAMED, *crash_flags("batches"), env=ENV)
    assert resumed.returncode == 0, resumed.stdout
    assert_equal(final(RUN), final(straight))
    assert (RUN / "probe.csv").read_text() == (straight / "probe.csv").read_text()


def test_validate_and_predict(checkpoint, fit, tmp_path):
    cli = fit(f"--ckpt_path={checkpoint}", *NAMED, command="validate", base=False)
    assert cli.trainer.callback_metrics["val/loss"] > 0
    Image.new("RGB", (40, 40), (200, 30, 30)).save("red.png")
    flags = [f"--ckpt_path={checkpoint}", *NAMED, "--images=red.png", "--latents=true"]
    fit(*flags, command="predict", base=False)
    [line] = map(json.loads, Path("captions.jsonl").read_text().splitlines())
    assert line["grid"] is None
    [latent, *_] = line["latents"]["2"]
    assert len(latent["activations"]) == 3
    model = load(checkpoint, "cpu")  # Imported by the command above.
    assert model.caption("red.png") == line["caption"]
    features = model.features("red.png", layer=2)
    assert len(features)
    assert set(features.token) <= {0, 1, 2}
    assert features.row.isna().all()
    assert features.column.isna().all()


def test_export_needs_no_class_and_is_loaded_back(checkpoint, fit, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != EXAMPLES])
    fit(f"--ckpt_path={checkpoint}", "--output=exported", command="export", base=False)
    assert "my_parts" not in sys.modules
    assert "# LearnedQueries adapter from vision to llm" in Path("exported/README.md").read_text()
    with pytest.raises(ValueError, match="--model.adapter my_parts.LearnedQueries"):
        load("exported", "cpu")
    assert "my_parts" not in sys.modules
    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module("my_parts")
    model = load("exported", "cpu").model
    assert_equal(
        {f"adapter.{key}": value for key, value in model.adapter.state_dict().items()},
        final(checkpoint.parents[1]),
    )


def test_plan(models, fit, capsys):
    fit(*OWN, command="plan")
    output = capsys.readouterr().out
    assert "-> LearnedQueries ->" in output
    assert "a sequence: 3 image + " in output


def test_report_names_the_class_and_its_settings(straight):
    report([str(straight), "-o", "out.html"])
    assert (
        "LearnedQueries, queries 3, layers 2, heads 4, input_norm none, dropout 0.1"
        in Path("out.html").read_text()
    )


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("flags", [[], ["--model.adapter=MLP"]], ids=["nothing", "another"])
def test_a_checkpoints_word_imports_nothing(checkpoint, fit, command, flags):
    with pytest.raises(ValueError, match="--model.adapter my_parts.LearnedQueries"):
        fit(f"--ckpt_path={checkpoint}", *flags, command=command, base=False)
    assert "my_parts" not in sys.modules


def test_hyper_parameters_import_nothing(checkpoint):
    with pytest.raises(ValueError, match="--model.adapter my_parts.LearnedQueries"):
        Limber(**read_checkpoint(checkpoint)["hyper_parameters"])
    assert "my_parts" not in sys.modules


def test_a_config_of_ones_own_names_the_class(checkpoint, fit):
    adapter = {"class_path": "my_parts.LearnedQueries", "init_args": {"queries": 3}}
    Path("mine.yaml").write_text(yaml.safe_dump({"model": {"adapter": adapter}}))
    flags = ["--config=mine.yaml", NAMED[1]]
    fit(f"--ckpt_path={checkpoint}", *flags, command="validate", base=False)


def test_a_changed_setting_stops_the_resume(checkpoint, fit):
    with pytest.raises(ValueError, match="queries: 3 in the checkpoint, 5 now"):
        fit(f"--ckpt_path={checkpoint}", *NAMED, "--model.adapter.queries=5", base=False)
