"""A metric of a user's own, named by its path: its rows are wherever those of the shipped ones are."""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from parts import sae_probe
from process import REPO, run_cli

from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.probe.config import ProbeConfig, in_present_form
from lightning_limber.probe.figures import heatmap_figure, probe_figure
from lightning_limber.probe.metrics import (
    DEFAULT_METRICS,
    Panel,
    ProbeMetric,
    resolve_metric,
    resolve_metrics,
)
from lightning_limber.probe.palette import read_panels
from lightning_limber.probe.tables import Row
from lightning_limber.tools.report import main as report

CLASS_PATH = "my_parts.StrongLatents"
LABEL = "l0_strong: strong latents per token"
FULL = """
import torch
from lightning_limber.probe.metrics import Estimate, Group, Panel, ProbeMetric
from lightning_limber.probe.statistics import Comparison

def silence(model, batch, image_tokens):
    return torch.zeros_like(image_tokens)

class Everything(ProbeMetric):
    groups = (Group("silence", "image", silence),)
    activation_sums = ("silence",)
    panels = (Panel("harm", "harm of zeros"), Panel("norms", "norms", also=("harm", "harm")))

    def update(self, tokens):
        if tokens.group == "silence":
            return tokens.by_image(tokens.x.norm(dim=-1, keepdim=True))

    def intervene(self, run, hook):
        zeros = torch.zeros_like(run.image_tokens(hook))
        return run.losses(hook, zeros) - run.clean_losses

    def compute(self, data, found):
        for (group, hook), items in found.updates.items():
            total = float(sum(sums.sum() for _, sums in items))
            yield Estimate(data.layers[hook], group, "norms", (total, 0.0, 2 * total))
            comparison = Comparison(*(float(x) for x in (1, 0, 2, 0.5, 0.25, 0.75, 0.125)))
            yield Estimate(data.layers[hook], group, "made_up", comparison)
        for hook, items in found.interventions.items():
            yield Estimate(data.layers[hook], "image", "harm", torch.cat([harm for _, harm in items]))
            assert data.stats["silence", hook].activation_sum.shape == (10, 64)
        data.tables["mine"] = [{"layer": layer, "twice": 2 * layer} for layer in data.layers.values()]
        data.matrices["mine"] = {"sums": [[a + b for a in range(2)] for b in range(2)]}
"""


@pytest.fixture(scope="module")
def run(models, tmp_path_factory) -> Path:
    """Folder of a run of two epochs with the example's metric, made by the command line."""
    root = tmp_path_factory.mktemp("own")
    shutil.copy(REPO / "examples/my_parts.py", root)
    spec = f"{{class_path: {CLASS_PATH}, init_args: {{threshold: 0.0}}}}"
    done = run_cli(
        "fit", *tiny.arguments(models), "--trainer.max_steps=8", f"--probe.metrics+={spec}", cwd=root
    )
    assert done.returncode == 0, done.stdout
    return root / "runs/default/version_0"


@pytest.fixture
def my_parts(run, monkeypatch):
    """The example's module, where this process finds it."""
    monkeypatch.syspath_prepend(run.parents[2])
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    yield
    sys.modules.pop("my_parts", None)


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_rows_with_intervals_are_in_the_table(run):
    """With threshold 0 they are those of l0, to the bit, in every group, also text's of later epochs."""
    table = pd.read_csv(run / "probe.csv")
    found, expected = (
        table[table.metric == metric].drop(columns="metric").reset_index(drop=True)
        for metric in ("l0_strong", "l0")
    )
    assert len(found) == 3 * 2 * 5  # Epochs, layers, groups.
    order = ["epoch", "layer", "group"]
    found, expected = (t.sort_values(order).reset_index(drop=True) for t in (found, expected))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-12)
    assert found.low.lt(found.high).any()


def test_tensorboard_has_its_curves(run):
    log = events(run)
    for layer in (0, 2):
        assert log.Scalars(f"l0_strong/text/layer_{layer:02d}")
        tag = f"l0_strong/image/layer_{layer:02d}"
        assert [event.step for event in log.Scalars(tag)] == [0, 4, 8]
        l0 = log.Scalars(f"l0/image/layer_{layer:02d}")
        assert [event.value for event in log.Scalars(tag)] == [event.value for event in l0]
    assert log.Scalars("probe_seconds/StrongLatents")


def test_figures_have_its_panel(run):
    panels = [Panel(**panel) for panel in read_panels(run)]
    assert Panel("l0_strong", LABEL, log=True, by_epoch=True) in panels
    table = pd.read_csv(run / "probe.csv").drop(columns="run").astype({"layer": object})
    table["layer"] = [None if pd.isna(layer) else int(layer) for layer in table.layer]
    history = {
        epoch: [Row(*row[1:]) for row in rows.itertuples(index=False)]
        for epoch, rows in table.groupby("epoch")
    }
    figure = probe_figure(history, 2, panels, "title", "untrained adapter")
    axes = {axis.get_title(): axis for axis in figure.axes}
    assert len(axes) == 21  # Of shipped ones all but two: no descriptions, too few images for detectors.
    assert axes[LABEL].get_yscale() == "log"
    curves = {line.get_label(): list(line.get_ydata()) for line in axes[LABEL].lines}
    rows = [row for row in history[2] if (row.group, row.metric) == ("image", "l0_strong")]
    assert curves["image"] == [row.value for row in rows]
    groups = {"image", "caption", "text", "noise", "words_long"}
    assert groups | {"image, untrained adapter"} == set(curves)
    [own] = [panel for panel in panels if panel.label == LABEL]
    assert LABEL in [axis.get_title(loc="left") for axis in heatmap_figure(history, own).axes]


@pytest.mark.parametrize("count", [1, 5, 13, 23])
def test_figures_take_any_number_of_panels(count):
    rows = [Row(layer, "image", f"m{i}", i + layer, i, i + 9) for i in range(count) for layer in (0, 2)]
    rows += [Row(0, "mine", "m0", 1.0, 0.5, 2.0)]
    panels = [Panel(f"m{i}", f"metric {i}") for i in range(count)] + [Panel("absent", "not measured")]
    figure = probe_figure({0: rows}, 0, panels, "title", "control")
    assert [axis.get_title() for axis in figure.axes] == [f"metric {i}" for i in range(count)]
    figure.canvas.draw()
    extents = [axis.get_window_extent() for axis in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i])


def test_published_curves_say_which_tokens_they_are_of():
    rows = [Row(layer, group, "l0", 1, 1, 1) for layer in (0, 2) for group in ("image", "text")]
    figure = probe_figure({0: rows}, 0, [Panel("l0", "l0")], "title", "control", published=True)
    labels = {line.get_label() for line in figure.axes[0].lines}
    paper = "Venhoff et al., Gemma 2 2B"
    assert labels == {"image", "text", f"image, {paper}", f"text (whole prompts), {paper}"}


def test_the_report_draws_it(run, tmp_path):
    report([str(run), "-o", str(tmp_path / "out.html")])
    page = (tmp_path / "out.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    panel = data["palette"]["panels"]["l0_strong"]
    assert (panel["label"], panel["log"]) == (LABEL, True)
    [shown] = data["runs"]
    assert shown["curves"]["l0_strong"] == shown["curves"]["l0"]


def test_resumed_and_exported_runs_keep_it(run, fit, my_parts, tmp_path):
    """The command that resumes must name it: a file from elsewhere may not choose what is imported."""
    copy = tmp_path / "runs/default/version_0"
    shutil.copytree(run, copy)
    path = f"--ckpt_path={copy / 'checkpoints/last.ckpt'}"
    with pytest.raises(ValueError, match=rf"'{CLASS_PATH}' for probe.metrics.* name it in this command"):
        fit(path, "--trainer.max_steps=12", base=False)
    assert "my_parts" not in sys.modules
    fit("--output=export", path, command="export", base=False)
    assert (tmp_path / "export/probe.png").stat().st_size > 10_000
    assert "my_parts" not in sys.modules
    fit(path, "--trainer.max_steps=12", f"--probe.metrics+={CLASS_PATH}", base=False)
    table = pd.read_csv(copy / "probe.csv")
    assert set(table[table.metric == "l0_strong"].epoch) == {0, 1, 2, 3}


def test_in_python_it_must_have_been_imported(run, my_parts):
    from lightning_limber import load

    model = load(run, "cpu")
    image = Path("white.png")
    from PIL import Image

    Image.new("RGB", (32, 32), "white").save(image)
    arguments = ([image] * 3, ["a red circle .", "a dog .", "a cat ."])
    with pytest.raises(
        ValueError, match=rf"this adapter: its config names '{CLASS_PATH}' for probe.metrics"
    ):
        model.probe(*arguments)
    import my_parts  # noqa: F401

    table = model.probe(*arguments)
    assert list(table[table.metric == "l0_strong"].value) == pytest.approx(
        list(table[table.metric == "l0"].value)
    )


def test_everything_that_a_metric_can_ask_for(fit, tmp_path, monkeypatch):
    """A group of its own, items of both passes, each kind of estimate, a table and a matrix."""
    (tmp_path / "full_metric.py").write_text(FULL)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--probe.metrics=[full_metric.Everything]", "--trainer.max_steps=1", "--captions.num_images=0"]
    flags += ["--probe.log=all"]
    cli = fit(*flags, probe=True, figures=True)
    folder, model, probe = Path(cli.trainer.log_dir), cli.model, sae_probe(cli).probe
    table = pd.read_csv(folder / "probe.csv")
    table = table[table.epoch == 1].set_index(["layer", "group", "metric"])
    # A second computation: zeros in the image's place.
    norms = dict.fromkeys((0, 2), 0.0)
    for batch in cli.datamodule.probe_dataloader(10):
        kept: dict[str, torch.Tensor] = {}
        hooks = {hook: partial(kept.__setitem__, hook) for hook in probe.layers}
        with torch.no_grad(), model.llm.residual_hooks(hooks):
            model.decode(batch, ImageTokens(torch.zeros(len(batch.index), 4, 32)))
        for hook, layer in probe.layers.items():
            x = kept[hook].flatten(0, 1)[batch.groups["image"][0]]
            norms[layer] += float(x.norm(dim=-1)[probe.keep(hook, x)].sum())
    for layer in (0, 2):
        total = pytest.approx(norms[layer], rel=1e-5)
        assert list(table.loc[layer, "silence", "norms"][["value", "low", "high"]]) == [
            total,
            0,
            pytest.approx(2 * norms[layer], rel=1e-5),
        ]
        assert list(table.loc[layer, "silence", "made_up_chance"][["value", "low", "high"]]) == [
            0.5,
            0.25,
            0.75,
        ]
        assert table.loc[layer, "silence", "made_up_p"].value == 0.125
        assert table.loc[layer, "silence", "l0"].value > 0  # Geometry measures every group.
    assert (folder / "mine_epoch_1.csv").read_text().split() == ["epoch,layer,twice", "1,0,0", "1,2,4"]
    log = events(folder)
    assert "mine/sums" in log.Tags()["images"]
    assert "made_up/silence/layer_02" in log.Tags()["scalars"]
    assert not any(tag.startswith("made_up_p/") for tag in log.Tags()["scalars"])


# -- names and paths --------------------------------------------------------------------------------


def test_shipped_metrics_come_by_name_and_some_always():
    names = [metric.name for metric in resolve_metrics(DEFAULT_METRICS)]
    assert names == ["geometry", "shared", *DEFAULT_METRICS, "excess", "convergence"]
    assert [metric.name for metric in resolve_metrics(["convergence", "knn"])] == [
        *("geometry", "shared", "convergence", "knn", "excess"),
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kn", r"'kn' is none of geometry, shared, .*Give one of them, or the path of a class"),
        ("nowhere.Metric", r"cannot import 'nowhere.Metric': No module named 'nowhere'"),
        ("pathlib.Paht", r"cannot import 'pathlib.Paht'"),
        (
            "pathlib.Path",
            r"'pathlib.Path' is no subclass of lightning_limber.probe.metrics.base.ProbeMetric",
        ),
        ({"class_path": "knn", "init_args": {"k": 3}}, r"init_args of 'knn': got an unexpected .* 'k'"),
        ({"path": "knn"}, "is to have a class_path"),
        ({"class_path": "knn", "args": {}}, "is to have a class_path"),
    ],
)
def test_what_is_no_metric_is_said(spec, message):
    with pytest.raises(ValueError, match=f"probe.metrics: .*{message}"):
        resolve_metric(spec)


def test_two_metrics_may_not_define_a_group_differently(fit, tmp_path, monkeypatch):
    (tmp_path / "other_metric.py").write_text(
        FULL + "\nclass Other(ProbeMetric):\n    groups = (Group('noise', 'image', silence),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="two metrics define a group 'noise'"):
        fit("--probe.metrics=[noise,other_metric.Other]", probe=True)


def test_old_names_of_settings_still_work(fit):
    """Flags, and what a stored config says: there the present names of the command win."""
    cli = fit(
        "--probe.extras=[knn]", "--probe.costly_images=3", "--probe.text_gate=warn", "--trainer.max_steps=1"
    )
    config = sae_probe(cli).config
    assert (config.metrics, config.intervention_images, config.sanity_check) == (["knn"], 3, "warn")
    old = {"extras": ["knn"], "costly_images": 3, "text_gate": "off", "num_images": 5, "every_n_epochs": 2}
    assert ProbeConfig.of(old) == ProbeConfig(metrics=["knn"], intervention_images=3, sanity_check="off")
    assert in_present_form({"probe": {**old, "extras": ["a.B"]}})["probe"] == {
        **{"metrics": [{"class_path": "a.B"}], "intervention_images": 3, "sanity_check": "off"},
        **{"num_images": 5, "every_n_epochs": 2},
    }
    path = Path(cli.trainer.log_dir) / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    stored = checkpoint["lightning_limber"]["config"]
    assert "extras:" in stored  # As typed.
    del checkpoint["callbacks"]["SAEProbe"]["panels"]  # As before there were any.
    torch.save(checkpoint, path)
    again = fit(f"--ckpt_path={path}", "--probe.intervention_images=2", command="validate", base=False)
    config = sae_probe(again).config
    assert (config.metrics, config.intervention_images) == (["knn"], 2)


def test_a_shipped_metric_with_settings_is_kept(fit):
    """By its name: a file that carries its config may choose it, and its name alone adds no other."""
    spec = "{class_path: match, init_args: {strength: max}}"
    cli = fit(f"--probe.metrics=[knn,{spec}]", "--trainer.max_steps=1")
    path = f"--ckpt_path={cli.trainer.log_dir}/checkpoints/last.ckpt"
    again = fit(path, "--probe.metrics+=match", command="validate", base=False)
    config = sae_probe(again).config
    names = [metric.name for metric in config.make_metrics()]
    assert names == ["geometry", "shared", "knn", "match", "excess", "convergence"]
    assert config.make_metrics()[3].strength == "max"
    with pytest.raises(ValueError, match=r"init_args of 'match'.*'power'.*strength"):
        resolve_metric({"class_path": "match", "init_args": {"power": 2}})


def test_a_subclass_has_its_class_name():
    class Mine(ProbeMetric):
        pass

    assert Mine.name == "Mine"
    assert not Mine().update(None)
