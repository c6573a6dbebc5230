"""The rule finds the published layer, and its edges."""

from __future__ import annotations

import math

import pytest

from lightning_limber.probe.metrics.convergence import TOLERANCES, convergence_layer
from lightning_limber.probe.palette import published_curves


@pytest.mark.parametrize("metric", ["mse", "l0", "match"])
def test_published_curves_converge_where_their_authors_say(metric):
    published = published_curves()
    curves = published["curves"][metric]
    assert {len(curve) for curve in curves.values()} == {len(published["layers"])} == {26}
    layer = convergence_layer(published["layers"], curves["image"], curves["text"], TOLERANCES[metric])
    assert layer == published["convergence_layer"] == 18


@pytest.mark.parametrize(
    ("image", "tolerance", "layer"),
    [
        ([1, 1, 1, 1], 1.5, 0),  # everywhere
        ([9, 1.5, 1, 1], 1.5, 3),  # the bound itself is inside
        ([1, 9, 1, 1], 1.5, 6),  # an early layer does not count once it is left again
        ([1, 1, 1, 9], 1.5, None),  # the last layer is outside
        ([9, 9, 9, 1], 1.5, 9),
        ([0.1, 0.1, 0.1, 0.1], 1.5, 0),  # better than text is within an upper bound
        ([0.1, 0.8, 0.1, 0.8], 0.8, 9),
        ([0.1, 0.8, 9, 0.8], 0.8, 3),  # and within a lower bound
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
