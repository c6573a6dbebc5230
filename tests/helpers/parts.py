"""Parts of a run that a test asks more of."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_limber.models.limber import Limber
from lightning_limber.models.saes import load_saes
from lightning_limber.probe.config import ProbeConfig
from lightning_limber.probe.passes import Probe


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


def without_values(cli: Any, saes: Any, monkeypatch: Any, batch: Any, texts: int, **config: Any) -> Any:
    """A run's probe and a batch on tensors without values (meta), of which nobody can ask anything.

    Every `item`, `nonzero`, `unique` or mask used as an index would raise, and so would a tensor left on
    the host.

    Args:
        cli: The run.
        saes: Folder of its SAEs.
        monkeypatch: Takes out what transformers and autocast would ask.
        batch: Of `probe_batches`, with pictures.
        texts: Number of training captions that metrics read.
        config: Settings of the probe.
    """
    # transformers asks at the start of each forward whether sequences are packed.
    monkeypatch.setattr(
        "transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None
    )
    # Nor does autocast know the meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_kwargs: nullcontext())
    model = Limber(**cli.model.hparams)
    model.configure_model()
    found = load_saes(str(saes), "layer_{layer}", None, model.llm)
    model.to("meta")
    found = {name: sae.to("meta") for name, sae in found.items()}
    captions = partial(cli.datamodule.training_captions, texts)
    probe = Probe(model, found, sae_probe(cli).probe.text, ProbeConfig(**config), texts=captions)
    moved = move_data_to_device(batch, torch.device("meta"))
    # Features are copied to the host once a run, when they are first kept.
    for one in (moved, moved.other):
        if one is not None:
            one.held_out = False
    assert moved.pixel_values.is_meta
    return probe, moved
