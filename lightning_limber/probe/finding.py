"""What a probe found, in three sentences and three charts; no number without its control.

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
from lightning_limber.utils import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEGLIGIBLE = 0.01
"""Share of the use at the first layer from which the picture still counts as read."""
EXCESS = {"cosine": "reconstruction", "l0": "sparsity"}
LABELS = {"image": "image tokens", "words_long": "random words of their length"}


class Point(NamedTuple):
    """A number at a layer, with its interval."""

    layer: int
    value: float
    low: float
    high: float


class Line(NamedTuple):
    """A metric of a group, by layer."""

    label: str
    group: str
    metric: str
    colour: str
    dotted: bool


class Chart(NamedTuple):
    """One panel of the figure: what it shows (if the numbers are there), and lines of what was measured."""

    title: str
    sentence: str
    lines: list[Line]
    rules: list[figures.Level]


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


def _excess(rows: Sequence[Row]) -> str:
    beyond: list[str] = []
    numbers: list[str] = []
    nowhere: list[str] = []
    for metric, name in EXCESS.items():
        excess = points(rows, "image", f"excess_{metric}_over_words_long")
        layers = [point.layer for point in excess if point.low > 0]
        if layers:
            best = max(excess, key=lambda point: point.value)
            beyond.append(f"in {name} {at_layers(layers, [point.layer for point in excess])}")
            numbers.append(f"{_number(best)} of the way ({metric}, layer {best.layer})")
        elif excess:
            nowhere.append(f"in {name} ({metric})")
    without = " and ".join(nowhere)
    if beyond:
        return (
            f"Image tokens are nearer to text than random words of their length {' and '.join(beyond)}: "
            f"by {' and '.join(numbers)}" + (f"; {without} at no layer." if without else ".")
        )
    nearer = "Image tokens are nowhere nearer to text than random words of their length"
    return f"{nearer}: {without} at no layer." if without else ""


def _words(rows: Sequence[Row]) -> str:
    lift = points(rows, "image", "neighbour_lift")
    if not lift:
        return ""
    controls = {group: points(rows, group, "neighbour_lift") for group in CONTROLS}
    limit: dict[int, float] = {}
    for point in (point for of_group in controls.values() for point in of_group):
        limit[point.layer] = max(limit.get(point.layer, 1.0), point.high)
    above = [point.layer for point in lift if point.low > limit.get(point.layer, 1.0)]
    best = max(lift, key=lambda point: point.value)
    beside = "".join(
        f"; {LABELS.get(group, group)} {point.value:.2f}"
        for group, of_group in controls.items()
        for point in of_group
        if point.layer == best.layer
    )
    often = f"{_number(best)} times as often as in other images' captions (layer {best.layer}{beside})"
    if not above:
        return (
            "The nearest words of image tokens are not those of the picture: at best they are in its own "
            f"captions {often}, which chance or a control reaches."
        )
    where = at_layers(above, [point.layer for point in lift])
    return f"The nearest words of image tokens are the picture's own {where}: in its captions {often}."


def _number(point: Point) -> str:
    if math.isnan(point.low):
        return f"{point.value:.2f}"
    return f"{point.value:.2f} [{point.low:.2f}, {point.high:.2f}]"


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Three by layer: where the picture is read, geometry against controls, words."""

    def line(label: str, group: str, metric: str, dotted: bool = False) -> Line:
        return Line(label, group, metric, COLOURS[group], dotted)

    def rule(label: str, group: str, value: float) -> figures.Level:
        return figures.Level(value, COLOURS[group], label)

    others = "other images' captions"
    read = Chart(
        "Where the picture is read: nats lost a token",
        _use(rows),
        [
            line("another picture in its place", "image", "use"),
            line("its SAE reconstruction in its place", "image", "harm_splice", dotted=True),
            line("text: its SAE reconstruction", "text", "harm_splice", dotted=True),
        ],
        [],
    )
    excess = Chart(
        "Beyond length: 0 random words, 1 text",
        _excess(rows),
        [
            line(f"image tokens, {name} ({metric})", "image", f"excess_{metric}_over_words_long", place > 0)
            for place, (metric, name) in enumerate(EXCESS.items())
        ],
        [rule(LABELS["words_long"], "words_long", 0), rule("text", "text", 1)],
    )
    words = Chart(
        "Nearest words in own captions, times chance",
        _words(rows),
        [line(LABELS.get(group, group), group, "neighbour_lift") for group in ("image", *CONTROLS)],
        [rule(others, "control", 1)],
    )
    if not points(rows, "image", "neighbour_lift"):
        lens = [line(LABELS.get(group, group), group, "lens_hit") for group in ("image", *CONTROLS)]
        lens.append(Line(others, "image", "lens_hit_chance", COLOURS["control"], True))
        words = Chart("The logit lens says a word of the caption", "", lens, [])
    return [_of_what_was_measured(chart, rows) for chart in (read, excess, words)]


def _of_what_was_measured(chart: Chart, rows: Sequence[Row]) -> Chart:
    lines = [line for line in chart.lines if points(rows, line.group, line.metric)]
    return chart._replace(lines=lines, rules=chart.rules if lines else [])


def sentences(rows: Sequence[Row]) -> list[str]:
    """What beats its control, and what does not, of what was measured: a claim, a colon, its numbers."""
    return [chart.sentence for chart in charts(rows) if chart.sentence]


def drawn_charts(rows: Sequence[Row]) -> list[figures.Chart]:
    """`charts`, with their points."""

    def drawn(line: Line) -> figures.Line:
        found = points(rows, line.group, line.metric)
        return figures.Line(found, line.colour, line.label, ":" if line.dotted else "-")

    return [
        figures.Chart(chart.title, "layer of the LLM", list(map(drawn, chart.lines)), chart.rules)
        for chart in charts(rows)
    ]


def finding_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """`charts`, side by side."""
    figure = figures.new_figure(13, 4.0 if title else 3.7)
    figure.subplots_adjust(left=0.04, right=0.99, top=0.82 if title else 0.88, bottom=0.13, wspace=0.14)
    for axis, chart in zip(figure.subplots(1, 3), drawn_charts(rows), strict=True):
        figures.draw_chart(axis, chart)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figures.as_written(figure)
