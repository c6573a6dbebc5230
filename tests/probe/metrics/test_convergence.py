"""The rule finds the published layer, and its edges."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_limber.probe.metrics.base import Estimate, Found, Group, Measurement
from lightning_limber.probe.metrics.convergence import TOLERANCES, Convergence, convergence_layer
from lightning_limber.probe.palette import published_curves
from lightning_limber.probe.tables import Row


@pytest.mark.parametrize(("metric", "expected"), [("mse", 18), ("l0", 17), ("match", 18)])
def test_published_curves_converge_where_their_authors_say(metric, expected):
    """Or a layer before: image l0 falls to 0.73 of text's at layer 19, and is 1.27 of it at 17."""
    published = published_curves()
    curves = published["curves"][metric]
    assert {len(curve) for curve in curves.values()} == {len(published["layers"])} == {26}
    layer = convergence_layer(published["layers"], curves["image"], curves["text"], TOLERANCES[metric])
    assert layer == expected
    assert published["convergence_layer"] == 18


@pytest.mark.parametrize(
    ("image", "tolerance", "layer"),
    [
        ([1, 1, 1, 1], 1.5, 0),  # everywhere
        ([9, 1.5, 1, 1], 1.5, 3),  # the bound itself is inside
        ([1, 9, 1, 1], 1.5, 6),  # an early layer does not count once it is left again
        ([1, 1, 1, 9], 1.5, None),  # the last layer is outside
        ([9, 9, 9, 1], 1.5, 9),
        ([0.1, 0.1, 0.1, 0.1], 1.5, None),  # below text is as far as above it
        ([0.1, 0.1, 0.7, 0.7], 1.5, 6),
        ([0.1, 0.8, 0.1, 0.8], 0.8, 9),
        ([0.1, 0.8, 9, 0.8], 0.8, 9),
        ([0.1, 0.8, 1.25, 0.8], 0.8, 3),
        ([1, 1, 1, 0], 1.5, None),
        ([1, 1, 1, 0.7], 0.8, None),
        ([1, math.nan, 1, 1], 1.5, 6),
        ([1, math.nan, 1, 1], 0.8, 6),
        ([1, 1, 1, math.nan], 1.5, None),
    ],
)
def test_convergence_layer(image, tolerance, layer):
    assert convergence_layer([0, 3, 6, 9], image, [1.0] * 4, tolerance) == layer


@pytest.mark.parametrize("tolerance", [1.5, 0.8])
def test_text_that_gives_no_ratio_is_outside(tolerance):
    for text in (0.0, math.nan):
        assert convergence_layer([0, 3, 6], [0.0, 1.0, 1.0], [1.0, text, 1.0], tolerance) == 6


def test_no_layers():
    assert convergence_layer([], [], [], 1.5) is None


def test_curves_of_different_lengths_stop():
    with pytest.raises(ValueError, match="zip"):
        convergence_layer([0, 3], [1.0], [1.0, 1.0], 1.5)


# -- controls ---------------------------------------------------------------------------------------

LAYERS = {"blocks.0.hook_resid_post": 0, "blocks.3.hook_resid_post": 3, "blocks.6.hook_resid_post": 6}


def measured(curves: dict[str, tuple[float, ...]], start: tuple[Row, ...] = ()) -> Measurement:
    """What the metrics before leave of l0 and mse: one curve a group, the same in each bootstrap sample."""
    groups = {name: Group(name, "caption" if name == "text" else "image") for name in curves}
    probe = SimpleNamespace(layers=LAYERS, groups=groups)
    stats = {(name, hook): None for name in curves for hook in LAYERS}
    estimates = [
        Estimate(layer, name, metric, torch.full((21,), value, dtype=torch.float64))
        for name, curve in curves.items()
        for layer, value in zip(LAYERS.values(), curve, strict=True)
        for metric in ("l0", "mse")
    ]
    return Measurement(probe, stats, [], start, estimates)


def converged(data: Measurement) -> dict[str, float]:
    found = list(Convergence().compute(data, Found({}, {})))
    return {e.group: e.value[0] for e in found if e.metric == "convergence_layer/l0"}


TEXT, FAR = (10.0, 10.0, 10.0), (90.0, 60.0, 40.0)


def test_a_layer_of_its_own():
    data = measured({"image": (50, 11, 9), "text": TEXT, "noise": FAR})
    assert converged(data) == {"image": 3, "noise": math.inf}
    assert data.notes == []


@pytest.mark.parametrize("control", ["noise", "words_long"])
def test_void_where_a_control_converges_too(control):
    data = measured({"image": (50, 11, 9), "text": TEXT, control: (90, 60, 12)})
    found = converged(data)
    assert math.isnan(found["image"])
    assert found[control] == 6
    assert f"(group, layer): image 3, {control} 6." in data.notes[0]


def test_the_untrained_adapter_is_a_control():
    curves = {"image": (50.0, 11.0, 9.0), "text": TEXT, "noise": FAR}

    def start(value: float) -> Row:
        return Row(None, "image", "convergence_layer/l0", value, math.nan, math.nan)

    assert converged(measured(curves, (start(math.inf),)))["image"] == 3
    for value, name in ((0.0, "untrained 0"), (math.nan, "untrained")):  # NaN: it converged, and noise too.
        data = measured(curves, (start(value),))
        assert math.isnan(converged(data)["image"])
        assert f"image 3, {name}." in data.notes[0]


def test_never_is_never_whatever_controls_do():
    data = measured({"image": FAR, "text": TEXT, "noise": (11, 11, 11)})
    assert converged(data) == {"image": math.inf, "noise": 0}


def test_the_gap_that_is_closed():
    """In logarithms: of 160 to 10, 40 is half of the way."""
    data = measured({"image": (40, 160, 10), "text": TEXT, "noise": (160, 160, 160)})
    found = [e for e in Convergence().compute(data, Found({}, {})) if e.metric == "gap_closed"]
    assert [e.layer for e in found] == [0, 3, 6]
    assert [float(e.value[0]) for e in found] == pytest.approx([0.5, 0, 1])
