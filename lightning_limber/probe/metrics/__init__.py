"""The probe's metrics, one a file, and the one place where a name or a class path becomes a metric."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from lightning_limber.probe.metrics.base import (
    Estimate,
    Found,
    Group,
    Measurement,
    ProbeMetric,
    TokenMean,
    Tokens,
)
from lightning_limber.probe.metrics.convergence import Convergence
from lightning_limber.probe.metrics.cross_layer import CrossLayer
from lightning_limber.probe.metrics.detectors import Detectors
from lightning_limber.probe.metrics.direction import Direction
from lightning_limber.probe.metrics.excess import Excess
from lightning_limber.probe.metrics.geometry import Geometry
from lightning_limber.probe.metrics.knn import KNN
from lightning_limber.probe.metrics.lens_hit import LensHit
from lightning_limber.probe.metrics.linear_probe import LinearProbe
from lightning_limber.probe.metrics.loss_recovered import LossRecovered
from lightning_limber.probe.metrics.match import Match
from lightning_limber.probe.metrics.neighbours import Neighbours
from lightning_limber.probe.metrics.noise import Noise
from lightning_limber.probe.metrics.object_patches import ObjectPatches
from lightning_limber.probe.metrics.object_steer import ObjectSteer
from lightning_limber.probe.metrics.shared import Shared
from lightning_limber.probe.metrics.use import Use
from lightning_limber.probe.metrics.word_groups import Told, Words, WordsLong
from lightning_limber.probe.palette import Panel

__all__ = [
    "DEFAULT_METRICS",
    "REGISTRY",
    "Estimate",
    "Found",
    "Group",
    "Measurement",
    "Panel",
    "ProbeMetric",
    "TokenMean",
    "Tokens",
    "resolve_metric",
    "resolve_metrics",
]

MetricSpec = str | dict[str, Any]

REGISTRY: dict[str, type[ProbeMetric]] = {
    metric.name: metric
    for metric in (
        *(Geometry, Shared, Direction, Noise, WordsLong, Words, Told),
        *(Match, Neighbours, LensHit, KNN, Detectors, LinearProbe, Use, LossRecovered, CrossLayer),
        *(ObjectPatches, ObjectSteer, Excess, Convergence),
    )
}
"""The metrics that ship, by name."""
DEFAULT_METRICS = (
    *("direction", "noise", "words_long"),
    *("match", "neighbours", "lens_hit", "knn", "detectors", "linear_probe"),
    *("use", "loss_recovered", "cross_layer"),
)


def resolve_metric(spec: MetricSpec) -> ProbeMetric:
    """Makes a metric of its name, its class path, or ``{class_path, init_args}``.

    Raises:
        ValueError: there is no such metric, the class is none, or it does not take these arguments.
    """
    given: dict[str, Any] = {"class_path": spec} if isinstance(spec, str) else spec
    path, init_args = given.get("class_path"), given.get("init_args") or {}
    if not isinstance(path, str) or given.keys() - {"class_path", "init_args"}:
        raise ValueError(f"probe.metrics: {spec} is to have a class_path, and init_args at most.")
    found: Any = REGISTRY.get(path)
    if found is None:
        module, _, name = path.rpartition(".")
        if not module:
            near = get_close_matches(path, REGISTRY, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"probe.metrics: '{path}' is none of {', '.join(REGISTRY)}.{hint} Give one of them, or the "
                "path of a class of your own, such as my_parts.MyMetric."
            )
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"probe.metrics: cannot import '{path}': {error}. Give a class path, package.module.Class, "
                "that Python finds from the folder you are in or on PYTHONPATH."
            ) from error
        if not (inspect.isclass(found) and issubclass(found, ProbeMetric)):
            base = f"{ProbeMetric.__module__}.{ProbeMetric.__name__}"
            raise ValueError(f"probe.metrics: '{path}' is no subclass of {base}.")
    try:
        inspect.signature(found).bind(**init_args)
    except TypeError as error:
        wanted = f"{found.__name__}{inspect.signature(found)}"
        raise ValueError(f"probe.metrics: init_args of '{path}': {error}. It is {wanted}.") from None
    return found(**init_args)


def whole_spec(spec: MetricSpec) -> MetricSpec:
    """The same for every way to name a metric: its class path with all its settings, or its name where it
    ships and has its own settings.
    """
    found = type(resolve_metric(spec))
    parameters = inspect.signature(found).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    given = (spec.get("init_args") or {}) if isinstance(spec, dict) else {}
    if REGISTRY.get(found.name) is found and settings | given == settings:
        return found.name
    return {"class_path": f"{found.__module__}.{found.__qualname__}", "init_args": settings | given}


def resolve_metrics(specs: Sequence[MetricSpec]) -> list[ProbeMetric]:
    """Metrics in the order in which they are computed.

    Geometry and shared come first, and excess and convergence last, whether they are named or not.
    """
    metrics = [resolve_metric(spec) for spec in specs]

    def missing(*kinds: type[ProbeMetric]) -> list[ProbeMetric]:
        return [kind() for kind in kinds if not any(type(metric) is kind for metric in metrics)]

    return [*missing(Geometry, Shared), *metrics, *missing(Excess, Convergence)]
