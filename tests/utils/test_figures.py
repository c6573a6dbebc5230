"""Figures show any text as it is, and no picture is no obstacle."""

from __future__ import annotations

import io
import json

import pytest
import torch

from lightning_limber.callbacks.captions import Captioned, write_gallery
from lightning_limber.captioning.figures import caption_figure
from lightning_limber.probe.figures import (
    heatmap_figure,
    matrix_figure,
    panel_figure,
    patch_figure,
    probe_figure,
)
from lightning_limber.probe.finding import finding_figure
from lightning_limber.probe.palette import Panel
from lightning_limber.probe.patches import PatchMap
from lightning_limber.probe.tables import Row

HOSTILE = ["50% off $20 #sale $10", "$\\frac{1}$", "$", "a_b^{c", "\\$5 and $$"]
IMAGE = torch.zeros(3, 8, 8)


def drawn(figure) -> list[str]:
    """Draws a figure; returns the text in it."""
    from matplotlib.text import Text

    figure.savefig(io.BytesIO(), format="png", dpi=20)
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_taken_for_a_formula(text):
    assert any(text in found for found in drawn(caption_figure([IMAGE], [text], [text])))
    found = PatchMap(3, text, torch.ones(4))
    assert any(text in shown for shown in drawn(patch_figure([IMAGE], [text], [[found]], 5)))
    rows = [Row(layer, "image", "fvu", 0.5, 0.4, 0.6) for layer in (0, 1)]
    rows += [Row(layer, text, "fvu", 0.5, 0.4, 0.6) for layer in (0, 1)]
    panels = [Panel("fvu", text, by_epoch=True)]
    history = {0: rows, 1: rows}
    for figure in (
        probe_figure(history, 1, panels, text, text),
        panel_figure(history, 1, *panels, text, text),
    ):
        assert {text, f"image, {text}"} <= set(drawn(figure))
    assert text in drawn(heatmap_figure({1: rows}, panels[0]))
    assert text in drawn(matrix_figure([0, 1], text, [[1.0, 2.0], [3.0, 4.0]], text))
    assert text in drawn(finding_figure(rows, text))


def test_patches_stand_beside_match_and_its_chance():
    rows = [
        Row(5, "image", "match", 0.25, 0.125, 0.5),
        Row(5, "image", "match_chance", 0.1, 0.05, 0.2),
        Row(6, "image", "match", 0.9, 0.8, 1.0),
        Row(5, "text", "match", 0.9, 0.8, 1.0),
    ]
    [title] = [text for text in drawn(patch_figure([IMAGE], ["a dog"], [[]], 5, rows)) if "layer 5" in text]
    _, numbers = title.split("\n")
    assert numbers == "of all probed images: match 0.25 [0.12, 0.50], match_chance 0.10 [0.05, 0.20]"


def test_figures_of_nothing(tmp_path):
    drawn(caption_figure([], [], []))
    drawn(patch_figure([], [], [], 5))
    drawn(patch_figure([IMAGE], ["a dog"], [[]], 5))
    drawn(probe_figure({0: []}, 0, [], "", ""))
    assert panel_figure({0: []}, 0, Panel("l0", "l0"), "", "") is None
    assert heatmap_figure({0: []}, Panel("l0", "l0")) is None
    drawn(finding_figure([], ""))
    write_gallery(tmp_path / "gallery.jsonl", Captioned(["a"], [["b"]], [None]))
    assert [json.loads(line) for line in (tmp_path / "gallery.jsonl").read_text().splitlines()] == []


def test_a_run_may_show_no_caption(fit):
    flags = ["--captions.num_shown=0", "--trainer.max_steps=2", "--trainer.max_epochs=1"]
    assert fit(*flags, figures=True).trainer.global_step == 2
