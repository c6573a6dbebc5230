"""``python -m lightning_limber report RUN [RUN ...] -o report.html``: what runs found, as one HTML file.

Several runs are also compared as text, on the standard output.

The file holds its data and its script and asks nothing of the network. It is made from what a run leaves in
its folder: ``probe.csv``, ``probe_panels.json``, ``validation.csv``, ``captions.csv``,
``captions_baselines.json``, ``captions_epoch_*.jsonl``, ``detectors_epoch_*.csv``,
``patches_epoch_*.jpg``, ``explorer_epoch_*.gz``, ``images_epoch_*.npz``, ``config.yaml``, ``run.json`` and
the event files of TensorBoard; no torch is loaded.
"""

from __future__ import annotations

import base64
import csv
import html
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lightning_limber.assets import ASSETS
from lightning_limber.probe import palette
from lightning_limber.probe.finding import Chart, charts
from lightning_limber.probe.tables import Row
from lightning_limber.tools.compare import Run, by_seed, comparison, differences, numbered
from lightning_limber.tools.explorer_section import explorer_section
from lightning_limber.tools.intervals import Interval
from lightning_limber.tools.seeds import merged
from lightning_limber.utils.adapter_config import upgrade_adapter
from lightning_limber.utils.commands import Parser
from lightning_limber.utils.files import in_words, read_as, write_text

SCALARS = ("train/", "val/", "captions/", "captions_chance/", "probe_seconds/", "memory/", "flops/")
MATCH = ("match", "match_chance")
MAX_POINTS = 200
"""Longer training curves are drawn as means of this many equal parts."""


def main(args: list[str] | None = None) -> None:
    parser = Parser("lightning_limber report", description="Makes one HTML file of runs.")
    text = "A run's folder, such as runs/default/version_0; several are compared with the first."
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help=text)
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="Default: report.html.")
    options = parser.parse_args(args)
    try:
        runs = [read_run(folder) for folder in options.runs]
        page = render(runs)
        write_text(options.out, page)
        print(f"[report] {options.out}: {len(page.encode()) / 1e6:.2f} MB, {len(options.runs)} run(s)")
        if len(runs) > 1:
            print(f"\n{comparison(runs)}")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {in_words(error)}\n")


def render(runs: list[Run]) -> str:
    """The page, on which runs that differ in their seed alone are one."""
    tell_apart(runs)
    by_group = by_seed(runs)
    shown = [merged(group) for group in by_group]
    tell_apart(shown)
    for run in shown:
        run["finding"] = [chart_data(chart) for chart in charts(newest_rows(run))]
    paper = palette.published_curves()
    groups = palette.ordered_groups(group for run in runs for group in run["groups"])
    data = {
        "palette": {
            "colours": palette.COLOURS | groups,
            "panels": {panel["metric"]: panel for run in reversed(runs) for panel in run["panels"]},
            "paper": palette.PAPER_NAME,
        },
        "paper": {key: paper[key] for key in ("layers", "curves", "legend", "convergence_layer")},
        "runs": [{name: value for name, value in run.items() if name != "folder"} for run in shown],
        "differences": [differences(group, by_group[0]) for group in by_group[1:]],
        "since_start": [differences(group, group, (-1, 0)) for group in by_group],
        "comparison": comparison(runs) if len(shown) > 1 else "",
    }
    template = (ASSETS / "report.html").read_text(encoding="utf-8")
    # A caption may hold "</script>"; an escaped slash is the same JSON.
    text = json.dumps(plain(data), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    title = html.escape(", ".join(run["name"] for run in shown))
    explorer = explorer_section((run["name"], run["folder"]) for run in shown)
    page = template.replace("{{EXPLORER}}", explorer, 1)
    return page.replace("{{TITLE}}", title, 1).replace("{{DATA}}", text, 1)


def tell_apart(runs: Sequence[Run]) -> None:
    """Numbers those of one name."""
    for run, name in zip(runs, numbered([run["name"] for run in runs]), strict=True):
        run["name"] = name


def newest_rows(run: Run) -> list[Row]:
    """What the last probe measured by layer."""
    last = run["epochs"][-1]
    return [
        Row(layer, group, metric, *found)
        for metric, of_metric in run["curves"].items()
        for group, by_epoch in of_metric.items()
        for layer, found in zip(run["layers"], by_epoch.get(last, ()), strict=False)
        if found
    ]


def chart_data(chart: Chart) -> dict[str, Any]:
    lines, rules = ([one._asdict() for one in of] for of in (chart.lines, chart.rules))
    return {**chart._asdict(), "lines": lines, "rules": rules}


def plain(value: Any) -> Any:
    """What JSON can hold: floats of 4 digits, NaN as null, infinity (a layer never reached) as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return "never" if value > 0 else None
        return float(f"{value:.4g}")
    return value


# -- what a run left ----------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """All that the report shows of one run.

    Raises:
        FileNotFoundError: the folder does not exist or no probe has written to it.
    """
    if not (folder / "probe.csv").is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/probe.csv"))
        hint = f" Did you mean {' or '.join(inside)}?" if inside else ""
        raise FileNotFoundError(
            f"'{folder}' has no probe.csv: give the folder of a run whose SAE probe has run, such as "
            f"runs/default/version_0.{hint}"
        )
    config, record = folder / "config.yaml", folder / "run.json"
    settings = read_as(config, read_text) if config.is_file() else ""
    baselines = folder / "captions_baselines.json"
    words = read_as(baselines, read_json) if baselines.is_file() else {}
    scalars, seconds = read_scalars(folder)
    return {
        "folder": folder,
        "name": f"{folder.resolve().parent.name}/{folder.resolve().name}",
        "summary": read_as(config, lambda _: summary(yaml.safe_load(settings) or {})),
        "config": settings,
        "starts": read_as(record, read_json) if record.is_file() else [],
        "scalars": scalars,
        "seconds": seconds,
        "panels": read_as(folder / palette.PANELS_FILE, lambda _: palette.read_panels(folder)),
        **(probe := read_as(folder / "probe.csv", read_probe)),
        "held_out": read_as(folder / "validation.csv", read_validation),
        **read_as(folder / "captions.csv", lambda table: read_scores(table, words)),
        "gallery": {
            epoch_of(path): read_as(path, read_lines) for path in folder.glob("captions_epoch_*.jsonl")
        },
        "patches": newest_patches(folder, probe),
        "detectors": {
            epoch_of(path): read_as(path, read_rows) for path in folder.glob("detectors_epoch_*.csv")
        },
    }


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(read_text(path))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in read_text(path).splitlines()]


def epoch_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def newest_patches(folder: Path, probe: Run) -> dict[str, Any] | None:
    """The picture of the last epoch that has one, as base64, with `match` at its layer: that where `match`
    is highest.
    """
    found = sorted(folder.glob("patches_epoch_*.jpg"), key=epoch_of)
    if not found:
        return None
    epoch = epoch_of(found[-1])
    match, chance = (probe["curves"].get(name, {}).get("image", {}).get(epoch, []) for name in MATCH)
    by_layer = list(zip(probe["layers"], match, chance, strict=False))
    layer, value, by_chance = max(
        (one for one in by_layer if one[1]), key=lambda one: one[1][0], default=(None, None, None)
    )
    return {
        **{"epoch": epoch, "jpeg": base64.b64encode(found[-1].read_bytes()).decode()},
        **{"layer": layer, "match": value, "chance": by_chance},
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def interval(row: dict[str, str]) -> Interval:
    """A row of a tidy table; an empty field is NaN."""
    value, low, high = (float(row[name] or "nan") for name in ("value", "low", "high"))
    return value, low, high


def read_probe(path: Path) -> dict[str, Any]:
    """The tidy table as ``curves[metric][group][epoch]``: an interval for each of ``layers``, or None; and
    ``convergence[metric][epoch]``.
    """
    rows = [row for row in read_rows(path) if not row["metric"].endswith("_p")]
    layers = sorted({int(row["layer"]) for row in rows if row["layer"]})
    place = {layer: i for i, layer in enumerate(layers)}
    curves: dict[str, dict[str, dict[int, list]]] = defaultdict(lambda: defaultdict(dict))
    convergence: dict[str, dict[int, Interval]] = defaultdict(dict)
    for row in rows:
        epoch = int(row["epoch"])
        if row["layer"]:
            curve = curves[row["metric"]][row["group"]].setdefault(epoch, [None] * len(layers))
            curve[place[int(row["layer"])]] = interval(row)
        elif row["metric"].startswith("convergence_layer/") and row["group"] == "image":
            convergence[row["metric"].partition("/")[2]][epoch] = interval(row)
    epochs = sorted({int(row["epoch"]) for row in rows})
    groups = list(dict.fromkeys(row["group"] for row in rows))
    return {
        **{"layers": layers, "epochs": epochs, "groups": groups},
        **{"curves": curves, "convergence": convergence},
    }


def read_validation(table: Path) -> dict[int, dict[str, Interval]]:
    """Held-out loss and accuracy by epoch and metric: the last validation of each epoch."""
    found: dict[int, dict[str, Interval]] = defaultdict(dict)
    for row in read_rows(table) if table.is_file() else []:
        found[int(row["epoch"])][row["metric"]] = interval(row)
    return found


def read_scores(table: Path, words: dict[str, str]) -> dict[str, Any]:
    """Caption scores as ``scores[epoch][metric]``; and what is reached without looking,
    ``baselines[writer]``: the one caption (of `words`) and its scores.
    """
    scores: dict[int, dict[str, Interval]] = defaultdict(dict)
    blind: dict[str, dict[str, Interval]] = defaultdict(dict)
    for row in read_rows(table) if table.is_file() else []:
        # Runs of before there were baselines have no writers.
        writer = row.get("writer", "model")
        of_writer = scores[int(row["epoch"])] if writer == "model" else blind[writer]
        of_writer[row["metric"]] = interval(row)
    baselines = {writer: {"caption": words.get(writer, ""), "scores": of} for writer, of in blind.items()}
    return {"scores": scores, "baselines": baselines}


def read_scalars(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], float]:
    """Curves of the event files, thinned, and the seconds from the first to the last of their points.

    A break between a run's end and its resumption counts.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    log.Reload()
    events = {tag: log.Scalars(tag) for tag in log.Tags()["scalars"] if tag.startswith(SCALARS)}
    times = [event.wall_time for of_tag in events.values() for event in of_tag]
    curves = {tag: thin([(event.step, event.value) for event in of]) for tag, of in events.items()}
    return curves, max(times) - min(times) if times else 0.0


def thin(points: Sequence[tuple[int, float]], count: int = MAX_POINTS) -> list[tuple[int, float]]:
    """At most `count` points: means of parts of (nearly) equal length, each at its last step."""
    if len(points) <= count:
        return list(points)
    ends = [round(len(points) * i / count) for i in range(count + 1)]
    parts = [points[a:b] for a, b in pairwise(ends)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def summary(config: dict[str, Any]) -> dict[str, str]:
    """What was trained on what, in a reader's words; settings that a config lacks are left out."""
    if adapter := config.get("model", {}).get("adapter"):
        config = {**config, "model": {**config["model"], "adapter": upgrade_adapter(adapter)}}

    def get(path: str, value: Any = config) -> Any:
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def options(path: str, names: str | None = None) -> str:
        found = {name: get(f"{path}.{name}") for name in (names or " ".join(get(path) or ())).split()}
        return ", ".join(
            str(value) if name in ("name", "sae_release", "max_steps") else f"{name} {value}"
            for name, value in found.items()
            if value not in (None, False)
        )

    def with_class(path: str, names: str | None = None) -> str:
        name = str(get(f"{path}.class_path") or "").rpartition(".")[2]
        return ", ".join(filter(None, (name, options(f"{path}.init_args", names))))

    sources = "root annotations images shards path name train_size val_size"
    lines = {
        "vision encoder": options("model.vision", "name image_size layer pool"),
        "LLM": str(get("model.llm") or ""),
        "adapter": with_class("model.adapter"),
        "started from": str(get("model.adapter_weights") or ""),
        "prompt": str(get("model.prompt") or ""),
        "data": with_class("data", sources),
        "batch": options("data.init_args", "batch_size captions_per_image"),
        "optimiser": options("model.optimizer", "lr min_lr_ratio warmup_steps weight_decay"),
        "steps": options("trainer", "max_steps accumulate_grad_batches gradient_clip_val precision"),
        "SAEs": options("probe", "sae_release sae_id"),
        "probed images": options("probe", "num_images intervention_images costly_images"),
        "seed": str(get("seed_everything")) if config else "",
    }
    return {name: line for name, line in lines.items() if line}
