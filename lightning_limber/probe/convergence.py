"""At which layer image tokens become like text, by a rule instead of by eye.

Venhoff et al. (arXiv 2506.11976) set their layer by hand; `TOLERANCES` holds the numbers
under which the rule finds it on all three of their curves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from lightning_limber.assets import ASSETS

# Allowed image/text ratio of each metric. The first three give layer 18 on the published curves, which
# is where their authors put it by hand; the others follow mse, as all of them are reconstruction
# errors, and cosine, bounded by 1, is held closer. A loss has no such ratio.
TOLERANCES = {
    "mse": 1.65,
    "l0": 1.1,
    "match": 0.75,
    "fvu": 1.65,
    "fvu_text": 1.65,
    "rel_error": 1.65,
    "cosine": 0.9,
}


def convergence_layer(
    layers: Sequence[int], image: Sequence[float], text: Sequence[float], tolerance: float
) -> int | None:
    """The first layer from which image/text stays within `tolerance` to the end.

    Args:
        layers: Layer numbers, ascending; need not be consecutive.
        image: The metric on image tokens at each of them.
        text: The metric on text tokens at each of them.
        tolerance: Above 1: the largest ratio allowed (errors, counts). Below 1: the smallest
            (similarities, rates).

    Returns:
        A member of `layers`; None if the last layer is already outside. A ratio that is NaN, or has
        no text to compare with (0), is outside.
    """
    first = None
    for layer, x, y in reversed(list(zip(layers, image, text, strict=True))):
        ratio = x / y if y else math.nan
        if not (ratio <= tolerance if tolerance > 1 else ratio >= tolerance):
            break
        first = layer
    return first


def published_curves() -> dict[str, Any]:
    """Curves of Venhoff et al., ``curves[metric][group]`` [L], with their ``layers`` [L] and source."""
    return json.loads((ASSETS / "venhoff2025.json").read_text(encoding="utf-8"))
