"""What a grid's runs found, as ``README.md``, ``grid.csv`` and a figure in the grid's folder.

Every arm is compared with the base arm, endpoint by endpoint, by the statistics of intervals.py.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_limber.probe.palette import COLOURS, design_styles
from lightning_limber.tools.compare import Key, Run, in_brackets, same_images, table_value
from lightning_limber.tools.grid_file import Grid
from lightning_limber.tools.intervals import Interval, TwoLevel, holm, levels
from lightning_limber.tools.report import read_probe, read_scores, read_validation
from lightning_limber.utils.figures import as_written, new_figure
from lightning_limber.utils.files import write_text, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SURE = 0.05
"""An adjusted p-value below it makes a sentence."""
FIGURE = "loss_against_meaning.png"
IMAGES_AND_SEEDS, IMAGES, SEEDS, NOTHING = "images and seeds", "images", "seeds", ""
ANCHORS = ("noise", "words_long", "words", "told")
"""Groups of tokens that the probe puts in the image's place."""
LINES = {"chance": ":", "untrained": "-."}
"""Styles of anchors of one colour."""
NO_PROBE: Run = {"layers": [], "epochs": [], "groups": [], "curves": {}, "convergence": {}}
HOW = """\
## How to read it

Intervals are of 95 %. `over` says what they contain. *images and seeds*: another draw of held-out images
and other seeds of training; differences are paired over images, for each bootstrap sample draws the same
ones for all runs. *images*: an arm has one seed, of which nothing follows for others. *seeds*: Student's t
over the seeds' values, for numbers that are no ratio of sums over images; other images are not in it.

The p-value is 1 less the level at which the interval would just reach 0; p (Holm) is adjusted for the
number of arms within the endpoint, and the sentences above go by p (Holm) < 0.05. `-`: not measured, as
below the layer at which image tokens enter.
"""


class Found(NamedTuple):
    """An arm at an endpoint."""

    arm: str
    seeds: int
    mean: Interval | None
    minus_base: Interval | None
    p: float
    p_holm: float
    over: str


def write_page(grid: Grid, folders: Mapping[str, Sequence[Path]], choices: Mapping[str, Any]) -> None:
    """Writes what is known so far.

    Args:
        grid: The grid.
        folders: Folders of the runs that are over, by arm; the base arm has some.
        choices: What was chosen for each arm, of what.

    Raises:
        ValueError: no run has an endpoint.
    """
    runs = {arm: [read_folder(folder) for folder in of_arm] for arm, of_arm in folders.items()}
    tables = {name: measure(runs, grid.base, key_of(name)) for name in grid.endpoints}
    for name, table in tables.items():
        if all(found.mean is None for found in table):
            raise ValueError(
                f"{grid.file}: endpoints: no run has {name}. {known(sum(runs.values(), []), name)}"
            )
    lines = [f"# {grid.file.stem}", "", *sentences(tables, grid.base), ""]
    if len(grid.endpoints) > 1:
        x, *others = grid.endpoints
        picture = figure(runs, grid.base, x, others)
        write_whole(grid.folder / FIGURE, lambda part: picture.savefig(part, dpi=150))
        lines += [f"![Endpoints against {x}, a dot a run]({FIGURE})", ""]
    for name, table in tables.items():
        lines += [f"## {name}", "", *markdown(table, grid.base), ""]
    lines += [HOW, "## Arms", "", *arms(grid, choices)]
    write_text(grid.folder / "README.md", "\n".join(lines) + "\n")
    write_text(grid.folder / "grid.csv", tidy(tables))


# -- numbers ------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> Run:
    """What the endpoints need of a run; its probe may be off."""
    probe = folder / "probe.csv"
    return {
        "folder": folder,
        **(read_probe(probe) if probe.is_file() else NO_PROBE),
        "held_out": read_validation(folder / "validation.csv"),
        **read_scores(folder / "captions.csv", {}),
    }


def key_of(endpoint: str) -> Key:
    """``probe/neighbour_lift@3`` as ("probe", "neighbour_lift", 3)."""
    part, _, metric = endpoint.partition("/")
    metric, _, layer = metric.partition("@")
    return part, metric, int(layer) if layer else None


def known(runs: Sequence[Run], endpoint: str) -> str:
    """What could have been asked for in an endpoint's place."""
    part, _, layer = key_of(endpoint)
    if part == "probe":
        names = {metric for run in runs for metric in run["curves"]}
    else:
        kept = "scores" if part == "captions" else part
        names = {metric for run in runs for of_epoch in run[kept].values() for metric in of_epoch}
    layers = sorted({number for run in runs for number in run["layers"]})
    at = f" at layers {', '.join(map(str, layers))}" if layer is not None else ""
    return f"Measured are {', '.join(sorted(names)) or 'none'}{at}."


def level_of(groups: Sequence[Sequence[Run]], key: Key) -> tuple[TwoLevel, str] | None:
    """The mean of a group of runs over its seeds, or the first's minus the second's, and what its interval
    is over; None where a run has no number.
    """
    values = [[table_value(run, -1, key) for run in runs] for runs in groups]
    flat = [math.nan if one is None else one[0] for of_group in values for one in of_group]
    if not all(groups) or np.isnan(flat).any():
        return None
    several = min(map(len, groups)) > 1
    if sums := same_images(groups, [-1] * len(groups), key):
        return levels(*sums), IMAGES_AND_SEEDS if several else IMAGES
    seeds = [np.array([one[0] for one in of_group]) for of_group in values]  # type: ignore[index]
    value = float(seeds[0].mean() - (seeds[1].mean() if len(seeds) > 1 else 0))
    return TwoLevel(value, value, value, seeds), SEEDS if several else NOTHING


def measure(runs: Mapping[str, Sequence[Run]], base: str, key: Key) -> list[Found]:
    """All arms at an endpoint."""
    rows = []
    for arm, ours in runs.items():
        mean = level_of([ours], key)
        minus = level_of([ours, runs[base]], key) if arm != base else None
        over = (minus or mean or (None, NOTHING))[1]
        p = minus[0].p() if minus and over else math.nan
        rows.append(Found(arm, len(ours), ends(mean), ends(minus), p, math.nan, over))
    tested = [place for place, row in enumerate(rows) if not math.isnan(row.p)]
    for place, adjusted in zip(tested, holm([rows[place].p for place in tested]), strict=True):
        rows[place] = rows[place]._replace(p_holm=adjusted)
    return rows


def ends(found: tuple[TwoLevel, str] | None) -> Interval | None:
    if found is None:
        return None
    level, over = found
    return level.interval() if over else (level.value, math.nan, math.nan)


# -- as text ------------------------------------------------------------------------------------------


def sentences(tables: Mapping[str, Sequence[Found]], base: str) -> Iterator[str]:
    """What the numbers say, differences that are not shown included."""
    sides: dict[str, dict[str, list[str]]] = {}
    for name, table in tables.items():
        side = sides[name] = {"lower": [], "higher": [], "no difference shown": [], "not tested": []}
        for row in table:
            if row.arm == base:
                continue
            if row.minus_base is None or math.isnan(row.p):
                side["not tested"].append(row.arm)
            elif row.p_holm >= SURE:
                side["no difference shown"].append(row.arm)
            else:
                side["lower" if row.minus_base[0] < 0 else "higher"].append(row.arm)
        words = [f"{what}: {', '.join(arms) or 'none'}" for what, arms in side.items()]
        yield f"- **{name}** against {base}: {'; '.join(words[:3] if not side['not tested'] else words)}."
    if len(tables) > 1:
        x, y, *_ = tables
        both = [arm for arm in sides[x]["lower"] if arm in sides[y]["higher"]]
        yield f"- Lower {x} and higher {y} than {base}: {', '.join(both) or 'none'}."


def markdown(table: Sequence[Found], base: str) -> Iterator[str]:
    yield f"| arm | seeds | mean | minus {base} | p | p (Holm) | over |"
    yield "|---|---|---|---|---|---|---|"
    for row in table:
        cells = [row.arm, str(row.seeds), in_brackets(row.mean), in_brackets(row.minus_base)]
        cells += [p_text(row.p), p_text(row.p_holm), row.over]
        yield f"| {' | '.join(cell or '-' for cell in cells)} |"


def p_text(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def arms(grid: Grid, choices: Mapping[str, Any]) -> Iterator[str]:
    """Each arm's settings, and what was chosen for it on training records."""
    for arm, settings in grid.arms.items():
        own = ", ".join(f"`{name}` {json.dumps(value)}" for name, value in settings.items())
        line = f"- {arm}: {own or 'nothing of its own'}"
        if grid.choose and arm in choices:
            found = choices[arm]
            losses = ", ".join(f"{value}: {loss:.3f}" for value, loss in found["losses"].items())
            line += (
                f"; `{grid.choose.setting}` {found['chosen']} by the loss of training records ({losses})"
            )
            line += ", **at the edge of the values**" * found["at the edge"]
        yield line


def tidy(tables: Mapping[str, Sequence[Found]]) -> str:
    """``grid.csv``: one row an endpoint and arm."""
    text = io.StringIO()
    rows = csv.writer(text)
    names = "value low high minus_base minus_base_low minus_base_high p p_holm over"
    rows.writerow(["endpoint", "arm", "seeds", *names.split()])
    empty = (math.nan,) * 3
    for name, table in tables.items():
        for row in table:
            numbers = [*(row.mean or empty), *(row.minus_base or empty), row.p, row.p_holm]
            shown = ["" if math.isnan(x) else f"{x:.6g}" for x in numbers]
            rows.writerow([name, row.arm, row.seeds, *shown, row.over])
    return text.getvalue()


# -- the figure ---------------------------------------------------------------------------------------


def figure(runs: Mapping[str, Sequence[Run]], base: str, x: str, others: Sequence[str]) -> Figure:
    """The first endpoint against each other one, a dot a run; lines are what the base arm's runs have
    without learning.
    """
    columns = min(2, len(others))
    rows = math.ceil(len(others) / columns)
    width, height = 4.3 * columns + 2.4, 3.6 * rows
    picture = new_figure(width, height)
    picture.subplots_adjust(0.75 / width, 0.6 / height, 1 - 2.4 / width, 0.97, 0.3, 0.28)
    panels = picture.subplots(rows, columns, squeeze=False).flat
    labels: dict[str, Any] = dict.fromkeys(runs)  # Arms come before lines.
    for y, axis in zip_longest(others, panels):
        if y is None:
            axis.set_visible(False)
        else:
            draw_panel(axis, runs, base, x, y)
            handles, names = axis.get_legend_handles_labels()
            labels |= dict(zip(names, handles, strict=True))
    shown = {name: handle for name, handle in labels.items() if handle}
    picture.legend(shown.values(), shown.keys(), loc="center right", edgecolor="none", fontsize=9)
    return as_written(picture)


def draw_panel(axis: Any, runs: Mapping[str, Sequence[Run]], base: str, x: str, y: str) -> None:
    for arm, (colour, marker) in design_styles(list(runs)).items():
        points = [[table_value(run, -1, key_of(name)) for name in (x, y)] for run in runs[arm]]
        dots = [(a[0], b[0]) for a, b in points if a and b and not math.isnan(a[0] + b[0])]
        if dots:
            axis.scatter(*zip(*dots, strict=True), color=colour, marker=marker, label=arm, zorder=3, s=22)
    far = []
    ends = axis.get_xlim(), axis.get_ylim()
    for name, draw, (low, high) in zip((x, y), (axis.axvline, axis.axhline), ends, strict=True):
        for label, group, value in anchors(runs[base], key_of(name)):
            if abs(value - (low + high) / 2) < 3 * (high - low):  # Farther, the dots would be one.
                draw(value, color=COLOURS[group], ls=LINES.get(label, "--"), lw=1, label=label)
            else:
                far.append(f"{label}: {value:.3g}")
    if axis.dataLim.x0 > 0 and axis.dataLim.x1 > 5 * axis.dataLim.x0:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axis.set_xlabel("\n".join([x, *far]))
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)


def anchors(runs: Sequence[Run], key: Key) -> Iterator[tuple[str, str, float]]:
    """Name, group of a colour and mean over the runs of what an endpoint is without learning."""
    part, metric, layer = key
    if (part, metric) == ("held_out", "loss"):
        found = [table_value(run, -1, ("held_out", "loss_shuffled", None)) for run in runs]
        yield from mean_of("another image's caption", "control", found)
    if part == "probe":
        if metric == "neighbour_lift":
            yield "chance", "control", 1.0
        for group in ANCHORS:
            yield from mean_of(group, group, [of_group(run, metric, group, layer) for run in runs])
        if all(run["epochs"] and run["epochs"][0] == 0 for run in runs):
            yield from mean_of("untrained", "control", [table_value(run, 0, key) for run in runs])


def of_group(run: Run, metric: str, group: str, layer: int | None) -> Interval | None:
    """A group's number at the last epoch."""
    curve = run["curves"].get(metric, {}).get(group, {}).get(run["epochs"][-1], []) if run["epochs"] else []
    return dict(zip(run["layers"], curve, strict=False)).get(layer)


def mean_of(name: str, group: str, found: Sequence[Interval | None]) -> Iterator[tuple[str, str, float]]:
    values = [one[0] for one in found if one is not None]
    if values and not np.isnan(values).any():
        yield name, group, float(np.mean(values))
