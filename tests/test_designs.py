"""Designs of image tokens by the real entry point: they train, resume, probe, caption, export and load."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import tiny
import torch
from crash import Crash
from process import HELPERS, run_cli
from runs import assert_equal, crash_flags, final

from lightning_limber import load
from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.adapters import Vocabulary

DESIGNS = {
    "resampler": ["--model.adapter=Resampler", "--model.adapter.queries=3"],
    "vocabulary": ["--model.adapter=Vocabulary", "--model.adapter.perplexity=10"],
    "whole words": [
        *("--model.adapter=Vocabulary", "--model.adapter.perplexity=10"),
        *("--model.adapter.words=whole", "--model.entry.norm=fixed"),
    ],
    "layer": ["--model.entry.layer=1"],
    "hold": ["--model.entry.layer=1", "--model.entry.norm=fixed", "--model.entry.hold=true"],
    "inject": ["--model.entry.norm=learned", "--model.entry.inject=[0,2]"],
    "moments": ["--model.entry.norm=moments", "--model.entry.layer=2", "--model.entry.inject=[2]"],
}


@pytest.mark.parametrize("design", DESIGNS)
def test_a_design_resumes_bit_equal_and_is_exported_and_loaded(fit, design):
    flags = [*DESIGNS[design], "--model.adapter.dropout=0.3"]
    if "--model.adapter=Resampler" not in flags:
        flags.append("--model.adapter.input_norm=channel")
    cli = fit(*flags, *crash_flags("whole"))
    with pytest.raises(Crash):
        fit(*flags, *crash_flags("cut", "batch_start", 6))
    early = final(Path("runs/default/version_1"))
    fit("--ckpt_path=runs/default/version_1", *crash_flags("cut"), base=False)
    whole, resumed = (final(Path(f"runs/default/version_{i}")) for i in (0, 1))
    assert_equal(whole, resumed)
    changed = {name for name in whole if not torch.equal(early[name], whole[name])}
    trained = {name for name, parameter in cli.model.named_parameters() if parameter.requires_grad}
    assert trained <= changed
    assert not [name for name in whole if "llm" in name or "word_ids" in name]
    assert ("entry.norm.moments.running" in changed) == (design == "moments")
    fit("--ckpt_path=runs/default/version_0", "--output=exported", command="export", base=False)
    loaded = load("exported", "cpu").model
    assert_equal(loaded.state_dict(), whole)
    features = torch.randn(2, 4, 24)
    with torch.no_grad():
        ours, theirs = (model.eval().made_of(features) for model in (cli.model, loaded))
    torch.testing.assert_close(ours.tokens, theirs.tokens)
    if isinstance(loaded.adapter, Vocabulary):
        [[(word, weight), *_], *_] = loaded.adapter.words(features)[0]
        assert word in loaded.llm.tokenizer.get_vocab()
        assert 0 < weight < 1


@pytest.mark.slow
@pytest.mark.parametrize("design", ["layer", "whole words", "inject", "moments"])
def test_two_processes_and_a_sharded_llm_make_the_same_run(design, models, tmp_path):
    flags = [*tiny.arguments(models, probe=False), *DESIGNS[design], *crash_flags("batches")]
    flags += ["--trainer.max_steps=4", "--model.adapter.input_norm=channel"]
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    found = {}
    for run, more in {"one": [], "ddp": ddp, "sharded": [*ddp, "--model.shard_llm=true"]}.items():
        (tmp_path / run).mkdir()
        processes = 2 if more else 1
        done = run_cli("fit", *flags, *more, cwd=tmp_path / run, env=HELPERS, processes=processes)
        assert done.returncode == 0, done.stdout
        found[run] = final(tmp_path / run / "runs/default/version_0")
    for run in ("ddp", "sharded"):
        for key, value in found["one"].items():
            torch.testing.assert_close(found[run][key], value, rtol=1e-3, atol=1e-4, msg=key)


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
