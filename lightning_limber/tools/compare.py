"""Differences between runs and between epochs, each with what its interval contains; no torch is loaded.

Two sets of numbers about the same images are compared image by image: each bootstrap sample draws images
once, for all runs (`two_level`). Where a run kept no sums by image (by_image.py), where two runs saw other
images, and for metrics that are no ratio of sums over images (unions, quantiles, shares of attributes), the
two intervals are added as independent ones (`independent`), which mostly is too wide.

Runs whose configs differ in ``seed_everything`` alone are one group, whose number is the mean over its
seeds. Shapes: S seeds, I images, R bootstrap samples, C columns of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import yaml

from lightning_limber.utils.files import read_as

Interval = tuple[float, float, float]
"""Value, lower and upper end."""
Run = dict[str, Any]
"""What `report.read_run` makes of a run's folder."""
Key = tuple[str, str, int | None]
"""Part of a run (``held_out``, ``captions`` or ``probe``), metric, and the probe's layer."""
SAMPLES = 1000
PAIRED, PAIRED_SEEDS, INDEPENDENT = "images, paired", "images and seeds, paired", "images, as independent"


class Contrast(NamedTuple):
    """A difference, and what its 95 % interval is over."""

    interval: Interval
    over: str


# -- statistics ---------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def bootstrap_weights(images: int) -> np.ndarray:
    """[1 + R, images] how often each image is drawn; the first row is the sample itself."""
    drawn = np.random.default_rng(0).multinomial(images, [1 / images] * images, size=SAMPLES)
    return np.concatenate([np.ones((1, images)), drawn])


def ratio(sums: np.ndarray) -> np.ndarray:
    """The metric [...] of sums over images [..., C]: C is 2 for a ratio, 10 for `scores.bleu`'s counts."""
    with np.errstate(divide="ignore", invalid="ignore"):  # A sample without tokens, or a right 4-gram.
        if sums.shape[-1] == 2:
            return sums[..., 0] / sums[..., 1]
        right, count, (length, reference) = sums[..., :4], sums[..., 4:8], np.moveaxis(sums[..., 8:], -1, 0)
        precision = np.exp(np.log(right / np.maximum(count, 1)).mean(-1))
        return precision * np.exp(np.minimum(1 - reference / length, 0))


class TwoLevel(NamedTuple):
    """A mean over seeds, or the difference of two, with what its 95 % interval is made of."""

    value: float
    low: float
    high: float
    """Ends of the interval over images."""
    seeds: list[np.ndarray]
    """Values of the seeds [S] of each group."""

    def interval(self) -> Interval:
        seeds = seeds_part(self.seeds)
        below, above = (math.hypot(self.value - end, seeds) for end in (self.low, self.high))
        return self.value, self.value - below, self.value + above

    def p(self) -> float:
        """The p-value that belongs to the interval: 1 less the level at which it would just reach 0.

        At other levels the part over images is in proportion to the normal distribution's quantile, that
        over seeds to Student's: beyond 99 % a thousand samples have no percentiles of their own.
        """
        images = abs(self.value - (self.low if self.value > 0 else self.high)) / NormalDist().inv_cdf(0.975)

        def reach(p: float) -> float:
            return math.hypot(images * NormalDist().inv_cdf(1 - p / 2), seeds_part(self.seeds, 1 - p))

        low, high = 0.0, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if reach(middle) >= abs(self.value) else (low, middle)
        return high


def levels(ours: np.ndarray, base: np.ndarray | None = None) -> TwoLevel:
    """Mean over seeds of a metric, minus that of other runs, with a 95 % interval over images and seeds.

    The images' part is the percentile interval of a bootstrap that draws the same images for all runs, with
    their seeds as they are; the seeds' part is Student's t on the seeds' values (drawing few seeds with
    replacement makes intervals too short: two seeds cover 79 % in 95). They are independent sources, so the
    distances to the ends are added in squares. One seed says nothing of others: where a group has one
    alone, the interval is over images only.

    Args:
        ours: [S, I, C] sums by image.
        base: [S', I, C] of the same images; None subtracts nothing.
    """
    groups = [ours] if base is None else [ours, base]
    # An image without any token (or part in an intervention) is not of the sample.
    used = np.concatenate(groups).any((0, 2))
    weights = bootstrap_weights(int(used.sum()))
    by_seed = [ratio(weights @ group[:, used]) for group in groups]  # [S, 1 + R] each
    samples = by_seed[0].mean(0) - (by_seed[1].mean(0) if base is not None else 0.0)
    low, high = np.nanpercentile(samples[1:], [2.5, 97.5]).tolist()
    return TwoLevel(float(samples[0]), low, high, [values[:, 0] for values in by_seed])


def two_level(ours: np.ndarray, base: np.ndarray | None = None) -> Interval:
    """`levels` as one interval."""
    return levels(ours, base).interval()


def seeds_part(groups: Sequence[np.ndarray], level: float = 0.95) -> float:
    """Half of the interval of a mean over seeds' values [S], or of the difference of two such means.

    Student's t, for two groups with Welch's degrees of freedom; 0 where a group has one seed alone.
    """
    from scipy.special import stdtrit

    if min(map(len, groups)) < 2:
        return 0.0
    variances = [values.var(ddof=1) / len(values) for values in groups]  # Of the means.
    if not (total := sum(variances)):
        return 0.0
    freedom = total**2 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, groups, strict=True))
    return float(stdtrit(freedom, (1 + level) / 2) * math.sqrt(total))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): those below 0.05 are wrong in 5 % of families."""
    order, adjusted, least = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order.tolist()):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def independent(a: Sequence[float], b: Sequence[float]) -> Interval:
    """a - b with a 95 % interval from theirs, for independent estimates.

    The square-and-add method (Zou and Donner 2008, doi:10.1002/sim.3095), which keeps skewed intervals
    skewed.
    """
    (value_a, low_a, high_a), (value_b, low_b, high_b) = a, b
    value = value_a - value_b
    below = math.hypot(value_a - low_a, high_b - value_b)
    above = math.hypot(high_a - value_a, value_b - low_b)
    return value, value - below, value + above


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
def read_images(path: Path) -> dict[str, np.ndarray]:
    """The arrays of ``images_epoch_{n}.npz``; none where there is no such file."""
    return read_as(path, _arrays) if path.is_file() else {}


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def sums_by_image(
    run: Run, which: int, key: Key, of: str = "image"
) -> tuple[np.ndarray, np.ndarray] | None:
    """Names [I] and sums [I, C] behind `table_value`, in the names' order; None where none are kept."""
    part, metric, layer = key
    found = read_images(run["folder"] / f"images_epoch_{epochs_of(run, part)[which]}.npz")
    if f"{part}/{metric}" not in found:
        return None
    names, sums = found[f"{part}/names"], found[f"{part}/{metric}"]
    if part == "probe":
        group, place = found["probe/groups"] == of, found["probe/layers"] == layer
        if not group.any() or not place.any():
            return None
        sums = sums[group.argmax(), place.argmax()]
    order = np.argsort(names, kind="stable")
    sums = sums[order].astype(np.float64)
    return None if np.isnan(sums).any() else (names[order], sums)


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
    values = [value for run in runs if (value := table_value(run, which, key, group)) is not None]
    if len(values) < len(runs):
        return None
    if len(runs) == 1:
        return values[0]
    value, low, high = np.array(values).mean(0).tolist()
    # A table has NaN where a ratio would mean nothing.
    if not math.isnan(value) and (sums := same_images([runs], [which], key, group)):
        return two_level(*sums)
    seeds = seeds_part([np.array(values)[:, 0]])
    return value, value - math.hypot(value - low, seeds), value + math.hypot(high - value, seeds)


def contrast(
    ours: Sequence[Run], base: Sequence[Run], key: Key, which: tuple[int, int] = (-1, -1)
) -> Contrast | None:
    """`ours` minus `base`, at the last (-1) or first (0) epoch of each; None where one has no number."""
    a, b = (estimate(runs, key, at) for runs, at in zip((ours, base), which, strict=True))
    if a is None or b is None or math.isnan(a[0] - b[0]):
        return None
    if sums := same_images((ours, base), which, key):
        both = min(len(ours), len(base)) > 1
        return Contrast(two_level(*sums), PAIRED_SEEDS if both else PAIRED)
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


# -- as text ------------------------------------------------------------------------------------------


def comparison(runs: Sequence[Run]) -> str:
    """Runs as text, a row a group of seeds: held-out scores, the probe's l0 and loss_recovered of image
    tokens, and both minus those of the first group.

    All at the last epoch of each run, with 95 % intervals where there are any. The probe's layers are
    those in the middle of each third of the layers that all runs have probed.
    """
    groups = by_seed(runs)
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
    for group in groups:
        run = group[0]
        start = run["starts"][0] if run["starts"] else {}
        parameters = start.get("trained_parameters")
        name, seeds = run["name"], f"{len(group)}" if len(group) > 1 else ""
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
        f"minus {runs[0]['name']}; 95 % over what the last column says (~: images, as independent)": minus,
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
