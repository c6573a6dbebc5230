"""``python -m dev.finding RUN UNTRAINED``: draws the README's pictures from a default run.

UNTRAINED is a run of one step without learning, for captions from before the training:

    python -m lightning_limber fit --trainer.max_steps 1 --model.optimizer.lr 0 --probe.every_n_epochs 0 \\
        --trainer.limit_val_batches 0 --trainer.logger.init_args.name untrained
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lightning_limber import load
from lightning_limber.data.scenes import SceneSet
from lightning_limber.probe.palette import COLOURS

EXCESS = {"excess_cosine_over_words_long": "cosine", "excess_l0_over_words_long": "l0"}


def curve(table: pd.DataFrame, group: str, metric: str) -> pd.DataFrame:
    rows = table[(table.epoch == table.epoch.max()) & (table.group == group) & (table.metric == metric)]
    return rows[rows.layer.notna() & rows.value.notna()]


def draw(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(13, 3.7))
    figure.subplots_adjust(left=0.04, right=0.99, top=0.88, bottom=0.14, wspace=0.14)
    sparsity, excess, words = figure.subplots(1, 3)
    for group, name in (("image", "image"), ("noise", "noise of its length"), ("text", "text"),
                        ("words_long", "random words of its length")):  # fmt: skip
        band(sparsity, curve(table, group, "l0"), COLOURS[group], name)
    sparsity.set_yscale("log")
    sparsity.set_yticks([50, 100, 200, 500], ["50", "100", "200", "500"])
    sparsity.minorticks_off()
    for metric, name in EXCESS.items():
        colour = COLOURS["image" if name == "cosine" else "control"]
        band(excess, curve(table, "image", metric), colour, f"image, {name}")
    excess.axhline(0, color="black", lw=0.8)
    excess.set_ylim(-0.2, 1.02)
    band(words, curve(table, "image", "lens_hit"), COLOURS["image"], "image")
    band(words, curve(table, "image", "lens_hit_chance"), COLOURS["image"], "other images' captions", ":")
    titles = (
        "Active latents a token: length, not language",
        "0: as random words of its length; 1: as text",
        "The logit lens says a word of the caption",
    )
    for axis, title in zip(figure.axes, titles, strict=True):
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("layer of the LLM")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)
    return figure


def band(axis: Any, rows: pd.DataFrame, colour: str, label: str, style: str = "-") -> None:
    axis.plot(rows.layer, rows.value, style, color=colour, marker="o", ms=3, label=label)
    axis.fill_between(rows.layer, rows.low, rows.high, color=colour, alpha=0.18, linewidth=0)


def draw_captions(trained: str, untrained: str, count: int = 3) -> Figure:
    """Held-out scenes with what is said of them before and after training."""
    held_out = SceneSet("val", count, 112, 0)
    images = [held_out[i].image for i in range(count)]
    written = {name: [load(run).caption(image) for image in images] for name, run in
               (("before", untrained), ("after", trained))}  # fmt: skip
    figure = Figure(figsize=(4.3 * count, 2.9))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.98, bottom=0.36, wspace=0.05)
    for i, axis in enumerate(figure.subplots(1, count)):
        axis.imshow(images[i])
        axis.axis("off")
        lines = [("true", held_out[i].captions[0]), *((name, texts[i]) for name, texts in written.items())]
        text = "\n".join(textwrap.fill(f"{name}: {said}", 58, max_lines=2) for name, said in lines)
        axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=9)
    return figure


if __name__ == "__main__":
    run, untrained = sys.argv[1:]
    draw(pd.read_csv(Path(run) / "probe.csv")).savefig("docs/finding.png", dpi=100)
    draw_captions(run, untrained).savefig("docs/captions.png", dpi=100)
