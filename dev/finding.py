"""``python -m dev.finding RUN``: draws docs/finding.png, the README's figure, from ``RUN/probe.csv``."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lightning_limber.probe.palette import COLOURS

PANELS = {
    "l0": "Sparsity: active latents a token",
    "loss_recovered": "Use: loss that the SAE's reconstruction keeps",
    "lens_hit": "Meaning: images with a caption word in the logit lens",
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


if __name__ == "__main__":
    run = Path(sys.argv[1])
    draw(pd.read_csv(run / "probe.csv")).savefig("docs/finding.png", dpi=100)
