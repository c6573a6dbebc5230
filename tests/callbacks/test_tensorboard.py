"""What TensorBoard shows of a run, and what it leaves for the report, read back from a real run's files."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from browser import ALL_TEXT
from parts import sae_probe
from process import run_here
from torch.utils.flop_counter import FlopCounterMode

from lightning_limber.callbacks import RunRecord
from lightning_limber.probe.tables import overview, overview_layers, scalars
from lightning_limber.tools.report import main as report
from lightning_limber.tools.report import read_run
from lightning_limber.utils.flops import CPU_ATTENTION

WORDS = "red green blue yellow purple circle square triangle diamond cross".split()


def describe(folder: Path) -> str:
    """Latent i of layers 0 and 2 is about word i (mod 10); the first ten fire on too much of text."""
    for layer in (0, 2):
        (folder / str(layer)).mkdir(parents=True)
        rows = [
            {"modelId": "tiny", "layer": f"{layer}-res", "index": str(i), "density": 0.5 * (i < 10)}
            | {"description": f"references to {WORDS[i % 10]} things", "explanationModelName": "x"}
            for i in range(64)
        ]
        (folder / f"{layer}/batch-0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return f"{folder}/{{layer}}"


@pytest.fixture(scope="module")
def cli(models, tmp_path_factory):
    """The CLI object of a short run with all its figures."""
    root = tmp_path_factory.mktemp("tensorboard")
    flags = [
        *tiny.arguments(models),
        "--trainer.max_steps=4",
        f"--probe.descriptions={describe(root / 'd')}",
    ]
    flags += ["--data.val_size=60", "--probe.num_images=60", f"--trainer.logger.save_dir={root}/runs"]
    flags += ["--probe.log=all"]
    with pytest.MonkeyPatch.context() as patch:
        return run_here(patch, root, "fit", *flags, figures=True)


@pytest.fixture(scope="module")
def folder(cli) -> Path:
    return Path(cli.trainer.log_dir)


@pytest.fixture(scope="module")
def log(folder):
    return events(folder)


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return accumulator.Reload()


def test_charts_hold_a_metrics_layers_and_a_layers_groups(log):
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.util import tensor_util

    [event] = log.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(event.tensor_proto).item())
    charts = {
        (category.title, chart.title): {
            tag
            for tag in log.Tags()["scalars"]
            if any(re.match(pattern, tag) for pattern in chart.multiline.tag)
        }
        for category in layout.category
        for chart in category.chart
        if chart.HasField("multiline")
    }
    fvu = "fvu: unexplained variance"
    assert charts["image tokens, all layers", fvu] == {"fvu/image/layer_00", "fvu/image/layer_02"}
    groups = ("image", "caption", "text", "noise", "words_long")
    assert charts["layer 02, all groups", fvu] == {f"fvu/{group}/layer_02" for group in groups}
    assert {category.title for category in layout.category} >= {
        "layer 00, all groups",
        "layer 02, all groups",
    }
    assert not {key for key, tags in charts.items() if not tags}


def test_hyper_parameters_and_the_newest_scores_are_recorded(log):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = {
        tag.rpartition("/")[2]: HParamsPluginData.FromString(content)
        for tag, content in log.PluginTagToContent("hparams").items()
    }
    settings = found["session_start_info"].session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in settings.items()} == {
        "adapter": "Linear, input_norm channel",
        "batch_size": 4,
        "data": "Scenes",
        "entry": "layer 0",
        "lr": 0.02,
    }
    assert "session_end_info" in found
    metrics = {info.name.tag for info in found["experiment"].experiment.metric_infos}
    assert metrics == {"val/loss", "val/loss_shuffled", "val/accuracy", "captions/cider_d", "captions/all"}
    for tag in metrics:  # Nothing was logged at step 0 to make the tab.
        assert min(event.step for event in log.Scalars(tag)) > 0
    assert not {"hp_metric"} & set(log.Tags()["scalars"])


def test_every_figure_is_there_for_every_probe(cli, log, folder):
    """In TensorBoard, where the first look is the first group, and as PNGs."""
    steps = {tag: [event.step for event in log.Images(tag)] for tag in log.Tags()["images"]}
    measured = {row.metric for row in sae_probe(cli).history[1] if row.layer is not None}
    panels = [panel for panel in sae_probe(cli).probe.panels if panel.metric in measured]
    probes = ["probe/patches"]
    probes += [f"cross_layer/{name}" for name in ("fvu", "l0", "fvu_of_noise", "l0_of_noise")]
    probes += [f"by_layer/{panel.metric}" for panel in panels]
    probes += [f"by_epoch/{panel.metric}" for panel in panels if panel.by_epoch]
    probes += [f"Overview/{name}" for name in ("3_use", "4_lift", "5_excess")]
    ends = ["captions", "Overview/1_loss", "Overview/2_captions"]
    assert steps == {tag: [0, 4] for tag in probes} | {tag: [4] for tag in ends}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{tag.lower().replace('/', '_')}_epoch_{step // 4}.png" for tag in steps for step in steps[tag]
    }
    groups = {tag.partition("/")[0] for kind in ("scalars", "images") for tag in log.Tags()[kind]}
    assert min(groups) == "Overview"


def test_at_most_150_curves_by_default(fit):
    """Of this run, and of one of eleven layers, as the default is; the table has all numbers."""
    cli = fit("--trainer.max_steps=4", "--data.val_size=60", "--probe.num_images=60", probe=True)
    tags = set(events(Path(cli.trainer.log_dir)).Tags()["scalars"])
    rows = sae_probe(cli).history[1]
    of_two = scalars(overview(rows)).keys()
    assert of_two <= tags
    assert {"use/image/layer_00", "neighbour_lift/noise/layer_02", "l0/words_long/layer_00"} <= of_two
    eleven = [row._replace(layer=layer) for row in rows if row.layer == 2 for layer in range(11)]
    eleven += [row for row in rows if row.layer is None]
    assert overview_layers(eleven) == [0, 2, 5, 8, 10]
    assert len(tags - of_two) + len(scalars(overview(eleven))) <= 150 < len(scalars(rows))


def shown(values: list[float]) -> tuple[float, float]:
    """Range of TensorBoard's charts: what lies in the 5th to 95th percentile, and a fifth on each side."""
    low, high = np.quantile(values, [0.05, 0.95])
    kept = [value for value in values if low <= value <= high]
    pad = 0.2 * (max(kept) - min(kept))
    return min(kept) - pad, max(kept) + pad


def test_charts_cut_no_line(log):
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.util import tensor_util

    [event] = log.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(event.tensor_proto).item())
    [overview, *_] = layout.category
    assert overview.title == "overview"
    assert len(overview.chart) == 6
    for chart in overview.chart:
        [series] = chart.margin.series
        value, low, high = (
            {event.step: event.value for event in log.Scalars(tag)}
            for tag in (series.value, series.lower, series.upper)
        )
        assert value.keys() == low.keys() == high.keys()
        bottom, top = shown([*value.values(), *low.values(), *high.values()])
        assert all(bottom <= found <= top for found in value.values()), chart.title


def test_cost_is_logged(log):
    seconds = [tag for tag in log.Tags()["scalars"] if tag.startswith("probe_seconds/")]
    assert {"probe_seconds/forward", "probe_seconds/sae"} <= set(seconds)
    assert all(event.value >= 0 for tag in seconds for event in log.Scalars(tag))
    assert [event.step for event in log.Scalars("memory/peak_gb")] == [4]
    assert 0.1 < log.Scalars("memory/peak_gb")[0].value < 64  # The process holds torch at least.


def test_flops_are_those_of_the_first_batch_and_the_first_probe(log, cli):
    """Counted again, with torch's counter around them; a resumed run counts nothing."""
    batch = next(iter(cli.datamodule.train_dataloader()))
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        cli.model(batch)[1].sum().backward()
    assert {tag: [event.step for event in log.Scalars(tag)] for tag in FLOPS} == {tag: [0] for tag in FLOPS}
    found = {tag: log.Scalars(tag)[0].value for tag in FLOPS}
    assert found["flops/step"] == counter.get_total_flops() > 0
    assert found["flops/image"] == found["flops/step"] / 4
    probe, data = sae_probe(cli).probe, cli.datamodule

    def product(a, b, **_):  # Torch's own takes every factor for dense.
        return 2 * (a._nnz() if a.is_sparse else a.numel()) * b.shape[1]

    def sampled(_, a, b, *, out_val, **__):
        return 2 * out_val._nnz() * a.shape[1]

    product._get_raw = sampled._get_raw = True
    sparse = {torch.ops.aten.mm: product, torch.ops.aten.sparse_sampled_addmm: sampled}
    cli.model.setup("fit")  # Forgets the features that it keeps, as at the start of a run.
    counter = FlopCounterMode(display=False, custom_mapping={**CPU_ATTENTION, **sparse})
    batches = data.probe_dataloader(60), data.probe_dataloader(6, interventions=True)
    probe.run(*batches, data.attributes, counter=counter)
    assert found["flops/probe"] == pytest.approx(counter.get_total_flops(), rel=0.01)


FLOPS = ("flops/step", "flops/image", "flops/probe")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_counting_changes_no_bit(fit, monkeypatch, tmp_path, precision):
    flags = [
        f"--trainer.precision={precision}",
        "--trainer.max_steps=3",
        "--trainer.accumulate_grad_batches=2",
    ]
    counted = fit(*flags)
    monkeypatch.setattr(RunRecord, "on_train_batch_start", lambda *args: None)
    plain = fit(*flags)
    for (name, a), b in zip(
        counted.model.adapter.state_dict().items(), plain.model.adapter.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    logs = [events(Path(cli.trainer.log_dir)) for cli in (counted, plain)]
    assert logs[0].Tags()["scalars"] == ["flops/step", "flops/image", *logs[1].Tags()["scalars"]]
    step, image = (logs[0].Scalars(tag)[0].value for tag in FLOPS[:2])
    assert step == 2 * 4 * image  # Two batches of four.


def test_an_error_in_the_first_step_ends_the_counting(fit, monkeypatch):
    from torch.utils._python_dispatch import _len_torch_dispatch_stack

    from lightning_limber.models.limber import Limber

    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Limber, "training_step", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        fit()
    assert _len_torch_dispatch_stack() == 0


def test_the_run_says_how_it_was_made(folder, cli):
    [start] = json.loads((folder / "run.json").read_text())
    assert start["images"] == {"train": 16, "held out": 60}
    assert (
        start["trained_parameters"]
        == sum(p.numel() for p in cli.model.adapter.parameters())
        == 24 * 32 + 32
    )
    assert start["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert start["from_step"] == 0
    assert start["command"].startswith("python ")


def test_a_resumed_run_adds_its_start(cli, folder, fit, tmp_path):
    import shutil

    copy = tmp_path / "runs/default/version_0"
    shutil.copytree(folder, copy)
    path = copy / "checkpoints/last.ckpt"
    fit(f"--ckpt_path={path}", "--trainer.max_steps=8", "--probe.every_n_epochs=0", base=False)
    assert [start["from_step"] for start in json.loads((copy / "run.json").read_text())] == [0, 4]


def test_detectors_come_with_descriptions(folder):
    with (folder / "detectors_epoch_1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        for kind in ("latent", "text_latent"):
            assert row[f"{kind}_description"] == f"references to {WORDS[int(row[kind]) % 10]} things"


def test_patch_maps_against_a_second_computation(cli):
    """One image at a time, by hooks set by hand; latents that match its words, strongest first."""
    from lightning_limber.data.scenes import SceneSet
    from lightning_limber.probe.patches import matching_latents

    model, probe = cli.model, sae_probe(cli).probe
    [loader] = [cli.datamodule.probe_dataloader(4)]
    batch = next(iter(loader))
    hook = "blocks.2.hook_resid_post"
    found_at = {}
    probe.latents(model.image_tokens(batch), found_at.__setitem__, [hook])
    latents = found_at[hook].nan_to_num()  # [B, P, K]
    maps = matching_latents(probe.descriptions[hook], latents, batch.captions, 0.1)
    model.eval()
    for i in range(4):
        record, kept = SceneSet("val", 60, 112, 0)[batch.index[i]], []
        assert record.captions == batch.captions[i]
        with torch.no_grad(), model.llm.residual_hooks({hook: kept.append}):
            image = model.adapter(model.vision(model.vision.transform(record.image)[None]))[0]
            prefix = model.llm.embed(torch.tensor(model.collator().prompt.prefix_ids))
            model.llm.decode(torch.cat([prefix, image])[None])
            expected = probe.saes[hook].encode(kept[0][0, len(prefix) :])
        torch.testing.assert_close(latents[i], expected, rtol=1e-4, atol=1e-4)
        said = record.captions[0].replace(".", "").split()
        activation_sum = {
            k: float(expected[:, k].sum())
            for k in range(10, 64)
            if WORDS[k % 10] in said and expected[:, k].sum() > 0
        }
        best = sorted(activation_sum, key=lambda k: -activation_sum[k])[:3]
        assert [found.latent for found in maps[i]] == best
        for found in maps[i]:
            assert found.description == f"references to {WORDS[found.latent % 10]} things"
            torch.testing.assert_close(found.activation, latents[i, :, found.latent])
    assert any(maps)


def test_the_report_of_a_real_run(folder, cli):
    report([str(folder), "-o", "out.html"])
    run = read_run(folder)
    assert run["epochs"] == [0, 1]
    assert run["summary"]["adapter"].startswith("Linear")
    assert "Scenes" in run["summary"]["data"]
    assert {"train/loss", "val/loss", "captions/all", "memory/peak_gb", *FLOPS} <= set(run["scalars"])
    history = sae_probe(cli).history[1]
    for row in history:
        if row.layer is not None and not row.metric.endswith("_p"):
            shown = run["curves"][row.metric][row.group][1][run["layers"].index(row.layer)]
            pairs = zip(shown, (row.value, row.low, row.high), strict=True)
            assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs)
    assert {"cider_d", "bleu_4", "rouge_l", "slots/all"} <= set(run["scores"][1])
    with np.load(folder / "images_epoch_1.npz") as file:
        hits, groups = file["probe/match"], file["probe/groups"].tolist()
    assert hits[groups.index("image"), :, :, 0].mean(-1).tolist() == pytest.approx(
        [value[0] for value in run["curves"]["match"]["image"][1]]
    )
    assert set(run["baselines"]) == {"most_frequent", "no_image"}
    assert len(run["gallery"][1]) == 4
    assert run["gallery"][1][0]["references"]
    assert run["patches"]["epoch"] == 1
    text = Path("out.html").read_text()
    assert "patches" in text
    assert len(text) < 3e6


# -- in a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(folder):
    """TensorBoard's own server, of the run."""
    from tensorboard.program import TensorBoard

    board = TensorBoard()
    board.configure([None, "--logdir", str(folder.parent), "--port", "0", "--host", "127.0.0.1"])
    return board.launch()


@pytest.mark.parametrize(
    ("tab", "shown"),
    {
        "timeseries": ["Overview", "1_loss", "5_excess"],
        "images": ["Overview/1_loss", "Overview/3_use"],
        "custom_scalars": ["held-out loss, nats a token"],
        "hparams": ["adapter", "batch_size", "data", "entry", "lr"],
    }.items(),
)
def test_tabs_show_the_run_without_an_error(browser, address, tab, shown):
    browser.open(f"{address}#{tab}")
    for text in shown:
        browser.wait(f"{ALL_TEXT}.includes({json.dumps(text)})")
    assert browser.errors == []
    assert all(asked.startswith(address) for asked in browser.requests)
