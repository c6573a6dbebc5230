"""What a probe found, in sentences and in one figure of three panels; no number without its control.

    1. Where is the picture read?                   `use`, against 0
    2. Are image tokens nearer to text than         `excess_*_over_words_long`, against 0
       random words of their length?
    3. What do they say?                            `neighbour_lift`, against that of noise and words_long

Imports no torch: the report makes the same sentences of a run's table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning_limber.probe.palette import COLOURS, CONTROLS
from lightning_limber.probe.tables import Row
from lightning_limber.utils.figures import Chart, Level, Line, as_written, draw_chart, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEGLIGIBLE = 0.01
"""Share of the use at the first layer from which the picture still counts as read."""
LAYER, GREY = "layer of the LLM", COLOURS["control"]
EXCESS = {"cosine": "reconstruction (cosine)", "l0": "sparsity (l0)"}


class Point(NamedTuple):
    """A number at a layer, with its interval."""

    layer: int
    value: float
    low: float
    high: float


def points(rows: Iterable[Row], group: str, metric: str) -> list[Point]:
    """One metric of one group by layer, without NaN."""
    return [
        Point(row.layer, row.value, row.low, row.high)
        for row in rows
        if (row.group, row.metric) == (group, metric) and row.layer is not None and row.value == row.value
    ]


def at_layers(layers: Sequence[int], probed: Sequence[int]) -> str:
    """Probed layers in words: ``at layers 0 to 9 and 21``, ``at all layers``, ``nowhere``."""
    if not layers:
        return "nowhere"
    if len(layers) == len(probed) > 1:
        return "at all layers"
    runs: list[list[int]] = []
    for layer in layers:
        if runs and list(probed).index(layer) == list(probed).index(runs[-1][-1]) + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts: list[str] = []
    for run in runs:
        texts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    text = " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
    return f"at layer{'s' if len(layers) > 1 else ''} {text}"


def sentences(rows: Sequence[Row]) -> list[str]:
    """What beats its control, and what does not; of the metrics that were measured."""
    found = [_use(rows), *(_excess(rows, metric) for metric in EXCESS), _words(rows)]
    return [sentence for sentence in found if sentence]


def headline(rows: Sequence[Row]) -> str:
    """The largest of each finding with its control, in a line."""
    parts = []
    if use := points(rows, "image", "use"):
        parts.append(f"use {use[0].value:.2f} at layer {use[0].layer} (0: not read)")
    if lift := points(rows, "image", "neighbour_lift"):
        best = max(lift, key=lambda point: point.value)
        controls = [
            f"{group} {point.value:.2f}"
            for group in CONTROLS
            for point in points(rows, group, "neighbour_lift")
            if point.layer == best.layer
        ]
        parts.append(f"lift {best.value:.2f} at layer {best.layer} ({', '.join(controls) or 'chance 1'})")
    if excess := points(rows, "image", "excess_cosine_over_words_long"):
        best = max(excess, key=lambda point: point.value)
        parts.append(f"excess {best.value:.2f} at layer {best.layer} (words_long 0)")
    return ", ".join(parts)


def _use(rows: Sequence[Row]) -> str:
    use = points(rows, "image", "use")
    if not use:
        return ""
    first = use[0]
    enough = max(0.0, NEGLIGIBLE * first.value)
    read = [point.layer for point in use if point.low > 0 and point.value >= enough]
    if not read:
        return "Nothing is read from the picture: another picture does no certain harm at any layer."
    half = [point.layer for point in use if point.value < first.value / 2]
    where = at_layers(read, [point.layer for point in use])
    return (
        f"The picture is read {where}: another in its place costs {_number(first)} nats a token at layer "
        f"{first.layer}" + (f", and less than half of that at layer {half[0]}." if half else ".")
    )


def _excess(rows: Sequence[Row], metric: str) -> str:
    excess = points(rows, "image", f"excess_{metric}_over_words_long")
    if not excess:
        return ""
    beyond = [point.layer for point in excess if point.low > 0]
    where = at_layers(beyond, [point.layer for point in excess])
    best = max(excess, key=lambda point: point.value)
    words = "nearer to text than random words of their length"
    if not beyond:
        return f"In {EXCESS[metric]} image tokens are at no layer {words}."
    return (
        f"In {EXCESS[metric]} image tokens are {words} {where}: by {_number(best)} of the way at layer "
        f"{best.layer}."
    )


def _words(rows: Sequence[Row]) -> str:
    lift = points(rows, "image", "neighbour_lift")
    if not lift:
        return ""
    controls = [points(rows, group, "neighbour_lift") for group in CONTROLS]
    limit: dict[int, float] = {}
    for point in (point for of_group in controls for point in of_group):
        limit[point.layer] = max(limit.get(point.layer, 1.0), point.high)
    above = [point.layer for point in lift if point.low > limit.get(point.layer, 1.0)]
    where = at_layers(above, [point.layer for point in lift])
    best = max(lift, key=lambda point: point.value)
    beside = {
        group: next((point for point in of_group if point.layer == best.layer), None)
        for group, of_group in zip(CONTROLS, controls, strict=True)
    }
    controlled = ", ".join(f"{group} {point.value:.2f}" for group, point in beside.items() if point)
    return (
        f"The nearest words of image tokens are in the image's own captions {_number(best)} times as "
        f"often as in other images' at layer {best.layer}{f' ({controlled})' if controlled else ''}; above "
        f"chance and controls {where}."
    )


def _number(point: Point) -> str:
    if math.isnan(point.low):
        return f"{point.value:.2f}"
    return f"{point.value:.2f} [{point.low:.2f}, {point.high:.2f}]"


def finding_charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """By layer: where the picture is read, direction against controls, words."""
    image, text = COLOURS["image"], COLOURS["text"]
    read = [
        Line(points(rows, "image", "use"), image, "another picture in its place"),
        Line(points(rows, "image", "harm_splice"), image, "its SAE reconstruction in its place", ":"),
        Line(points(rows, "text", "harm_splice"), text, "text: SAE reconstruction", ":"),
    ]
    beyond = [
        Line(
            points(rows, "image", f"excess_{metric}_over_words_long"), image, f"image tokens, {name}", style
        )
        for (metric, name), style in zip(EXCESS.items(), ("-", ":"), strict=True)
    ]
    levels = [Level(0, COLOURS["words_long"], "random words of their length"), Level(1, text, "text")]
    lens = "neighbour_lift" if points(rows, "image", "neighbour_lift") else "lens_hit"
    words = [
        Line(points(rows, group, lens), COLOURS[group], group.replace("_", " "))
        for group in ("image", *CONTROLS)
    ]
    said, chance = "Nearest words in own captions, times chance", [Level(1, GREY, "other images' captions")]
    if lens == "lens_hit":
        said, chance = "The logit lens says a word of the caption", []
        words.append(Line(points(rows, "image", "lens_hit_chance"), GREY, "other captions", ":"))
    return {
        "use": Chart("Where the picture is read: nats lost a token", LAYER, read),
        "lift": Chart(said, LAYER, words, chance),
        "excess": Chart("Beyond length: 0 random words, 1 text", LAYER, beyond, levels),
    }


def finding_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """The three panels of `finding_charts` side by side."""
    figure = new_figure(13, 4.0 if title else 3.7)
    figure.subplots_adjust(left=0.04, right=0.99, top=0.82 if title else 0.88, bottom=0.13, wspace=0.14)
    charts = finding_charts(rows)
    for axis, name in zip(figure.subplots(1, 3), ("use", "excess", "lift"), strict=True):
        draw_chart(axis, charts[name])
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return as_written(figure)
