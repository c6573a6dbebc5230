"""What a run measured before a checkpoint, read back from the tables in its folder.

A checkpoint holds the newest measurement alone, so that it does not grow from epoch to epoch.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn


def earlier_rows(trainer: Any, name: str, key: str, last: int) -> list[dict[str, Any]]:
    """Rows of a table up to a checkpoint; none in processes but the first, which writes the tables.

    A missing or damaged table is said, and a new one begins; what is left of it is kept beside it.

    Args:
        trainer: Lightning's, with the path of the checkpoint.
        name: Name of the table, such as ``probe.csv``.
        key: Column that orders the rows, ``epoch`` or ``step``.
        last: Newest value of `key` that the checkpoint knows of: later rows are of after it.
    """
    checkpoint = Path(trainer.ckpt_path)
    if not trainer.is_global_zero or checkpoint.parent.name != "checkpoints":
        return []
    path = checkpoint.parent.parent / name
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [_with_numbers(row) for row in csv.DictReader(file)]
        if not any(row[key] == last for row in rows):
            raise ValueError(f"it has no row of {key} {last}")
        return [row for row in rows if row[key] <= last]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        why = "missing" if isinstance(error, OSError) else f"damaged ({error})"
    if trainer.state.fn == "fit" and path.is_file():
        path.replace(path.with_name(f"{path.stem}.damaged{path.suffix}"))
    rank_zero_warn(
        f"{path} is {why}: the measurements before {key} {last} are lost, and a new table begins."
    )
    return []


def _with_numbers(row: dict[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {name: float(row[name] or "nan") for name in ("value", "low", "high")}
    numbers |= {name: int(row[name]) for name in ("epoch", "step") if name in row}
    if "layer" in row:
        numbers["layer"] = int(row["layer"]) if row["layer"] else None
    return row | numbers
