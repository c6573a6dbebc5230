"""Parts of a run that a test asks more of."""

from __future__ import annotations

from typing import Any


def callback(cli: Any, kind: str) -> Any:
    """The run's callback of a class, such as ``SAEProbe``."""
    [found] = [one for one in cli.trainer.callbacks if type(one).__name__ == kind]
    return found


def sae_probe(cli: Any) -> Any:
    return callback(cli, "SAEProbe")


def probe_batches(cli: Any, num_images: int, interventions: bool = False) -> Any:
    """Held-out batches as the probe reads them."""
    from lightning_limber.callbacks.sae_probe import Batches

    return Batches(cli.trainer, num_images, "", interventions)


def values(cli, epoch: int, group: str, metric: str) -> list[float]:
    """One metric by layer, from the probe's history."""
    rows = sae_probe(cli).history[epoch]
    return [row.value for row in rows if (row.group, row.metric) == (group, metric)]
