"""Runs that differ in their seed alone as one: means over seeds, and beside them each seed's own curves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lightning_limber.tools.compare import Run, epochs_of, estimate, estimates, group_name
from lightning_limber.tools.intervals import Interval

Curve = list[tuple[int, float]]
"""Steps and values."""


def merged(runs: Sequence[Run]) -> Run:
    """A group of `compare.by_seed` as one run, whose ``seeds`` are the runs' own numbers.

    Intervals are those of `compare.estimate`: over images and, by Student's t, over seeds. What cannot be
    averaged (pictures, captions, detectors) is the first seed's. A run alone is itself, without ``seeds``.
    """
    first = runs[0]
    if len(runs) == 1:
        return {**first, "seeds": []}
    return {
        **first,
        "name": f"{group_name(runs)} ({len(runs)} seeds)",
        "summary": {**first["summary"], "seed": ", ".join(map(seed_of, runs))},
        "seconds": sum(run["seconds"] for run in runs) / len(runs),
        "scalars": {
            tag: mean_curve([run["scalars"][tag] for run in runs])
            for tag in first["scalars"]
            if all(tag in run["scalars"] for run in runs)
        },
        "curves": mean_probe(runs),
        "held_out": mean_scores(runs, "held_out"),
        "scores": mean_scores(runs, "captions"),
        "seeds": [one_seed(run) for run in runs],
    }


def seed_of(run: Run) -> str:
    return run["summary"].get("seed", "?")


def one_seed(run: Run) -> dict[str, Any]:
    """What is drawn and listed of a seed: values without intervals, and how it was started."""
    curves = {
        metric: {
            group: {epoch: [found and found[0] for found in curve] for epoch, curve in by_epoch.items()}
            for group, by_epoch in of_metric.items()
        }
        for metric, of_metric in run["curves"].items()
    }
    kept = ("name", "scalars", "convergence", "starts")
    return {"seed": seed_of(run), "curves": curves, **{name: run[name] for name in kept}}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at the steps that all have."""
    by_step = [dict(curve) for curve in curves]
    steps = [step for step, _ in curves[0] if all(step in values for values in by_step)]
    return [(step, math.fsum(values[step] for values in by_step) / len(by_step)) for step in steps]


def mean_probe(runs: Sequence[Run]) -> dict[str, dict[str, dict[int, list[Interval | None]]]]:
    """``curves`` as `report.read_probe` has them, of means over the runs."""
    first = runs[0]
    curves: dict[str, dict[str, dict[int, list]]] = defaultdict(lambda: defaultdict(dict))
    for which, epoch in enumerate(first["epochs"]):  # Outermost: a file of sums by image is of one epoch.
        for metric, of_metric in first["curves"].items():
            for group in of_metric:
                keys = [("probe", metric, layer) for layer in first["layers"]]
                curves[metric][group][epoch] = estimates(runs, keys, which, group)
    return curves


def mean_scores(runs: Sequence[Run], part: str) -> dict[int, dict[str, Interval]]:
    """``held_out`` or ``scores`` of means over the runs, of the epochs if all have the same."""
    epochs = epochs_of(runs[0], part)
    if any(epochs_of(run, part) != epochs for run in runs):
        return {}
    kept = runs[0]["scores" if part == "captions" else part]
    means = {
        epoch: {metric: estimate(runs, (part, metric, None), which) for metric in kept[epoch]}
        for which, epoch in enumerate(epochs)
    }
    return {epoch: {m: found for m, found in of.items() if found} for epoch, of in means.items()}
