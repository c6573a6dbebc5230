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
from lightning_limber.probe.finding import finding_figure
from lightning_limber.probe.tables import Row


def last_probe(path: Path) -> list[Row]:
    table = pd.read_csv(path)
    table = table[(table.epoch == table.epoch.max()) & table.layer.notna()]
    return [Row(int(row[2]), *row[3:]) for row in table.itertuples(index=False)]


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
    finding_figure(last_probe(Path(run) / "probe.csv")).savefig("docs/finding.png", dpi=100)
    draw_captions(run, untrained).savefig("docs/captions.png", dpi=100)
