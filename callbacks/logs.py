"""What loggers get: numbers, figures, tables, TensorBoard's charts and hyper-parameters.

Every figure is a PNG in the run's folder too, so that none depends on a logger.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams

from lightning_limber.probe.palette import Panel, ordered_groups
from lightning_limber.probe.tables import Row, overview_layers
from lightning_limber.utils.bootstrap import interval_tags
from lightning_limber.utils.figures import as_picture
from lightning_limber.utils.files import write_whole

HPARAM_METRICS = ("val/loss", "val/loss_shuffled", "val/accuracy", "captions/cider_d", "captions/all")


def log_numbers(trainer: Any, numbers: Mapping[str, float]) -> None:
    """Hands numbers by tag to every logger, at the present step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step=trainer.global_step)


def log_figure(trainer: Any, tag: str, figure: Any, epoch: int) -> None:
    """Hands a matplotlib figure to every logger that takes pictures (TensorBoard, W&B), and writes it as
    ``figures/{tag}_epoch_{n}.png`` into the run's folder. None is left out.
    """
    if figure is None:
        return
    picture, png = as_picture(figure), io.BytesIO()
    picture.save(png, "PNG")  # Once: TensorBoard's `add_image` would make another.
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_image"):
            width, height = picture.size
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=png.getvalue()
            )
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            logger.experiment._get_file_writer().add_summary(summary, trainer.global_step)
        elif hasattr(logger, "log_image"):
            logger.log_image(tag, [picture], step=trainer.global_step)
    if trainer.run_folder and not trainer.fast_dev_run:
        name = f"{tag.lower().replace('/', '_')}_epoch_{epoch}.png"
        path = Path(trainer.run_folder) / "figures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda part: part.write_bytes(png.getvalue()))


def log_table(trainer: Any, tag: str, table: Any) -> None:
    """Hands a data frame to every logger that takes tables (W&B)."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(tag, dataframe=table, step=trainer.global_step)


def log_layout(trainer: Any, rows: Sequence[Row], panels: Sequence[Panel], details: bool) -> None:
    """Lays out the charts in every logger that can (TensorBoard: the first layout of a run counts)."""
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_custom_scalars"):
            logger.experiment.add_custom_scalars(chart_layout(rows, panels, details))


def headline_rows(rows: Sequence[Row]) -> list[Row]:
    """Image tokens' rows that have a chart with their interval: `use` where it is largest, at the first
    layer, and lift and excess in the middle.
    """
    layers = overview_layers(rows)
    at = {
        "use": layers[:1],
        "neighbour_lift": layers[len(layers) // 2 :][:1],
        "excess_cosine_over_words_long": layers[len(layers) // 2 :][:1],
    }
    found = [row for row in rows if row.group == "image" and row.layer in at.get(row.metric, ())]
    return sorted(found, key=lambda row: list(at).index(row.metric))


def chart_layout(rows: Sequence[Row], panels: Sequence[Panel], details: bool) -> dict[str, dict[str, list]]:
    """TensorBoard's CUSTOM SCALARS: headline numbers with their intervals; with `details` also one
    metric's layers in one chart, and one layer's groups in one chart.

    TensorBoard leaves the highest and the lowest of a chart's few points out of its range, as outliers.
    In the charts with intervals these are ends of intervals, so that the line itself is never cut.
    """
    titles = {
        "val/loss": "held-out loss, nats a token",
        "captions/all": "captions: share of right slots",
        "captions/cider_d": "captions: CIDEr-D",
        **{f"{row.metric}/image/layer_{row.layer:02d}": _title(row) for row in headline_rows(rows)},
    }
    # Of charts with intervals TensorBoard shows the last one first.
    layout: dict[str, dict[str, list]] = {
        "overview": {
            title: ["Margin", [tag, *interval_tags(tag, (0.0, 0.0, 0.0))]]
            for tag, title in reversed(titles.items())
        }
    }
    if not details:
        return layout
    layers = sorted({row.layer for row in rows if row.layer is not None})
    measured = {row.metric for row in rows}
    labels = {panel.metric: panel.label for panel in panels if panel.metric in measured}
    groups = "|".join(ordered_groups(row.group for row in rows))
    layout["image tokens, all layers"] = {
        label: ["Multiline", [rf"{metric}/image/layer_\d+$"]] for metric, label in labels.items()
    }
    for layer in layers:
        layout[f"layer {layer:02d}, all groups"] = {
            label: ["Multiline", [f"{metric}/({groups})/layer_{layer:02d}$"]]
            for metric, label in labels.items()
        }
    return layout


def _title(row: Row) -> str:
    return f"{row.metric.replace('_', ' ')}, layer {row.layer}"


def hyper_parameters(module: Any, data: Any) -> dict[str, Any]:
    """What tells runs apart in TensorBoard's HPARAMS, which opens on the first five by name; all settings
    are in the run's ``config.yaml``.
    """
    settings = module.hparams
    adapter, entry = settings["adapter"], settings["entry"]
    parts = {name: value for name, value in entry.items() if name != "layer"}
    return {
        "adapter": _in_words(adapter["class_path"].rpartition(".")[2], adapter.get("init_args") or {}),
        "batch_size": data.batch_size,
        "data": type(data).__name__,
        "entry": _in_words(f"layer {entry['layer']}", parts),
        "lr": settings["optimizer"]["lr"],
    }


def _in_words(name: str, settings: Mapping[str, Any]) -> str:
    """A name and the settings that are switched on."""
    given = [
        key if value is True else f"{key} {value}"
        for key, value in settings.items()
        if value not in (None, False, "none", [], 0)
    ]
    return ", ".join([name, *given])


def hparam_summaries(module: Any, data: Any) -> tuple[Any, ...]:
    """Summaries of TensorBoard that open and that end a session of the run.

    Not by log_hyperparams, which also logs the metrics as scalars of step 0, nor by add_hparams, which
    makes a run of its own. The tab shows the newest value of each metric.
    """
    return hparams(hyper_parameters(module, data), dict.fromkeys(HPARAM_METRICS, 0.0))


def add_summaries(trainer: Any, *summaries: Any) -> None:
    """Writes summaries into every logger that has hyper-parameters so (TensorBoard)."""
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_hparams"):
            for summary in summaries:
                logger.experiment._get_file_writer().add_summary(summary)
