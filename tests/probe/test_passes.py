"""The probe against a straightforward second computation, and what it promises about its sums."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from parts import probe_batches, sae_probe, values, without_values
from process import run_cli

from lightning_limber.data.held_out import spread
from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.saes import load_saes
from lightning_limber.probe.metrics import REGISTRY, ProbeMetric


def events(folder: str | Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


METRICS = (
    "fvu fvu_text mse rel_error cosine norm_ratio norm l0 sparsity alive norm_p50 shared outliers tokens"
).split()


@pytest.fixture(scope="module")
def run(models, tmp_path_factory) -> Path:
    """A finished run of two epochs with the probe on."""
    root = tmp_path_factory.mktemp("run")
    flags = ["--trainer.max_steps=8", "--probe.log=all"]
    done = run_cli("fit", *tiny.arguments(models), *flags, cwd=root, figures=True)
    assert done.returncode == 0, done.stdout
    return root / "runs/default/version_0"


def test_every_metric_by_layer_group_and_epoch_is_in_the_event_file(run):
    log = events(run)
    for metric in METRICS:
        for group in ("image", "caption", "text", "noise", "words_long"):
            for layer in (0, 2):
                steps = [e.step for e in log.Scalars(f"{metric}/{group}/layer_{layer:02d}")]
                assert steps == [0, 4, 8]  # The untrained adapter, then each epoch.
    for metric in ("loss_recovered", "lens_hit", "lens_hit_chance", "knn", "knn_chance"):
        steps = [e.step for e in log.Scalars(f"{metric}/image/layer_02")]
        assert steps == [0, 4, 8], metric
    for tag in ("by_layer/fvu", "by_epoch/fvu", "cross_layer/fvu", "captions"):
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
    model, probe = cli.model, sae_probe(cli)
    assert type(probe).__name__ == "SAEProbe"
    saes = load_saes(str(models / "saes"), "layer_{layer}", None, model.llm)

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
                image = model.adapter(model.vision(model.vision.transform(record.image)[None]))[0]
            ids, is_caption, *_ = prompt.text(record.captions[0])
            prefix, text = (model.llm.embed(torch.tensor(x)) for x in (prompt.prefix_ids, ids))
            rows = residuals(torch.cat([prefix, image, text]), hook_name)
            tokens["image"].append(rows[1:5])
            tokens["caption"].append(rows[5:][torch.tensor(is_caption)][1:])
            tokens["text"].append(
                residuals(torch.cat([prefix, text]), hook_name)[1:][torch.tensor(is_caption)][1:]
            )
            sink = rows[0]
        text = probe.probe.text[hook_name]
        torch.testing.assert_close(torch.tensor(text.sink), sink / sink.norm(), rtol=1e-4, atol=1e-5)
        fired = {}
        for group, rows in tokens.items():
            x = torch.cat(rows)
            keep = torch.cosine_similarity(x, sink[None]) <= 0.8
            x = x[keep]
            latents = sae.encode(x)
            reconstruction = sae.decode(latents).double()
            x = x.double()
            fired[group] = (latents > 0).any(0)
            errors = ((x - reconstruction) ** 2).sum()
            expected = {
                "fvu": errors / ((x - x.mean(0)) ** 2).sum(),
                "fvu_text": errors / len(x) / text.variance,
                "mse": errors / x.numel(),
                "rel_error": errors / (x**2).sum(),
                "cosine": torch.cosine_similarity(x, reconstruction).mean(),
                "norm_ratio": (reconstruction.norm(dim=-1) / x.norm(dim=-1)).mean(),
                "norm": x.norm(dim=-1).mean(),
                **{f"norm_p{p}": x.norm(dim=-1).quantile(p / 100) for p in (10, 50, 90)},
                "l0": (latents > 0).sum(1).double().mean(),
                "sparsity": (latents > 0).double().mean(),
                "alive": fired[group].double().mean(),
                "outliers": 1 - keep.double().mean(),
                "tokens": float(keep.sum()),
            }
            for metric, value in expected.items():
                got = values(cli, 1, group, metric)[(0, 2).index(layer)]
                assert got == pytest.approx(float(value), rel=1e-4, abs=1e-9), (group, metric)
        for group in tokens:
            both = (fired[group] & fired["text"]).sum() / (fired[group] | fired["text"]).sum()
            got = values(cli, 1, group, "shared")[(0, 2).index(layer)]
            assert got == pytest.approx(float(both), abs=0.01)
            if group != "text":
                a, b = (float(fired[name].double().mean()) for name in (group, "text"))
                chance = values(cli, 1, group, "shared_chance")[(0, 2).index(layer)]
                assert chance == pytest.approx(a * b / (a + b - a * b), abs=0.01)


def test_does_not_depend_on_the_batch(probed, monkeypatch):
    """All rows, intervals and chance levels too."""
    callback, data = sae_probe(probed), probed.trainer.datamodule
    found = []
    for size in (1, 4, 10):
        monkeypatch.setattr(data, "val_batch_size", size)
        batches = probe_batches(probed, 20), probe_batches(probed, 6, interventions=True)
        found.append(callback.probe.run(*batches, data.attributes))
    for other in found[1:]:
        assert other.images == found[0].images == [f"val/{i:06d}" for i in sorted(spread(60, 20))]
        assert other.by_image.keys() == found[0].by_image.keys()
        for key, sums in found[0].by_image.items():
            assert sums.shape == (20, 2)
            torch.testing.assert_close(other.by_image[key], sums, rtol=1e-4, atol=1e-3, equal_nan=True)
        for a, b in zip(found[0].rows, other.rows, strict=True):
            assert a[:3] == b[:3]
            assert b[3:] == pytest.approx(a[3:], rel=1e-4, abs=1e-3, nan_ok=True), a


IMAGES = "runs/default/version_0/images_epoch_1.npz"


def table(root: Path) -> list[dict[str, str]]:
    with (root / "runs/default/version_0/probe.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_are_one(models, tmp_path):
    """Same steps, same held-out loss, same probe; no image counted twice."""
    logs = []
    for devices in (1, 2):
        root = tmp_path / str(devices)
        root.mkdir()
        flags = [*tiny.arguments(models), "--trainer.max_steps=8", f"--trainer.devices={devices}"]
        flags += ["--probe.log=all", *(["--trainer.strategy=ddp"] if devices == 2 else [])]
        done = run_cli("fit", *flags, cwd=root, processes=devices)
        assert done.returncode == 0, done.stdout
        logs.append(events(root / "runs/default/version_0"))
    one, two = logs
    assert sorted(one.Tags()["scalars"]) == sorted(two.Tags()["scalars"])
    for tag in one.Tags()["scalars"]:
        # How a batch is split decides what is padding; time and memory are what they are.
        if tag == "train/padding" or tag.startswith(("probe_seconds/", "memory/", "flops/")):
            continue
        a, b = ([(e.step, e.value) for e in log.Scalars(tag)] for log in logs)
        assert [step for step, _ in a] == [step for step, _ in b], tag
        # 1e-3: the second epoch starts from weights that differ by the rounding of a split sum.
        assert [v for _, v in b] == pytest.approx([v for _, v in a], rel=1e-3, abs=1e-3, nan_ok=True), tag
    # The untrained adapter is the same to the bit: so is its probe, intervals and chance levels included,
    # but for the rounding of forwards with fewer images in a batch.
    a, b = ([row for row in table(tmp_path / str(n)) if row["epoch"] == "0"] for n in (1, 2))
    assert len(a) == len(b) > 100
    for x, y in zip(a, b, strict=True):
        numbers = [[float(row[key] or "nan") for key in ("value", "low", "high")] for row in (x, y)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-3, abs=1e-3, nan_ok=True), x
    with np.load(tmp_path / "1" / IMAGES) as one, np.load(tmp_path / "2" / IMAGES) as two_of:
        assert one.files == two_of.files
        for name in one.files:
            if one[name].dtype.kind == "U":
                assert one[name].tolist() == two_of[name].tolist()
            else:
                np.testing.assert_allclose(two_of[name], one[name], rtol=1e-3, atol=1e-3, err_msg=name)
    tokens, outliers = (
        [e.value for e in two.Scalars(f"{name}/image/layer_00")] for name in ("tokens", "outliers")
    )
    seen = [count / (1 - share) for count, share in zip(tokens, outliers, strict=True)]
    assert seen == pytest.approx([40, 40, 40])  # 10 images of 4 tokens, none twice.


def test_validate_probes_a_checkpoint(run, fit):
    cli = fit(f"--ckpt_path={run / 'checkpoints/last.ckpt'}", base=False, command="validate")
    found = [e.value for e in events(cli.trainer.log_dir).Scalars("fvu/image/layer_02")]
    assert found == [e.value for e in events(run).Scalars("fvu/image/layer_02")][-1:]


def test_resid_pre_saes_read_the_stream_before_the_layer(fit, models, tmp_path):
    """The stream that enters layer 1 is the one that leaves layer 0: equal metrics for equal SAEs."""
    tiny.write_saes(tmp_path / "post", (0,))
    from sae_lens import SAE

    sae = SAE.load_from_disk(tmp_path / "post/layer_0")
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    sae.save_model(tmp_path / "pre/layer_1")
    results = []
    for place in ("post", "pre"):
        flags = [f"--probe.sae_release={tmp_path / place}", "--captions.num_images=0"]
        results.append(sae_probe(fit(*flags, "--trainer.max_steps=1", probe=True)).history[0])
    # All but the layer's number, which convergence_layer and neighbour_layer have for their values.
    post, pre = (
        [row[1:] for row in rows if row.layer is not None and row.metric != "neighbour_layer"]
        for rows in results
    )
    assert str(pre) == str(post)  # As text: NaN is NaN.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--probe.sae_release=gemma-scope-2b-pt-ress"], "is no SAELens release and no folder"),
        (["--probe.sae_release=./nowhere"], "there is no folder"),
        (["--probe.sae_release=suite:gpt9"], "'suite:gpt9' does not ship. Known: shipped:"),
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
    assert sae_probe(fit("--probe.every_n_epochs=2", probe=True)).history.keys() == {0, 2, 3}  # The end.
    assert not sae_probe(fit("--probe.every_n_epochs=0")).history


def test_tokens_far_from_text_are_left_out_as_outliers(fit, monkeypatch):
    """By their norm where that is asked for. Where none is left nothing is made up: every metric is NaN."""
    said: list[str] = []
    monkeypatch.setattr("lightning_limber.probe.passes.rank_zero_info", said.append)
    cli = fit("--trainer.max_steps=1", "--probe.outlier_factor=0.001", probe=True)
    assert values(cli, 0, "image", "outliers") == [1.0, 1.0]
    assert values(cli, 0, "image", "tokens") == [0.0, 0.0]
    rows = sae_probe(cli).history[0]
    others = [row for row in rows if row.layer is not None and row.metric not in ("tokens", "outliers")]
    assert {"fvu", "shared", "alive", "lens_hit", "knn_p"} <= {row.metric for row in others}
    assert all(math.isnan(row.value) for row in others)
    assert any("All tokens of group 'image' at layers 0, 2 are attention sinks" in note for note in said)


def test_tokens_that_point_as_the_first_position_are_sinks(probed, monkeypatch):
    """At any length. Planted at layer 0 as half of the image tokens: they are left out, and counted."""
    model, probe = probed.model, sae_probe(probed).probe
    sinks = {name: torch.tensor(stats.sink) for name, stats in probe.text.items()}
    name = "blocks.0.hook_resid_post"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 32, generator=generator)
    x -= (x @ sinks[name])[:, None] * sinks[name]
    x /= x.norm(dim=-1, keepdim=True)
    for scale in (1e-3, 1.0, 1e3):
        for cosine, kept in ((0.79, True), (0.81, False), (-1.0, True)):
            tokens = scale * (cosine * sinks[name] + (1 - cosine**2) ** 0.5 * x)
            assert probe.keep(name, tokens).tolist() == [kept] * 6
    bos = model.llm.embed(torch.tensor([[1, 1]]))
    found = {}
    with torch.no_grad(), model.llm.residual_hooks({name: partial(found.__setitem__, name)}):
        model.llm.decode(bos)
    assert not probe.keep(name, found[name][0]).any()  # Twice the first token: two sinks.


@pytest.mark.parametrize(("metrics", "activation_sums"), [("noise", 0), ("noise,detectors", 2)])
def test_memory_by_image(fit, metrics, activation_sums):
    """No activation outlives its batch: what is kept of an image are its sums, layer by layer, and what its
    latents do where a metric asks for it.
    """
    import gc

    cli = fit("--trainer.max_steps=1", f"--probe.metrics=[{metrics}]", probe=True)
    callback, trainer = sae_probe(cli), cli.trainer
    probe = callback.probe

    class AtTheEndOfThePasses(ProbeMetric):
        def compute(self, data, found):
            gc.collect()
            self.bytes = sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)
            return ()

    first = AtTheEndOfThePasses()
    probe.metrics.insert(0, first)

    def live_bytes(images: int) -> int:
        trainer.datamodule.val_set = SceneSet("val", images, 112, 0)
        probe.run(probe_batches(cli, images))
        return first.bytes

    by_image = (live_bytes(64) - live_bytes(8)) / 56
    # D = 32, K = 64, 2 layers: sums of 8, total (float64) and index in 4 groups; bfloat16 by latent; the
    # norm of each token: 4 of an image and of noise, about 8 of a caption, behind the image and without it.
    kept = ((8 * 8 + 32 * 8 + 8) * 4 + 64 * 2 * activation_sums + 4 * (2 * 4 + 2 * 8)) * 2
    assert by_image == pytest.approx(kept, rel=0.05)


def test_text_alone_is_measured_once_where_the_captions_stay(probed, monkeypatch):
    """What is known from the first probe is what measuring anew finds, to the bit."""
    callback, model = sae_probe(probed), type(probed.model)
    probe, batches = callback.probe, probe_batches(probed, 6)
    monkeypatch.setattr(probe, "_known_text", ({}, {}))
    decode, alone = model.decode, []

    def counted(self, sequences, image_tokens):
        alone.append(image_tokens is None)
        return decode(self, sequences, image_tokens)

    monkeypatch.setattr(model, "decode", counted)
    found, forwards = [], []
    for same_captions in (False, True, True):
        alone.clear()
        found.append(repr(probe.run(batches, same_captions=same_captions).rows))
        forwards.append(any(alone))
    assert forwards == [True, True, False]
    assert found[0] == found[1] == found[2]


def test_tidy_table(run):
    import pandas as pd

    table = pd.read_csv(run / "probe.csv")
    assert list(table.columns) == "run epoch layer group metric value low high".split()
    assert set(table.epoch) == {0, 1, 2}
    pd.testing.assert_frame_equal(
        pd.read_parquet(run / "probe.parquet").astype(table.dtypes.to_dict()), table, rtol=1e-12
    )
    assert not table.duplicated(["epoch", "layer", "group", "metric"]).any()
    fvu = table[(table.metric == "fvu") & (table.group == "image")]
    assert ((fvu.low <= fvu.value) & (fvu.value <= fvu.high)).all()


def test_metrics_can_be_left_out(fit):
    cli = fit("--trainer.max_steps=1", "--probe.metrics=[knn]", probe=True)
    found = {(row.group, row.metric) for row in sae_probe(cli).history[0]}
    assert ("image", "knn") in found
    assert not {group for group, _ in found} & {"noise"}
    assert not {metric for _, metric in found} & {"loss_recovered", "lens_hit", "detectors", "match"}
    with pytest.raises(ValueError, match=r"probe.metrics: 'kn' is none of geometry, .*knn"):
        fit("--probe.metrics=[kn]", probe=True)


def test_detectors_of_scenes(models, fit):
    """Attributes of the truth; a random tiny LLM has text latents for words, and the table says which."""
    flags = ["--trainer.max_steps=1", "--data.val_size=60", "--probe.metrics=[detectors,linear_probe]"]
    cli = fit(*flags, "--probe.num_images=60", "--captions.num_images=0", probe=True)
    rows = {(row.layer, row.group, row.metric): row for row in sae_probe(cli).history[0]}
    for metric in ("detectors", "detectors_shared", "detectors_same", "linear_probe"):
        by_layer = [rows[layer, "image", f"{metric}_auroc"] for layer in (0, 2)]
        assert all(0 <= row.low <= row.value <= row.high <= 1 for row in by_layer)
        best = max(by_layer, key=lambda row: row.value)
        found = rows[None, "image", f"{metric}_auroc_max"]
        assert (found.value, found.low, found.high) == (best.value, best.low, best.high)
        chance = [rows[layer, "image", f"{metric}_auroc_chance"] for layer in (0, 2)]
        assert all(0.4 < row.low < row.value < row.high < 0.6 for row in chance)
        highest = rows[None, "image", f"{metric}_auroc_max_chance"].value
        assert max(row.value for row in chance) <= highest < 0.6
        assert 0 < rows[None, "image", f"{metric}_auroc_max_p"].value <= 1
    assert all(
        0 <= value <= 1 for group in ("image", "text") for value in values(cli, 0, group, "detectors")
    )
    # A colour's embedding alone tells which captions have it.
    for metric in ("detectors_shared_text_auroc", "detectors_auroc"):
        row = rows[0, "text" if metric == "detectors_auroc" else "image", metric]
        assert row.low > rows[0, "image", "detectors_auroc"].high
    import pandas as pd

    table = pd.read_csv(Path(cli.trainer.log_dir) / "detectors_epoch_0.csv")
    assert {"red", "circle", "small", "pink background"} & set(table.attribute)
    assert set(table.layer) == {0, 2}
    for column, metric in (("shared_latent_auroc_image", "detectors_shared"), ("auroc_image", "detectors")):
        mean = table[table.layer == 0][column].mean()
        assert mean == pytest.approx(rows[0, "image", f"{metric}_auroc"].value)


def test_validate_probes_a_published_projector(fit, tmp_path):
    """LLaVA's file, no checkpoint of ours: its weights are used as they are, and probed."""
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 24), torch.randn(32)
    path = tmp_path / "mm_projector.bin"
    torch.save({"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}, path)
    flags = [f"--model.adapter_weights={path}", "--model.adapter.input_norm=none"]
    cli = fit(*flags, "--probe.published_curves=true", command="validate", probe=True, figures=True)
    batch = next(iter(cli.datamodule.probe_dataloader(2)))
    with torch.no_grad():
        expected = cli.model.vision(batch.pixel_values) @ weight.T + bias
        torch.testing.assert_close(cli.model.image_tokens(batch).tokens, expected)
    log = events(cli.trainer.log_dir)
    assert log.Scalars("fvu/image/layer_02")
    assert "by_layer/fvu" in log.Tags()["images"]


def test_the_passes_ask_nothing_of_the_device(probed, models, monkeypatch):
    """On a GPU they wait for nothing, with all metrics (of objects: test_object_steer.py)."""
    from lightning_limber.probe.token_stats import TokenStats

    batch = next(iter(probe_batches(probed, 4, interventions=True)))
    metrics = [name for name in REGISTRY if not name.startswith("object_")]
    probe, moved = without_values(probed, models / "saes", monkeypatch, batch, 4, metrics=metrics)
    names, groups = list(probe.saes), ("image", "caption", "text", "noise", "words_long", "words", "told")
    sums = {(group, name): TokenStats().to("meta") for group in groups for name in names}
    kept = defaultdict(list)
    with torch.no_grad():
        probe._clean_pass(moved, sums, kept)
        probe._intervention_pass(moved, names, kept)
    assert all(of_group.activation_sum[0].shape == (4, 64) for of_group in sums.values())
    shapes = {}
    for (number, group, name), [(index, item)] in kept.items():
        assert index == batch.index
        shape = (
            {k: tuple(v.shape) for k, v in item.items()} if isinstance(item, dict) else tuple(item.shape)
        )
        shapes[probe.metrics[number].name, group, name] = shape
    tokens = dict.fromkeys(groups, 16) | dict.fromkeys(("caption", "text"), len(batch.groups["caption"][0]))
    direction = {"direction_l0": (4, 2), "direction_fvu": (4, 2)}
    assert shapes == {
        **{("geometry", group, name): (n,) for group, n in tokens.items() for name in names},
        **{
            ("direction", group, name): direction
            for group in groups
            if group != "caption"
            for name in names
        },
        **{("lens_hit", "image", name): (16, 5) for name in names},  # 4 tokens of each image.
        **{("use", "", name): (4, 3) for name in names},
        **{("loss_recovered", "", name): (4, 6) for name in names},
        **{("cross_layer", "", name): (2, 2, 3) for name in names},
        **{("neighbours", group, name): (16,) for group, n in tokens.items() if n == 16 for name in names},
    }


def test_text_may_be_whole_prompts(fit):
    """All positions of the sequences without an image but the first, one by one; other groups stay."""
    flags = [
        "--trainer.max_steps=1",
        "--probe.metrics=[knn]",
        "--model.prompt={bos}{image}a cat {caption}{eos}",
    ]
    whole, caption = (
        fit(*flags, f"--probe.text_tokens={which}", probe=True) for which in ("prompt", "caption")
    )
    model, probe = whole.model, sae_probe(whole).probe
    norms: dict[str, list[torch.Tensor]] = {name: [] for name in probe.saes}
    scenes = SceneSet("val", 10, 112, 0)
    for i in range(10):
        words = scenes[i].captions[0].replace(".", " .").split()
        ids = model.llm.tokenizer.convert_tokens_to_ids(["<bos>", "a", "cat", *words, "<eos>"])
        kept: dict[str, torch.Tensor] = {}
        hooks = {name: partial(kept.__setitem__, name) for name in probe.saes}
        with torch.no_grad(), model.llm.residual_hooks(hooks):
            model.llm.decode(model.llm.embed(torch.tensor([ids])))
        for name, x in kept.items():
            x = x[0, 1:]
            norms[name].append(x.norm(dim=-1)[probe.keep(name, x)])
    for got, tokens, found in zip(
        values(whole, 0, "text", "norm"), values(whole, 0, "text", "tokens"), norms.values(), strict=True
    ):
        assert tokens == sum(map(len, found))
        assert got == pytest.approx(float(torch.cat(found).mean()), rel=1e-5)
    assert values(whole, 0, "text", "tokens") != values(caption, 0, "text", "tokens")
    for group in ("image", "caption"):
        assert values(whole, 0, group, "fvu") == values(caption, 0, group, "fvu")


def test_filters_of_match_without_descriptions_are_said(fit, monkeypatch, tmp_path):
    said: list[str] = []
    monkeypatch.setattr("lightning_limber.probe.load.rank_zero_info", said.append)
    flags = ["--trainer.max_steps=1", "--captions.num_images=0"]
    flags += ["--probe.max_image_share=0.05", "--probe.max_text_density=0.005"]

    def warnings(*more: str) -> list[str]:
        said.clear()
        fit(*flags, *more, probe=True)
        return [note for note in said if note.startswith("[warning]")]

    [note] = warnings("--probe.max_image_share=0.3", "--probe.top_latents=2", "--probe.metrics=[match]")
    assert "probe.top_latents, probe.max_image_share: set, but no layer has descriptions" in note
    assert not warnings("--probe.metrics=[match]")
    assert not warnings("--probe.max_image_share=0.3", "--probe.metrics=[knn]")
    rows = [{"layer": "0", "index": k, "description": "cats"} for k in range(9)]
    for layer in (0, 2):
        (tmp_path / f"d{layer}").mkdir()
        (tmp_path / f"d{layer}/batch-0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [note] = warnings(f"--probe.descriptions={tmp_path}/d{{layer}}", "--probe.max_image_share=0.3")
    assert "no densities at layers 0, 2" in note
    with pytest.raises(FileNotFoundError, match="cannot read .*/e0: .*null leaves `match` out"):
        fit(f"--probe.descriptions={tmp_path}/e{{layer}}", probe=True)
