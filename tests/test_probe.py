"""The probe against a straightforward second computation, and what it promises about its sums."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from conftest import run_cli

from lightning_limber.data.scenes import SceneSet
from lightning_limber.sae import load_saes


def events(folder: str | Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


METRICS = "fvu mse cosine norm_ratio norm l0 sparsity alive shared outliers tokens".split()


@pytest.fixture(scope="module")
def run(models, tmp_path_factory) -> Path:
    """A finished run of two epochs with the probe on."""
    root = tmp_path_factory.mktemp("run")
    done = run_cli("fit", *tiny.arguments(models), "--trainer.max_steps=8", cwd=root)
    assert done.returncode == 0, done.stdout
    return root / "runs/default/version_0"


def test_every_metric_by_layer_group_and_epoch_is_in_the_event_file(run):
    log = events(run)
    for metric in METRICS:
        for group in ("image", "caption", "text"):
            for layer in (0, 2):
                steps = [e.step for e in log.Scalars(f"{metric}/{group}/layer_{layer:02d}")]
                assert steps == [0, 4, 8]  # The untrained adapter, then each epoch.
    for tag in ("probe/by_layer", "probe/by_epoch", "captions"):
        assert tag in log.Tags()["images"]
    for tag in (
        "val/loss",
        "val/perplexity",
        "val/accuracy",
        "train/grad_norm",
        "train/lr",
        "captions/all",
    ):
        assert tag in log.Tags()["scalars"]
    for tag in (
        "train/loss",
        "train/accuracy",
        "train/perplexity",
        "train/adapter_norm",
        "captions_chance/all",
    ):
        assert tag in log.Tags()["scalars"]


def test_fast_dev_run_leaves_nothing_behind(fit, tmp_path):
    fit("--trainer.fast_dev_run=true", probe=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_adapter_learns(fit, tmp_path):
    """On random tiny models, too: held-out loss falls, and more with the right image than another."""
    fit("--trainer.max_steps=60", "--model.optimizer.lr=0.1", "--checkpoint.every_n_steps=0")
    losses = [e.value for e in events(tmp_path / "runs/default/version_0").Scalars("val/loss")]
    assert losses[-1] < 0.99 * losses[0]


def test_text_does_not_change_while_the_adapter_trains(run):
    """The LLM is frozen: its text group is the same at every epoch, to the bit."""
    log = events(run)
    for metric in METRICS[:-3]:
        values = {e.value for e in log.Scalars(f"{metric}/text/layer_02")}
        if metric != "shared":
            assert len(values) == 1, metric
    assert len({e.value for e in log.Scalars("fvu/image/layer_02")}) == 3


def test_against_a_second_computation(fit, models):
    """Hidden states gathered one sequence at a time, metrics in two passes over all tokens."""
    cli = fit("--trainer.max_steps=4", "--data.val_batch_size=3", probe=True)
    model, probe = cli.model, cli.trainer.callbacks[0]
    assert type(probe).__name__ == "SAEProbe"
    saes = load_saes(str(models / "saes"), "layer_{layer}", None, model.llm)
    captions = [r.captions[0] for r in (SceneSet("train", 16, 112, 0)[i] for i in range(16))]

    def residuals(embeds: torch.Tensor, hook_name: str) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with torch.no_grad(), model.llm.residual_hooks({hook_name: kept.append}):
            model.llm.decode(embeds[None])
        return kept[0][0]

    prompt = model.collator().prompt
    for layer, (hook_name, sae) in zip((0, 2), saes.items(), strict=True):
        tokens = {"image": [], "caption": [], "text": []}
        for i in range(10):
            record = SceneSet("val", 10, 112, 0)[i]
            with torch.no_grad():
                image = model.image_tokens(model.vision.transform(record.image)[None])[0]
            ids, is_caption, _ = prompt.text(record.captions[0])
            prefix, text = (model.llm.embed(torch.tensor(x)) for x in (prompt.prefix_ids, ids))
            rows = residuals(torch.cat([prefix, image, text]), hook_name)
            tokens["image"].append(rows[1:5])
            tokens["caption"].append(rows[5:][torch.tensor(is_caption)])
            tokens["text"].append(
                residuals(torch.cat([prefix, text]), hook_name)[1:][torch.tensor(is_caption)]
            )
        norms = []
        for caption in captions:
            ids, is_caption, _ = prompt.text(caption)
            embeds = model.llm.embed(torch.tensor(prompt.prefix_ids + ids))
            norms.append(residuals(embeds, hook_name)[1:][torch.tensor(is_caption)].norm(dim=-1))
        limit = 10 * torch.cat(norms).median()
        fired = {}
        for group, rows in tokens.items():
            x = torch.cat(rows)
            keep = x.norm(dim=-1) <= limit
            x = x[keep]
            latents = sae.encode(x)
            reconstruction = sae.decode(latents).double()
            x = x.double()
            fired[group] = (latents > 0).any(0)
            errors = ((x - reconstruction) ** 2).sum()
            expected = {
                "fvu": errors / ((x - x.mean(0)) ** 2).sum(),
                "mse": errors / x.numel(),
                "cosine": torch.cosine_similarity(x, reconstruction).mean(),
                "norm_ratio": (reconstruction.norm(dim=-1) / x.norm(dim=-1)).mean(),
                "norm": x.norm(dim=-1).mean(),
                "l0": (latents > 0).sum(1).double().mean(),
                "sparsity": (latents > 0).double().mean(),
                "alive": fired[group].double().mean(),
                "outliers": 1 - keep.double().mean(),
                "tokens": float(keep.sum()),
            }
            for metric, value in expected.items():
                got = probe.history[1][group][metric][(0, 2).index(layer)]
                assert got == pytest.approx(float(value), rel=1e-4, abs=1e-9), (group, metric)
        for group in tokens:
            both = (fired[group] & fired["text"]).sum() / (fired[group] | fired["text"]).sum()
            got = probe.history[1][group]["shared"][(0, 2).index(layer)]
            assert got == pytest.approx(float(both), abs=0.01)


def test_does_not_depend_on_the_batch(fit):
    results = []
    for size in (1, 4, 10):
        cli = fit("--trainer.max_steps=4", f"--data.val_batch_size={size}", probe=True)
        results.append(cli.trainer.callbacks[0].history[0])
    for other in results[1:]:
        for group, metrics in results[0].items():
            for metric, values in metrics.items():
                assert other[group][metric] == pytest.approx(values, rel=1e-4, abs=1e-3), (
                    group,
                    metric,
                )


@pytest.mark.slow
def test_two_processes_are_one(models, tmp_path):
    """Same steps, same held-out loss, same probe; no image counted twice."""
    logs = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        root.mkdir()
        flags = [*tiny.arguments(models), "--trainer.max_steps=8", f"--trainer.devices={devices}"]
        flags += ["--trainer.strategy=ddp"] if devices == 2 else []
        done = run_cli("fit", *flags, cwd=root)
        assert done.returncode == 0, done.stdout
        logs.append(events(root / "runs/default/version_0"))
    one, two = logs
    assert sorted(one.Tags()["scalars"]) == sorted(two.Tags()["scalars"])
    for tag in one.Tags()["scalars"]:
        a, b = ([(e.step, e.value) for e in log.Scalars(tag)] for log in logs)
        assert [step for step, _ in a] == [step for step, _ in b], tag
        # 1e-3: the second epoch starts from weights that differ by the rounding of a split sum.
        assert [v for _, v in b] == pytest.approx([v for _, v in a], rel=1e-3, abs=1e-3), tag
    tokens, outliers = (
        [e.value for e in two.Scalars(f"{name}/image/layer_00")] for name in ("tokens", "outliers")
    )
    seen = [count / (1 - share) for count, share in zip(tokens, outliers, strict=True)]
    assert seen == pytest.approx([40, 40, 40])  # 10 images of 4 tokens, none twice.


def test_validate_probes_a_checkpoint(run, fit):
    cli = fit(f"--ckpt_path={run / 'checkpoints/last.ckpt'}", base=False, command="validate")
    values = [e.value for e in events(cli.trainer.log_dir).Scalars("fvu/image/layer_02")]
    assert values == [e.value for e in events(run).Scalars("fvu/image/layer_02")][-1:]


def test_resid_pre_saes_read_the_stream_before_the_layer(fit, models, tmp_path):
    """The stream that enters layer 1 is the one that leaves layer 0: equal metrics for equal SAEs."""
    tiny.write_saes(tmp_path / "post", (0,))
    from sae_lens import SAE

    sae = SAE.load_from_disk(tmp_path / "post/layer_0")
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    sae.save_model(tmp_path / "pre/layer_1")
    results = []
    for place in ("post", "pre"):
        flag = f"--probe.sae_release={tmp_path / place}"
        results.append(fit(flag, "--trainer.max_steps=1", probe=True).trainer.callbacks[0].history[0])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--probe.sae_release=gemma-scope-2b-pt-ress"], "is no SAELens release and no folder"),
        (["--probe.sae_release=./nowhere"], "there is no folder"),
        (["--probe.sae_release=suite:gpt9"], "does not ship with this package"),
        (["--probe.sae_id=width_16k"], "needs {layer} in it"),
        (["--probe.layers=[1]"], r"has no SAE for layers \[1\]. There are: layer_0, layer_2"),
    ],
)
def test_wrong_saes_stop_before_training(fit, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fit(*flags, probe=True)


def test_saes_of_another_llm_stop(fit, tmp_path):
    tiny.write_saes(tmp_path / "wide", (0,), d_in=48)
    tiny.write_saes(tmp_path / "deep", (7,))
    for folder, what in (("wide", "width 48"), ("deep", "blocks.7.hook_resid_post")):
        with pytest.raises(ValueError, match=what):
            fit(f"--probe.sae_release={tmp_path / folder}", probe=True)


def test_the_probe_can_be_rare_or_off(fit):
    assert fit("--probe.every_n_epochs=2", probe=True).trainer.callbacks[0].history.keys() == {0, 2}
    assert not fit("--probe.every_n_epochs=0").trainer.callbacks[0].history


def test_noise_far_from_text_is_left_out_as_outliers(fit):
    """A probe must not be swamped by attention sinks: tokens over 10 median norms are only counted."""
    cli = fit("--trainer.max_steps=1", "--probe.outlier_factor=0.001", probe=True)
    values = cli.trainer.callbacks[0].history[0]["image"]
    assert values["outliers"] == [1.0, 1.0]
    assert values["tokens"] == [0.0, 0.0]
    assert all(math.isnan(value) for value in values["fvu"])  # Not a number made up.


def test_memory_does_not_grow_with_the_images(models, fit):
    """No tensor of the probe outlives its batch: the sums are all that is kept."""
    import gc

    cli = fit("--trainer.max_steps=1", probe=True)
    probe, trainer, model = cli.trainer.callbacks[0], cli.trainer, cli.model

    def live_bytes(images: int) -> int:
        peak = 0
        probe.num_images = images
        trainer.datamodule.val_set = SceneSet("val", images, 112, 0)
        compute = probe._collect

        def collect(values):
            nonlocal peak
            gc.collect()
            peak = sum(x.nbytes for x in gc.get_objects() if isinstance(x, torch.Tensor))
            return compute(values)

        probe._collect = collect
        probe.run(trainer, model)
        probe._collect = compute
        return peak

    # One image's tokens at one layer are 512 bytes; the last batch's indices may differ by a few.
    assert live_bytes(64) - live_bytes(8) < 512
