"""What a probe says of itself in sentences, on tables made by hand."""

from __future__ import annotations

from math import nan

import pytest

from lightning_limber.probe.finding import at_layers, finding_figure, points, sentences
from lightning_limber.probe.tables import Row

LAYERS = (0, 3, 6, 9)


def rows(group: str, metric: str, *intervals: tuple[float, float, float]) -> list[Row]:
    return [Row(layer, group, metric, *found) for layer, found in zip(LAYERS, intervals, strict=True)]


def around(value: float, half: float = 0.1) -> tuple[float, float, float]:
    return value, value - half, value + half


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], "nowhere"),
        ([0, 3, 6, 9], "at all layers"),
        ([3], "at layer 3"),
        ([0, 3], "at layers 0 and 3"),
        ([0, 3, 6], "at layers 0 to 6"),
        ([0, 6], "at layers 0 and 6"),
        ([0, 3, 9], "at layers 0, 3 and 9"),
    ],
)
def test_layers_in_words(layers, expected):
    assert at_layers(layers, LAYERS) == expected


def test_each_finding_is_said_with_its_control():
    table = [
        *rows("image", "use", around(1.5), around(1.0), around(0.5), (0.02, -0.01, 0.05)),
        *rows("image", "excess_cosine_over_words_long", around(0.0), *[around(0.3)] * 2, around(0.35)),
        *rows("image", "excess_l0_over_words_long", *[around(0.05)] * 4),
        *rows("image", "neighbour_lift", around(1.9), around(1.3), around(1.15), around(1.05)),
        *rows("noise", "neighbour_lift", around(1.0), around(1.0), around(1.0), (nan, nan, nan)),
        *rows("words_long", "neighbour_lift", around(1.0), around(1.15), around(1.0), around(1.0)),
    ]
    assert sentences(table) == [
        "The picture is read at layers 0 to 6: another in its place costs 1.50 [1.40, 1.60] nats a token "
        "at layer 0, and less than half of that at layer 6.",
        "Image tokens are nearer to text than random words of their length in reconstruction at layers 3 "
        "to 9: by 0.35 [0.25, 0.45] of the way (cosine, layer 9); in sparsity (l0) at no layer.",
        # At layer 3 the control reaches 1.25.
        "The nearest words of image tokens are the picture's own at layer 0: in its captions 1.90 [1.80, "
        "2.00] times as often as in other images' captions (layer 0; noise 1.00; random words of their "
        "length 1.00).",
    ]
    assert sentences([]) == []


def test_what_beats_no_control_is_said():
    nothing = [around(0.05)] * 4
    table = [
        *rows("image", "use", *[around(0.0)] * 4),
        *rows("image", "excess_cosine_over_words_long", *nothing),
        *rows("image", "excess_l0_over_words_long", *nothing),
        *rows("image", "neighbour_lift", around(1.2), *[around(1.0)] * 3),
        *rows("noise", "neighbour_lift", *[around(1.1)] * 4),
    ]
    assert sentences(table) == [
        "Nothing is read from the picture: another picture does no certain harm at any layer.",
        "Image tokens are nowhere nearer to text than random words of their length: in reconstruction "
        "(cosine) and in sparsity (l0) at no layer.",
        "The nearest words of image tokens are not those of the picture: at best they are in its own "
        "captions 1.20 [1.10, 1.30] times as often as in other images' captions (layer 0; noise 1.10), "
        "which chance or a control reaches.",
    ]
    both = [
        *rows("image", "excess_cosine_over_words_long", *[around(0.3)] * 4),
        *rows("image", "excess_l0_over_words_long", *[around(0.2)] * 4),
    ]
    assert sentences(both) == [
        "Image tokens are nearer to text than random words of their length in reconstruction at all layers "
        "and in sparsity at all layers: by 0.30 [0.20, 0.40] of the way (cosine, layer 0) and 0.20 [0.10, "
        "0.30] of the way (l0, layer 0)."
    ]


def test_hardly_any_use_is_none():
    # Certain, and nothing.
    hardly = [around(1.5)] * 3 + [(0.002, 0.001, 0.003)]
    assert sentences(rows("image", "use", *hardly))[0].startswith("The picture is read at layers 0 to 6:")


def test_the_figure_draws_the_controls():
    table = [
        *rows("image", "use", *[around(1.0)] * 4),
        *rows("image", "excess_cosine_over_words_long", *[around(0.3)] * 4),
        *rows("image", "neighbour_lift", *[around(1.5)] * 4),
        *rows("noise", "neighbour_lift", *[around(1.0)] * 3, (nan, nan, nan)),
    ]
    assert [point.layer for point in points(table, "noise", "neighbour_lift")] == [0, 3, 6]
    read, excess, words = finding_figure(table, "title").axes
    assert read.get_lines()[0].get_ydata().tolist() == [1.0] * 4
    assert {line.get_label() for line in excess.get_lines()} >= {"random words of their length", "text"}
    drawn = {line.get_label(): line.get_ydata() for line in words.get_lines()}
    assert list(drawn) == ["image tokens", "noise", "other images' captions"]
    assert list(drawn["noise"]) == [1.0] * 3
    finding_figure([])  # Nothing measured, nothing drawn, no error.
