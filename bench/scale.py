"""How the probe's cost grows: with images, image tokens, layers, and the width of the SAEs.

Along an axis one size grows and the others stay; the probe is a run's first, which also reads the captions
alone. ``probe_s`` is the median over rounds (one for images), ``cpu_s`` the processor's time for it, which
other work on the machine disturbs less. ``deviation`` is the largest distance of an axis' points from their
least-squares line (of ``cpu_s``), as a share of the greatest value. Images are made when they are asked
for, so that ``peak_bytes``, of the images alone, is flat where the probe keeps none. ``--only`` names axes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from bench import measure
from bench.measure import Row
from bench.probe import Contenders
from bench.sizes import Setup

AXES = ("images", "tokens", "layers", "width")
IMAGES = (4, 16, 64)
"""Times as many as the other axes probe."""
LAYERS_OF_IMAGES = 3


def cases(setup: Setup, axis: str) -> Iterator[tuple[Contenders, int]]:
    """What to probe, and how many images of it."""
    size, layers = setup.size, setup.size.llm().num_hidden_layers

    def of_size(**changes: Any) -> tuple[Contenders, int]:
        return Contenders(replace(setup, size=replace(size, **changes))), size.num_images

    if axis == "images":
        contenders = Contenders(setup, LAYERS_OF_IMAGES)
        for factor in IMAGES:
            yield contenders, factor * size.num_images
    if axis == "tokens":
        for pool in (4, 2, 1):
            yield of_size(features=replace(size.many_tokens().features, pool=pool))
    if axis == "layers":
        for count in sorted({max(1, layers * quarters // 4) for quarters in (1, 2, 3, 4)}):
            yield Contenders(setup, count), size.num_images
    if axis == "width":
        for quarters in (1, 2, 4, 8):
            yield of_size(d_sae=size.d_sae * quarters // 4)


def value(axis: str, contenders: Contenders, images: int) -> int:
    values = {
        "images": images,
        "tokens": contenders.model.num_image_tokens,
        "layers": len(contenders.names),
        "width": contenders.setup.size.d_sae,
    }
    return values[axis]


def probe_once(contenders: Contenders, images: int) -> tuple[float, float, int]:
    """Seconds, processor's seconds and peak bytes."""
    contenders.probe = contenders.make_probe()  # No caption is known yet.
    seconds: list[float] = []

    def run() -> None:
        cpu = time.process_time()
        seconds.append(contenders.run("limber_first", contenders.batches(images))[0])
        seconds.append(time.process_time() - cpu)

    peak = measure.peak_memory(contenders.device, run)["peak_bytes"]
    return seconds[0], seconds[1], peak


def main(setup: Setup) -> Row:
    """Measures the axes."""
    rows: list[Row] = []
    deviation: dict[str, float] = {}
    for axis in setup.only or AXES:
        if axis not in AXES:
            raise ValueError(f"--only {axis}: allowed are {', '.join(AXES)}.")
        of_axis: list[Row] = []
        for contenders, images in cases(setup, axis):
            contenders.run("limber_first", contenders.batches(min(images, 2)))  # Warms up.
            rounds = [
                probe_once(contenders, images) for _ in range(1 if axis == "images" else setup.repeats)
            ]
            seconds, cpu, peak = (statistics.median(of_rounds) for of_rounds in zip(*rounds, strict=True))
            row: dict[str, Any] = {"axis": axis, "size": value(axis, contenders, images), "images": images}
            # The process keeps what earlier axes built.
            memory = {"peak_bytes": peak} if axis == "images" else {}
            of_axis.append(row | {"probe_s": seconds, "cpu_s": cpu} | memory)
            print(f"  {axis} {row['size']}: {seconds:.2f} s", file=sys.stderr)
        sizes, times = (np.array([row[name] for row in of_axis]) for name in ("size", "cpu_s"))
        line = np.polynomial.Polynomial.fit(sizes, times, 1)
        deviation[axis] = float(np.abs(line(sizes) - times).max() / times.max())
        rows += of_axis
    return {"deviation": deviation, "results": rows}


COLUMNS = ("axis", "size", "images", "probe_s", "cpu_s", "peak_bytes")
