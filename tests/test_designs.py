"""Designs of image tokens by the real entry point: they train, resume, probe, caption, export and load."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from crash import Crash
from runs import assert_equal, crash_flags, final

from lightning_limber import load
from lightning_limber.data.scenes import SceneSet

ENTRIES = {
    "layer": ["--model.entry.layer=1"],
    "hold": ["--model.entry.layer=1", "--model.entry.norm=fixed", "--model.entry.hold=true"],
    "inject": ["--model.entry.norm=learned", "--model.entry.inject=[0,2]"],
}


@pytest.mark.parametrize("design", ENTRIES)
def test_a_design_resumes_bit_equal(fit, design):
    flags = [*ENTRIES[design], "--model.adapter.dropout=0.3"]
    fit(*flags, *crash_flags("whole"))
    with pytest.raises(Crash):
        fit(*flags, *crash_flags("cut", "batch_start", 6))
    fit("--ckpt_path=runs/default/version_1", *crash_flags("cut"), base=False)
    whole, resumed = (final(Path(f"runs/default/version_{i}")) for i in (0, 1))
    assert any(name.startswith("entry.") for name in whole)
    assert_equal(whole, resumed)


def test_a_design_is_probed_captioned_exported_and_loaded(fit, capsys):
    flags = ["--model.entry.layer=2", "--model.entry.inject=[2]", "--model.entry.norm=learned"]
    metrics = [
        "noise",
        "words_long",
        "words",
        "told",
        "match",
        "neighbours",
        "lens_hit",
        "knn",
        "detectors",
    ]
    metrics += ["linear_probe", "use", "loss_recovered", "cross_layer", "direction"]
    fit(*flags, f"--probe.metrics={json.dumps(metrics)}", "--trainer.max_steps=4", probe=True, figures=True)
    run = Path("runs/default/version_0")
    with (run / "probe.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = {}
    for row in rows:
        if row["layer"]:
            layers.setdefault(row["group"], set()).add(int(float(row["layer"])))
    # SAEs read behind layers 0 and 2; at the entrance of layer 2 image tokens are not behind layer 0 yet.
    images = ("image", "noise", "words_long", "words", "told")
    assert layers == {name: {2} for name in images} | {"text": {0, 2}, "caption": {0, 2}}
    values = {(row["epoch"], row["layer"], row["group"], row["metric"]): row["value"] for row in rows}
    # Below, a caption is what it is without an image, but for its positions: rotary ones are relative.
    below = [float(values["1", "0", group, "l0"]) for group in ("caption", "text")]
    assert below[0] == pytest.approx(below[1], rel=0.05)
    fit("--ckpt_path", run, "--output", "exported", command="export", base=False)
    picture = SceneSet("val", 60, 112, 0)[0].image
    trained, exported = load(run), load("exported")
    assert trained.caption(picture) == exported.caption(picture)
    assert_equal(trained.model.state_dict(), exported.model.state_dict())
    frame = trained.features(picture, layer=2)
    assert set(frame["token"]) <= set(range(4))
    fit(f"--model.adapter_weights={run}", *flags, "--trainer.max_steps=1")
    started = torch.load("runs/default/version_1/checkpoints/last.ckpt", weights_only=True)
    assert started["state_dict"]["entry.calibrated"]


def test_a_layer_that_is_not_there_is_one_line(fit):
    with pytest.raises(ValueError, match="model.entry.layer=7: the LLM has layers 0 to 2"):
        fit("--model.entry.layer=7")
