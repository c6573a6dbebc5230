"""Every way to make image tokens through the real entry point: fit, crash, resume, export, load."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from crash import Crash
from process import HELPERS, run_cli
from runs import assert_equal, crash_flags, final

from lightning_limber import load
from lightning_limber.models.adapters import Vocabulary

RUN = Path("runs/default/version_0")
CASES = {
    "resampler": ["Resampler", "queries=3", "dropout=0.3"],
    "vocabulary": ["Vocabulary", "perplexity=10", "dropout=0.3"],
    "whole words": ["Vocabulary", "words=whole", "perplexity=10"],
    **{
        f"norm {kind}": ["controlled.Controlled", f"norm={kind}"]
        for kind in ("fixed", "learned", "moments")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_from_its_start_to_its_export(case, fit, monkeypatch, tmp_path):
    name, *settings = CASES[case]
    named = [f"--model.adapter={name}"]
    flags = [*named, *(f"--model.adapter.{setting}" for setting in settings)]
    flags += [] if name == "Resampler" else ["--model.adapter.input_norm=channel"]

    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    cli = fit(*flags, *crash_flags("batches"))
    whole = final(RUN)
    trained = {f"adapter.{key}" for key, _ in cli.model.adapter.named_parameters()}
    assert trained < whole.keys()
    assert not [key for key in whole if "llm" in key or "word_ids" in key]

    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path / "parts")
    with pytest.raises(Crash):
        fit(*flags, *crash_flags("batches", "batch_start", 6))
    early = final(RUN)
    fit("--ckpt_path=last", *named, *crash_flags("batches"), base=False)
    assert_equal(final(RUN), whole)
    changed = {key for key in whole if not torch.equal(early[key], whole[key])}
    assert trained <= changed
    assert ("adapter.control.moments.running" in changed) == (case == "norm moments")

    fit(f"--ckpt_path={RUN}", "--output=exported", command="export", base=False)
    model = load("exported", "cpu").model
    assert_equal({f"adapter.{key}": value for key, value in model.adapter.state_dict().items()}, whole)
    features = torch.randn(2, 4, 24)
    with torch.no_grad():
        cli.model.eval()
        torch.testing.assert_close(model.adapter(features), cli.model.adapter(features))
    if name == "Vocabulary":
        assert isinstance(model.adapter, Vocabulary)
        [[(word, weight), *_], *_] = model.adapter.words(features)[0]
        assert word in model.llm.tokenizer.get_vocab()
        assert 0 < weight < 1


@pytest.mark.slow
@pytest.mark.parametrize("case", ["whole words", "norm moments"])
def test_two_processes_and_a_sharded_llm_make_the_same_run(case, models, tmp_path):
    name, *settings = CASES[case]
    flags = [*tiny.arguments(models, probe=False), f"--model.adapter={name}", "--trainer.max_steps=4"]
    flags += [*(f"--model.adapter.{setting}" for setting in settings), *crash_flags("batches")]
    flags += ["--model.adapter.input_norm=channel"]
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    found = {}
    for run, more in {"one": [], "ddp": ddp, "sharded": [*ddp, "--model.shard_llm=true"]}.items():
        (tmp_path / run).mkdir()
        done = run_cli("fit", *flags, *more, cwd=tmp_path / run, env=HELPERS)
        assert done.returncode == 0, done.stdout
        found[run] = final(tmp_path / run / RUN)
    assert_equal(found["ddp"], found["sharded"])
    if case == "norm moments":
        # A bias before a running mean has a gradient of rounding alone, of which Adam makes whole steps: one
        # process and two are compared in tests/models/test_norm_control.py.
        return
    for key, value in found["one"].items():
        torch.testing.assert_close(found["ddp"][key], value, rtol=1e-3, atol=1e-4)
