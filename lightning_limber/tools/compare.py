"""Differences between runs and between epochs, each with what its interval contains; no torch is loaded.

Two sets of numbers about the same images are compared image by image: each bootstrap sample draws images
once, for all runs (`two_level`). Where a run kept no sums by image (by_image.py), where two runs saw other
images, and for metrics that are no ratio of sums over images (unions, quantiles, shares of attributes), the
two intervals are added as independent ones (`independent`), which mostly is too wide.

Runs whose configs differ in ``seed_everything`` alone are one group, whose number is the mean over its
seeds. Shapes: S seeds, I images, C columns of sums.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from lightning_limber.tools.intervals import Interval, independent, levels_of_many, seeds_part, two_level
from lightning_limber.utils.by_image import images_file
from lightning_limber.utils.files import read_as

Run = dict[str, Any]
"""What `report.read_run` makes of a run's folder."""
Key = tuple[str, str, int | None]
"""Part of a run (``held_out``, ``captions`` or ``probe``), metric, and the probe's layer."""
PAIRED, PAIRED_SEEDS, INDEPENDENT = "images, paired", "images and seeds, paired", "images, as independent"


class Contrast(NamedTuple):
    """A difference, and what its 95 % interval is over."""

    interval: Interval
    over: str


# -- numbers of runs ----------------------------------------------------------------------------------


def epochs_of(run: Run, part: str) -> list[int]:
    """Epochs for which a part of a run has numbers."""
    return run["epochs"] if part == "probe" else sorted(run["scores" if part == "captions" else part])


def table_value(run: Run, which: int, key: Key, group: str = "image") -> Interval | None:
    """A run's own number at its last (-1), first (0) or other epoch; the probe's is that of a group."""
    part, metric, layer = key
    if not (epochs := epochs_of(run, part)):
        return None
    epoch = epochs[which]
    if part != "probe":
        return run["scores" if part == "captions" else part][epoch].get(metric)
    curve = run["curves"].get(metric, {}).get(group, {}).get(epoch, [])
    return dict(zip(run["layers"], curve, strict=False)).get(layer)


@lru_cache(maxsize=16)
def read_images(folder: Path, epoch: int) -> dict[str, Any]:
    """The arrays of ``images_epoch_{n}.npz``, images in the order of their names; none where there is no
    such file.
    """
    path = images_file(folder, epoch)
    return read_as(path, _arrays) if path.is_file() else {}


def _arrays(path: Path) -> dict[str, Any]:
    found: dict[str, Any]
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    names = {name.partition("/")[0]: array for name, array in found.items() if name.endswith("/names")}
    orders = {part: np.argsort(of_part, kind="stable") for part, of_part in names.items()}
    for name, array in found.items():
        order = orders[name.partition("/")[0]]
        if name.endswith("/names"):
            found[name] = array[order]
        else:  # [..., I, C], or the probe's groups and layers.
            found[name] = array[..., order, :] if array.ndim > 1 else array.tolist()
    return found


def sums_by_image(
    run: Run, which: int, key: Key, of: str = "image"
) -> tuple[np.ndarray, np.ndarray] | None:
    """Names [I] and sums [I, C] behind `table_value`, in the names' order; None where none are kept."""
    part, metric, layer = key
    found = read_images(run["folder"], epochs_of(run, part)[which])
    if f"{part}/{metric}" not in found:
        return None
    names, sums = found[f"{part}/names"], found[f"{part}/{metric}"]
    if part == "probe":
        groups, layers = found["probe/groups"], found["probe/layers"]
        if of not in groups or layer not in layers:
            return None
        sums = sums[groups.index(of), layers.index(layer)]
    return None if np.isnan(sums.sum()) else (names, sums.astype(np.float64))


def same_images(
    groups: Sequence[Sequence[Run]], which: Sequence[int], key: Key, of: str = "image"
) -> list[np.ndarray] | None:
    """Sums [S, I, C] of each group of runs; None unless all have them, of the same images."""
    found = [
        [sums_by_image(run, at, key, of) for run in runs] for runs, at in zip(groups, which, strict=True)
    ]
    flat = [one for of_group in found for one in of_group]
    if any(one is None or not np.array_equal(one[0], flat[0][0]) for one in flat):  # type: ignore[index]
        return None
    return [np.stack([sums for _, sums in of_group]) for of_group in found]  # type: ignore[misc]


def estimate(runs: Sequence[Run], key: Key, which: int = -1, group: str = "image") -> Interval | None:
    """The mean over the runs' seeds, with its interval; of one run that of its table.

    The probe's is that of a group of tokens.
    """
    return estimates(runs, [key], which, group)[0]


def estimates(
    runs: Sequence[Run], keys: Sequence[Key], which: int = -1, group: str = "image"
) -> list[Interval | None]:
    """`estimate` of one metric at several layers."""
    found: list[Interval | None] = []
    sums: dict[int, np.ndarray] = {}
    for place, key in enumerate(keys):
        values = [value for run in runs if (value := table_value(run, which, key, group)) is not None]
        if len(values) < len(runs) or len(runs) == 1:
            found.append(values[0] if len(values) == len(runs) else None)
            continue
        value, low, high = np.array(values).mean(0).tolist()
        # A table has NaN where a ratio would mean nothing.
        if not math.isnan(value) and (of_runs := same_images([runs], [which], key, group)):
            [sums[place]] = of_runs
        seeds = seeds_part([np.array(values)[:, 0]])
        found.append(
            (value, value - math.hypot(value - low, seeds), value + math.hypot(high - value, seeds))
        )
    if sums:
        for place, level in zip(sums, levels_of_many(np.stack([*sums.values()])), strict=True):
            found[place] = level.interval()
    return found


def contrast(
    ours: Sequence[Run], base: Sequence[Run], key: Key, which: tuple[int, int] = (-1, -1)
) -> Contrast | None:
    """`ours` minus `base`, at the last (-1) or first (0) epoch of each; None where one has no number."""
    values = [
        [table_value(run, at, key) for run in runs] for runs, at in zip((ours, base), which, strict=True)
    ]
    if any(value is None or math.isnan(value[0]) for of_group in values for value in of_group):
        return None
    if sums := same_images((ours, base), which, key):
        both = min(len(ours), len(base)) > 1
        return Contrast(two_level(*sums), PAIRED_SEEDS if both else PAIRED)
    a, b = (estimate(runs, key, at) for runs, at in zip((ours, base), which, strict=True))
    assert a is not None
    assert b is not None
    return Contrast(independent(a, b), INDEPENDENT)


def differences(
    ours: Sequence[Run], base: Sequence[Run], which: tuple[int, int] = (-1, -1)
) -> dict[str, dict[str, Any]]:
    """`ours` minus `base`: ``metrics`` of image tokens by layer, ``scores`` of captions, ``held_out`` loss;
    and ``over``, by ``metrics/l0`` and the like, what the intervals contain.
    """
    found: dict[str, dict[str, Any]] = {"metrics": {}, "scores": {}, "held_out": {}, "over": {}}
    first, layers = base[0], [layer for layer in ours[0]["layers"] if layer in base[0]["layers"]]
    for metric in first["curves"]:
        by_layer = {layer: contrast(ours, base, ("probe", metric, layer), which) for layer in layers}
        rows = [(layer, *one.interval) for layer, one in by_layer.items() if one is not None]
        if rows:
            found["metrics"][metric] = rows
            kinds = dict.fromkeys(one.over for one in by_layer.values() if one is not None)
            found["over"][f"metrics/{metric}"] = "; ".join(kinds)
    for part, name in (("captions", "scores"), ("held_out", "held_out")):
        metrics = {metric for of_epoch in first[name].values() for metric in of_epoch}
        metrics.discard("perplexity")  # The loss' exponential.
        for metric in sorted(metrics):
            if (one := contrast(ours, base, (part, metric, None), which)) is not None:
                found[name][metric], found["over"][f"{name}/{metric}"] = one
    return found


def by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs whose configs differ in ``seed_everything`` alone (and in the folder's name), and
    that were probed at the same epochs: a run that is not as far is none of the group.
    """
    groups: list[tuple[Any, dict[Any, Run]]] = []
    for run in runs:
        config = yaml.safe_load(run["config"]) or {}
        seed = config.pop("seed_everything", None)
        config.get("trainer", {}).pop("logger", None)
        settings = config and (config, run["epochs"])
        for known, members in groups:
            if settings and known == settings and seed not in members:
                members[seed] = run
                break
        else:
            groups.append((settings, {seed: run}))
    return [list(members.values()) for _, members in groups]


def group_name(runs: Sequence[Run]) -> str:
    """What all runs' names begin with, without the seed's: ``late`` of late/seed_0 and late/seed_1; of a
    run alone its own.
    """
    names = [run["name"] for run in runs]
    if len(runs) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r"([\W_]*seed)?[\W_]*\d*$", "", "".join(letters[0] for letters in same)) or names[0]


def numbered(names: Sequence[str]) -> list[str]:
    """The names, those that occur several times with their places."""
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


# -- as text ------------------------------------------------------------------------------------------


def comparison(runs: Sequence[Run]) -> str:
    """Runs as text, a row a group of seeds: held-out scores, the probe's l0 and loss_recovered of image
    tokens, and both minus those of the first group.

    All at the last epoch of each run, with 95 % intervals where there are any. The probe's layers are
    those in the middle of each third of the layers that all runs have probed.
    """
    groups = by_seed(runs)
    names = numbered([group_name(group) for group in groups])
    layers = [layer for layer in runs[0]["layers"] if all(layer in run["layers"] for run in runs)]
    layers = sorted({layers[len(layers) * sixth // 6] for sixth in (1, 3, 5)}) if layers else []
    held_out: dict[str, Key] = {
        **{name: ("held_out", name, None) for name in ("loss", "accuracy")},
        **{"slot accuracy": ("captions", "slots/all", None), "cider_d": ("captions", "cider_d", None)},
    }
    probe: dict[str, Key] = {
        f"{metric} @{layer}": ("probe", metric, layer)
        for metric in ("l0", "loss_recovered")
        for layer in layers
    }
    scores = [["run", "seeds", "parameters", *held_out]]
    sae, minus = [["run", *probe]], [["run", *held_out, *probe, "over"]]
    for name, group in zip(names, groups, strict=True):
        run = group[0]
        start = run["starts"][0] if run["starts"] else {}
        parameters = start.get("trained_parameters")
        seeds = f"{len(group)}" if len(group) > 1 else ""
        cells = {column: in_brackets(estimate(group, key)) for column, key in held_out.items()}
        for column in ("loss", "accuracy"):  # Runs of before there were intervals have the event file.
            points = run["scalars"].get(f"val/{column}")
            if not cells[column] and points and len(group) == 1:
                cells[column] = f"{points[-1][1]:.3f}"
        scores.append([name, seeds, f"{parameters:,}" if parameters else "", *cells.values()])
        sae.append([name, *(in_brackets(estimate(group, key)) for key in probe.values())])
        if group is not groups[0]:
            found = [contrast(group, groups[0], key) for key in (*held_out.values(), *probe.values())]
            over = dict.fromkeys(one.over for one in found if one and one.over != INDEPENDENT)
            minus.append([name, *map(marked, found), ", ".join(over)])
    over_seeds = " (and seeds, where there are several)" * (len(groups) < len(runs))
    tables = {
        f"held-out images, 95 % over images{over_seeds}": scores,
        f"SAE probe of image tokens, by layer, 95 % over images{over_seeds}": sae,
        f"minus {names[0]}; 95 % over what the last column says (~: images, as independent)": minus,
    }
    return "\n\n".join(f"{title}\n{columns(table)}" for title, table in tables.items() if len(table) > 1)


def marked(difference: Contrast | None) -> str:
    """``1.25 [1.1, 1.4]``, and ``~`` behind what is not paired."""
    text = in_brackets(difference.interval) if difference else ""
    return f"{text} ~" if text and difference and difference.over == INDEPENDENT else text


def in_brackets(value: Interval | None) -> str:
    """``1.25 [1.1, 1.4]``; nothing where nothing was measured."""
    if value is None or math.isnan(value[0]):
        return ""
    middle, low, high = (f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}" for x in value)
    return middle if math.isnan(value[1]) else f"{middle} [{low}, {high}]"


def columns(table: list[list[str]]) -> str:
    """Rows, the first of which is the head, as aligned text; columns that hold nothing are left out."""
    kept = [column for column in zip(*table, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    lines = zip(*kept, strict=True)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
