"""``python -m dev.finding RUN UNTRAINED``: draws the README's pictures from a default run.

UNTRAINED is a run of one step without learning, for captions from before the training:

    python -m lightning_limber fit --trainer.max_steps 1 --model.optimizer.lr 0 --probe.every_n_epochs 0 \\
        --trainer.limit_val_batches 0 --trainer.logger.init_args.name untrained
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lightning_limber import load
from lightning_limber.data.scenes import SceneSet
from lightning_limber.probe.palette import COLOURS

PANELS = {
    "l0": "Sparsity: active latents a token",
    "loss_recovered": "Use: share of the mean's harm that the SAE undoes",
    "lens_hit": "Meaning: the logit lens says a caption word",
}


def curve(table: pd.DataFrame, epoch: int, group: str, metric: str) -> pd.DataFrame:
    rows = table[(table.epoch == epoch) & (table.group == group) & (table.metric == metric)]
    return rows[rows.layer.notna() & rows.value.notna()]


def draw(table: pd.DataFrame) -> Figure:
    last = table.epoch.max()
    figure = Figure(figsize=(13, 3.9))
    figure.subplots_adjust(left=0.045, right=0.99, top=0.86, bottom=0.24, wspace=0.16)
    for axis, (metric, title) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        lines = [(last, group, metric, group, "-") for group in ("image", "noise", "text")]
        lines.append((0, "image", metric, "image, untrained adapter", "--"))
        lines.append((last, "image", f"{metric}_chance", "chance: other images' captions", ":"))
        for epoch, group, name, label, style in lines:
            rows = curve(table, epoch, group, name)
            if rows.empty or (metric == "loss_recovered" and epoch == 0):
                continue
            colour = COLOURS["control"] if style == "--" else COLOURS[group]
            axis.plot(rows.layer, rows.value, style, color=colour, marker="o", ms=3, label=label)
            axis.fill_between(rows.layer, rows.low, rows.high, color=colour, alpha=0.18, linewidth=0)
        if metric == "l0":
            axis.set_yscale("log")
            axis.set_yticks([50, 100, 200, 500], ["50", "100", "200", "500"])
            axis.minorticks_off()
        else:
            axis.set_ylim(-0.02, 1.02)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("layer of the LLM")
        axis.grid(alpha=0.25)
    labels: dict = {}
    for axis in figure.axes:
        handles, names = axis.get_legend_handles_labels()
        labels = {**dict(zip(names, handles, strict=True)), **labels}
    figure.legend(labels.values(), labels, loc="lower center", ncols=5, frameon=False)
    return figure


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
