"""``python -m dev.scaling scale.json docs/scaling.png``: draws what ``bench scale`` measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning_limber.utils.figures import new_figure

TITLES = {
    "images": "probed images",
    "tokens": "image tokens",
    "layers": "layers",
    "width": "latents an SAE",
}


def main(source: Path, target: Path) -> None:
    found = json.loads(source.read_text())
    axes = list(found["deviation"])
    figure = new_figure(2.7 * len(axes), 2.8)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.95, bottom=0.18, wspace=0.75)
    for name, axis in zip(axes, figure.subplots(1, len(axes)), strict=True):
        rows = [row for row in found["results"] if row["axis"] == name]
        sizes = [row["size"] for row in rows]
        axis.plot(sizes, [row["cpu_s"] for row in rows], "o-", color="C0")
        axis.set_xlabel(TITLES[name])
        axis.set_ylabel("processor's seconds", color="C0")
        axis.set_xlim(0)
        axis.locator_params("x", nbins=3)
        axis.set_ylim(0)
        if "peak_bytes" not in rows[0]:
            continue
        memory = axis.twinx()
        memory.plot(sizes, [row["peak_bytes"] / 1e9 for row in rows], "s:", color="C1", markersize=4)
        memory.set_ylim(0, 1.3 * max(row["peak_bytes"] for row in rows) / 1e9)
        memory.set_ylabel("peak GB", color="C1")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
