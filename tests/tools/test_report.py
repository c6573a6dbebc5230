"""The report: what is in a run's folder is in the page, and nothing else is needed to see it."""

from __future__ import annotations

import base64
import csv
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from process import run_cli

from lightning_limber.probe import palette
from lightning_limber.probe.finding import EXCESS, charts, sentences
from lightning_limber.probe.metrics import DEFAULT_METRICS, resolve_metrics
from lightning_limber.probe.tables import Row
from lightning_limber.tools.compare import INDEPENDENT, columns, comparison, in_brackets
from lightning_limber.tools.intervals import independent
from lightning_limber.tools.report import main, read_run, thin

PANELS = [panel for metric in resolve_metrics(DEFAULT_METRICS) for panel in metric.panels]
ENDS = ("value", "low", "high")
GROUPS = ("image", "caption", "text", "noise")
METRICS = [panel.metric for panel in PANELS]
METRICS += [f"excess_{metric}_over_words_long" for metric in EXCESS]
METRICS += "rel_error norm_ratio sparsity alive outliers variance".split()


def write_run(
    folder: Path, layers: int = 3, epochs: int = 2, groups: tuple[str, ...] = GROUPS, seed: int = 0
) -> Path:
    """A folder as a run leaves it, with smooth curves of random numbers."""
    from torch.utils.tensorboard import SummaryWriter

    draw = random.Random(seed)
    folder.mkdir(parents=True)
    with (folder / "probe.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow("run epoch layer group metric value low high".split())
        for metric in METRICS:
            for group in groups:
                start, end = draw.uniform(0.2, 1), draw.uniform(0.1, 0.9)
                for epoch in range(epochs + 1):
                    for layer in range(layers):
                        depth = layer / (layers - 1)
                        value = start + (end - start) * depth * epoch / epochs + draw.gauss(0, 0.01)
                        width = draw.uniform(0.01, 0.05)
                        row = (value, value - width, value + 2 * width)
                        table.writerow(["a/b", epoch, layer, group, metric, *row])
        for epoch in range(epochs + 1):
            table.writerow(
                ["a/b", epoch, "", "image", "convergence_layer/mse", "inf" if epoch == 0 else 2.0, 1, "inf"]
            )
            table.writerow(["a/b", epoch, 0, "image", "loss_recovered_p", 0.2, "", ""])
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow("run epoch writer metric value low high".split())
        for epoch in range(1, epochs + 1):
            table.writerow(["a/b", epoch, "model", "cider_d", 1.0 + 0.1 * epoch + seed, 0.9, 1.5])
            table.writerow(["a/b", epoch, "no_image", "cider_d", 0.25, 0.2, 0.3])
    (folder / "captions_baselines.json").write_text('{"no_image": "What <i>is</i> this?"}')
    shot = {
        "references": ["a </script> <b>red</b> circle"],
        "caption": "a blue & green square",
        "jpeg": "AAAA",
    }
    (folder / f"captions_epoch_{epochs}.jsonl").write_text(json.dumps(shot) + "\n")
    config = {"model": {"llm": "some/llm", "adapter": {"kind": "linear"}}, "seed_everything": 0}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML.
    with SummaryWriter(str(folder)) as writer:
        for step in range(1000):
            writer.add_scalar("train/loss", 1 / (1 + step), step)
        writer.add_scalar("val/loss", 0.5, 999)
        writer.add_scalar("fvu/image/layer_00", 0.5, 999)
    return folder


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


def test_the_page_holds_the_tables_numbers(tmp_path):
    main([str(write_run(tmp_path / "runs/a")), "-o", "out.html"])
    data = data_of(Path("out.html"))
    [run] = data["runs"]
    assert run["name"] == "runs/a"
    assert run["layers"] == [0, 1, 2]
    assert run["epochs"] == [0, 1, 2]
    with (tmp_path / "runs/a/probe.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["layer"] and not row["metric"].endswith("_p")]
    assert len(rows) == len(METRICS) * 4 * 3 * 3
    for row in rows:
        shown = run["curves"][row["metric"]][row["group"]][row["epoch"]][int(row["layer"])]
        assert shown == pytest.approx([float(row[name]) for name in ("value", "low", "high")], rel=1e-3)
    assert run["convergence"]["mse"] == {
        "0": ["never", 1, "never"],
        "1": [2, 1, "never"],
        "2": [2, 1, "never"],
    }
    assert "loss_recovered_p" not in run["curves"]
    assert run["scores"]["2"] == {"cider_d": [1.2, 0.9, 1.5]}
    blind = {"caption": "What <i>is</i> this?", "scores": {"cider_d": [0.25, 0.2, 0.3]}}
    assert run["baselines"] == {"no_image": blind}
    assert run["summary"]["LLM"] == "some/llm"
    assert run["gallery"]["2"][0]["references"] == ["a </script> <b>red</b> circle"]
    assert data["paper"]["curves"]["mse"]["image"][0] == pytest.approx(115.46, rel=1e-3)
    assert data["palette"]["colours"] == palette.COLOURS


def test_a_run_of_before_there_were_baselines(tmp_path):
    folder = write_run(tmp_path / "runs/a")
    (folder / "captions_baselines.json").unlink()
    (folder / "captions.csv").write_text("run,epoch,metric,value,low,high\na/b,1,cider_d,1.0,0.9,1.5\n")
    run = read_run(folder)
    assert run["scores"] == {1: {"cider_d": (1.0, 0.9, 1.5)}}
    assert run["baselines"] == {}


def test_training_curves_come_from_the_event_file(tmp_path):
    run = read_run(write_run(tmp_path / "runs/a"))
    assert set(run["scalars"]) == {"train/loss", "val/loss"}  # The probe's are in its table.
    points = run["scalars"]["train/loss"]
    assert len(points) == 200
    assert points[0] == (4, pytest.approx(sum(1 / n for n in range(1, 6)) / 5, rel=1e-6))
    assert points[-1][0] == 999


def test_thinning_keeps_every_point_once():
    points = [(i, float(i % 7)) for i in range(431)]
    parts = thin(points, 10)
    assert [step for step, _ in parts][-1] == 430
    assert len(parts) == 10
    assert thin(points[:10], 10) == points[:10]
    sizes = [b - a for a, b in zip([-1] + [s for s, _ in parts], [s for s, _ in parts], strict=False)]
    assert sum(size * value for size, (_, value) in zip(sizes, parts, strict=True)) == pytest.approx(
        sum(value for _, value in points)
    )


def test_the_page_asks_nothing_of_the_network(tmp_path):
    main([str(write_run(tmp_path / "a")), "-o", "out.html"])
    page = Path("out.html").read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert not re.findall(r"\b(?:fetch|XMLHttpRequest|import)\s*\(|@import|url\(https?:", page)
    assert page.count("<script") == page.count("</script>") == 2  # A caption that closes one is escaped.


def test_intervals_of_differences_cover(tmp_path):
    """Means of 40 exponential numbers against 25 normal ones, each with its own bootstrap interval."""
    import numpy as np

    draw, hits, trials = np.random.default_rng(0), 0, 1000

    def estimate(sample: np.ndarray) -> tuple[float, float, float]:
        means = draw.choice(sample, (400, len(sample))).mean(1)
        return (sample.mean(), *np.quantile(means, [0.025, 0.975]))

    for _ in range(trials):
        a, b = estimate(draw.exponential(1.0, 40)), estimate(draw.normal(0.3, 0.5, 25))
        value, low, high = independent(a, b)
        assert value == pytest.approx(a[0] - b[0])
        hits += low <= 0.7 <= high
    # Percentile intervals of means of so few cover about 92 to 93 %.
    assert 0.90 < hits / trials < 0.97
    assert independent((1.0, 0.7, 1.0), (0.0, 0.0, 0.4)) == (1.0, pytest.approx(0.5), 1.0)


def test_several_runs_are_compared_with_the_first(tmp_path):
    first, second = write_run(tmp_path / "x/a"), write_run(tmp_path / "y/a", layers=4, seed=1)
    second.parent.rename(tmp_path / "z")
    shutil.copytree(first, tmp_path / "w/x/a")
    main([str(first), str(tmp_path / "z/a"), str(tmp_path / "w/x/a"), "--out", "out.html"])
    data = data_of(Path("out.html"))
    names = [run["name"] for run in data["runs"]]
    assert names == ["x/a (1)", "z/a", "x/a (3)"]
    other, same = data["differences"]
    rows = other["metrics"]["fvu"]
    assert [row[0] for row in rows] == [0, 1, 2]  # The layers that both have.
    a, b = (run["curves"]["fvu"]["image"]["2"] for run in (data["runs"][1], data["runs"][0]))
    assert rows[1][1:] == pytest.approx(list(independent(a[1], b[1])), abs=2e-3)
    assert other["over"]["metrics/fvu"] == INDEPENDENT  # These runs kept no sums by image.
    assert other["scores"]["cider_d"][0] == 1.0
    assert all(row[1] == 0 and row[2] < 0 < row[3] for row in same["metrics"]["fvu"])


def test_several_runs_are_a_table_of_text(tmp_path, capsys):
    """Every cell is the run's own number; what no run has is no column."""
    folders = [write_run(tmp_path / f"{name}/v", layers, seed=i) for i, (name, layers) in enumerate(
        [("linear", 7), ("mlp", 7), ("deep", 9)]
    )]  # fmt: skip
    (folders[1] / "run.json").write_text('[{"trained_parameters": 12345}]')
    (folders[2] / "captions.csv").unlink()
    main([*map(str, folders), "-o", "out.html"])
    scores, probe, minus = capsys.readouterr().out.partition("MB, 3 run(s)\n\n")[2].split("\n\n")
    assert scores.splitlines()[0] == "held-out images, 95 % over images"
    head, *rows = (re.split("  +", line) for line in scores.splitlines()[1:])
    assert head == ["run", "parameters", "loss", "cider_d"]  # No accuracy, no slots, no seeds.
    assert rows == [
        ["linear/v", "0.500", "1.2 [0.9, 1.5]"],
        ["mlp/v", "12,345", "0.500", "2.2 [0.9, 1.5]"],
        ["deep/v", "0.500"],
    ]
    assert "over what the last column says (~: images, as independent)" in minus.splitlines()[0]
    head, *rows = (re.split("  +", line) for line in minus.splitlines()[1:])
    # 1 - hypot(1.3, 0.3), 1 + hypot(0.7, 0.3)
    assert dict(zip(head, rows[0], strict=False))["cider_d"] == "1 [-0.334, 1.76] ~"
    assert [row[0] for row in rows] == ["mlp/v", "deep/v"]
    assert all(cell.endswith(" ~") for row in rows for cell in row[1:])
    head, *rows = (re.split("  +", line) for line in probe.splitlines()[1:])
    # The middles of the thirds of layers 0 to 6, which all have.
    places = [1, 3, 5]
    assert head == ["run", *(f"{metric} @{i}" for metric in ("l0", "loss_recovered") for i in places)]
    for folder, (name, *cells) in zip(folders, rows, strict=True):
        run = read_run(folder)
        assert name == run["name"]
        expected = [
            run["curves"][metric]["image"][2][i] for metric in ("l0", "loss_recovered") for i in places
        ]
        assert [re.findall(r"[-\d.e]+", cell) for cell in cells] == [
            [f"{x:.3g}" for x in value] for value in expected
        ]


def test_runs_that_share_no_layer_and_what_was_not_measured(tmp_path, capsys):
    assert in_brackets((0.12345, math.nan, math.nan)) == "0.123"
    assert in_brackets((math.nan, 0.1, 0.2)) == in_brackets(None) == ""
    assert in_brackets((578.4, 560.0, 12345.6)) == "578 [560, 12346]"
    assert (
        columns([["run", "a", "b"], ["x", "", "1"], ["long", "", "22"]]) == "run    b\nx      1\nlong  22"
    )
    runs = [read_run(write_run(tmp_path / name)) for name in "ab"]
    runs[1]["layers"] = [7, 8, 9]
    title = "SAE probe of image tokens, by layer, 95 % over images"
    assert f"{title}\nrun\nr/a\nr/b\n".replace("r/", tmp_path.name + "/") in comparison(runs)


def test_a_folder_without_a_probe_is_named(tmp_path, capsys):
    write_run(tmp_path / "runs/default/version_0")
    with pytest.raises(SystemExit):
        main(["runs/default"])
    message = capsys.readouterr().err
    assert "'runs/default' has no probe.csv" in message
    assert "Did you mean runs/default/version_0?" in message


def test_the_subcommand_loads_no_torch(tmp_path):
    write_run(tmp_path / "a")
    code = (
        "import sys; from lightning_limber.tools.report import main; main(['a']); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    done = run_cli("report", "a", "-o", "b.html", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert Path("b.html").read_text() == Path("report.html").read_text()


def test_the_page_opens_with_the_finding(tmp_path):
    """The sentences and charts of the last probe's rows; in the page before the settings."""
    folder = write_run(tmp_path / "a")
    main([str(folder), "-o", "out.html"])
    page = Path("out.html").read_text()
    assert page.index('id="found"') < page.index('id="summary"') < page.index('id="training"')
    with (folder / "probe.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["layer"] and row["epoch"] == "2"]
    rows = [
        Row(int(row["layer"]), row["group"], row["metric"], *(float(row[end] or "nan") for end in ENDS))
        for row in rows
    ]
    finding = data_of(Path("out.html"))["runs"][0]["finding"]
    assert [chart["sentence"] for chart in finding] == sentences(rows)
    for found, chart in zip(finding, charts(rows), strict=True):
        assert found["title"] == chart.title
        assert found["lines"] == [line._asdict() for line in chart.lines] != []
        assert found["rules"] == [rule._asdict() for rule in chart.rules]


def test_a_run_without_the_finding_s_metrics(tmp_path):
    folder = write_run(tmp_path / "a")
    kept = [line for line in (folder / "probe.csv").read_text().splitlines() if ",fvu," in line]
    (folder / "probe.csv").write_text("\n".join(["run,epoch,layer,group,metric,value,low,high", *kept]))
    main([str(folder), "-o", "out.html"])
    finding = data_of(Path("out.html"))["runs"][0]["finding"]
    assert [(chart["sentence"], chart["lines"]) for chart in finding] == [("", [])] * 3


def test_patches_stand_beside_match_and_its_chance(tmp_path):
    """At the layer where `match` is highest, which is the one that is drawn, of the picture's epoch."""
    folder = write_run(tmp_path / "a")
    with (folder / "probe.csv").open("a") as file:
        for layer, value in enumerate((0.1, 0.4, 0.2)):
            rows = [("match", value - 5, 0, 1), ("match_chance", value / 4, 0, 1)]
            file.writelines(f"a/b,1,{layer},image,{name},{v},{a},{b}\n" for name, v, a, b in rows)
    assert read_run(folder)["patches"] is None
    for epoch in (0, 1):
        (folder / f"patches_epoch_{epoch}.jpg").write_bytes(b"jpeg %d" % epoch)
    assert read_run(folder)["patches"] == {
        **{"epoch": 1, "jpeg": base64.b64encode(b"jpeg 1").decode()},
        **{"layer": 1, "match": (-4.6, 0.0, 1.0), "chance": (0.1, 0.0, 1.0)},
    }
    only_fvu = [line for line in (folder / "probe.csv").read_text().splitlines() if "match" not in line]
    (folder / "probe.csv").write_text("\n".join(only_fvu))
    assert read_run(folder)["patches"]["match"] is None


def look(browser, page: str, script: str, width: int = 1280, height: int = 800):
    """The value of a script in the page, in a window of this size; the page's own scripts met no error."""
    browser.errors.clear()
    browser.open(Path(page).resolve().as_uri(), width, height)
    found = browser.run(script)
    assert not browser.errors
    return found


@pytest.mark.slow
def test_the_finding_is_on_the_first_screen(browser, tmp_path):
    """Of a desktop: sentences, charts and four pictures; of a phone: the sentences. Nothing is cut off."""
    folder = write_run(tmp_path / "a")
    shot = {"references": ["a small red circle on a pink background."], "caption": "a red circle."}
    lines = (json.dumps({**shot, "jpeg": "AAAA"}) for _ in range(6))
    (folder / "captions_epoch_2.jsonl").write_text("\n".join(lines))
    main([str(folder), "-o", "out.html"])
    script = """({
        bottom: [".three p", ".panel .plot svg", ".four .shot"].map(what =>
            [...document.querySelectorAll("#found " + what)].map(e => e.getBoundingClientRect().bottom)),
        width: document.documentElement.scrollWidth,
        drawn: document.querySelectorAll("#found circle").length})"""
    desktop = look(browser, "out.html", script)
    assert [len(bottoms) for bottoms in desktop["bottom"]] == [3, 3, 4]
    assert max(map(max, desktop["bottom"])) < 800
    # Layers of use, excess, lift and noise's lift; dotted lines have no dots.
    assert desktop["drawn"] == 3 * (1 + 1 + 2)
    phone = look(browser, "out.html", script, 390, 844)
    assert max(phone["bottom"][0]) < 844
    assert phone["width"] <= 390


@pytest.mark.slow
def test_each_seed_is_a_thin_line(browser, tmp_path):
    folders = [write_run(tmp_path / f"Linear-{seed}/v", seed=seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        config = json.loads((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(json.dumps({**config, "seed_everything": seed}))
    main([*map(str, folders), "-o", "out.html"])
    script = """[document.title, ...["#found .panel", "#main .plot", "#training .plot"].map(
        what => document.querySelector(what).querySelectorAll('path[stroke-width="1"]').length)]"""
    title, found, main_chart, training = look(browser, "out.html", script)
    assert title == "Linear (3 seeds)"
    assert found == 3 * 3  # use, harm_splice of image and of text
    assert main_chart == 3 * len(GROUPS)
    assert training == 3 * 2  # train/loss, val/loss


@pytest.mark.slow
def test_a_browser_draws_a_large_run(browser, tmp_path):
    """26 layers x 20 epochs x 6 groups: every part is drawn, no error is met."""
    groups = (*GROUPS, "padding", "prefix")
    main([str(write_run(tmp_path / "a", 26, 20, groups)), "-o", "out.html"])
    document = look(browser, "out.html", "document.documentElement.outerHTML")
    parts = dict(
        re.findall(
            r'<div[^>]* id="(main|heat|panels|training|convergence|gallery)"[^>]*>(.*?)(?=<h2|<h3 style)',
            document,
            re.S,
        )
    )
    assert parts["main"].count("<circle") == 26 * 6
    assert parts["heat"].count("<rect") == 26 * 21
    drawn = {panel["metric"] for panel in palette.read_panels(tmp_path / "a")} & {*METRICS}
    assert parts["panels"].count("<svg") == len(drawn) > 10
    assert "never" in parts["convergence"]
    assert "&lt;b&gt;red" in parts["gallery"]
    assert "What &lt;i&gt;is&lt;/i&gt; this?" in document
