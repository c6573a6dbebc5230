"""The tidy table of a probe's numbers, as rows, as TensorBoard's tags and as files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_limber.probe.palette import CONTROLS
from lightning_limber.utils.files import write_whole

if TYPE_CHECKING:
    import pandas as pd


class Row(NamedTuple):
    """One number of the tidy table. `layer` is None for numbers about all layers."""

    layer: int | None
    group: str
    metric: str
    value: float
    low: float
    high: float


History = dict[int, list[Row]]
"""Rows of each probed epoch."""


def frame(rows: list[Row]) -> pd.DataFrame:
    """Rows as a table: layer, group, metric, value, low, high."""
    import pandas as pd

    return pd.DataFrame(rows, columns=Row._fields).astype({"layer": "Int64"})


def scalars(rows: list[Row]) -> dict[str, float]:
    """Values by the tag under which loggers have them, ``{metric}/{group}/layer_{l}``."""
    return {
        f"{row.metric}/{row.group}" + ("" if row.layer is None else f"/layer_{row.layer:02d}"): row.value
        for row in rows
        if not row.metric.endswith("_p") and not math.isinf(row.value)
    }


OVERVIEW = {
    "use": ("image",),
    "neighbour_lift": ("image", *CONTROLS),
    "excess_cosine_over_words_long": ("image",),
    "excess_l0_over_words_long": ("image",),
    "fvu": ("image", "text", "words_long"),
    "l0": ("image", "text", "words_long"),
    "norm": ("image", "text"),
    **{f"convergence_layer/{metric}": ("image",) for metric in ("cosine", "fvu", "l0")},
}
"""Metrics that loggers have by default, of these groups."""
OVERVIEW_LAYERS = 5


def overview_layers(rows: Sequence[Row]) -> list[int]:
    """At most five of the layers at which image tokens were measured: first, quarters, last."""
    found = sorted({row.layer for row in rows if row.group == "image" and row.layer is not None})
    count = min(OVERVIEW_LAYERS, len(found))
    return [found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count)]


def overview(rows: Sequence[Row], own: Collection[str] = ()) -> list[Row]:
    """The rows that a first look needs.

    Args:
        rows: Of one probe.
        own: Metrics of a user's own, which are shown of all groups.
    """
    layers = (None, *overview_layers(rows))
    return [
        row
        for row in rows
        if row.layer in layers and (row.metric in own or row.group in OVERVIEW.get(row.metric, ()))
    ]


def arrays_by_image(by_image: Mapping[tuple[str, str, int], Any], names: Sequence[str]) -> dict[str, Any]:
    """Sums by image as arrays of ``images_epoch_{n}.npz``.

    Args:
        by_image: Numerator and denominator [I, 2] by (metric, group, layer).
        names: Names of the I images.

    Returns:
        Metrics [G, L, I, 2] float32 by name, NaN where one was not measured, and ``groups`` [G], ``layers``
        [L] and ``names`` [I].
    """
    groups = list(dict.fromkeys(group for _, group, _ in by_image))
    layers = sorted({layer for _, _, layer in by_image})
    arrays: dict[str, Any] = {
        "names": np.array(names),
        "groups": np.array(groups),
        "layers": np.array(layers),
    }
    for (metric, group, layer), ratio in by_image.items():
        shape = (len(groups), len(layers), len(names), 2)
        array = arrays.setdefault(metric, np.full(shape, np.nan, dtype=np.float32))
        array[groups.index(group), layers.index(layer)] = ratio
    return arrays


def write_tables(
    folder: Path, history: History, epoch: int, tables: dict[str, list[dict[str, Any]]]
) -> None:
    """Writes all epochs so far as ``probe.csv`` and ``probe.parquet``, and this epoch's other tables.

    Args:
        folder: The run's folder; its name and its parent's are the column ``run``.
        history: Rows of each probed epoch.
        epoch: The one that was just probed.
        tables: Written as ``{name}_epoch_{n}.csv``.
    """
    import pandas as pd

    run = f"{folder.parent.name}/{folder.name}"
    table = pd.DataFrame(
        [(run, at, *row) for at, rows in sorted(history.items()) for row in rows],
        columns=["run", "epoch", *Row._fields],
    ).astype({"layer": "Int64"})
    write_whole(folder / "probe.csv", lambda part: table.to_csv(part, index=False))
    write_whole(folder / "probe.parquet", lambda part: table.to_parquet(part, index=False))
    for name, rows in tables.items():
        found = pd.DataFrame(rows)
        found.insert(0, "epoch", epoch)
        write_whole(folder / f"{name}_epoch_{epoch}.csv", partial(found.to_csv, index=False))
